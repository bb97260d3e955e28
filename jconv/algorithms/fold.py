"""One product for all taps, then shifted sums: the window is in the columns of the result, not of the input."""

from __future__ import annotations

import functools
import operator
from dataclasses import dataclass
from math import prod

import jax
import jax.numpy as jnp
from jax import lax

from jconv.algorithms.base import (
    Accuracy,
    Cost,
    channel_last,
    from_channel_last,
    operand_bytes,
    options,
    refuse_unsized,
    taps,
)  # fmt: skip
from jconv.device import Device
from jconv.problem import ConvProblem

_MOST_TAPS = 128
_LANES = 16  # features that fill a vector register


@dataclass(frozen=True)
class Fold:
    """col2im: z[m, tap, o] = x[m, c] w[tap, c, o], each tap then added where it belongs. A hole in the input
    costs nothing, so it serves transposed convolutions and strided input gradients; and it contracts the
    features of a kernel as it lies, where columns of the input would need it transposed."""

    name: str = "fold"
    accuracy: Accuracy = "direct"

    def why_not(self, problem: ConvProblem) -> str | None:
        if problem.groups > 1:
            return f"needs one group, got {problem.groups}"
        if any(s > 1 for s in problem.strides):
            return f"needs strides of 1, got {problem.strides}"
        if problem.out_dtype.itemsize < 4 and jnp.issubdtype(problem.out_dtype, jnp.floating):
            return f"needs results of 32 bits or more, in which taps can be added, got {problem.out_dtype}"
        refusal = refuse_unsized(problem)
        if refusal is None and prod(problem.window) == 1:
            return "needs a window of more than one tap"
        if refusal is None and prod(problem.window) > _MOST_TAPS:
            return f"needs at most {_MOST_TAPS} taps, got {prod(problem.window)}"
        return refusal

    def cost(self, problem: ConvProblem, device: Device) -> Cost:
        images, features = problem.lhs_shape[:2]
        rows, width = images * prod(problem.lhs_shape[2:]), prod(problem.window) * problem.rhs_shape[0]
        stored = rows * width * problem.out_dtype.itemsize
        efficiency = 1000 * features // (features + 24) * rows // (rows + 64) + 1
        added = prod(problem.output_shape) * prod(problem.window) * problem.out_dtype.itemsize
        if problem.rhs_shape[0] < _LANES:
            added *= 9 if problem.rhs_shape[0] == 1 else 2 * _LANES // problem.rhs_shape[0]
        return Cost(
            2 * rows * features * width,
            operand_bytes(problem) + (stored + added) * 3 // 4,
            stored + prod(problem.rhs_shape) * problem.dtype.itemsize,  # the kernel, transposed
            efficiency,
            kernels=3,
        )

    def run(self, problem: ConvProblem, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        n = problem.spatial_rank
        x, w = channel_last(problem, lhs, rhs)
        z = lax.dot_general(x, w, (((n + 1,), (n,)), ((), ())), **options(problem))
        terms = []
        for index, offset in taps(problem):
            part = z[(slice(None),) * (n + 1) + index]
            config = [(0, 0, 0)]
            for axis in range(n):
                low = problem.padding[axis][0] - offset[axis]
                high = problem.output_shape[2 + axis] - problem.lhs_extent[axis] - low
                config.append((low, high, problem.lhs_dilation[axis] - 1))
            terms.append(lax.pad(part, jnp.zeros((), part.dtype), [*config, (0, 0, 0)]))
        return from_channel_last(problem, functools.reduce(operator.add, terms))
