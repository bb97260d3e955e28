"""Flax Linen layers: torch.nn's Conv1d to ConvTranspose3d, and drop-ins for Flax's own Conv and ConvTranspose."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jconv import lax as jconv_lax
from jconv import layers
from jconv.convolve import AlgorithmLike, Autodiff
from jconv.errors import ConvError, needs_flax

with needs_flax("jconv.linen"):
    from flax import linen as nn
    from flax.linen.dtypes import promote_dtype
    from flax.linen.linear import canonicalize_padding

__all__ = [
    "Conv", "Conv1d", "Conv2d", "Conv3d", "ConvTranspose", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d",
]  # fmt: skip


class _Layer(nn.Module):
    """What gives a layer a ``__call__`` of its own."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        if cls.__module__ == __name__ and hasattr(cls, "spatial"):
            cls.__call__ = layers.renamed(inspect.unwrap(cls.__call__), cls.__name__)  # before Flax wraps it anew
        super().__init_subclass__(**kwargs)


class _Conv(_Layer):
    spatial: ClassVar[int]
    transposed: ClassVar[bool] = False

    out_channels: int
    kernel_size: int | Sequence[int]
    stride: int | Sequence[int] = 1
    padding: str | int | Sequence[int] | Sequence[tuple[int, int]] = 0
    dilation: int | Sequence[int] = 1
    groups: int = 1
    bias: bool = True
    padding_mode: str = "zeros"
    data_format: str = "NHWC"
    dtype: Any = None
    param_dtype: Any = jnp.float32
    precision: Any = None
    preferred_element_type: Any = None
    kernel_init: Any = None
    bias_init: Any = None
    algorithm: AlgorithmLike = "auto"
    autodiff: Autodiff = "primitive"

    @nn.compact
    def __call__(self, inputs: Any) -> jax.Array:
        """The convolution of ``inputs``; the class describes the shapes."""
        return layers.apply_conv(self, *_operands(self, inputs))


class _ConvTranspose(_Layer):
    spatial: ClassVar[int]
    transposed: ClassVar[bool] = True

    out_channels: int
    kernel_size: int | Sequence[int]
    stride: int | Sequence[int] = 1
    padding: int | Sequence[int] | Sequence[tuple[int, int]] = 0
    output_padding: int | Sequence[int] = 0
    groups: int = 1
    bias: bool = True
    dilation: int | Sequence[int] = 1
    padding_mode: str = "zeros"
    data_format: str = "NHWC"
    dtype: Any = None
    param_dtype: Any = jnp.float32
    precision: Any = None
    preferred_element_type: Any = None
    kernel_init: Any = None
    bias_init: Any = None
    algorithm: AlgorithmLike = "auto"
    autodiff: Autodiff = "primitive"

    @nn.compact
    def __call__(self, inputs: Any, output_size: Sequence[int] | None = None) -> jax.Array:
        """The transposed convolution of ``inputs``; the class describes the shapes and ``output_size``."""
        return layers.apply_conv_transpose(self, *_operands(self, inputs), output_size)


def _operands(layer: _Conv | _ConvTranspose, inputs: Any) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """The input and the parameters, which the first call creates for the input's channels, in one dtype."""
    in_channels = layers.input_channels(layer, jnp.shape(inputs))
    layers.check_layer(layer, in_channels)
    default_init = layers.torch_init(layer, in_channels)
    shape = layers.kernel_shape(layer, in_channels)
    if layer.has_variable("params", "kernel"):
        found = jnp.shape(nn.unbox(layer.get_variable("params", "kernel")))
        if found != shape:
            raise ConvError(
                f"the kernel has shape {found}, but an input of {in_channels} channels needs {shape}; "
                "initialise the layer again or check data_format"
            )
    kernel = layer.param("kernel", layer.kernel_init or default_init, shape, layer.param_dtype)
    bias = None
    if layer.bias:
        bias = layer.param("bias", layer.bias_init or default_init, (layer.out_channels,), layer.param_dtype)
    inputs, kernel, bias = promote_dtype(inputs, kernel, bias, dtype=layer.dtype)
    return inputs, kernel, bias


