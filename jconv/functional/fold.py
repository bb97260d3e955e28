"""``unfold`` and its adjoint ``fold``, as in ``torch.nn.functional``: slices and sums, no multiplication."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jconv.convolve import as_operand
from jconv.errors import ConvError
from jconv.functional.arguments import per_axis


def unfold(input: Any, kernel_size: Any, dilation: Any = 1, padding: Any = 0, stride: Any = 1) -> jax.Array:
    """:func:`torch.nn.functional.unfold` (im2col): the windows of an image as columns.

    Args:
        input: (N, C, H, W), or (C, H, W) without a batch, of any dtype.
        kernel_size, dilation, padding, stride: an int or a pair; the window and where it stands.

    Returns:
        (N, C * kH * kW, L), with L the number of window positions, row by row.

    Raises:
        ConvError: for a rank, a geometry or a value that torch refuses.

    >>> unfold(jnp.ones((1, 3, 5, 6)), (2, 3)).shape
    (1, 18, 16)
    """
    x = as_operand("input", input)
    if x.ndim not in (3, 4):
        raise ConvError(f"input must be (N, C, H, W) or (C, H, W), got shape {x.shape}")
    if x.ndim == 3:
        return lax.squeeze(unfold(lax.expand_dims(x, (0,)), kernel_size, dilation, padding, stride), (0,))
    if 0 in x.shape[1:]:
        raise ConvError(f"input may have an empty batch and nothing else that is empty, got shape {x.shape}")
    grid = _Grid(x.shape[2:], kernel_size, dilation, padding, stride)
    (ph, pw), (lh, lw) = grid.padding, grid.positions
    x = jnp.pad(x, ((0, 0), (0, 0), (ph, ph), (pw, pw)))
    taps = []
    for i, j in grid.taps():
        stop = (i + (lh - 1) * grid.stride[0] + 1, j + (lw - 1) * grid.stride[1] + 1)
        taps.append(lax.slice(x, (0, 0, i, j), (*x.shape[:2], *stop), (1, 1, *grid.stride)))
    return jnp.stack(taps, axis=2).reshape(x.shape[0], x.shape[1] * len(taps), lh * lw)


def fold(
    input: Any, output_size: Any, kernel_size: Any, dilation: Any = 1, padding: Any = 0, stride: Any = 1
) -> jax.Array:
    """:func:`torch.nn.functional.fold` (col2im): columns summed back into an image.

    Args:
        input: (N, C * kH * kW, L), or without the batch, of any dtype.
        output_size: an int or a pair; the image.
        kernel_size, dilation, padding, stride: an int or a pair; as in the :func:`unfold` that it transposes.

    Returns:
        (N, C, *output_size).

    Raises:
        ConvError: where the columns do not fit the geometry.

    >>> fold(jnp.ones((1, 18, 16)), (5, 6), (2, 3)).shape
    (1, 3, 5, 6)
    """
    x = as_operand("input", input)
    if x.ndim not in (2, 3):
        raise ConvError(f"input must be (N, C * kH * kW, L) or without N, got shape {x.shape}")
    if x.ndim == 2:
        return lax.squeeze(fold(lax.expand_dims(x, (0,)), output_size, kernel_size, dilation, padding, stride), (0,))
    size = per_axis("output_size", output_size, 2, 1, single=False)
    grid = _Grid(size, kernel_size, dilation, padding, stride)
    (kh, kw), (lh, lw) = grid.kernel_size, grid.positions
    batch, columns, length = x.shape
    if columns % (kh * kw) != 0:
        raise ConvError(
            f"input has {columns} rows in each column, which kernel_size {(kh, kw)} ({kh * kw}) does not divide"
        )
    if length != lh * lw:
        raise ConvError(
            f"input has {length} columns, but output_size {size} has {lh} x {lw} = {lh * lw} window positions"
        )
    x = x.reshape(batch, columns // (kh * kw), kh * kw, lh, lw)
    padded = tuple(s + 2 * p for s, p in zip(size, grid.padding, strict=True))
    zero = jnp.zeros((), x.dtype)
    out = jnp.zeros((batch, x.shape[1], *padded), x.dtype)
    for tap, (i, j) in enumerate(grid.taps()):
        edges = [(0, 0, 0), (0, 0, 0)]
        for start, count, s, total in zip((i, j), (lh, lw), grid.stride, padded, strict=True):
            edges.append((start, total - start - (count - 1) * s - 1, s - 1))
        out = out + lax.pad(x[:, :, tap], zero, edges)
    ph, pw = grid.padding
    return out[:, :, ph : ph + size[0], pw : pw + size[1]]


class _Grid:
    """Where a window stands on an image."""

    def __init__(self, size: Any, kernel_size: Any, dilation: Any, padding: Any, stride: Any):
        self.kernel_size = per_axis("kernel_size", kernel_size, 2, 1, single=False)
        self.dilation = per_axis("dilation", dilation, 2, 1, single=False)
        self.padding = per_axis("padding", padding, 2, 0, single=False)
        self.stride = per_axis("stride", stride, 2, 1, single=False)
        self.positions = tuple(
            (s + 2 * p - d * (k - 1) - 1) // t + 1
            for s, k, d, p, t in zip(size, self.kernel_size, self.dilation, self.padding, self.stride, strict=True)
        )
        if min(self.positions) < 1:
            raise ConvError(
                f"kernel_size {self.kernel_size} with dilation {self.dilation} is larger than the image of {tuple(size)} "
                f"with padding {self.padding}: no window fits; pad more"
            )

    def taps(self) -> Iterator[tuple[int, int]]:
        """The first row and column that each tap of the window reads."""
        for i, j in np.ndindex(*self.kernel_size):
            yield i * self.dilation[0], j * self.dilation[1]
