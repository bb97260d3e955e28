"""The definition, written out: each tap of each input feature is multiplied and added as it is read."""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd, prod

import jax

from jconv.adjoint import split_axis
from jconv.algorithms.base import (
    Accuracy,
    Cost,
    accumulator,
    by_phase,
    channel_last,
    from_channel_last,
    operand_bytes,
    pad_and_dilate,
    refuse_unsized,
    strided,
    summed,
    taps,
    unfused,
)  # fmt: skip
from jconv.device import Device
from jconv.problem import ConvProblem, is_static

_MOST_TERMS = 96
_MOST_TERMS_OF_GROUPS = 112
_LANES = 8  # of a vector of float32: outputs of a group that one feature is broadcast to
_CACHED_BYTES = 48 << 10  # of weights, in the first-level cache


@dataclass(frozen=True)
class Direct:
    """Few input features in all (the first layer of a network) or a group, and a small window: one fused loop over the padded
    input, in which each feature of a group is read for all outputs of the group."""

    name: str = "direct"
    accuracy: Accuracy = "direct"

    def why_not(self, problem: ConvProblem) -> str | None:
        if problem.batch_groups > 1:
            return f"needs one batch group, got {problem.batch_groups}"
        if problem.groups == 1 and any(d > 1 for d in problem.lhs_dilation):
            return f"needs groups or an input without holes, got lhs_dilation {problem.lhs_dilation}"
        if problem.groups > 1 and problem.rhs_shape[:2] == (problem.groups, 1):
            return "needs groups of more than one feature, got depthwise ones"
        refusal = refuse_unsized(problem)
        if refusal is None and not is_static(*problem.rhs_shape):
            return "needs the number of products for an output to be known, not a symbol"
        most = _MOST_TERMS if problem.groups == 1 else _MOST_TERMS_OF_GROUPS
        if refusal is None and prod(problem.rhs_shape[1:]) > most:
            return f"needs at most {most} products for an output, got {prod(problem.rhs_shape[1:])}"
        return refusal

    def cost(self, problem: ConvProblem, device: Device) -> Cost:
        width = problem.rhs_shape[0]
        padded = prod(problem.padded) * problem.lhs_shape[0] * problem.lhs_shape[1] * problem.dtype.itemsize
        if _lies_ready(problem):
            padded = 0
        efficiency = 1000 * width // (width + 8)
        if problem.groups > 1:
            efficiency = 700 * gcd(width // problem.groups, _LANES) // _LANES
            is_pointwise = prod(problem.rhs_shape[2:]) == 1
            if not is_pointwise and prod(problem.rhs_shape) * accumulator(problem).itemsize > _CACHED_BYTES:
                efficiency //= 2
        phases = prod(problem.lhs_dilation)
        apart = prod(problem.output_shape) * problem.out_dtype.itemsize if phases > 1 else 0  # until they interleave
        return Cost(
            2 * problem.macs // phases, operand_bytes(problem) + 2 * (padded + apart), padded // phases + apart, efficiency,
            "vector", 2 * phases,
        )  # fmt: skip

    def run(self, problem: ConvProblem, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        has_holes = prod(problem.lhs_dilation) > 1
        return by_phase(problem, lhs, rhs, _convolved) if has_holes else _convolved(problem, lhs, rhs)


def _lies_ready(problem: ConvProblem) -> bool:
    """Whether lhs is read where it lies: unpadded, without holes, channel-last."""
    batch, features, *spatial = problem.layout.lhs_spec
    laid_out = any(map(any, problem.padding)) or prod(problem.lhs_dilation) > 1
    return not laid_out and [batch, *spatial, features] == list(range(len(spatial) + 2))


def _convolved(problem: ConvProblem, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    spatial = tuple(range(1, problem.spatial_rank + 1))
    x, w = channel_last(problem, lhs, rhs)
    wide = accumulator(problem)
    x = split_axis(pad_and_dilate(problem, x, spatial).astype(wide), x.ndim - 1, problem.groups)
    w = split_axis(w.astype(wide), w.ndim - 1, problem.groups)
    if problem.groups > 1:
        w = unfused(lambda w: w, w)  # or the loop gathers what an input gradient transposed
    terms = []
    for index, offset in taps(problem):
        part = strided(x, spatial, offset, problem.output_shape[2:], problem.strides)
        terms += [part[..., c : c + 1] * w[index][c] for c in range(part.shape[-1])]
    y = summed(terms, chains=4)
    return from_channel_last(problem, y.reshape(*y.shape[:-2], -1).astype(problem.out_dtype))
