"""A generator and a discriminator in files: saved pairs, the embedded pairs, and networks named by a configuration.

A saved pair is a folder: config.json (where the architectures come from, prior, defaults) and two .safetensors files.
Loading it constructs the classes that config.json names, see ``named_code``; no code in the folder runs.
"""

from __future__ import annotations

import copy
import inspect
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from fastrefine import checks, priors, samplers, stopping
from fastrefine.errors import InputError
from fastrefine.networks.calls import attempt, takes_labels
from fastrefine.networks.copies import mark_shaped, unwrap
from fastrefine.networks.cut import Layer, layers
from fastrefine.priors import Prior, as_prior
from fastrefine.production import hub
from fastrefine.production.configuration import CALLS, RUN, USUAL_RANGE, Configuration, Network, changed_sampler
from fastrefine.production.images import SHAPED_ON
from fastrefine.production.named_code import HOW, UNTRUSTED, Trust, check_inside, function, network_code, text_of
from fastrefine.production.weights_file import load_weights, read_weights
from fastrefine.samplers import Sampler, as_sampler
from fastrefine.stopping import StopRule, as_rule, shown
from fastrefine.training.distilled import DistilledGenerator

CONFIG = "config.json"
EMBEDDED = {"digits": (32, "act2"), "mnist": (64, "act7")}  # elements of a latent, default place
ROLES = ("generator", "discriminator")
DISTILLED = f"{DistilledGenerator.__module__}:{DistilledGenerator.__qualname__}"
DEFAULTS = ("at", "discriminator_output", "image_range", "num_classes", *CALLS)
FUNCTIONS = {"generate": "generator", "discriminate": "discriminator"}  # -> whom they call
PLAIN = Configuration(pair="digits")  # where nothing is given
USUAL = {
    "at": "input",
    "discriminator_output": "logit",
    "image_range": USUAL_RANGE,
    "num_classes": 0,
    "coupling": "refuse",
    **RUN,
}


