"""The definition, written out: each tap of each input feature is multiplied and added as it is read."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import jax

from jconv.algorithms.base import (
    Accuracy,
    Cost,
    accumulator,
    channel_last,
    from_channel_last,
    operand_bytes,
    pad_and_dilate,
    refuse_unsized,
    strided,
    summed,
    taps,
)  # fmt: skip
from jconv.device import Device
from jconv.problem import ConvProblem, is_static

_MOST_TERMS = 64


@dataclass(frozen=True)
class Direct:
    """Few input features and a small window (the first layer of a network): one fused loop without a copy."""

    name: str = "direct"
    accuracy: Accuracy = "direct"

    def why_not(self, problem: ConvProblem) -> str | None:
        if problem.groups > 1:
            return f"needs one group, got {problem.groups}"
        if any(d > 1 for d in problem.lhs_dilation):
            return f"needs an input without holes, got lhs_dilation {problem.lhs_dilation}"
        refusal = refuse_unsized(problem)
        if refusal is None and not is_static(*problem.rhs_shape):
            return "needs the number of products for an output to be known, not a symbol"
        if refusal is None and prod(problem.rhs_shape[1:]) > _MOST_TERMS:
            return f"needs at most {_MOST_TERMS} products for an output, got {prod(problem.rhs_shape[1:])}"
        return refusal

    def cost(self, problem: ConvProblem, device: Device) -> Cost:
        width = problem.rhs_shape[0]
        padded = prod(problem.padded) * problem.lhs_shape[0] * problem.lhs_shape[1] * problem.dtype.itemsize
        return Cost(
            2 * problem.macs, operand_bytes(problem) + 2 * padded, padded, 1000 * width // (width + 8), "vector", 2
        )

    def run(self, problem: ConvProblem, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        spatial = tuple(range(1, problem.spatial_rank + 1))
        x, w = channel_last(problem, lhs, rhs)
        wide = accumulator(problem)
        x, w = pad_and_dilate(problem, x, spatial).astype(wide), w.astype(wide)
        terms = []
        for index, offset in taps(problem):
            part = strided(x, spatial, offset, problem.output_shape[2:], problem.strides)
            row = (1,) * (x.ndim - 1)
            terms += [part[..., c : c + 1] * w[index][c].reshape(*row, -1) for c in range(w.shape[-2])]
        return from_channel_last(problem, summed(terms, chains=4).astype(problem.out_dtype))
