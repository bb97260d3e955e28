"""A 1x1 window is a matrix product over the features; no column is copied."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import jax
from jax import lax

from jconv.algorithms.base import Cost, inverse, operand_bytes, pad_and_dilate, refuse_unsized
from jconv.device import Device
from jconv.problem import ConvProblem


@dataclass(frozen=True)
class Pointwise:
    """One dot over the features of a 1x1 window, after a strided slice where there is a stride."""

    name: str = "pointwise"

    def why_not(self, problem: ConvProblem) -> str | None:
        if not problem.is_pointwise:
            return f"needs a window of ones, got {problem.window}"
        if problem.groups > 1:
            return f"needs one group, got {problem.groups}"
        return refuse_unsized(problem)

    def cost(self, problem: ConvProblem, device: Device) -> Cost:
        flops = 2 * problem.macs // prod(problem.lhs_dilation)
        efficiency = 920 * min(problem.rhs_shape[1], 100) // 100 + 1
        return Cost(flops, operand_bytes(problem), 0, efficiency)

    def run(self, problem: ConvProblem, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        lhs_spec, rhs_spec, out_spec = problem.layout
        weight = lax.squeeze(rhs, rhs_spec[2:])
        weight_in = 0 if rhs_spec[1] < rhs_spec[0] else 1
        if all(stride == 1 for stride in problem.strides):
            # Zeros stay zeros through the product, so holes and padding are cheaper written after it.
            out = _dot(problem, lhs, weight, weight_in)
            return pad_and_dilate(problem, out, out_spec[2:])
        lhs = pad_and_dilate(problem, lhs, lhs_spec[2:])
        strides = dict(zip(lhs_spec[2:], problem.strides, strict=True))
        lhs = lax.slice(lhs, (0,) * lhs.ndim, lhs.shape, tuple(strides.get(axis, 1) for axis in range(lhs.ndim)))
        return _dot(problem, lhs, weight, weight_in)


def _dot(problem: ConvProblem, lhs: jax.Array, weight: jax.Array, weight_in: int) -> jax.Array:
    """The product over features, with the operand first whose free axes stand first in the result."""
    lhs_spec, _, out_spec = problem.layout
    kept = [axis for axis in range(lhs.ndim) if axis != lhs_spec[1]]
    options = {"precision": problem.precision, "preferred_element_type": problem.preferred_element_type}
    if out_spec[1] == lhs.ndim - 1:
        out = lax.dot_general(lhs, weight, (((lhs_spec[1],), (weight_in,)), ((), ())), **options)
        axes = [*kept, lhs_spec[1]]
    else:
        out = lax.dot_general(weight, lhs, (((weight_in,), (lhs_spec[1],)), ((), ())), **options)
        axes = [lhs_spec[1], *kept]
    logical = tuple(axes.index(axis) for axis in lhs_spec)
    return out.transpose(tuple(logical[i] for i in inverse(out_spec)))
