"""Commands that look at a pair or change it: layers, check, shape, distil, evaluate, bench. Torch is imported late."""

from __future__ import annotations

import contextlib
import json
import shlex
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from fastrefine.cli.production import (
    CONDITIONS,
    DISCRIMINATOR,
    FOLDER,
    GENERATOR,
    REFINEMENT,
    RESUMABLE,
    Interrupted,
    configuration_of,
    hint_when_busy,
    options,
    terminated,
    trusted_by,
    typed_flags,
    worker_of,
)

PATH = click.Path(exists=True, path_type=Path)
OF_STEPS = ("sampler", "step_size", "sampler_args", "max_steps", "stop", "keep", "real")  # flags without effect on raw samples
JUDGED = 4096  # real images at most whose logits give the stop rule of shaping


@click.command()
@options(GENERATOR, CONDITIONS)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def layers(ctx: click.Context, as_json: bool, **flags: Any) -> None:
    """List the places where the generator can be cut (for --at), with shapes and the cost of a step from there.

    \b
    fastrefine layers --pair digits
    fastrefine layers --generator mymodels:Generator --generator-weights g.pt \\
        --prior '{"name": "normal", "shape": [128]}'
    """
    if not flags["pair"] and not flags["generator"]:
        raise click.UsageError("wanted --pair, or --generator with --prior; no discriminator is needed here")
    from fastrefine.networks.cut import middle
    from fastrefine.production import saved_pair
    from fastrefine.production.conditions import load_conditions
    from fastrefine.production.named_code import Trust

    if flags["generator"]:  # a configuration has two networks, of which one is used here
        flags |= {f"discriminator{part}": flags[f"generator{part}"] for part in ("", "_args", "_weights", "_key")}
    allow_pickle, trust = flags.pop("allow_pickle"), Trust(**trusted_by(flags))
    pair, configuration = saved_pair.configured(
        configuration_of(ctx, flags), trust=trust, allow_pickle=allow_pickle, roles=("generator", "generator")
    )
    found = pair.layers(load_conditions(configuration.conditions) if configuration.conditions else None)
    if as_json:
        click.echo(json.dumps([layer.__dict__ for layer in found]))
        return
    width = max(len(layer.name) for layer in found)
    click.echo(f"{'at':<{width}}  {'activation':<16}{'tail MFLOPs':>12}{'share':>8}")
    for layer in found:
        shape = "x".join(map(str, layer.shape))
        click.echo(f"{layer.name:<{width}}  {shape:<16}{layer.tail_flops / 1e6:>12.3f}{layer.tail_share:>8.1%}")
    click.echo(f"give one of them as --at; begin in the middle, e.g. --at {middle(found)}", err=True)


