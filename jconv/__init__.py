"""jconv: convolution for JAX and Flax with PyTorch's semantics and a choice of algorithm."""

import importlib as _importlib

from jconv import functional as functional
from jconv import grad as grad
from jconv import lax as lax
from jconv.algorithms.base import Algorithm as Algorithm
from jconv.algorithms.base import Cost as Cost
from jconv.algorithms.table import ALGORITHMS as ALGORITHMS
from jconv.convolve import dots_saveable as dots_saveable
from jconv.errors import AlgorithmError as AlgorithmError
from jconv.errors import ConvError as ConvError
from jconv.errors import ConvTypeError as ConvTypeError
from jconv.errors import StateDictError as StateDictError
from jconv.lax import conv as conv
from jconv.lax import conv_general_dilated as conv_general_dilated
from jconv.lax import conv_general_dilated_local as conv_general_dilated_local
from jconv.lax import conv_general_dilated_patches as conv_general_dilated_patches
from jconv.lax import conv_transpose as conv_transpose
from jconv.lax import conv_with_general_padding as conv_with_general_padding
from jconv.lax import plan as plan
from jconv.planner import Plan as Plan
from jconv.problem import ConvProblem as ConvProblem

__version__ = "0.1.0"

_ON_FIRST_USE = ("interop", "linen", "nnx")


def __getattr__(name: str):
    if name in _ON_FIRST_USE:
        return _importlib.import_module(f"jconv.{name}")
    raise AttributeError(f"module 'jconv' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_ON_FIRST_USE])
