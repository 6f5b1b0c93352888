"""From somebody's checkpoint to a saved pair: pickles of NVlabs, folders of BigGAN-PyTorch and StudioGAN, state dicts."""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fastrefine.errors import FastrefineError, InputError
from fastrefine.models import foreign
from fastrefine.networks.cut import middle
from fastrefine.networks.discriminator import EndsInSigmoid
from fastrefine.priors import Normal, Prior, Uniform
from fastrefine.production import studiogan, unpickle
from fastrefine.production.configuration import Network
from fastrefine.production.named_code import Trust, imported, text_of
from fastrefine.production.saved_pair import CONFIG, ROLES, build, load_pair, save_pair
from fastrefine.production.weights_file import chosen, load_weights, read_content
from fastrefine.refiner import Refiner
from fastrefine.samplers import Collaborative

WIDTHS = ("z_dim", "dim_z", "latent_dim", "latent_size", "nz", "noise_dim")  # attributes that say how wide latents are
PERSISTENT = r"^@persistence\.persistent_class\s+class {}\b"


@dataclass
class Found:
    """One network of a checkpoint: its weights, the file they are from, and what may make it, best guess first."""

    state: dict[str, Tensor]
    source: str
    codes: list[str] = field(default_factory=list)
    arguments: dict[str, Any] = field(default_factory=dict)
    hint: str = ""  # what to say where it cannot be made
    whole: bool = False  # whether the arguments are a whole run's configuration, of which a network takes what it knows


def import_pair(
    source: str | Path, outdir: str | Path, *, code: str | Path = "", allow_pickle: bool = False, config: str | Path = "",
    generator: str = "", discriminator: str = "",
    arguments: tuple[Mapping[str, Any] | None, Mapping[str, Any] | None] = (None, None),
    weights: tuple[str | Path, str | Path] = ("", ""), keys: tuple[str, str] = ("", ""),
    prior: Prior | Mapping[str, Any] | None = None, check: bool = True, tell: Callable[[str], None] = lambda line: None,
    **saved: Any,
) -> Path:  # fmt: skip
    """Write the pair of somebody's checkpoint into ``outdir`` (new or empty), for ``load_pair``; returns the folder.

    source: a file of torch.save or .safetensors with both networks or one of them; a pickle {G, D, G_ema} of stylegan2-ada,
        stylegan3 and their descendants; a run's folder of BigGAN-PyTorch or StudioGAN.
    code: the folder of the checkout that the classes come from. What it holds is imported and trusted.
    allow_pickle: unpickle ``source``, which runs any code in it, in a process of its own. Only tensors, the names of classes
        and their arguments come out of that process. Without it no code in the file runs, and a file that needs it is refused.
    config: of StudioGAN: the .yaml file that the run was trained with.
    generator, discriminator, arguments: "package.module:Class" and keywords (JSON values) for (generator, discriminator), where
        the checkpoint does not say or says it wrongly.
    weights, keys: another file for (generator, discriminator), and which state dict of a file, e.g. "g_ema".
    prior: of the latents; None: as the generator says, standard normal.
    check: try the pair, and refuse one that makes no images and logits. Where ``saved`` does not say, the place ``at`` is then
        one after which about half of the generator's work is left, and a sigmoid at the end of D is found. tell: is given lines
        on what was taken.
    saved: further arguments of ``save_pair``, e.g. at, coupling, discriminator_output; they win over what was found. Without
        ``sampler`` the pair has Collaborative(), which finds its step size by itself.

    Raises InputError, and then writes nothing.

    Example: ``fr.import_pair("ckpt.pt", "pair", generator="mygan:G", discriminator="mygan:D", prior=fr.Normal(64))``
    """
    source, outdir = Path(source), Path(outdir)
    if outdir.exists() and (not outdir.is_dir() or any(outdir.iterdir())):
        raise InputError(f"{outdir} is there already and not empty; wanted a new folder for the pair")
    checkout = Path(code).resolve() if code else None
    if checkout and not checkout.is_dir():
        raise InputError(f"code is {str(code)!r}, which is no folder; wanted the checkout that the networks' classes come from")
    found, facts = _read(source, checkout, Path(config) if config else None, allow_pickle, weights, keys)
    trust, specs, made = Trust(everything=True, checkout=str(checkout or "")), [], []
    for role, own, kwargs in zip(ROLES, (generator, discriminator), arguments, strict=True):
        spec, module = _made(found[role], role, own, kwargs or {}, trust)
        tell(f"{role}: {spec.code} from {found[role].source}, {sum(p.numel() for p in module.parameters()):,} parameters")
        specs.append(spec)
        made.append(module)
    g, d = made
    facts = {"sampler": Collaborative(), **_conventions(g, d), **facts, **({"prior": prior} if prior else {}), **saved}
    if "prior" not in facts:
        raise InputError(f"the generator does not say what its latents are; pass {_prior_of(g)}")
    outdir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=outdir.parent, suffix=".part") as folder:
        part = save_pair(
            Path(folder) / "pair", g, d, code=(specs[0].code, specs[1].code), checkout=checkout or "",
            arguments=(specs[0].arguments, specs[1].arguments), **facts,
        )  # fmt: skip
        if check:
            facts |= _tried(part, facts)
        os.replace(part, outdir)
    for name, value in facts.items():
        tell(f"{name}: {text_of(value, name) if callable(value) else value}")
    return outdir


