"""Random pairs from a grammar of idioms against a plain loop: each runs and agrees, or is refused by one of our own errors."""

import contextlib
import random
import warnings
from collections import Counter

import pytest
import torch
from torch import nn

import fastrefine as fr
from fastrefine.errors import CouplingError, FastrefineError, GradientError, InputError
from tests.support import fuzz_networks as fuzz

torch.set_num_threads(1)
PAIRS, CHUNK, STEPS, SLOTS = 300, 25, 2, 4
LOSSES = {
    "nonsaturating": lambda d: nn.functional.softplus(-d),
    "wasserstein": lambda d: -d,
    "least_squares": lambda d: 0.5 * (d - 1) ** 2,
    "minimax": lambda d: -nn.functional.softplus(d),
}
# What may be refused, by which error. Any other refusal is a failure.
REFUSALS = {
    "minibatch_statistics": CouplingError, "fresh_noise": CouplingError, "always_dropout": CouplingError,
    "checkpointed_reentrant": GradientError, "rounding": GradientError, "detaching": GradientError, "scripted": InputError,
    "plain torch fails": FastrefineError,
}  # fmt: skip
SOMETIMES = {"rounding", "detaching", "checkpointed_reentrant"}  # and not where the place comes after it


def first(output):
    """The first floating tensor, looked for by this test's own rules."""
    if isinstance(output, torch.Tensor):
        return output if output.is_floating_point() else None
    values = output.values() if isinstance(output, dict) else output if isinstance(output, (tuple, list)) else []
    values = [output.features] if isinstance(output, fuzz.Found) else values
    return next((found for value in values if (found := first(value)) is not None), None)


def with_first(output, value):
    """The container with ``value`` in place of it."""
    if isinstance(output, torch.Tensor):
        return value
    if isinstance(output, fuzz.Found):
        return fuzz.Found(value, output.extra, output.sizes)
    if isinstance(output, fuzz.Named):
        return output._replace(features=value)
    if isinstance(output, dict):
        key = next(k for k, v in output.items() if first(v) is not None)
        return {**output, key: with_first(output[key], value)}
    at = next(i for i, v in enumerate(output) if first(v) is not None)
    return type(output)([*output[:at], with_first(output[at], value), *output[at + 1 :]])


def images_of(case, z):
    inputs, generator, options = case.inputs(), case.generator, case.options
    if "generate" in options:
        return options["generate"](generator, z, **inputs)
    if isinstance(generator, (fuzz.WithLabels, fuzz.WithOptionalClass)):
        return generator(z, inputs["labels"])
    if isinstance(generator, fuzz.WithUnusedClass):
        return generator(z, None)
    return generator(z, **options.get("generator_kwargs", {}))


def heads_of(case, x):
    """Logits of each head, (n, P)."""
    inputs, discriminator, options = case.inputs(), case.discriminator, case.options
    if "discriminate" in options:
        found = options["discriminate"](discriminator, x, **inputs)
    elif isinstance(discriminator, (fuzz.WithLabels, fuzz.WithOptionalClass)):
        found = discriminator(x, inputs["labels"])
    else:
        found = discriminator(x)
    found = found[options["output_key"]] if "output_key" in options else found
    return [head.reshape(len(x), -1) for head in (found if isinstance(found, list) else [found])]


class NoGradient(RuntimeError):
    """Plain torch has none there either: before the place, a reentrant checkpoint takes no part in it."""


class PlainLoop:
    """Refinement with autograd and hooks alone."""

    def __init__(self, case, at, loss):
        self.case, self.at, self.loss = case, at, LOSSES[loss]

    def without_sigmoid(self):
        """A discriminator of logits, in place of one of probabilities."""
        last = self.case.discriminator.last
        if "head: probability" in self.case.kinds:
            last[-1] = nn.Identity()
        elif "head: function probability" in self.case.kinds:
            last.squash = lambda x: x

    def image(self, a):
        if self.at == "output":
            return a
        return images_of(self.case, a if self.at == "input" else self.case.latents.clone())

    @contextlib.contextmanager
    def hooked(self, a):
        """Until after the backward pass, for a checkpoint runs its block again."""
        place = self.case.generator if self.at in ("input", "output") else self.case.generator.get_submodule(self.at)
        inside = place is not self.case.generator
        handle = place.register_forward_hook(lambda module, args, output: with_first(output, a.view_as(a)) if inside else None)
        try:
            yield
        finally:
            handle.remove()

    def start(self):
        seen = []
        if self.at == "input":
            return self.case.latents.clone()
        if self.at == "output":
            return images_of(self.case, self.case.latents.clone()).detach()
        place = self.case.generator.get_submodule(self.at)
        handle = place.register_forward_hook(lambda module, args, output: seen.append(first(output).detach().clone()))
        images_of(self.case, self.case.latents.clone())
        handle.remove()
        return seen[0]

    def evaluate(self, a):
        """(image, logit, gradient)."""
        leaf = a.detach().clone().requires_grad_()
        moved = leaf.clone()
        with self.hooked(moved):
            return self.with_gradient(leaf, moved)

    def with_gradient(self, leaf, moved):
        image = self.image(moved)
        shown = image.detach().clone()
        heads = heads_of(self.case, image.clone())
        loss = torch.stack([self.loss(head).mean(1) for head in heads]).mean(0)
        whole = "checkpointed_reentrant" in self.case.kinds  # it refuses to be asked for one gradient
        loss.sum().backward(inputs=None if whole else [leaf], retain_graph=whole)
        for part in (*self.case.generator.parameters(), *self.case.discriminator.parameters()):
            part.grad = None
        if leaf.grad is None:
            raise NoGradient
        return shown, torch.stack([head.mean(1) for head in heads]).mean(0).detach(), leaf.grad

    def run(self, size, momentum):
        """(image, logit) after STEPS steps."""
        a, velocity = self.start(), 0.0
        for _ in range(STEPS):
            velocity = momentum * velocity + size * self.evaluate(a)[2]
            a = a - velocity
        return self.evaluate(a)[:2]


