"""How far a result may lie from the float64 reference, by (algorithm, dtype).

The number is the largest absolute difference over the largest absolute value. Direct summation of a
few hundred products rounds to a few units in the last place; an algorithm whose error grows by more
than that (Winograd, FFT) gets a row of its own. A test never loosens its own tolerance.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

_DIRECT = {
    "float16": 4e-3,
    "bfloat16": 3e-2,
    "float32": 2e-6,
    "float64": 1e-14,
    "complex64": 4e-6,
    "complex128": 2e-14,
}
_DIRECT_CLASS = (
    "xla",
    "channel_last",
    "groupwise",
    "groupwise_winograd",
    "pointwise",
    "patches",
    "depthwise",
    "grouped",
    "direct",
    "im2col",
    "fft",
    "fold",
    "volume",
    "phase",
    "subpixel",
    "winograd",
    "auto",
)
# F(4x4, 3x3): the transforms' entries reach 8, and their inverse's 5.
_LOOSE = {"float32": 4e-5, "float64": 1e-13, "complex64": 8e-5, "complex128": 2e-13}
TOLERANCES = {(name, dtype): t for name in _DIRECT_CLASS for dtype, t in _DIRECT.items()} | {
    ("winograd4", dtype): t for dtype, t in _LOOSE.items()
}


def assert_close(actual: Any, expected: Any, algorithm: str, dtype: Any, factor: float = 1.0) -> None:
    """Within the table's bound; ``factor`` counts the convolutions in a row that lead to the value."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape, f"shape {actual.shape}, expected {expected.shape}"
    if actual.dtype.kind in "iub" and expected.dtype.kind in "iub":
        np.testing.assert_array_equal(actual, expected)
        return
    wide = np.complex128 if "c" in (actual.dtype.kind, expected.dtype.kind) else np.float64
    actual, expected = actual.astype(wide), expected.astype(wide)
    assert np.isfinite(actual).all(), "not finite"
    if actual.size == 0:
        return
    scale = max(np.abs(expected).max(), 1e-30)
    error = np.abs(actual - expected).max() / scale
    bound = TOLERANCES[algorithm, np.dtype(dtype).name] * factor
    assert error <= bound, f"{algorithm} in {np.dtype(dtype).name}: relative error {error:.2e}, bound {bound:.2e}"


bfloat16 = ml_dtypes.bfloat16
