"""Large depthwise windows by the convolution theorem: FFT(y) = FFT(x) conj(FFT(w)).

A correlation of a signal of P samples with a window of R is a circular one of any length L >= P, read at its
first P - R + 1 outputs, which do not wrap. A kernel gradient is the same correlation of the input with the
output's gradient, summed over the images before it is transformed back. A signal much longer than
its window is cut into blocks of 4 R outputs that each read R - 1 samples more (overlap-save).

The error is relative to the largest value of the signal: beside a value of 1e6, what should be small is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jconv.algorithms.base import Accuracy, Cost, inverse, operand_bytes, refuse_unsized, strided
from jconv.device import Device
from jconv.problem import ConvProblem


@dataclass(frozen=True)
class Fft:
    """Depthwise convolutions of 1 to 3 axes in the frequency domain; work that does not grow with the window."""

    name: str = "fft"
    accuracy: Accuracy = "bounded"

    def why_not(self, problem: ConvProblem) -> str | None:
        depthwise = _is_gradient(problem) or problem.is_depthwise
        if not depthwise:
            return f"needs one input feature a group, got {problem.rhs_shape[1]}"
        if problem.dtype not in (np.float32, np.float64):
            return f"needs real floats of 32 or 64 bits, got {problem.dtype}"
        if problem.preferred_element_type is not None:
            return f"needs results in the operands' dtype, got preferred_element_type {problem.preferred_element_type}"
        if any(d > 1 for d in problem.lhs_dilation):
            return f"needs an input without holes, got lhs_dilation {problem.lhs_dilation}"
        if not 1 <= problem.spatial_rank <= 3:
            return f"needs one to three spatial axes, got {problem.spatial_rank}"
        return refuse_unsized(problem)

    def cost(self, problem: ConvProblem, device: Device) -> Cost:
        gradient, (blocks, lengths) = _is_gradient(problem), _lengths(problem)
        points, levels = prod(lengths), sum(n.bit_length() for n in lengths)
        images, features = problem.lhs_shape[:2]
        signals = images * features * blocks
        kernels = signals if gradient else problem.rhs_shape[0]
        results = features if gradient else problem.lhs_shape[0] * problem.rhs_shape[0] * blocks
        flops = (signals + kernels + results) * 5 * points * levels // 2
        stored = (signals + kernels + results) * points * problem.dtype.itemsize
        return Cost(flops, operand_bytes(problem) + 4 * stored, stored, 1000, "fft", 8)

    def run(self, problem: ConvProblem, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        n, (blocks, lengths) = problem.spatial_rank, _lengths(problem)
        lhs_spec, rhs_spec, out_spec = problem.layout
        axes = tuple(range(2, n + 2))
        if not _is_gradient(problem) and any(s > 1 for s in problem.strides):
            every = self.run(problem.replace(strides=(1,) * n), lhs, rhs)
            return strided(every, out_spec[2:], (0,) * n, problem.output_shape[2:], problem.strides)
        if problem.reversed:
            rhs = lax.rev(rhs, rhs_spec[2:])
        zero = jnp.zeros((), lhs.dtype)
        w = lax.pad(rhs.transpose(rhs_spec), zero, [(0, 0, 0)] * 2 + [(0, 0, d - 1) for d in problem.rhs_dilation])
        x = lax.pad(lhs.transpose(lhs_spec), zero, [(0, 0, 0)] * 2 + [(*p, 0) for p in problem.padding])
        if _is_gradient(problem):
            x, w = jnp.swapaxes(x, 0, 1), jnp.swapaxes(w, 0, 1)  # (images, features, *spatial)
            product = (_transform(x, lengths) * jnp.conj(_transform(w, lengths))).sum(0)
            out = lax.fft(product, "IRFFT", lengths)
            keep = [
                slice(0, (o - 1) * s + 1, s) for o, s in zip(problem.output_shape[2:], problem.strides, strict=True)
            ]
            return out[(None, slice(None), *keep)].transpose(inverse(out_spec))
        positions, groups = problem.output_shape[2:], problem.feature_groups
        if blocks > 1:
            step = -(-positions[0] // blocks)
            reach = step + problem.rhs_extent[0] - 1
            x = lax.pad(x, zero, [(0, 0, 0)] * 2 + [(0, max(0, (blocks - 1) * step + reach - x.shape[2]), 0)])
            x = jnp.stack([x[:, :, b * step : b * step + reach] for b in range(blocks)], 2)
            w, positions = w[:, :, None], (step,)
            axes = (3,)
        data, kernel = _transform(x, lengths)[:, :, None], jnp.conj(_transform(w, lengths))
        product = data * kernel.reshape(1, groups, -1, *kernel.shape[2:])
        product = product.reshape(x.shape[0], problem.rhs_shape[0], *product.shape[3:])
        out = lax.fft(product, "IRFFT", lengths)
        for axis, size in zip(axes, positions, strict=True):
            out = lax.slice_in_dim(out, 0, size, axis=axis)
        if blocks > 1:
            out = out.reshape(*out.shape[:2], -1)[..., : problem.output_shape[2]]
        return out.transpose(inverse(out_spec))


def _is_gradient(problem: ConvProblem) -> bool:
    """Whether this is a depthwise kernel gradient: one feature of each operand a group."""
    one_each = problem.lhs_shape[0] == problem.rhs_shape[0] == problem.batch_groups > 1
    return problem.is_weight_gradient and one_each


def _lengths(problem: ConvProblem) -> tuple[int, tuple[int, ...]]:
    """Blocks along the axis (of 1-D signals), and the length of each transform."""
    window, outputs = problem.rhs_extent[0], problem.output_shape[2]
    if problem.spatial_rank == 1 and not _is_gradient(problem) and outputs > 8 * window:
        blocks = -(-outputs // (4 * window))
        return blocks, (_smooth(-(-outputs // blocks) + window - 1),)
    return 1, tuple(map(_smooth, problem.padded))


def _smooth(n: int) -> int:
    """The next length without a prime factor above 5, and even, which real transforms like."""
    return next(m for m in range(n + n % 2, 2 * n + 3, 2) if 30**30 % m == 0)


def _transform(x: jax.Array, lengths: Sequence[int]) -> jax.Array:
    """The real FFT over the last axes, padded with zeros to ``lengths``."""
    first = x.ndim - len(lengths)
    config = [(0, 0, 0)] * first + [(0, n - x.shape[first + i], 0) for i, n in enumerate(lengths)]
    return lax.fft(lax.pad(x, jnp.zeros((), x.dtype), config), "RFFT", tuple(lengths))
