"""Learn what refinement does: a small map, trained on proposals and what the engine made of them."""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastrefine import checks
from fastrefine.errors import InputError, warn
from fastrefine.networks.calls import takes_labels
from fastrefine.networks.copies import own_copy
from fastrefine.networks.cut import image_of
from fastrefine.networks.split import Split
from fastrefine.networks.torch_state import quiet_torch, seed_torch
from fastrefine.noise import KEY, Stream, uniform
from fastrefine.progress import counted, over, span
from fastrefine.refiner import Refiner
from fastrefine.result import Status
from fastrefine.training.distilled import MAP, DistilledGenerator, DistilledMap
from fastrefine.training.shape import shape_discriminator

Callback = Callable[[DistilledGenerator, dict[str, Any]], None]
FIRST_ID = 2**30  # of the pairs: samples with ids from 0 are others
FEWEST = 64  # pairs
_WIDTHS = (4, 8, 12, 16, 20, 24, 32, 40, 48, 64, 80, 96, 128, 160, 192, 256, 320, 384, 512)
_OF_ACTIVATIONS = 0.1  # weight of their distance beside that of the images
_CHECKS, _PATIENCE = 30, 6  # looks at the held-out samples; how many of them without gain end the training
_SHAPING = {"iterations": 200, "batch_size": 64, "learning_rate": 1e-4}


