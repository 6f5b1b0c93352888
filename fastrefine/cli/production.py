"""The commands of production: refine into shards, verify, merge. Nothing here imports torch until a command runs."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from fastrefine.checks import COUPLINGS, ON_NOISE, SAMPLERS, STEP_SIZE
from fastrefine.errors import InputError
from fastrefine.production.configuration import CHOICES, FORMATS, SELECTIONS, Configuration, changed_sampler, renamed

if TYPE_CHECKING:
    from fastrefine.production.worker import Outcome, Worker

FOLDER = click.Path(file_okay=False, path_type=Path)
RUN = click.Path(exists=True, file_okay=False, path_type=Path)
RESUMABLE = 3  # exit code
BUSY = 1.5  # processes that want to run, for each core
AUTO = "auto"  # a step size that collaborative refinement finds by itself; null in JSON, None in Python


class Interrupted(BaseException):
    """SIGTERM arrived. No Exception, for it may arrive within a network, whose exceptions become errors of ours."""


class JsonObject(click.ParamType):
    """A JSON object on the command line; example: for messages."""

    name = "json"

    def __init__(self, example: str):
        self.example = example

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> dict[str, Any]:
        try:
            found = json.loads(value)
        except ValueError as error:
            self.fail(f"{value!r} is no JSON ({error}); wanted e.g. {self.example}", param, ctx)
        if not isinstance(found, dict):
            self.fail(f"{value!r} is no JSON object; wanted e.g. {self.example}", param, ctx)
        return found


class StepSize(click.ParamType):
    """A number, or "auto"."""

    name = "number|auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float | str:
        if value == AUTO:
            return AUTO
        try:
            return float(value)
        except ValueError:
            self.fail(f"{value!r} is no number; wanted e.g. 0.1, or {AUTO}", param, ctx)


KEYWORDS = JsonObject("'{\"width\": 64}'")


def network_options(name: str, call: str) -> list[Callable[..., Any]]:
    """Options that say where a network comes from, and how it is called."""
    called = {"generate": "generate(G, z, **inputs) -> images", "discriminate": "discriminate(D, x, **inputs) -> logits"}
    return [
        click.option(f"--{name}", metavar="CODE", help="package.module:callable, or a torch.export archive (.pt2)."),
        click.option(f"--{name}-args", type=KEYWORDS, help="Keywords of the callable, as JSON."),
        click.option(f"--{name}-weights", type=click.Path(), help=".safetensors, or a torch.save file of tensors."),
        click.option(f"--{name}-key", help="Which state dict of the file, e.g. g_ema."),
        click.option(f"--{call}", metavar="CODE", help=f"module:function, {called[call]}: how it is called."),
        click.option(f"--{name}-kwargs", type=KEYWORDS, help=f"Keywords of each call without --{call}, as JSON."),
    ]


ORIGIN = [
    *network_options("generator", "generate"),
    click.option("--prior", type=JsonObject('\'{"name": "normal", "shape": [128]}\''),
                 help='Where latents are drawn, e.g. {"name": "normal", "shape": [128]} (default: as the pair or checkpoint '
                 'says).'),
]  # fmt: skip
GENERATOR = [
    click.option("--pair", help="digits | mnist (embedded), a folder of fastrefine.save_pair, or USER/NAME of the Hub."),
    *ORIGIN,
    click.option("--allow-pickle", is_flag=True, help="Unpickle checkpoints; this runs any code in them."),
    click.option("--trust-code", is_flag=True, help="Run whatever code the pair or --config names, not only classes of "
                 "networks."),
]  # fmt: skip
CONDITIONS = [
    click.option("--conditions", metavar="FILE", type=click.Path(), help=".npz or .safetensors of arrays (N, ...) by name: "
                 "further inputs of --generate and --discriminate, row i for sample i."),
]  # fmt: skip
JUDGEMENT = [
    *network_options("discriminator", "discriminate"),
    click.option("--output-key", help="Key or index of the logit in what D returns."),
    click.option("--discriminator-output", type=click.Choice(("logit", "probability", "critic")), help="What D returns: a "
                 "logit, a probability (D ends in a sigmoid), or the score of a Wasserstein critic (default: the pair's, or "
                 "logit)."),
    click.option("--coupling", type=click.Choice(COUPLINGS), help="Of networks that mix the samples of a batch (default: the "
                 "pair's, or refuse)."),
    click.option("--group-size", type=click.IntRange(min=1), help="Samples that --coupling sees as one batch."),
    click.option("--pack", type=click.IntRange(min=1), help="Samples that D judges as one (PacGAN)."),
    click.option("--on-noise", type=click.Choice(ON_NOISE), help="Of networks that draw random numbers (default: the "
                 "pair's, or refuse)."),
    click.option("--at", help="Where to refine: input | a layer's name | output (default: the pair's, or input); see "
                 "`fastrefine layers`."),
]  # fmt: skip
DISCRIMINATOR = [
    *JUDGEMENT,
    click.option("--slots", "num_slots", type=click.IntRange(min=1), default=256, show_default=True, help="Samples in one "
                 "batch; fewer need less memory."),
    click.option("--device", help="cpu, cuda, cuda:1 (default: a GPU if there is one)."),
]  # fmt: skip
REFINEMENT = [
    click.option("--sampler", type=click.Choice(tuple(SAMPLERS)), help="Default: the pair's, or collaborative."),
    click.option(
        "--step-size",
        type=StepSize(),
        help=f"A number, or {AUTO}: collaborative refinement finds it by itself, and "
        f"each sample goes on with its own (default: the pair's, or {STEP_SIZE}).",
    ),
    click.option("--sampler-args", type=KEYWORDS, help="Further arguments of the sampler, as JSON."),
    click.option("--max-steps", type=click.IntRange(min=0), help="Default: the pair's, or 50."),
    click.option(
        "--stop",
        help="When a sample is done: none | median | reference | uniform | a logit (default: the pair's; else median "
        "where --real is given, without --select, and the sampler has no law; else none).",
    ),
    click.option(
        "--keep",
        type=click.Choice(CHOICES["keep"]),
        default="last",
        show_default=True,
        help="Which image of a sample: the last, or that of its highest logit.",
    ),
    click.option(
        "--best-of",
        type=click.IntRange(1, 255),
        default=1,
        show_default=True,
        help="Start each sample from the raw proposal of so many whose logit is the highest.",
    ),
    click.option(
        "--real",
        type=click.Path(),
        help="Real images, for --stop and --select: a folder of pictures, of MNIST's idx files or of a data set of the Hub, "
        ".parquet, .tar (webdataset), .npz, .npy, .safetensors, USER/NAME of the Hub, or digits; FOLDER:test and digits:test "
        "are the held-out ones.",
    ),
    click.option(
        "--image-range",
        type=(float, float),
        help="Lowest and highest value of the generator's images (default: the pair's, or -1 1).",
    ),
    click.option(
        "--precision",
        type=click.Choice(CHOICES["precision"]),
        default="float32",
        show_default=True,
        help="Numbers that the networks compute with.",
    ),
]


def options(*groups: list[Callable[..., Any]]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The options of these groups, in this order in --help."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed([option for group in groups for option in group]):
            command = option(command)
        return command

    return decorate


@click.command(
    context_settings={"token_normalize_func": lambda name: "ids" if name == "seeds" else name}
)  # as others call them
@options(GENERATOR, DISCRIMINATOR, CONDITIONS, REFINEMENT)
@click.option("--ids", metavar="RANGE", default="0-999", show_default=True,
              help="Which samples, one image each: 0-49999 or 3,7,10-12 (10 alone: one image).")  # fmt: skip
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the random numbers of the run.")
@click.option("--class", "classes", help="Label of every image, or random, or balanced (0, 1, 2, ... in turn).")
@click.option("--num-classes", type=click.IntRange(min=1), help="For --class random or balanced.")
@click.option("--select", type=click.Choice(SELECTIONS), default="none", show_default=True,
              help="Choose among the refined proposals of each image: Metropolis-Hastings or rejection.")  # fmt: skip
@click.option("--chain-length", type=click.IntRange(min=1), default=10, show_default=True, help="Proposals for each image.")
@click.option(
    "--budget", type=float, default=0.25, show_default=True, help="For obrs: share of the proposals that is accepted."
)
@click.option("--percentile", type=float, default=95.0, show_default=True,
              help="For drs, 0 to 100: a higher one accepts fewer proposals.")  # fmt: skip
@click.option("--calibrate", type=click.Choice(CHOICES["calibrate"][1:]),
              help="Of the logits that --select reads, on real images and a pilot pass.")  # fmt: skip
@click.option("--held-out", type=click.Path(), help="Real images for --calibrate, best such that D was not trained on "
              "(default: --real).")  # fmt: skip
@click.option("--format", type=click.Choice(FORMATS), default="npz", show_default=True, help="Of the files of images.")
@click.option("--shard-size", type=click.IntRange(min=1), default=1000, show_default=True, help="Images in a file.")
@click.option("--sample-rate", type=click.IntRange(min=1), default=16000, show_default=True, help="Of --format wav, in Hz.")
@click.option("--config", type=click.Path(exists=True, dir_okay=False, path_type=Path),
              help="JSON as in a manifest's \"configuration\"; flags given beside it win.")  # fmt: skip
@click.option(
    "--outdir",
    type=FOLDER,
    required=True,
    help="For shards, markers and manifest.json; given again, resumes.",
)
@click.option("--shard-id", type=click.IntRange(min=0), default=0, help="This job of an array, from 0.")
@click.option("--num-shards", type=click.IntRange(min=1), default=1, help="Jobs of the array.")
@click.option("--json", "as_json", is_flag=True, help="Print what was done as JSON on stdout.")
@click.pass_context
def refine(ctx: click.Context, outdir: Path, shard_id: int, num_shards: int, as_json: bool, **flags: Any) -> None:
    """Refine images and write them as shards, which do not depend on how many workers make them.

    Given again, the same command goes on where it stopped. Under torchrun every process makes its share of the shards;
    --shard-id and --num-shards do the same for job arrays.

    \b
    fastrefine refine --pair digits --real digits --ids 0-9999 --outdir run
    fastrefine refine --generator mymodels:Generator --generator-weights g.pt \\
        --discriminator mymodels:Discriminator --discriminator-weights d.pt \\
        --prior '{"name": "normal", "shape": [128]}' --at layer2 --ids 0-9999 --outdir run
    """
    if shard_id >= num_shards:
        raise click.UsageError(f"--shard-id is {shard_id}; wanted it below --num-shards {num_shards}")
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    again = f"fastrefine {shlex.join(sys.argv[1:])}"
    signal.signal(signal.SIGTERM, terminated)
    try:
        worker = worker_of(ctx, flags)
        share = shard_id * world + rank, num_shards * world
        outcome = worker.run(outdir, worker=share[0], workers=share[1], progress=None)
    except (KeyboardInterrupt, Interrupted) as stop:
        click.echo(f"stopped; {_kept(outdir)}. To go on:\n  {again}", err=True)
        ctx.exit(130 if isinstance(stop, KeyboardInterrupt) else RESUMABLE)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            raise
        click.echo(f"fastrefine: {error}; {_kept(outdir)}. With room again, go on by:\n  {again}", err=True)
        ctx.exit(RESUMABLE)
    _tell(outcome, outdir, as_json)


@click.command()
@click.argument("directory", metavar="DIR", type=RUN)
@click.option("--json", "as_json", is_flag=True, help="Print the verdict as JSON.")
@click.pass_context
def verify(ctx: click.Context, directory: Path, as_json: bool) -> None:
    """Check every shard of DIR against its marker: count, sha256, configuration. Exit code 3 where shards must be made.

    \b
    fastrefine verify run && fastrefine merge run --output run.npz
    """
    from fastrefine.production import run_folder

    found = run_folder.verify(directory)
    if as_json:
        click.echo(json.dumps(found.__dict__ | {"complete": found.complete}))
    else:
        for name, why in found.damaged:
            click.echo(f"damaged  {name}: {why}")
        if found.missing:
            click.echo(f"missing  {len(found.missing)} of {found.total} shards, first {found.missing[0]}")
        for name in found.leftovers:
            click.echo(f"leftover {name} (of a worker that was killed, or is at work; remove it when none is)")
        for name in found.foreign:
            click.echo(f"foreign  {name} (left alone)")
        state = "complete" if found.complete else "incomplete; the command of the run, given again, makes the rest"
        good = found.total - len(found.damaged) - len(found.missing)
        click.echo(f"{found.images} images, {good} of {found.total} shards good: {state}")
    if not found.complete:
        ctx.exit(RESUMABLE)


@click.command()
@click.argument("directory", metavar="DIR", type=RUN)
@click.option("--output", type=click.Path(path_type=Path), required=True,
              help="FILE.npz (ADM: arr_0 uint8 NHWC, arr_1 labels), FILE.tar (webdataset), FILE.parquet (tables), or a folder "
              "of PNG or WAV files.")  # fmt: skip
def merge(directory: Path, output: Path) -> None:
    """Join the shards of DIR into one file or tree, in order of sample id, with logits, steps and status of each sample.

    \b
    fastrefine merge run --output run.npz
    """
    from fastrefine.production import run_folder

    count = run_folder.merge(directory, output, progress=None)
    click.echo(f"wrote {output}: {count} images")


def configuration_of(ctx: click.Context, flags: dict[str, Any]) -> Configuration:
    """The configuration of --config and the flags; a flag that is not given takes the file's value. Raises UsageError."""
    path = flags.pop("config", None)
    base: dict[str, Any] = {}
    if path is not None:
        try:
            base = json.loads(path.read_text())
        except ValueError as error:
            raise click.UsageError(f"{path} is no JSON ({error})") from error
        base = base.get("configuration", base) if isinstance(base, dict) else base
        if not isinstance(base, dict):
            raise click.UsageError(f'{path} holds {base!r}; wanted a JSON object, as a manifest\'s "configuration"')

    base = renamed(base)

    def given(name: str) -> bool:
        return ctx.get_parameter_source(name) not in (ParameterSource.DEFAULT, None)

    values = dict(base)
    for role in ("generator", "discriminator"):
        parts = {key: flags.pop(name, None) for key, name in (("code", role), ("arguments", f"{role}_args"),
                 ("weights", f"{role}_weights"), ("key", f"{role}_key"))}  # fmt: skip
        there = {key: value for key, value in parts.items() if value is not None}
        if there:
            if not isinstance(base.get(role), dict | None):
                wanted = 'wanted e.g. {"code": "package.module:callable"}'
                raise click.UsageError(f"{path} has a {role} {base[role]!r}; {wanted}")
            values[role] = {**(base.get(role) or {}), **there}
            if "code" not in values[role]:
                raise click.UsageError(f"--{role}-weights needs --{role} package.module:callable, the architecture")
    if "sampler" in flags:
        name, size, more = (flags.pop(key) for key in ("sampler", "step_size", "sampler_args"))
        told = ({} if size is None else {"step_size": None if size == AUTO else size}) | (more or {})
        if name is not None:
            values["sampler"] = {"name": name, "step_size": STEP_SIZE, **told}
        elif told:  # of the configuration's sampler, or the pair's
            values["sampler"] = changed_sampler(base.get("sampler") or {}, told)
    if flags.get("stop") is not None:
        with contextlib.suppress(ValueError):  # "median", ...
            flags["stop"] = float(flags["stop"])
    for name in ("classes", "output_key"):
        if (flags.get(name) or "").isdecimal():
            flags[name] = int(flags[name])
    for name, value in flags.items():
        if value is not None and (given(name) or name not in base):
            values[name] = value
    try:
        return Configuration.from_json(values)
    except InputError as error:
        raise click.UsageError(error.command) from error