def _read(
    source: Path,
    checkout: Path | None,
    config: Path | None,
    allow_pickle: bool,
    weights: tuple[Any, Any],
    keys: tuple[str, str],
) -> tuple[dict[str, Found], dict[str, Any]]:  # fmt: skip
    """Both networks of a source by role, and arguments of ``save_pair`` that it says."""
    if (source / CONFIG).is_file():
        raise InputError(f"{source} is a saved pair already: fastrefine refine --pair {source}")
    found, facts = _folder(source, config) if source.is_dir() else ({}, {})
    files = {role: Path(file) if file else source for role, file in zip(ROLES, weights, strict=True) if file or not found}
    contents = {file: _contents(file, checkout, allow_pickle) for file in dict.fromkeys(files.values())}
    for role, file in files.items():
        content, described = contents[file]
        state = chosen(content, keys[ROLES.index(role)], file, role)
        first = next(iter(state.values()))
        own = next((facts for key, facts in described.items() if any(first is x for x in content[key].values())), {})
        known = Found(state, file.name, _codes(own, checkout), own.get("arguments", {}), own.get("problem", ""))
        found[role] = replace(found[role], state=state, source=file.name) if role in found else known
    return found, facts


def _contents(file: Path, checkout: Path | None, allow_pickle: bool) -> tuple[Any, dict[str, dict[str, Any]]]:
    """What a file holds, and by the keys of an unpickled one what made its networks."""
    try:
        return read_content(file), {}
    except InputError:
        if not allow_pickle or not file.is_file():
            raise
    return _unpickled(file, checkout)


def _unpickled(file: Path, checkout: Path | None) -> tuple[Any, dict[str, dict[str, Any]]]:
    """The state dicts of a pickle by key, and what made their networks. Its code runs in another process, not in this one."""
    here = str(Path(unpickle.__file__).parents[2])
    path = os.pathsep.join([*([str(checkout)] if checkout else []), here, *filter(None, [os.environ.get("PYTHONPATH", "")])])
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-m", unpickle.__name__, str(file.resolve()), folder], cwd=folder, capture_output=True, text=True,
            env={**os.environ, "PYTHONPATH": path},
        )  # fmt: skip
        listed = Path(folder) / unpickle.NETWORKS
        if done.returncode or not listed.is_file():
            why = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            hint = "" if checkout else "; pass --code PATH, the checkout that its classes come from"
            raise InputError(f"{file} could not be unpickled ({why}){hint}")
        facts = {str(entry["key"]): entry for entry in json.loads(listed.read_text())}
        content = {key: load_file(Path(folder) / Path(entry["weights"]).name) for key, entry in facts.items()}
    return content, facts


def _codes(facts: Mapping[str, Any], checkout: Path | None) -> list[str]:
    """Which classes of the checkout may be that of an unpickled network, first those whose file is the text in the pickle.

    Only persistent classes are searched for: no module is imported because a pickle names it.
    """
    name, source = str(facts.get("class", "")), str(facts.get("source", ""))
    if not source or checkout is None:
        return []
    wanted = re.compile(PERSISTENT.format(re.escape(name)), re.MULTILINE)
    texts = {file: file.read_text(errors="replace") for file in sorted(checkout.rglob("*.py"))}
    fits = sorted((file for file, text in texts.items() if wanted.search(text)), key=lambda file: texts[file] != source)
    return [f"{'.'.join(file.relative_to(checkout).with_suffix('').parts)}:{name}" for file in fits]


def _made(part: Found, role: str, code: str, arguments: Mapping[str, Any], trust: Trust) -> tuple[Network, nn.Module]:
    """The network of the first class that the weights fit, or of ``code``."""
    codes = [code] if code else part.codes
    if not codes:
        raise InputError(
            f"{part.source} does not say which class its {role} is of; pass --{role} package.module:Class, --{role}-args JSON, "
            "and --code PATH, the checkout that has the class"
        )
    problems = []
    for where in codes:
        try:
            target = imported(where, role, trust) if code else _of_checkout(where, role, trust)
            known = _known(part.arguments, target) if part.whole else part.arguments
            spec = Network(where, _json({**known, **arguments}, role))
            module = build(spec, role, trust)
            load_weights(module, part.state, part.source, role)
            return spec, module
        except InputError as error:
            problems.append(str(error))
    raise InputError("; ".join([*problems, *filter(None, [part.hint])]))


