"""Exceptions and warnings of fastrefine; every message says what was given, what was wanted and what to do."""


class FastrefineError(Exception):
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


class FastrefineWarning(UserWarning):
    """Category of all warnings issued by fastrefine."""