class Conv1d(_Conv):
    """:class:`torch.nn.Conv1d` as a Linen module. See :class:`Conv2d`; shapes lose one spatial axis.

    >>> y, _ = Conv1d(4, 3, padding="same").init_with_output(jax.random.key(0), jnp.ones((1, 10, 2)))
    >>> y.shape
    (1, 10, 4)
    """

    spatial: ClassVar[int] = 1
    data_format: str = "NWC"


class Conv2d(_Conv):
    r""":class:`torch.nn.Conv2d` as a Linen module: its arguments, defaults, initial values and results.

    The first call reads the number of input channels, as torch.nn.LazyConv2d does. Two things are
    Flax's: the data is channel-last, and the parameters are ``kernel``, of shape
    (\*kernel_size, in_channels / groups, out_channels), and ``bias``, of shape (out_channels,).

    Args:
        out_channels: a multiple of ``groups``, as the input's channels are.
        kernel_size, stride, dilation: an int or one for each spatial axis, at least 1.
        padding: an int, one for each spatial axis, ``'valid'``, or ``'same'`` (stride 1 only). Beyond
            torch: (low, high) pairs, one for each spatial axis.
        groups: as many as there are input channels is depthwise.
        bias: whether to add one.
        padding_mode: ``"zeros"``, ``"reflect"``, ``"replicate"`` or ``"circular"``.
        data_format: ``"NHWC"`` or ``"NCHW"``; the kernel stays as it is.
        dtype: of the computation; by default the promotion of the input's and the parameters'.
        param_dtype: of the parameters.
        precision, preferred_element_type: as in :func:`jax.lax.conv_general_dilated`.
        kernel_init, bias_init: ``(key, shape, dtype)`` to an array, ``nn.with_partitioning``'s
            included; by default torch's, uniform within 1 / sqrt(in_channels / groups * kH * kW) of zero.
        algorithm, autodiff: as in :func:`jconv.conv_general_dilated`.

    The call takes (\*batch, H, W, in_channels) with any number of batch dimensions, none included, and
    returns (\*batch, H', W', out_channels) with H' as in :func:`jconv.functional.conv2d`, in the
    computation's dtype or ``preferred_element_type``.

    Raises:
        ConvError: at the call, where torch raises, with both numbers and the remedy.

    >>> layer = Conv2d(16, 3, stride=2, padding=1)
    >>> y, variables = layer.init_with_output(jax.random.key(0), jnp.ones((8, 32, 32, 3)))
    >>> variables["params"]["kernel"].shape, y.shape
    ((3, 3, 3, 16), (8, 16, 16, 16))
    """

    spatial: ClassVar[int] = 2
    data_format: str = "NHWC"


class Conv3d(_Conv):
    """:class:`torch.nn.Conv3d` as a Linen module. See :class:`Conv2d`; shapes gain one spatial axis.

    >>> y, _ = Conv3d(4, 3, padding=1).init_with_output(jax.random.key(0), jnp.ones((1, 4, 8, 8, 2)))
    >>> y.shape
    (1, 4, 8, 8, 4)
    """

    spatial: ClassVar[int] = 3
    data_format: str = "NDHWC"


class ConvTranspose1d(_ConvTranspose):
    """:class:`torch.nn.ConvTranspose1d` as a Linen module. See :class:`ConvTranspose2d`.

    >>> layer = ConvTranspose1d(2, 4, stride=2, padding=1)
    >>> layer.init_with_output(jax.random.key(0), jnp.ones((1, 5, 4)))[0].shape
    (1, 10, 2)
    """

    spatial: ClassVar[int] = 1
    data_format: str = "NWC"