def distil(
    refiner: Refiner,
    pairs: int = 20_000,
    rounds: int = 1,
    seed: int = 0,
    progress: bool | None = None,
    *,
    labels: Any = None,
    conditions: Mapping[str, Tensor] | None = None,
    real: Any = None,
    real_labels: Any = None,
    real_conditions: Any = None,
    flops: float = 0.15,
    iterations: int = 6000,
    batch_size: int = 256,
    learning_rate: float = 1e-2,
    chunk: int = 1000,
    shaping: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
) -> DistilledGenerator:
    """Learn what ``refiner`` does to its generator's samples; returns a generator that does it by itself.

    The engine refines ``pairs`` proposals of the prior, and a small map of the activation at the refiner's place is trained on
    them: the distance of the images plus a tenth of that of the activations, each divided by its variance. The map depends on
    the activation's shape (``DistilledMap``); it reads labels, and conditions that are vectors. A tenth of the pairs, at most
    2,000, is held out: it decides when training stops and which weights are kept. Then the discriminator is shaped on what the
    map gives, where there are real images: the result's ``discriminator`` is the one for exact steps after the map.

    refiner: with a generator and a prior. Its sampler should not add noise, for what is learned is a mean.
    rounds: in each further round the shaped discriminator refines what the map gives, and the map is trained on.
    seed: of the pairs, which have ids from 2**30, of the map's first weights and of the batches; equal seeds give equal
        weights.
    progress: bars on stderr; None: on a terminal bars, elsewhere a line every ten seconds. Unless it is False, what a round
        does, and about how long its shaping takes, is told before; after each round the time that is left.
    labels, conditions: of the pairs, (pairs, ...), as for ``Refiner.sample``. None: those of the refiner's ``real`` images,
        drawn at random.
    real, real_labels, real_conditions: to shape on, as ``shape_discriminator`` takes them; None: the refiner's.
    flops: share of the generator's FLOPs that the map may cost; it has the greatest width that fits.
    iterations, batch_size, learning_rate: of Adam, whose rate falls to 0 along a cosine. chunk: samples in one part of the
        stream of pairs. All pairs are kept in memory: latents, refined activations and images.
    shaping: arguments of ``shape_discriminator`` after each round; default 200 iterations of 64 at 1e-4. ``{"iterations": 0}``
        leaves shaping out.
    callback: called as callback(g, facts) when the map of a round is trained, and again when its discriminator is shaped: g is
        a copy of what there is by then, to be kept in case the rest does not come; facts are {"round", "rounds", "shaped"}.

    Warns where the smallest map costs more than ``flops``. Raises InputError on bad arguments, on a Split or no generator, on
    DDLS, MALA, PCN and HMC, and where there is nothing to learn: refinement changes no sample, none is finite, or the map
    does no better than none.

    Example: ``g = fr.distil(refiner, pairs=2000); g(torch.randn(4, 32)).shape  # (4, 1, 8, 8), as the generator's``
    """
    _check(refiner, real)
    pairs, rounds = checks.count("pairs", pairs, FEWEST, FIRST_ID), checks.count("rounds", rounds, 1)
    checks.count("seed", seed, 0, 2**64 - 1)
    checks.count("iterations", iterations, 1)
    checks.count("batch_size", batch_size, 1)
    for name, value in (("flops", flops), ("learning_rate", learning_rate)):
        checks.number(name, value, 0.0, open_low=True)
    if real is None:
        real, real_labels, real_conditions = refiner.real, refiner.real_labels, refiner.options.real_conditions
    if rounds > 1 and real is None:
        raise InputError(f"rounds={rounds} shapes the discriminator between them: pass real=images, or a Refiner with real")
    how = {"stop": refiner.stop, "seed": seed, "progress": progress, **_SHAPING, **(shaping or {})}
    how |= {"real_labels": real_labels, "real_conditions": real_conditions}
    shapes = real is not None and how["iterations"] != 0 and any(True for _ in refiner.discriminator.parameters())
    each = 0.0
    if shapes:  # bad arguments are told before there is work to lose
        each = _seconds_of_shaping(refiner, real, how, timed=progress is not False)
    inputs = _inputs_of_pairs(refiner, pairs, seed, labels, conditions)
    quiet = refiner.replaced(progress=False, callback=None, output_device="cpu")
    found = Pairs.made(quiet, pairs, seed, inputs, chunk, progress)
    with quiet_torch(refiner.device):
        seed_torch(refiner.device, seed % 2**63)
        g = _untrained(quiet, found, flops)
    plain, then, began = copy.deepcopy(g), quiet, time.monotonic()

    def finished(of: DistilledGenerator, number: int, shaped: bool, facts: dict[str, Any]) -> DistilledGenerator:
        of.keep_discriminator(then.discriminator)
        of.report |= {"pairs": len(found), "rounds": number + 1, "seed": seed, "shaped": shaped, **facts}
        return of.eval().requires_grad_(False)

    for number in range(rounds):
        if progress is not False:
            _tell(_plan(number, rounds, pairs, iterations, how["iterations"] if shapes else 0, each))
        if number:
            found = Pairs.made(then, pairs, seed, inputs, chunk, progress)
        with quiet_torch(refiner.device):
            facts = _train(g, plain, found, iterations, batch_size, learning_rate, seed, progress)
        then = refiner_of(copy.deepcopy(g), then)
        for shaped in (False, True)[: 1 + shapes]:
            if shaped:
                then = then.with_discriminator(shape_discriminator(then, real, **how))
            if callback is not None:
                made = finished(copy.deepcopy(g), number, shaped or (shapes and number > 0), facts)
                made.keep_discriminator(copy.deepcopy(then.discriminator))
                callback(made, {"round": number + 1, "rounds": rounds, "shaped": shaped})
        if progress is not False and number + 1 < rounds:
            spent = time.monotonic() - began
            _tell(f"round {number + 1} of {rounds} took {span(spent / (number + 1))}; "
                  f"about {span(spent / (number + 1) * (rounds - number - 1))} left")  # fmt: skip
    return finished(g, rounds - 1, shapes, facts)


def _seconds_of_shaping(refiner: Refiner, real: Any, how: Mapping[str, Any], timed: bool) -> float:
    """Seconds of an iteration of shaping, by the second of two that change nothing; 0 where it is not timed."""
    ends: list[float] = []
    few = {"iterations": min(2, how["iterations"]) if timed else 0, "progress": False}
    shape_discriminator(refiner, real, **{**how, **few, "callback": lambda _: ends.append(time.monotonic())})
    return ends[1] - ends[0] if len(ends) > 1 else 0.0


