"""The errors of jconv: one sentence each, with what came, what was expected, and the remedy."""

import contextlib
from collections.abc import Iterator


class ConvError(ValueError):
    """An argument that no convolution can serve. Base class of jconv's own errors."""


class ConvTypeError(ConvError, TypeError):
    """As :class:`ConvError`, where ``jax.lax`` raises ``TypeError``: dtypes, ranks and numbers of groups."""


class AlgorithmError(ConvError):
    """The algorithm that was named cannot serve this problem, or no algorithm has that name."""


class StateDictError(ConvError):
    """A PyTorch state dict that cannot be read, or that does not fit the Flax parameters."""


class ParityError(ConvError):
    """Two networks that cannot be compared: one cannot be called, or what they take does not fit."""


@contextlib.contextmanager
def needs_flax(who: str) -> Iterator[None]:
    """Around an import of Flax: where it is not installed, an ImportError that says who needs it, and the remedy."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name != "flax":
            raise
        raise ImportError(f"{who} needs Flax, which is not installed; pip install flax") from error