def state_of(*modules):
    """All that must not change."""
    found = []
    for module in modules:
        found += [(name, value.detach().clone(), value.requires_grad, value.grad) for name, value in module.named_parameters()]
        found += [(name, value.clone(), value.requires_grad, None) for name, value in module.named_buffers()]
        for name, part in module.named_modules():
            hooks = [list(h) for h in (part._forward_hooks, part._forward_pre_hooks, part._backward_hooks)]
            found.append((name, part.training, type(part), hooks))
    return found


def same(before, after):
    def equal(a, b):
        return torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else a == b

    return len(before) == len(after) and all(all(map(equal, b, a)) for b, a in zip(before, after, strict=True))


def places_of(case):
    options = case.options
    generate = options.get("generate")
    if case.conditions is not None:
        given = case.conditions["cond"]

        def generate(G, z):
            return options["generate"](G, z, cond=given[torch.arange(len(z)) % len(given)])

    labels = case.labels if isinstance(case.generator, (fuzz.WithLabels, fuzz.WithOptionalClass)) else None
    kwargs = options.get("generator_kwargs")
    if isinstance(case.generator, fuzz.WithUnusedClass) and generate is None:
        kwargs = {"c": None}
    return [str(layer) for layer in fr.layers(case.generator, case.latents, labels, kwargs, generate)]


def refiner_of(case, at, sampler, **options):
    return fr.Refiner(
        case.generator, case.discriminator, sampler, at=at, max_steps=STEPS, num_slots=SLOTS, **{**case.options, **options}
    )


def others(case, at, rng):
    """Another sampler, for no other errors than ours."""
    kinds = [fr.Collaborative(0.1), fr.Collaborative(0.05, optimizer="adam"), fr.DGflow(0.05), fr.DOT(0.05, lipschitz=1.0)]
    if at == "input":
        prior = fr.Normal(*case.latents.shape[1:])
        return rng.choice([*kinds, fr.DDLS(0.01)]), {"prior": prior}
    return rng.choice(kinds), {}


def tried(seed, case=None):
    """(kinds, refusal or None) of one pair; AssertionError where it neither agrees nor is refused as it may be."""
    case = fuzz.case(seed) if case is None else case
    rng = random.Random(1000 + seed)
    for module in (case.generator, case.discriminator):
        module.train(rng.random() < 0.5)
    before = state_of(case.generator, case.discriminator)
    loss, momentum = rng.choice(sorted(LOSSES)), rng.choice([0.0, 0.0, 0.5])
    at, refusal = "input", None
    try:
        known = places_of(case)
        assert known[0] == "input" and known[-1] == "output"
        at = rng.choice(["input", "output", *known[1:-1]] if rng.random() < 0.6 else known)
        modes = {module: module.training for net in (case.generator, case.discriminator) for module in net.modules()}
        for module in modes:  # the step's size comes from a plain step
            module.training = False
        plain = PlainLoop(case, at, loss)
        size = 1.0
        if "checkpointed_reentrant" in case.kinds and ".inner" in at:
            case.refusals.add("checkpointed_reentrant")  # it takes part in a gradient only for trainable weights before it
        if case.refusals <= SOMETIMES:
            start = plain.start()
            try:
                slope = plain.evaluate(start)[2]
            except RuntimeError:
                case.refusals.add("plain torch fails")  # such as within a block that takes a gradient itself
                slope = start
            size = float(0.2 * start.abs().max() / slope.abs().max().clamp(min=1e-6))
        for module, mode in modes.items():
            module.training = mode
        before = state_of(case.generator, case.discriminator) if any("norm" in kind for kind in case.kinds) else before
        sampler = fr.Collaborative(size, loss, optimizer="momentum" if momentum else "sgd", momentum=momentum, control="fixed")
        refiner = refiner_of(case, at, sampler)
        out = refiner.refine(case.latents, labels=case.labels, conditions=case.conditions)
        if seed % 10 == 3:
            other, options = others(case, at, rng)
            again = refiner_of(case, at, other, **options).refine(
                case.latents, labels=case.labels, conditions=case.conditions, first_id=2
            )
            assert again.images.isfinite().all()
    except FastrefineError as error:
        allowed = tuple(REFUSALS[kind] for kind in case.refusals)
        assert isinstance(error, allowed), f"seed {seed} at {at}: {type(error).__name__}: {error}\n{case.kinds}"
        assert len(str(error)) > 30
        refusal = type(error).__name__
    assert same(before, state_of(case.generator, case.discriminator)), f"seed {seed} at {at}: the networks were changed"
    assert refusal or case.refusals <= SOMETIMES, f"seed {seed} at {at}: {case.refusals}, {case.kinds}"
    if refusal is None:
        agrees(seed, case, at, plain, size, momentum, out)
    return case.kinds, refusal


