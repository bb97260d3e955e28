"""Three spatial axes as two: a sum of 2-D convolutions over the taps of the window's depth."""

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
    Algorithm,
    Cost,
    channel_last,
    from_channel_last,
    from_gradient,
    gradient_operands,
    refuse_unsized,
    strided,
    unfused,
)  # fmt: skip
from jconv.device import Device
from jconv.problem import ConvProblem, Layout

_IMAGES = Layout((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))  # NHWC, HWIO
_GRADIENTS = Layout((0, 3, 1, 2), (3, 0, 1, 2), (2, 3, 0, 1))
_TURNED = 10  # passes over an input that is laid with its features last but one, one number at a time
_FEW = 16  # input features up to which the depth's taps become features of one convolution


@dataclass(frozen=True)
class Volume:
    """``inner``, which is a 2-D algorithm, on the slices that each tap of the depth reads, as one batch. With few
    input features the taps of the depth become features, and one convolution does."""

    inner: Algorithm
    name: str = "volume"

    @property
    def accuracy(self) -> Accuracy:
        return self.inner.accuracy

    def why_not(self, problem: ConvProblem) -> str | None:
        if problem.spatial_rank != 3:
            return f"needs three spatial axes, got {problem.spatial_rank}"
        if problem.out_dtype.itemsize < 4 and jnp.issubdtype(problem.out_dtype, jnp.floating):
            return f"needs results of 32 bits or more, in which taps can be added, got {problem.out_dtype}"
        if problem.is_weight_gradient and problem.feature_groups > 1:
            return "needs a kernel gradient without feature groups"
        if not problem.is_weight_gradient and problem.batch_groups > 1:
            return f"needs one batch group, got {problem.batch_groups}"
        return refuse_unsized(problem) or self.inner.why_not(_slice_problem(problem))

    def cost(self, problem: ConvProblem, device: Device) -> Cost:
        part, taps = _slice_problem(problem), 1 if _folds(problem) else _depth(problem)
        one = self.inner.cost(part, device)
        copied = 2 * prod(part.lhs_shape) * problem.dtype.itemsize
        if problem.is_weight_gradient:
            turned, summed = _TURNED * prod(problem.lhs_shape) * problem.dtype.itemsize, 0
        else:
            turned, summed = 0, 2 * prod(problem.output_shape) * problem.out_dtype.itemsize
        held = taps * copied // 2 + summed + one.workspace  # XLA makes all slices first
        return Cost(
            taps * one.flops, taps * (one.bytes + copied + summed) + turned, held, one.efficiency, one.unit,
            taps * (one.kernels + 2), one.threads,
        )  # fmt: skip

    def run(self, problem: ConvProblem, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        part, depth = _slice_problem(problem), _depth(problem)
        gradient = problem.is_weight_gradient
        x, w = gradient_operands(problem, lhs, rhs) if gradient else channel_last(problem, lhs, rhs)
        low, high = problem.padding[0]
        x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), (low, high, problem.lhs_dilation[0] - 1), *[(0, 0, 0)] * 3])
        count = problem.window[0] if gradient else problem.output_shape[2]
        step = problem.rhs_dilation[0] if gradient else problem.strides[0]
        apart = problem.strides[0] if gradient else problem.rhs_dilation[0]
        if gradient:  # whose slices are features, as which they lie once, for all taps
            x = unfused(lambda x: x.transpose(4, 2, 3, 0, 1), x)
            g = w.reshape(-1, *w.shape[2:])
            slices = [strided(x, [4], [t * apart], [count], [step]) for t in range(depth)]
            slices = [s.reshape(*s.shape[:3], -1) for s in slices]
            return from_gradient(problem, jnp.stack([self.inner.run(part, s, g) for s in slices]))
        slices = [strided(x, [1], [t * apart], [count], [step]) for t in range(depth)]
        slices = [s.reshape(-1, *s.shape[2:]) for s in slices]
        kernels = [w[depth - 1 - t if problem.reversed else t] for t in range(depth)]
        if _folds(problem):
            out = self.inner.run(part, jnp.concatenate(slices, -1), jnp.concatenate(kernels, -2))
        else:
            out = functools.reduce(operator.add, map(functools.partial(self.inner.run, part), slices, kernels))
        return from_channel_last(problem, out.reshape(-1, count, *out.shape[1:]))


def _depth(problem: ConvProblem) -> int:
    """The taps of the window along the first axis; of a kernel gradient the window is the result."""
    return problem.output_shape[2] if problem.is_weight_gradient else problem.window[0]


def _folds(problem: ConvProblem) -> bool:
    return problem.groups == 1 and problem.lhs_shape[1] <= _FEW and not problem.is_weight_gradient


def _slice_problem(problem: ConvProblem) -> ConvProblem:
    """The 2-D problem of one tap of the depth, channel-last."""
    p = problem
    batch, features, out, inner = *p.lhs_shape[:2], *p.rhs_shape[:2]
    if p.is_weight_gradient:
        features, inner = features * p.window[0], inner * p.window[0]
    else:
        batch *= p.output_shape[2]
        if _folds(p):
            features, inner = features * p.window[0], inner * p.window[0]
    return p.replace(
        lhs_shape=(batch, features, *p.lhs_shape[3:]),
        rhs_shape=(out, inner, *p.rhs_shape[3:]),
        layout=_GRADIENTS if p.is_weight_gradient else _IMAGES,
        strides=p.strides[1:], padding=p.padding[1:], lhs_dilation=p.lhs_dilation[1:], rhs_dilation=p.rhs_dilation[1:],
        reversed=p.reversed and not p.is_weight_gradient,
    )  # fmt: skip
