"""The errors of jconv: one sentence each, with what came, what was expected, and the remedy."""


class ConvError(ValueError):
    """An argument that no convolution can serve. Base class of jconv's own errors."""


class ConvTypeError(ConvError, TypeError):
    """As :class:`ConvError`, where ``jax.lax`` raises ``TypeError``: dtypes, ranks and numbers of groups."""


class AlgorithmError(ConvError):
    """The algorithm that was named cannot serve this problem, or no algorithm has that name."""


class StateDictError(ConvError):
    """A PyTorch state dict that cannot be read, or that does not fit the Flax parameters."""
