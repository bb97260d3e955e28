"""Holes in the input (a transposed convolution, a strided input gradient) as convolutions without holes.

Outputs of one residue modulo the dilation meet lhs at whole numbers for every so many taps only, so they are a
convolution of lhs itself with those taps; the residues are then interleaved (:func:`jconv.algorithms.base.phases`).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import jax

from jconv.algorithms.base import Accuracy, Algorithm, Cost, by_phase, operand_bytes, phase_problems, refuse_unsized
from jconv.device import Device
from jconv.problem import ConvProblem

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
        kernels = 6 * prod(problem.rhs_shape) * problem.dtype.itemsize  # every so many taps, copied and transposed
        moved = operand_bytes(problem) + sum(c.bytes for c in costs) + out + kernels
        if problem.rhs_shape[0] < _LANES:
            moved += out * _LANES // problem.rhs_shape[0]
        at_full_rate = sum(1000 * c.flops // c.efficiency for c in costs)
        return Cost(
            flops, moved, out + max((c.workspace for c in costs), default=0),
            max(1, 1000 * flops // max(at_full_rate, 1)), costs[0].unit if costs else "dot",
            1 + sum(c.kernels for c in costs), max((c.threads for c in costs), default=0),
        )  # fmt: skip

    def run(self, problem: ConvProblem, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        return by_phase(problem, lhs, rhs, self.inner.run)


def _parts(problem: ConvProblem) -> list[ConvProblem]:
    return [found[2] for found in phase_problems(problem) if found is not None]