def _plan(number: int, rounds: int, pairs: int, iterations: int, shaping: int, each: float) -> str:
    """What a round does, in words."""
    last = f", then shape the discriminator for {shaping} iterations" * bool(shaping)
    last += f" (about {span(shaping * each)})" * bool(each)
    return f"round {number + 1} of {rounds}: refine {pairs} samples, train the map for at most {iterations} iterations{last}"


def _tell(line: str) -> None:
    print(f"distil: {line}", file=sys.stderr, flush=True)


def refiner_of(g: DistilledGenerator, refiner: Refiner) -> Refiner:
    """The refiner with a distilled generator in place of its own, which refines what the map gives."""
    options = {field.name: getattr(refiner.options, field.name) for field in fields(refiner.options)}
    judge = refiner.discriminator if g.discriminator is None else g.discriminator
    return Refiner(g, judge, **options | {"at": g.refined_at})


def _check(refiner: Any, real: Any) -> None:
    if not isinstance(refiner, Refiner):
        raise InputError(f"refiner is a {type(refiner).__name__}; wanted a fastrefine.Refiner")
    if not isinstance(refiner.generator, nn.Module) or isinstance(refiner.generator, Split):
        what = "a Split" if refiner.generator is not None else "no generator"
        raise InputError(f"the refiner has {what}; distil puts a map into a generator: wanted a torch.nn.Module and at=")
    if isinstance(refiner.generator, DistilledGenerator):
        raise InputError("the refiner's generator is distilled already; wanted the one it was made from, with rounds= more")
    if refiner.prior is None:
        raise InputError("the refiner has no prior to draw proposals from: pass prior= to it, e.g. fastrefine.Normal(64)")
    traits, name = refiner.sampler.traits, type(refiner.sampler).__name__
    if traits.targets_density:
        raise InputError(
            f"{name} samples a law of the latent, and a map would learn its mean: use Collaborative, DGflow or DOT"
        )
    if traits.stochastic:
        warn(f"{name} adds noise, and a map learns the mean of what it does")


def _inputs_of_pairs(refiner: Refiner, pairs: int, seed: int, labels: Any, conditions: Any) -> dict[str, Any]:
    """``labels`` and ``conditions`` of all pairs, as Refiner.stream takes them."""
    options = refiner.options
    networks = (refiner.generator, refiner.generator_kwargs), (refiner.discriminator, refiner.discriminator_kwargs)
    reads = refiner.generate or refiner.discriminate or any(takes_labels(network, kwargs)[0] for network, kwargs in networks)
    if reads and options.real is not None:
        ids = torch.arange(pairs)
        u = uniform(seed, ids, torch.ones_like(ids), 1, Stream.BATCH)[:, 0]
        rows = (u * len(options.real)).long().clamp(max=len(options.real) - 1)
        if labels is None and options.real_labels is not None:
            labels = options.real_labels[rows]
        if conditions is None:
            conditions = {name: value[rows] for name, value in (options.real_conditions or {}).items()}
    given = options.own_inputs(labels, conditions, pairs)
    given.pop(KEY, None)
    return {"labels": given.pop("labels", None), "conditions": given or None}