def agrees(seed, case, at, plain, size, momentum, out):
    case.generator.eval(), case.discriminator.eval()
    plain.without_sigmoid()
    images, logits = plain.run(size, momentum)
    tolerance = 2e-2 if "half_inside" in case.kinds else 1e-4
    about = f"seed {seed} at {at}, {case.kinds}, {out.report['ladder']}"
    assert out.images.shape == images.shape, about
    off = float((out.images - images).abs().max() / images.abs().max().clamp(min=1e-3))
    assert off <= tolerance, f"image off by {off:.1e}: {about}"
    off = float((out.logits - logits).abs().max() / logits.abs().max().clamp(min=0.1))
    assert off <= 3 * tolerance, f"logit off by {off:.1e}: {about}"
    assert any(entry["rung"] == "step recorded" for entry in out.report["ladder"])


SEEN: Counter = Counter()


@pytest.mark.parametrize("chunk", range(PAIRS // CHUNK))
def test_random_pairs_agree_with_a_plain_loop(chunk):
    failures = []
    refused = 0
    for seed in range(chunk * CHUNK, (chunk + 1) * CHUNK):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                refused += tried(seed)[1] is not None
            except Exception as error:  # all of a chunk are told
                failures.append(
                    f"{type(error).__name__}: {error}" if isinstance(error, AssertionError) else f"seed {seed}: {error!r}"
                )
    assert not failures, "\n\n".join(failures)
    assert refused <= 3  # of the seeds that have a kind which may be refused


def test_one_hot_labels_are_recorded():
    case = next(case for case in map(fuzz.case, range(PAIRS)) if "one_hot_appended" in case.kinds and not case.refusals)
    out = refiner_of(case, "input", fr.Collaborative(0.1)).refine(case.latents, labels=case.labels, conditions=case.conditions)
    assert out.report["route"] == "flat"


def runs_alone(case):
    """Whether the pair needs no more than latents, and is not to be refused."""
    return not case.inputs() and not case.refusals


@pytest.mark.parametrize("seed", range(2, 300, 37))
def test_pairs_come_back_from_a_folder(seed, tmp_path):
    case = fuzz.case(seed)
    code = [f"tests.support.fuzz_networks:{role}" for role in ("generator", "discriminator")]
    with torch.no_grad():
        for parameter in (*case.generator.parameters(), *case.discriminator.parameters()):
            parameter.mul_(1.1)
    arguments = {"seed": seed}, {"seed": seed}
    fr.save_pair(
        tmp_path, case.generator, case.discriminator, code=code, arguments=arguments, prior=fr.Normal(*case.latents.shape[1:])
    )
    pair = fr.load_pair(tmp_path, trust_code=True)  # functions make these networks
    for before, after in ((case.generator, pair.generator), (case.discriminator, pair.discriminator)):
        found = after.state_dict()
        assert found and all(torch.equal(value, found[name]) for name, value in before.state_dict().items())


@pytest.mark.parametrize("seed", [seed for seed in range(3, 300, 29) if runs_alone(fuzz.case(seed))])
def test_discriminators_are_shaped(seed):
    case = fuzz.case(seed)
    refiner = refiner_of(case, "input", fr.Collaborative(0.05))
    before = state_of(case.generator, case.discriminator)
    with torch.no_grad():
        real = images_of(case, case.latents.clone()) * 0.9
    after = state_of(case.generator, case.discriminator)  # a forward pass in training mode moves statistics
    before = after if any("norm" in kind for kind in case.kinds) else before
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shaped = fr.shape_discriminator(refiner, real, 2, 4, 1e-3, latents=case.latents)
    assert same(before, state_of(case.generator, case.discriminator))
    assert all(value.isfinite().all() for value in shaped.state_dict().values() if value.is_floating_point())


def test_every_kind_of_the_grammar_occurs():
    seen = Counter(kind for seed in range(PAIRS) for kind in fuzz.case(seed).kinds)
    wanted = {
        *fuzz.BLOCKS, *fuzz.REFUSED, *(f.__name__ for group in fuzz.LABELLED.values() for f in group),
        *(f"packed: {kind}" for kind in fuzz.PACKED), *(f"head: {kind}" for kind in fuzz.HEADS),
    }  # fmt: skip
    assert not wanted - seen.keys()
    assert min(seen[kind] for kind in fuzz.BLOCKS) >= 3
