"""Winograd's minimal filtering: fewer multiplications for a window of three, by transforms of additions.

F(m, 3) gives m neighbouring outputs of a window of 3 from m + 2 inputs with m + 2 multiplications instead
of 3 m. With one matrix a transform, along one axis,

    forward             y = A^T [ (G w) * (B^T x) ]
    kernel gradient     w' = G^T [ (A g) * (B^T x) ]      (the same bilinear map, transposed)

and along two axes each transform is applied twice. Over many features the product * becomes one matrix
product for each of the (m + 2)^axes components: over the input features forward, over the tiles for the kernel
gradient. An axis with another window is summed tap by tap around the product.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jconv.algorithms.base import (
    Accuracy,
    Cost,
    channel_last,
    collides,
    from_channel_last,
    from_gradient,
    gradient_operands,
    operand_bytes,
    over_rows,
    refuse_unsized,
    strided,
    unfused,
)  # fmt: skip
from jconv.device import Device
from jconv.problem import ConvProblem

Matrix = tuple[tuple[float, ...], ...]

# B^T, G and A^T, for the points 0, 1, -1 (2, -2) and infinity.
_F2 = (
    ((1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, 1, 0, -1)),
    ((1, 0, 0), (1 / 2, 1 / 2, 1 / 2), (1 / 2, -1 / 2, 1 / 2), (0, 0, 1)),
    ((1, 1, 1, 0), (0, 1, -1, -1)),
)
_F4 = (
    (
        (4, 0, -5, 0, 1, 0),
        (0, -4, -4, 1, 1, 0),
        (0, 4, -4, -1, 1, 0),
        (0, -2, -1, 2, 1, 0),
        (0, 2, -1, -2, 1, 0),
        (0, 4, 0, -5, 0, 1),
    ),
    (
        (1 / 4, 0, 0),
        (-1 / 6, -1 / 6, -1 / 6),
        (-1 / 6, 1 / 6, -1 / 6),
        (1 / 24, 1 / 12, 1 / 6),
        (1 / 24, -1 / 12, 1 / 6),
        (0, 0, 1),
    ),
    ((1, 1, 1, 1, 1, 0), (0, 1, -1, 2, -2, 0), (0, 1, 1, 4, 4, 0), (0, 1, -1, 8, -8, 1)),
)
_MATRICES: dict[int, tuple[Matrix, Matrix, Matrix]] = {2: _F2, 4: _F4}


@dataclass(frozen=True)
class Winograd:
    """F(tile, 3) along the last two axes whose window is 3, unstrided and without holes."""

    name: str = "winograd"
    tile: int = 2
    accuracy: Accuracy = "bounded"

    def why_not(self, problem: ConvProblem) -> str | None:
        if problem.groups > 1:
            return f"needs one group, got {problem.groups}"
        if not (jnp.issubdtype(problem.dtype, jnp.inexact) and problem.dtype.itemsize >= 4):
            return f"needs floats of 32 bits or more, got {problem.dtype}"
        if problem.preferred_element_type is not None:
            return f"needs results in the operands' dtype, got preferred_element_type {problem.preferred_element_type}"
        if any(d > 1 for d in problem.lhs_dilation):
            return f"needs an input without holes, got lhs_dilation {problem.lhs_dilation}"
        refusal = refuse_unsized(problem)
        if refusal is None and not _axes(problem):
            return f"needs an axis with window 3, stride 1 and dilation 1, got {_axes_seen(problem)}"
        return refusal

    def cost(self, problem: ConvProblem, device: Device) -> Cost:
        tiles = [_tiles(n, self.tile) if i in _axes(problem) else n for i, n in enumerate(_positions(problem))]
        images, features = problem.lhs_shape[0], problem.lhs_shape[1]
        if problem.is_weight_gradient:
            images, features = features, images
        components = (self.tile + 2) ** len(_axes(problem))
        rows, out, other = images * prod(tiles), problem.rhs_shape[0], _other_taps(problem)
        kernel = features * out * other  # transformed, or the products of a kernel gradient
        transformed = components * rows * (features + out) * problem.dtype.itemsize
        stored = transformed + components * kernel * problem.dtype.itemsize
        efficiency = 740 if problem.is_weight_gradient else 950
        half = 44 if problem.is_weight_gradient else 28
        for width in (features, out):
            efficiency = efficiency * width**2 // (width**2 + half**2)
        flops = 2 * components * rows * features * out * other
        moved = operand_bytes(problem) + (7 * stored + 6 * components * kernel * problem.dtype.itemsize) // 4
        if other > 1 and not problem.is_weight_gradient:  # products of the other axis's taps are written and added up
            moved += 3 * other * components * rows * out * problem.dtype.itemsize
            efficiency = efficiency * 3 // 4
        held = stored
        if problem.is_weight_gradient and other > 1:  # slices for all those taps at once
            held += components * rows * other * features * problem.dtype.itemsize
        elif problem.is_weight_gradient and collides(problem, min(features, out)):  # which is copied
            held += components * rows * min(features, out) * problem.dtype.itemsize // 2
        elif other > 1:  # one slice and one product at a time
            held += transformed + components * kernel * problem.dtype.itemsize // 2
        return Cost(flops, moved, held, efficiency * rows // (rows + 32) + 1, kernels=7 + 2 * other)

    def run(self, problem: ConvProblem, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        if problem.is_weight_gradient:
            return _kernel_gradient(problem, self.tile, *gradient_operands(problem, lhs, rhs))
        return _forward(problem, self.tile, *channel_last(problem, lhs, rhs))


def _forward(problem: ConvProblem, tile: int, x: jax.Array, w: jax.Array) -> jax.Array:
    # A kernel that lies (out, in), as HWIO's does in an input gradient, is transformed so: sums that read it transposed
    # are scalar.
    turned = problem.layout.rhs_spec[0] < problem.layout.rhs_spec[1]
    w = jnp.swapaxes(w, -1, -2) if turned else w
    transform, kernel_transform, inverse = _MATRICES[tile]
    axes, positions = _axes(problem), problem.output_shape[2:]
    data = _transformed_input(problem, x, tile, positions)
    kernel = lax.rev(w, range(problem.spatial_rank)) if problem.reversed else w
    for axis in axes:
        kernel = _combined(
            kernel_transform, [lax.index_in_dim(kernel, i, axis + kernel.ndim - w.ndim) for i in range(3)]
        )
    kernel = kernel.reshape(len(transform) ** len(axes), -1, *w.shape[-2:])
    contracted, taps = ((2,), (2 if turned else 1,)), _other_taps(problem)

    def product(part: jax.Array, number: Any) -> jax.Array:
        of_tap = lax.dynamic_index_in_dim(kernel, number, 1, keepdims=False)
        rows = part.reshape(kernel.shape[0], -1, part.shape[-1])
        product = lax.dot_general(rows, of_tap, (contracted, ((0,), (0,))), precision=problem.precision)
        return product.reshape(*part.shape[:-1], problem.rhs_shape[0])

    out = product(_met(problem, data, 0), 0)
    if taps > 1:  # in a loop, or XLA would make the slices of all taps first
        met = functools.partial(unfused, functools.partial(_met, problem), data)
        out = lax.fori_loop(1, taps, lambda i, out: out + product(met(i), i), out)
    for axis in reversed(axes):
        at = axis + len(out.shape) - x.ndim  # the tile axis, once the leading component axis is gone
        out = _combined(inverse, list(out), at + 1)
        out = out.reshape(*out.shape[:at], out.shape[at] * tile, *out.shape[at + 2 :])
    for axis in axes:
        out = lax.slice_in_dim(out, 0, positions[axis], axis=axis + 1)
    return from_channel_last(problem, out)


def _kernel_gradient(problem: ConvProblem, tile: int, x: jax.Array, g: jax.Array) -> jax.Array:
    transform, kernel_transform, inverse = _MATRICES[tile]
    axes, positions = _axes(problem), problem.window
    data = _transformed_input(problem, x, tile, positions)
    cotangent = g
    for axis in axes:
        at, tiles = axis + 1 + cotangent.ndim - g.ndim, _tiles(positions[axis], tile)
        cotangent = lax.pad(
            cotangent, jnp.zeros((), g.dtype), _padding(cotangent.ndim, at, 0, tiles * tile - positions[axis])
        )
        parts = [strided(cotangent, [at], [i], [tiles], [tile]) for i in range(tile)]
        cotangent = _combined(tuple(zip(*inverse, strict=True)), parts)
    cotangent = cotangent.reshape(len(transform) ** len(axes), -1, g.shape[-1])
    others = [i for i in range(problem.spatial_rank) if i not in axes]
    windows = [problem.output_shape[2 + i] for i in others]
    products = []
    for tap in np.ndindex(*windows):
        start = [t * problem.strides[i] for t, i in zip(tap, others, strict=True)]
        sizes, strides = ([of[i] for i in others] for of in (positions, problem.rhs_dilation))
        part = strided(data, [len(axes) + 1 + i for i in others], start, sizes, strides)
        part = part.reshape(cotangent.shape[0], -1, x.shape[-1])
        products.append(over_rows(problem, part, cotangent))
    out = jnp.stack(products, axis=1)
    out = out.reshape(*[len(transform)] * len(axes), *windows, *out.shape[-2:])
    for remaining in reversed(range(len(axes))):
        out = _combined(tuple(zip(*kernel_transform, strict=True)), list(out), remaining)
    order = np.argsort([*axes, *others])
    out = out.transpose(*order, out.ndim - 2, out.ndim - 1)
    return from_gradient(problem, out)


def _met(problem: ConvProblem, data: jax.Array, tap: Any) -> jax.Array:
    """What a tap of the other axes meets of the transformed input; the taps are counted."""
    axes = _axes(problem)
    for i in reversed([i for i in range(problem.spatial_rank) if i not in axes]):
        axis, step, size = len(axes) + 1 + i, problem.strides[i], problem.output_shape[2 + i]
        start, reach = tap % problem.window[i] * problem.rhs_dilation[i], (size - 1) * step + 1
        data = strided(lax.dynamic_slice_in_dim(data, start, reach, axis), [axis], [0], [size], [step])
        tap = tap // problem.window[i]
    return data


def _transformed_input(problem: ConvProblem, x: jax.Array, tile: int, positions: Sequence[int]) -> jax.Array:
    """B^T of the windows of x, one component after the other on a new leading axis for each transformed axis."""
    axes, config = _axes(problem), [(0, 0, 0)] * x.ndim
    for i, (low, high) in enumerate(problem.padding):
        if i in axes:
            high = tile * _tiles(positions[i], tile) + 2 - problem.lhs_shape[2 + i] - low
        config[1 + i] = (low, high, 0)
    data = lax.pad(x, jnp.zeros((), x.dtype), config)
    for axis in axes:
        at = axis + 1 + data.ndim - x.ndim
        parts = [strided(data, [at], [i], [_tiles(positions[axis], tile)], [tile]) for i in range(tile + 2)]
        data = _combined(_MATRICES[tile][0], parts)
    return data


def _combined(matrix: Matrix, parts: Sequence[jax.Array], axis: int = 0) -> jax.Array:
    """The rows of ``matrix`` times ``parts``, stacked on a new ``axis``; written out, since it is mostly 0 and 1."""
    rows = []
    for row in matrix:
        total = None
        for factor, part in zip(row, parts, strict=True):
            if factor == 0:
                continue
            term = part if abs(factor) == 1 else part * jnp.asarray(abs(factor), part.dtype)
            total = (term if factor > 0 else -term) if total is None else total + term if factor > 0 else total - term
        rows.append(total)
    return jnp.stack(rows, axis)


def _positions(problem: ConvProblem) -> tuple[int, ...]:
    return problem.window if problem.is_weight_gradient else problem.output_shape[2:]


def _axes(problem: ConvProblem) -> tuple[int, ...]:
    """The last two axes whose window is three, with unit strides; of a kernel gradient the window is the result."""
    windows = problem.output_shape[2:] if problem.is_weight_gradient else problem.window
    able = [
        i
        for i, k in enumerate(windows)
        if k == 3 and problem.strides[i] == problem.rhs_dilation[i] == problem.lhs_dilation[i] == 1
    ]
    return tuple(able[-2:])


def _axes_seen(problem: ConvProblem) -> str:
    windows = problem.output_shape[2:] if problem.is_weight_gradient else problem.window
    return f"windows {windows}, strides {problem.strides}, dilation {problem.rhs_dilation}"


def _other_taps(problem: ConvProblem) -> int:
    windows = problem.output_shape[2:] if problem.is_weight_gradient else problem.window
    return prod(windows) // 3 ** len(_axes(problem))


def _tiles(size: int, tile: int) -> int:
    return -(-size // tile)


def _padding(ndim: int, axis: int, low: int, high: int) -> list[tuple[int, int, int]]:
    return [(low, high, 0) if i == axis else (0, 0, 0) for i in range(ndim)]
