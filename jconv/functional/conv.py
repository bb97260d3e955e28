"""``conv1d`` to ``conv_transpose3d``, as in ``torch.nn.functional``."""

from __future__ import annotations

from typing import Any, Literal

import jax

from jconv.adjoint import merge_axis, split_axis
from jconv.convolve import AlgorithmLike, Autodiff, as_operand
from jconv.errors import ConvError
from jconv.functional.nd import SPATIAL, check_divides, convolution, transposed_convolution
from jconv.problem import integer


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
    check_divides("the input channels of weight", weight.shape[0], groups)
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
