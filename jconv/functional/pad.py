"""``pad``, as in ``torch.nn.functional``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jconv.convolve import as_operand
from jconv.errors import ConvError, ConvTypeError
from jconv.problem import integer, is_static

_ANY = -(2**62)


def pad(input: Any, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> jax.Array:
    """:func:`torch.nn.functional.pad`: ``pad`` counts from the last axis, (low, high) for each.

    Args:
        input: an array of any dtype. ``reflect``, ``replicate`` and ``circular`` pad the last one, two
            or three axes of an input with one or two axes more.
        pad: an even number of integers, ``(last_low, last_high, before_last_low, ...)``; negative ones crop.
        mode: ``"constant"``, ``"reflect"`` (without the edge), ``"replicate"`` (the edge) or ``"circular"``.
        value: what ``"constant"`` writes, 0 by default.

    Returns:
        The padded array, of the input's dtype.

    Raises:
        ConvError: for pads that the input is too small for, a mode that does not exist, or a value
            that the mode does not take.

    >>> pad(jnp.arange(4.0)[None], (2, 1), mode="reflect")[0].tolist()
    [2.0, 1.0, 0.0, 1.0, 2.0, 3.0, 2.0]
    """
    x = as_operand("input", input)
    if isinstance(pad, str) or not isinstance(pad, Sequence):
        raise ConvTypeError(f"pad must be a sequence of integers, got {pad!r}")
    numbers = [integer(f"pad[{i}]", p, _ANY) for i, p in enumerate(pad)]
    if len(numbers) % 2 != 0:
        raise ConvError(f"pad must have an even length, (low, high) for each axis, got {len(numbers)} entries")
    axes = len(numbers) // 2
    if axes > x.ndim:
        raise ConvError(f"pad names {axes} axes, but input has {x.ndim} (shape {x.shape})")
    pairs = {x.ndim - 1 - i: (numbers[2 * i], numbers[2 * i + 1]) for i in range(axes)}
    if mode == "constant":
        return _constant(x, pairs, 0 if value is None else value)
    if not isinstance(mode, str) or mode not in _MODES:
        raise ConvError(f"mode must be 'constant', 'reflect', 'replicate' or 'circular', got {mode!r}")
    if value is not None and value != 0:
        raise ConvError(f"mode {mode!r} takes no value, got {value!r}; leave it out or use mode='constant'")
    if axes not in (1, 2, 3) or x.ndim - axes not in (1, 2):
        raise ConvError(
            f"mode {mode!r} pads the last 1, 2 or 3 axes of an input with one or two axes more, "
            f"got {axes} padded axes of shape {x.shape}"
        )
    if mode != "circular" and 0 in x.shape[x.ndim - axes - 1 :]:
        raise ConvError(f"mode {mode!r} pads an input of which only the batch may be empty, got shape {x.shape}")
    if mode != "circular" and all(x.shape[axis] + low + high < 1 for axis, (low, high) in pairs.items()):
        raise ConvError(f"pad {tuple(numbers)} leaves nothing of the input, of shape {x.shape}; crop less")
    return pad_axes(x, pairs, mode)


def pad_axes(x: jax.Array, pairs: Mapping[int, tuple[int, int]], mode: str) -> jax.Array:
    """``x`` with (low, high) elements more along each axis of ``pairs``, whatever its layout.

    Args:
        mode: ``"reflect"``, ``"replicate"`` or ``"circular"``.
    """
    for axis, (low, high) in pairs.items():
        x = _MODES[mode](x, axis, low, high)
    return x


def _constant(x: jax.Array, pairs: dict[int, tuple[int, int]], value: Any) -> jax.Array:
    for axis, (low, high) in pairs.items():
        if x.shape[axis] + min(low, 0) + min(high, 0) < 0:
            raise ConvError(f"pad {(low, high)} crops more than axis {axis} has: {x.shape[axis]} elements")
    config = [(*pairs.get(axis, (0, 0)), 0) for axis in range(x.ndim)]
    try:
        fill = jnp.asarray(value, x.dtype).reshape(())
    except (TypeError, ValueError):
        raise ConvTypeError(f"value must be a number that {x.dtype} can hold, got {value!r}") from None
    return lax.pad(x, fill, config)


def _reflect(x: jax.Array, axis: int, low: int, high: int) -> jax.Array:
    size = x.shape[axis]
    if is_static(size) and max(low, high) >= size:
        raise ConvError(f"reflect padding {(low, high)} must be smaller than axis {axis} of the input: {size} elements")
    before = lax.rev(lax.slice_in_dim(x, 1, 1 + max(low, 0), axis=axis), (axis,))
    after = lax.rev(lax.slice_in_dim(x, size - 1 - max(high, 0), size - 1, axis=axis), (axis,))
    return _cropped(_join(before, x, after, axis), axis, low, high)


def _replicate(x: jax.Array, axis: int, low: int, high: int) -> jax.Array:
    size = x.shape[axis]
    if is_static(size) and size == 0:
        raise ConvError(f"replicate padding needs an edge to repeat, but axis {axis} of the input is empty")
    first, last = lax.slice_in_dim(x, 0, 1, axis=axis), lax.slice_in_dim(x, size - 1, size, axis=axis)
    before, after = jnp.repeat(first, max(low, 0), axis), jnp.repeat(last, max(high, 0), axis)
    return _cropped(_join(before, x, after, axis), axis, low, high)


def _circular(x: jax.Array, axis: int, low: int, high: int) -> jax.Array:
    """Negative entries crop first; what is left then wraps."""
    x = _cropped(x, axis, low, high)
    size = x.shape[axis]
    if is_static(size) and max(low, high) > size:
        raise ConvError(
            f"circular padding {(low, high)} would wrap axis {axis} of the input more than once: it has {size} elements"
        )
    before = lax.slice_in_dim(x, size - max(low, 0), size, axis=axis)
    after = lax.slice_in_dim(x, 0, max(high, 0), axis=axis)
    return _join(before, x, after, axis)


_MODES: dict[str, Callable[[jax.Array, int, int, int], jax.Array]] = {
    "reflect": _reflect,
    "replicate": _replicate,
    "circular": _circular,
}


def _cropped(x: jax.Array, axis: int, low: int, high: int) -> jax.Array:
    """``x`` without what the negative entries take."""
    start, stop = max(-low, 0), x.shape[axis] - max(-high, 0)
    if is_static(stop) and stop < start:
        raise ConvError(f"pad {(low, high)} crops more than axis {axis} of the input has")
    return x if low >= 0 and high >= 0 else lax.slice_in_dim(x, start, stop, axis=axis)


def _join(before: jax.Array, x: jax.Array, after: jax.Array, axis: int) -> jax.Array:
    parts = [part for part in (before, after) if part.shape[axis] == 0]
    return x if len(parts) == 2 else lax.concatenate([before, x, after], axis)
