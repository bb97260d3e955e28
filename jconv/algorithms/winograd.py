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

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jconv.algorithms.base import (
    Accuracy,
    Cost,
    channel_last,
    from_channel_last,
    from_gradient,
    gradient_operands,
    operand_bytes,
    over_rows,
    refuse_unsized,
    strided,
    summed,
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
        stored = components * (rows * (features + out) + kernel) * problem.dtype.itemsize
        efficiency = 740 if problem.is_weight_gradient else 950
        half = 44 if problem.is_weight_gradient else 28
        for width in (features, out):
            efficiency = efficiency * width**2 // (width**2 + half**2)
        flops = 2 * components * rows * features * out * other
        moved = operand_bytes(problem) + (7 * stored + 6 * components * kernel * problem.dtype.itemsize) // 4
        if other > 1 and not problem.is_weight_gradient:  # products of the other axis's taps are written and added up
            moved += 3 * other * components * rows * out * problem.dtype.itemsize
            efficiency = efficiency * 3 // 4
        return Cost(flops, moved, stored, efficiency * rows // (rows + 32) + 1, kernels=7 + 2 * other)

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
    others = [i for i in range(problem.spatial_rank) if i not in axes]
    products = []
    for number, tap in enumerate(np.ndindex(*(problem.window[i] for i in others))):
        start = [t * problem.rhs_dilation[i] for t, i in zip(tap, others, strict=True)]
        sizes, strides = ([of[i] for i in others] for of in (positions, problem.strides))
        part = strided(data, [len(axes) + 1 + i for i in others], start, sizes, strides)
        components, shape = part.shape[: len(axes)], part.shape[len(axes) : -1]
        part = part.reshape(prod(components), -1, part.shape[-1])
        contracted = ((2,), (2 if turned else 1,))
        product = lax.dot_general(part, kernel[:, number], (contracted, ((0,), (0,))), precision=problem.precision)
        products.append(product.reshape(*components, *shape, problem.rhs_shape[0]))
    out = summed(products, chains=1)
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
