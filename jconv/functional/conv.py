"""``conv1d`` to ``conv_transpose3d``, as in ``torch.nn.functional``."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

from jconv.adjoint import merge_axis, split_axis
from jconv.convolve import AlgorithmLike, Autodiff, as_operand, convolve
from jconv.errors import ConvError
from jconv.functional.arguments import check_dtypes, padding_pairs, per_axis
from jconv.problem import ConvProblem, dilated, integer, is_static

SPATIAL = {1: "W", 2: "HW", 3: "DHW"}
"""The letters of the spatial axes in a data format, by their number."""


def conv1d(
    input: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    *,
    data_format: Literal["NCW", "NWC"] = "NCW",
    algorithm: AlgorithmLike = "auto",
    autodiff: Autodiff = "primitive",
    precision: Any = None,
    preferred_element_type: Any = None,
) -> jax.Array:
    """:func:`torch.nn.functional.conv1d`. See :func:`conv2d`; shapes lose one spatial axis.

    >>> conv1d(jnp.ones((1, 2, 10)), jnp.ones((4, 2, 3)), padding="same").shape
    (1, 4, 10)
    """
    return _conv(
        1, input, weight, bias, stride, padding, dilation, groups, data_format, algorithm, autodiff, precision,
        preferred_element_type,
    )  # fmt: skip


def conv2d(
    input: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    *,
    data_format: Literal["NCHW", "NHWC"] = "NCHW",
    algorithm: AlgorithmLike = "auto",
    autodiff: Autodiff = "primitive",
    precision: Any = None,
    preferred_element_type: Any = None,
) -> jax.Array:
    """:func:`torch.nn.functional.conv2d`: the same arguments in the same order, the same result.

    Args:
        input: (N, C, H, W), or (C, H, W) without a batch.
        weight: (O, C / groups, kH, kW), of the input's dtype.
        bias: (O,), of the input's dtype, or None.
        stride, dilation: an int or one for each spatial axis, at least 1.
        padding: an int, one for each spatial axis, ``'valid'``, or ``'same'`` (stride 1 only; the odd
            element goes to the high side). Beyond torch: (low, high) pairs, one for each spatial axis.
        groups: divides C and O; ``groups=C`` is depthwise.
        data_format: ``"NHWC"`` for channel-last input and result; the weight stays as it is.
        algorithm, autodiff: as in :func:`jconv.conv_general_dilated`.
        precision, preferred_element_type: as in :func:`jax.lax.conv_general_dilated`.

    Returns:
        (N, O, H', W') with H' = (H + 2 padding - dilation (kH - 1) - 1) // stride + 1, in the input's
        dtype or ``preferred_element_type``.

    Raises:
        ConvError: where torch raises, with both numbers and the remedy.

    >>> conv2d(jnp.ones((1, 3, 8, 8)), jnp.ones((4, 3, 3, 3)), jnp.zeros(4), stride=2, padding=1).shape
    (1, 4, 4, 4)
    """
    return _conv(
        2, input, weight, bias, stride, padding, dilation, groups, data_format, algorithm, autodiff, precision,
        preferred_element_type,
    )  # fmt: skip


def conv3d(
    input: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    *,
    data_format: Literal["NCDHW", "NDHWC"] = "NCDHW",
    algorithm: AlgorithmLike = "auto",
    autodiff: Autodiff = "primitive",
    precision: Any = None,
    preferred_element_type: Any = None,
) -> jax.Array:
    """:func:`torch.nn.functional.conv3d`. See :func:`conv2d`; shapes gain one spatial axis.

    >>> conv3d(jnp.ones((1, 2, 4, 8, 8)), jnp.ones((4, 2, 3, 3, 3)), padding=1).shape
    (1, 4, 4, 8, 8)
    """
    return _conv(
        3, input, weight, bias, stride, padding, dilation, groups, data_format, algorithm, autodiff, precision,
        preferred_element_type,
    )  # fmt: skip


def conv_transpose1d(
    input: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
    *,
    data_format: Literal["NCW", "NWC"] = "NCW",
    algorithm: AlgorithmLike = "auto",
    autodiff: Autodiff = "primitive",
    precision: Any = None,
    preferred_element_type: Any = None,
) -> jax.Array:
    """:func:`torch.nn.functional.conv_transpose1d`. See :func:`conv_transpose2d`.

    >>> conv_transpose1d(jnp.ones((1, 4, 5)), jnp.ones((4, 2, 4)), stride=2, padding=1).shape
    (1, 2, 10)
    """
    return _conv_transpose(
        1, input, weight, bias, stride, padding, output_padding, groups, dilation, data_format, algorithm, autodiff,
        precision, preferred_element_type,
    )  # fmt: skip


def conv_transpose2d(
    input: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
    *,
    data_format: Literal["NCHW", "NHWC"] = "NCHW",
    algorithm: AlgorithmLike = "auto",
    autodiff: Autodiff = "primitive",
    precision: Any = None,
    preferred_element_type: Any = None,
) -> jax.Array:
    """:func:`torch.nn.functional.conv_transpose2d`: the adjoint of :func:`conv2d`.

    Args:
        input: (N, C, H, W), or (C, H, W) without a batch.
        weight: (C, O / groups, kH, kW): torch's order, input features first.
        bias: (O,) or None.
        stride, dilation: an int or one for each spatial axis, at least 1.
        padding: the padding of the convolution that this transposes: an int, one for each spatial axis,
            or, beyond torch, (low, high) pairs.
        output_padding: rows and columns more on the high side, below the stride or the dilation.
        groups: divides C and O.
        data_format, algorithm, autodiff, precision, preferred_element_type: as in :func:`conv2d`.

    Returns:
        (N, O, H', W') with H' = (H - 1) stride - 2 padding + dilation (kH - 1) + output_padding + 1.

    Raises:
        ConvError: where torch raises, with both numbers and the remedy.

    >>> conv_transpose2d(jnp.ones((1, 4, 5, 5)), jnp.ones((4, 2, 3, 3)), stride=2, output_padding=1).shape
    (1, 2, 12, 12)
    """
    return _conv_transpose(
        2, input, weight, bias, stride, padding, output_padding, groups, dilation, data_format, algorithm, autodiff,
        precision, preferred_element_type,
    )  # fmt: skip


def conv_transpose3d(
    input: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
    *,
    data_format: Literal["NCDHW", "NDHWC"] = "NCDHW",
    algorithm: AlgorithmLike = "auto",
    autodiff: Autodiff = "primitive",
    precision: Any = None,
    preferred_element_type: Any = None,
) -> jax.Array:
    """:func:`torch.nn.functional.conv_transpose3d`. See :func:`conv_transpose2d`.

    >>> conv_transpose3d(jnp.ones((1, 4, 2, 5, 5)), jnp.ones((4, 2, 2, 2, 2)), stride=2).shape
    (1, 2, 4, 10, 10)
    """
    return _conv_transpose(
        3, input, weight, bias, stride, padding, output_padding, groups, dilation, data_format, algorithm, autodiff,
        precision, preferred_element_type,
    )  # fmt: skip


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
    """The convolution over ``n`` spatial axes with the kernel in any layout, such as ``"HWIO"``.

    The functions above and the Flax modules, which differ in that layout only, both end here.
    """
    input, batched = _batched(n, input, data_format)
    groups = integer("groups", groups, 1)
    stride, dilation = per_axis("stride", stride, n, 1), per_axis("dilation", dilation, n, 1)
    window = tuple(kernel.shape[kernel_format.index(c)] for c in SPATIAL[n])
    pads = padding_pairs(padding, n, window, dilation, stride)
    out_features = kernel.shape[kernel_format.index("O")]
    _check_channels(input, data_format, kernel.shape[kernel_format.index("I")] * groups, groups, kernel)
    _check_divides("the output channels", out_features, groups)
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
    )  # fmt: skip
    out = convolve(input, lax.rev(kernel, window_axes), problem, algorithm, autodiff)
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


def _conv(
    n: int, input: Any, weight: Any, bias: Any, stride: Any, padding: Any, dilation: Any, groups: int,
    data_format: str, algorithm: AlgorithmLike, autodiff: Autodiff, precision: Any, preferred_element_type: Any,
) -> jax.Array:  # fmt: skip
    input, weight, bias = _operands(n, input, weight, bias)
    return convolution(
        n, input, weight, bias, "OI" + SPATIAL[n], stride, padding, dilation, groups, data_format, algorithm, autodiff,
        precision, preferred_element_type,
    )  # fmt: skip


def _conv_transpose(
    n: int, input: Any, weight: Any, bias: Any, stride: Any, padding: Any, output_padding: Any, groups: int,
    dilation: Any, data_format: str, algorithm: AlgorithmLike, autodiff: Autodiff, precision: Any,
    preferred_element_type: Any,
) -> jax.Array:  # fmt: skip
    input, weight, bias = _operands(n, input, weight, bias)
    groups = integer("groups", groups, 1)
    _check_divides("the input channels of weight", weight.shape[0], groups)
    if groups > 1:
        weight = merge_axis(split_axis(weight, 0, groups), 0, 1)
    return transposed_convolution(
        n, input, weight, bias, "IO" + SPATIAL[n], stride, padding, output_padding, groups, dilation, data_format,
        algorithm, autodiff, precision, preferred_element_type,
    )  # fmt: skip


def _operands(n: int, input: Any, weight: Any, bias: Any) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    input, weight = as_operand("input", input), as_operand("weight", weight)
    if weight.ndim != n + 2:
        raise ConvError(f"weight must have {n + 2} dimensions for {n} spatial ones, got shape {weight.shape}")
    return input, weight, None if bias is None else as_operand("bias", bias)


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


def _check_divides(what: str, channels: int, groups: int) -> None:
    if channels % groups != 0:
        raise ConvError(f"groups must divide {what}, got groups={groups} for {channels} channels")


def _check_bias(bias: jax.Array | None, out_features: int) -> None:
    if bias is not None and bias.shape != (out_features,):
        raise ConvError(f"bias must have shape ({out_features},), one for each output channel, got {bias.shape}")
