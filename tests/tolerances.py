"""Whether a result is within the library's own table of tolerances. A test never loosens its own tolerance."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from jconv.parity.tolerances import TOLERANCES

# compiler_options: XLA's default, which conftest.py changes, for programs whose rounding, memory or text is looked at and
# for the gradients of every algorithm.
AS_USERS = {"xla_cpu_use_fusion_emitters": True}


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
