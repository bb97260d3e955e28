"""Each group is a dense convolution of its own, one after the other."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import jax
from jax import lax

from jconv.algorithms.base import (
    Accuracy,
    Algorithm,
    Cost,
    assembled,
    bytes_of_assembled,
    operand_bytes,
    refuse_unsized,
)
from jconv.device import Device
from jconv.problem import ConvProblem

_LANES = 16  # features of a cache line
_PAGE, _WAYS = 4096, 256  # bytes between positions that fall on few sets of the cache, and how many of them those hold


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
        # A slice of few features touches the cache lines of all; in a kernel gradient it is transposed, too, one number at a time.
        sliced = max(_turned(problem) if problem.is_weight_gradient else 2, 2 * _LANES // width) - 1
        # A result is zeros before the groups' are written into it.
        written = 2 * prod(problem.output_shape) * problem.out_dtype.itemsize
        efficiency = one.efficiency
        if max(problem.window, default=1) == 1:  # a group's product is too small for its slices
            efficiency = efficiency * 5 // 7 + 1
        elif problem.is_weight_gradient and prod(problem.rhs_dilation) > 1:
            efficiency = efficiency // 2 + 1
        return Cost(
            one.flops * groups, one.bytes * groups + sliced * operand_bytes(problem) + written,
            one.workspace + operand_bytes(group) + bytes_of_assembled(problem), efficiency, one.unit,
            (one.kernels + (12 if problem.is_weight_gradient else 4)) * groups, one.threads,
            copied=not problem.is_weight_gradient,
        )  # fmt: skip

    def run(self, problem: ConvProblem, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        group = _group(problem)
        lhs_spec, rhs_spec, out_spec = problem.layout
        grouped, size = (
            (lhs_spec[0], group.lhs_shape[0]) if problem.batch_groups > 1 else (lhs_spec[1], group.lhs_shape[1])
        )

        outputs = group.rhs_shape[0]

        def one(i: Any) -> tuple[jax.Array, dict[int, Any]]:
            x = lax.dynamic_slice_in_dim(lhs, i * size, size, grouped)
            w = lax.dynamic_slice_in_dim(rhs, i * outputs, outputs, rhs_spec[0])
            return self.inner.run(group, x, w), {out_spec[1]: i * outputs}

        return assembled(problem, lhs, problem.physical_output_shape, problem.groups, one)


def _group(problem: ConvProblem) -> ConvProblem:
    """The problem of one group."""
    p, (batch, features, *spatial) = problem, problem.lhs_shape
    return p.replace(
        lhs_shape=(batch // p.batch_groups, features // p.feature_groups, *spatial),
        rhs_shape=(p.rhs_shape[0] // p.groups, *p.rhs_shape[1:]), feature_groups=1, batch_groups=1,
    )  # fmt: skip


def _turned(problem: ConvProblem) -> int:
    """Passes over the operands of a kernel gradient that transposing them takes."""
    apart = {features * problem.dtype.itemsize for features in (problem.lhs_shape[0], problem.rhs_shape[0])}
    conflict = any(size % _PAGE == 0 for size in apart) and prod(problem.window) > _WAYS
    return 32 if conflict else 8
