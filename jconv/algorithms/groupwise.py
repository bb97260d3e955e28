"""Each group is a dense convolution of its own, one after the other."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import jax
import jax.numpy as jnp
from jax import lax

from jconv.adjoint import merge_axis
from jconv.algorithms.base import Accuracy, Algorithm, Cost, operand_bytes, refuse_unsized
from jconv.device import Device
from jconv.problem import ConvProblem

_LANES = 16  # features of a cache line


@dataclass(frozen=True)
class Groupwise:
    """``inner`` in a loop over the groups, for groups that are wide enough to keep it busy."""

    inner: Algorithm
    name: str = "groupwise"

    @property
    def accuracy(self) -> Accuracy:
        return self.inner.accuracy

    def why_not(self, problem: ConvProblem) -> str | None:
        if problem.groups == 1:
            return "needs groups, got one"
        return refuse_unsized(problem) or self.inner.why_not(_group(problem))

    def cost(self, problem: ConvProblem, device: Device) -> Cost:
        group, groups = _group(problem), problem.groups
        one = self.inner.cost(group, device)
        width = min(group.lhs_shape[0 if problem.is_weight_gradient else 1], group.rhs_shape[0])
        # A slice of few features touches the cache lines of all; in a kernel gradient it is transposed, too.
        sliced = max(8 if problem.is_weight_gradient else 2, 2 * _LANES // width) - 1
        # The results of the groups lie one after the other before they are merged.
        apart = prod(problem.output_shape) * problem.out_dtype.itemsize
        # A group's product is too small for its slices.
        efficiency = one.efficiency if max(problem.window, default=1) > 1 else one.efficiency * 5 // 7 + 1
        return Cost(
            one.flops * groups, one.bytes * groups + sliced * operand_bytes(problem) + 2 * apart,
            one.workspace + apart, efficiency, one.unit,
            (one.kernels + (12 if problem.is_weight_gradient else 4)) * groups, one.threads,
        )  # fmt: skip

    def run(self, problem: ConvProblem, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        group = _group(problem)
        lhs_spec, rhs_spec, out_spec = problem.layout
        grouped, size = (
            (lhs_spec[0], group.lhs_shape[0]) if problem.batch_groups > 1 else (lhs_spec[1], group.lhs_shape[1])
        )

        def one(i: jax.Array) -> jax.Array:
            x = lax.dynamic_slice_in_dim(lhs, i * size, size, grouped)
            w = lax.dynamic_slice_in_dim(rhs, i * group.rhs_shape[0], group.rhs_shape[0], rhs_spec[0])
            return self.inner.run(group, x, w)

        return merge_axis(lax.map(one, jnp.arange(problem.groups)), 0, out_spec[1])


def _group(problem: ConvProblem) -> ConvProblem:
    """The problem of one group."""
    p, (batch, features, *spatial) = problem, problem.lhs_shape
    return p.replace(
        lhs_shape=(batch // p.batch_groups, features // p.feature_groups, *spatial),
        rhs_shape=(p.rhs_shape[0] // p.groups, *p.rhs_shape[1:]), feature_groups=1, batch_groups=1,
    )  # fmt: skip
