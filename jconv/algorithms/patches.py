"""Windows that neither overlap nor leave gaps: a reshape and one matrix product."""

from __future__ import annotations

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
    from_gradient,
    gradient_operands,
    operand_bytes,
    options,
    over_rows,
    refuse_unsized,
)  # fmt: skip
from jconv.device import Device
from jconv.problem import ConvProblem


@dataclass(frozen=True)
class Patches:
    """The stride is the window (patch embeddings, 2x2 down- and upsampling): forward [patch, window c] [window c, o],
    input gradient the same matrices the other way, kernel gradient [patch, window c]^T [patch, o]."""

    name: str = "patches"
    accuracy: Accuracy = "direct"

    def why_not(self, problem: ConvProblem) -> str | None:
        if problem.groups > 1:
            return f"needs one group, got {problem.groups}"
        if (
            problem.is_pointwise
            or prod(problem.output_shape[2:]) == 1
            or not any((_forward(problem), _upward(problem), _gradient(problem)))
        ):
            return f"needs a stride that is the window, got {problem.strides} and {problem.window}"
        return refuse_unsized(problem)

    def cost(self, problem: ConvProblem, device: Device) -> Cost:
        size, window = problem.dtype.itemsize, prod(problem.window)
        passes = 2
        if _upward(problem):
            flops = 2 * prod(problem.lhs_shape) * problem.rhs_shape[0] * window
            moved = prod(problem.lhs_shape) // problem.lhs_shape[1] * problem.rhs_shape[0] * window
            width, depth = problem.rhs_shape[0] * window, problem.lhs_shape[1]
        else:
            flops, moved = 2 * problem.macs, prod(problem.lhs_shape)
            passes = 7 if problem.is_weight_gradient else 4  # to gather is slower than to scatter
            width, depth = problem.rhs_shape[0], prod(problem.rhs_shape[1:])
        efficiency = 900 * width // (width + 16) * depth // (depth + 16) + 1
        return Cost(flops, operand_bytes(problem) + passes * moved * size, moved * size, efficiency, kernels=3)

    def run(self, problem: ConvProblem, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        n = problem.spatial_rank
        if _gradient(problem):
            x, g = gradient_operands(problem, lhs, rhs)
            x = _in_patches(problem, x, g.shape[1:-1], problem.output_shape[2:])
            x = x.transpose(0, *range(1, 2 * n, 2), *range(2, 2 * n + 1, 2), 2 * n + 1)
            x, g = x.reshape(prod(g.shape[:-1]), -1), g.reshape(-1, g.shape[-1])
            out = over_rows(problem, x, g)
            return from_gradient(problem, out.reshape(*problem.output_shape[2:], -1, g.shape[-1]))
        x, w = channel_last(problem, lhs, rhs)
        if _forward(problem):
            if problem.reversed:
                w = lax.rev(w, range(n))
            x = _in_patches(problem, x, problem.output_shape[2:], problem.window)
            inside = tuple(range(2, 2 * n + 1, 2))
            axes = ((*inside, 2 * n + 1), tuple(range(n + 1)))
            return from_channel_last(problem, lax.dot_general(x, w, (axes, ((), ())), **options(problem)))
        if not problem.reversed:
            w = lax.rev(w, range(n))
        # lhs[j] lands at out[k j + tau + lo - k + 1], tau counting the window from its end.
        y = lax.dot_general(x, w, (((n + 1,), (n,)), ((), ())), **options(problem))
        y = y.transpose(0, *(a for i in range(n) for a in (1 + i, n + 1 + i)), 2 * n + 1)
        y = y.reshape(y.shape[0], *(j * k for j, k in zip(x.shape[1:-1], problem.window, strict=True)), y.shape[-1])
        low = [lo - k + 1 for (lo, _), k in zip(problem.padding, problem.window, strict=True)]
        return from_channel_last(problem, _fitted(y, low, problem.output_shape[2:]))


def _forward(problem: ConvProblem) -> bool:
    return problem.strides == problem.window and _plain(problem.rhs_dilation) and _plain(problem.lhs_dilation)


def _upward(problem: ConvProblem) -> bool:
    return problem.lhs_dilation == problem.window and _plain(problem.rhs_dilation) and _plain(problem.strides)


def _gradient(problem: ConvProblem) -> bool:
    fits = problem.rhs_dilation == problem.output_shape[2:] and problem.is_weight_gradient
    return fits and _plain(problem.strides) and _plain(problem.lhs_dilation)


def _plain(values: tuple[int, ...]) -> bool:
    return all(v == 1 for v in values)


def _in_patches(problem: ConvProblem, x: jax.Array, counts: tuple[int, ...], sizes: tuple[int, ...]) -> jax.Array:
    """(N, *spatial, C) as (N, count, size, ..., C), padded or cropped to whole patches."""
    low = [lo for lo, _ in problem.padding]
    x = _fitted(x, low, tuple(c * s for c, s in zip(counts, sizes, strict=True)))
    return x.reshape(x.shape[0], *(d for pair in zip(counts, sizes, strict=True) for d in pair), x.shape[-1])


def _fitted(x: jax.Array, low: list[int], sizes: tuple[int, ...]) -> jax.Array:
    """The spatial axes with ``low`` zeros before, and after them what makes them ``sizes`` long."""
    config = [(lo, n - have - lo, 0) for lo, n, have in zip(low, sizes, x.shape[1:-1], strict=True)]
    if not any(any(entry) for entry in config):
        return x
    return lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *config, (0, 0, 0)])
