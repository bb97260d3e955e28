"""What an algorithm is, and the few steps that several of them share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import lax

from jconv.device import Device
from jconv.problem import ConvProblem, is_static


@dataclass(frozen=True)
class Cost:
    """What a run takes, in integers.

    Attributes:
        flops: floating-point operations, two for a multiply-add.
        bytes: bytes read and written.
        workspace: bytes of temporaries that live at once.
        efficiency: thousandths of the device's matrix-product rate that the flops run at.
    """

    flops: int
    bytes: int
    workspace: int
    efficiency: int


@runtime_checkable
class Algorithm(Protocol):
    """One way to compute a convolution: a frozen dataclass, hashable and compared by value, without arrays
    inside, since it is a key of JAX's caches."""

    @property
    def name(self) -> str:
        """The name that ``algorithm=`` takes."""
        ...

    def why_not(self, problem: ConvProblem) -> str | None:
        """The reason for a refusal, or None if it can serve the problem."""
        ...

    def cost(self, problem: ConvProblem, device: Device) -> Cost:
        """What serving the problem takes; called only where :meth:`why_not` gives None."""
        ...

    def run(self, problem: ConvProblem, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        """The convolution, in the problem's layout; trusts the problem."""
        ...


def refuse_unsized(problem: ConvProblem) -> str | None:
    """The refusals that every algorithm but xla shares: nothing to compute, or sizes not known yet."""
    if problem.is_empty:
        return "needs at least one element in lhs, rhs and the output"
    contracted = (problem.lhs_shape[1], problem.rhs_shape[1]) if problem.feature_groups > 1 else ()
    sizes = (*problem.lhs_shape[2:], problem.rhs_shape[0], *problem.rhs_shape[2:], *contracted)
    if not is_static(*sizes):
        return "needs every size but the batch to be a number, not a symbol"
    return None


def operand_bytes(problem: ConvProblem) -> int:
    """Bytes to read both operands and to write the result once."""
    read = (prod(problem.lhs_shape) + prod(problem.rhs_shape)) * problem.dtype.itemsize
    return read + prod(problem.output_shape) * problem.out_dtype.itemsize


def pad_and_dilate(problem: ConvProblem, lhs: jax.Array, spatial_axes: Sequence[int]) -> jax.Array:
    """``lhs`` with the problem's padding and holes written out along ``spatial_axes``."""
    config = [(0, 0, 0)] * lhs.ndim
    for axis, (low, high), dilation in zip(spatial_axes, problem.padding, problem.lhs_dilation, strict=True):
        config[axis] = (low, high, dilation - 1)
    if not any(any(entry) for entry in config):
        return lhs
    return lax.pad(lhs, jnp.zeros((), lhs.dtype), config)


def inverse(spec: Sequence[int]) -> tuple[int, ...]:
    """The permutation that brings logical order (batch, features, *spatial) into the layout ``spec``."""
    return tuple(spec.index(axis) for axis in range(len(spec)))


def lax_convolution(problem: ConvProblem, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    """The problem in lax's own words."""
    return lax.conv_general_dilated(
        lhs,
        rhs,
        window_strides=problem.strides,
        padding=problem.padding,
        lhs_dilation=problem.lhs_dilation,
        rhs_dilation=problem.rhs_dilation,
        dimension_numbers=problem.layout,
        feature_group_count=problem.feature_groups,
        batch_group_count=problem.batch_groups,
        precision=problem.precision,
        preferred_element_type=problem.preferred_element_type,
        out_sharding=problem.out_sharding,
    )
