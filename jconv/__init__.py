"""Convolution for JAX and Flax with PyTorch's semantics and a choice of algorithm.

``conv_general_dilated`` and its relatives are drop-ins for ``jax.lax``'s. ``jconv.functional`` and
``jconv.grad`` are ``torch.nn.functional``'s and ``torch.nn.grad``'s convolutions, ``jconv.nnx`` and
``jconv.linen`` Flax layers after ``torch.nn``, ``jconv.interop`` moves weights. ``plan`` and ``plans`` show
which algorithm runs and why, ``tune`` measures instead of estimating, ``workspace_limit`` bounds temporaries.
``explain`` shows what runs in a whole program, ``accelerate`` swaps lax's convolutions for these in any function, ``install`` in the whole process.
"""

__version__ = "0.1.0"  # before the imports: the store asks for it

import importlib as _importlib

from jconv import functional as functional
from jconv import grad as grad
from jconv import lax as lax
from jconv.algorithms.base import Algorithm as Algorithm
from jconv.algorithms.base import Cost as Cost
from jconv.algorithms.table import ALGORITHMS as ALGORITHMS
from jconv.convolve import dots_saveable as dots_saveable
from jconv.device import workspace_limit as workspace_limit
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
from jconv.lax import plans as plans
from jconv.planner import Plan as Plan
from jconv.problem import ConvProblem as ConvProblem
from jconv.rewrite import accelerate as accelerate
from jconv.rewrite import install as install
from jconv.rewrite import uninstall as uninstall

__all__ = [
    "ALGORITHMS", "Algorithm", "AlgorithmError", "ConvError", "ConvProblem", "ConvTypeError", "Cost", "Plan",
    "StateDictError", "accelerate", "conv", "conv_general_dilated", "conv_general_dilated_local",
    "conv_general_dilated_patches", "conv_transpose", "conv_with_general_padding", "dots_saveable", "functional",
    "grad", "install", "lax", "plan", "plans", "uninstall", "workspace_limit",
]  # fmt: skip

_ON_FIRST_USE = ("explaining", "interop", "linen", "nnx", "parity", "tuning")
_DOORS = {"explain": "explaining", "tune": "tuning"}


def __getattr__(name: str):
    if name in _ON_FIRST_USE:
        return _importlib.import_module(f"jconv.{name}")
    if name in _DOORS:
        return getattr(_importlib.import_module(f"jconv.{_DOORS[name]}"), name)
    raise AttributeError(f"module 'jconv' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_ON_FIRST_USE, *_DOORS])
