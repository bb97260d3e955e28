"""Floats of 16 bits or fewer in 32 bits: what a CPU has no arithmetic for is cast once, not in every loop."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from jconv.algorithms.base import Accuracy, Algorithm, Cost
from jconv.device import Device
from jconv.problem import ConvProblem


@dataclass(frozen=True)
class Widened:
    """``inner`` on operands cast to float32; the result is rounded once."""

    inner: Algorithm

    @property
    def name(self) -> str:
        return self.inner.name

    @property
    def accuracy(self) -> Accuracy:
        return self.inner.accuracy

    def why_not(self, problem: ConvProblem) -> str | None:
        return self.inner.why_not(widened(problem))

    def cost(self, problem: ConvProblem, device: Device) -> Cost:
        return self.inner.cost(widened(problem), device)

    def run(self, problem: ConvProblem, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        wide = widened(problem)
        return self.inner.run(wide, lhs.astype(wide.dtype), rhs.astype(wide.dtype)).astype(problem.out_dtype)


def widened(problem: ConvProblem) -> ConvProblem:
    """The problem in float32 where its operands are floats of 16 bits or fewer, else itself."""
    if problem.dtype.itemsize > 2 or not jnp.issubdtype(problem.dtype, jnp.floating):
        return problem
    wide = np.dtype(np.float32)
    preferred = None if problem.out_dtype.itemsize <= wide.itemsize else problem.preferred_element_type
    return problem.replace(dtype=wide, preferred_element_type=preferred)
