"""The oracle a cut is compared with: the whole generator, one module's output replaced by a forward hook."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fastrefine.errors import GradientError, SplitError
from fastrefine.networks.torch_state import seed_torch

_SEED = 20_240_229  # of the random cotangent, and of both sides where a generator draws noise


class HookedGenerator:
    """``generator`` (a function of latents and maybe labels) seen at the output of one call of one of its modules.

    Without a module it is seen at its input: the activation is the latents.
    """

    def __init__(self, generator: nn.Module, module: nn.Module | None, call: int = 0) -> None:
        self.generator, self.module, self.call = generator, module, call

    def run(self, inputs: tuple[Tensor, ...], activation: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(image, activation); a given activation replaces the module's output. Costs a whole forward."""
        if self.module is None:
            activation = inputs[0].clone() if activation is None else activation
            seed_torch(inputs[0].device, _SEED)
            return self.generator(activation.clone(), *inputs[1:]), activation
        calls, seen = 0, activation

        def replace(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
            nonlocal calls, seen
            calls += 1
            if calls != self.call + 1:
                return None
            if seen is None:
                seen = output.detach().clone()
            return seen.clone() if seen.requires_grad else None  # a clone, as in-place modules may follow

        handle = self.module.register_forward_hook(replace)
        try:
            seed_torch(inputs[0].device, _SEED)
            image = self.generator(*inputs)
        finally:
            handle.remove()
        assert seen is not None
        return image, seen

    def image_and_gradient(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(activation, image, cotangent, gradient of <image, cotangent> with respect to the activation)."""
        with torch.no_grad():
            _, activation = self.run(inputs)
        activation.requires_grad_()
        image, _ = self.run(inputs, activation)
        cotangent = random_like(image)
        gradient = torch.autograd.grad(image, activation, cotangent)[0]
        return activation, image.detach(), cotangent, gradient


def random_like(value: Tensor) -> Tensor:
    """Standard normal numbers in the shape of ``value``, from a generator of their own."""
    source = torch.Generator().manual_seed(_SEED)
    return torch.randn(value.shape, generator=source).to(value.device, value.dtype)


def difference(oracle: HookedGenerator, prefix: nn.Module, tail: nn.Module, inputs: tuple[Tensor, ...]) -> str | None:
    """What differs between a cut and the oracle on ``inputs``, in words; ``None`` if nothing does."""
    expected_activation, expected_image, cotangent, expected_gradient = oracle.image_and_gradient(inputs)
    with torch.no_grad():
        seed_torch(inputs[0].device, _SEED)
        activation, context = prefix(*inputs)
    leaf = activation.detach().clone().requires_grad_()
    image = tail(leaf, *context)
    if not image.requires_grad:
        return "no gradient passes through the traced tail"
    gradient = torch.autograd.grad(image, leaf, cotangent)[0]
    with torch.no_grad():
        again = tail(leaf.detach(), *context)
    pairs = {
        "activations": (activation, expected_activation),
        "images": (image.detach(), expected_image),
        "gradients": (gradient, expected_gradient),
        "two runs of the tail (it draws random numbers)": (again, expected_image),
    }
    for name, (got, expected) in pairs.items():
        if got.shape != expected.shape:
            return f"{name} differ in shape from the whole generator's: {tuple(got.shape)}, {tuple(expected.shape)}"
        error = (got - expected).abs().max() / expected.abs().max().clamp_min(1e-30)
        if not error <= _tolerance(expected):
            return f"{name} differ from the whole generator's by {float(error):.1e} (relative to the largest)"
    return None


def check_gradient(oracle: HookedGenerator, inputs: tuple[Tensor, ...], at: str) -> None:
    """Raise SplitError if the image does not depend on the activation, GradientError if no gradient gets there."""
    with torch.no_grad():
        image, activation = oracle.run(inputs)
        moved = activation + activation.abs().mean().clamp_min(1e-3) * random_like(activation)
    image_moved, _ = oracle.run(inputs, moved.requires_grad_())
    if torch.equal(image, image_moved):
        raise SplitError(f"the generator's output does not depend on the cut {at!r}")
    activation.requires_grad_()
    records: list[tuple[str, list[Tensor], list[Tensor]]] = []
    handles = [
        module.register_forward_hook(
            lambda _module, args, output, name=name: records.append((name, _followed(args), _floating(output)))
        )
        for name, module in oracle.generator.named_modules()
        if name.startswith("generator.")
    ]
    try:
        image, _ = oracle.run(inputs, activation)
    finally:
        for handle in handles:
            handle.remove()
    if image.requires_grad:
        try:
            gradient = torch.autograd.grad(image, activation, random_like(image), retain_graph=True, allow_unused=True)[0]
        except RuntimeError as error:
            raise GradientError(f"the generator cannot be differentiated after the cut {at!r}: {error}") from error
        if gradient is not None and bool((gradient != 0).any()):
            return
    culprit = _breaking_module(records, image)
    where = f"module {culprit!r}" if culprit else "an operation outside its modules"
    raise GradientError(
        f"no gradient passes from the image back to the cut {at!r}: {where} stops it (detach, rounding, no_grad, or a "
        "weight of zero). Cut after it, or give that module a gradient"
    )


def _breaking_module(records: list[tuple[str, list[Tensor], list[Tensor]]], image: Tensor) -> str | None:
    """The innermost module that receives a gradient for its outputs and passes none to its inputs."""
    for name, before, after in records:
        if not before:
            continue
        after = [value for value in after if value.requires_grad]
        if not after:
            return name.removeprefix("generator.")
        if image.requires_grad and _any_gradient(image, after) and not _any_gradient(image, before):
            return name.removeprefix("generator.")
    return None


def _any_gradient(image: Tensor, values: list[Tensor]) -> bool:
    if any(value is image for value in values):
        return True
    grads = torch.autograd.grad(image, values, random_like(image), retain_graph=True, allow_unused=True)
    return any(grad is not None and bool((grad != 0).any()) for grad in grads)


def _floating(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor) and value.is_floating_point()]


def _followed(values: Any) -> list[Tensor]:
    return [value for value in _floating(values) if value.requires_grad]


def _tolerance(value: Tensor) -> float:
    if value.is_cuda and value.dtype == torch.float32:
        return 1e-3  # TF32, and algorithms that are chosen anew
    return {torch.float64: 1e-10, torch.float32: 1e-5}.get(value.dtype, 3e-2)