@click.command()
@options(GENERATOR, DISCRIMINATOR, CONDITIONS, REFINEMENT)
@click.option("--samples", type=click.IntRange(min=2), default=500, show_default=True, help="Raw proposals to score.")
@click.option("--refined", type=click.IntRange(min=1), default=64, show_default=True, help="Of these, how many to refine.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the random numbers.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def check(ctx: click.Context, samples: int, refined: int, seed: int, as_json: bool, **flags: Any) -> None:
    """Before a run: does the discriminator judge well enough to refine with it? Ends in a verdict and the next command.

    Shows the scores of real images (--real), of raw and of refined samples, the stop threshold, calibration, and what the
    networks are like.

    \b
    fastrefine check --pair digits --real digits
    """
    own = ("samples", "refined", "seed", "as_json", "conditions")
    typed, networks = typed_flags(ctx, own), typed_flags(ctx, (*own, *OF_STEPS))
    more = ["--conditions", flags["conditions"]] if flags["conditions"] else []  # for refine alone
    real = flags["real"]
    import dataclasses
    import warnings

    import torch

    from fastrefine.errors import FastrefineWarning, InputError
    from fastrefine.networks.copies import is_shaped
    from fastrefine.production.evaluation import shaped_on_some, shaped_on_them
    from fastrefine.production.images import held_out_part, training_part, unscaled

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FastrefineWarning)  # the check tells them
        worker = worker_of(ctx, flags, labels=True)
    c, refiner = worker.configuration, worker.refiner
    labels, classes = None, c.num_classes
    if worker.labelled:
        classes = worker.num_classes
        if not classes:
            raise InputError("the networks take labels: give --real images that have some")
        labels = torch.arange(samples) % classes if refiner.real_labels is None else None
        more += ["--class", "random", "--num-classes", str(classes)]
    shaped = bool(c.pair) and is_shaped(refiner.discriminator)
    conditions = worker.conditions_of(samples)
    found = refiner.check(samples, refined=refined, seed=seed, labels=labels, conditions=conditions, shaped=shaped)
    held_out = held_out_part(real) if real else ""
    if real and not held_out:
        held_out = real if training_part(real) != real else "HELD_OUT_IMAGES"
    if shaped and real:
        truth = unscaled(refiner.real, c.value_range)
        if n := shaped_on_some(c.pair, truth):
            told = shaped_on_them("D", n, truth, real, "this check")
            found = dataclasses.replace(found, notes=(*found.notes, told))
        else:
            held_out = real
    if real:  # what is held out stays so
        typed = [training_part(word) if before == "--real" else word for before, word in zip(["", *typed], typed, strict=False)]
    run, raw, ids = _unused("run"), _unused("raw"), " --ids 0-999 --outdir "
    commands = {
        "fastrefine shape": f"fastrefine shape {shlex.join(typed)} --outdir {_unused('shaped')}",
        "fastrefine refine": f"fastrefine refine {shlex.join([*typed, *more])}{ids}{run}",
        "fastrefine refine --max-steps 0": f"fastrefine refine {shlex.join([*networks, *more])} --max-steps 0{ids}{raw}",
        "fastrefine evaluate": f"fastrefine evaluate {run} --real {shlex.quote(held_out)} --baseline {raw}",
    }
    click.echo(json.dumps(found.entry(commands)) if as_json else found.table(commands))


def _unused(name: str) -> str:
    """A folder that a printed command may write to: name, or name2, ... where that is there already."""
    names = (name, *(f"{name}{i}" for i in range(2, 100)))
    return next((one for one in names if not Path(one).exists()), name)


@click.command()
@options(GENERATOR, DISCRIMINATOR, REFINEMENT)
@click.option("--iterations", type=click.IntRange(min=1), default=300, show_default=True, help="Updates of the discriminator.")
@click.option("--batch-size", type=click.IntRange(min=1), default=64, show_default=True,
              help="Real images in an update, and as many refined ones.")  # fmt: skip
@click.option("--learning-rate", type=float, default=1e-4, show_default=True, help="Of Adam.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the random numbers.")
@click.option("--take", type=click.Choice(["last", "best"]), default="last", show_default=True,
              help="Which discriminator. last: after all iterations. best: the one whose refined samples come nearest to a "
              "tenth of --real, on which it is then not shaped, in checks every 50 iterations.")  # fmt: skip
@click.option("--held-out", type=click.Path(), help="Real images for the verdict, which it is not shaped on (default: the "
              "held-out part of --real, if it has one).")  # fmt: skip
@click.option("--outdir", type=FOLDER, required=True, help="New or empty: the new pair (without --pair: "
              "discriminator.safetensors) and curve.csv go there.")  # fmt: skip
