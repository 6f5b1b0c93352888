"""Questions put to the networks with a handful of samples, before anything is refined."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastrefine.errors import CouplingError, GradientError
from fastrefine.networks import draws
from fastrefine.options import Options

ROWS = 4  # samples of a probe batch
Inputs = Mapping[str, Tensor]
Trace = list[tuple[str, Any, Any]]


def rows(options: Options) -> int:
    """Samples of a probe batch, in whole packs."""
    return -(-ROWS // options.pack) * options.pack


def is_plain(value: Any) -> bool:
    """Whether it is a tensor that may be kept: within torch.func.vmap or grad there are others, which must not leave it."""
    return isinstance(value, Tensor) and not torch._C._functorch.is_functorch_wrapped_tensor(value)


def _trace(roots: dict[str, nn.Module], forward: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Trace]:
    """The output, and (module name, tensor inputs, output) of every module, inner ones first, in order of execution."""
    calls: Trace = []
    handles = []
    for root, module in roots.items():
        for name, child in module.named_modules():
            label = f"{root} module {name!r} ({type(child).__name__})" if name else f"{root} ({type(child).__name__})"

            def record(_: nn.Module, args: Any, out: Any, label: str = label) -> None:
                tensors = [a.detach().clone() for a in args if is_plain(a)]
                if is_plain(out):
                    calls.append((label, tensors, out.detach().clone()))

            handles.append(child.register_forward_hook(record))
    try:
        with torch.no_grad():
            return forward(x), calls
    finally:
        for handle in handles:
            handle.remove()


def _close(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or not a.is_floating_point() or not a.numel():
        return a.shape == b.shape and torch.equal(a, b)
    tolerance = 1e-4 if torch.finfo(a.dtype).bits < 64 else 1e-9
    scale = float(torch.nan_to_num(a, 0, 0, 0).abs().max())
    return torch.allclose(a, b, rtol=0, atol=max(tolerance * scale, 1e-30), equal_nan=True)


def _culprit(first: Trace, second: Trace, row: slice) -> str:
    """The first module whose inputs agree on ``row`` and whose outputs do not."""
    for (name, inputs, out), (_, inputs2, out2) in zip(first, second, strict=False):
        same = all(_close(a[row], b[row]) for a, b in zip(inputs, inputs2, strict=False) if a.dim() and b.dim())
        if same and out.dim() and not _close(out[row], out2[row]):
            return name
    return "a function outside any module"


def check_repeatable(roots: dict[str, nn.Module], forward: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """Raise CouplingError, naming the module, when two passes over the same batch differ (noise layers, dropout)."""
    out, first = _trace(roots, forward, x)
    again, second = _trace(roots, forward, x)
    if not _close(out, again):
        drawn = draws.first_draw(lambda: forward(x))
        raise CouplingError(
            f"{_culprit(first, second, slice(None))} gives different outputs for the same input in eval mode"
            + (f": it draws random numbers ({drawn}). Pass on_noise='freeze'" if drawn else "")
            + "; or replace its noise by a constant buffer before refining"
        )


def check_independent(
    roots: dict[str, nn.Module], forward: Callable[[Tensor, Inputs], Tensor], x: Tensor, inputs: Inputs
) -> None:
    """Raise CouplingError, naming the module, when a sample's output depends on its companions in the batch or its place.

    x: (n, ...), n >= 3: the first sample keeps its place while its companions are replaced, then all are permuted. Labels
    and conditions, ``inputs``, go with their samples.
    """

    n, scale = len(x), 1.5 if x.is_floating_point() else 1
    everyone, order = list(range(n)), list(range(n - 1, -1, -1))

    def run(z: Tensor, of: list[int]) -> tuple[Tensor, Trace]:
        given = {name: value[of] for name, value in inputs.items()}
        return _trace(roots, lambda clone: forward(clone, given), z)

    out, first = run(x.clone(), everyone)
    replaced, second = run(torch.cat([x[:1], scale * x[1:].flip(0)]), [0, *[1] * (n - 1)])  # other sums than before
    permuted, _ = run(x[order], order)
    if not _close(out[:1], replaced[:1]) or not _close(out[order], permuted):
        raise CouplingError(
            f"{_culprit(first, second, slice(0, 1))} mixes the samples of a batch (minibatch statistics?), and samples must be "
            "independent: pass coupling='freeze' to hold its statistic, or coupling='lockstep' to keep fixed groups together"
        )


def check(
    roots: dict[str, nn.Module], forward: Callable[[Tensor, Inputs], Tensor], x: Tensor, inputs: Inputs, coupling: str
) -> None:
    """Refuse networks that are not repeatable or, unless in lock step, not independent; x is left as it is."""
    check_repeatable(roots, lambda given: forward(given.clone(), inputs), x)
    if coupling != "lockstep":
        check_independent(roots, forward, x, inputs)


def explain_missing_gradient(roots: dict[str, nn.Module], loss: Callable[[Tensor], Tensor], a: Tensor) -> GradientError | None:
    """Why no gradient reaches ``a``: the error that names the module, or None when it is zero for a reason of its own.

    A module is to blame when gradient reaches its output but not its input. Activations of torch.nn that are zero or
    saturated for every sample are not to blame: that is a matter of the weights.
    """
    calls: list[tuple[str, nn.Module, list[Tensor], Tensor]] = []
    handles = []
    for root, module in roots.items():
        for name, child in module.named_modules():

            def record(m: nn.Module, args: Any, out: Any, label: str = f"{root} module {name!r}") -> None:
                inputs = [x for x in args if is_plain(x) and x.requires_grad]
                if is_plain(out) and inputs:
                    calls.append((f"{label} ({type(m).__name__})", m, inputs, out))

            handles.append(child.register_forward_hook(record))
    try:
        with torch.enable_grad():
            leaf = a.detach().requires_grad_()
            value = loss(leaf)
            cut = next((label for label, _, _, out in calls if not out.requires_grad), None)
            if not value.requires_grad:
                where = cut or "a function outside any module"
                return GradientError(f"{where} detaches its output, so no gradient reaches the refined activation")
            for label, module, inputs, out in reversed(calls):
                own = type(module).__module__.startswith("torch.nn")
                if own or next(module.children(), None) is not None or not out.requires_grad:
                    continue
                # in-place layers after a call may have replaced what it returned: then torch refuses, and we move on
                grads = torch.autograd.grad(value, [out, *inputs], retain_graph=True, allow_unused=True)
                arrives = grads[0] is not None and bool((grads[0] != 0).any())
                if arrives and not any(g is not None and bool((g != 0).any()) for g in grads[1:]):
                    return GradientError(f"{label} passes no gradient on (rounding?), so nothing can be refined before it")
    except RuntimeError as error:
        return GradientError(f"no gradient reaches the refined activation: {error}")
    finally:
        for handle in handles:
            handle.remove()
    return None
