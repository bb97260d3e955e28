"""Holes in the input (a transposed convolution, a strided input gradient) as convolutions without holes.

With lhs dilation d an output i = d q + phi reads the taps t = t0 + d u, t0 = (lo - phi) mod d, and no other:
there lhs[q + u + e] meets rhs[t0 + d u], e = (phi + t0 - lo) / d. So each phase phi is a convolution of lhs itself
with every d-th tap of the kernel, and the phases are interleaved. Along several axes the phases multiply.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jconv.algorithms.base import Accuracy, Algorithm, Cost, operand_bytes, refuse_unsized
from jconv.device import Device
from jconv.problem import ConvProblem


_LANES = 16  # features that fill a vector register


@dataclass(frozen=True)
class Phase:
    """The product of the dilations as so many convolutions by ``inner``."""

    inner: Algorithm
    name: str = "phase"

    @property
    def accuracy(self) -> Accuracy:
        return self.inner.accuracy

    def why_not(self, problem: ConvProblem) -> str | None:
        if all(d == 1 for d in problem.lhs_dilation):
            return "needs holes in the input, got none"
        if any(s > 1 for s in problem.strides):
            return f"needs strides of 1, got {problem.strides}"
        if any(r > 1 and d > 1 for r, d in zip(problem.rhs_dilation, problem.lhs_dilation, strict=True)):
            return f"needs a kernel without holes, got rhs_dilation {problem.rhs_dilation}"
        refusal = refuse_unsized(problem)
        if refusal is not None:
            return refusal
        refusals = (self.inner.why_not(sub) for _, _, sub in _phases(problem) if sub is not None)
        return next((r for r in refusals if r is not None), None)

    def cost(self, problem: ConvProblem, device: Device) -> Cost:
        costs = [self.inner.cost(sub, device) for _, _, sub in _phases(problem) if sub is not None]
        flops = sum(c.flops for c in costs)
        moved = operand_bytes(problem) + sum(c.bytes for c in costs)
        out = 2 * prod(problem.output_shape) * problem.out_dtype.itemsize
        if problem.rhs_shape[0] < _LANES:
            moved += out * _LANES // problem.rhs_shape[0]
        time = sum(1000 * c.flops // c.efficiency for c in costs)
        return Cost(
            flops, moved + out, out + max((c.workspace for c in costs), default=0), max(1, 1000 * flops // max(time, 1)),
            costs[0].unit if costs else "dot", 1 + sum(c.kernels for c in costs), min((c.threads for c in costs), default=0),
        )  # fmt: skip

    def run(self, problem: ConvProblem, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        lhs_spec, rhs_spec, out_spec = problem.layout
        dilation = problem.lhs_dilation
        counts = tuple(-(-o // d) for o, d in zip(problem.output_shape[2:], dilation, strict=True))
        shape = [problem.output_shape[0], problem.output_shape[1], *counts]
        shape = [shape[out_spec.index(axis)] for axis in range(len(shape))]
        phases = []
        for first, crop, sub in _phases(problem):
            if sub is None:
                phases.append(jnp.zeros(shape, problem.out_dtype))
                continue
            start, stop, step = [0] * rhs.ndim, list(rhs.shape), [1] * rhs.ndim
            for axis, t, d in zip(rhs_spec[2:], first, dilation, strict=True):
                start[axis], step[axis] = t, d
            kernel = lax.slice(rhs, start, stop, step)
            cropped = lhs
            for axis, (low, high) in zip(lhs_spec[2:], crop, strict=True):
                cropped = lax.slice_in_dim(cropped, low, cropped.shape[axis] - high, axis=axis)
            phases.append(self.inner.run(sub, cropped, kernel))
        n = len(dilation)
        phase_of = {axis: i for i, axis in enumerate(out_spec[2:])}
        order = [a for axis in range(n + 2) for a in (n + axis, phase_of.get(axis)) if a is not None]
        out = jnp.stack(phases).reshape(*dilation, *shape).transpose(order)
        sizes = {out_spec[2 + i]: d for i, d in enumerate(dilation)}
        out = out.reshape([n * sizes.get(axis, 1) for axis, n in enumerate(shape)])
        for axis, size in zip(out_spec[2:], problem.output_shape[2:], strict=True):
            out = lax.slice_in_dim(out, 0, size, axis=axis)
        return out


def _phases(
    problem: ConvProblem,
) -> Iterator[tuple[tuple[int, ...], tuple[tuple[int, int], ...], ConvProblem | None]]:
    """For each phase: its first tap as rhs counts them, what to crop from lhs, its problem (None if it has no tap)."""
    p = problem
    for phase in np.ndindex(*p.lhs_dilation):
        first, crop, padding, window = [], [], [], []
        for i, phi in enumerate(phase):
            d, k, (low, _) = p.lhs_dilation[i], p.window[i], p.padding[i]
            if d == 1:
                first.append(0)
                crop.append((max(-low, 0), max(-p.padding[i][1], 0)))
                padding.append((max(low, 0), max(p.padding[i][1], 0)))
                window.append(k)
                continue
            t0 = (low - phi) % d
            taps = max(0, -(-(k - t0) // d))
            count = -(-p.output_shape[2 + i] // d)
            before = (low - phi - t0) // d
            after = count + taps - 1 - p.lhs_shape[2 + i] - before
            first.append((k - 1 - t0) % d if p.reversed else t0)
            crop.append((max(-before, 0), max(-after, 0)))
            padding.append((max(before, 0), max(after, 0)))
            window.append(taps)
        spatial = [n - a - b for n, (a, b) in zip(p.lhs_shape[2:], crop, strict=True)]
        if 0 in window or min(spatial, default=1) < 1:
            yield tuple(first), tuple(crop), None
            continue
        sub = p.replace(
            lhs_shape=(*p.lhs_shape[:2], *spatial), rhs_shape=(*p.rhs_shape[:2], *window),
            lhs_dilation=(1,) * p.spatial_rank, padding=tuple(padding),
        )  # fmt: skip
        yield tuple(first), tuple(crop), sub
