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
        if device.vendor_default:
            return Cost(2 * problem.macs // prod(problem.lhs_dilation), operand_bytes(problem), 0, 850, "conv")
        threads = 1 if problem.rhs_shape[0] <= _SERIAL or problem.groups > 1 else 0
        return Cost(2 * problem.macs, operand_bytes(problem), 0, _cpu_efficiency(problem), "conv", threads=threads)

    def run(self, problem: ConvProblem, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        if problem.is_empty:
            # XLA refuses a window without elements, which the kernel gradient of an empty output has.
            return jnp.zeros(problem.physical_output_shape, problem.out_dtype)
        return lax_convolution(problem, lhs, rhs)


_LANES = 16
_SERIAL = 96  # output features up to which XLA:CPU's convolution runs on one thread


def _cpu_efficiency(problem: ConvProblem) -> int:
    """Thousandths of its best rate that XLA:CPU's convolution was measured to reach (``make bench``).

    What it knows well is a dense 2-D convolution with many products for each of many output features. Groups, their
    kernel gradients above all, and windows of three axes are loops that nothing has optimised; holes in lhs
    are multiplied like data.
    """
    out, depth = problem.rhs_shape[0], prod(problem.rhs_shape[1:])
    if problem.batch_groups > 1:
        return max(1, 600 // problem.groups**2)
    if problem.feature_groups > 1:
        return max(6, min(400, 13 * problem.rhs_shape[1]))
    if problem.is_weight_gradient:
        taps = prod(problem.output_shape[2:])
        if taps == 1:
            return 150
        work = out * taps * problem.lhs_shape[0]
        vectors = 50 + 650 * (out // _LANES * _LANES) // out
        return vectors * work // (work + 3000) // (5 if problem.spatial_rank == 3 else 1) + 1
    if problem.is_pointwise:
        return 850 * depth // (depth + 24) * out // (out + 8) // (2 if any(s > 1 for s in problem.strides) else 1) + 1
    work = (out * depth) ** 2
    return {1: 400, 3: 250}.get(problem.spatial_rank, 950) * work // (work + 1800**2) + 1