@dataclass
class Pairs:
    """Proposals and what refinement made of them, (N, ...): latents, inputs by name, refined activations and images."""

    latents: Tensor
    inputs: dict[str, Tensor]
    activations: Tensor
    images: Tensor

    def __len__(self) -> int:
        return len(self.latents)

    @classmethod
    def made(
        cls, refiner: Refiner, pairs: int, seed: int, inputs: dict[str, Any], chunk: int, progress: bool | None
    ) -> Pairs:  # fmt: skip
        """Those of the samples that are finite, on the CPU; InputError where these are too few."""
        at_input = refiner.at == "input"  # where the result's latents are refined
        stream = refiner.stream(pairs, first_id=FIRST_ID, seed=seed, chunk=chunk, snapshots=(0,) if at_input else (), **inputs)
        columns: list[tuple[Tensor, ...]] = []
        names: tuple[str, ...] = ()
        for part in over(stream, pairs, "refining", "pairs", progress, len):
            good = part.select(part.status != Status.NONFINITE)
            given = ({} if good.labels is None else {"labels": good.labels}) | good.conditions
            latents, names = good.snapshots[0].activations if at_input else good.latents, tuple(given)
            columns.append((latents, good.activations, good.images, *given.values()))
        latents, activations, images, *values = (torch.cat(column) for column in zip(*columns, strict=True))
        if len(latents) < FEWEST:
            raise InputError(f"{len(latents)} of {pairs} refined samples are finite, and {FEWEST} are the fewest to learn from")
        return cls(latents, dict(zip(names, values, strict=True)), activations, images)

    def rows(self, where: Tensor, device: torch.device) -> Pairs:
        inputs = {name: value[where].to(device) for name, value in self.inputs.items()}
        return Pairs(self.latents[where].to(device), inputs, self.activations[where].to(device), self.images[where].to(device))


def _untrained(refiner: Refiner, pairs: Pairs, limit: float) -> DistilledGenerator:
    """The generator with a map of the greatest width whose FLOPs are within ``limit`` of the generator's."""
    prepared = refiner._networks.prepared_generator
    assert prepared is not None and isinstance(refiner.generator, nn.Module)
    names = tuple(name for name in prepared.call.names if name != KEY)
    reads = [
        name for name in names
        if (value := pairs.inputs[name]).is_floating_point() and value.dim() == 2
    ]  # fmt: skip
    labels = pairs.inputs["labels"] if "labels" in names and "labels" not in reads else None
    ignored = [name for name in names if name not in reads and name != "labels"]
    if ignored:
        warn(f"the map does not read {', '.join(ignored)}: it reads labels, and conditions of floats (N, k)")
    shape = tuple(pairs.activations.shape[1:])
    is_conv = any(isinstance(module, nn.Conv1d | nn.ConvTranspose1d) for module in refiner.generator.modules())
    arguments: dict[str, Any] = {
        "shape": list(shape), "names": list(names), "reads": reads,
        "classes": 0 if labels is None else prepared.num_classes or int(labels.max()) + 1,
        "features": sum(pairs.inputs[name].shape[1] for name in reads),
        "tokens": len(shape) == 2 and not is_conv,  # (T, F); with convolutions (C, L)
    }  # fmt: skip
    few = pairs.rows(torch.arange(2), refiner.device)
    own = own_copy(refiner.generator, few.latents)
    call, values = replace(prepared.call, names=names, draws=None), [few.inputs[name] for name in names]
    whole = _flops(lambda: call(own, few.latents, *values))
    width, share = 0, 0.0
    for candidate in _WIDTHS:
        of_map = {name: arguments[name] for name in ("shape", "classes", "features", "tokens")}
        made = DistilledMap(width=candidate, **of_map).to(few.latents)
        own_labels = few.inputs["labels"] if arguments["classes"] else None
        cost = _flops(lambda: made(few.activations, own_labels, [few.inputs[name] for name in reads])) / max(whole, 1)  # noqa: B023
        if width and cost > limit:
            break
        width, share = candidate, cost
    if share > limit:
        warn(
            f"the smallest map costs {share:.0%} of this generator's FLOPs, more than {limit:.0%}: the generator is small, and "
            "refinement itself may be cheap enough"
        )
    report = {
        "at": refiner.at, "sampler": repr(refiner.sampler), "max_steps": refiner.max_steps, "width": width,
        "flops_share": share, "ignored": ignored,
    }  # fmt: skip
    return DistilledGenerator(
        own, refiner.at, width=width, generator_kwargs=dict(refiner.generator_kwargs), generate=refiner.generate, report=report,
        **arguments,
    ).to(few.latents)  # fmt: skip


