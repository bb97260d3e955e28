"""im2col + GEMM: the window becomes columns, and a convolution one matrix product."""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jconv.adjoint import split_axis
from jconv.algorithms.base import Cost, inverse, operand_bytes, pad_and_dilate, refuse_unsized
from jconv.device import Device
from jconv.problem import ConvProblem

_MOST_SLICES = 256


@dataclass(frozen=True)
class Im2col:
    """Slices of the input side by side, then one product; or, where the window is larger than the
    output (a kernel gradient), one product for each output position and no columns at all.

    With one input feature a group (depthwise) a product of matrices would be one of vectors: each slice
    is multiplied and added as it is read, and nothing is laid side by side."""

    name: str = "im2col"

    def why_not(self, problem: ConvProblem) -> str | None:
        refusal = refuse_unsized(problem)
        if refusal is None and _slices(problem) > _MOST_SLICES:
            return f"needs at most {_MOST_SLICES} slices of lhs, got {_slices(problem)}"
        return refusal

    def cost(self, problem: ConvProblem, device: Device) -> Cost:
        if _elementwise(problem):
            efficiency = 110 if problem.is_weight_gradient else 300
            return Cost(2 * problem.macs, operand_bytes(problem), 0, efficiency)
        depth, width = prod(problem.rhs_shape[1:]), problem.rhs_shape[0] // problem.groups
        if problem.is_weight_gradient:
            height = problem.lhs_shape[0] // problem.batch_groups
            columns = depth * problem.lhs_shape[0] * problem.feature_groups
            moved = columns * _slices(problem)
            peak = 900 if _slices(problem) == 1 else 600
            efficiency = peak * min(height, 16) // 16 * min(width, 64) // 64 * min(depth, 128) // 128 + 1
        else:
            columns = prod(problem.output_shape[2:]) * problem.output_shape[0] * depth * problem.groups
            moved = 2 * columns
            # XLA:CPU fuses the slices into a narrow product and then reads them again for each element.
            efficiency = (850 if width >= 8 else 10) * min(depth, 100) // 100 + 1
            if problem.groups > 1:
                efficiency = max(5, min(700, 18 * problem.rhs_shape[1] - 62))
        size = problem.dtype.itemsize
        return Cost(2 * problem.macs, operand_bytes(problem) + moved * size, columns * size, efficiency)

    def run(self, problem: ConvProblem, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        if problem.is_weight_gradient:
            return _by_position(problem, lhs, rhs)
        return _by_column(problem, lhs, rhs)


def _slices(problem: ConvProblem) -> int:
    return min(prod(problem.window), prod(problem.output_shape[2:]))


def _by_column(problem: ConvProblem, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    """columns[m, tap, group, c] . rhs[tap, c, group, o] -> [group, m, o], with m over batch and positions."""
    n, groups = problem.spatial_rank, problem.groups
    spatial = tuple(range(1, n + 1))
    lhs_spec, rhs_spec, out_spec = problem.layout
    x = lhs.transpose(lhs_spec[0], *lhs_spec[2:], lhs_spec[1])
    w = rhs.transpose(*rhs_spec[2:], rhs_spec[1], rhs_spec[0])
    x = pad_and_dilate(problem, x, spatial)
    if problem.batch_groups > 1:
        x = x.reshape(groups, x.shape[0] // groups, *x.shape[1:])
        x = jnp.moveaxis(x, 0, -2)
        x = x.reshape(*x.shape[:-2], groups * x.shape[-1])
    batch, positions = problem.output_shape[0], problem.output_shape[2:]
    reach = tuple((o - 1) * s + 1 for o, s in zip(positions, problem.strides, strict=True))
    strides = (1, *problem.strides, 1)
    taps = []
    for tap in np.ndindex(*problem.window):
        start = tuple(t * d for t, d in zip(tap, problem.rhs_dilation, strict=True))
        stop = tuple(a + r for a, r in zip(start, reach, strict=True))
        taps.append(lax.slice(x, (0, *start, 0), (batch, *stop, x.shape[-1]), strides))
    options = {"precision": problem.precision, "preferred_element_type": problem.preferred_element_type}
    if _elementwise(problem):
        wide = _accumulator(problem)
        kernel = w.reshape(len(taps), *(1,) * (n + 1), groups, -1).astype(wide)
        terms = [tap[..., None].astype(wide) * k for tap, k in zip(taps, kernel, strict=True)]
        y = (
            functools.reduce(operator.add, terms)
            .astype(problem.out_dtype)
            .reshape(batch, *positions, problem.rhs_shape[0])
        )
    elif groups == 1:
        columns = lax.concatenate(taps, n + 1)
        y = lax.dot_general(columns, w.reshape(-1, w.shape[-1]), (((n + 1,), (0,)), ((), ())), **options)
    else:
        rows, depth, width = batch * prod(positions), w.shape[-2], w.shape[-1] // groups
        columns = jnp.stack([tap.reshape(rows, groups, depth) for tap in taps], axis=1)
        kernel = w.reshape(len(taps), depth, groups, width)
        y = lax.dot_general(columns, kernel, (((1, 3), (0, 1)), ((2,), (2,))), **options)
        y = y.transpose(1, 0, 2).reshape(batch, *positions, groups * width)
    return _from_channel_last(y, out_spec)


def _by_position(problem: ConvProblem, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    """For each output position, [batch, group, features, window] . [group, out, features, window], in place:
    the products contract the operands' own axes, so that nothing is transposed."""
    groups = problem.groups
    batch_axis, feature_axis, *spatial = problem.layout.lhs_spec
    out_axis, in_axis, *window = problem.layout.rhs_spec
    x = pad_and_dilate(problem, lhs, tuple(spatial))
    grouped_axis = batch_axis if problem.batch_groups > 1 else feature_axis
    reach = tuple((k - 1) * d + 1 for k, d in zip(problem.window, problem.rhs_dilation, strict=True))
    w = split_axis(rhs, out_axis, groups) if groups > 1 else rhs
    options = {"precision": problem.precision, "preferred_element_type": problem.preferred_element_type}
    products = []
    for position in np.ndindex(*problem.output_shape[2:]):
        start, stop, step = [0] * x.ndim, list(x.shape), [1] * x.ndim
        for i, axis in enumerate(spatial):
            start[axis] = position[i] * problem.strides[i]
            stop[axis] = start[axis] + reach[i]
            step[axis] = problem.rhs_dilation[i]
        part = lax.slice(x, start, stop, step)
        if _elementwise(problem):
            products.append(_summed_product(problem, part, rhs))
            continue
        if groups == 1:
            axes = ((feature_axis, *spatial), (in_axis, *window))
            products.append(lax.dot_general(part, w, (axes, ((), ())), **options))
            continue
        part = split_axis(part, grouped_axis, groups)
        x_contract = tuple(_moved(a, grouped_axis) for a in (feature_axis, *spatial))
        w_contract = tuple(_moved(a, out_axis) for a in (in_axis, *window))
        product = lax.dot_general(part, w, ((x_contract, w_contract), ((grouped_axis,), (out_axis,))), **options)
        product = product.transpose(1, 0, 2)
        products.append(product.reshape(product.shape[0], -1))
    y = jnp.stack(products, axis=1).reshape(problem.output_shape[0], *problem.output_shape[2:], -1)
    return _from_channel_last(y, problem.layout.out_spec)


def _elementwise(problem: ConvProblem) -> bool:
    """Depthwise: forward and input gradient with one feature a group, kernel gradient with one of each."""
    if problem.is_weight_gradient:
        return problem.batch_groups > 1 and problem.output_shape[0] == 1 and problem.rhs_shape[0] == problem.groups
    return problem.is_depthwise


def _summed_product(problem: ConvProblem, part: jax.Array, rhs: jax.Array) -> jax.Array:
    """sum over features and window of part[group, ...] rhs[group, ...], as (1, groups)."""
    lhs_spec, rhs_spec, _ = problem.layout
    wide = _accumulator(problem)
    order = tuple(rhs_spec[lhs_spec.index(axis)] for axis in range(rhs.ndim))
    product = part.astype(wide) * rhs.transpose(order).astype(wide)
    total = product.sum(axis=tuple(axis for axis in range(rhs.ndim) if axis != lhs_spec[0]))
    return total.astype(problem.out_dtype)[None]


def _accumulator(problem: ConvProblem) -> np.dtype:
    """Where sums are written out, 16-bit floats are summed in 32 bits, as a product of matrices does."""
    narrow = jnp.issubdtype(problem.dtype, jnp.floating) and problem.out_dtype.itemsize == 2
    return np.dtype(np.float32) if narrow else problem.out_dtype


def _moved(axis: int, split: int) -> int:
    """Where ``axis`` stands once axis ``split`` has become two; of those, the inner one."""
    return axis if axis < split else axis + 1


def _from_channel_last(y: jax.Array, out_spec: Sequence[int]) -> jax.Array:
    logical = (0, y.ndim - 1, *range(1, y.ndim - 1))
    return y.transpose(tuple(logical[i] for i in inverse(out_spec)))