@dataclass(frozen=True)
class Pair:
    """Two networks in eval mode, and what was saved with them: all that ``Refiner.from_pair`` needs.

    prior: of the latents. defaults: JSON values by the names of DEFAULTS and RUN, as far as they were saved.
    specs: where the networks come from.
    calls: how they are called, as arguments of Refiner: those of ``configuration.CALLS`` that were saved.
    checkout: the folder in which the modules of the networks lie, "" where they are installed.
    highest_real_logit: as for Refiner, where it was saved.

    Example: ``fr.Refiner.from_pair(fr.load_pair("digits"), sampler=fr.Collaborative(0.3), max_steps=20)``
    """

    generator: nn.Module
    discriminator: nn.Module
    prior: Prior
    defaults: dict[str, Any]
    specs: tuple[Network, Network]
    calls: dict[str, Any] = field(default_factory=dict)
    checkout: str = ""
    highest_real_logit: float | None = None

    @property
    def at(self) -> str:
        """The place whose output is refined."""
        return self._said("at")

    @property
    def sampler(self) -> Sampler:
        return as_sampler(self._said("sampler"))

    @property
    def stop(self) -> StopRule:
        return as_rule(self._said("stop"))

    @property
    def max_steps(self) -> int:
        return self._said("max_steps")

    @property
    def discriminator_output(self) -> str:
        """ "logit" | "probability" | "critic"."""
        return self._said("discriminator_output")

    @property
    def image_range(self) -> tuple[float, float]:
        """Of the generator's images."""
        low, high = self._said("image_range")
        return low, high

    @property
    def num_classes(self) -> int:
        """How many classes labels have, 0 where there are none or it was not saved."""
        return self._said("num_classes")

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of Refiner by name, without the networks; without ``stop`` where the pair has no rule of its own."""
        names = ("sampler", "at", "max_steps", "prior", "discriminator_output", "highest_real_logit")
        stop = {"stop": self.stop} if "stop" in self.defaults else {}
        return {**{name: getattr(self, name) for name in names}, **stop, **self.calls}

    def _said(self, name: str) -> Any:
        return self.defaults.get(name, USUAL[name])

    def __repr__(self) -> str:
        labels = f", {self.num_classes} classes" if self.num_classes else ""
        called = f", {', '.join(self.calls)} given" if self.calls else ""
        low, high = self.image_range
        return (
            f"Pair({checks.network(self.generator)}, {checks.network(self.discriminator)}, prior={self.prior!r}, "
            f"at={self.at!r}, sampler={self.sampler!r}, max_steps={self.max_steps}, stop={shown(self.stop)}, "
            f"{self.discriminator_output}, images {low:g} to {high:g}{labels}{called})"
        )

    def layers(self, conditions: Mapping[str, torch.Tensor] | None = None) -> list[Layer]:
        """``fastrefine.layers`` of the generator, as the pair calls it. conditions: further inputs (N, ...) by name.

        Raises InputError where the generator fails.

        Example: ``[layer.name for layer in fr.load_pair("digits").layers()]``
        """
        z = self.prior.sample(torch.arange(8), 0)
        labels = torch.zeros(len(z), dtype=torch.int64) if self.takes_labels("generate")[1] else None
        rows = {name: value[torch.arange(len(z)) % len(value)] for name, value in (conditions or {}).items()}
        kwargs, generate = (self.calls.get(name) for name in ("generator_kwargs", "generate"))
        return attempt("generator", lambda: layers(self.generator, z, labels, kwargs, generate, rows), z)

    def saved(self, folder: Path, *, generator: nn.Module | None = None, discriminator: nn.Module | None = None,
              **defaults: Any) -> Path:  # fmt: skip
        """``save_pair`` this pair with other weights, networks or defaults."""
        g, d = self.specs
        return save_pair(
            folder, generator or self.generator, discriminator or self.discriminator, code=(g.code, d.code),
            arguments=(g.arguments, d.arguments), prior=self.prior, checkout=self.checkout,
            **self.defaults | defaults,
        )  # fmt: skip

    def takes_labels(self, caller: str) -> tuple[bool, bool]:
        """(whether labels are used, whether they are needed) by "generate", the call of G, or "discriminate", that of D."""
        network = FUNCTIONS[caller]
        if caller not in self.calls:
            return takes_labels(getattr(self, network), self.calls.get(f"{network}_kwargs", {}))
        labels = inspect.signature(self.calls[caller]).parameters.get("labels")
        return labels is not None, labels is not None and labels.default is labels.empty


def save_pair(
    folder: str | Path, generator: nn.Module, discriminator: nn.Module, *, code: tuple[str, str], prior: Prior,
    arguments: tuple[Mapping[str, Any], Mapping[str, Any]] = ({}, {}), at: str = "input",
    discriminator_output: str = "logit", image_range: tuple[float, float] = (-1.0, 1.0), num_classes: int = 0,
    generate: Callable[..., Any] | str = "", discriminate: Callable[..., Any] | str = "",
    generator_kwargs: Mapping[str, Any] = MappingProxyType({}), discriminator_kwargs: Mapping[str, Any] = MappingProxyType({}),
    output_key: str | int | None = None, coupling: str = "refuse", group_size: int | None = None,
    pack: int = 1, on_noise: str = "refuse", sampler: Sampler | str | Mapping[str, Any] | None = None,
    stop: StopRule | float | str | None = None, max_steps: int | None = None, checkout: str | Path = "",
    highest_real_logit: float | None = None,
) -> Path:  # fmt: skip
    """Write a pair into ``folder`` (created), for ``load_pair`` and ``fastrefine refine --pair FOLDER``; returns the folder.

    code: "package.module:callable" of (generator, discriminator). Called with ``arguments`` (keywords, JSON values), it makes
    the architecture. Name classes: a pair that names functions is only loaded with ``trust_code=True``.
    at, discriminator_output, image_range, num_classes: defaults of a run with this pair.
    generate ... on_noise: how the networks are called, as for ``Refiner``. A function is kept by its name, so it stands at
    the top level of a module (no lambda), or is given as "package.module:function"; the keywords are JSON values.
    sampler, stop, max_steps: what ``Refiner.from_pair`` and commands do with this pair unless they are told otherwise, as for
    ``Refiner``. None: Collaborative(0.1), no rule, 50 steps.
    checkout: the folder in which the modules of ``code`` lie, if they are not installed. Who loads the pair names it in
    PYTHONPATH, or passes ``trust_code=True``.
    highest_real_logit: as for ``Refiner``; ``fastrefine shape`` writes that of the images that it shaped on.

    Of wrapped networks (DataParallel, torch.compile) the network inside is saved. Of a distilled generator ``code`` and
    ``arguments`` make the generator that it was distilled from. Raises InputError where the weights do not
    fit what ``code`` makes, so every saved pair can be loaded, and where the generator has no module ``at``. Classes of the
    running program (``__main__``) are refused: no other process can import them. An earlier pair
    in the folder is replaced when all of the new one is written.

    Example: ``fr.save_pair("mypair", g, d, code=("mygan:Generator", "mygan:Discriminator"), prior=fr.Normal(16), at="1")``
    """
    folder = Path(folder)
    if not isinstance(code, tuple | list) or [type(part) for part in code] != [str, str]:
        raise InputError(f'code is {code!r}; wanted two texts, ("package.module:Generator", "package.module:Discriminator")')
    for where in code:
        if where.partition(":")[0] == "__main__":
            name = where.partition(":")[2]
            raise InputError(
                f"code names {where!r}, a class of the running program, which no other program can import; put it in a file of "
                f'its own, e.g. mynetworks.py, import it from there, and pass "mynetworks:{name}"'
            )
    networks = [unwrap(network) for network in (generator, discriminator)]
    for network, name in zip(networks, ROLES, strict=True):
        if not isinstance(network, nn.Module):
            raise InputError(f"the {name} is a {type(network).__name__}; wanted a torch.nn.Module")
    names = {"input", "output", *dict(networks[0].named_modules(remove_duplicate=False))} - {""}
    if at.partition("#")[0] not in names:
        raise InputError(f"at is {at!r}, no module of the generator; wanted one of {', '.join(sorted(names)[:20])}")
    try:
        g_arguments, d_arguments = map(_json, arguments)
    except (TypeError, ValueError) as error:
        raise InputError(f"arguments are {arguments!r}, no two objects of JSON ({error}); wanted ({{...}}, {{...}})") from error
    try:
        g_kwargs, d_kwargs = map(_json, (generator_kwargs, discriminator_kwargs))
    except (TypeError, ValueError) as error:
        raise InputError(f"generator_kwargs or discriminator_kwargs are no object of JSON ({error}); wanted {{...}}") from error
    defaults = Configuration(
        pair=str(folder), at=at, discriminator_output=discriminator_output, image_range=image_range, num_classes=num_classes,
        generate=text_of(generate, "generate") if generate else "", generator_kwargs=g_kwargs, output_key=output_key,
        discriminate=text_of(discriminate, "discriminate") if discriminate else "", discriminator_kwargs=d_kwargs,
        coupling=coupling, group_size=group_size, pack=pack, on_noise=on_noise, max_steps=max_steps,
        sampler={} if sampler is None else samplers.described(as_sampler(sampler)),
        stop="" if stop is None else stopping.described(as_rule(stop)),
    )  # fmt: skip  # which checks them
    g = networks[0]
    if isinstance(g, DistilledGenerator) and code[0] != DISTILLED:
        caller = text_of(g.own_generate, "generate") if g.own_generate else None
        inner = {"code": code[0], "arguments": g_arguments}
        g_arguments = _json({**g.arguments, "generator": inner, "generate": caller, "report": g.report})
        code = DISTILLED, code[1]
    config: dict[str, Any] = {}
    weights, trust = {}, Trust(everything=True, checkout=str(checkout and Path(checkout).resolve()))
    for name, network, where, given in zip(ROLES, networks, code, (g_arguments, d_arguments), strict=True):
        state = {k: v.detach().contiguous().clone() for k, v in network.state_dict().items()}
        load_weights(build(Network(where, given), name, trust), state, f"the {name}")
        weights[f"{name}.safetensors"] = state
        config[name] = {"code": where, "arguments": given, "weights": f"{name}.safetensors"}
    kept = {name: getattr(defaults, name) for name in DEFAULTS}
    kept |= {name: "" for name in ("coupling", "on_noise") if kept[name] == "refuse"}  # as a Refiner does by itself
    config |= {"prior": priors.described(as_prior(prior))}
    config |= {name: getattr(defaults, name) for name in RUN if getattr(defaults, name) != getattr(PLAIN, name)}
    config |= {"checkout": trust.checkout} if checkout else {}
    if highest_real_logit is not None:
        checks.number("highest_real_logit", highest_real_logit)
        config["highest_real_logit"] = float(highest_real_logit)
    config |= {name: value for name, value in kept.items() if name not in CALLS or value != getattr(PLAIN, name)}
    text = json.dumps(config, indent=1) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, suffix=".part") as made:
        part = Path(made)
        for file, state in weights.items():
            save_file(state, part / file)
        (part / CONFIG).write_text(text)
        for file in (*weights, CONFIG):
            os.replace(part / file, folder / file)
    return folder


def load_pair(folder: str | Path, *, allow_pickle: bool = False, trust_code: bool = False) -> Pair:
    """The pair of a folder, an embedded one ("digits", "mnist"), or one of the Hub. Raises InputError that names what is wrong.

    folder: also "user/name" or "user/name@revision", a repository of the Hugging Face Hub (needs huggingface_hub), where no
    folder is called that; or the folder of a snapshot of one.

    Of the code that config.json names, only classes that are torch.nn.Modules are used, and no module in the folder itself is
    imported. trust_code: any code may be named, as by whoever wrote the file; also functions that make networks.

    Example: ``pair = fr.load_pair("digits"); pair.generator(torch.randn(4, 32)).shape  # (4, 1, 8, 8)``
    """
    if str(folder) in EMBEDDED and not Path(folder).exists():
        return embedded_pair(str(folder))
    if not Path(folder).exists() and hub.NAME.fullmatch(str(folder)):
        folder = hub.snapshot(str(folder))
    folder = Path(folder)
    file = folder / CONFIG
    if not file.is_file():
        why = f"has no {CONFIG}" if folder.exists() else "is not there"
        raise InputError(
            f"{folder} {why}; wanted a folder of fastrefine.save_pair, or the name of an embedded pair, {' or '.join(EMBEDDED)}"
        )
    try:
        config = json.loads(file.read_text())
        g, d = (Network(**config[name]) for name in ROLES)
        given, checkout = dict(config["prior"]), str(config.get("checkout", ""))
        highest = config.get("highest_real_logit")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{file} is no configuration of a pair ({type(error).__name__}: {error})") from error
    here, places = [], [folder]
    blobs = folder.parent.parent / "blobs"
    if folder.parent.name == "snapshots" and not blobs.is_symlink():  # whose files are links into the repository's own blobs
        places.append(blobs)
    for spec in (g, d):
        check_inside(spec.weights, file, *places)
        here.append(replace(spec, weights=str(folder / spec.weights)))
        if spec.code.endswith(".pt2"):
            check_inside(spec.code, file, *places)
            here[-1] = replace(here[-1], code=str(folder / spec.code))
    trust = Trust(trust_code, file=file, checkout=checkout)
    said = {name: config[name] for name in (*DEFAULTS, *RUN) if name in config}
    try:
        if highest is not None:
            checks.number("highest_real_logit", highest)
        checked, prior = Configuration(pair=str(folder), **said), as_prior(given)
        if checked.sampler:
            as_sampler(checked.sampler)
    except InputError as error:
        raise InputError(f"{file}: {error}") from error
    defaults = {name: getattr(checked, name) for name in said if getattr(checked, name) != getattr(PLAIN, name)}
    return Pair(*_loaded(here, trust, allow_pickle), prior, defaults, (g, d), _calls(checked, trust), checkout, highest)


def _calls(configuration: Configuration, trust: Trust) -> dict[str, Any]:
    """The arguments of Refiner among a configuration's CALLS that are given, their functions imported."""
    given = {name: getattr(configuration, name) for name in CALLS}
    given = {name: value for name, value in given.items() if value != getattr(PLAIN, name)}
    return {name: function(value, name, trust) if name in FUNCTIONS else value for name, value in given.items()}