def _of_checkout(code: str, role: str, trust: Trust) -> Any:
    """A class that the checkpoint names, or a function of ours; InputError unless it is a network of the user's checkout."""
    module = code.partition(":")[0]
    if module == studiogan.__name__:
        return imported(code, role, trust)
    if not trust.checkout or not Path(trust.checkout, *module.split(".")).with_suffix(".py").is_file():
        raise InputError(
            f"the checkpoint names {code!r} as its {role}, and it was not imported: wanted --code PATH, the checkout that has "
            f"{module}, or the class itself as --{role} {code}"
        )
    target = imported(code, role, trust)
    if not (isinstance(target, type) and issubclass(target, nn.Module)):
        raise InputError(f"the checkpoint names {code!r} as its {role}, which is no torch.nn.Module class and was not called")
    return target


def _known(configuration: Mapping[str, Any], kind: Any) -> dict[str, Any]:
    """What a class takes by name of a configuration; a ReLU is left to its default, for it is no JSON value."""
    names = inspect.signature(kind).parameters
    return {k: v for k, v in configuration.items() if k in names and not isinstance(v, nn.ReLU)}


def _json(arguments: Mapping[str, Any], role: str) -> dict[str, Any]:
    try:
        return json.loads(json.dumps(dict(arguments)))
    except (TypeError, ValueError) as error:
        raise InputError(f"arguments of the {role} are no JSON ({error}); pass them by --{role}-args") from error


# --- folders of well-known repositories


def _folder(folder: Path, config: Path | None) -> tuple[dict[str, Found], dict[str, Any]]:
    if not folder.is_dir():
        raise InputError(f"{folder} is not there")
    if any(folder.rglob("model=D-*.pth")):
        return _studiogan(folder, config)
    if any(folder.rglob("D*.pth")):
        return _biggan(folder)
    raise InputError(
        f"{folder} is no run that is known: wanted G.pth and D.pth (BigGAN-PyTorch), model=G-...pth and model=D-...pth "
        "(StudioGAN), or one file"
    )


def _newest(folder: Path, *patterns: str) -> Path | None:
    """The newest file of the first pattern that any file has."""
    for pattern in patterns:
        if files := sorted(folder.rglob(pattern), key=lambda file: file.stat().st_mtime):
            return files[-1]
    return None


def _biggan(folder: Path) -> tuple[dict[str, Found], dict[str, Any]]:
    """weights/EXPERIMENT/G_ema.pth, G.pth, D.pth and state_dict.pth, which has the configuration; "_best0" etc. may follow."""
    d = _newest(folder, "D.pth", "D_best*.pth", "D_copy*.pth")
    if d is None:
        raise InputError(f"{folder} has no D.pth, D_best0.pth or D_copy0.pth; wanted a weights folder of BigGAN-PyTorch")
    suffix = d.name.removeprefix("D")
    files = {name: d.parent / f"{name}{suffix}" for name in ("G_ema", "G", "state_dict")}
    g = next((files[name] for name in ("G_ema", "G") if files[name].is_file()), None)
    if g is None:
        raise InputError(f"{d.parent} has no G{suffix} or G_ema{suffix}; wanted a weights folder of BigGAN-PyTorch")
    config: Any = {}
    if files["state_dict"].is_file():
        with contextlib.suppress(InputError):  # where it holds more than data; the hint below says what to pass
            config = read_content(files["state_dict"]).get("config")
    config = dict(config, no_optim=True, skip_init=True) if isinstance(config, Mapping) and config else {}
    found = {}
    for role, file, kind in zip(ROLES, (g, d), ("Generator", "Discriminator"), strict=True):
        code = f"{config.get('model', 'BigGAN')}:{kind}"
        hint = "" if config else f"no configuration can be read from state_dict{suffix}: pass --{role}-args"
        state = chosen(read_content(file), "", file, role)
        found[role] = Found(state, f"{file.parent.name}/{file.name}", [code], config, hint, whole=True)
    return found, {}


