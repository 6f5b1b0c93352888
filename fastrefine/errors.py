"""Exceptions and warnings of fastrefine; every message says what was given, what was wanted and what to do."""

import re
import sys
import warnings

# Options that Python and the command line share under other names: coupling='freeze' is --coupling freeze.
_FLAGS = {"num_slots": "--slots", **{
    name: f"--{name.replace('_', '-')}" for name in (
        "at", "coupling", "device", "discriminator_output", "group_size", "keep", "max_steps", "on_noise", "output_key", "pack",
        "precision", "real", "select", "step_size", "stop", "trust_code",
    )
}}  # fmt: skip
_OPTION = re.compile(rf"\b({'|'.join(_FLAGS)})=(?:'([\w.-]+)'|([\d.]+\b|mh|drs|obrs|None|True)|(?=[,;. )]|$))")


class _Told(Exception):
    """A message in the words of Python. command: the same for users of the command line; None: with flags for arguments."""

    def __init__(self, text: str = "", command: str | None = None):
        super().__init__(text)
        self.command = _with_flags(str(text)) if command is None else command


def _with_flags(text: str) -> str:
    def flag(found: re.Match[str]) -> str:
        value = found[2] or found[3] or ""
        return " ".join(filter(None, (_FLAGS[found[1]], {"None": "none", "True": ""}.get(value, value))))

    return _OPTION.sub(flag, text)


class FastrefineError(_Told):
    """Base of all exceptions raised on purpose by fastrefine.

    Example: ``fr.Collaborative(-1)  # InputError, and so a FastrefineError, as all that are raised on purpose``
    """


class InputError(FastrefineError, ValueError):
    """A value, tensor or module given by the caller cannot be used as it is.

    Example: ``fr.Collaborative(-1)  # InputError: step_size is -1; wanted a finite number more than 0``
    """


class SplitError(FastrefineError):
    """The generator cannot be cut at the requested place.

    Example: ``fr.Refiner(g, d, fr.Collaborative(), at="nowhere", prior=fr.Normal(32)).sample(8)  # SplitError``
    """


class CouplingError(FastrefineError):
    """A network mixes the samples of a batch, or is not repeatable.

    Example: ``fr.Refiner(g, coupled, fr.Collaborative(), prior=fr.Normal(32)).sample(8)  # CouplingError names what couples``
    """


class GradientError(FastrefineError):
    """No gradient reaches the activation that is to be refined.

    Example: ``fr.Refiner(g, detached, fr.Collaborative(), prior=fr.Normal(32)).sample(8)  # GradientError: none reaches``
    """


class NonFiniteError(FastrefineError):
    """A logit or gradient became NaN or infinite and ``on_nonfinite="error"`` was asked for.

    Example: ``fr.Refiner(g, d, fr.DDLS(1e38), prior=fr.Normal(32), on_nonfinite="error").sample(8)  # NonFiniteError``
    """


class BackendError(FastrefineError, RuntimeError):
    """A backend that was asked for by name is absent, or its extension fails to load.

    Example: ``with fr.use_backend("cuda"): ...  # BackendError, with the reason``
    """


class FastrefineWarning(_Told, UserWarning):
    """Category of all warnings issued by fastrefine.

    Example: ``warnings.filterwarnings("ignore", category=fr.FastrefineWarning)  # silent``
    """


def warn(warning: str | FastrefineWarning) -> None:
    """Warn at the place in the caller's own code that called us, however deep in the package, or in a loop over it, this is."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("fastrefine", "torch"):
        level, frame = level + 1, frame.f_back
    warnings.warn(FastrefineWarning(warning) if isinstance(warning, str) else warning, stacklevel=level)
