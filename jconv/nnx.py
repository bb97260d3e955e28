"""Flax NNX layers: torch.nn's Conv1d to ConvTranspose3d, and drop-ins for Flax's own Conv and ConvTranspose."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp

from jconv import lax as jconv_lax
from jconv import layers
from jconv.convolve import AlgorithmLike, Autodiff
from jconv.errors import ConvError, needs_flax
from jconv.functional.arguments import padding_pairs, per_axis
from jconv.functional.nd import SPATIAL

with needs_flax("jconv.nnx"):
    from flax import nnx
    from flax.nnx.nn.dtypes import promote_dtype
    from flax.nnx.nn.linear import canonicalize_padding

__all__ = [
    "Conv", "Conv1d", "Conv2d", "Conv3d", "ConvTranspose", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d",
]  # fmt: skip

_NOTHING: Mapping[str, Any] = MappingProxyType({})


class _Layer(nnx.Module):
    """What the convolutions and the transposed convolutions of torch.nn have in common."""

    spatial: ClassVar[int]
    transposed: ClassVar[bool]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        for name in ("__init__", "__call__"):
            if cls.__module__ == __name__ and name not in vars(cls):
                setattr(cls, name, layers.renamed(getattr(cls, name), cls.__name__))
        super().__init_subclass__(**kwargs)

    def __init__(
        self, *, in_channels: int, out_channels: int, kernel_size: Any, stride: Any, padding: Any, dilation: Any,
        groups: int, bias: bool, padding_mode: str, data_format: str | None, dtype: Any, param_dtype: Any,
        precision: Any, preferred_element_type: Any, kernel_init: Any, bias_init: Any,
        kernel_metadata: Mapping[str, Any], bias_metadata: Mapping[str, Any], algorithm: AlgorithmLike,
        autodiff: Autodiff, rngs: nnx.Rngs,
    ) -> None:  # fmt: skip
        n = self.spatial
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = per_axis("kernel_size", kernel_size, n, 1)
        self.stride = per_axis("stride", stride, n, 1)
        self.dilation = per_axis("dilation", dilation, n, 1)
        self.padding = (
            padding if isinstance(padding, str)
            else padding_pairs(padding, n, self.kernel_size, self.dilation, self.stride)
        )  # fmt: skip
        self.groups = groups
        self.padding_mode = padding_mode
        self.data_format = "N" + SPATIAL[n] + "C" if data_format is None else data_format
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.precision = precision
        self.preferred_element_type = preferred_element_type
        self.algorithm = algorithm
        self.autodiff = autodiff
        layers.check_layer(self, in_channels)
        default_init = layers.torch_init(self, in_channels)
        shape = layers.kernel_shape(self, in_channels)
        self.kernel = nnx.Param((kernel_init or default_init)(rngs.params(), shape, param_dtype), **kernel_metadata)
        self.bias: nnx.Param[jax.Array] | None = nnx.data(None)
        if bias:
            value = (bias_init or default_init)(rngs.params(), (out_channels,), param_dtype)
            self.bias = nnx.Param(value, **bias_metadata)

    def _operands(self, inputs: Any) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        bias = None if self.bias is None else self.bias[...]
        return promote_dtype((inputs, self.kernel[...], bias), dtype=self.dtype)


class _Conv(_Layer):
    transposed: ClassVar[bool] = False

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: str | int | Sequence[int] | Sequence[tuple[int, int]] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        *,
        data_format: str | None = None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        precision: Any = None,
        preferred_element_type: Any = None,
        kernel_init: Any = None,
        bias_init: Any = None,
        kernel_metadata: Mapping[str, Any] = _NOTHING,
        bias_metadata: Mapping[str, Any] = _NOTHING,
        algorithm: AlgorithmLike = "auto",
        autodiff: Autodiff = "primitive",
        rngs: nnx.Rngs,
    ) -> None:
        super().__init__(
            in_channels=in_channels, out_channels=out_channels, kernel_size=kernel_size, stride=stride,
            padding=padding, dilation=dilation, groups=groups, bias=bias, padding_mode=padding_mode,
            data_format=data_format, dtype=dtype, param_dtype=param_dtype, precision=precision,
            preferred_element_type=preferred_element_type, kernel_init=kernel_init, bias_init=bias_init,
            kernel_metadata=kernel_metadata, bias_metadata=bias_metadata, algorithm=algorithm,
            autodiff=autodiff, rngs=rngs,
        )  # fmt: skip

    def __call__(self, inputs: Any) -> jax.Array:
        """The convolution of ``inputs``; the class describes the shapes."""
        layers.input_channels(self, jnp.shape(inputs))
        return layers.apply_conv(self, *self._operands(inputs))


class _ConvTranspose(_Layer):
    transposed: ClassVar[bool] = True

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] | Sequence[tuple[int, int]] = 0,
        output_padding: int | Sequence[int] = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: int | Sequence[int] = 1,
        padding_mode: str = "zeros",
        *,
        data_format: str | None = None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        precision: Any = None,
        preferred_element_type: Any = None,
        kernel_init: Any = None,
        bias_init: Any = None,
        kernel_metadata: Mapping[str, Any] = _NOTHING,
        bias_metadata: Mapping[str, Any] = _NOTHING,
        algorithm: AlgorithmLike = "auto",
        autodiff: Autodiff = "primitive",
        rngs: nnx.Rngs,
    ) -> None:
        self.output_padding = per_axis("output_padding", output_padding, self.spatial, 0)
        super().__init__(
            in_channels=in_channels, out_channels=out_channels, kernel_size=kernel_size, stride=stride,
            padding=padding, dilation=dilation, groups=groups, bias=bias, padding_mode=padding_mode,
            data_format=data_format, dtype=dtype, param_dtype=param_dtype, precision=precision,
            preferred_element_type=preferred_element_type, kernel_init=kernel_init, bias_init=bias_init,
            kernel_metadata=kernel_metadata, bias_metadata=bias_metadata, algorithm=algorithm,
            autodiff=autodiff, rngs=rngs,
        )  # fmt: skip

    def __call__(self, inputs: Any, output_size: Sequence[int] | None = None) -> jax.Array:
        """The transposed convolution of ``inputs``; the class describes the shapes and ``output_size``."""
        layers.input_channels(self, jnp.shape(inputs))
        return layers.apply_conv_transpose(self, *self._operands(inputs), output_size)


class Conv1d(_Conv):
    """:class:`torch.nn.Conv1d` as an NNX module. See :class:`Conv2d`; shapes lose one spatial axis.

    >>> Conv1d(2, 4, 3, padding="same", rngs=nnx.Rngs(0))(jnp.ones((1, 10, 2))).shape
    (1, 10, 4)
    """

    spatial: ClassVar[int] = 1


class Conv2d(_Conv):
    r""":class:`torch.nn.Conv2d` as an NNX module: its arguments, defaults, initial values and results.

    Two things are Flax's: the data is channel-last, and the parameters are ``kernel``, of shape
    (\*kernel_size, in_channels / groups, out_channels), and ``bias``, of shape (out_channels,) or None.

    Args:
        in_channels, out_channels: multiples of ``groups``.
        kernel_size, stride, dilation: an int or one for each spatial axis, at least 1.
        padding: an int, one for each spatial axis, ``'valid'``, or ``'same'`` (stride 1 only). Beyond
            torch: (low, high) pairs, one for each spatial axis.
        groups: ``groups=in_channels`` is depthwise.
        bias: whether to add one.
        padding_mode: ``"zeros"``, ``"reflect"``, ``"replicate"`` or ``"circular"``.
        data_format: channel-last by default (``"NHWC"``), or ``"NCHW"``; the kernel stays as it is.
        dtype: of the computation; by default the promotion of the input's and the parameters'.
        param_dtype: of the parameters.
        precision, preferred_element_type: as in :func:`jax.lax.conv_general_dilated`.
        kernel_init, bias_init: ``(key, shape, dtype)`` to an array, ``nnx.with_partitioning``'s
            included; by default torch's, uniform within 1 / sqrt(in_channels / groups * kH * kW) of zero.
        kernel_metadata, bias_metadata: keyword arguments of their ``nnx.Param``, such as a sharding.
        algorithm, autodiff: as in :func:`jconv.conv_general_dilated`.
        rngs: its ``params`` stream draws the parameters, the kernel first.

    The call takes (\*batch, H, W, in_channels) with any number of batch dimensions, none included, and
    returns (\*batch, H', W', out_channels) with H' as in :func:`jconv.functional.conv2d`, in the
    computation's dtype or ``preferred_element_type``.

    Raises:
        ConvError: where torch raises, with both numbers and the remedy.

    >>> layer = Conv2d(3, 16, 3, stride=2, padding=1, rngs=nnx.Rngs(0))
    >>> layer.kernel.shape, layer(jnp.ones((8, 32, 32, 3))).shape
    ((3, 3, 3, 16), (8, 16, 16, 16))
    """

    spatial: ClassVar[int] = 2


class Conv3d(_Conv):
    """:class:`torch.nn.Conv3d` as an NNX module. See :class:`Conv2d`; shapes gain one spatial axis.

    >>> Conv3d(2, 4, 3, padding=1, rngs=nnx.Rngs(0))(jnp.ones((1, 4, 8, 8, 2))).shape
    (1, 4, 8, 8, 4)
    """

    spatial: ClassVar[int] = 3


class ConvTranspose1d(_ConvTranspose):
    """:class:`torch.nn.ConvTranspose1d` as an NNX module. See :class:`ConvTranspose2d`.

    >>> ConvTranspose1d(4, 2, 4, stride=2, padding=1, rngs=nnx.Rngs(0))(jnp.ones((1, 5, 4))).shape
    (1, 10, 2)
    """

    spatial: ClassVar[int] = 1


class ConvTranspose2d(_ConvTranspose):
    r""":class:`torch.nn.ConvTranspose2d` as an NNX module: its arguments, defaults, initial values and results.

    As in :class:`Conv2d`, the data is channel-last and the parameters are Flax's: a ``kernel`` of shape
    (\*kernel_size, in_channels / groups, out_channels), not flipped. For torch's weight W it holds
    ``kernel[k, i, g * (out / groups) + o] = W[g * (in / groups) + i, o, k]``.

    Args:
        in_channels, out_channels, kernel_size, stride, groups, bias, dilation: as in :class:`Conv2d`.
        padding: the padding of the convolution that this transposes: an int, one for each spatial axis,
            or, beyond torch, (low, high) pairs.
        output_padding: rows and columns more on the high side, below the stride or the dilation.
        padding_mode: ``"zeros"``, the only one, as in torch.
        data_format, dtype, ..., rngs: as in :class:`Conv2d`, but torch's initial values are uniform
            within 1 / sqrt(out_channels / groups * kH * kW) of zero.

    The call takes (\*batch, H, W, in_channels) with any number of batch dimensions, none included, and
    returns (\*batch, H', W', out_channels) with H' as in :func:`jconv.functional.conv_transpose2d`. Its
    second argument ``output_size``, (H', W') or a whole shape, replaces ``output_padding``.

    Raises:
        ConvError: where torch raises, with both numbers and the remedy.

    >>> layer = ConvTranspose2d(4, 2, 3, stride=2, rngs=nnx.Rngs(0))
    >>> x = jnp.ones((1, 5, 5, 4))
    >>> layer(x).shape, layer(x, output_size=(12, 12)).shape
    ((1, 11, 11, 2), (1, 12, 12, 2))
    """

    spatial: ClassVar[int] = 2


class ConvTranspose3d(_ConvTranspose):
    """:class:`torch.nn.ConvTranspose3d` as an NNX module. See :class:`ConvTranspose2d`.

    >>> ConvTranspose3d(4, 2, 2, stride=2, rngs=nnx.Rngs(0))(jnp.ones((1, 2, 5, 5, 4))).shape
    (1, 4, 10, 10, 2)
    """

    spatial: ClassVar[int] = 3


class Conv(nnx.Conv):
    """:class:`flax.nnx.Conv`, computed by jconv: a model changes one import and keeps its checkpoints.

    Args:
        in_features, ..., bias_metadata: as in ``flax.nnx.Conv``.
        conv_general_dilated: :func:`jconv.conv_general_dilated` by default. To name an algorithm:
            ``functools.partial(jconv.conv_general_dilated, algorithm="im2col")``.

    Raises:
        ConvError: for arguments that describe no convolution; otherwise as ``flax.nnx.Conv``.

    >>> Conv(3, 16, (3, 3), strides=2, rngs=nnx.Rngs(0))(jnp.ones((8, 32, 32, 3))).shape
    (8, 16, 16, 16)
    """

    if not TYPE_CHECKING:  # Flax's own signature, for type checkers by inheritance and for help() by wraps

        @functools.wraps(nnx.Conv.__init__)
        def __init__(self, *args, conv_general_dilated=jconv_lax.conv_general_dilated, **kwargs):
            super().__init__(*args, conv_general_dilated=conv_general_dilated, **kwargs)


class ConvTranspose(nnx.ConvTranspose):
    """:class:`flax.nnx.ConvTranspose`, computed by jconv: a model changes one import and keeps its checkpoints.

    Its arguments, parameters and results are Flax's, which are not torch's; for those see
    :class:`ConvTranspose2d`.

    Args:
        in_features, ..., bias_metadata: as in ``flax.nnx.ConvTranspose``.

    Raises:
        ConvError: for arguments that describe no convolution; otherwise as ``flax.nnx.ConvTranspose``.

    >>> ConvTranspose(4, 2, (3, 3), strides=2, rngs=nnx.Rngs(0))(jnp.ones((1, 5, 5, 4))).shape
    (1, 10, 10, 2)
    """

    def __call__(self, inputs: Any) -> jax.Array:
        r"""The transposed convolution of (\*batch, \*spatial, in_features), with any number of batch dimensions."""
        if self.mask is not None and self.mask.shape != self.kernel_shape:
            raise ConvError(f"mask needs the kernel's shape {self.kernel_shape}, got {self.mask.shape}")
        kernel = self.kernel[...] if self.mask is None else self.kernel[...] * self.mask
        bias = None if self.bias is None else self.bias[...]
        inputs, kernel, bias = self.promote_dtype((inputs, kernel, bias), dtype=self.dtype)
        return layers.apply_flax_conv_transpose(
            inputs,
            kernel,
            bias,
            self.strides,
            canonicalize_padding(self.padding, len(self.kernel_size)),
            self.kernel_dilation,
            self.transpose_kernel,
            self.precision,
            self.preferred_element_type,
        )