@click.pass_context
def shape(
    ctx: click.Context, iterations: int, batch_size: int, learning_rate: float, seed: int, take: str, held_out: str | None,
    outdir: Path, **flags: Any,
) -> None:  # fmt: skip
    """Train the discriminator for refinement; the generator is not changed.

    It learns the images of --real against refined samples ([CS] Alg. 2). Ends in a verdict as that of `fastrefine check`, on
    held-out real images where there are any.

    With --pair, OUTDIR becomes a pair with the shaped discriminator, for `fastrefine refine --pair OUTDIR`. It keeps the place,
    sampler, steps and stop rule that it was shaped for. Otherwise pass the same --discriminator with
    --discriminator-weights OUTDIR/discriminator.safetensors.

    Ctrl-C or SIGTERM ends it after the iteration at work, and OUTDIR gets the discriminator so far. curve.csv has a row for
    every one.

    \b
    fastrefine shape --pair mypair --real train/ --iterations 300 --outdir shaped
    fastrefine refine --pair shaped --real train/ --ids 0-9999 --outdir run
    """
    if not flags["real"]:
        raise click.UsageError("--real is needed: real images to shape the discriminator on")
    for name, what in (("config.json", "pair"), ("discriminator.safetensors", "discriminator.safetensors")):
        if (outdir / name).exists():
            raise click.UsageError(f"{outdir} holds a {what} already; wanted a new or empty --outdir")
    import csv
    import dataclasses

    import numpy as np
    from safetensors.torch import save_file

    import fastrefine as fr
    from fastrefine.diagnosis.check import of_memory
    from fastrefine.production.images import SHAPED_ON, digests, held_out_part, some, unscaled
    from fastrefine.progress import EVERY, span

    trusts = flags["trust_code"]
    typed = typed_flags(ctx, ("pair", "outdir"))
    worker = worker_of(ctx, flags, labels=True)
    refiner, c = worker.refiner, worker.configuration
    held_out = held_out or held_out_part(c.real)
    others = worker.real_images(held_out) if held_out else None
    curve: list[dict[str, float]] = []
    ends: list[float] = []

    def told(facts: dict[str, float]) -> bool:
        curve.append(facts)
        ends.append(time.monotonic())
        if len(ends) == 3 and (left := (ends[-1] - ends[-2]) * (iterations - 3)) > EVERY:
            more = "it takes longer if refinement comes to take more steps, or if others use the machine"
            click.echo(f"shaping: about {span(left)} left at the speed of the third iteration; {more}", err=True)
        return bool(stopped)

    at = some(len(refiner.real), JUDGED)  # their logits are computed anew after every update
    labels = refiner.real_labels
    judged = refiner.replaced(real=refiner.real[at], real_labels=None if labels is None else labels[at])
    with _stopped_by_signals() as stopped:
        shaped = fr.shape_discriminator(
            judged, refiner.real, iterations, batch_size, learning_rate, real_labels=labels, stop=refiner.stop,
            seed=seed, keep=take, progress=None, callback=told,
        )  # fmt: skip
    outdir.mkdir(parents=True, exist_ok=True)
    judged = judged.with_discriminator(shaped.cpu())
    seen = judged.real_logits("the verdict")
    if c.pair:
        worker.pair.saved(
            outdir, discriminator=shaped, at=c.at, sampler=c.sampler, stop=c.stop, max_steps=c.max_steps,
            highest_real_logit=float(seen.max()),
        )  # fmt: skip
    else:
        part = outdir / "discriminator.part"
        save_file({name: tensor.contiguous().clone() for name, tensor in shaped.state_dict().items()}, part)
        part.replace(outdir / "discriminator.safetensors")
    np.save(outdir / SHAPED_ON, digests(unscaled(refiner.real, c.value_range)))
    with (outdir / "curve.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in curve for name in row)))
        writer.writeheader()
        writer.writerows(curve)
    click.echo(f"wrote {outdir}: {_course(curve)}")
    needed = f" --real {shlex.quote(c.real)}" * refiner.stop.needs_real
    trusted = " --trust-code" * (trusts or bool(c.generate or c.discriminate))
    labelled = f" --class random --num-classes {worker.num_classes}" * (worker.labelled and worker.num_classes > 0)
    use = (
        f"fastrefine refine --pair {shlex.quote(str(outdir))}{needed}{trusted}{labelled} --ids 0-999 --outdir {_unused('run')}"
    )
    further = f"fastrefine shape --pair {shlex.quote(str(outdir))} {shlex.join(typed)} --outdir {_unused(str(outdir))}"
    if c.discriminator:
        use = f"the same flags, with --discriminator-weights {outdir / 'discriminator.safetensors'}"
        further = "fastrefine shape"
        if c.discriminator.code.endswith(".pt2"):
            use += f" and --discriminator package.module:callable, of which {c.discriminator.code} is an export"
        elif c.discriminator.key:
            use += " and no --discriminator-key"
    if len(curve) < iterations:
        click.echo(
            f"stopped after {len(curve)} of {iterations} iterations; the discriminator so far is kept, without a verdict"
        )
        click.echo(f"to refine with it: {use}")
        if not c.discriminator:
            again, rest = typed_flags(ctx, ("pair", "outdir", "iterations")), iterations - len(curve)
            more = f"{shlex.join(again)} --iterations {rest} --outdir {_unused(str(outdir))}"
            click.echo(f"to shape it for the rest: fastrefine shape --pair {shlex.quote(str(outdir))} {more}")
        ctx.exit(130 if signal.SIGINT in stopped else RESUMABLE)
    by, memory = f"the images that it was shaped on, which flatters it: no --held-out was given, and {c.real} has none", []
    if others is not None:
        images, classes = others
        at = some(len(images), JUDGED)
        judged = judged.replaced(real=images[at], real_labels=None if labels is None or classes is None else classes[at])
        by, memory = f"{len(judged.real)} held-out real images ({held_out})", of_memory(seen, judged.real_logits("the verdict"))
    found = judged.check(shaped=True)
    found = dataclasses.replace(found, findings=(*found.findings, *memory))
    for name, words in {"judged by": by, **found.judgements(), "verdict": found.verdict}.items():
        click.echo(f"{name:<16}{words}")
    if found.findings:
        click.echo(f"{'what to do':<16}{found.next({'fastrefine shape': further})}")
    click.echo(f"to refine with it: {use}")


def _course(curve: list[dict[str, float]]) -> str:
    """How the mean logits changed, in words. Those of one minibatch tell little, so several are averaged."""
    count = max(len(curve) // 10, 1)
    parts = []
    for of, name in (("of refined images", "fake_logit"), ("of real ones", "real_logit")):
        first, last = (sum(row[name] for row in rows) / count for rows in (curve[:count], curve[-count:]))
        parts.append(f"{of} from {first:.3f} to {last:.3f}")
    return f"mean logit {', '.join(parts)} (means of the first and the last {count} of {len(curve)} iterations)"


@contextlib.contextmanager
def _stopped_by_signals() -> Iterator[list[int]]:
    """A list that gets the first Ctrl-C or SIGTERM. The second one acts as usual, and so do those that have a handler."""
    stopped: list[int] = []
    usual: dict[int, Any] = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    handled = [number for number, handler in usual.items() if signal.getsignal(number) is handler]

    def put_back() -> None:
        for number in handled:
            signal.signal(number, usual[number])

    def stop(number: int, _: Any) -> None:
        stopped.append(number)
        put_back()
        click.echo("stopping after this iteration; the same again stops at once and keeps nothing", err=True)

    for number in handled:
        signal.signal(number, stop)
    try:
        yield stopped
    finally:
        put_back()


@click.command()
@options(GENERATOR, DISCRIMINATOR, CONDITIONS, REFINEMENT)
@click.option("--pairs", type=click.IntRange(min=1), default=20_000, show_default=True, help="Samples to learn from.")
@click.option("--rounds", type=click.IntRange(min=1), default=1, show_default=True,
              help="Further ones shape the discriminator on --real first.")  # fmt: skip
@click.option("--iterations", type=click.IntRange(min=1), default=6000, show_default=True, help="Updates of the map.")
@click.option("--batch-size", type=click.IntRange(min=1), default=256, show_default=True, help="Samples in an update.")
@click.option("--learning-rate", type=float, default=1e-2, show_default=True, help="Of Adam.")
@click.option("--shaping-iterations", type=click.IntRange(min=0), default=200, show_default=True, help="Updates of the "
              "discriminator after each round; 0: it stays as it is.")  # fmt: skip
@click.option("--shaping-batch-size", type=click.IntRange(min=1), default=64, show_default=True,
              help="Real images in such an update, and as many refined ones.")  # fmt: skip
@click.option("--shaping-learning-rate", type=float, default=1e-4, show_default=True, help="Of Adam, for these updates.")
@click.option("--flops", type=float, default=0.15, show_default=True, help="Of the map, as a share of the generator's.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the random numbers.")
@click.option("--samples", type=click.IntRange(min=2), default=4000, show_default=True, help="Of the table of quality.")
@click.option("--features", metavar="CODE", help="Network of the Frechet distance, as for `evaluate`; default: trained on "
              "--real, if it is labelled.")  # fmt: skip
@click.option("--outdir", type=FOLDER, required=True, help="New or empty: the pair with the distilled generator goes there.")
@click.pass_context
def distil(
    ctx: click.Context, pairs: int, rounds: int, iterations: int, batch_size: int, learning_rate: float,
    shaping_iterations: int, shaping_batch_size: int, shaping_learning_rate: float, flops: float, seed: int, samples: int,
    features: str | None, outdir: Path, **flags: Any,
) -> None:  # fmt: skip
    """Learn what refinement does: OUTDIR becomes a pair whose generator has it built in.

    Its discriminator is shaped on what the new generator gives, for steps of refinement after it. Prints a table of quality,
    on samples that were not trained on, of generator and distilled generator with 0, 1, 2 and 4 steps of refinement after it.

    OUTDIR is written whenever a map is trained or a discriminator shaped, so a run that is stopped keeps what was finished.

    \b
    fastrefine distil --pair shaped --real train/ --max-steps 20 --outdir distilled
    fastrefine refine --pair distilled --ids 0-49999 --outdir run
    """
    if not flags["real"]:
        raise click.UsageError("--real is needed: real images for the table of quality")
    if (outdir / "config.json").exists():
        raise click.UsageError(f"{outdir} holds a pair already; wanted a new or empty --outdir")
    import numpy as np

    import fastrefine as fr
    from fastrefine.production.distillation import quality
    from fastrefine.production.images import SHAPED_ON, digests, shaped_on, unscaled

    worker = worker_of(ctx, flags, labels=True)
    pair = worker.pair
    if any(spec.code.endswith(".pt2") for spec in pair.specs):
        raise click.UsageError("archives (.pt2) cannot be saved as a pair; wanted networks from code")
    c, done = worker.configuration, ""

    def save(g: Any, facts: dict[str, Any]) -> None:
        nonlocal done
        pair.saved(
            outdir, generator=g.cpu(), discriminator=g.discriminator.cpu(), at=g.refined_at, max_steps=0, stop="none",
            sampler=c.sampler,
        )  # fmt: skip
        seen = [shaped_on(c.pair), digests(unscaled(worker.refiner.real, c.value_range)) if g.report["shaped"] else None]
        if known := [one for one in seen if one is not None]:
            np.save(outdir / SHAPED_ON, np.unique(np.concatenate(known)))
        what = "map and discriminator" if facts["shaped"] else "map, the discriminator as it was before it"
        done = f"the pair of round {facts['round']} of {facts['rounds']}: {what}"

    signal.signal(signal.SIGTERM, terminated)
    shaping = {"iterations": shaping_iterations, "batch_size": shaping_batch_size, "learning_rate": shaping_learning_rate}
    try:
        g = fr.distil(
            worker.refiner, pairs, rounds, seed, conditions=worker.conditions_of(pairs), flops=flops, iterations=iterations,
            batch_size=batch_size, learning_rate=learning_rate, shaping=shaping, callback=save,
        )  # fmt: skip
    except (KeyboardInterrupt, Interrupted) as stop:
        click.echo(
            f"stopped; {f'{outdir} holds {done}' if done else 'no map was finished yet, so nothing was written'}", err=True
        )
        ctx.exit(130 if isinstance(stop, KeyboardInterrupt) else RESUMABLE)
    click.echo(f"wrote {outdir}; the map's width is {g.report['width']}, its cost {g.report['flops_share']:.1%} of the "
               f"generator's FLOPs, and it leaves {g.report['held_out_error']:.0%} of the refinement undone")  # fmt: skip
    for line in quality(worker, g, samples, features):
        click.echo(line)


@click.command()
@click.argument("images", metavar="DIR", type=PATH)
@click.option("--real", required=True, help="Real images as for refine; held-out ones: a folder of them, MNIST_FOLDER:test, "
              "digits:test.")  # fmt: skip
@click.option("--features", metavar="NAME", help="efficientnet-lite0 (default for images in colour; extra `metrics`), "
              "classifier (a small one, trained here on --train), inception=WEIGHTS.pth (FID, IS and KID; extra "
              "`fidelity`), or package.module:callable that, called without arguments, returns a torch.nn.Module with its "
              "weights loaded.")  # fmt: skip
@click.option("--train", help="Labelled real images for the classifier (default: the training images of --real).")
@click.option("--baseline", type=PATH, help="Unrefined images, for comparison.")
@click.option("--limit", type=click.IntRange(min=4), help="At most so many of DIR and of --baseline, drawn from all of them "
              "(default: all).")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def evaluate(
    images: Path, real: str, features: str | None, train: str | None, baseline: Path | None, limit: int | None, as_json: bool
) -> None:
    """Frechet distance, KID, score, precision and recall of DIR (a run, pictures or .npz) against real images.

    Figures have a 95 % interval, and names that say on which features and on how many images they are. The column "real"
    says with how many real images they were compared. Compare only figures that agree in all three. Where --real is a held-out
    part, the last column has as many training images: no generator can be expected to be better.

    \b
    fastrefine evaluate run --real held-out/ --baseline unrefined
    fastrefine evaluate run --real held-out/ --features inception=weights-inception-2015-12-05-6726825d.pth
    """
    hint_when_busy()
    from fastrefine.production import evaluation

    found = evaluation.evaluate(images, real, baseline=baseline, features=features, train=train, limit=limit, progress=None)
    if as_json:
        click.echo(json.dumps(found.to_json()))
    else:
        click.echo(f"{found.num_samples} images against {found.num_real} real ones, 95 % intervals")
        width = max(map(len, found.figures))
        shown = {
            of: [f"{value:.4g} ({low:.4g} to {high:.4g})" for value, low, high in figures]
            for of, figures in found.columns().items()
        }
        wide = max(26, *(len(cell) for cells in shown.values() for cell in cells)) + 2
        click.echo(f"{'':<{width}}  {'real':<8}{''.join(f'{of:<{wide}}' for of in shown)}".rstrip())
        for name, *cells in zip(found.figures, *shown.values(), strict=True):
            real_ones = str(evaluation.real_compared(name, found.num_real) or "-")
            click.echo(f"{name:<{width}}  {real_ones:<8}" + "".join(f"{cell:<{wide}}" for cell in cells).rstrip())
    for line in found.warnings:
        click.echo(f"warning: {line}", err=True)


@click.command()
@options(GENERATOR, DISCRIMINATOR, CONDITIONS)
@click.option("--steps", type=click.IntRange(min=1), default=20, show_default=True, help="Updates of every sample.")
@click.option("--layers", "names", help="Comma-separated; default: --at, or input, output and those between "
              "that save work.")  # fmt: skip
@click.option("--precisions", default="float32,bfloat16", show_default=True, help="Comma-separated, as for refine.")
@click.option("--seconds", type=float, default=2.0, show_default=True, help="For each figure, about.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def bench(
    ctx: click.Context, steps: int, names: str | None, precisions: str, seconds: float, as_json: bool, **flags: Any
) -> None:
    """Measure images per second of YOUR pair at several layers and precisions, and of two plain loops beside them.

    B0 is the loop of the public codes, in float32. B1 is a careful one: frozen copies in the same precision, BatchNorm
    folded, the gradient of the activation alone, the better of two memory formats. All take all steps.

    \b
    fastrefine bench --pair mypair --steps 20
    fastrefine bench --pair mypair --layers layer2,output --precisions float32
    """
    names = names or flags["at"]
    flags["stop"] = "none"  # all steps are timed, so a pair's rule, which may need real images, is not wanted
    worker = worker_of(ctx, flags, labels=True)
    from fastrefine.production.bench import Bench, prepared
    from fastrefine.progress import over

    ours = Bench(worker.refiner, steps, seconds, labelled=worker.labelled, conditions=worker.conditions)
    places, kinds = names.split(",") if names else ours.candidates(), precisions.split(",")
    rows = ours.rows(places, kinds)
    if as_json:
        click.echo(json.dumps(list(over(rows, len(places) * len(kinds), "measuring", "figures", None))))
        return
    click.echo(
        f"{'at':<20}{'precision':<10}{'images/s':>11}{'B0':>11}{'ratio':>8}{'B1':>11}{'ratio':>8}  "
        "backend, driver, threads, slots"
    )
    for row in rows:
        loops = "".join(f"{row[f'{b}_images_per_second']:>11.1f}{row[f'ratio_{b}']:>7.2f}x" for b in ("b0", "b1"))
        click.echo(
            f"{row['at']:<20}{row['precision']:<10}{row['images_per_second']:>11.1f}{loops}  "
            f"{row['backend']}, {row['driver']}, {row['threads']}, {row['num_slots']}"
        )
        click.echo(f"    {prepared(row)}")
