"""A convolution in equal parts, one after the other, so that its temporaries stay under a limit.

Forward, a part is some images, or a band of rows of one image. A kernel gradient is a sum over images
and rows, so there the parts are summed. Each part is a convolution of the same kind, and all are of
one shape, so that the loop's body is compiled once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jconv.adjoint import merge_axis
from jconv.algorithms.base import Accuracy, Algorithm, Cost, unfused, zeros_as
from jconv.device import Device
from jconv.problem import ConvProblem, is_static

_MOST_BANDS = 256


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
        return self.inner.why_not(self.part(problem))

    def cost(self, problem: ConvProblem, device: Device) -> Cost:
        one = self.inner.cost(self.part(problem), device)
        if self.bands == 1 or not one.reread:
            return one
        # What is read many times gains nothing from bands, which were measured; only from images by themselves.
        image = replace(self, bands=1).part(problem)
        return replace(one, efficiency=self.inner.cost(image, device).efficiency)

    def whole_cost(self, problem: ConvProblem, device: Device) -> Cost:
        """Of all parts together, but for the workspace, which is one part's."""
        p, n, one, part = problem, self.count, self.cost(problem, device), self.part(problem)
        copied = 2 * prod(part.rhs_shape) if p.is_weight_gradient else prod(part.output_shape)
        moved = (one.bytes + (2 * prod(part.lhs_shape) + copied) * p.dtype.itemsize) * n
        if self.bands > 1:
            if self._reach(p) != (p.padding[0][0], p.lhs_shape[2]):
                moved += 2 * prod(p.lhs_shape) * p.dtype.itemsize
            if p.is_weight_gradient and self._rows(p) * self.bands != p.window[0]:
                moved += 2 * prod(p.rhs_shape) * p.dtype.itemsize
        return replace(one, flops=one.flops * n, bytes=moved, kernels=(one.kernels + 2) * n)

    def part(self, problem: ConvProblem) -> ConvProblem:
        """The problem of one part."""
        p = problem
        padding, lhs, rhs = list(p.padding), list(p.lhs_shape), list(p.rhs_shape)
        if p.is_weight_gradient:
            lhs[1], rhs[1] = lhs[1] // self.images, rhs[1] // self.images
        else:
            lhs[0] //= self.images
        if self.bands > 1:
            rows, padding[0] = self._rows(p), (0, 0)
            if p.is_weight_gradient:
                rhs[2] = rows
                lhs[2] = (rows - 1) * p.rhs_dilation[0] + (p.output_shape[2] - 1) * p.strides[0] + 1
            else:
                lhs[2] = (rows - 1) * p.strides[0] + p.rhs_extent[0]
        wide = p.preferred_element_type
        if p.is_weight_gradient and p.out_dtype.itemsize < 4 and jnp.issubdtype(p.out_dtype, jnp.floating):
            wide = np.dtype(np.float32)  # a sum of parts in 16 bits would round at each
        return p.replace(
            lhs_shape=tuple(lhs), rhs_shape=tuple(rhs), padding=tuple(padding), preferred_element_type=wide
        )

    def run(self, problem: ConvProblem, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        part, banded = self.part(problem), self.bands > 1
        lhs_spec, rhs_spec, out_spec = problem.layout
        image_axis = lhs_spec[1 if problem.is_weight_gradient else 0]
        if banded:
            low, reach = self._reach(problem)
            lhs = _padded(lhs, lhs_spec[2], low, reach - problem.lhs_shape[2] - low)
        sizes = [part.lhs_shape[lhs_spec.index(axis)] for axis in range(lhs.ndim)]

        def cut(x: jax.Array, start: list[Any], sizes: list[int]) -> jax.Array:
            if not banded:
                return lax.dynamic_slice(x, start, sizes)
            return unfused(lambda x, *start: lax.dynamic_slice(x, start, sizes), x, *map(jnp.asarray, start))

        def slice_of_lhs(i: jax.Array) -> jax.Array:
            start: list[Any] = [0] * lhs.ndim
            start[image_axis] = i // self.bands * sizes[image_axis]
            if banded:
                start[lhs_spec[2]] = i % self.bands * (self._rows(problem) * self._step(problem))
            return cut(lhs, start, sizes)

        if not problem.is_weight_gradient:
            out = lax.map(lambda i: self.inner.run(part, slice_of_lhs(i), rhs), jnp.arange(self.count))
            if not banded:
                return merge_axis(out, 0, out_spec[0])
            out = out.reshape(self.images, self.bands, *out.shape[1:])
            out = merge_axis(merge_axis(out, 1, 1 + out_spec[2]), 0, out_spec[0])
            return lax.slice_in_dim(out, 0, problem.output_shape[2], axis=out_spec[2])

        if problem.reversed:
            rhs = lax.rev(rhs, rhs_spec[2:])
            part = part.replace(reversed=False)
        if banded:
            rhs = _padded(rhs, rhs_spec[2], 0, self.bands * self._rows(problem) - problem.window[0])
        kernel_sizes = [part.rhs_shape[rhs_spec.index(axis)] for axis in range(rhs.ndim)]

        def add(i: jax.Array, total: jax.Array) -> jax.Array:
            start: list[Any] = [0] * rhs.ndim
            start[rhs_spec[1]] = i // self.bands * kernel_sizes[rhs_spec[1]]
            if banded:
                start[rhs_spec[2]] = i % self.bands * self._rows(problem)
            return total + self.inner.run(part, slice_of_lhs(i), cut(rhs, start, kernel_sizes))

        total = lax.fori_loop(0, self.count, add, zeros_as(lhs, problem.physical_output_shape, part.out_dtype))
        return total.astype(problem.out_dtype)

    def _step(self, problem: ConvProblem) -> int:
        """Rows of lhs between one row of a band and the next."""
        return problem.rhs_dilation[0] if problem.is_weight_gradient else problem.strides[0]

    def _reach(self, problem: ConvProblem) -> tuple[int, int]:
        """The rows before lhs that the bands read, and all that they read."""
        rows = self.part(problem).lhs_shape[2] + (self.bands - 1) * self._rows(problem) * self._step(problem)
        return problem.padding[0][0], rows

    def _rows(self, problem: ConvProblem) -> int:
        whole = problem.window[0] if problem.is_weight_gradient else problem.output_shape[2]
        return -(-whole // self.bands)


def within(algorithm: Algorithm, problem: ConvProblem, device: Device, limit: int) -> Algorithm | None:
    """``algorithm``, in as few parts as keep its workspace at ``limit`` bytes a device or below; None if no split does.

    What has symbolic sizes is left whole: a loop needs the number of its turns. Over several devices there are no
    parts: a loop over images or rows would gather, on each of them, an array that is spread."""
    if not is_static(*problem.lhs_shape, *problem.rhs_shape):
        return algorithm
    limit *= device.devices
    workspace = algorithm.cost(problem, device).workspace
    if workspace <= limit:
        return algorithm
    if device.devices > 1:
        return None
    p = problem
    images = _images(p)
    if images is None:
        return None

    def fits(split: InParts) -> bool:
        part = split.part(p)
        return algorithm.why_not(part) is None and algorithm.cost(part, device).workspace <= limit

    for parts in range(-(-workspace // limit), images + 1):
        if images % parts == 0 and fits(split := InParts(algorithm, parts, 1)):
            return split
    if p.spatial_rank == 0 or p.lhs_dilation[0] > 1:
        return None
    rows = p.window[0] if p.is_weight_gradient else p.output_shape[2]
    one = InParts(algorithm, images, 1)
    if one.why_not(p) is not None:
        return None
    fewest = max(1, -(-one.cost(p, device).workspace // limit))
    for bands in range(fewest, min(rows, _MOST_BANDS) + 1):
        if fits(split := InParts(algorithm, images, bands)):
            # Up to three times as many, if they leave nothing over: what fills rows up is copied and computed, too.
            even = (InParts(algorithm, images, n) for n in range(bands, 3 * bands + 1) if rows % n == 0)
            return next(filter(fits, even), split)
    return None


def by_images(algorithm: Algorithm, problem: ConvProblem, device: Device) -> InParts | None:
    """``algorithm``, in as few parts as let what it reads many times stay in the cache; None where it reads nothing so, where
    all of that stays there, or where not even one image's does."""
    images = _images(problem)
    if images is None or device.devices > 1 or algorithm.cost(problem, device).reread <= device.cache:
        return None
    for parts in range(2, images + 1):
        split = InParts(algorithm, parts, 1)
        if (
            images % parts == 0
            and split.why_not(problem) is None
            and split.cost(problem, device).reread <= device.cache
        ):
            return split
    return None


def _images(problem: ConvProblem) -> Any:
    """The images that a part may take some of; None where they are bound up in groups."""
    p = problem
    if p.is_weight_gradient:
        return p.lhs_shape[1] if p.feature_groups == 1 else None
    return p.lhs_shape[0] if p.batch_groups == 1 else None


def _padded(x: jax.Array, axis: int, low: int, high: int) -> jax.Array:
    if low == 0 and high == 0:
        return x
    return lax.pad(x, jnp.zeros((), x.dtype), [(low, high, 0) if a == axis else (0, 0, 0) for a in range(x.ndim)])
