"""im2col + GEMM: the window becomes columns, and a convolution one matrix product."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jconv.adjoint import split_axis
from jconv.algorithms.base import (
    Accuracy,
    Cost,
    channel_last,
    from_channel_last,
    from_gradient,
    gradient_operands,
    operand_bytes,
    options,
    over_rows,
    pad_and_dilate,
    refuse_unsized,
    shifted,
    shifts,
    strided,
    taps,
)  # fmt: skip
from jconv.device import Device
from jconv.problem import ConvProblem, is_static

_MOST_SLICES = 256
_NARROW = 8  # features below which rows of them are too short to copy one by one
_WIDE = 32


@dataclass(frozen=True)
class Im2col:
    """Slices of the input side by side, then one product. In a kernel gradient that shifts the cotangent (``base.shifts``) a NaN
    or an infinity of the input reaches the taps beside those that read it."""

    name: str = "im2col"
    accuracy: Accuracy = "direct"

    def why_not(self, problem: ConvProblem) -> str | None:
        refusal = refuse_unsized(problem)
        if refusal is None and problem.is_weight_gradient and not is_static(problem.lhs_shape[0]):
            return "needs the features of a kernel gradient's input to be a number, not a symbol"
        if refusal is None and _slices(problem) > _MOST_SLICES:
            return f"needs at most {_MOST_SLICES} slices of lhs, got {_slices(problem)}"
        return refusal

    def cost(self, problem: ConvProblem, device: Device) -> Cost:
        size, slices, flops = problem.dtype.itemsize, _slices(problem), 2 * problem.macs
        if problem.is_weight_gradient:
            fold, places = _shifts(problem)
            own = (1, *problem.window)[-1]
            rows = prod(problem.rhs_shape[1:]) // own * places
            flops = flops // own * places
            narrow, width = problem.lhs_shape[0] // problem.batch_groups, problem.rhs_shape[0] // problem.groups
            height, width, depth = narrow * slices // fold, width * fold, rows
            columns = rows * problem.batch_groups * (height + (width if fold > 1 else 0))
        else:
            rows = problem.output_shape[0] * prod(problem.output_shape[2:])
            depth, width, height = prod(problem.rhs_shape[1:]), problem.rhs_shape[0] // problem.groups, rows
            columns = rows * depth * problem.groups
        peak = 850 if problem.is_weight_gradient else 1000
        efficiency = peak * width // (width + 16) * height // (height + 16)
        # XLA transposes the operands of a product of groups, which is cheap in a cache: of one position, parts are.
        reread = operand_bytes(problem) if problem.is_weight_gradient and problem.groups > 1 and slices == 1 else 0
        if not 0 < reread <= device.near:
            efficiency = efficiency * depth // (depth + 64) + 1
            if problem.groups > 1:
                efficiency = efficiency // (2 if width >= _WIDE else 5) + 1
        features = max(1, problem.lhs_shape[0 if problem.is_weight_gradient else 1] // problem.groups)
        by_rows = features >= _NARROW or not problem.is_weight_gradient
        # Short rows, and single features, are copied slowly.
        copied = columns * (max(1, _WIDE // features) if by_rows else 2)
        moved = operand_bytes(problem) + 2 * copied * size
        # XLA writes the slices one by one before it lays them side by side.
        held = columns * size * (2 if slices > 1 else 1)
        if not problem.is_weight_gradient and problem.layout.rhs_spec[0] < problem.layout.rhs_spec[1]:
            held += prod(problem.rhs_shape) * size  # transposed
        return Cost(flops, moved, held, efficiency, kernels=3, reread=reread, copied=not problem.is_weight_gradient)

    def run(self, problem: ConvProblem, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        if not problem.is_weight_gradient:
            return _by_column(problem, *channel_last(problem, lhs, rhs))
        if problem.groups > 1:
            return _by_position(problem, lhs, rhs)
        return _kernel_gradient(problem, *gradient_operands(problem, lhs, rhs))


def _slices(problem: ConvProblem) -> int:
    return min(prod(problem.window), prod(problem.output_shape[2:]))


def _by_column(problem: ConvProblem, x: jax.Array, w: jax.Array) -> jax.Array:
    """columns[m, tap, group, c] . rhs[tap, c, group, o] -> [group, m, o], with m over batch and positions."""
    n, groups = problem.spatial_rank, problem.groups
    spatial = tuple(range(1, n + 1))
    x = pad_and_dilate(problem, x, spatial)
    if problem.batch_groups > 1:
        x = jnp.moveaxis(split_axis(x, 0, groups), 0, -2)
        x = x.reshape(*x.shape[:-2], groups * x.shape[-1])
    batch, positions = problem.output_shape[0], problem.output_shape[2:]
    slices = [strided(x, spatial, start, positions, problem.strides) for _, start in sorted(taps(problem))]
    if groups == 1:
        columns = lax.concatenate(slices, n + 1)
        y = lax.dot_general(columns, w.reshape(-1, w.shape[-1]), (((n + 1,), (0,)), ((), ())), **options(problem))
    else:
        rows, depth, width = batch * prod(positions), w.shape[-2], w.shape[-1] // groups
        columns = jnp.stack([tap.reshape(rows, groups, depth) for tap in slices], axis=1)
        kernel = w.reshape(len(slices), depth, groups, width)
        y = lax.dot_general(columns, kernel, (((1, 3), (0, 1)), ((2,), (2,))), **options(problem))
        y = y.transpose(1, 0, 2).reshape(batch, *positions, groups * width)
    return from_channel_last(problem, y)


def _shifts(problem: ConvProblem) -> tuple[int, int]:
    """As :func:`shifts`; none where the columns are rows of single features, or groups that are not laid out."""
    if problem.groups > 1 or problem.lhs_shape[0] < _NARROW:
        return 1, (1, *problem.window)[-1]
    return shifts(problem)


def _kernel_gradient(problem: ConvProblem, x: jax.Array, g: jax.Array) -> jax.Array:
    """columns[m, tap, c] . g[m, o], with m over batch and positions; or, with the cotangent shifted by the taps of the last
    axis, columns[m, tap of the others, c] . g[m, last tap, o]."""
    spatial = tuple(range(1, problem.spatial_rank + 1))
    result, sizes = list(problem.output_shape[2:]), list(problem.window)
    fold, places = _shifts(problem)
    if fold > 1:
        g = shifted(g, fold, problem.strides[-1])
        sizes[-1], result[-1] = places, 1
    x = pad_and_dilate(problem, x, spatial)
    starts = [tuple(t * s for t, s in zip(tap, problem.strides, strict=True)) for tap in np.ndindex(*result)]
    features = x.shape[-1]
    if features < _NARROW:
        x = jnp.moveaxis(x, -1, 0)
        slices = [strided(x, [a + 1 for a in spatial], s, sizes, problem.rhs_dilation) for s in starts]
        columns = lax.concatenate(slices, 0).reshape(len(starts) * features, -1)
        out = lax.dot(columns, g.reshape(-1, g.shape[-1]), **options(problem))
    else:
        slices = [strided(x, spatial, s, sizes, problem.rhs_dilation) for s in starts]
        columns = lax.concatenate(slices, x.ndim - 1).reshape(-1, len(starts) * features)
        out = over_rows(problem, columns, g.reshape(columns.shape[0], -1))
    out = jnp.moveaxis(out.reshape(*result[:-1], features, fold, -1), -2, -3) if fold > 1 else out
    return from_gradient(problem, out.reshape(*problem.output_shape[2:], features, -1))


def _by_position(problem: ConvProblem, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    """For each output position, [batch, group, features, window] . [group, out, features, window], in place:
    the products contract the operands' own axes, so that nothing is transposed."""
    groups = problem.groups
    batch_axis, feature_axis, *spatial = problem.layout.lhs_spec
    out_axis, in_axis, *window = problem.layout.rhs_spec
    if problem.reversed:
        rhs = lax.rev(rhs, window)
    x = pad_and_dilate(problem, lhs, tuple(spatial))
    grouped_axis = batch_axis if problem.batch_groups > 1 else feature_axis
    w = split_axis(rhs, out_axis, groups)
    products = []
    for position in np.ndindex(*problem.output_shape[2:]):
        start = [i * s for i, s in zip(position, problem.strides, strict=True)]
        part = split_axis(strided(x, spatial, start, problem.window, problem.rhs_dilation), grouped_axis, groups)
        x_contract = tuple(_moved(a, grouped_axis) for a in (feature_axis, *spatial))
        w_contract = tuple(_moved(a, out_axis) for a in (in_axis, *window))
        axes = ((x_contract, w_contract), ((grouped_axis,), (out_axis,)))
        product = lax.dot_general(part, w, axes, **options(problem)).transpose(1, 0, 2)
        products.append(product.reshape(product.shape[0], -1))
    y = jnp.stack(products, axis=1).reshape(problem.output_shape[0], *problem.output_shape[2:], -1)
    return from_channel_last(problem, y)


def _moved(axis: int, split: int) -> int:
    """Where ``axis`` stands once axis ``split`` has become two; of those, the inner one."""
    return axis if axis < split else axis + 1
