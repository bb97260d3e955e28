"""``jax.lax``'s convolutions with its exact signatures, and a choice of algorithm."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jconv.convolve import AlgorithmLike, Autodiff, as_operand, convolve
from jconv.errors import ConvError, ConvTypeError
from jconv.planner import Plan, platform_named
from jconv.planner import plan as _plan
from jconv.problem import ConvProblem, canonical_precision, dilated, entries, integer, layout_of, positive_tuple
from jconv.rewrite import problems_of


def conv_general_dilated(
    lhs: Any,
    rhs: Any,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    precision: Any = None,
    preferred_element_type: Any = None,
    out_sharding: Any = None,
    *,
    algorithm: AlgorithmLike = "auto",
    autodiff: Autodiff = "primitive",
) -> jax.Array:
    """General n-dimensional convolution: a drop-in for :func:`jax.lax.conv_general_dilated`.

    Args:
        lhs: array of rank n+2, by default (batch, features, *spatial). float16 to float64,
            bfloat16, complex64/128, or integers.
        rhs: array of rank n+2 and of the same dtype, by default
            (out features, in features / feature_group_count, *window).
        window_strides, padding, lhs_dilation, rhs_dilation, dimension_numbers, feature_group_count,
        batch_group_count, precision, preferred_element_type, out_sharding: as in
            ``jax.lax.conv_general_dilated``.
        algorithm: ``"auto"``, a name such as ``"im2col"``, or an Algorithm. A named one that cannot
            serve this convolution is an error; in derivatives and under ``vmap`` it serves where it can.
        autodiff: ``"primitive"``, or ``"custom_vjp"`` for the same gradients in public JAX API only
            (reverse mode only).

    Returns:
        Array of rank n+2, by default (batch, out features, *spatial), of the operands' dtype or of
        ``preferred_element_type``.

    Raises:
        ConvError: for arguments that describe no convolution.
        AlgorithmError: if the named algorithm cannot serve it; the message quotes its reason.

    >>> x, w = jnp.ones((1, 3, 8, 8)), jnp.ones((4, 3, 3, 3))
    >>> y = conv_general_dilated(x, w, (1, 1), "SAME", algorithm="im2col")
    >>> y.shape, float(y[0, 0, 4, 4])
    ((1, 4, 8, 8), 27.0)
    """
    lhs, rhs = as_operand("lhs", lhs), as_operand("rhs", rhs)
    problem = ConvProblem.of(
        lhs, rhs, window_strides, padding, lhs_dilation, rhs_dilation, dimension_numbers, feature_group_count,
        batch_group_count, precision, preferred_element_type, out_sharding,
    )  # fmt: skip
    return convolve(lhs, rhs, problem, algorithm, autodiff)


def plan(
    lhs: Any,
    rhs: Any,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    precision: Any = None,
    preferred_element_type: Any = None,
    out_sharding: Any = None,
    *,
    platform: str | None = None,
) -> Plan:
    """What ``conv_general_dilated`` with these arguments would run on ``platform``, and why.

    Args:
        lhs, rhs: arrays or ``jax.ShapeDtypeStruct``s; only shapes and dtypes are read.
        window_strides, ..., out_sharding: as in :func:`conv_general_dilated`.
        platform: ``"cpu"``, ``"cuda"``, ``"rocm"`` or ``"tpu"``; by default that of this process.

    Returns:
        A Plan; print it to see candidates, costs and refusals.

    >>> x = jax.ShapeDtypeStruct((1, 56, 56, 64), jnp.float32)
    >>> w = jax.ShapeDtypeStruct((1, 1, 64, 256), jnp.float32)
    >>> p = plan(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), platform="cpu")
    >>> p.algorithm.name
    'pointwise'
    """
    problem = ConvProblem.of(
        lhs, rhs, window_strides, padding, lhs_dilation, rhs_dilation, dimension_numbers, feature_group_count,
        batch_group_count, precision, preferred_element_type, out_sharding,
    )  # fmt: skip
    return _plan(problem, platform_named(platform))


def plans(fn: Callable[..., Any], *args: Any, platform: str | None = None) -> list[Plan]:
    """The plan of every convolution in ``fn(*args)``, in the order of the program; lax's as under ``accelerate``.

    Args:
        fn: a function of arrays, ``jax.grad(loss)`` or a train step among them. Inside ``scan``, ``cond``,
            ``jit`` and the like each convolution counts once. One with ``autodiff="custom_vjp"`` is not seen.
        args: its arguments: pytrees of arrays or ``jax.ShapeDtypeStruct``s, NNX modules among them; one may be ``fn``.
        platform: as in :func:`plan`.

    Returns:
        A list of Plans, each as :func:`plan` gives it; print one to see it.

    >>> x, w = jnp.ones((1, 3, 8, 8)), jnp.ones((4, 3, 3, 3))
    >>> loss = lambda w: conv(x, w, (1, 1), "SAME").sum()
    >>> [p.problem.is_weight_gradient for p in plans(jax.grad(loss), w)]
    [False, True]
    """
    return [_plan(problem, platform_named(platform)) for problem in problems_of(fn, *args)]


def conv(
    lhs: Any,
    rhs: Any,
    window_strides: Sequence[int],
    padding: str,
    precision: Any = None,
    preferred_element_type: Any = None,
    *,
    algorithm: AlgorithmLike = "auto",
    autodiff: Autodiff = "primitive",
) -> jax.Array:
    """:func:`jax.lax.conv`: no dilation, no groups, (N, C, *spatial) and (O, I, *window).

    Args, raises: as in :func:`conv_general_dilated`.

    >>> conv(jnp.ones((1, 2, 5)), jnp.ones((3, 2, 3)), (1,), "VALID").shape
    (1, 3, 3)
    """
    return conv_general_dilated(
        lhs, rhs, window_strides, padding, precision=precision,
        preferred_element_type=preferred_element_type, algorithm=algorithm, autodiff=autodiff,
    )  # fmt: skip


def conv_with_general_padding(
    lhs: Any,
    rhs: Any,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None,
    rhs_dilation: Sequence[int] | None,
    precision: Any = None,
    preferred_element_type: Any = None,
    *,
    algorithm: AlgorithmLike = "auto",
    autodiff: Autodiff = "primitive",
) -> jax.Array:
    """:func:`jax.lax.conv_with_general_padding`: no groups, (N, C, *spatial) and (O, I, *window).

    Args, raises: as in :func:`conv_general_dilated`.

    >>> conv_with_general_padding(jnp.ones((1, 2, 5)), jnp.ones((3, 2, 3)), (1,), [(2, 0)], (1,), (1,)).shape
    (1, 3, 5)
    """
    return conv_general_dilated(
        lhs, rhs, window_strides, padding, lhs_dilation, rhs_dilation, precision=precision,
        preferred_element_type=preferred_element_type, algorithm=algorithm, autodiff=autodiff,
    )  # fmt: skip


_CHANNEL_LAST = {
    2: ("NC", "IO", "NC"),
    3: ("NHC", "HIO", "NHC"),
    4: ("NHWC", "HWIO", "NHWC"),
    5: ("NHWDC", "HWDIO", "NHWDC"),
}


def conv_transpose(
    lhs: Any,
    rhs: Any,
    strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    transpose_kernel: bool = False,
    precision: Any = None,
    preferred_element_type: Any = None,
    use_consistent_padding: bool = False,
    *,
    algorithm: AlgorithmLike = "auto",
    autodiff: Autodiff = "primitive",
) -> jax.Array:
    """:func:`jax.lax.conv_transpose`: a fractionally strided convolution, channel-last by default.

    It is not PyTorch's: the window is not flipped unless ``transpose_kernel``, and integer pairs pad
    the dilated input. For PyTorch's use ``jconv.functional.conv_transpose2d``.

    Args:
        lhs: array of rank n+2, by default (batch, *spatial, features).
        rhs: array of rank n+2, by default (*window, in, out), or with ``transpose_kernel``
            (*window, out, in).
        strides: n integers, the dilation of lhs.
        padding: ``"SAME"``, ``"VALID"`` (of the convolution that this transposes), or n pairs.
        rhs_dilation, dimension_numbers, precision, preferred_element_type: as in
            :func:`conv_general_dilated`.
        transpose_kernel: flip the window and swap its feature axes.
        use_consistent_padding: read pairs, too, as the padding of the convolution that this transposes.

    Raises:
        ConvError: for arguments that describe no convolution.

    >>> conv_transpose(jnp.ones((1, 4, 4, 2)), jnp.ones((3, 3, 2, 5)), (2, 2), "SAME").shape
    (1, 8, 8, 5)
    """
    lhs, rhs = as_operand("lhs", lhs), as_operand("rhs", rhs)
    if lhs.ndim != rhs.ndim:
        raise ConvTypeError(
            f"lhs and rhs need the same number of dimensions, got shapes {lhs.shape} and {rhs.shape}; "
            "add the batch dimension or the missing window dimensions"
        )
    if dimension_numbers is None:
        if lhs.ndim not in _CHANNEL_LAST:
            raise ConvError(
                f"dimension_numbers must be given for operands of rank {lhs.ndim}; ranks 2 to 5 have a default"
            )
        dimension_numbers = _CHANNEL_LAST[lhs.ndim]
    n = lhs.ndim - 2
    layout = layout_of(lhs.shape, rhs.shape, dimension_numbers)
    strides = positive_tuple("strides", strides, n)
    holes = positive_tuple("rhs_dilation", (1,) * n if rhs_dilation is None else rhs_dilation, n)
    window = tuple(rhs.shape[d] for d in layout.rhs_spec[2:])
    if padding in ("SAME", "VALID") or use_consistent_padding:
        each = (padding,) * n if isinstance(padding, str) else entries("padding", padding, n)
        padding = [_transposed_padding(k, s, p) for k, s, p in zip(dilated(window, holes), strides, each, strict=True)]
    if transpose_kernel:
        rhs = jnp.flip(rhs, layout.rhs_spec[2:]).swapaxes(layout.rhs_spec[0], layout.rhs_spec[1])
    return conv_general_dilated(
        lhs, rhs, (1,) * n, padding, strides, holes, layout, precision=precision,
        preferred_element_type=preferred_element_type, algorithm=algorithm, autodiff=autodiff,
    )  # fmt: skip


def conv_general_dilated_patches(
    lhs: Any,
    filter_shape: Sequence[int],
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    precision: Any = None,
    preferred_element_type: Any = None,
    *,
    algorithm: AlgorithmLike = "auto",
    autodiff: Autodiff = "primitive",
) -> jax.Array:
    """:func:`jax.lax.conv_general_dilated_patches`: each window of lhs, flattened into the features.

    The features of the result run over lhs's features, then over the window in the order of rhs's
    spatial axes. For PyTorch's im2col see ``jconv.functional.unfold``.

    Args:
        lhs: array of rank n+2.
        filter_shape: n integers, the window.
        window_strides, ..., preferred_element_type: as in :func:`conv_general_dilated`.

    Returns:
        Array of rank n+2 with ``prod(filter_shape)`` times lhs's features.

    Raises:
        ConvError: for arguments that describe no convolution.

    >>> conv_general_dilated_patches(jnp.ones((1, 2, 5, 5)), (3, 3), (1, 1), "VALID").shape
    (1, 18, 3, 3)
    """
    lhs = as_operand("lhs", lhs)
    window = positive_tuple("filter_shape", filter_shape, max(lhs.ndim - 2, 0))
    layout = layout_of(lhs.shape, (1, 1, *window), dimension_numbers)
    features, taps = lhs.shape[layout.lhs_spec[1]], prod(window)
    kernel = jnp.tile(jnp.eye(taps, dtype=lhs.dtype).reshape(taps, 1, *window), (features,) + (1,) * (1 + len(window)))
    kernel = kernel.transpose(np.argsort(layout.rhs_spec))
    return conv_general_dilated(
        lhs, kernel, window_strides, padding, lhs_dilation, rhs_dilation, layout, features,
        precision=None if precision is None else (precision, lax.Precision.DEFAULT),
        preferred_element_type=preferred_element_type, algorithm=algorithm, autodiff=autodiff,
    )  # fmt: skip


def conv_general_dilated_local(
    lhs: Any,
    rhs: Any,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    filter_shape: Sequence[int],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    precision: Any = None,
    *,
    algorithm: AlgorithmLike = "auto",
    autodiff: Autodiff = "primitive",
) -> jax.Array:
    """:func:`jax.lax.conv_general_dilated_local`: a window of its own at each output position.

    Args:
        lhs: array of rank n+2.
        rhs: array of rank n+2 whose spatial sizes are the output's, and whose input features run over
            lhs's features and then the window.
        filter_shape: n integers, the window.
        window_strides, ..., precision: as in :func:`conv_general_dilated`.

    Returns:
        Array of rank n+2, by default (batch, out features, *spatial).

    Raises:
        ConvError: for arguments that describe no convolution.

    >>> conv_general_dilated_local(jnp.ones((1, 2, 5)), jnp.ones((4, 6, 3)), (1,), "VALID", (3,)).shape
    (1, 4, 3)
    """
    lhs, rhs = as_operand("lhs", lhs), as_operand("rhs", rhs)
    window = positive_tuple("filter_shape", filter_shape, max(lhs.ndim - 2, 0))
    _, rhs_spec, out_spec = layout_of(lhs.shape, rhs.shape, dimension_numbers)
    precision = canonical_precision(precision)
    patches = conv_general_dilated_patches(
        lhs, window, window_strides, padding, lhs_dilation, rhs_dilation, dimension_numbers,
        precision=precision[0] if isinstance(precision, tuple) else precision, algorithm=algorithm, autodiff=autodiff,
    )  # fmt: skip
    pairs = sorted(zip(out_spec[2:], rhs_spec[2:], strict=True))
    for axis, (p, r) in enumerate(zip(out_spec[1:], rhs_spec[1:], strict=True)):
        if patches.shape[p] != rhs.shape[r]:
            what = "input features" if axis == 0 else f"positions along spatial axis {axis - 1}"
            raise ConvError(
                f"rhs needs {patches.shape[p]} {what}, got {rhs.shape[r]} (rhs is {rhs.shape}, the patches are {patches.shape})"
            )
    batch = tuple(p for p, _ in pairs), tuple(r for _, r in pairs)
    out = lax.dot_general(patches, rhs, (((out_spec[1],), (rhs_spec[1],)), batch), precision=precision)
    return jnp.moveaxis(out, (-2, -1), (out_spec[0], out_spec[1]))


def _transposed_padding(extent: int, stride: int, padding: str | tuple[int, int]) -> tuple[int, int]:
    """Padding of the dilated input, from that of the convolution which is transposed."""
    if padding == "SAME":
        total = extent + stride - 2
        low = extent - 1 if stride > extent - 1 else -(-total // 2)
    elif padding == "VALID":
        total, low = extent + stride - 2 + max(extent - stride, 0), extent - 1
    else:
        low, high = (extent - 1 - integer("padding", p, 0) for p in entries("padding of an axis", padding, 2))
        total = low + high
    return low, total - low
