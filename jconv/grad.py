"""``torch.nn.grad``: the gradients of the convolutions as functions of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax

from jconv.convolve import AlgorithmLike, Autodiff, as_operand, input_gradient, weight_gradient
from jconv.errors import ConvError
from jconv.functional.arguments import check_dtypes, padding_pairs, per_axis
from jconv.problem import ConvProblem, entries, integer, is_static


def conv1d_input(
    input_size: Sequence[int],
    weight: Any,
    grad_output: Any,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    *,
    algorithm: AlgorithmLike = "auto",
    autodiff: Autodiff = "primitive",
) -> jax.Array:
    """:func:`torch.nn.grad.conv1d_input`. See :func:`conv2d_input`.

    >>> conv1d_input((1, 2, 10), jnp.ones((4, 2, 3)), jnp.ones((1, 4, 8))).shape
    (1, 2, 10)
    """
    return _input(1, input_size, weight, grad_output, stride, padding, dilation, groups, algorithm, autodiff)


def conv1d_weight(
    input: Any,
    weight_size: Sequence[int],
    grad_output: Any,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    *,
    algorithm: AlgorithmLike = "auto",
    autodiff: Autodiff = "primitive",
) -> jax.Array:
    """:func:`torch.nn.grad.conv1d_weight`. See :func:`conv2d_weight`.

    >>> conv1d_weight(jnp.ones((1, 2, 10)), (4, 2, 3), jnp.ones((1, 4, 8))).shape
    (4, 2, 3)
    """
    return _weight(1, input, weight_size, grad_output, stride, padding, dilation, groups, algorithm, autodiff)


def conv2d_input(
    input_size: Sequence[int],
    weight: Any,
    grad_output: Any,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    *,
    algorithm: AlgorithmLike = "auto",
    autodiff: Autodiff = "primitive",
) -> jax.Array:
    """:func:`torch.nn.grad.conv2d_input`: the gradient of conv2d with respect to its input.

    Args:
        input_size: the shape (N, C, H, W) of the input.
        weight: (O, C / groups, kH, kW).
        grad_output: the gradient with respect to the result, (N, O, H', W').
        stride, padding, dilation, groups, algorithm, autodiff: as in :func:`jconv.functional.conv2d`.

    Returns:
        An array of shape ``input_size``.

    Raises:
        ConvError: where the shapes do not belong to one convolution.

    >>> conv2d_input((1, 3, 8, 8), jnp.ones((4, 3, 3, 3)), jnp.ones((1, 4, 6, 6))).shape
    (1, 3, 8, 8)
    """
    return _input(2, input_size, weight, grad_output, stride, padding, dilation, groups, algorithm, autodiff)


def conv2d_weight(
    input: Any,
    weight_size: Sequence[int],
    grad_output: Any,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    *,
    algorithm: AlgorithmLike = "auto",
    autodiff: Autodiff = "primitive",
) -> jax.Array:
    """:func:`torch.nn.grad.conv2d_weight`: the gradient of conv2d with respect to its weight.

    Args:
        input: (N, C, H, W).
        weight_size: the shape (O, C / groups, kH, kW) of the weight.
        grad_output: the gradient with respect to the result, (N, O, H', W').
        stride, padding, dilation, groups, algorithm, autodiff: as in :func:`jconv.functional.conv2d`.

    Returns:
        An array of shape ``weight_size``.

    Raises:
        ConvError: where the shapes do not belong to one convolution.

    >>> conv2d_weight(jnp.ones((1, 3, 8, 8)), (4, 3, 3, 3), jnp.ones((1, 4, 6, 6))).shape
    (4, 3, 3, 3)
    """
    return _weight(2, input, weight_size, grad_output, stride, padding, dilation, groups, algorithm, autodiff)


def conv3d_input(
    input_size: Sequence[int],
    weight: Any,
    grad_output: Any,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    *,
    algorithm: AlgorithmLike = "auto",
    autodiff: Autodiff = "primitive",
) -> jax.Array:
    """:func:`torch.nn.grad.conv3d_input`. See :func:`conv2d_input`.

    >>> conv3d_input((1, 2, 4, 4, 4), jnp.ones((4, 2, 2, 2, 2)), jnp.ones((1, 4, 3, 3, 3))).shape
    (1, 2, 4, 4, 4)
    """
    return _input(3, input_size, weight, grad_output, stride, padding, dilation, groups, algorithm, autodiff)


def conv3d_weight(
    input: Any,
    weight_size: Sequence[int],
    grad_output: Any,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    *,
    algorithm: AlgorithmLike = "auto",
    autodiff: Autodiff = "primitive",
) -> jax.Array:
    """:func:`torch.nn.grad.conv3d_weight`. See :func:`conv2d_weight`.

    >>> conv3d_weight(jnp.ones((1, 2, 4, 4, 4)), (4, 2, 2, 2, 2), jnp.ones((1, 4, 3, 3, 3))).shape
    (4, 2, 2, 2, 2)
    """
    return _weight(3, input, weight_size, grad_output, stride, padding, dilation, groups, algorithm, autodiff)


def _input(
    n: int, input_size: Any, weight: Any, grad_output: Any, stride: Any, padding: Any, dilation: Any, groups: int,
    algorithm: AlgorithmLike, autodiff: Autodiff,
) -> jax.Array:  # fmt: skip
    weight, grad = as_operand("weight", weight), as_operand("grad_output", grad_output)
    check_dtypes(grad, weight=weight)
    input = jax.ShapeDtypeStruct(_shape("input_size", input_size, n), grad.dtype)
    return input_gradient(
        grad, weight, _forward(n, input, weight, grad, stride, padding, dilation, groups), algorithm, autodiff
    )


def _weight(
    n: int, input: Any, weight_size: Any, grad_output: Any, stride: Any, padding: Any, dilation: Any, groups: int,
    algorithm: AlgorithmLike, autodiff: Autodiff,
) -> jax.Array:  # fmt: skip
    input, grad = as_operand("input", input), as_operand("grad_output", grad_output)
    check_dtypes(input, grad_output=grad)
    weight = jax.ShapeDtypeStruct(_shape("weight_size", weight_size, n), grad.dtype)
    return weight_gradient(
        input, grad, _forward(n, input, weight, grad, stride, padding, dilation, groups), algorithm, autodiff
    )


def _shape(name: str, size: Any, n: int) -> tuple[int, ...]:
    sizes = entries(name, size, n + 2)
    return tuple(integer(f"{name}[{i}]", s, 0) if is_static(s) else s for i, s in enumerate(sizes))


def _forward(
    n: int, input: Any, weight: Any, grad: Any, stride: Any, padding: Any, dilation: Any, groups: int
) -> ConvProblem:
    """The convolution whose gradient is asked for; it must have a result of the gradient's shape."""
    stride, dilation = per_axis("stride", stride, n, 1), per_axis("dilation", dilation, n, 1)
    for name, operand in (("weight", weight), ("input", input)):
        if len(operand.shape) != n + 2:
            raise ConvError(f"{name} must have {n + 2} dimensions, got shape {tuple(operand.shape)}")
    pads = padding_pairs(padding, n, weight.shape[2:], dilation, stride)
    groups = integer("groups", groups, 1)
    problem = ConvProblem.of(input, weight, stride, pads, None, dilation, None, groups)
    if problem.output_shape != grad.shape:
        raise ConvError(
            f"grad_output must have the shape {problem.output_shape} of the convolution's result, got {grad.shape}"
        )
    return problem