def worker_of(ctx: click.Context, flags: dict[str, Any], *, labels: bool = False) -> Worker:
    """The networks of the flags, prepared to run; labels: see ``Worker``."""
    allow_pickle, device, trusted = flags.pop("allow_pickle"), flags.pop("device"), trusted_by(flags)
    configuration = configuration_of(ctx, flags)
    hint_when_busy()
    import torch

    from fastrefine.production.named_code import Trust
    from fastrefine.production.worker import Worker

    if not device and torch.cuda.is_available():
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"  # of this process under torchrun
    return Worker(configuration, device=device, allow_pickle=allow_pickle, labels=labels, trust_code=Trust(**trusted))


def hint_when_busy() -> None:
    """A line on stderr where torch's threads would wait for each other, since others use the cores."""
    import torch

    threads, cores = torch.get_num_threads(), os.cpu_count() or 1
    try:
        load = os.getloadavg()[0]
    except (AttributeError, OSError):  # not on every system
        return
    if threads > 1 and load / cores > BUSY and not torch.cuda.is_available():
        click.echo(
            f"this machine is busy (load {load:.1f} on {cores} cores) and {threads} threads are used: OMP_NUM_THREADS=1 may be "
            "much faster", err=True,
        )  # fmt: skip


def typed_flags(ctx: click.Context, but: Sequence[str]) -> list[str]:
    """The flags that were typed, and their values, as words; without those named ``but``."""
    words: list[str] = []
    for param in ctx.command.params:
        value = ctx.params.get(param.name or "")
        if param.name in but or ctx.get_parameter_source(param.name or "") != ParameterSource.COMMANDLINE:
            continue
        words.append(param.opts[0])
        if not getattr(param, "is_flag", False):
            parts = value if isinstance(value, tuple) else (json.dumps(value) if isinstance(value, dict) else value,)
            words += map(str, parts)
    return words