def _json(values: Mapping[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(dict(values)))


def _loaded(
    specs: Sequence[Network], trust: Trust, allow_pickle: bool, roles: Sequence[str] = ROLES
) -> tuple[nn.Module, nn.Module]:
    g, d = (load_network(spec, name, trust=trust, allow_pickle=allow_pickle) for spec, name in zip(specs, roles, strict=True))
    return g, d


def load_network(network: Network, name: str, *, trust: Trust = UNTRUSTED, allow_pickle: bool = False) -> nn.Module:
    """The network of a specification, on the CPU in eval mode; name: its role, for errors."""
    if network.code.endswith(".pt2"):
        return _exported(network.code, name, trust)
    module = build(network, name, trust)
    if not network.weights:
        raise InputError(f"the {name} has no weights; pass its .safetensors or torch.save file")
    weights = read_weights(Path(network.weights), network.key, allow_pickle=allow_pickle, role=name)
    load_weights(module, weights, network.weights, name)
    if name == "discriminator" and (Path(network.weights).parent / SHAPED_ON).is_file():
        mark_shaped(module)
    return module.eval()


def configured(
    configuration: Configuration, *, trust: Trust = UNTRUSTED, allow_pickle: bool = False, roles: Sequence[str] = ROLES
) -> tuple[Pair, Configuration]:
    """The networks of a configuration, and the configuration with the pair's values filled in where it has none.

    roles: of its two networks, without a pair: by them the weights are found in a file that holds several.
    """
    pair = None
    if configuration.pair:
        pair = load_pair(configuration.pair, allow_pickle=allow_pickle, trust_code=trust.everything)
    else:
        assert configuration.generator and configuration.discriminator
        specs = configuration.generator, configuration.discriminator
        for spec in specs:
            if trust.file is not None and not trust.covers(spec.weights):
                folders = Path.cwd(), trust.file.parent
                check_inside(spec.weights, trust.file, *folders, otherwise=", or its path as a flag, or --trust-code")
    at, generator = configuration.at, configuration.generator
    if generator and generator.code.endswith(".pt2") and at not in ("", "input", "output"):
        raise InputError(f"at is {at!r}, but {generator.code} has no modules to cut between; wanted input or output")
    usual = {**USUAL, **(pair.defaults if pair else {})}
    own = {name: value for name, value in usual.items() if getattr(configuration, name) == getattr(PLAIN, name)}
    if configuration.sampler and "name" not in configuration.sampler:
        own["sampler"] = changed_sampler(usual["sampler"], configuration.sampler)
    if "stop" in own:
        sampler = as_sampler(own.get("sampler", configuration.sampler))
        if own.get("max_steps", configuration.max_steps) == 0:
            own["stop"] = "none"  # the pair's rule would only ask for real images
        elif configuration.real and configuration.select == "none" and not (pair and "stop" in pair.defaults):
            own["stop"] = "none" if sampler.traits.targets_density else "median"  # as Refiner.from_pair does
    if not configuration.prior:
        if pair is None:
            raise InputError('no prior is known; pass e.g. --prior \'{"name": "normal", "shape": [128]}\'')
        own["prior"] = priors.described(pair.prior)
    prior, filled = as_prior(own.get("prior", configuration.prior)), replace(configuration, **own)
    if pair is None:
        pair = Pair(*_loaded(specs, trust, allow_pickle, roles), prior, {}, specs)
    said = pair.defaults | {name: getattr(filled, name) for name in DEFAULTS}
    calls = pair.calls | _calls(configuration, trust)
    same = calls == pair.calls and filled.discriminator_output == pair.discriminator_output
    highest = pair.highest_real_logit if same else None  # of D as the pair calls it
    return replace(pair, prior=prior, defaults=said, calls=calls, highest_real_logit=highest), filled


def build(network: Network, name: str, trust: Trust = UNTRUSTED) -> nn.Module:
    """The architecture in eval mode, with the weights that its code gives it; torch's random state is not changed."""
    target, arguments = network_code(network.code, name, trust), network.arguments
    if target is DistilledGenerator:
        arguments = _of_distilled(arguments, name, trust)
    with torch.random.fork_rng(devices=[]):
        try:
            made = target(**arguments) if not isinstance(target, nn.Module) else copy.deepcopy(target)
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
            raise InputError(f"the {name}'s {network.code} does not take {network.arguments} ({why})") from error
    if not isinstance(made, nn.Module):
        raise InputError(f"the {name}'s {network.code} gave a {type(made).__name__}; wanted a torch.nn.Module")
    return made.eval()


def _of_distilled(given: Mapping[str, Any], name: str, trust: Trust) -> dict[str, Any]:
    """The arguments of a DistilledGenerator, with the generator that its own code makes, and its function."""
    inner, caller = given.get("generator"), given.get("generate")
    if not isinstance(inner, Mapping) or not {"code", "arguments"} >= inner.keys() >= {"code"}:
        raise InputError(f"the {name} is distilled, and its generator is {inner!r}; wanted {{'code': ..., 'arguments': ...}}")
    made = build(Network(**inner), name, trust)
    return {**given, "generator": made, "generate": function(caller, "generate", trust) if caller else None}


def _exported(code: str, name: str, trust: Trust) -> nn.Module:
    path = Path(code)
    if not trust.covers(code):
        raise InputError(
            f"{trust} names the archive {code!r} as the {name}, and torch.export.load can run code in it: it was not read; "
            f"wanted package.module:Class with weights. {HOW}"
        )
    if not path.is_file():
        raise InputError(f"the {name}'s {path} is not there; wanted an archive of torch.export.save")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of torch to itself
            program = torch.export.load(path)
            module = program.module()
    except Exception as error:
        raise InputError(
            f"the {name}'s {path} is no archive of torch.export.save ({str(error).splitlines()[0][:120]})"
        ) from error
    given = [node.meta["val"] for node in program.graph.nodes if node.name in program.graph_signature.user_inputs]
    fixed = [x.shape[0] for x in given if isinstance(x, torch.Tensor) and x.dim() and isinstance(x.shape[0], int)]
    if fixed:
        raise InputError(
            f"the {name}'s {path} takes batches of {fixed[0]} only; export it with a dynamic batch: torch.export.export("
            'module, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))'
        )
    return module


def embedded_pair(name: str) -> Pair:
    """The pair "digits" or "mnist" that the package carries."""
    latent, at = EMBEDDED[name]
    path = Path(str(files("fastrefine"))) / "weights" / f"{name}.safetensors"
    weights = read_weights(path)
    specs = Network(f"fastrefine.models.digits:{name}_generator"), Network(f"fastrefine.models.digits:{name}_discriminator")
    networks = [build(spec, role) for spec, role in zip(specs, ROLES, strict=True)]
    for role, network in zip(ROLES, networks, strict=True):
        load_weights(network, {k: v for k, v in weights.items() if k.startswith(f"{role}.")}, str(path))
    return Pair(networks[0], networks[1], priors.Normal(latent), {"at": at}, specs)
