"""Checks of what callers hand in, before any compute. Checks of numbers and choices work without torch."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

from fastrefine.errors import InputError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# Of Refiner; here, so that the command line reads them without torch.
COUPLINGS, ON_NOISE = ("refuse", "lockstep", "freeze"), ("refuse", "freeze")

# What the command line, files and Python call samplers, stop rules and priors -> their classes. Here, as above.
SAMPLERS = {
    "collaborative": "Collaborative", "ddls": "DDLS", "mala": "MALA", "pcn": "PCN", "hmc": "HMC", "dgflow": "DGflow",
    "dot": "DOT",
}  # fmt: skip
STOPS = {"none": "FixedSteps", "median": "MedianOfReal", "reference": "ReferenceSample", "uniform": "UniformStep"}
PRIORS = {"normal": "Normal", "uniform": "Uniform", "truncated_normal": "TruncatedNormal"}
STEP_SIZE = 0.1  # of a sampler that is given by its name alone


def count(name: str, value: Any, low: int, high: int = 2**63 - 1) -> int:
    """``value`` as an int in [low, high]; InputError otherwise (True and 3.0 are not counts, NumPy's integers are)."""
    if isinstance(value, Integral) and not isinstance(value, bool) and low <= int(value) <= high:
        return int(value)
    most = f" and at most {high}" if high < 2**63 - 1 else ""
    raise InputError(f"{name} is {shown(value)}; wanted a whole number of at least {low}{most}")


def shown(value: Any) -> str:
    """A value in an error: its repr, of a long one the beginning, of a tensor or array its shape."""
    shape = getattr(value, "shape", None)
    if shape is not None and len(shape):
        return f"a {type(value).__name__} of shape {tuple(shape)}"
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def network(module: Any) -> str:
    """A network in a word or two: its class and how many parameters it has."""
    if module is None:
        return "no generator"
    return f"{type(module).__name__} of {sum(p.numel() for p in module.parameters()):,} parameters"


def number(
    name: str, value: Any, low: float = -math.inf, high: float = math.inf, *, open_low: bool = False, open_high: bool = False
) -> None:
    """Raise InputError unless ``value`` is a finite number in [low, high], without an end that is open."""
    ends = {low} if open_low else set()
    ends |= {high} if open_high else set()
    if is_number(value) and low <= value <= high and value not in ends:
        return
    wanted = f"{'more than' if open_low else 'at least'} {low:g}"
    wanted += f" and {'less than' if open_high else 'at most'} {high:g}" if high < math.inf else ""
    raise InputError(f"{name} is {shown(value)}; wanted a finite number {wanted if low > -math.inf else ''}".rstrip())


def is_number(value: Any) -> bool:
    """Whether ``value`` is a finite number that fits a float; True and False are none."""
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # a whole number beyond any float
        return False


def choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise InputError unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise InputError(f"{name} is {shown(value)}; wanted one of {', '.join(map(repr, choices))}{closest(value, choices)}")


def closest(value: Any, names: Iterable[str]) -> str:
    """The end of an error: the names that a text is close to, if any."""
    close = difflib.get_close_matches(value.lower(), list(names), n=3) if isinstance(value, str) else []
    return f"; did you mean {' or '.join(map(repr, close))}?" if close else ""


def clamp(value: Any) -> None:
    """Raise InputError unless ``value`` is None or two ordered finite numbers; a bound of 0 is a bound."""
    if value is None:
        return
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise InputError(f"clamp is {value!r}; wanted None or (low, high)")
    for bound in value:
        number("clamp bound", bound)
    if value[0] > value[1]:
        raise InputError(f"clamp is {value!r}; wanted low <= high")


def device(name: str, value: Any) -> torch.device:
    """``value`` as a torch.device; InputError otherwise."""
    import torch

    try:
        found = torch.device(value)
    except (RuntimeError, TypeError) as error:
        raise InputError(f"{name} is {value!r}; wanted a device such as 'cpu' or 'cuda:0'") from error
    if found.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"{name} is {str(value)!r}, but torch sees no GPU here; leave it out, or give 'cpu'")
    if found.type == "cuda" and found.index is None:
        return torch.device("cuda", torch.cuda.current_device())  # what is current may change between calls
    return found


