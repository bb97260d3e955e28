"""One input feature a group: slices of the input, multiplied and added elementwise, in the caller's own layout.

Where lhs has no holes the result is one sum of strided slices; else it is one for each phase (``base.phases``), and no
zero is multiplied. A kernel gradient is dk[t] = sum over n and o of lhs[n, t s + o d - lo] g[n, o]: products of slices again,
summed over blocks of o inside one loop and over the rest by a tree.

XLA:CPU makes one loop of such a sum, bound by its loads. ``lax.complex(a, b)`` is the one way to give a loop two
results that share them: two rows of the output, or two taps of a kernel gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from math import prod

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jconv.algorithms.base import (
    Accuracy,
    Cost,
    accumulator,
    interleaved,
    inverse,
    operand_bytes,
    phases,
    refuse_unsized,
    summed,
    unfused,
    unreversed,
)
from jconv.device import Device
from jconv.problem import ConvProblem, is_static

_MOST_TAPS = 256
_UNSPILLED = 121  # taps of one loop; over more of them it spills, 3 to 8 times slower
_TAPS_OF_PAIRS = 16  # from here on what two rows share outweighs the pass that parts them
_CACHED_WEIGHTS = 6144  # taps times channels that stay in the first-level cache beside the rows they meet
_UNROLLED = 64  # taps of a kernel gradient above which those of the first of several axes take turns
_PRODUCTS = 448  # taps times products in one sum of a kernel gradient: its compile time

Where = dict[int, tuple[int, int, int]]  # axis: (start, size, step) of a slice


@dataclass(frozen=True)
class Depthwise:
    """Shifted multiply-adds; for a kernel gradient a sum of products for each tap."""

    name: str = "depthwise"
    accuracy: Accuracy = "direct"

    def why_not(self, problem: ConvProblem) -> str | None:
        if problem.groups == 1:
            return "needs groups, got one"
        if problem.feature_groups > 1 and problem.rhs_shape[1] != 1:
            return f"needs one input feature a group, got {problem.rhs_shape[1]}"
        if problem.batch_groups > 1 and problem.output_shape[0] != 1:
            return f"needs one image a batch group, got {problem.output_shape[0]}"
        if problem.batch_groups > 1 and not is_static(problem.lhs_shape[1]):
            return "needs the batch of a kernel gradient to be a number, not a symbol"
        refusal = refuse_unsized(problem)
        if refusal is None and prod(_window(problem)) > _MOST_TAPS:
            return f"needs at most {_MOST_TAPS} taps, got {prod(_window(problem))}"
        return refusal

    def cost(self, problem: ConvProblem, device: Device) -> Cost:
        size, taps, gradient = accumulator(problem).itemsize, prod(_window(problem)), problem.batch_groups > 1
        holes = (1,) * problem.spatial_rank if gradient else problem.lhs_dilation  # which phases skip
        laid_out = (-(-n // d) for n, d in zip(problem.padded, holes, strict=True))
        held = prod(problem.lhs_shape[:2]) * prod(laid_out) * size
        if not gradient:
            flops = 2 * problem.macs // prod(problem.lhs_dilation)
            efficiency = min(1000, 400 + 10 * taps) if taps <= _UNSPILLED else 140
            return Cost(flops, operand_bytes(problem), held, efficiency, "vector", 3)
        both = held + prod(problem.rhs_shape) * size
        # Two taps share a pass over both operands, of which what does not stay in the cache is fetched again.
        gone = max(0, both - device.near * device.devices) if device.cache else 0
        moved = operand_bytes(problem) + gone * taps * 2 // 5
        features_last = problem.layout.lhs_spec[0] == problem.spatial_rank + 1  # else rows are short
        reread = both if features_last else 0
        return Cost(2 * problem.macs, moved, held, 360, "vector", 4, reread=reread)

    def run(self, problem: ConvProblem, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        problem, rhs = unreversed(problem, rhs)
        wide = accumulator(problem)
        of = _kernel_gradient if problem.batch_groups > 1 else _convolved
        return of(problem, lhs.astype(wide), rhs.astype(wide)).astype(problem.out_dtype)


def _window(problem: ConvProblem) -> tuple[int, ...]:
    """The taps, which in a kernel gradient are what comes out."""
    return problem.output_shape[2:] if problem.batch_groups > 1 else problem.window


def _convolved(problem: ConvProblem, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    lhs_spec, rhs_spec, out_spec = problem.layout
    feature_axis, spatial = lhs_spec[1], lhs_spec[2:]
    x = _repeated(lhs, feature_axis, problem.rhs_shape[0] // problem.lhs_shape[1])
    w = rhs.transpose(*rhs_spec[2:], *rhs_spec[:2])[..., 0]
    axes = [phases(problem, i) for i in range(problem.spatial_rank)]
    row_axis = min(spatial, default=feature_axis)
    in_pairs = prod(problem.window) >= _TAPS_OF_PAIRS and x.dtype.kind == "f" and row_axis < x.ndim - 1
    in_pairs = in_pairs and all(len(of_axis) == 1 for _, _, of_axis in axes)
    pads = [(0, 0, 0)] * x.ndim
    reads = []
    for axis, (size, step, of_axis) in zip(spatial, axes, strict=True):
        size += size % 2 if in_pairs and axis == row_axis else 0
        starts = [start for taps in of_axis for _, start in taps] or [0]
        low, end = max(0, -min(starts)), max(starts) + (size - 1) * step + 1
        pads[axis] = (low, max(0, end - x.shape[axis]), 0)
        reads.append([[(t, axis, (start + low, size, step)) for t, start in taps] for taps in of_axis])
    parts = [
        [(tuple(t for t, _, _ in tap), {axis: where for _, axis, where in tap}) for tap in product(*phase)]
        for phase in product(*reads)
    ]
    if in_pairs:
        y = _in_row_pairs(x, w, parts[0], pads, feature_axis, row_axis)
    else:
        x = _pad(x, pads)
        sums = [_weighted(x, w, taps, feature_axis) if taps else None for taps in parts]
        shape = list(x.shape)
        for axis, (size, _, _) in zip(spatial, axes, strict=True):
            shape[axis] = size
        whole = [jnp.zeros(shape, x.dtype) if part is None else part for part in sums]
        y = interleaved(whole, spatial, [len(of_axis) for _, _, of_axis in axes])
    for axis, size in zip(spatial, problem.output_shape[2:], strict=True):
        y = lax.slice_in_dim(y, 0, size, axis=axis)
    return y.transpose(tuple(lhs_spec[axis] for axis in inverse(out_spec)))


def _weighted(
    x: jax.Array, w: jax.Array, taps: Sequence[tuple[tuple[int, ...], Where]], feature_axis: int
) -> jax.Array:
    column = [-1 if axis == feature_axis else 1 for axis in range(x.ndim)]
    return summed([_slice(x, where) * w[tap].reshape(column) for tap, where in taps], chains=4)


def _in_row_pairs(
    x: jax.Array,
    w: jax.Array,
    taps: Sequence[tuple[tuple[int, ...], Where]],
    pads: Sequence[tuple[int, int, int]],
    feature_axis: int,
    row_axis: int,
) -> jax.Array:
    """Rows 2i and 2i + 1 as the two parts of one complex number, channel block by channel block."""

    def pair(x: jax.Array, w: jax.Array) -> jax.Array:
        x, rows = _pad(x, pads), []
        for odd in (0, 1):
            of_row = []
            for tap, where in taps:
                start, size, step = where[row_axis]
                of_row.append((tap, {**where, row_axis: (start + odd * step, size // 2, 2 * step)}))
            rows.append(_weighted(x, w, of_row, feature_axis))
        return lax.complex(*rows)

    channels = x.shape[feature_axis]
    limit = _CACHED_WEIGHTS // len(taps) if feature_axis == x.ndim - 1 else channels
    width = next((c for c in range(min(limit, channels) // 16 * 16, 16, -16) if channels % c == 0), channels)
    if width == channels:
        z = unfused(pair, x, w)
    else:
        z = lax.map(
            lambda at: pair(
                lax.dynamic_slice_in_dim(x, at, width, x.ndim - 1), lax.dynamic_slice_in_dim(w, at, width, w.ndim - 1)
            ),
            jnp.arange(0, channels, width),
        )
        z = jnp.moveaxis(z, 0, -2)
        z = z.reshape(*z.shape[:-2], channels)
    y = jnp.stack([z.real, z.imag], row_axis + 1)
    return y.reshape(*y.shape[:row_axis], -1, *y.shape[row_axis + 2 :])


def _kernel_gradient(problem: ConvProblem, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    lhs_spec, rhs_spec, out_spec = problem.layout
    x = _repeated(lhs, lhs_spec[0], problem.rhs_shape[0] // problem.groups)
    g = rhs.transpose(tuple(rhs_spec[axis] for axis in inverse(lhs_spec)))
    first, *others = _window(problem) or (1,)
    if others and prod(_window(problem)) > _UNROLLED:
        z = _by_rows_of_taps(problem, x, g)
    else:
        # Neighbours along the first axis, which one sum takes several positions of, share most of what they load.
        taps = [(t, *rest)[: problem.spatial_rank] for rest in np.ndindex(*others) for t in range(first)]
        z = _parted(_tap_sums(problem, x, g, taps), x.dtype, len(taps))
        z = jnp.moveaxis(z.reshape(*others, first, -1), len(others), 0)
    kernel = z.reshape(*_window(problem), 1, -1)
    logical = (kernel.ndim - 2, kernel.ndim - 1, *range(kernel.ndim - 2))
    return kernel.transpose(tuple(logical[axis] for axis in inverse(out_spec)))


def _by_rows_of_taps(problem: ConvProblem, x: jax.Array, g: jax.Array) -> jax.Array:
    """A loop over the taps of the first axis, so that only those of the others are compiled."""
    (first, *others), spatial = _window(problem), problem.layout.lhs_spec[2:]
    pads = [(0, 0, 0)] * x.ndim
    for axis, (low, high), hole in zip(spatial, problem.padding, problem.lhs_dilation, strict=True):
        pads[axis] = (low, high, hole - 1)
    x = _pad(x, pads)
    sizes = (problem.rhs_extent[0], *problem.padded[1:])
    row = problem.replace(
        lhs_shape=(*problem.lhs_shape[:2], *sizes),
        padding=((0, 0),) * len(spatial),
        lhs_dilation=(1,) * len(spatial),
    )
    taps = list(np.ndindex(1, *others))

    def sums(t: jax.Array) -> jax.Array:
        met = lax.dynamic_slice_in_dim(x, t * problem.strides[0], sizes[0], spatial[0])
        return _parted(_tap_sums(row, met, g, taps), x.dtype, len(taps))

    return lax.map(sums, jnp.arange(first))


def _tap_sums(problem: ConvProblem, x: jax.Array, g: jax.Array, taps: Sequence[tuple[int, ...]]) -> jax.Array:
    """For each feature the sum of each tap in the order of ``taps``; of real numbers, two sums in a complex one."""
    feature_axis, _, *spatial = problem.layout.lhs_spec
    lengths = _block_lengths(problem, len(taps))
    x_pads, g_pads, reads = [(0, 0, 0)] * x.ndim, [(0, 0, 0)] * x.ndim, []
    for i, (axis, length) in enumerate(zip(spatial, lengths, strict=True)):
        s, d, (low, _), size = problem.strides[i], problem.rhs_dilation[i], problem.padding[i], problem.window[i]
        blocks = -(-size // length)
        end = (_window(problem)[i] - 1) * s + (blocks * length - 1) * d + 1 - low
        x_pads[axis] = (max(0, low), max(0, end - problem.lhs_extent[i]), problem.lhs_dilation[i] - 1)
        g_pads[axis] = (0, blocks * length - size, 0)
        reads.append((axis, s, d, max(0, -low), blocks, length))
    x, g = _pad(x, x_pads), _pad(g, g_pads)

    def products(tap: tuple[int, ...]) -> jax.Array:
        terms = []
        for at in np.ndindex(*lengths):
            x_where = {
                a: (first + t * s + o * d, n, k * d)
                for t, o, (a, s, d, first, n, k) in zip(tap, at, reads, strict=True)
            }
            g_where = {a: (o, n, k) for o, (a, _, _, _, n, k) in zip(at, reads, strict=True)}
            terms.append(_slice(x, x_where) * _slice(g, g_where))
        return summed(terms, chains=2)

    sums = [products(tap) for tap in taps]
    if x.dtype.kind == "f":
        sums += sums[-1:] * (len(sums) % 2)
        sums = [lax.complex(a, b) for a, b in zip(sums[::2], sums[1::2], strict=True)]
    z = jnp.stack(sums)
    z = z.reshape(len(sums), prod(z.shape[1 : 1 + feature_axis]), z.shape[1 + feature_axis], -1)
    return _total(_total(z, 1), 3)[:, 0, :, 0]


def _block_lengths(problem: ConvProblem, taps: int) -> tuple[int, ...]:
    """Positions of each spatial axis that one sum takes; only one of the innermost axis, unless that holds features. Of the
    first axis many, of the others a divisor: to fill them up would copy both operands."""
    spatial, lengths = problem.layout.lhs_spec[2:], [1] * problem.spatial_rank
    budget = max(1, _PRODUCTS // taps)
    for axis in sorted(axis for axis in spatial if axis < len(spatial) + 1):
        i = spatial.index(axis)
        size = problem.window[i]
        most = min(size, budget, 16)
        fewest = most // 2 + 1 if axis == min(spatial) else 1
        lengths[i] = min(range(most, fewest - 1, -1), key=lambda n: -size % n)
        budget //= lengths[i]
    return tuple(lengths)


def _parted(z: jax.Array, dtype: np.dtype, taps: int) -> jax.Array:
    """A row for each of the taps that :func:`_tap_sums` summed, of operands of ``dtype``."""
    if dtype.kind == "f":
        z = jnp.stack([z.real, z.imag], -2).reshape(*z.shape[:-2], -1, z.shape[-1])[..., :taps, :]
    return z


def _total(z: jax.Array, axis: int) -> jax.Array:
    """The sum along an axis, kept, by a tree of slices, which XLA makes vectors of."""
    while (size := z.shape[axis]) > 1:
        count = next((n for n in range(min(size, 64), 8, -1) if size % n == 0), min(size, 32))
        length = -(-size // count)
        z = _pad(z, [(0, count * length - size, 0) if a == axis else (0, 0, 0) for a in range(z.ndim)])
        z = summed([lax.slice_in_dim(z, i * length, (i + 1) * length, axis=axis) for i in range(count)], chains=4)
    return z


def _repeated(x: jax.Array, axis: int, times: int) -> jax.Array:
    """Each feature as often as a multiplier gives it outputs."""
    return x if times == 1 else jnp.repeat(x, times, axis)


def _pad(x: jax.Array, config: Sequence[tuple[int, int, int]]) -> jax.Array:
    return lax.pad(x, jnp.zeros((), x.dtype), config) if any(map(any, config)) else x


def _slice(x: jax.Array, where: Where) -> jax.Array:
    parts = [where.get(axis, (0, size, 1)) for axis, size in enumerate(x.shape)]
    stops = [start + (size - 1) * step + 1 for start, size, step in parts]
    return lax.slice(x, [start for start, _, _ in parts], stops, [step for _, _, step in parts])