def _studiogan(folder: Path, config: Path | None) -> tuple[dict[str, Found], dict[str, Any]]:
    """checkpoints/RUN/model=G_ema-best-weights-step=N.pth, model=G-..., model=D-..., each with a "state_dict"."""
    if config is None:
        raise InputError(f"{folder} is a run of StudioGAN; pass --config FILE, the .yaml that it was trained with")
    try:
        import yaml
    except ImportError as error:
        raise InputError("StudioGAN's configurations need PyYAML: pip install pyyaml") from error
    try:
        values = yaml.safe_load(config.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise InputError(f"{config} cannot be read as YAML ({error})") from error
    if not isinstance(values, Mapping):
        raise InputError(f"{config} holds a {type(values).__name__}; wanted a configuration of StudioGAN")
    found = {}
    for role, names in zip(ROLES, (("G_ema", "G"), ("D",)), strict=True):
        file = _newest(folder, *(f"model={name}-{when}-*.pth" for when in ("best", "current") for name in names))
        if file is None:
            raise InputError(f"{folder} has no model={names[-1]}-best-weights-step=N.pth or model={names[-1]}-current-...")
        state = chosen(read_content(file), "", file, role)
        found[role] = Found(state, file.name, [f"{studiogan.__name__}:{role}"], {"configuration": dict(values)})
    model = values.get("MODEL") or {}
    data = values.get("DATA") or {}
    size = int(model.get("z_dim", 128))
    facts: dict[str, Any] = {"prior": Uniform(size) if model.get("z_prior") == "uniform" else Normal(size)}
    if {model.get("g_cond_mtd", "W/O"), model.get("d_cond_mtd", "W/O")} == {"W/O"}:
        return found, {**facts, "generate": studiogan.generate, "discriminate": studiogan.discriminate}
    return found, {**facts, "output_key": "adv_output", "num_classes": int(data.get("num_classes", 10))}


# --- what the networks themselves say


def _conventions(g: nn.Module, d: nn.Module) -> dict[str, Any]:
    """Arguments of ``save_pair`` that follow from whose networks these are."""
    width = next((getattr(g, name) for name in WIDTHS if isinstance(getattr(g, name, None), int)), None)
    facts: dict[str, Any] = {} if width is None else {"prior": Normal(width)}
    if all(hasattr(g, name) for name in ("z_dim", "c_dim", "mapping", "synthesis")):
        if g.c_dim:
            facts |= {"generate": foreign.stylegan_generate, "num_classes": g.c_dim}
        else:
            facts |= {"generator_kwargs": {"noise_mode": "const", "force_fp32": True}}
        if getattr(d, "c_dim", 0):
            facts |= {"discriminate": foreign.stylegan_discriminate}
        else:
            facts |= {"discriminator_kwargs": {"force_fp32": True}}
    elif hasattr(g, "dim_z") and isinstance(getattr(g, "shared", None), nn.Module):
        facts |= {"generate": foreign.biggan_generate, "num_classes": getattr(g, "n_classes", 0)}
    for module in d.modules():
        if "minibatchstd" in type(module).__name__.lower():
            facts |= {"coupling": "freeze", "group_size": getattr(module, "group_size", None)}
    return facts


def _prior_of(g: nn.Module) -> str:
    """A --prior to type: of a shape that ``g`` takes, if its first layer tells one, else an example."""
    said = '--prior \'{{"name": "normal", "shape": {}}}\''
    first = next((module for module in g.modules() if isinstance(module, nn.Linear | nn.modules.conv._ConvNd)), None)
    width = getattr(first, "in_features", getattr(first, "in_channels", 0))
    for shape in ([width], [width, 1, 1]):
        with contextlib.suppress(Exception), torch.no_grad():
            g(torch.zeros(2, *shape))
            return f"{said.format(shape)}, whose shape it takes, if it was trained on normal ones"
    return (
        f"e.g. {said.format([128])}, with the shape of one latent: [128, 1, 1] where the generator begins with a convolution, "
        "as a DCGAN does"
    )


def _tried(folder: Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    """What trying the pair of a folder adds to the facts that it was saved with: place, and what D returns. They are saved too.

    Raises InputError where it does not make images and logits.
    """
    pair = load_pair(folder, trust_code=True)
    labels = 0 if any(pair.takes_labels(caller)[1] for caller in ("generate", "discriminate")) else None
    options = {"max_steps": 0, "stop": None, "sampler": "collaborative"}
    added: dict[str, Any] = {}
    try:
        try:
            Refiner.from_pair(pair, **options).sample(4, labels=labels)
        except EndsInSigmoid:
            if "discriminator_output" in facts:
                raise
            added["discriminator_output"] = "probability"
            Refiner.from_pair(pair, **options, **added).sample(4, labels=labels)
    except FastrefineError as error:
        raise InputError(f"the networks were read, but do not work as a pair, and nothing was written: {error}") from error
    if "at" not in facts:
        with contextlib.suppress(FastrefineError):  # then it stays the input
            place = middle(pair.layers())
            Refiner.from_pair(pair, **options, **added, at=place).sample(4, labels=labels)
            added["at"] = place
    if added:
        pair.saved(folder, **added)
    return added
