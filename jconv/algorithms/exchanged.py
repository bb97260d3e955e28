"""The operands in each other's place: convolution commutes, but for a turn of the result.

Let S, h, d be the strides and the dilations of lhs and rhs, lo the low padding, T the output's size. Output t sums
rhs[i] lhs[m] over those (i, m) with h m = t S + d i - lo. Count the outputs from the end, t = T - 1 - t': then
d i = h m + t' S - ((T - 1) S - lo), so rhs is the image, with holes d, and lhs the window, with dilation h.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
from jax import lax

from jconv.algorithms.base import Accuracy, Algorithm, Cost
from jconv.device import Device
from jconv.problem import ConvProblem, Layout, is_static


@dataclass(frozen=True)
class Exchanged:
    """``inner`` on the problem whose image is rhs and whose window is lhs."""

    inner: Algorithm

    @property
    def name(self) -> str:
        return self.inner.name

    @property
    def accuracy(self) -> Accuracy:
        return self.inner.accuracy

    def why_not(self, problem: ConvProblem) -> str | None:
        return self.inner.why_not(exchanged(problem))

    def cost(self, problem: ConvProblem, device: Device) -> Cost:
        return self.inner.cost(exchanged(problem), device)

    def run(self, problem: ConvProblem, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        return lax.rev(self.inner.run(exchanged(problem), rhs, lhs), problem.layout.out_spec[2:])


def worth_exchanging(problem: ConvProblem) -> bool:
    """True for a kernel gradient that gains: a transposed convolution's becomes a strided one's, without holes in a
    large image; and where the cotangent has fewer features than the image, its columns are fewer and its padding
    is cheaper."""
    p = problem
    if not is_static(*p.lhs_shape, *p.rhs_shape):
        return False
    if not p.is_weight_gradient or p.groups > 1 or p.reversed or p.is_empty or any(d > 1 for d in p.rhs_dilation):
        return False
    return has_holes(p) or p.rhs_shape[0] < p.lhs_shape[0]


def has_holes(problem: ConvProblem) -> bool:
    return any(h > 1 for h in problem.lhs_dilation)


def exchanged(problem: ConvProblem) -> ConvProblem:
    """The problem whose image is rhs and whose window is lhs; its result is turned round."""
    p, padding = problem, []
    for stride, (low, _), out, image, window in zip(
        p.strides, p.padding, p.output_shape[2:], p.rhs_extent, p.lhs_extent, strict=True
    ):
        before = (out - 1) * stride - low
        padding.append((before, (out - 1) * stride + window - image - before))
    lhs_spec, rhs_spec, (batch, features, *spatial) = p.layout
    return p.replace(
        lhs_shape=p.rhs_shape,
        rhs_shape=p.lhs_shape,
        layout=Layout(rhs_spec, lhs_spec, (features, batch, *spatial)),
        padding=tuple(padding),
        lhs_dilation=p.rhs_dilation,
        rhs_dilation=p.lhs_dilation,
        precision=p.precision[::-1] if isinstance(p.precision, tuple) else p.precision,
    )
