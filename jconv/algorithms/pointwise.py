"""A 1x1 window is a matrix product over the features; no column is copied."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import jax
from jax import lax

from jconv.algorithms.base import (
    Accuracy,
    Cost,
    collides,
    from_gradient,
    gradient_operands,
    inverse,
    operand_bytes,
    options,
    over_rows,
    pad_and_dilate,
    pays_apart,
    refuse_unsized,
    strided,
)  # fmt: skip
from jconv.device import Device
from jconv.problem import ConvProblem


@dataclass(frozen=True)
class Pointwise:
    """One dot over the features of a 1x1 window, after a strided slice where there is a stride; for its
    kernel gradient, one dot over all positions."""

    name: str = "pointwise"
    accuracy: Accuracy = "direct"

    def why_not(self, problem: ConvProblem) -> str | None:
        if not problem.is_pointwise and not _is_gradient(problem):
            return f"needs a window of ones, got {problem.window}"
        if problem.groups > 1:
            return f"needs one group, got {problem.groups}"
        return refuse_unsized(problem)

    def cost(self, problem: ConvProblem, device: Device) -> Cost:
        depth, width = prod(problem.rhs_shape[1:]), problem.rhs_shape[0]
        if _is_gradient(problem):
            height = problem.lhs_shape[0]
            efficiency = 1000 * width // (width + 16) * height // (height + 16) * depth // (depth + 64) + 1
            apart = 0
            left, right = sorted((height, width))
            if collides(problem, left) and pays_apart(depth, left, right):
                apart = depth * left * problem.dtype.itemsize
            return Cost(2 * problem.macs, operand_bytes(problem) + apart, apart, efficiency)
        flops = 2 * problem.macs // prod(problem.lhs_dilation)
        efficiency = 1000 * width // (width + 8) * depth // (depth + 16) + 1
        return Cost(flops, operand_bytes(problem), 0, efficiency, kernels=1 + any(s > 1 for s in problem.strides))

    def run(self, problem: ConvProblem, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        if _is_gradient(problem):
            return _kernel_gradient(problem, *gradient_operands(problem, lhs, rhs))
        lhs_spec, rhs_spec, out_spec = problem.layout
        weight = lax.squeeze(rhs, rhs_spec[2:])
        weight_in = 0 if rhs_spec[1] < rhs_spec[0] else 1
        if all(stride == 1 for stride in problem.strides):
            # Zeros stay zeros through the product, so holes and padding are cheaper written after it.
            out = _dot(problem, lhs, weight, weight_in)
            return pad_and_dilate(problem, out, out_spec[2:])
        lhs = pad_and_dilate(problem, lhs, lhs_spec[2:])
        zero = (0,) * problem.spatial_rank
        lhs = strided(lhs, lhs_spec[2:], zero, problem.output_shape[2:], problem.strides)
        return _dot(problem, lhs, weight, weight_in)


def _is_gradient(problem: ConvProblem) -> bool:
    """Whether this is the kernel gradient of a 1x1 window."""
    return problem.is_weight_gradient and all(n == 1 for n in problem.output_shape[2:])


def _kernel_gradient(problem: ConvProblem, x: jax.Array, g: jax.Array) -> jax.Array:
    """x[m, c] . g[m, o], with m over batch and positions."""
    spatial = range(1, problem.spatial_rank + 1)
    x = pad_and_dilate(problem, x, tuple(spatial))
    x = strided(x, spatial, (0,) * len(spatial), problem.window, problem.rhs_dilation)
    # Rows first: XLA:CPU multiplies two matrices along their rows in place, but copies what has more axes.
    x, g = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
    out = over_rows(problem, x, g)
    return from_gradient(problem, out.reshape(*(1,) * len(spatial), *out.shape))


def _dot(problem: ConvProblem, lhs: jax.Array, weight: jax.Array, weight_in: int) -> jax.Array:
    """The product over features, with the operand first whose free axes stand first in the result."""
    lhs_spec, _, out_spec = problem.layout
    kept = [axis for axis in range(lhs.ndim) if axis != lhs_spec[1]]
    if out_spec[1] == lhs.ndim - 1:
        out = lax.dot_general(lhs, weight, (((lhs_spec[1],), (weight_in,)), ((), ())), **options(problem))
        axes = [*kept, lhs_spec[1]]
    else:
        out = lax.dot_general(weight, lhs, (((weight_in,), (lhs_spec[1],)), ((), ())), **options(problem))
        axes = [lhs_spec[1], *kept]
    logical = tuple(axes.index(axis) for axis in lhs_spec)
    return out.transpose(tuple(logical[i] for i in inverse(out_spec)))
