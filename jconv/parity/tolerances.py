"""How far a result may lie from the float64 reference, by (algorithm, dtype).

The number is the largest absolute difference over the largest absolute value. Direct summation of a
few hundred products rounds to a few units in the last place; an algorithm whose error grows by more
than that gets a row of its own. Nothing loosens its own tolerance.
"""

from __future__ import annotations

from jconv.algorithms.table import ALGORITHMS

__all__ = ["TOLERANCES"]

_DIRECT = {
    "float16": 4e-3,
    "bfloat16": 3e-2,
    "float32": 2e-6,
    "float64": 1e-14,
    "complex64": 4e-6,
    "complex128": 2e-14,
}
# F(4x4, 3x3): the transforms' entries reach 8, and their inverse's 5.
_LOOSE = {"float32": 4e-5, "float64": 1e-13, "complex64": 8e-5, "complex128": 2e-13}
_TIGHT = [algorithm.name for algorithm in ALGORITHMS if algorithm.accuracy != "loose"]

TOLERANCES = {(name, dtype): t for name in (*_TIGHT, "auto") for dtype, t in _DIRECT.items()} | {
    ("winograd4", dtype): t for dtype, t in _LOOSE.items()
}
