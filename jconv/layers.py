r"""What the layers of ``jconv.nnx`` and ``jconv.linen`` share: everything but the parameters themselves.

The functions read a layer's hyperparameters from its attributes, which have torch.nn's names, and take
its parameters in Flax's layout: a kernel of (\*window, in / groups, out) and a bias of (out,).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod, sqrt
from types import FunctionType
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp

from jconv.errors import ConvError
from jconv.functional.arguments import padding_pairs, per_axis
from jconv.functional.nd import SPATIAL, convolution, transposed_convolution
from jconv.functional.pad import pad_axes
from jconv.lax import conv_transpose
from jconv.planner import named
from jconv.problem import integer


class Layer(Protocol):
    """The hyperparameters of one of torch.nn's convolutions, as the caller gave them or parsed."""

    spatial: ClassVar[int]
    transposed: ClassVar[bool]
    out_channels: Any
    kernel_size: Any
    stride: Any
    padding: Any
    dilation: Any
    groups: Any
    padding_mode: Any
    data_format: Any
    precision: Any
    preferred_element_type: Any
    algorithm: Any
    autodiff: Any


class TransposedLayer(Layer, Protocol):
    """The hyperparameters of one of torch.nn's transposed convolutions."""

    output_padding: Any


def renamed(method: FunctionType, owner: str) -> FunctionType:
    """A copy that is ``owner``'s: Python's errors of wrong arguments name the class that defines a method, and the
    layers of all ranks have theirs from one base."""
    copy = FunctionType(method.__code__, method.__globals__, method.__name__, method.__defaults__, method.__closure__)
    for name in ("__kwdefaults__", "__annotations__", "__doc__", "__module__"):
        setattr(copy, name, getattr(method, name))
    copy.__dict__.update(method.__dict__)
    copy.__qualname__ = f"{owner}.{method.__name__}"
    return copy


def check_layer(layer: Layer, in_channels: int) -> None:
    """Raises a ConvError where torch.nn refuses to build the layer, and for what it could not run with."""
    groups = integer("groups", layer.groups, 1)
    for name, channels in (("in_channels", in_channels), ("out_channels", layer.out_channels)):
        if integer(name, channels, 1) % groups != 0:
            raise ConvError(f"{name} must be divisible by groups, got {name}={channels} with groups={groups}")
    modes = ("zeros",) if layer.transposed else ("zeros", "reflect", "replicate", "circular")
    if layer.padding_mode not in modes:
        raise ConvError(f"padding_mode must be one of {modes}, got {layer.padding_mode!r}")
    if layer.transposed and isinstance(layer.padding, str):
        raise ConvError(f"padding of a transposed convolution must be numbers, got {layer.padding!r}")
    named(layer.algorithm)
    if layer.autodiff not in ("primitive", "custom_vjp"):
        raise ConvError(f"autodiff must be 'primitive' or 'custom_vjp', got {layer.autodiff!r}")
    _pads(layer)
    _spatial_axes(layer)


def input_channels(layer: Layer, shape: Sequence[int]) -> int:
    """How many channels an input of this shape has, after any number of batch dimensions."""
    axes = _spatial_axes(layer)
    if len(shape) < len(axes) + 1:
        raise ConvError(
            f"inputs must have at least {len(axes) + 1} dimensions, those of {layer.data_format} without its batch, "
            f"got shape {tuple(shape)}"
        )
    return shape[-1] if axes[-1] == -2 else shape[axes[0] - 1]