def trusted_by(flags: dict[str, Any]) -> dict[str, Any]:
    """The arguments of ``Trust``: what the user typed is trusted, what a file names is not, unless --trust-code is given."""
    names = ("generator", "discriminator", "generator_weights", "discriminator_weights", "generate", "discriminate")
    typed = (flags.get(name) for name in names)
    return {"everything": flags.pop("trust_code"), "typed": frozenset(filter(None, typed)), "file": flags.get("config")}


def terminated(*_: Any) -> None:
    """The handler of SIGTERM."""
    raise Interrupted


def _kept(outdir: Path) -> str:
    """How much of the run in OUTDIR is done, in words."""
    shards = len(list(outdir.glob("*.done.json")))
    return f"{shards} finished shards are kept" if shards else "no shard was finished yet"


def _tell(outcome: Outcome, outdir: Path, as_json: bool) -> None:
    from fastrefine.diagnosis.tally import ended

    speed = outcome.refined / outcome.seconds if outcome.refined else None
    if as_json:
        click.echo(json.dumps({**outcome.__dict__, "images_per_second": speed, "outdir": str(outdir)}))
    rate = f", {speed:.1f} images/s" if speed else ""
    click.echo(f"{outdir}: {outcome.made} shards made, {outcome.found} there already, {outcome.images} images{rate}", err=True)
    run = outcome.summary
    if run["images"]:
        before, after = ("none" if run[name] is None else f"{run[name]:.3f}" for name in ("logit_before", "logit_after"))
        whole = "the run" if run["complete"] else f"{run['images']} of {run['of']} images of the run"
        moved = f"mean logit {before} before, {after} after" if run["mean_steps"] else f"mean logit {after}"
        click.echo(
            f"{whole}: {moved}; {run['mean_steps']:.2f} steps on average; {ended(run)}; "
            f"{run['seconds']:.1f} s of work, {run['images_per_second']:.1f} images/s", err=True,
        )  # fmt: skip
    for finding in run["findings"]:
        click.echo(f"warning: {'; '.join(filter(None, (finding['text'], finding['advice'])))}", err=True)
