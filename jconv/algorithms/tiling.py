"""A convolution in equal parts, one after the other, so that its temporaries stay under a limit, or what it reads in a cache.

Forward, a part is some images, or a band of rows of one image. A kernel gradient is a sum over images
and rows, so there the parts are summed. Each part is a convolution of the same kind, and all are of
one shape, so that the loop's body is compiled once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import isqrt, prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jconv.algorithms.base import Accuracy, Algorithm, Cost, assembled, bytes_of_assembled, unfused, zeros_as
from jconv.device import Device
from jconv.problem import ConvProblem, is_static

_MOST_BANDS = 256
_SHORT = 16  # rows of an axis that is not divided where another is longer


@dataclass(frozen=True)
class InParts:
    """``inner`` on ``images`` times ``bands`` parts of a problem."""

    inner: Algorithm
    images: int
    bands: int

    @property
    def name(self) -> str:
        return self.inner.name

    @property
    def accuracy(self) -> Accuracy:
        return self.inner.accuracy

    @property
    def count(self) -> int:
        return self.images * self.bands

    def why_not(self, problem: ConvProblem) -> str | None:
        batch = problem.lhs_shape[1 if problem.is_weight_gradient else 0]
        if not is_static(batch) or batch % self.images:
            return f"needs a batch that {self.images} divides, got {batch}"
        if self.bands > 1 and problem.lhs_dilation[band_axis(problem)] > 1:
            return f"needs an axis without holes to divide, got lhs_dilation {problem.lhs_dilation}"
        return self.inner.why_not(self.part(problem))

    def cost(self, problem: ConvProblem, device: Device) -> Cost:
        part = self.part(problem)
        one = self.inner.cost(part, device)
        held = one.workspace + (prod(part.output_shape) * part.out_dtype.itemsize if one.copied else 0)
        if problem.is_weight_gradient:
            held += (prod(part.lhs_shape) + prod(part.rhs_shape)) * problem.dtype.itemsize
        else:
            held += bytes_of_assembled(problem)
            if self.bands > 1:
                held += prod(part.lhs_shape) * problem.dtype.itemsize
                if self.bands * self._rows(problem) > _lengths(problem)[band_axis(problem)]:
                    held += prod(problem.output_shape) * problem.out_dtype.itemsize  # from a longer one, which is cut
        return replace(one, workspace=held)

    def whole_cost(self, problem: ConvProblem, device: Device) -> Cost:
        """Of all parts together, but for the workspace, which is one part's."""
        p, n, one, part = problem, self.count, self.cost(problem, device), self.part(problem)
        copied = 2 * prod(part.lhs_shape) + (
            2 * prod(part.rhs_shape) if p.is_weight_gradient else prod(part.output_shape)
        )
        moved = (one.bytes + copied * p.dtype.itemsize) * n
        launches = (one.kernels + 2) * n
        if device.threads == 1:  # in a loop, where nobody waits for another, a launch took a quarter of the time
            launches = max(one.kernels, launches // 4)
        # What one thread has read into its cache, others must fetch from there.
        threads = 1 if one.reread else one.threads
        return replace(one, flops=one.flops * n, bytes=moved, kernels=launches, threads=threads)

    def part(self, problem: ConvProblem) -> ConvProblem:
        """The problem of one part."""
        p = problem
        padding, lhs, rhs = list(p.padding), list(p.lhs_shape), list(p.rhs_shape)
        if p.is_weight_gradient:
            lhs[1], rhs[1] = lhs[1] // self.images, rhs[1] // self.images
        else:
            lhs[0] //= self.images
        if self.bands > 1:
            rows = self._rows(p)
            for i in _without_holes(p):
                lhs[2 + i], padding[i] = p.padded[i], (0, 0)
            a = band_axis(p)
            if p.is_weight_gradient:
                rhs[2 + a] = rows
                lhs[2 + a] = (rows - 1) * p.rhs_dilation[a] + (p.output_shape[2 + a] - 1) * p.strides[a] + 1
            else:
                lhs[2 + a] = (rows - 1) * p.strides[a] + p.rhs_extent[a]
        wide = p.preferred_element_type
        if p.is_weight_gradient and p.out_dtype.itemsize < 4 and jnp.issubdtype(p.out_dtype, jnp.floating):
            wide = np.dtype(np.float32)  # a sum of parts in 16 bits would round at each
        return p.replace(
            lhs_shape=tuple(lhs), rhs_shape=tuple(rhs), padding=tuple(padding), preferred_element_type=wide
        )

    def run(self, problem: ConvProblem, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        part, gradient = self.part(problem), problem.is_weight_gradient
        lhs_spec, rhs_spec, out_spec = problem.layout
        images = 1 if gradient else 0
        lhs_rows = rhs_rows = None
        if self.bands > 1:
            a = 2 + band_axis(problem)
            rows, step = self._rows(problem), (problem.rhs_dilation if gradient else problem.strides)[a - 2]
            lhs_rows, rhs_rows = (lhs_spec[a], part.lhs_shape[a], rows * step), (rhs_spec[a], rows, rows)
        pads = {lhs_spec[2 + i]: problem.padding[i] for i in _without_holes(problem)}

        def of_lhs(i: jax.Array) -> jax.Array:
            return _cut(lhs, i, self.bands, (lhs_spec[images], part.lhs_shape[images]), lhs_rows, pads)

        if not gradient:
            row_axis = out_spec[2 + band_axis(problem)] if problem.spatial_rank else 0
            result = list(problem.physical_output_shape)
            if self.bands > 1:
                result[row_axis] = self.bands * self._rows(problem)

            def one(i: Any) -> tuple[jax.Array, dict[int, Any]]:
                starts = {out_spec[0]: i // self.bands * part.output_shape[0]}
                if self.bands > 1:
                    starts[row_axis] = i % self.bands * self._rows(problem)
                return self.inner.run(part, of_lhs(i), rhs), starts

            out = assembled(problem, lhs, result, self.count, one)
            return lax.slice(out, [0] * out.ndim, problem.physical_output_shape)

        if problem.reversed:
            rhs = lax.rev(rhs, rhs_spec[2:])
            part = part.replace(reversed=False)

        def add(i: jax.Array, total: jax.Array) -> jax.Array:
            of_rhs = _cut(rhs, i, self.bands, (rhs_spec[images], part.rhs_shape[images]), rhs_rows, {})
            return total + self.inner.run(part, of_lhs(i), of_rhs)

        total = lax.fori_loop(0, self.count, add, zeros_as(lhs, problem.physical_output_shape, part.out_dtype))
        return total.astype(problem.out_dtype)

    def _rows(self, problem: ConvProblem) -> int:
        return -(-_lengths(problem)[band_axis(problem)] // self.bands)


def within(algorithm: Algorithm, problem: ConvProblem, device: Device, limit: int) -> Algorithm | None:
    """``algorithm``, in as few parts as keep its workspace at ``limit`` bytes a device or below; None if no split does.

    What has symbolic sizes is left whole: a loop needs the number of its turns. Over several devices there are no
    parts: a loop over images or rows would gather, on each of them, an array that is spread."""
    if not is_static(*problem.lhs_shape, *problem.rhs_shape):
        return algorithm
    limit *= device.devices
    if algorithm.cost(problem, device).workspace <= limit:
        return algorithm
    if device.devices > 1:
        return None
    return _split(algorithm, problem, lambda split: split.cost(problem, device).workspace <= limit)


def _split(algorithm: Algorithm, problem: ConvProblem, fits: Callable[[InParts], bool]) -> InParts | None:
    """``algorithm`` in parts of one shape that it can serve and that fit: in as few as do, or some more bands where those
    divide the rows. None if there are none."""
    p = problem
    images = _images(p)
    if images is None:
        return None

    def good(split: InParts) -> bool:
        return split.why_not(p) is None and fits(split)

    for parts in _divisors(images)[1:]:
        if good(split := InParts(algorithm, parts, 1)):
            return split
    if p.spatial_rank == 0 or InParts(algorithm, images, 1).why_not(p) is not None:
        return None
    rows = _lengths(p)[band_axis(p)]
    for bands in range(2, min(rows, _MOST_BANDS) + 1):
        if good(split := InParts(algorithm, images, bands)):
            # Some more, if they leave nothing over, or little: what fills rows up is copied and computed, too.
            counts = range(bands, min(rows, _MOST_BANDS, 5 * bands // 3) + 1)
            even = (InParts(algorithm, images, n) for left in (0, rows // 16) for n in counts if -rows % n <= left)
            return next(filter(good, even), split)
    return None


def in_cache(algorithm: Algorithm, problem: ConvProblem, device: Device) -> InParts | None:
    """``algorithm``, in as few parts as let what it reads many times stay in the cache; None where it reads nothing so, where
    all of that stays there, or where no part's does."""
    if device.devices > 1 or algorithm.cost(problem, device).reread <= device.near:
        return None
    return _split(algorithm, problem, lambda split: split.cost(problem, device).reread <= device.near)


def _divisors(number: int) -> list[int]:
    low = [n for n in range(1, isqrt(number) + 1) if number % n == 0]
    return sorted({*low, *(number // n for n in low)})


def _images(problem: ConvProblem) -> Any:
    """The images that a part may take some of; None where they are bound up in groups."""
    p = problem
    if p.is_weight_gradient:
        return p.lhs_shape[1] if p.feature_groups == 1 else None
    return p.lhs_shape[0] if p.batch_groups == 1 else None


def _lengths(problem: ConvProblem) -> tuple[Any, ...]:
    """Of each spatial axis the positions that parts divide: of the result or, in a kernel gradient, of the cotangent."""
    return problem.window if problem.is_weight_gradient else problem.output_shape[2:]


def band_axis(problem: ConvProblem) -> int:
    """The first spatial axis that is not short, without holes in its input, before the last; else the first."""
    lengths, holes = _lengths(problem), problem.lhs_dilation
    axes = range(problem.spatial_rank - 1)
    return next((a for a in axes if lengths[a] >= _SHORT and holes[a] == 1), 0)


def _without_holes(problem: ConvProblem) -> list[int]:
    """The spatial axes that a band is padded along while it is cut."""
    return [i for i, hole in enumerate(problem.lhs_dilation) if hole == 1]


def _cut(
    x: jax.Array,
    i: jax.Array,
    bands: int,
    images: tuple[int, int],
    rows: tuple[int, int, int] | None,
    pads: Mapping[int, tuple[int, int]],
) -> jax.Array:
    """Part i of an operand: of the axis of images some; of the axis of rows, where there are bands, some that start so many
    after those of the band before, with zeros where the operand has none. All in one pass, ``pads`` included."""
    image_axis, count = images
    if rows is None:
        return lax.dynamic_slice_in_dim(x, i * count, count, image_axis)
    row_axis, size, every = rows
    low = pads.get(row_axis, (0, 0))[0]
    held = min(size, x.shape[row_axis])
    last = x.shape[row_axis] - held
    before, after = max(0, low), max(0, (bands - 1) * every - low - last) + size - held

    def taken(x: jax.Array, image: jax.Array, start: jax.Array) -> jax.Array:
        inside = jnp.clip(start, 0, last)
        x = lax.dynamic_slice_in_dim(x, image * count, count, image_axis)
        x = lax.dynamic_slice_in_dim(x, inside, held, row_axis)
        widths = {**pads, row_axis: (before, after)}
        x = lax.pad(x, jnp.zeros((), x.dtype), [(*widths.get(axis, (0, 0)), 0) for axis in range(x.ndim)])
        return x if before == after == 0 else lax.dynamic_slice_in_dim(x, start - inside + before, size, row_axis)

    return unfused(taken, x, i // bands, i % bands * every - low)