class ConvTranspose2d(_ConvTranspose):
    r""":class:`torch.nn.ConvTranspose2d` as a Linen module: its arguments, defaults, initial values and results.

    As in :class:`Conv2d`, the first call reads the number of input channels, the data is channel-last
    and the parameters are Flax's: a ``kernel`` of shape (\*kernel_size, in_channels / groups,
    out_channels), not flipped. For torch's weight W it holds
    ``kernel[k, i, g * (out / groups) + o] = W[g * (in / groups) + i, o, k]``.

    Args:
        out_channels, kernel_size, stride, groups, bias, dilation: as in :class:`Conv2d`.
        padding: the padding of the convolution that this transposes: an int, one for each spatial axis,
            or, beyond torch, (low, high) pairs.
        output_padding: rows and columns more on the high side, below the stride or the dilation.
        padding_mode: ``"zeros"``, the only one, as in torch.
        data_format, dtype, ..., autodiff: as in :class:`Conv2d`, but torch's initial values are uniform
            within 1 / sqrt(out_channels / groups * kH * kW) of zero.

    The call takes (\*batch, H, W, in_channels) with any number of batch dimensions, none included, and
    returns (\*batch, H', W', out_channels) with H' as in :func:`jconv.functional.conv_transpose2d`. Its
    second argument ``output_size``, (H', W') or a whole shape, replaces ``output_padding``.

    Raises:
        ConvError: at the call, where torch raises, with both numbers and the remedy.

    >>> layer, x = ConvTranspose2d(2, 3, stride=2), jnp.ones((1, 5, 5, 4))
    >>> y, variables = layer.init_with_output(jax.random.key(0), x)
    >>> y.shape, layer.apply(variables, x, output_size=(12, 12)).shape
    ((1, 11, 11, 2), (1, 12, 12, 2))
    """

    spatial: ClassVar[int] = 2
    data_format: str = "NHWC"


class ConvTranspose3d(_ConvTranspose):
    """:class:`torch.nn.ConvTranspose3d` as a Linen module. See :class:`ConvTranspose2d`.

    >>> layer = ConvTranspose3d(2, 2, stride=2)
    >>> layer.init_with_output(jax.random.key(0), jnp.ones((1, 2, 5, 5, 4)))[0].shape
    (1, 4, 10, 10, 2)
    """

    spatial: ClassVar[int] = 3
    data_format: str = "NDHWC"


class Conv(nn.Conv):
    """:class:`flax.linen.Conv`, computed by jconv: a model changes one import and keeps its checkpoints.

    Args:
        features, ..., conv_general_dilated_cls: as in ``flax.linen.Conv``.
        conv_general_dilated: :func:`jconv.conv_general_dilated` by default. To name an algorithm:
            ``functools.partial(jconv.conv_general_dilated, algorithm="im2col")``.

    Raises:
        ConvError: for arguments that describe no convolution; otherwise as ``flax.linen.Conv``.

    >>> y, _ = Conv(16, (3, 3), strides=2).init_with_output(jax.random.key(0), jnp.ones((8, 32, 32, 3)))
    >>> y.shape
    (8, 16, 16, 16)
    """

    conv_general_dilated: Any = jconv_lax.conv_general_dilated


class ConvTranspose(nn.ConvTranspose):
    r""":class:`flax.linen.ConvTranspose`, computed by jconv: a model changes one import and keeps its checkpoints.

    Its arguments, parameters and results are Flax's, which are not torch's; for those see
    :class:`ConvTranspose2d`.

    Args:
        features, ..., preferred_element_type: as in ``flax.linen.ConvTranspose``.

    Raises:
        ConvError: for arguments that describe no convolution; otherwise as ``flax.linen.ConvTranspose``.

    >>> y, _ = ConvTranspose(2, (3, 3), strides=(2, 2)).init_with_output(jax.random.key(0), jnp.ones((1, 5, 5, 4)))
    >>> y.shape
    (1, 10, 10, 2)
    """

    @nn.compact
    def __call__(self, inputs: Any) -> jax.Array:
        r"""The transposed convolution of (\*batch, \*spatial, features), with any number of batch dimensions."""
        window = (self.kernel_size,) if isinstance(self.kernel_size, int) else tuple(self.kernel_size)
        features = (jnp.shape(inputs)[-1], self.features)
        shape = (*window, *reversed(features)) if self.transpose_kernel else (*window, *features)
        if self.mask is not None and self.mask.shape != shape:
            raise ConvError(f"mask needs the kernel's shape {shape}, got {self.mask.shape}")
        kernel = self.param("kernel", self.kernel_init, shape, self.param_dtype)
        if self.mask is not None:
            kernel = kernel * self.mask
        bias = self.param("bias", self.bias_init, (self.features,), self.param_dtype) if self.use_bias else None
        inputs, kernel, bias = self.promote_dtype(inputs, kernel, bias, dtype=self.dtype)
        return layers.apply_flax_conv_transpose(
            inputs,
            kernel,  # pyright: ignore[reportArgumentType]
            bias,
            self.strides,
            canonicalize_padding(self.padding, len(window)),
            self.kernel_dilation,
            self.transpose_kernel,
            self.precision,
            self.preferred_element_type,
        )
