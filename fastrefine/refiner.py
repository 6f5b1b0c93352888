"""The public entry: a generator, a discriminator and a sampler, ready to refine."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastrefine import checks, dataset, drivers, fit, pilot, readout, scoring, session, settings, stopping
from fastrefine.errors import InputError
from fastrefine.noise import Stream
from fastrefine.pair import PROBE, DiscriminatorSide, GeneratorSide, check_labels, quiet_torch
from fastrefine.pool import Source
from fastrefine.priors import Prior
from fastrefine.result import Result
from fastrefine.samplers.base import Latent, Sampler
from fastrefine.split import Split
from fastrefine.stopping import RealLogits, StopRule
from fastrefine.target import DTYPES, Target

Callback = Callable[[dict[str, int]], None]


_FIXED = {
    "sampler", "stop", "at", "prior", "real", "real_labels", "precision", "dtype", "device", "coupling", "compile",
    "discriminator_output", "output_key", "generator_kwargs", "discriminator_kwargs",
}  # fmt: skip


class Refiner:
    """Refines samples of ``generator`` with the gradient of ``discriminator``; neither is ever modified.

    Networks are copied at first use, and again when their weights were updated since.

    generator: called G(z) or G(z, labels), a ``Split`` of your own, or None to refine given images (at="output").
    discriminator: called D(x) or D(x, labels); one value per sample, or a map (N, 1, h, w) whose mean is the logit.
    sampler: the update rule, e.g. Collaborative(step_size=0.1).
    at: "input" (the latent) | dotted module name, whose output is refined ("name#k": its k-th call) | "output" (images).
    max_steps: updates per sample at most, 0 allowed. stop: None | logit | object of ``fastrefine.stopping``.
    prior: where ``sample`` and ``stream`` draw latents. real, real_labels: real images (N, ...) in the generator's range,
        scored under the current discriminator; stop rules, adaptive and ladam read these logits, per class if labelled.
    discriminator_output: "logit" | "probability" (its final sigmoid is cut) | "critic". output_key: key, index or
        callable that picks the logit where D returns a tuple, dict or object.
    num_slots: samples advanced together; equal num_slots give equal bits on one machine. device: the generator's by default.
    precision: "float64" | "float32" | "tf32" | "bfloat16" | "float16" of the networks; the refined state is float32
        (float64 under "float64"), and the first and last pass of G run in it.
    keep: "last" | "best" (the iterate with the highest logit).
    driver: how a step repeats: "host" (launched from Python) | "graph" (a CUDA graph, replayed) | "loop" (a loop on the
        device, where csrc was built with nvcc) | "auto": "graph" on CUDA where the step can be captured, else "host".
    compile: pass the step through torch.compile first (once, minutes); rounding differs, and may differ between slots.
    coupling: "refuse" batch-coupled networks | "lockstep": groups of num_slots consecutive ids stay together.
    on_nonfinite: "contain" (status NONFINITE) | "error". max_grad_norm: per-sample clip of the gradient.
    output_device: where results go. deterministic: torch's deterministic algorithms, and no retry with fewer slots.
    progress: a tqdm bar on stderr. callback: called whenever the counters were read (the host driver: after every step)
        with {"step", "finished", "total"}.

    Raises InputError (a ValueError) on values out of range at once, on networks that do not fit at the first use;
    SplitError, CouplingError, GradientError as their docstrings say.

    ``Result.report``: evaluations (useful ones), slot_steps (slots x engine steps), slot_efficiency (their ratio),
    iterations (engine steps), host_syncs_per_step (reads of the counters, and images that had to be waited for),
    seconds and images_per_second of the run so far without captures, backend, driver, precision, threads, num_slots,
    route (how the step is computed: "flat" | "autograd"), split (how G was cut), fold (how BatchNorms went into their
    neighbours: "graph" | "neighbours" | "none"), channels_last (of the networks).
    """

    def __init__(
        self,
        generator: nn.Module | Split | None,
        discriminator: nn.Module,
        sampler: Sampler,
        at: str = "input",
        max_steps: int = 50,
        stop: StopRule | float | None = None,
        prior: Prior | None = None,
        real: Tensor | None = None,
        real_labels: Tensor | None = None,
        discriminator_output: str = "logit",
        num_slots: int = 256,
        device: torch.device | str | None = None,
        precision: str = "float32",
        keep: str = "last",
        generator_kwargs: dict[str, Any] | None = None,
        discriminator_kwargs: dict[str, Any] | None = None,
        output_key: readout.OutputKey = None,
        driver: str = "auto",
        compile: bool = False,
        coupling: str = "refuse",
        on_nonfinite: str = "contain",
        max_grad_norm: float | None = None,
        output_device: torch.device | str = "cpu",
        deterministic: bool = False,
        progress: bool = False,
        callback: Callback | None = None,
    ):
        fit.check_parts(generator, discriminator, sampler, at, prior)
        self.generator, self.discriminator, self.sampler, self.at = generator, discriminator, sampler, at
        self.max_steps = checks.count("max_steps", max_steps, 0, 2**31 - 1)
        self.num_slots = checks.count("num_slots", num_slots, 1, 2**31 - 1)
        self.stop, self.prior = stopping.as_rule(stop), prior
        for name, value, choices in (
            ("discriminator_output", discriminator_output, readout.SCALES), ("precision", precision, tuple(DTYPES)),
            ("keep", keep, ("last", "best")), ("coupling", coupling, ("refuse", "lockstep")),
            ("on_nonfinite", on_nonfinite, ("contain", "error")), ("driver", driver, drivers.NAMES),
        ):  # fmt: skip
            checks.choice(name, value, choices)
        if max_grad_norm is not None:
            checks.number("max_grad_norm", max_grad_norm, 0.0, open_low=True)
        fit.check_options(generator_kwargs, discriminator_kwargs, output_key, callback)
        self.discriminator_output, self.precision, self.keep, self.coupling = (
            discriminator_output,
            precision,
            keep,
            coupling,
        )
        self.on_nonfinite, self.max_grad_norm, self.deterministic = on_nonfinite, max_grad_norm, deterministic
        self.generator_kwargs, self.discriminator_kwargs = generator_kwargs or {}, discriminator_kwargs or {}
        self.output_key, self.driver, self.compile = output_key, driver, bool(compile)
        self.output_device = checks.device("output_device", output_device)
        self.progress, self.callback = progress, callback
        self.dtype = torch.float64 if precision == "float64" else torch.float32
        self.device = checks.device("device", device) if device is not None else fit.device_of(generator, discriminator)
        self.real = None if real is None else checks.tensor("real", real, self.dtype)
        if self.real is not None and len(self.real) == 0:
            raise InputError("`real` is empty; wanted real images (N, ...)")
        if self.real is None and real_labels is not None:
            raise InputError("real_labels were given without `real` images")
        self.real_labels = None if self.real is None else self._own_labels(real_labels, len(self.real))
        if self._needs_real and self.real is None:
            raise InputError(
                f"{type(sampler).__name__} with stop={self.stop!r} reads real logits: pass real=images to the Refiner, or "
                "--real FOLDER or FILE.npz to a command"
            )
        fit.check(self)
        self._seen_weights = (fit.Weights(None), fit.Weights(None))
        self._forget()

    def __setattr__(self, name: str, value: Any) -> None:
        """Sizes, outputs and callbacks may be set at any time; what networks were prepared by is refused with InputError."""
        if name in _FIXED and "_key" in vars(self):
            raise InputError(f"{name} of a Refiner cannot be set: make another one, Refiner(..., {name}=...)")
        super().__setattr__(name, value)

    def replaced(self, **settings: Any) -> Refiner:
        """The same refiner with another sampler, stop, compile, or what may be set; the cut of the generator is shared."""
        for name in settings:
            if name not in vars(self) or name in _FIXED - {"sampler", "stop", "compile"}:
                raise InputError(f"{name} is nothing that can be replaced: make another one, Refiner(...)")
        if "stop" in settings:
            settings["stop"] = stopping.as_rule(settings["stop"])
        twin = copy.copy(self)
        vars(twin).update(settings)
        twin._forget_discriminator()
        return twin

    def __getstate__(self) -> dict[str, Any]:
        """Without what was prepared, which is made again at first use: graphs and captures are one process's."""
        twin = copy.copy(self)
        twin._seen_weights = (fit.Weights(None), fit.Weights(None))
        twin.__dict__.pop("_probed", None)
        twin._forget()
        return vars(twin)

    def __copy__(self) -> Refiner:
        """With what was prepared: `copy` would go by ``__getstate__``."""
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        return twin

    def _forget(self) -> None:
        self._generator_side: GeneratorSide | None = None
        self._generator_key: Any = None
        self._forget_discriminator()

    def _forget_discriminator(self) -> None:
        self._discriminator_side: DiscriminatorSide | None = None
        self._scorer: DiscriminatorSide | None = None
        self._target: Target | None = None
        self._real_logits: RealLogits | None = None
        self._bound: tuple[Sampler, StopRule] | None = None
        self._key: Any = None

    @property
    def _needs_real(self) -> bool:
        return self.stop.needs_real or self.sampler.traits.needs_real

    @property
    def scale(self) -> str:
        """ "critic", or "logit" (which covers "probability")."""
        return "critic" if self.discriminator_output == "critic" else "logit"

    def with_discriminator(self, discriminator: nn.Module) -> Refiner:
        """The same refiner with another discriminator; the cut of the generator is shared, real logits are scored anew."""
        if not isinstance(discriminator, nn.Module):
            raise InputError(f"discriminator is a {type(discriminator).__name__}; wanted a torch.nn.Module")
        twin = copy.copy(self)
        twin.discriminator = discriminator
        twin._forget_discriminator()
        return twin

    def sample(self, n: int, *, first_id: int = 0, seed: int = 0, labels: Any = None, snapshots: Sequence[int] = ()) -> Result:
        """Refine ``n`` samples with latents drawn from the prior by (seed, id), ids first_id ... first_id + n - 1.

        labels: (n,) classes or (n, C) vectors, or one class for all. snapshots: numbers of steps after which the samples
        are recorded as they stand, in ``Result.snapshots``: several max_steps from one run. Raises InputError without a
        prior.
        """
        chunk = max(checks.count("n", n, 0), 1)
        parts = self.stream(n, first_id=first_id, seed=seed, chunk=chunk, labels=labels, snapshots=snapshots)
        return Result.concatenate(list(parts))

    def refine(
        self, latents: Tensor, *, labels: Any = None, first_id: int = 0, seed: int = 0, snapshots: Sequence[int] = ()
    ) -> Result:
        """Refine given latents (N, ...), or given images with at="output" and generator=None; otherwise as ``sample``."""
        z = checks.tensor("latents" if self.generator is not None else "images", latents, self.dtype)
        fit.check_latents(self, z)
        source = self._source(len(z), first_id, seed, z, labels)
        steps = fit.snapshots(snapshots, self.max_steps)
        return Result.concatenate(list(session.parts(self, source, max(len(z), 1), steps)))

    def stream(
        self, n: int, *, first_id: int = 0, seed: int = 0, chunk: int = 1000, labels: Any = None,
        snapshots: Sequence[int] = (),
    ) -> Iterator[Result]:  # fmt: skip
        """As ``sample``, in consecutive parts of ``chunk`` samples with bounded memory, in order of sample id."""
        if self.prior is None:
            raise InputError("no prior to draw latents from: pass prior=, e.g. fastrefine.Normal(64), or use refine(latents)")
        checks.count("chunk", chunk, 1)
        source = self._source(checks.count("n", n, 0), first_id, seed, None, labels)
        return session.parts(self, source, chunk, fit.snapshots(snapshots, self.max_steps))

    def dataset(
        self, n: int, seed: int = 0, *, first_id: int = 0, labels: Any = None, chunk: int = 1000
    ) -> dataset.RefinedDataset:  # fmt: skip
        """The samples of ``sample`` as a torch IterableDataset for a DataLoader; see ``RefinedDataset``."""
        return dataset.RefinedDataset(self, n, seed=seed, first_id=first_id, labels=labels, chunk=chunk)

    def score(self, images: Tensor, labels: Any = None) -> Tensor:
        """Logits (N,) of images (N, ...) under the current discriminator, on output_device; in blocks of num_slots."""
        x = checks.tensor("images", images, self.dtype)
        y = self._own_labels(labels, len(x))
        self._notice_updates()
        if len(x) == 0:
            return torch.zeros(0, dtype=self.dtype, device=self.output_device)
        with quiet_torch(self.device), settings.arithmetic(self.precision, self.deterministic):
            return scoring.logits(self, scoring.side_for(self, x, y), x, y).to(self.output_device)

    def real_logits(self, why: str) -> Tensor:
        """Logits (N,) of ``real`` under the current discriminator; InputError naming ``why`` when there is none."""
        if self.real is None:
            raise InputError(f"{why} needs real images: pass real= to the Refiner")
        if self._real_logits is None:
            return self.score(self.real, self.real_labels).double().cpu()
        return self._real_logits.logits

    @property
    def refines_latents(self) -> bool:
        """Whether the activation is the latent itself, so that the prior is its law."""
        return self.at == "input" and isinstance(self.generator, nn.Module) and not isinstance(self.generator, Split)

    def latent(self, required: bool = True) -> Latent | None:
        """The prior's numbers for a sampler that reads them; None where it may do without and there are none."""
        if required:
            return fit.latent(self)
        known = self.refines_latents and self.prior is not None and type(self.prior).table is not Prior.table
        return fit.latent(self) if known else None

    def probe(self, n: int, why: str) -> tuple[Tensor, Tensor]:
        """Activations (n, F) and logits (n,) of proposals of no sample id, while a sampler is bound; see ``pilot``."""
        return pilot.activations_and_logits(self, n, why)

    def _source(self, n: int, first_id: int, seed: int, latents: Tensor | None, labels: Any) -> Source:
        first_id, seed = checks.count("first_id", first_id, 0), checks.count("seed", seed, 0, 2**64 - 1)
        if first_id + n > 2**32:
            raise InputError(f"sample ids end at {first_id + n}; noise is defined for ids below 2**32")
        return Source(first_id, n, seed, self.prior, latents, self._own_labels(labels, n))

    def _own_labels(self, labels: Any, n: int) -> Tensor | None:
        """Labels on the CPU, vectors in the dtype of the state."""
        y = checks.labels(labels, n)
        return y if y is None else y.to("cpu", self.dtype) if y.is_floating_point() else y.cpu()

    def _prepare(self, source: Source) -> Target:
        """Networks copied, cut, probed, folded and traced: once for each kind of input, then kept."""
        labels = source.labels
        self._notice_updates()
        shape = source.latents.shape[1:] if source.latents is not None else self.prior.shape  # type: ignore[union-attr]
        key = (tuple(shape), None if labels is None else (labels.is_floating_point(), tuple(labels.shape[1:])))
        if self._target is not None and self._key == key:
            self.check_labels(labels)
            return self._target
        if self._generator_key != key:
            self._forget()
        z, y = self._probe_batch(source, tuple(shape))
        self._probed = z, y
        if self._generator_side is None:
            self._generator_side = GeneratorSide(self.generator, self.at, z, y, self.generator_kwargs, self.coupling)
        side = self._generator_side
        with side.evaluation_mode():
            a, context = side.prefix(z, y)
            images = side.render(a, context)
            if self._discriminator_side is None:
                self._discriminator_side = self._new_discriminator_side(images, y)
            critic = self._discriminator_side
            if y is not None and not (side.takes_labels or critic.takes_labels):
                raise InputError(
                    "labels were given, but neither the generator nor the discriminator takes them; wanted a second argument, "
                    "named e.g. labels or y where it is optional"
                )
            if self.real is not None:
                checks.real_images(self.real, side.image_shape, images)
            self._bind(critic)
            assert self._bound is not None
            self.check_labels(labels)
            target = Target(
                side, critic, self._bound[0], self.precision, self.num_slots, self.coupling == "lockstep", self.compile
            )
            target.prepare(a, (*context, y) if critic.takes_labels and y is not None else context)
            self._bound = self._bound[0].with_loss_error(pilot.loss_error(self, target)), self._bound[1]
        self._target, self._key, self._generator_key = target, key, key
        return target

    def _notice_updates(self) -> None:
        """Forget what was prepared from weights that the caller has updated since."""
        now = fit.Weights(self.generator), fit.Weights(self.discriminator)
        if now[0] != self._seen_weights[0]:
            self._forget()
        elif now[1] != self._seen_weights[1]:
            self._forget_discriminator()
        self._seen_weights = now

    def check_labels(self, labels: Tensor | None) -> None:
        """Raise InputError for labels (n,) that the prepared networks do not know."""
        assert self._generator_side is not None and self._discriminator_side is not None
        for side in (self._generator_side, self._discriminator_side):
            if labels is not None and side.takes_labels:
                check_labels(labels, side.num_classes)

    def _probe_batch(self, source: Source, shape: tuple[int, ...]) -> tuple[Tensor, Tensor | None]:
        """A few distinct latents like those to come, and their labels."""
        if source.latents is None:
            z = self.prior.sample(torch.arange(PROBE), source.seed, self.dtype, Stream.PROBE)  # type: ignore[union-attr]
        else:
            given = source.latents[:PROBE].to(self.dtype)
            given = given if len(given) else torch.zeros(1, *shape, dtype=self.dtype)
            # fewer than a probe batch: scaled and shifted copies, so that companions differ
            z = torch.cat([given * (1 - 0.1 * k) + 0.05 * k for k in range(-(-PROBE // len(given)))])[:PROBE]
        if source.labels is None:
            return z.to(self.device), None
        y = source.labels if len(source.labels) else source.labels.new_zeros(1, *source.labels.shape[1:])
        return z.to(self.device), y[torch.arange(PROBE) % len(y)].to(self.device)

    def _new_discriminator_side(self, images: Tensor, labels: Tensor | None) -> DiscriminatorSide:
        return DiscriminatorSide(
            self.discriminator,
            images,
            labels,
            self.discriminator_kwargs,
            self.discriminator_output,
            self.output_key,
            self.coupling,
        )

    def _bind(self, side: DiscriminatorSide) -> None:
        """Score the real images and fill in what sampler and stop rule read of them."""
        if self.real is not None:
            if side.takes_labels and self.real_labels is None:
                raise InputError("the discriminator takes labels: pass real_labels= with `real` to the Refiner")
            logits = scoring.logits(self, side, self.real, self.real_labels).double().cpu()
            bad = (~torch.isfinite(logits)).nonzero()[:5, 0].tolist()
            if bad:
                raise InputError(f"the discriminator gives real images non-finite logits, first at {bad}")
            self._real_logits = RealLogits(logits, _classes(self.real_labels))
        self._bound = self.sampler.bind(self), self.stop.bind(self._real_logits)

    def _refresh(self, discriminator: nn.Module) -> None:
        """Take an updated discriminator of the same structure; nothing is traced again (used while shaping)."""
        self.discriminator = discriminator
        self._seen_weights = self._seen_weights[0], fit.Weights(discriminator)
        if self._target is None or self._discriminator_side is None:
            return
        with quiet_torch(self.device), self._target.generator.evaluation_mode():
            side = self._discriminator_side = self._discriminator_side.updated(discriminator)
            self._target.refresh(side)
            self._scorer = self._real_logits = None
            assert self._bound is not None
            if self._needs_real:
                self._bind(side)
            else:
                self._bound = self.sampler.bind(self), self._bound[1]
            with settings.arithmetic(self.precision, self.deterministic):
                self._bound = self._bound[0].with_loss_error(pilot.loss_error(self, self._target)), self._bound[1]


def _classes(labels: Tensor | None) -> Tensor | None:
    return labels.argmax(1) if labels is not None and labels.dim() > 1 else labels
