"""Several input features a group: a loop over blocks of groups, each block one product of matrices.

A block is one group, or as many narrow ones as fill a vector, with zeros off the diagonal of its kernel (so that a NaN
or an infinity reaches the groups of its block). The slices of a block's input lie side by side, for all taps or,
without a stride, for all but those of the first axis: then one product gives the terms of every tap t of that axis, and
y[i] = sum over t of product[i + t d, t] adds them, shifted. In a kernel gradient the columns meet the cotangent, which is
shifted by the taps of the last axis where the forward direction has no stride along it and that takes fewer columns. Zeros
beside it meet places that those taps do not read: a NaN or an infinity of the input reaches them, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jconv.algorithms.base import (
    Accuracy,
    Cost,
    accumulator,
    assembled,
    by_phase,
    bytes_of_assembled,
    collides,
    from_channel_last,
    from_gradient,
    operand_bytes,
    pad_and_dilate,
    refuse_unsized,
    shifted,
    shifts,
    summed,
    unreversed,
)
from jconv.device import Device
from jconv.problem import ConvProblem, is_static

_MOST_TAPS = 128
_SIDE_BY_SIDE = 128  # columns above which XLA writes the slices one by one before it lays them so
_NARROW = 32  # features of a block below which the shifted sums cost less than more columns
_CHUNK_BYTES = 1 << 20  # of columns at a time
_INTERLEAVED = 8  # passes over a result that phases are written into
_SLICED = 320  # features of a block below which copying it takes longer than what it holds


@dataclass(frozen=True)
class Grouped:
    """Row-fold or columns, block by block of the groups."""

    name: str = "grouped"
    accuracy: Accuracy = "direct"

    def why_not(self, problem: ConvProblem) -> str | None:
        if problem.groups == 1:
            return "needs groups, got one"
        if problem.batch_groups > 1 and not is_static(*problem.lhs_shape[:2]):
            return "needs the batch of a kernel gradient to be a number, not a symbol"
        features = problem.output_shape[0] if problem.batch_groups > 1 else problem.rhs_shape[1]
        refusal = refuse_unsized(problem)
        if refusal is not None:
            return refusal
        if features < 2:
            return f"needs two or more input features a group, got {features}"
        if prod(_window(problem)) > _MOST_TAPS:
            return f"needs at most {_MOST_TAPS} taps, got {prod(_window(problem))}"
        return None

    def cost(self, problem: ConvProblem, device: Device) -> Cost:
        q, features, outputs = _block(problem)
        gradient, taps = problem.batch_groups > 1, prod(_window(problem))
        images, each = problem.lhs_shape[1 if gradient else 0], _column_bytes(problem)
        flops = 2 * problem.macs * q // (1 if gradient else prod(problem.lhs_dilation))
        if gradient:
            fold, places = shifts(problem)
            flops = flops * places // (*problem.window, 1)[problem.spatial_rank - 1]
            height, width = fold * q * outputs, taps // fold * q * features
            peak = 550 if collides(problem, height) else 900
            efficiency = peak * height // (height + 16) * width // (width + 16)
        else:
            efficiency = min(85 + 22 * q * features, 400 + 2 * q * features, 900)
        # Slices of the operands are copied, and a result is zeros before the blocks' are written into it.
        apart = prod(problem.output_shape) * problem.out_dtype.itemsize
        moved = 2 * operand_bytes(problem) + apart
        if taps > 1:
            passes = 6 if device.cache and each * q > device.cache else 2
            moved += passes * images * each * problem.groups
        # Of few features, a slice touches the cache lines and pages of all.
        if taps == 1:
            moved += operand_bytes(problem) * _SLICED // min(q * features, q * outputs) // (1 if gradient else 2)
        elif not gradient and prod(problem.strides) > 1:
            moved += prod(problem.lhs_shape) * problem.dtype.itemsize * _SLICED // (4 * q * features)
        phases = 1 if gradient else prod(problem.lhs_dilation)  # whose results lie apart until they interleave
        if phases > 1:
            moved += _INTERLEAVED * apart
        kernel = 0 if gradient else q * prod(problem.rhs_shape) * problem.dtype.itemsize  # laid in blocks
        at_once = _images(images, each * q)
        held = each * at_once * q * (2 if taps > 1 and taps * q * features > _SIDE_BY_SIDE else 1) + kernel
        held += apart if gradient or phases > 1 else bytes_of_assembled(problem)
        if not gradient:  # products, and their sum
            places, terms = prod(problem.output_shape[2:]), problem.window[0] + 1 if _folds(problem) else 1
            held += at_once * places * q * outputs * terms * accumulator(problem).itemsize
        return Cost(flops, moved, held, efficiency + 1, copied=not gradient and phases == 1)

    def run(self, problem: ConvProblem, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        problem, rhs = unreversed(problem, rhs)
        if problem.batch_groups > 1:
            return _kernel_gradient(problem, lhs, rhs)
        return (
            _convolved(problem, lhs, rhs)
            if prod(problem.lhs_dilation) == 1
            else by_phase(problem, lhs, rhs, _convolved)
        )


def _window(problem: ConvProblem) -> tuple[int, ...]:
    """The taps, which in a kernel gradient are what comes out."""
    return problem.output_shape[2:] if problem.batch_groups > 1 else problem.window


def _block(problem: ConvProblem) -> tuple[int, int, int]:
    """Groups to a block, and the input and output features of each group."""
    gradient = problem.batch_groups > 1
    features, outputs = (
        problem.lhs_shape[0 if gradient else 1] // problem.groups,
        problem.rhs_shape[0] // problem.groups,
    )
    wanted = max(1, (16 if gradient else 8) // features)
    return next(q for q in range(wanted, 0, -1) if problem.groups % q == 0), features, outputs


def _folds(problem: ConvProblem) -> bool:
    """Whether the taps of the first axis are no columns of the input."""
    q, features, _ = _block(problem)
    return problem.spatial_rank > 0 and problem.strides[0] == 1 and q * features < _NARROW


def _column_bytes(problem: ConvProblem) -> int:
    """Bytes of the columns of one image and one group."""
    _, features, outputs = _block(problem)
    taps, size = prod(_window(problem)), problem.dtype.itemsize
    if problem.batch_groups == 1:
        met = taps // (problem.window[0] if _folds(problem) else 1)  # over all phases, each of which has its share
        return prod(problem.output_shape[2:]) * met // prod(problem.lhs_dilation) * features * size
    fold, places = shifts(problem)
    cotangent = fold * outputs if fold > 1 else 0
    return prod(problem.window[:-1]) * places * (taps // fold * features + cotangent) * size


def _images(batch: int, bytes_each: int) -> int:
    """Images at a time: a divisor of the batch, or all of a batch that is a symbol."""
    if not is_static(batch):
        return batch
    return next(n for n in range(batch, 0, -1) if batch % n == 0 and (n == 1 or n * bytes_each <= _CHUNK_BYTES))


def _convolved(problem: ConvProblem, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    (batch_axis, feature_axis, *spatial), rhs_spec, out_spec = problem.layout
    q, features, outputs = _block(problem)
    blocks, window, batch = problem.groups // q, problem.window, problem.lhs_shape[0]
    fold = window[0] if _folds(problem) else 1
    w = rhs.transpose(*rhs_spec[2:], rhs_spec[1], rhs_spec[0])
    w = w.reshape(fold, -1, features, blocks, q, outputs).transpose(3, 1, 4, 2, 0, 5)
    if q > 1:
        w = jnp.where(jnp.eye(q, dtype=bool)[:, None, None, :, None], w[..., None, :], 0)
    w = w.reshape(blocks, -1, fold * q * outputs)
    sizes = list(problem.output_shape[2:])
    taps = [range(k) for k in window]
    if fold > 1:
        sizes[0] += (fold - 1) * problem.rhs_dilation[0]
        taps[0] = range(1)
    images = _images(batch, prod(sizes) * w.shape[1] * problem.dtype.itemsize)
    chunks = batch // images if is_static(batch) else 1

    def block(i: Any) -> tuple[jax.Array, dict[int, Any]]:
        x = _part(lhs, (batch_axis, *spatial, feature_axis), i % chunks, images, i // chunks, q * features)
        x = pad_and_dilate(problem, x, range(1, x.ndim - 1))
        x = _columns(x, taps, problem.rhs_dilation, sizes, problem.strides)
        y = lax.dot_general(
            x,
            lax.dynamic_index_in_dim(w, i // chunks, keepdims=False),
            (((x.ndim - 1,), (0,)), ((), ())),
            precision=problem.precision,
            preferred_element_type=accumulator(problem),
        )
        if fold > 1:
            y = y.reshape(*y.shape[:-1], fold, q * outputs)
            shifts = [t * problem.rhs_dilation[0] for t in range(fold)]
            parts = [
                lax.slice_in_dim(y[..., t, :], at, at + problem.output_shape[2], axis=1) for t, at in enumerate(shifts)
            ]
            y = summed(parts, chains=1)
        y = from_channel_last(problem, y.astype(problem.out_dtype))
        return y, {out_spec[0]: i % chunks * images, out_spec[1]: i // chunks * q * outputs}

    return assembled(problem, lhs, problem.physical_output_shape, blocks * chunks, block)


def _kernel_gradient(problem: ConvProblem, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    (feature_axis, batch_axis, *spatial), rhs_spec, _ = problem.layout
    q, features, outputs = _block(problem)
    blocks, window, batch = problem.groups // q, _window(problem), problem.lhs_shape[1]
    sizes, taps = list(problem.window), [range(k) for k in window]
    fold, places = shifts(problem)
    if fold > 1:
        sizes[-1], taps[-1] = places, range(1)
    images = _images(batch, _column_bytes(problem) * q)

    def part(b: jax.Array, i: jax.Array) -> jax.Array:
        x = _part(lhs, (batch_axis, *spatial, feature_axis), i, images, b, q * features)
        x = pad_and_dilate(problem, x, range(1, x.ndim - 1))
        x = _columns(x, taps, problem.strides, sizes, problem.rhs_dilation)
        g = _part(rhs, (rhs_spec[1], *rhs_spec[2:], rhs_spec[0]), i, images, b, q * outputs)
        if fold > 1:
            g = shifted(g, fold, problem.strides[-1])
        # Rows first: XLA:CPU multiplies two matrices along their rows in place, but copies what has more axes.
        x, g = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
        return lax.dot_general(
            g, x, (((0,), (0,)), ((), ())),
            precision=problem.precision, preferred_element_type=accumulator(problem),
        )  # fmt: skip

    def block(b: jax.Array) -> jax.Array:
        z = part(b, jnp.zeros_like(b))
        return lax.fori_loop(1, batch // images, lambda i, z: z + part(b, jnp.full_like(b, i)), z)

    z = lax.map(block, jnp.arange(blocks)).reshape(blocks, fold, q, outputs, -1, q, features)
    z = jnp.stack([z[:, :, i, :, :, i] for i in range(q)], 1).transpose(0, 1, 3, 4, 2, 5)
    z = jnp.moveaxis(z.reshape(problem.rhs_shape[0], *window, features), 0, -1).astype(problem.out_dtype)
    return from_gradient(problem, z)


def _part(x: jax.Array, order: Sequence[int], i: jax.Array, images: int, b: jax.Array, width: int) -> jax.Array:
    """Chunk i of the images and block b of the features, channel-last."""
    if images != x.shape[order[0]]:
        x = lax.dynamic_slice_in_dim(x, i * images, images, order[0])
    return lax.dynamic_slice_in_dim(x, b * width, width, order[-1]).transpose(order)


def _columns(
    x: jax.Array, taps: Sequence[range], dilation: Sequence[int], sizes: Sequence[int], steps: Sequence[int]
) -> jax.Array:
    """The slices of channel-last x that the taps meet, side by side."""
    reach = [(size - 1) * step + 1 for size, step in zip(sizes, steps, strict=True)]
    slices = []
    for tap in product(*taps):
        start = [t * d for t, d in zip(tap, dilation, strict=True)]
        stop = [at + n for at, n in zip(start, reach, strict=True)]
        slices.append(lax.slice(x, (0, *start, 0), (x.shape[0], *stop, x.shape[-1]), (1, *steps, 1)))
    return lax.concatenate(slices, x.ndim - 1) if len(slices) > 1 else slices[0]
