"""The convolution and its transpose over n axes with the kernel in any layout: where PyTorch's functions and
the Flax layers, which differ in that layout only, meet."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jconv.convolve import AlgorithmLike, Autodiff, convolve
from jconv.errors import ConvError
from jconv.functional.arguments import check_dtypes, padding_pairs, per_axis
from jconv.problem import ConvProblem, dilated, integer, is_static

SPATIAL = {1: "W", 2: "HW", 3: "DHW"}
"""The letters of the spatial axes in a data format, by their number."""


def convolution(
    n: int,
    input: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None,
    kernel_format: str,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    data_format: str,
    algorithm: AlgorithmLike,
    autodiff: Autodiff,
    precision: Any,
    preferred_element_type: Any,
) -> jax.Array:
    """The convolution over ``n`` spatial axes, with ``kernel_format`` such as ``"HWIO"``."""
    input, batched = _batched(n, input, data_format)
    groups = integer("groups", groups, 1)
    stride, dilation = per_axis("stride", stride, n, 1), per_axis("dilation", dilation, n, 1)
    window = tuple(kernel.shape[kernel_format.index(c)] for c in SPATIAL[n])
    pads = padding_pairs(padding, n, window, dilation, stride)
    out_features = kernel.shape[kernel_format.index("O")]
    _check_channels(input, data_format, kernel.shape[kernel_format.index("I")] * groups, groups, kernel)
    check_divides("the output channels", out_features, groups)
    _check_bias(bias, out_features)
    check_dtypes(input, weight=kernel, bias=bias)
    sizes = _spatial(input.shape, data_format)
    _check_not_empty(input, kernel)
    extent = dilated(window, dilation)
    for size, reach, (low, high) in zip(sizes, extent, pads, strict=True):
        if is_static(size) and size + low + high < reach:
            raise ConvError(
                f"the kernel, {extent} elements wide with its dilation, is larger than the padded input, "
                f"{tuple(s + lo + hi for s, (lo, hi) in zip(sizes, pads, strict=True))}; pad more or use a smaller kernel"
            )
    problem = ConvProblem.of(
        input, kernel, stride, pads, None, dilation, (data_format, kernel_format, data_format), groups, 1, precision,
        preferred_element_type,
    )  # fmt: skip
    out = add_bias(convolve(input, kernel, problem, algorithm, autodiff), bias, data_format)
    return out if batched else lax.squeeze(out, (0,))


def transposed_convolution(
    n: int,
    input: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None,
    kernel_format: str,
    stride: Any,
    padding: Any,
    output_padding: Any,
    groups: int,
    dilation: Any,
    data_format: str,
    algorithm: AlgorithmLike,
    autodiff: Autodiff,
    precision: Any,
    preferred_element_type: Any,
) -> jax.Array:
    """The transposed convolution with a kernel of (in / groups, out) features in any layout.

    It is a convolution of the input with holes of the stride's width, by the reversed kernel: the
    forward's low padding becomes ``extent - 1 - low`` (``jconv.adjoint`` has the derivation).
    """
    input, batched = _batched(n, input, data_format)
    groups = integer("groups", groups, 1)
    stride, dilation = per_axis("stride", stride, n, 1), per_axis("dilation", dilation, n, 1)
    if isinstance(padding, str):
        raise ConvError(f"padding of a transposed convolution must be an int or {n} ints, got {padding!r}")
    window_axes = tuple(kernel_format.index(c) for c in SPATIAL[n])
    window = tuple(kernel.shape[a] for a in window_axes)
    pads = padding_pairs(padding, n, window, dilation, stride)
    extra = per_axis("output_padding", output_padding, n, 0)
    for e, s, d in zip(extra, stride, dilation, strict=True):
        if e >= s and e >= d:
            raise ConvError(
                f"output_padding must be smaller than the stride or the dilation, got output_padding {extra} "
                f"with stride {stride} and dilation {dilation}"
            )
    out_features = kernel.shape[kernel_format.index("O")]
    _check_channels(input, data_format, kernel.shape[kernel_format.index("I")] * groups, groups, kernel)
    _check_bias(bias, out_features)
    check_dtypes(input, weight=kernel, bias=bias)
    _check_not_empty(input, kernel)
    extent = dilated(window, dilation)
    inner = [(r - 1 - low, r - 1 - high + e) for r, (low, high), e in zip(extent, pads, extra, strict=True)]
    sizes = _spatial(input.shape, data_format)
    results = [
        (size - 1) * s + 1 + low + high - (r - 1)
        for size, s, (low, high), r in zip(sizes, stride, inner, extent, strict=True)
    ]
    if any(is_static(r) and r < 1 for r in results):
        raise ConvError(
            f"the output would have spatial size {tuple(results)} for an input of {sizes}, padding {pads} and a kernel "
            f"of {window}; pad less"
        )
    problem = ConvProblem.of(
        input, kernel, (1,) * n, inner, stride, dilation, (data_format, kernel_format, data_format), groups, 1,
        precision, preferred_element_type,
    ).replace(reversed=True)  # fmt: skip
    out = convolve(input, kernel, problem, algorithm, autodiff)
    out = add_bias(out, bias, data_format)
    return out if batched else lax.squeeze(out, (0,))


def add_bias(out: jax.Array, bias: jax.Array | None, data_format: str) -> jax.Array:
    """``out + bias`` along the feature axis.

    A 16-bit bias is broadcast in float32 and cast after, so that its gradient, which is the transpose
    of these two steps, is summed in float32; a sum of many 16-bit numbers in 16 bits stops growing.
    """
    if bias is None:
        return out
    axis = data_format.index("C")
    wide = bias.astype(jnp.float32) if bias.dtype.itemsize == 2 and jnp.issubdtype(bias.dtype, jnp.floating) else bias
    return out + lax.broadcast_in_dim(wide, out.shape, (axis,)).astype(out.dtype)


def _batched(n: int, input: jax.Array, data_format: str) -> tuple[jax.Array, bool]:
    formats = ("NC" + SPATIAL[n], "N" + SPATIAL[n] + "C")
    if data_format not in formats:
        raise ConvError(f"data_format must be {formats[0]!r} or {formats[1]!r}, got {data_format!r}")
    if input.ndim not in (n + 1, n + 2):
        raise ConvError(
            f"input must have {n + 2} dimensions ({data_format}) or {n + 1} without a batch, got shape {input.shape}"
        )
    return (input, True) if input.ndim == n + 2 else (lax.expand_dims(input, (0,)), False)


def _spatial(shape: tuple[int, ...], data_format: str) -> tuple[int, ...]:
    return tuple(size for size, c in zip(shape, data_format, strict=True) if c not in "NC")


def _check_channels(input: jax.Array, data_format: str, expected: int, groups: int, kernel: jax.Array) -> None:
    channels = input.shape[data_format.index("C")]
    if channels != expected:
        raise ConvError(
            f"input has {channels} channels (shape {input.shape} as {data_format}), but weight of shape {kernel.shape} "
            f"with groups={groups} expects {expected}; " + _layout_hint(input, data_format, expected)
        )


def _layout_hint(input: jax.Array, data_format: str, expected: int) -> str:
    first = data_format.index("C") == 1
    other = -1 if first else 1
    if input.shape[other] != expected:
        return "check groups and data_format"
    kind = "last" if first else "first"
    return f"axis {other % input.ndim} has {expected}: is it channel-{kind}? transpose it or pass its data_format"


def _check_not_empty(input: jax.Array, kernel: jax.Array) -> None:
    """torch's rule: a batch or the input channels may be empty, nothing else."""
    if 0 in kernel.shape[:] and not (kernel.shape.count(0) == 1 and 0 in input.shape):
        raise ConvError(
            f"weight has an empty axis, got shape {kernel.shape}; only a batch or input channels may be empty"
        )


def check_divides(what: str, channels: int, groups: int) -> None:
    if channels % groups != 0:
        raise ConvError(f"groups must divide {what}, got groups={groups} for {channels} channels")


def _check_bias(bias: jax.Array | None, out_features: int) -> None:
    if bias is not None and bias.shape != (out_features,):
        raise ConvError(f"bias must have shape ({out_features},), one for each output channel, got {bias.shape}")