def kernel_shape(layer: Layer, in_channels: int) -> tuple[int, ...]:
    r"""(\*window, in / groups, out)."""
    return (*_window(layer), in_channels // layer.groups, layer.out_channels)


def torch_init(layer: Layer, in_channels: int) -> Callable[..., jax.Array]:
    """torch.nn's initializer of kernel and bias: uniform within 1 / sqrt(fan in) of zero.

    torch writes it ``kaiming_uniform_(a=sqrt(5))`` and reads the fan in from the weight's second axis,
    which for a transposed convolution holds the output channels.
    """
    channels = layer.out_channels if layer.transposed else in_channels
    bound = 1 / sqrt(channels // layer.groups * prod(_window(layer)))

    def init(key: jax.Array, shape: Sequence[int], dtype: Any = jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def apply_conv(layer: Layer, inputs: jax.Array, kernel: jax.Array, bias: jax.Array | None) -> jax.Array:
    """The forward pass of torch.nn's convolutions. The operands have one dtype."""
    n, padding = layer.spatial, layer.padding
    if layer.padding_mode != "zeros":
        pairs = zip(_spatial_axes(layer), _pads(layer), strict=True)
        inputs = pad_axes(inputs, {inputs.ndim + axis: p for axis, p in pairs if p != (0, 0)}, layer.padding_mode)
        padding = 0
    batch, inputs = _flat(inputs, n)
    out = convolution(
        n, inputs, kernel, bias, SPATIAL[n] + "IO", layer.stride, padding, layer.dilation, layer.groups,
        layer.data_format, layer.algorithm, layer.autodiff, layer.precision, layer.preferred_element_type,
    )  # fmt: skip
    return _restored(out, batch)


def apply_conv_transpose(
    layer: TransposedLayer,
    inputs: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None,
    output_size: Sequence[int] | None,
) -> jax.Array:
    """The forward pass of torch.nn's transposed convolutions. The operands have one dtype."""
    n = layer.spatial
    extra = layer.output_padding if output_size is None else _output_padding(layer, inputs.shape, output_size)
    batch, inputs = _flat(inputs, n)
    out = transposed_convolution(
        n, inputs, kernel, bias, SPATIAL[n] + "IO", layer.stride, layer.padding, extra, layer.groups, layer.dilation,
        layer.data_format, layer.algorithm, layer.autodiff, layer.precision, layer.preferred_element_type,
    )  # fmt: skip
    return _restored(out, batch)


def apply_flax_conv_transpose(
    inputs: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None,
    strides: int | Sequence[int] | None,
    padding: Any,
    kernel_dilation: int | Sequence[int] | None,
    transpose_kernel: bool,
    precision: Any,
    preferred_element_type: Any,
) -> jax.Array:
    """The forward pass of Flax's own ConvTranspose. The operands have one dtype; ``padding`` is canonical.

    ``'CIRCULAR'`` is the unpadded result, wrapped around a period of ``size * stride`` and summed.
    """
    n = kernel.ndim - 2
    strides, kernel_dilation = _broadcast(strides, n), _broadcast(kernel_dilation, n)
    circular = padding == "CIRCULAR"
    batch, inputs = _flat(inputs, n)
    out = conv_transpose(
        inputs, kernel, strides, "VALID" if circular else padding, kernel_dilation, transpose_kernel=transpose_kernel,
        precision=precision, preferred_element_type=preferred_element_type,
    )  # fmt: skip
    if circular:
        for axis, stride in enumerate(strides, start=1):
            out = _wrapped(out, axis, inputs.shape[axis] * stride, transpose_kernel)
    if bias is not None:
        out = out + bias.reshape((1,) * (out.ndim - 1) + bias.shape)
    return _restored(out, batch)


def _window(layer: Layer) -> tuple[int, ...]:
    return per_axis("kernel_size", layer.kernel_size, layer.spatial, 1)


def _pads(layer: Layer) -> tuple[tuple[int, int], ...]:
    n = layer.spatial
    stride, dilation = per_axis("stride", layer.stride, n, 1), per_axis("dilation", layer.dilation, n, 1)
    return padding_pairs(layer.padding, n, _window(layer), dilation, stride)


def _spatial_axes(layer: Layer) -> range:
    """Counted from the end, so that batch dimensions do not move them."""
    n = layer.spatial
    axes = {"N" + SPATIAL[n] + "C": range(-n - 1, -1), "NC" + SPATIAL[n]: range(-n, 0)}
    if layer.data_format not in axes:
        raise ConvError(f"data_format must be one of {tuple(axes)}, got {layer.data_format!r}")
    return axes[layer.data_format]


def _output_padding(layer: TransposedLayer, shape: Sequence[int], output_size: Sequence[int]) -> tuple[int, ...]:
    """What ``output_size`` asks for beyond the smallest result: less than one stride."""
    n, axes = layer.spatial, _spatial_axes(layer)
    if not isinstance(output_size, Sequence) or len(output_size) not in (n, len(shape)):
        raise ConvError(
            f"output_size must be {n} integers, or {len(shape)} with batch and channels as the input has them, "
            f"got {output_size!r}"
        )
    wanted = output_size if len(output_size) == n else [output_size[axis] for axis in axes]
    wanted = tuple(integer(f"output_size[{i}]", size, 0) for i, size in enumerate(wanted))
    stride, dilation = per_axis("stride", layer.stride, n, 1), per_axis("dilation", layer.dilation, n, 1)
    smallest = tuple(
        (shape[axis] - 1) * s + d * (k - 1) + 1 - low - high
        for axis, s, d, k, (low, high) in zip(axes, stride, dilation, _window(layer), _pads(layer), strict=True)
    )
    largest = tuple(size + s - 1 for size, s in zip(smallest, stride, strict=True))
    if not all(low <= size <= high for low, size, high in zip(smallest, wanted, largest, strict=True)):
        raise ConvError(
            f"output_size must lie between {smallest} and {largest} for inputs of shape {tuple(shape)}, got {wanted}"
        )
    return tuple(size - low for size, low in zip(wanted, smallest, strict=True))


def _flat(inputs: jax.Array, n: int) -> tuple[tuple[int, ...], jax.Array]:
    """The batch dimensions, and the input with all of them, or none, as one."""
    batch, rest = inputs.shape[: inputs.ndim - n - 1], inputs.shape[inputs.ndim - n - 1 :]
    return batch, inputs if len(batch) == 1 else inputs.reshape(prod(batch), *rest)


def _restored(out: jax.Array, batch: tuple[int, ...]) -> jax.Array:
    return out if len(batch) == 1 else out.reshape(*batch, *out.shape[1:])


def _broadcast(value: int | Sequence[int] | None, n: int) -> tuple[int, ...]:
    return (1 if value is None else value,) * n if value is None or isinstance(value, int) else tuple(value)


def _wrapped(x: jax.Array, axis: int, period: int, transpose_kernel: bool) -> jax.Array:
    """The sum of x's periods along ``axis``, after padding x around its middle to an odd number of them."""
    extra = (period - x.shape[axis]) % (2 * period)
    less, more = extra // 2, extra - extra // 2
    widths = [(0, 0)] * x.ndim
    widths[axis] = (less, more) if transpose_kernel else (more, less)
    x = jnp.pad(x, widths)
    return x.reshape(*x.shape[:axis], x.shape[axis] // period, period, *x.shape[axis + 1 :]).sum(axis)
