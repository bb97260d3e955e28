"""XLA's own convolution. It refuses nothing, so a plan always has an answer."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import jax
import jax.numpy as jnp

from jconv.algorithms.base import Accuracy, Cost, lax_convolution, operand_bytes
from jconv.device import Device
from jconv.problem import ConvProblem


@dataclass(frozen=True)
class Xla:
    """``jax.lax.conv_general_dilated``: cuDNN on GPU, the matrix units on TPU, YNNPACK or Eigen on CPU."""

    name: str = "xla"
    accuracy: Accuracy = "direct"

    def why_not(self, problem: ConvProblem) -> str | None:
        return None

    def cost(self, problem: ConvProblem, device: Device) -> Cost:
        flops = 2 * problem.macs // (1 if problem.groups > 1 else prod(problem.lhs_dilation))  # it skips the holes
        efficiency = 850 if device.vendor_default else _cpu_efficiency(problem)
        return Cost(
            flops, operand_bytes(problem), 0, efficiency, "conv", threads=1 if problem.rhs_shape[0] <= 96 else 0
        )

    def run(self, problem: ConvProblem, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        if problem.is_empty:
            # XLA refuses a window without elements, which the kernel gradient of an empty output has.
            return jnp.zeros(problem.physical_output_shape, problem.out_dtype)
        return lax_convolution(problem, lhs, rhs)


def _cpu_efficiency(problem: ConvProblem) -> int:
    """Thousandths of the matrix-product rate that XLA:CPU was measured to reach (``make bench``)."""
    out_features, depth = problem.rhs_shape[0], prod(problem.rhs_shape[1:])
    if problem.batch_groups > 1:
        return max(1, 600 // problem.groups**2)
    if problem.feature_groups > 1:
        return max(6, min(400, 13 * problem.rhs_shape[1]))
    if problem.spatial_rank == 3:
        return 220
    if problem.is_weight_gradient:
        if prod(problem.output_shape[2:]) == 1:
            return 220
        if problem.lhs_shape[0] == 1 or out_features < 8:
            return 150
        return 850 if out_features >= 64 else 420 if out_features >= 32 else 45
    return (780 if problem.is_pointwise else 950) * min(depth, 100) // 100 + 1
