"""The two networks of a Refiner, prepared: copied, cut, probed, bound to sampler and stop rule, made fast."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastrefine import checks, noise
from fastrefine.errors import InputError
from fastrefine.networks import probe, torch_state
from fastrefine.networks.copies import Weights
from fastrefine.networks.discriminator import PreparedDiscriminator
from fastrefine.networks.freezing import MOST_REFERENCES
from fastrefine.networks.generator import PreparedGenerator
from fastrefine.networks.split import Split
from fastrefine.networks.target import Target
from fastrefine.noise import Stream
from fastrefine.options import MOST_SLOTS, OF_THE_RUN, Options
from fastrefine.priors import Prior
from fastrefine.samplers.base import Evaluation, Latent, Sampler
from fastrefine.stopping import RealLogits, StopRule

_OF_THE_GENERATOR = (
    "at",
    "prior",
    "precision",
    "device",
    "coupling",
    "generate",
    "generator_kwargs",
    "on_noise",
)  # options its preparation reads


class Networks:
    """A caller's generator and discriminator under one set of options; a sampler is bound to it.

    ``prepare`` does the work at the first use for each kind of input, and again when the caller's weights were updated.
    """

    _first: tuple[Tensor, tuple[Tensor, ...]]  # the probe batch's activations, and contexts as a step has them

    def __init__(self, generator: nn.Module | Split | None, discriminator: nn.Module, options: Options):
        self.generator, self.discriminator, self.options = generator, discriminator, options
        self._seen = Weights(None), Weights(None)
        self._probe_batch: tuple[Tensor, dict[str, Tensor]] | None = None
        self._forget()

    def twin(self, discriminator: nn.Module, options: Options) -> Networks:
        """The same generator with another discriminator or other options; what was prepared of it is shared where it fits."""
        twin = Networks(self.generator, discriminator, options)
        pairs = ((getattr(options, name), getattr(self.options, name)) for name in _OF_THE_GENERATOR)
        if all(new is old or (isinstance(new, torch.device | str) and new == old) for new, old in pairs):
            twin.prepared_generator, twin._generator_kind = self.prepared_generator, self._generator_kind
            twin._seen, twin._probe_batch = (self._seen[0], twin._seen[1]), self._probe_batch
            lent = self.target or self._lent
            if discriminator is self.discriminator and lent is not None and self._suits(options):
                twin.prepared_discriminator, twin._lent, twin._seen = self.prepared_discriminator, lent, self._seen
                lent.is_shared = True
        return twin

    def _suits(self, options: Options) -> bool:
        """Whether the target is one for other options: only the sampler's rule and the stop rule may differ."""
        new, old = options.sampler, self.options.sampler
        read = {own.name for own in fields(Options)} - OF_THE_RUN - {"sampler", "stop"}
        alike = all(_same(getattr(options, name), getattr(self.options, name)) for name in read)
        return alike and (new.loss, new.logit_scale) == (old.loss, old.logit_scale)

    def _forget(self) -> None:
        self.prepared_generator: PreparedGenerator | None = None
        self._generator_kind: Any = None
        self._forget_discriminator()

    def _forget_discriminator(self) -> None:
        self.prepared_discriminator: PreparedDiscriminator | None = None
        self._scorer: PreparedDiscriminator | None = None
        self._lent: Target | None = None  # of other options, on the same networks
        self.target: Target | None = None
        self.real: RealLogits | None = None  # logits of the options' real images
        self.bound: tuple[Sampler, StopRule] | None = None
        self._kind: Any = None

    @property
    def is_prepared(self) -> bool:
        """Whether a step was recorded, or cannot be."""
        return self.target is not None and self.target.is_recorded

    def prepare(self, latents: Tensor | None, inputs: dict[str, Tensor], seed: int, num_slots: int) -> Target:
        """The target for latents (N, ...) like these, or like the prior's, with inputs (N, ...) like these, in num_slots slots.

        Networks are copied, cut, probed, folded and recorded once for each kind of input, and then kept. Raises InputError,
        SplitError, CouplingError or GradientError where the networks do not fit.
        """
        self._notice_updates()
        options, prior = self.options, self.options.prior
        shape = tuple(latents.shape[1:] if latents is not None else prior.shape)  # type: ignore[union-attr]
        kind = shape, tuple((name, value.dtype, tuple(value.shape[1:])) for name, value in inputs.items())
        if self.target is not None and self._kind == kind:
            self.check_labels(inputs.get("labels"))
            self.target = self.target.resized(num_slots)
            return self.target
        if self._generator_kind != kind:
            self._forget()
        try:
            self._prepare(latents, shape, inputs, seed, num_slots, probe.rows(options))
        except InputError as error:
            if error.__cause__ is None or num_slots == probe.rows(options):
                raise
            try:  # networks for one size of batch, or for no fewer than some
                self._forget()
                self._prepare(latents, shape, inputs, seed, num_slots, num_slots)
            except InputError:
                raise error from None
        assert self.target is not None
        self._kind = self._generator_kind = kind
        return self.target

    def _prepare(
        self, latents: Tensor | None, shape: tuple[int, ...], inputs: dict[str, Tensor], seed: int, num_slots: int, rows: int
    ) -> None:
        """Prepare on a probe batch of so many rows."""
        options = self.options
        z, given = self._probe_batch = self._drawn_probe_batch(latents, shape, inputs, seed, rows)
        if self.prepared_generator is None:
            self.prepared_generator = PreparedGenerator(self.generator, options, z, given)
        g = self.prepared_generator
        with g.evaluation_mode():
            a, context = g.prefix(z, given)
            images = g.render(a, context)
            if self.prepared_discriminator is None:
                self.prepared_discriminator = self._prepared(images, given)
            d = self.prepared_discriminator
            if "labels" in given and not (g.takes_labels or d.takes_labels):
                raise InputError(
                    "labels were given, but neither the generator nor the discriminator takes them; wanted a second argument, "
                    "named e.g. labels or y where it is optional"
                )
            if options.real is not None:
                checks.real_images(options.real, g.image_shape, images)
            sampler, stop = self._bind(d)
            self.check_labels(inputs.get("labels"))
            self._first = a, (*context, *d.call.values(given))
            if self._lent is not None:
                target, self._lent = self._lent.resized(num_slots), None
            else:
                target = Target(g, d, sampler, options, num_slots)
                target.prepare(a, (*context, *d.call.values(given)))
            self.bound = sampler.with_loss_error(self._loss_error(target)), stop
            self._start(target)
        self.target = target

    def _prepared(self, images: Tensor, inputs: dict[str, Tensor]) -> PreparedDiscriminator:
        return PreparedDiscriminator(self.discriminator, self.options, images, inputs, self._reference)

    def _reference(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Images on which statistics of a batch are taken, and their inputs: the real ones, else proposals of the prior."""
        options = self.options
        if options.real is not None:
            few = slice(0, MOST_REFERENCES)
            x = options.real[few].to(options.device, options.dtype, memory_format=torch.contiguous_format)
            return x, {name: value[few].to(options.device) for name, value in self._real_inputs().items()}
        if options.prior is None or self.prepared_generator is None:
            raise InputError("coupling='freeze' takes its statistics from images: pass real=, or prior= and refine first")
        ids = torch.arange(probe.ROWS, probe.ROWS + MOST_REFERENCES)
        blocks = [self._proposals_of(rows) for rows in ids.split(options.slots_for(len(ids)))]
        inputs = {name: torch.cat([given[name] for _, _, given in blocks]) for name in blocks[0][2]}
        return torch.cat([self.prepared_generator.render(a, context) for a, context, _ in blocks]), inputs

    def refresh(self, discriminator: nn.Module) -> None:
        """Take an updated discriminator of the same structure (used while shaping).

        Nothing is recorded again, unless constants were derived from weights, or others share what was recorded.
        """
        self.discriminator = discriminator
        self._seen = self._seen[0], Weights(discriminator)
        if self._lent is not None or (self.target is not None and self.target.is_shared):
            self._forget_discriminator()
        if self.target is None or self.prepared_discriminator is None:
            return
        options = self.options
        with torch_state.quiet_torch(options.device), self.target.generator.evaluation_mode():
            d = self.prepared_discriminator = self.prepared_discriminator.updated(discriminator)
            with torch_state.arithmetic("float32", options.deterministic):
                self.target.refresh(d)
            self._scorer = self.real = None
            assert self.bound is not None
            sampler, stop = self._bind(d) if options.needs_real else (options.sampler.bind(self), self.bound[1])
            with torch_state.arithmetic(options.precision, options.deterministic):
                self.bound = sampler.with_loss_error(self._loss_error(self.target)), stop
                self._start(self.target)

    def _notice_updates(self) -> None:
        """Forget what was prepared from weights that the caller has updated since."""
        now = Weights(self.generator), Weights(self.discriminator)
        if now[0] != self._seen[0]:
            self._forget()
        elif now[1] != self._seen[1]:
            self._forget_discriminator()
        self._seen = now

    def check_labels(self, labels: Tensor | None) -> None:
        """Raise InputError for labels (n,) that the prepared networks do not know."""
        for network in (self.prepared_generator, self.prepared_discriminator):
            assert network is not None
            if labels is not None and network.takes_labels:
                checks.classes(labels, network.num_classes)

    def _drawn_probe_batch(
        self, latents: Tensor | None, shape: tuple[int, ...], inputs: dict[str, Tensor], seed: int, rows: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """A few distinct latents like those to come, and their labels and conditions."""
        dtype, device = self.options.dtype, self.options.device
        if latents is None:
            assert self.options.prior is not None
            z = self.options.prior.sample(torch.arange(rows), seed, dtype, Stream.PROBE)
        else:
            given = latents[:rows].to(dtype)
            given = given if len(given) else torch.zeros(1, *shape, dtype=dtype)
            z = _several(given, rows)
        few = {name: value if len(value) else value.new_zeros(1, *value.shape[1:]) for name, value in inputs.items()}
        return z.to(device), {name: value[torch.arange(rows) % len(value)].to(device) for name, value in few.items()}

    def _bind(self, discriminator: PreparedDiscriminator) -> tuple[Sampler, StopRule]:
        """Score the real images; the sampler and the stop rule with what they read of the networks filled in."""
        options = self.options
        if options.real is not None:
            if discriminator.takes_labels and options.real_labels is None:
                raise InputError("the discriminator takes labels: pass real_labels= with `real` to the Refiner")
            unknown = sorted(set(discriminator.call.names) - {"labels", noise.KEY} - set(options.real_conditions or ()))
            if unknown:
                raise InputError(
                    f"discriminate reads {', '.join(unknown)}, and `real` images come without: pass real_conditions="
                    f"{{{', '.join(f'{name!r}: ...' for name in unknown)}}} to the Refiner"
                )
            logits = self._score(discriminator, options.real, self._real_inputs()).double().cpu()
            bad = (~torch.isfinite(logits)).nonzero()[:5, 0].tolist()
            if bad:
                raise InputError(f"the discriminator gives real images non-finite logits, first at {bad}")
            labels = options.real_labels
            self.real = RealLogits(logits, labels.argmax(1) if labels is not None and labels.dim() > 1 else labels)
        return options.sampler.bind(self), options.stop.bind(self.real)

    def _real_inputs(self) -> dict[str, Tensor]:
        assert self.options.real is not None
        return self.options.own_inputs(self.options.real_labels, self.options.real_conditions, len(self.options.real))

    def score(self, images: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        """Logits (N,) of images (N, ...), in blocks of num_slots, where the networks are."""
        self._notice_updates()
        options = self.options
        if len(images) == 0:
            return torch.zeros(0, dtype=options.dtype, device=options.device)
        with torch_state.quiet_torch(options.device), torch_state.arithmetic(options.precision, options.deterministic):
            return self._score(self._discriminator_for(images, inputs), images, inputs)

    def _discriminator_for(self, images: Tensor, inputs: dict[str, Tensor]) -> PreparedDiscriminator:
        """The prepared discriminator, or one prepared on these images where that one is given other inputs."""
        wanted = set(inputs) - {noise.KEY} if self.options.discriminate is not None else set(inputs) & {"labels"}
        for known in (self.prepared_discriminator, self._scorer):
            if known is None or known.takes_labels != ("labels" in inputs):
                continue
            if set(known.call.names) - {noise.KEY} == wanted:
                return known
        rows = probe.rows(self.options)
        like = _several(images[:rows].to(self.options.device, self.options.dtype), rows)
        few = {name: value[torch.arange(rows) % len(value)].to(self.options.device) for name, value in inputs.items()}
        self._scorer = self._prepared(like, few)
        if "labels" in inputs and not self._scorer.takes_labels:
            raise InputError("labels were given, but the discriminator takes none")
        return self._scorer

    def _score(self, discriminator: PreparedDiscriminator, images: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        if discriminator.takes_labels:
            checks.classes(inputs["labels"], discriminator.num_classes)
        device, dtype, parts = self.options.device, self.options.dtype, []
        size = discriminator.rows or self.options.lockstep_group or self.options.num_slots or MOST_SLOTS
        for rows in torch.arange(len(images)).split(size):
            at = slice(int(rows[0]), int(rows[-1]) + 1)
            # a copy, for layers may work in place; of one layout, for a convolution rounds otherwise in another
            x = images[at].to(device, dtype, copy=True, memory_format=torch.contiguous_format)
            given = {name: value[at].to(device) for name, value in inputs.items()}
            parts.append(discriminator.score(x, given))
        return torch.cat(parts)

    # What a sampler is bound to: see ``samplers.base``.

    @property
    def scale(self) -> str:
        """ "critic" or "logit"."""
        return self.options.scale

    def real_logits(self, why: str) -> Tensor:
        """Logits (N,) of the real images under the current discriminator; InputError naming ``why`` without any."""
        if self.options.real is None:
            raise InputError(f"{why} needs real images: pass real= to the Refiner")
        if self.real is None:
            return self.score(self.options.real, self._real_inputs()).double().cpu()
        return self.real.logits

    def latent(self, required: bool = True) -> Latent | None:
        """The prior's numbers for a sampler that reads them; None where it may do without and there are none."""
        prior = self.options.prior
        known = refines_latents(self.generator, self.options.at) and prior is not None and type(prior).table is not Prior.table
        if not required and not known:
            return None
        assert prior is not None
        try:
            table = prior.table().to(self.options.device, self.options.dtype).contiguous()
        except NotImplementedError:
            name = type(self.options.sampler).__name__
            raise InputError(f"{prior!r} has no table(), by which {name} reads a prior; see fastrefine/priors.py") from None
        if table.shape != (3, prior.numel):
            raise InputError(f"table() of {prior!r} has shape {tuple(table.shape)}; wanted (3, {prior.numel})")
        low, high = table[1:]
        if bool((torch.isfinite(low) != torch.isfinite(high)).any() | (low >= high).any()):
            raise InputError(f"table() of {prior!r} must give each element two finite bounds, low < high, or -inf and inf")
        return Latent(table)

    def probe(self, n: int, why: str) -> tuple[Tensor, Tensor]:
        """Activations (n, F) and logits (n,) of proposals of no sample id; InputError naming ``why`` without a prior.

        To be called while a sampler is bound. Where there are labels, two and two proposals have the same one.
        """
        if self.options.prior is None:
            raise InputError(f"{why} needs proposals to look at: pass a number, or prior= to the Refiner")
        found = [(a.flatten(1), logits) for a, _, logits in self._proposals(n)]
        return torch.cat([a for a, _ in found]), torch.cat([logits for _, logits in found])

    def _start(self, target: Target) -> None:
        """Let the sampler find its scale: on proposals of the prior, or where there is none on the first call's own latents."""
        assert self.bound is not None
        sampler, stop = self.bound
        self.bound = sampler.started(functools.partial(self._first_evaluation, target)), stop

    def _first_evaluation(self, target: Target) -> Evaluation:
        assert self._probe_batch is not None
        prior = self.options.prior
        if prior is None or tuple(self._probe_batch[0].shape[1:]) != tuple(prior.shape):
            return target.first_evaluation(*self._first)
        ((a, context, _),) = self._proposals(probe.rows(self.options))
        return target.first_evaluation(a, context)

    def _loss_error(self, target: Target) -> float:
        """Rounding error of a loss, see Target.loss_error; on the first call's own latents where the prior is not theirs."""
        assert self._probe_batch is not None
        prior = self.options.prior
        if target.is_exact or prior is None or tuple(self._probe_batch[0].shape[1:]) != tuple(prior.shape):
            return target.loss_error(*self._first)
        ((a, context, _),) = self._proposals(probe.ROWS)
        return target.loss_error(a, context)

    def _proposals(self, n: int) -> Iterator[tuple[Tensor, tuple[Tensor, ...], Tensor]]:
        """Activations, contexts as a step has them, and logits, in blocks of at most num_slots but no fewer than probe.ROWS."""
        g, d, options = self.prepared_generator, self.prepared_discriminator, self.options
        assert g is not None and d is not None and options.prior is not None
        for ids in torch.arange(probe.ROWS, probe.ROWS + n).split(max(options.num_slots or MOST_SLOTS, probe.ROWS)):
            a, context, inputs = self._proposals_of(ids)
            logits = d.score(g.render(a, context), inputs)
            yield a, (*context, *d.call.values(inputs)), logits

    def _proposals_of(self, ids: Tensor) -> tuple[Tensor, tuple[Tensor, ...], dict[str, Tensor]]:
        """Activations and contexts of proposals of no sample id, and their inputs."""
        options = self.options
        assert self.prepared_generator is not None and options.prior is not None
        z, inputs = options.prior.sample(ids, 0, options.dtype, Stream.PROBE), self._known_inputs(ids // 2)
        return *self.prepared_generator.prefix(z.to(options.device), inputs), inputs

    def _known_inputs(self, which: Tensor) -> dict[str, Tensor]:
        """Classes in turn, as far as they are known, of the kind that the networks were given; the probe batch's conditions."""
        assert self._probe_batch is not None
        inputs = {name: value[(which % len(value)).to(value.device)] for name, value in self._probe_batch[1].items()}
        if (like := self._probe_batch[1].get("labels")) is None:
            return inputs
        if like.is_floating_point():
            inputs["labels"] = F.one_hot(which % like.shape[1], like.shape[1]).to(like)
        else:
            both = (self.prepared_generator, self.prepared_discriminator)
            known = [network.num_classes for network in both if network is not None and network.num_classes is not None]
            inputs["labels"] = (which % min(known, default=1)).to(like)
        return inputs

    def probe_images(self) -> Tensor:
        """The images of the probe batch, as the generator makes them."""
        assert self.prepared_generator is not None and self._probe_batch is not None
        with self.prepared_generator.evaluation_mode():
            return self.prepared_generator.render(*self.prepared_generator.prefix(*self._probe_batch))


def _same(new: Any, old: Any) -> bool:
    """Whether two values of an option are one; tensors where they share their memory, for ``Options`` detaches them."""
    if isinstance(new, dict) and isinstance(old, dict):
        return new is old or (new.keys() == old.keys() and all(_same(new[k], old[k]) for k in new))
    if isinstance(new, Tensor) and isinstance(old, Tensor):
        return new.is_set_to(old)
    plain = str | int | float | bool | torch.device  # others may answer == with anything
    return new is old or (isinstance(new, plain) and isinstance(old, plain) and new == old)


def refines_latents(generator: nn.Module | Split | None, at: str) -> bool:
    """Whether the activation is the latent itself, so that the prior is its law."""
    return at == "input" and isinstance(generator, nn.Module) and not isinstance(generator, Split)


def _several(given: Tensor, rows: int) -> Tensor:
    """So many samples; where fewer are given, scaled and shifted copies too, so that the companions in the batch differ."""
    return torch.cat([given * (1 - 0.1 * k) + 0.05 * k for k in range(-(-rows // len(given)))])[:rows]
