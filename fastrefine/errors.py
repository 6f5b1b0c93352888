"""Exceptions and warnings of fastrefine; every message says what was given, what was wanted and what to do."""


class _Told(Exception):
    """A message in the words of Python. command: the same for users of the command line, where the words differ."""

    def __init__(self, text: str = "", command: str | None = None):
        super().__init__(text)
        self.command = command or text


class FastrefineError(_Told):
    """Base of all exceptions raised on purpose by fastrefine."""


class InputError(FastrefineError, ValueError):
    """A value, tensor or module given by the caller cannot be used as it is."""


class SplitError(FastrefineError):
    """The generator cannot be cut at the requested place."""


class CouplingError(FastrefineError):
    """A network mixes the samples of a batch, or is not repeatable."""


class GradientError(FastrefineError):
    """No gradient reaches the activation that is to be refined."""


class NonFiniteError(FastrefineError):
    """A logit or gradient became NaN or infinite and ``on_nonfinite="error"`` was asked for."""


class BackendError(FastrefineError, RuntimeError):
    """A backend that was asked for by name is absent, or its extension fails to load."""


class FastrefineWarning(_Told, UserWarning):
    """Category of all warnings issued by fastrefine."""
