"""The public entry: a generator, a discriminator and a sampler, ready to refine."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset, get_worker_info

from fastrefine import checks, noise, stopping
from fastrefine.diagnosis.check import Check, checked
from fastrefine.diagnosis.findings import Finding
from fastrefine.diagnosis.tally import Tally, summary
from fastrefine.engine.idle import IdleMachines
from fastrefine.engine.proposals import Source
from fastrefine.engine.stream import SampleStream
from fastrefine.engine.watch import findings_of
from fastrefine.errors import FastrefineError, FastrefineWarning, InputError, warn
from fastrefine.networks.calls import takes_labels
from fastrefine.networks.copies import device_of, has_batch_norm, is_shaped
from fastrefine.networks.prepared import Networks, refines_latents
from fastrefine.networks.split import Split
from fastrefine.networks.statistics import StatisticsWarning
from fastrefine.options import OF_THE_RUN, Callback, Options, OutputKey
from fastrefine.priors import Prior
from fastrefine.result import Result
from fastrefine.samplers import Sampler, as_sampler
from fastrefine.stopping import FixedSteps, StopRule

_OPTIONS = {field.name for field in fields(Options)}


class PairOfNetworks(Protocol):
    """What ``Refiner.from_pair`` reads: two networks, and arguments of Refiner by name."""

    @property
    def generator(self) -> nn.Module: ...
    @property
    def discriminator(self) -> nn.Module: ...
    @property
    def options(self) -> dict[str, Any]: ...


class Refiner:
    """Refines samples of ``generator`` with the gradient of ``discriminator``; neither is ever modified.

    Networks are copied at first use, and again when their weights were updated since.

    generator: called G(z) or G(z, labels), a ``Split`` of your own, or None to refine given images (at="output").
    discriminator: called D(x) or D(x, labels); one value per sample, or a map (N, 1, h, w) whose mean is the logit.
    sampler: the update rule, e.g. Collaborative(step_size=0.1); or its name on the command line, "ddls" (with step_size 0.1),
        with arguments {"name": "ddls", "step_size": 0.05}.
    at: "input" (the latent) | dotted module name, whose output is refined ("name#k": its k-th call) | "output" (images).
    max_steps: updates per sample at most, 0 allowed. stop: None | logit | object of ``fastrefine.stopping``, or its name on the
        command line: "median" | "reference" | "uniform".
    prior: where ``sample`` and ``stream`` draw latents. real, real_labels, real_conditions: real images (N, ...) in the
        generator's range, their labels, and their conditions by name; scored under the current discriminator. Stop rules,
        adaptive and ladam read these logits, per class if labelled.
    discriminator_output: "logit" | "probability" (its final sigmoid is cut) | "critic". output_key: key, index or
        callable that picks the logit where D returns a tuple, dict or object.
    generate: generate(generator, z, **inputs) -> images (N, ...). None: generator(z) or generator(z, labels), with
        generator_kwargs; of a tuple, list, dict or dataclass the first tensor.
    discriminate: discriminate(discriminator, x, **inputs) -> (N,) or (N, 1), the logit; (N, 1, ...), a map; or a list of
        these, its heads. None: discriminator(x) or discriminator(x, labels), with discriminator_kwargs and output_key. The
        loss is the mean over heads of the mean over a head's entries of L(entry); the logit is the same mean of the entries.
        inputs of both: ``labels``, where they are given, and every condition by its name.
    num_slots: samples advanced together; equal num_slots give equal bits on one machine. None: min(256, the power of two
        that holds n). device: the generator's by default.
    precision: "float64" | "float32" | "tf32" | "bfloat16" | "float16" of the networks; the refined state is float32
        (float64 under "float64"), and the first and last pass of G run in it.
    keep: "last" | "best" (the iterate with the highest logit).
    proposals: n, at most 255: each sample starts from the one of n proposals whose logit is the highest, by n forward passes
        of D without a gradient. Under (seed, id) the prior draws for it what it draws for ids n id ... n id + n - 1.
    driver: how a step repeats: "host" (launched from Python) | "graph" (a CUDA graph, replayed) | "loop" (a loop on the
        device, where csrc was built with nvcc) | "auto": "graph" on CUDA where the step can be captured, else "host".
    compile: pass the step through torch.compile first (minutes, once for each number of slots); rounding differs, and may
        differ between slots.
    coupling: "refuse" batch-coupled networks | "lockstep": groups of consecutive ids stay together from step to step |
        "freeze": statistics of the batch in D are held at their mean over groups of reference images, which are ``real``, or
        proposals of the prior; then samples are independent. ``report["coupling"]``: what was held, and logit_change (root
        mean square, of the reference) beside logit_spread (standard deviation).
    group_size: samples that the networks see as one batch, e.g. 4 for StyleGAN2's minibatch standard deviation. None: under
        "lockstep" num_slots, of which it is a divisor; under "freeze" 8.
    pack: samples that D judges together (PacGAN, Lin et al. 2018): D is given (N / pack, pack C, ...), the channels of
        consecutive samples one after the other, and each member has its pack's logit and the gradient of its pack's loss.
        With coupling="lockstep" and a group_size that is a multiple.
    on_noise: "refuse" networks that draw random numbers in evaluation mode | "freeze": what is drawn for a sample follows
        from seed and id, and stays the same in all its steps (StyleGAN's noise_mode="const", but another one for each sample).
    on_nonfinite: "contain" (status NONFINITE) | "error". max_grad_norm: per-sample clip of the gradient.
    output_device: where results go. deterministic: torch's deterministic algorithms, no retry with fewer slots, and
        on a CPU a refusal of networks whose bits depend on the slot.
    progress: a tqdm bar on stderr; None: on a terminal a bar, elsewhere a line every ten seconds. callback: called whenever
        the counters were read (the host driver: after every step) with {"step", "finished", "total"}.
    highest_real_logit: the highest logit of a real image under this discriminator, where ``real`` is not given: a run most of
        whose samples end above it says so. A shaped pair knows it.

    A Refiner never changes: ``replaced`` and ``with_discriminator`` give another one. Its options are readable as attributes.

    Raises InputError (a ValueError) on values out of range at once, on networks that do not fit at the first use;
    SplitError, CouplingError, GradientError as their docstrings say.

    ``Result.report``: evaluations (useful ones, of proposals too), proposal_evaluations, slot_steps (slots x engine steps),
    slot_efficiency (useful ones in the slots / slot_steps), iterations (engine steps), host_syncs_per_step (reads of the
    counters, and images that had to be waited for),
    seconds and images_per_second of the run so far without captures, backend, driver, precision, threads, num_slots,
    route (how the step is computed: "flat" | "autograd"), ladder (the faster forms that were tried: rung, kept, why not),
    repeatable ("bitwise" | "to rounding": a sample's bits in different slots), folded (how many BatchNorms went into the
    layers before them), channels_last (of the networks), findings (what is wrong with the run, each
    {"code", "text", "advice"}; in the last part of a stream).

    Example: ``out = fr.Refiner(g, d, fr.Collaborative(0.3), at="act2", max_steps=3, prior=fr.Normal(32)).sample(16)``
    """

    def __init__(
        self,
        generator: nn.Module | Split | None,
        discriminator: nn.Module,
        sampler: Sampler | str | Mapping[str, Any],
        at: str = "input",
        max_steps: int = 50,
        stop: StopRule | float | str | None = None,
        prior: Prior | None = None,
        real: Tensor | None = None,
        real_labels: Tensor | None = None,
        real_conditions: dict[str, Tensor] | None = None,
        discriminator_output: str = "logit",
        generate: Callable[..., Any] | None = None,
        discriminate: Callable[..., Any] | None = None,
        num_slots: int | None = None,
        device: torch.device | str | None = None,
        precision: str = "float32",
        keep: str = "last",
        proposals: int = 1,
        generator_kwargs: dict[str, Any] | None = None,
        discriminator_kwargs: dict[str, Any] | None = None,
        output_key: OutputKey = None,
        driver: str = "auto",
        compile: bool = False,
        coupling: str = "refuse",
        group_size: int | None = None,
        pack: int = 1,
        on_noise: str = "refuse",
        on_nonfinite: str = "contain",
        max_grad_norm: float | None = None,
        output_device: torch.device | str = "cpu",
        deterministic: bool = False,
        progress: bool | None = False,
        callback: Callback | None = None,
        highest_real_logit: float | None = None,
    ):
        given = {name: value for name, value in locals().items() if name in _OPTIONS}
        if device is None:
            given["device"] = device_of(generator, discriminator)
        _check_networks(generator, discriminator, at)
        self.options = Options(**given)
        self._networks, self._idle = Networks(generator, discriminator, self.options), IdleMachines()
        _check_fit(self)

    @classmethod
    def from_pair(cls, pair: PairOfNetworks, **changes: Any) -> Refiner:
        """The refiner of a pair: its networks, how they are called, prior, place, sampler, stop rule and steps.

        pair: of ``fastrefine.load_pair``. changes: arguments of Refiner that win over the pair's, and those that a pair
        does not hold, such as ``real``. With ``real``, where neither the pair nor changes name a stop rule, it is "median",
        as for ``fastrefine check --real``; stop=None takes all steps. A sampler of a law (DDLS, MALA, PCN, HMC) has no stop
        rule then. Raises InputError for a name that is no argument, and as Refiner does.

        Example: ``fr.Refiner.from_pair(fr.load_pair("digits"), max_steps=5, stop=None).sample(8, seed=0)``
        """
        if not isinstance(getattr(pair, "options", None), dict):
            raise InputError(f"pair is a {type(pair).__name__}; wanted what fastrefine.load_pair(folder or name) gives")
        _check_names(changes, {"generator", "discriminator"})
        given = {"generator": pair.generator, "discriminator": pair.discriminator, **pair.options, **changes}
        if given.get("real") is not None and "stop" not in given and not as_sampler(given["sampler"]).traits.targets_density:
            given["stop"] = "median"
        return cls(**given)

    def __repr__(self) -> str:
        o = self.options
        real = "" if o.real is None else f", {len(o.real)} real images"
        return (
            f"Refiner({checks.network(self.generator)}, {checks.network(self.discriminator)}, {o.sampler!r} at {o.at!r}, "
            f"max_steps={o.max_steps}, stop={stopping.shown(o.stop)}, prior={o.prior!r}{real}, {o.precision} on {o.device})"
        )

    @property
    def generator(self) -> nn.Module | Split | None:
        return self._networks.generator

    @property
    def discriminator(self) -> nn.Module:
        return self._networks.discriminator

    def __getattr__(self, name: str) -> Any:
        """An option by its name, also ``dtype`` and ``scale``."""
        if name in _OPTIONS or name in ("dtype", "scale"):
            return getattr(self.options, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _OPTIONS:
            raise InputError(f"{name} of a Refiner cannot be set: make another one, refiner.replaced({name}=...)")
        super().__setattr__(name, value)

    def replaced(self, **changes: Any) -> Refiner:
        """Another refiner of the same networks with other options; what was prepared is shared as far as it fits.

        New values of weights and buffers are noticed at every call. Where other attributes of the networks, or values inside of
        generator_kwargs and discriminator_kwargs, were changed, make a new Refiner.

        Raises InputError for a name that is no option, and for values out of range.
        """
        _check_names(changes)
        given = {name: getattr(self.options, name) for name in _OPTIONS} | changes
        if given["device"] is None:
            given["device"] = device_of(self.generator, self.discriminator)
        options = Options(**given)
        _check_networks(self.generator, self.discriminator, options.at)
        shared = changes.keys() <= OF_THE_RUN
        twin = self._twin(options, self._networks if shared else self._networks.twin(self.discriminator, options))
        if shared:
            twin._idle = self._idle
        _check_fit(twin)
        return twin

    def with_discriminator(self, discriminator: nn.Module) -> Refiner:
        """The same refiner with another discriminator; the cut of the generator is shared, real logits are scored anew."""
        _check_networks(self.generator, discriminator, self.options.at)
        options = replace(self.options, highest_real_logit=None)  # it was the other discriminator's
        return self._twin(options, self._networks.twin(discriminator, options))

    def _twin(self, options: Options, networks: Networks) -> Refiner:
        twin: Refiner = object.__new__(type(self))
        vars(twin).update(options=options, _networks=networks, _idle=IdleMachines())
        return twin

    def __getstate__(self) -> dict[str, Any]:
        """Without what was prepared, which belongs to one process; it is made again at first use."""
        networks = Networks(self.generator, self.discriminator, self.options)
        return {**vars(self), "_networks": networks, "_idle": IdleMachines()}

    def sample(
        self, n: int, *, first_id: int = 0, seed: int = 0, labels: Any = None,
        conditions: Mapping[str, Tensor] | None = None, snapshots: Sequence[int] = (), proposals: int | None = None,
    ) -> Result:  # fmt: skip
        """Refine ``n`` samples with latents drawn from the prior by (seed, id), ids first_id ... first_id + n - 1.

        labels: (n,) classes or (n, C) vectors, or one class for all. conditions: further inputs of the networks by name, each
        (n, ...); every sample keeps its own, like its label. snapshots: numbers of steps after which the samples
        are recorded as they stand, in ``Result.snapshots``: several max_steps from one run. proposals: in place of the
        option. Raises InputError without a prior.

        Example: ``refiner.sample(100, proposals=4)``  # each starts from the best of four
        """
        chunk = max(checks.count("n", n, 0), 1)
        (found,) = self.stream(
            n, first_id=first_id, seed=seed, chunk=chunk, labels=labels, conditions=conditions, snapshots=snapshots,
            proposals=proposals,
        )  # fmt: skip
        return found

    def refine(
        self, latents: Tensor, *, labels: Any = None, conditions: Mapping[str, Tensor] | None = None, first_id: int = 0,
        seed: int = 0, snapshots: Sequence[int] = (), proposals: int | None = None,
    ) -> Result:  # fmt: skip
        """Refine given latents (N, ...), or given images with at="output" and generator=None; otherwise as ``sample``.

        With proposals=n each n consecutive ones make one sample, which starts from the best: N // n samples, N a multiple.
        """
        if proposals is not None and proposals != self.options.proposals:
            own = self.replaced(proposals=proposals)
            return own.refine(latents, labels=labels, conditions=conditions, first_id=first_id, seed=seed, snapshots=snapshots)
        what = "latents" if self.generator is not None else "images"
        z = checks.tensor(what, latents, self.options.dtype)
        self._check_latents(z)
        if len(z) % self.options.proposals:
            raise InputError(
                f"got {len(z)} {what}; wanted a multiple of proposals={self.options.proposals}, one sample for each"
            )
        source = self._source(len(z) // self.options.proposals, first_id, seed, z, labels, conditions)
        (found,) = self._parts(source, max(len(z), 1), snapshots)
        return found

    def stream(
        self, n: int, *, first_id: int = 0, seed: int = 0, chunk: int = 1000, labels: Any = None,
        conditions: Mapping[str, Tensor] | None = None, snapshots: Sequence[int] = (), proposals: int | None = None,
    ) -> Iterator[Result]:  # fmt: skip
        """As ``sample``, in consecutive parts of ``chunk`` samples with bounded memory, in order of sample id."""
        if proposals is not None and proposals != self.options.proposals:
            return self.replaced(proposals=proposals).stream(
                n, first_id=first_id, seed=seed, chunk=chunk, labels=labels, conditions=conditions, snapshots=snapshots
            )
        if self.options.prior is None:
            raise InputError("no prior to draw latents from: pass prior=, e.g. fastrefine.Normal(64), or use refine(latents)")
        checks.count("chunk", chunk, 1)
        return self._parts(self._source(checks.count("n", n, 0), first_id, seed, None, labels, conditions), chunk, snapshots)

    def dataset(
        self, n: int, seed: int = 0, *, first_id: int = 0, labels: Any = None,
        conditions: Mapping[str, Tensor] | None = None, chunk: int = 1000,
    ) -> RefinedDataset:  # fmt: skip
        """The samples of ``sample`` as a torch IterableDataset for a DataLoader; see ``RefinedDataset``."""
        return RefinedDataset(self, n, seed=seed, first_id=first_id, labels=labels, conditions=conditions, chunk=chunk)

    def score(self, images: Tensor, labels: Any = None, conditions: Mapping[str, Tensor] | None = None) -> Tensor:
        """Logits (N,) of images (N, ...) under the current discriminator, on output_device; in blocks of num_slots."""
        x = checks.tensor("images", images, self.options.dtype)
        return self._networks.score(x, self.options.own_inputs(labels, conditions, len(x))).to(self.options.output_device)

    def check(
        self, n: int = 500, *, refined: int = 64, seed: int = 0, labels: Any = None,
        conditions: Mapping[str, Tensor] | None = None, latents: Tensor | None = None, shaped: bool = False,
    ) -> Check:  # fmt: skip
        """Before a run: may D be used here? Scores of real, raw and refined images, what the networks are like, a verdict.

        n: raw proposals. refined: how many of them are refined, too. labels: (n,), or one for all. conditions: (n, ...) by
        name. By default both are those of ``real_labels`` and ``real_conditions`` in turn, where the networks take any.
        latents: (n, ...), where there is no prior. shaped: D was shaped already, so it is judged whether it was shaped well
        and no shaping is advised; what ``shape_discriminator`` or a shaped pair gave is known to be. Networks that do not
        fit give a check that says so; InputError is raised for bad arguments only.

        Example: ``print(refiner.check())``
        """
        options, n, refined = self.options, checks.count("n", n, 2), checks.count("refined", refined, 1)
        if latents is None and options.prior is None:
            raise InputError("no prior to draw latents from: pass latents=(n, ...), or prior= to the Refiner")
        if latents is not None:
            latents = checks.tensor("latents", latents, options.dtype)
            n = len(latents)
        inputs = self._inputs_of_check(n, labels, conditions)
        y = inputs.pop("labels", None)
        # prepared anew, for only then the networks' statistics are doubted
        own = self._twin(replace(options, progress=False, callback=None), Networks(self.generator, self.discriminator, options))

        def run(refiner: Refiner, count: int) -> Result:
            given: dict[str, Any] = {"labels": None if y is None else y[:count], "seed": seed}
            given["conditions"] = {name: value[:count] for name, value in inputs.items()} or None
            return refiner.sample(count, **given) if latents is None else refiner.refine(latents[:count], **given)

        setting = (
            f"{'images' if self.generator is None else 'latents' if options.at == 'input' else f'at={options.at!r}'}, "
            f"{type(options.sampler).__name__}, at most {options.max_steps} steps, stop {type(options.stop).__name__}"
        )
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            try:
                _check_fit(own)
                run(own, 0)
                seen = [w.message for w in told if isinstance(w.message, FastrefineWarning)]
                raw, out = run(own.replaced(max_steps=0), n), run(own, min(refined, n))
            except FastrefineError as error:
                advice = ("change that, and check again",) * 2
                return Check(setting, (Finding("unfit", f"these networks cannot be refined so: {error}", *advice),))
        bound = own._networks.bound
        assert bound is not None
        thresholds = None
        if options.stop.has_threshold:
            classes = y.argmax(1) if y is not None and y.dim() > 1 else y
            thresholds = bound[1].draw(torch.arange(n), seed, options.max_steps, classes)[0]
        doubts = [str(one) for one in seen if isinstance(one, StatisticsWarning)]
        networks = {
            "coupling": {
                "refuse": "none: samples do not depend on their batch", "lockstep": "samples of a group go in lock step",
                "freeze": "statistics of the batch are held",
            }[options.coupling],
            "noise": "none" if options.on_noise == "refuse" else "held for each sample",
            "statistics": "see below" if doubts else "as training left them",
            "step": f"{out.report['route']}, repeatable {out.report['repeatable']}",
        }  # fmt: skip
        tally = Tally()
        tally.add(out, options.highest(out.real_logits))
        shaped = shaped or is_shaped(self.discriminator)
        found = findings_of(tally.sums, options, latents is None, shaped)
        notes = [str(one) for one in seen if str(one) not in doubts]
        if has_batch_norm(self.discriminator):
            notes.append(
                "D has BatchNorm: its scores in use are not those that training showed, so compare them with each other"
            )
        run_of = summary(tally.sums)
        return checked(setting, raw, out, thresholds, options.real, networks, doubts, notes, found, run_of, shaped)

    def _inputs_of_check(self, n: int, labels: Any, conditions: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        """Labels and conditions of n samples: as given, or as the real images have them where the networks take any."""
        options = self.options
        if conditions is None and options.real_conditions:
            conditions = {name: value[torch.arange(n) % len(value)] for name, value in options.real_conditions.items()}
        if labels is None and options.real_labels is not None:
            of_g = takes_labels(self.generator, options.generator_kwargs or {})[0]
            of_d = takes_labels(self.discriminator, options.discriminator_kwargs or {})[0]
            if options.generate or options.discriminate or of_g or of_d:
                labels = options.real_labels[torch.arange(n) % len(options.real_labels)]
        return {name: value for name, value in options.own_inputs(labels, conditions, n).items() if name != noise.KEY}

    def real_logits(self, why: str) -> Tensor:
        """Logits (N,) of ``real`` under the current discriminator; InputError naming ``why`` when there is none."""
        return self._networks.real_logits(why)

    def check_labels(self, labels: Tensor | None) -> None:
        """Raise InputError for labels (n,) that the prepared networks do not know."""
        self._networks.check_labels(labels)

    def _parts(self, source: Source, chunk: int, snapshots: Sequence[int]) -> Iterator[Result]:
        if isinstance(snapshots, str) or not isinstance(snapshots, Sequence):
            raise InputError(f"snapshots is {snapshots!r}; wanted numbers of steps, e.g. (0, 10, 25, 50)")
        steps = tuple(sorted({checks.count("snapshots", step, 0, self.options.max_steps) for step in snapshots}))
        return SampleStream(self._networks, self.options, source, steps, self._idle).parts(chunk)

    def _source(
        self, n: int, first_id: int, seed: int, latents: Tensor | None, labels: Any, conditions: Mapping[str, Tensor] | None
    ) -> Source:
        first_id, seed = checks.count("first_id", first_id, 0), checks.count("seed", seed, 0, 2**64 - 1)
        each = self.options.proposals
        if (first_id + n) * each > 2**32:
            own = f", of {each} proposals each" * (each > 1)
            raise InputError(f"sample ids end at {first_id + n}{own}; noise is defined for ids below 2**32")
        inputs = self.options.own_inputs(labels, conditions, n, seed, first_id)
        choice = torch.zeros(n, dtype=torch.uint8) if each > 1 else None
        return Source(first_id, n, seed, self.options.prior, latents, inputs, each, choice)

    def _check_latents(self, latents: Tensor) -> None:
        """InputError where given latents (N, ...) are not of the prior that the sampler targets."""
        prior = self.options.prior
        if prior is None or not self.options.sampler.traits.reads_prior or not refines_latents(self.generator, self.options.at):
            return
        if latents.shape[1:].numel() != prior.numel:
            raise InputError(
                f"latents of shape {tuple(latents.shape)} do not fit {prior}, which has {prior.numel} elements each"
            )


def _check_names(changes: Mapping[str, Any], further: Iterable[str] = ()) -> None:
    """InputError for a name that is no option."""
    known = _OPTIONS | {*further}
    if unknown := sorted(changes.keys() - known):
        close = checks.closest(unknown[0], known)
        raise InputError(f"{', '.join(unknown)}: a Refiner has no such option; it has {', '.join(sorted(known))}{close}")


def _check_networks(generator: Any, discriminator: Any, at: Any) -> None:
    """InputError unless these are networks that can be refined at ``at``."""
    if not isinstance(discriminator, nn.Module):
        raise InputError(f"discriminator is a {type(discriminator).__name__}; wanted a torch.nn.Module")
    if generator is not None and not isinstance(generator, nn.Module | Split):
        raise InputError(f"generator is a {type(generator).__name__}; wanted a torch.nn.Module, a Split or None")
    if isinstance(generator, Split) and at != "input":
        raise InputError(f"a Split is cut already: leave at='input', got {at!r}")
    if generator is None and at != "output":
        raise InputError(f"without a generator only images can be refined: pass at='output', not {at!r}")


def _check_fit(refiner: Refiner) -> None:
    """InputError where the sampler cannot do what it promises, a warning where it does something else."""
    options = refiner.options
    sampler, name = options.sampler, type(options.sampler).__name__
    if options.scale == "critic" and sampler.loss in ("nonsaturating", "minimax"):
        warn(f"the {sampler.loss} loss reads D as a logit, but discriminator_output='critic' was declared; use 'wasserstein'")
    steps = sampler.traits.transition_steps
    if options.max_steps % steps:
        fits = options.max_steps // steps * steps
        raise InputError(
            f"max_steps is {options.max_steps}, but one transition of {name} takes {steps} steps; wanted a multiple, {fits} or "
            f"{fits + steps}"
        )
    if not sampler.traits.targets_density:
        return
    if not refines_latents(refiner.generator, options.at):
        where = "a Split" if options.at == "input" else f"at={options.at!r}"
        raise InputError(
            f"{name} samples p0(z) exp(d(G(z))), a law of the latent: it needs a generator and at='input', got {where}; "
            "Collaborative, DGflow and DOT refine any activation"
        )
    if options.prior is None:
        raise InputError(f"{name} samples p0(z) exp(d(G(z))): pass prior=, e.g. fastrefine.Normal(64)")
    if not isinstance(options.stop, FixedSteps) or options.keep == "best":
        warn(f"{name} keeps its law only with stop=None and keep='last': what this run returns is not exact")
    if options.max_grad_norm is not None and not sampler.traits.needs_last_gradient:  # a Metropolis test makes up for it
        warn(f"{name} with max_grad_norm samples another law, for the gradient it clips is the law's: this run is not exact")


class RefinedDataset(IterableDataset):
    """``refiner.dataset(n, seed)``: samples first_id ... first_id + n - 1 as they are made, in bounded memory.

    Each item is a dict: "image" (C, ...) tensor, "logit" () tensor, "id" int, "label" where labels were given, and each
    condition by its name. With several DataLoader workers each makes every w-th chunk: together they give every sample once,
    in an order of chunks that depends on the number of workers; which sample has which id does not.
    """

    def __init__(self, refiner: Refiner, n: int, *, seed: int, first_id: int, labels: Any, conditions: Any, chunk: int):
        checks.count("n", n, 0)
        self.refiner, self.n, self.seed, self.first_id = refiner, n, seed, first_id
        self.labels, self.chunk = checks.labels(labels, n), checks.count("chunk", chunk, 1)
        self.conditions = refiner.options.own_conditions(conditions, n)

    def __len__(self) -> int:
        return self.n

    def __repr__(self) -> str:
        return f"RefinedDataset({self.n} samples from id {self.first_id}, seed {self.seed}, {self.refiner!r})"

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        if info is not None and self.refiner.device.type == "cuda" and torch.cuda._is_in_bad_fork():
            raise InputError(
                "a refiner on a GPU cannot be used in a forked process: DataLoader(..., num_workers=0), which is as fast on "
                'one GPU, or multiprocessing_context="spawn"'
            )
        if workers == 1:
            yield from self._items(0, self.n)
            return
        if info is not None and torch.get_num_threads() != 1:
            torch.set_num_threads(1)  # the workers share the cores
        for start in range(worker * self.chunk, self.n, workers * self.chunk):
            yield from self._items(start, min(start + self.chunk, self.n))

    def _items(self, start: int, stop: int) -> Iterator[dict[str, Any]]:
        labels = None if self.labels is None else self.labels[start:stop]
        conditions = {name: value[start:stop] for name, value in self.conditions.items()} or None
        for part in self.refiner.stream(
            stop - start, first_id=self.first_id + start, seed=self.seed, chunk=self.chunk, labels=labels, conditions=conditions
        ):
            for row, number in enumerate(part.ids.tolist()):
                item = {"image": part.images[row], "logit": part.logits[row], "id": number}
                item |= {name: value[row] for name, value in part.conditions.items()}
                yield item if part.labels is None else {**item, "label": part.labels[row]}
