"""PyTorch's geometry arguments, parsed at the door: one int, or one for each spatial dimension."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from jconv.errors import ConvError, ConvTypeError
from jconv.problem import integer


def per_axis(name: str, value: Any, n: int, minimum: int, single: bool = True) -> tuple[int, ...]:
    """An int, a sequence of one int (if ``single``), or of ``n`` ints of at least ``minimum``, as ``n`` ints."""
    if isinstance(value, str | bytes) or not isinstance(value, Sequence | np.ndarray):
        return (integer(name, value, minimum),) * n
    numbers = tuple(integer(f"{name}[{i}]", v, minimum) for i, v in enumerate(value))
    if single and len(numbers) == 1:
        return numbers * n
    if len(numbers) != n:
        raise ConvError(f"{name} must be an int or {n} ints, got {len(numbers)} of them: {numbers}")
    return numbers


def padding_pairs(
    padding: Any, n: int, window: Sequence[int], dilation: Sequence[int], stride: Sequence[int]
) -> tuple[tuple[int, int], ...]:
    """PyTorch's ``padding`` as (low, high) pairs; of ``'same'``, the odd element goes to the high side.

    Beyond PyTorch, ``n`` pairs give the two sides apart.
    """
    if isinstance(padding, str):
        if padding == "valid":
            return ((0, 0),) * n
        if padding != "same":
            hint = f"; write {padding.lower()!r}" if padding.lower() in ("same", "valid") else ""
            raise ConvError(f"padding must be 'same', 'valid', an int, {n} ints or {n} pairs, got {padding!r}{hint}")
        if any(s != 1 for s in stride):
            raise ConvError(f"padding='same' needs stride 1, got stride {tuple(stride)}; give the padding as numbers")
        totals = [d * (k - 1) for k, d in zip(window, dilation, strict=True)]
        return tuple((total // 2, total - total // 2) for total in totals)
    if isinstance(padding, Sequence) and len(padding) > 0 and all(_is_pair(p) for p in padding):
        if len(padding) != n:
            raise ConvError(f"padding must have {n} (low, high) pairs, got {len(padding)}: {tuple(padding)}")
        sides = [per_axis(f"padding[{i}]", pair, 2, 0) for i, pair in enumerate(padding)]
        return tuple((low, high) for low, high in sides)
    return tuple((p, p) for p in per_axis("padding", padding, n, 0))


def check_dtypes(input: Any, **others: Any) -> None:
    """Every operand that is given has the input's dtype, as PyTorch demands, and that is not bool."""
    if input.dtype == bool:
        raise ConvTypeError("input must hold numbers, got bool; cast it with .astype()")
    for name, other in others.items():
        if other is not None and other.dtype != input.dtype:
            raise ConvTypeError(
                f"{name} needs the input's dtype {input.dtype}, got {other.dtype}; cast one of them with .astype()"
            )


def _is_pair(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 2
