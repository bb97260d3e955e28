"""Holes in the input (a transposed convolution, a strided input gradient) as convolutions without holes.

Outputs of one residue modulo the dilation meet lhs at whole numbers for every so many taps only, so they are a
convolution of lhs itself with those taps; the residues are then interleaved (:func:`jconv.algorithms.base.phases`).

Where output features are few, one convolution computes all residues as features of one pixel. Unstrided, with holes h
and low padding lo, output q h + r reads lhs[q + u] through the tap t = h u + lo - r. Let u0 be the least u of any
residue: then t = h (u - u0) + (h - 1 - r) + t0 with t0 = h u0 + lo - h + 1 in (-h, 0], so the kernel behind -t0 zeros,
cut into rows of h, has u along its rows and the residues, from the last, along its columns.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

import jax
import jax.numpy as jnp
from jax import lax

from jconv.algorithms.base import (
    Accuracy,
    Algorithm,
    Cost,
    by_phase,
    channel_last,
    from_channel_last,
    operand_bytes,
    phase_problems,
    refuse_unsized,
)  # fmt: skip
from jconv.device import Device
from jconv.problem import ConvProblem, Layout

_LANES = 16  # features that fill a vector register


@dataclass(frozen=True)
class Phase:
    """As many convolutions by ``inner`` as the dilations' product."""

    inner: Algorithm
    name: str = "phase"

    @property
    def accuracy(self) -> Accuracy:
        return self.inner.accuracy

    def why_not(self, problem: ConvProblem) -> str | None:
        if all(d == 1 for d in problem.lhs_dilation):
            return "needs holes in the input, got none"
        refusal = refuse_unsized(problem)
        if refusal is not None:
            return refusal
        refusals = (self.inner.why_not(part) for part in _parts(problem))
        return next((r for r in refusals if r is not None), None)

    def cost(self, problem: ConvProblem, device: Device) -> Cost:
        costs = [self.inner.cost(part, device) for part in _parts(problem)]
        flops = sum(c.flops for c in costs)
        out = 2 * prod(problem.output_shape) * problem.out_dtype.itemsize
        kernels = prod(problem.rhs_shape) * problem.dtype.itemsize  # every so many taps, copied and transposed
        moved = operand_bytes(problem) + sum(c.bytes for c in costs) + out + 6 * kernels
        if problem.rhs_shape[0] < _LANES:
            moved += out * _LANES // problem.rhs_shape[0]
        at_full_rate = sum(1000 * c.flops // c.efficiency for c in costs)
        return Cost(
            flops, moved, out + kernels + max((c.workspace for c in costs), default=0),
            max(1, 1000 * flops // max(at_full_rate, 1)), costs[0].unit if costs else "dot",
            1 + sum(c.kernels for c in costs), max((c.threads for c in costs), default=0),
        )  # fmt: skip

    def run(self, problem: ConvProblem, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        return by_phase(problem, lhs, rhs, self.inner.run)


@dataclass(frozen=True)
class Subpixel:
    """One unstrided convolution by ``inner``, to as many times the output features as there are residues."""

    inner: Algorithm
    name: str = "subpixel"

    @property
    def accuracy(self) -> Accuracy:
        return self.inner.accuracy

    def why_not(self, problem: ConvProblem) -> str | None:
        if all(h == 1 for h in problem.lhs_dilation):
            return "needs holes in the input, got none"
        if any(v > 1 for v in (*problem.strides, *problem.rhs_dilation, problem.groups)):
            return "needs one group, strides of 1 and a window without holes"
        refusal = refuse_unsized(problem)
        return self.inner.why_not(_merged(problem)[0]) if refusal is None else refusal

    def cost(self, problem: ConvProblem, device: Device) -> Cost:
        part, _ = _merged(problem)
        inner, size = self.inner.cost(part, device), problem.dtype.itemsize
        shuffled = 2 * prod(part.output_shape) * problem.out_dtype.itemsize
        moved = inner.bytes + shuffled + 4 * prod(part.rhs_shape) * size
        return replace(inner, bytes=moved, workspace=inner.workspace + shuffled // 2, kernels=inner.kernels + 3)

    def run(self, problem: ConvProblem, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        part, leading = _merged(problem)
        n = problem.spatial_rank
        x, w = channel_last(problem, lhs, rhs)
        if problem.reversed:
            w = lax.rev(w, range(n))
        *inner_shape, c, k = w.shape
        sides = [
            (t, u * h - t - size, 0)
            for t, u, h, size in zip(leading, part.window, problem.lhs_dilation, inner_shape, strict=True)
        ]
        w = lax.pad(w, jnp.zeros((), w.dtype), [*sides, (0, 0, 0), (0, 0, 0)])
        w = w.reshape(*(d for pair in zip(part.window, problem.lhs_dilation, strict=True) for d in pair), c, k)
        residues = range(1, 2 * n, 2)
        w = (
            lax.rev(w, residues)
            .transpose(*range(0, 2 * n, 2), 2 * n, *residues, 2 * n + 1)
            .reshape(*part.window, c, -1)
        )
        y = self.inner.run(part, x, w)
        y = y.reshape(*y.shape[:-1], *problem.lhs_dilation, k)
        y = y.transpose(0, *(a for i in range(n) for a in (1 + i, 1 + n + i)), 2 * n + 1)
        y = y.reshape(y.shape[0], *(q * h for q, h in zip(part.output_shape[2:], problem.lhs_dilation, strict=True)), k)
        return from_channel_last(problem, lax.slice(y, (0,) * y.ndim, (y.shape[0], *problem.output_shape[2:], k)))


def _merged(problem: ConvProblem) -> tuple[ConvProblem, list[int]]:
    """The channel-last problem of all residues, and the zeros before the kernel along each axis."""
    p, n = problem, problem.spatial_rank
    window, padding, leading = [], [], []
    for h, k, (low, _), size, out in zip(
        p.lhs_dilation, p.window, p.padding, p.lhs_shape[2:], p.output_shape[2:], strict=True
    ):
        first = -(low // h)  # the least u with h u + low >= 0
        zeros = h - 1 - h * first - low
        taps, count = -(-(zeros + k) // h), -(-out // h)
        window.append(taps)
        leading.append(zeros)
        padding.append((-first, first + count - 1 + taps - size))
    image = (0, n + 1, *range(1, n + 1))
    part = p.replace(
        lhs_shape=p.lhs_shape, rhs_shape=(p.rhs_shape[0] * prod(p.lhs_dilation), p.rhs_shape[1], *window),
        layout=Layout(image, (n + 1, n, *range(n)), image), padding=tuple(padding), lhs_dilation=(1,) * n, reversed=False,
    )  # fmt: skip
    return part, leading


def _parts(problem: ConvProblem) -> list[ConvProblem]:
    return [found[2] for found in phase_problems(problem) if found is not None]
