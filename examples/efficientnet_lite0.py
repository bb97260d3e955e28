"""EfficientNet-Lite0 in Flax NNX, of jconv's modules or of Flax's own, and in plain PyTorch functions.

The attribute names are those of the PyTorch model whose weights are loaded (its leading underscores
apart), so that ``jconv.interop.load_torch`` maps them by structure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

import jconv.nnx as jnn

IMAGE_SIZE = 224
EPSILON = 1e-3


class Stage(NamedTuple):
    repeats: int
    kernel: int
    stride: int
    expand: int
    out_channels: int


STAGES = (
    Stage(1, 3, 1, 1, 16),
    Stage(2, 3, 2, 6, 24),
    Stage(2, 5, 2, 6, 40),
    Stage(3, 3, 2, 6, 80),
    Stage(3, 5, 1, 6, 112),
    Stage(4, 5, 2, 6, 192),
    Stage(1, 3, 1, 6, 320),
)


class Block(NamedTuple):
    """One inverted residual block, with TensorFlow's 'same' padding for its image size written out."""

    stage: int
    in_channels: int
    out_channels: int
    expand: int
    kernel: int
    stride: int
    padding: tuple[int, int]


def same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """(low, high) such that the result has ceil(size / stride) elements; the odd one goes to the high side."""
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


def blocks() -> Iterator[Block]:
    channels, size = 32, IMAGE_SIZE // 2
    for index, stage in enumerate(STAGES):
        for repeat in range(stage.repeats):
            stride = stage.stride if repeat == 0 else 1
            padding = same_padding(size, stage.kernel, stride)
            yield Block(index, channels, stage.out_channels, stage.expand, stage.kernel, stride, padding)
            channels, size = stage.out_channels, -(-size // stride)


def jconv_conv(ci: int, co: int, kernel: int, stride: int, padding: tuple[int, int], groups: int, rngs: nnx.Rngs):
    return jnn.Conv2d(ci, co, kernel, stride, padding=(padding, padding), groups=groups, bias=False, rngs=rngs)


def flax_conv(ci: int, co: int, kernel: int, stride: int, padding: tuple[int, int], groups: int, rngs: nnx.Rngs):
    return nnx.Conv(
        ci, co, (kernel, kernel), stride, padding=(padding, padding), feature_group_count=groups, use_bias=False,
        rngs=rngs,
    )  # fmt: skip


def batch_norm(channels: int, rngs: nnx.Rngs) -> nnx.BatchNorm:
    return nnx.BatchNorm(channels, use_running_average=True, epsilon=EPSILON, rngs=rngs)


class InvertedResidual(nnx.Module):
    def __init__(self, block: Block, conv: Callable[..., nnx.Module], rngs: nnx.Rngs):
        wide = block.in_channels * block.expand
        self.expands = block.expand != 1
        self.skips = block.stride == 1 and block.in_channels == block.out_channels
        if self.expands:
            self.expand_conv = conv(block.in_channels, wide, 1, 1, (0, 0), 1, rngs)
            self.bn0 = batch_norm(wide, rngs)
        self.depthwise_conv = conv(wide, wide, block.kernel, block.stride, block.padding, wide, rngs)
        self.bn1 = batch_norm(wide, rngs)
        self.project_conv = conv(wide, block.out_channels, 1, 1, (0, 0), 1, rngs)
        self.bn2 = batch_norm(block.out_channels, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = nnx.relu6(self.bn0(self.expand_conv(x))) if self.expands else x
        y = nnx.relu6(self.bn1(self.depthwise_conv(y)))
        y = self.bn2(self.project_conv(y))
        return x + y if self.skips else y


class EfficientNetLite0(nnx.Module):
    """Images (N, 224, 224, 3), scaled by :func:`normalise`, to logits (N, 1000).

    Args:
        conv: makes a convolution, :func:`jconv_conv` or :func:`flax_conv`.
    """

    def __init__(self, conv: Callable[..., nnx.Module] = jconv_conv, *, rngs: nnx.Rngs):
        self.conv_stem = conv(3, 32, 3, 2, same_padding(IMAGE_SIZE, 3, 2), 1, rngs)
        self.bn0 = batch_norm(32, rngs)
        self.blocks = nnx.List([InvertedResidual(block, conv, rngs) for block in blocks()])
        self.conv_head = conv(320, 1280, 1, 1, (0, 0), 1, rngs)
        self.bn1 = batch_norm(1280, rngs)
        self.fc = nnx.Linear(1280, 1000, rngs=rngs)

    def stages(self, x: jax.Array) -> dict[str, jax.Array]:
        """The activations after each stage, channel-last, and the logits."""
        x = nnx.relu6(self.bn0(self.conv_stem(x)))
        out = {"stem": x}
        for spec, block in zip(blocks(), self.blocks, strict=True):
            out[f"stage {spec.stage + 1}"] = x = block(x)
        out["head"] = x = nnx.relu6(self.bn1(self.conv_head(x)))
        out["logits"] = self.fc(x.mean((1, 2)))
        return out

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.stages(x)["logits"]


def normalise(pixels: Any) -> jax.Array:
    """Pixels 0 to 255 as the network was trained on them."""
    return (jnp.asarray(pixels, jnp.float32) - 127.0) / 128.0


def torch_stages(weights: Mapping[str, Any], x: Any) -> dict[str, Any]:
    """The same network in ``torch.nn.functional`` alone: what the port is held against.

    Args:
        weights: the state dict as tensors.
        x: a tensor (N, 3, 224, 224), normalised.
    """
    from torch.nn import functional as F

    def conv(x: Any, name: str, stride: int = 1, padding: tuple[int, int] = (0, 0), groups: int = 1) -> Any:
        return F.conv2d(F.pad(x, padding + padding), weights[f"{name}.weight"], stride=stride, groups=groups)

    def norm(x: Any, name: str) -> Any:
        mean, var = weights[f"{name}.running_mean"], weights[f"{name}.running_var"]
        return F.batch_norm(x, mean, var, weights[f"{name}.weight"], weights[f"{name}.bias"], eps=EPSILON)

    x = F.relu6(norm(conv(x, "_conv_stem", 2, same_padding(IMAGE_SIZE, 3, 2)), "_bn0"))
    out = {"stem": x}
    for i, b in enumerate(blocks()):
        at, wide = f"_blocks.{i}.", b.in_channels * b.expand
        y = F.relu6(norm(conv(x, at + "_expand_conv"), at + "_bn0")) if b.expand != 1 else x
        y = F.relu6(norm(conv(y, at + "_depthwise_conv", b.stride, b.padding, wide), at + "_bn1"))
        y = norm(conv(y, at + "_project_conv"), at + "_bn2")
        x = x + y if b.stride == 1 and b.in_channels == b.out_channels else y
        out[f"stage {b.stage + 1}"] = x
    out["head"] = x = F.relu6(norm(conv(x, "_conv_head"), "_bn1"))
    out["logits"] = F.linear(x.mean((2, 3)), weights["_fc.weight"], weights["_fc.bias"])
    return out