def tensor(name: str, value: Any, dtype: torch.dtype | None = None) -> Tensor:
    """``value`` as a floating-point tensor (N, ...), not cast.

    Raises InputError, which names the rows that are not finite in ``dtype`` (None: float32).
    """
    import torch

    try:
        x = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{name} must be a tensor (N, ...), got {type(value).__name__}") from error
    if x.dim() == 0:
        raise InputError(f"{name} must have a batch dimension, got a scalar")
    if not x.is_floating_point():
        raise InputError(
            f"{name} must be floating point in the networks' range, got {x.dtype}{_range(x)}"
            + f"; for networks of -1 to 1: {name}.float() / 127.5 - 1" * (x.dtype == torch.uint8)
        )
    x = x.detach()
    if x.is_inference():
        x = x.clone()
    _finite(name, x, dtype or torch.float32)
    return x


def _finite(name: str, x: Tensor, dtype: torch.dtype) -> None:
    """Raise InputError unless every entry of x (N, ...) is a finite number of ``dtype``."""
    import torch

    if not x.numel():
        return
    bad = (~(x.abs() <= min(torch.finfo(dtype).max, torch.finfo(x.dtype).max))).reshape(len(x), -1).any(1)
    if bool(bad.any()):
        first = bad.nonzero()[:5, 0].tolist()
        raise InputError(f"{name} holds non-finite values in {int(bad.sum())} of {len(x)} rows, first at {first}")


def _range(x: Tensor) -> str:
    return f" with values {x.min().item():g} to {x.max().item():g}" if x.numel() else ""


def labels(value: Any, n: int) -> Tensor | None:
    """Labels as (n,) int64 or (n, C) floats; one int stands for all."""
    import torch

    if value is None:
        return None
    try:
        y = torch.as_tensor(value).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"labels must be whole numbers (N,) or vectors (N, C), got {type(value).__name__}") from error
    if y.dim() == 0:
        y = y.expand(n)
    if y.dim() == 1 and len(y) == 0:  # an empty list has no type
        y = y.long()
    if len(y) != n:
        raise InputError(f"got {len(y)} labels for {n} samples")
    if (y.is_floating_point() and y.dim() == 1) or y.dtype == torch.bool:
        raise InputError(f"labels must be whole numbers (N,) or vectors (N, C), got {y.dtype} of shape {tuple(y.shape)}")
    if not y.is_floating_point():
        return y.long()
    _finite("labels", y, torch.float32)
    return y.clone()


def real_images(real: Tensor, shape: tuple[int, ...], generated: Tensor | None) -> None:
    """Raise InputError when real images are absent, of another size, or visibly in another range than generated ones."""
    if len(real) == 0:
        raise InputError("`real` is empty; wanted real images (N, ...)")
    if tuple(real.shape[1:]) != shape:
        alike = real.dim() == len(shape) + 1 and real.shape[1] == shape[0]
        hint = "; resize or pad them to that size" if alike else ""
        raise InputError(f"real images have shape {tuple(real.shape[1:])}, but the generator makes {shape}{hint}")
    if real.dim() != 4 or generated is None:
        return
    low, high = float(real.min()), float(real.max())
    own = f"{float(generated.min()):.3g} to {float(generated.max()):.3g}"
    seen = f"real images lie in {low:g} to {high:g}, generated ones in {own}"
    signed = float(generated.min()) < -0.5
    unsigned = float(generated.min()) >= 0 and float(generated.max()) <= 1
    if high > 4 * max(1.0, float(generated.abs().max())):
        raise InputError(f"{seen}: are the real images 0..255? Scale them to the generator's range")
    if signed and low >= 0:
        raise InputError(f"{seen}: are the real images 0..1? Scale them to the generator's range, e.g. 2 x - 1")
    if unsigned and low < -0.1:
        raise InputError(f"{seen}: are the real images -1..1? Scale them to the generator's range, e.g. (x + 1) / 2")


def classes(labels: Tensor, num_classes: int | None) -> None:
    """Raise InputError for class labels that are negative or not less than ``num_classes``."""
    if labels.is_floating_point() or not len(labels):
        return
    if int(labels.min()) < 0:
        raise InputError(f"labels must not be negative, got {int(labels.min())}")
    if num_classes is not None and int(labels.max()) >= num_classes:
        raise InputError(f"label {int(labels.max())} is out of range: the network knows classes 0 to {num_classes - 1}")