def _flops(run: Callable[[], Any]) -> int:
    from torch.utils.flop_counter import FlopCounterMode  # it imports triton

    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def _train(
    g: DistilledGenerator, plain: DistilledGenerator, pairs: Pairs, iterations: int, batch_size: int, learning_rate: float,
    seed: int, progress: bool | None,
) -> dict[str, Any]:  # fmt: skip
    """Train the map of ``g`` in place; returns what the report says of it. plain: with a map that does nothing."""
    device, held = next(g.parameters()).device, min(len(pairs) // 10, 2000)
    rest = len(pairs) - held
    sample = pairs.rows(torch.arange(min(rest, 2000)), device)
    scales = [1 / max(float(t.double().var(0).mean()), 1e-30) for t in (sample.images, sample.activations)]

    def distance(network: DistilledGenerator, these: Pairs) -> Tensor:
        images, _, mapped = _run(network, these)
        parts = [(images - these.images).square().mean(), (mapped - these.activations).square().mean()]
        return parts[0] * scales[0] + _OF_ACTIVATIONS * parts[1] * scales[1]

    def error(network: DistilledGenerator) -> float:
        blocks = torch.arange(rest, len(pairs)).split(500)
        return sum(float(distance(network, pairs.rows(rows, device))) * len(rows) for rows in blocks) / held

    nothing, (_, start, _) = error(plain), _run(plain, sample)
    if not nothing > 1e-9:
        raise InputError("refinement changes no sample: there is nothing to learn (see max_steps, stop and step size)")
    learned = cast(DistilledMap, g._modules[MAP])
    optimizer = torch.optim.Adam(_groups(learned, learning_rate, start, sample.activations))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    best, kept, kept_at = error(g), copy.deepcopy(learned.state_dict()), 0
    every = max(iterations // _CHECKS, 1)
    for iteration in counted(iterations, "distilling", progress):
        one = torch.tensor([iteration])
        u = uniform(seed, one, torch.zeros_like(one), min(batch_size, rest), Stream.BATCH)[0]
        batch = pairs.rows((u * rest).long().clamp(max=rest - 1), device)
        learned.requires_grad_(True)
        with torch.enable_grad():
            optimizer.zero_grad(set_to_none=True)
            distance(g, batch).backward()
        optimizer.step()
        schedule.step()
        learned.requires_grad_(False)
        if (iteration + 1) % every and iteration + 1 < iterations:
            continue
        if (now := error(g)) < best:
            best, kept, kept_at = now, copy.deepcopy(learned.state_dict()), iteration + 1
        elif iteration + 1 - kept_at >= _PATIENCE * every:
            break
    learned.load_state_dict(kept)
    if not best < nothing:
        raise InputError(
            f"on {held} held-out samples the map is no nearer to the refined ones than the proposals are: what refinement does "
            "here does not follow from the activation, or there are too few pairs or iterations"
        )
    return {"held_out": held, "held_out_error": best / nothing, "iterations": kept_at}


def _groups(learned: DistilledMap, learning_rate: float, start: Tensor, end: Tensor) -> list[dict[str, Any]]:
    """Parameters and rates of Adam, as if activations and their changes had the standard deviation 1."""
    before, change = max(float(start.std()), 1e-6), max(float((end - start).std()), 1e-6)
    rates = {learned.inlet.weight: learning_rate / before, learned.outlet.weight: learning_rate * change}
    if not learned.outlet.weight.any():
        learned.inlet.weight.div_(before)
    return [{"params": [p], "lr": rates.get(p, learning_rate)} for p in learned.parameters()]


def _run(g: DistilledGenerator, these: Pairs) -> tuple[Tensor, Tensor, Tensor]:
    """Images, and the activations before and after the map."""
    seen: list[tuple[Tensor, Tensor]] = []

    def note(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        seen.append((args[0].clone(), output))
        return output.clone()  # the next layer may work in place

    handle = g._modules[MAP].register_forward_hook(note)  # type: ignore[union-attr]
    try:
        images = image_of(g(these.latents, **{name: these.inputs[name] for name in g.call.names}))
    finally:
        handle.remove()
    return images, *seen[0]
