"""Models of five libraries, as their users write them, for ``tests/models`` and ``benchmarks/models.py``.

Nothing here names jconv. A model is its library's own where the library ships one (Haiku's ResNet-18 and MobileNetV1,
Keras's MobileNetV2); Flax and Equinox ship none, so those are written here with the libraries' own layers.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

os.environ["KERAS_BACKEND"] = "jax"

import equinox as eqx  # noqa: E402  # pyright: ignore[reportMissingImports]
import flax.linen as nn  # noqa: E402
import haiku as hk  # noqa: E402  # pyright: ignore[reportMissingImports]
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import keras  # noqa: E402  # pyright: ignore[reportMissingImports]
import numpy as np  # noqa: E402
import optax  # noqa: E402
from flax import nnx  # noqa: E402
from jax import lax  # noqa: E402


@dataclass(frozen=True)
class Model:
    """A model with its data.

    Attributes:
        forward: (variables, batch) -> what the model is for: logits, a mask, samples.
        step: (variables, batch) -> (loss, gradients, new variables): one step of plain SGD. A Flax NNX model and its
            optimizer are variables that the step changes in place.
        fresh: () -> the variables at the start, new ones at each call.
        batch: seed -> what the step takes.
        split: the variables -> (parameters, statistics).
        jit: what the library's users jit with.
    """

    forward: Callable[[Any, Any], Any]
    step: Callable[[Any, Any], Any]
    fresh: Callable[[], Any]
    batch: Callable[[int], Any]
    split: Callable[[Any], Any] = lambda variables: variables
    jit: Callable[..., Any] = jax.jit


def filled(tree: Any, dtype: Any) -> Any:
    """Values for a tree of shapes, the same in every dtype: He's for kernels, near one for scales. The libraries' own
    start some scales at zero, and the gradients before them would be zero. Offsets of norms are two, so that few values
    lie near a ReLU's kink: with zeros, batch norms in a row amplify rounding errors a hundred times and more."""
    rng = np.random.default_rng(0)

    def fill(path: Any, leaf: Any) -> Any:
        name = jax.tree_util.keystr(path).lower()
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            return jnp.zeros(leaf.shape, leaf.dtype)
        noise = rng.standard_normal(leaf.shape)
        if any(word in name for word in ("scale", "gamma", "var")):
            noise = (8 if "var" in name else 1) * (1 + 0.1 * np.tanh(noise))
        elif any(word in name for word in ("offset", "beta")) or ("bias" in name and ("norm" in name or "bn" in name)):
            noise = 2 + 0.1 * noise
        elif len(leaf.shape) > 1:
            # Equinox keeps (out, in, *window); the others (*window, in, out).
            fan_in = leaf.size / leaf.shape[0 if isinstance(path[0], jax.tree_util.GetAttrKey) else -1]
            if "depthwise" in name:
                fan_in = 9
            noise = noise * (2 / fan_in) ** 0.5
        else:
            noise = 0.1 * noise
        return jnp.asarray(noise.astype(np.float32), dtype)

    return jax.tree_util.tree_map_with_path(fill, tree)


def images(batch: int, size: int, classes: int, dtype: Any) -> Callable[[int], dict[str, jax.Array]]:
    def of(seed: int) -> dict[str, jax.Array]:
        rng = np.random.default_rng(seed)
        x = rng.standard_normal((batch, size, size, 3)).astype(np.float32)
        return {"x": jnp.asarray(x, dtype), "y": jnp.asarray(rng.integers(0, classes, batch), jnp.int32)}

    return of


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def descended(parameters: Any, gradients: Any, rate: float) -> Any:
    optimizer = optax.sgd(rate)
    updates, _ = optimizer.update(gradients, optimizer.init(parameters))
    return optax.apply_updates(parameters, updates)


# Flax Linen.


class LinenBlock(nn.Module):
    features: int
    strides: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        conv = functools.partial(nn.Conv, use_bias=False)
        norm = functools.partial(nn.BatchNorm, use_running_average=not train, momentum=0.9)
        y = nn.relu(norm()(conv(self.features, (3, 3), self.strides)(x)))
        y = norm()(conv(self.features, (3, 3))(y))
        if x.shape != y.shape:
            x = norm(name="norm_proj")(conv(self.features, (1, 1), self.strides, name="conv_proj")(x))
        return nn.relu(x + y)


class LinenResNet(nn.Module):
    """ResNet-18 with the layers of Flax's imagenet example (github.com/google/flax, examples/imagenet/models.py)."""

    width: int = 64
    classes: int = 10

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = nn.Conv(self.width, (7, 7), (2, 2), padding=[(3, 3), (3, 3)], use_bias=False, name="conv_init")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9, name="bn_init")(x))
        x = nn.max_pool(x, (3, 3), strides=(2, 2), padding="SAME")
        for stage in range(4):
            for block in range(2):
                x = LinenBlock(self.width << stage, 2 if stage and not block else 1)(x, train)
        return nn.Dense(self.classes)(x.mean((1, 2)))


class LinenUNet(nn.Module):
    """U-Net: two convolutions a level, down by pooling, up by a transposed convolution, joined across."""

    width: int = 32
    depth: int = 3

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        def twice(x: jax.Array, features: int) -> jax.Array:
            for _ in range(2):
                x = nn.Conv(features, (3, 3), use_bias=False)(x)
                x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
            return x

        across = []
        for level in range(self.depth):
            x = twice(x, self.width << level)
            across.append(x)
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = twice(x, self.width << self.depth)
        for level in reversed(range(self.depth)):
            x = nn.ConvTranspose(self.width << level, (2, 2), (2, 2))(x)
            x = twice(jnp.concatenate((across[level], x), -1), self.width << level)
        return nn.Conv(1, (1, 1))(x)


def of_linen(module: nn.Module, loss_of: Callable[[Any, Any], jax.Array], batch: Any, rate: float, dtype: Any) -> Model:
    """The variables are {'params', 'batch_stats'}."""

    def forward(variables: Any, batch: Any) -> jax.Array:
        return module.apply(variables, batch["x"], train=False)  # pyright: ignore[reportReturnType]

    def step(variables: Any, batch: Any) -> Any:
        def loss(params: Any) -> Any:
            held = {"params": params, "batch_stats": variables["batch_stats"]}
            out, changed = module.apply(held, batch["x"], train=True, mutable=["batch_stats"])
            return loss_of(out, batch["y"]), changed["batch_stats"]

        (value, statistics), grads = jax.value_and_grad(loss, has_aux=True)(variables["params"])
        params = descended(variables["params"], grads, rate)
        return value, grads, {"params": params, "batch_stats": statistics}

    shapes = jax.eval_shape(functools.partial(module.init, train=False), jax.random.key(0), batch(0)["x"])
    return Model(forward, step, lambda: filled(shapes, dtype), batch, lambda v: (v["params"], v["batch_stats"]))


def linen_resnet(dtype: Any = jnp.float32, size: int = 64, batch: int = 8, width: int = 16) -> Model:
    return of_linen(LinenResNet(width), cross_entropy, images(batch, size, 10, dtype), 0.01, dtype)


def linen_unet(dtype: Any = jnp.float32, size: int = 32, batch: int = 4, width: int = 8) -> Model:
    pictures = images(batch, size, 10, dtype)

    def masks(seed: int) -> Any:
        x = pictures(seed)["x"]
        return {"x": x, "y": (x.mean(-1, keepdims=True) > 0.3).astype(dtype)}

    def loss(out: jax.Array, mask: jax.Array) -> jax.Array:
        return optax.sigmoid_binary_cross_entropy(out, mask).mean()

    return of_linen(LinenUNet(width), loss, masks, 0.02, dtype)


# Flax NNX: the model and its optimizer are arguments, and what a step does to them is done in place.


def of_nnx(module: Callable[[nnx.Rngs], nnx.Module], forward: Any, loss_of: Any, batch: Any, rate: float, dtype: Any):
    def fresh() -> Any:
        model = nnx.eval_shape(lambda: module(nnx.Rngs(0)))
        nnx.update(model, filled(nnx.to_pure_dict(nnx.state(model)), dtype))
        return model, nnx.Optimizer(model, optax.sgd(rate), wrt=nnx.Param)

    def step(variables: Any, batch: Any) -> Any:
        model, optimizer = variables
        loss, grads = nnx.value_and_grad(lambda model: loss_of(model, batch))(model)
        optimizer.update(model, grads)
        return loss, grads

    def split(variables: Any) -> Any:
        return nnx.state(variables[0], nnx.Param), nnx.state(variables[0], nnx.BatchStat)

    return Model(lambda variables, batch: forward(variables[0], batch), step, fresh, batch, split, nnx.jit)


class NnxBlock(nnx.Module):
    def __init__(self, inputs: int, features: int, strides: int, rngs: nnx.Rngs):
        def conv(inputs: int, window: int, strides: int) -> nnx.Conv:
            return nnx.Conv(inputs, features, (window, window), strides, use_bias=False, rngs=rngs)

        self.conv1, self.bn1 = conv(inputs, 3, strides), nnx.BatchNorm(features, rngs=rngs)
        self.conv2, self.bn2 = conv(features, 3, 1), nnx.BatchNorm(features, rngs=rngs)
        self.projected = inputs != features or strides != 1
        if self.projected:
            self.conv3, self.bn3 = conv(inputs, 1, strides), nnx.BatchNorm(features, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.bn2(self.conv2(nnx.relu(self.bn1(self.conv1(x)))))
        return nnx.relu(y + (self.bn3(self.conv3(x)) if self.projected else x))


class NnxResNet(nnx.Module):
    """ResNet for small images: a 3x3 stem, then stages of two blocks."""

    def __init__(self, width: int, stages: int, rngs: nnx.Rngs):
        self.stem = nnx.Conv(3, width, (3, 3), use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(width, rngs=rngs)
        blocks, inputs = [], width
        for stage in range(stages):
            for block in range(2):
                blocks.append(NnxBlock(inputs, width << stage, 2 if stage and not block else 1, rngs))
                inputs = width << stage
        self.blocks = nnx.List(blocks)
        self.head = nnx.Linear(inputs, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.norm(self.stem(x)))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((1, 2)))


def nnx_resnet(dtype: Any = jnp.float32, size: int = 16, batch: int = 8, width: int = 8) -> Model:
    def forward(model: Any, batch: Any) -> jax.Array:
        model.eval()
        out = model(batch["x"])
        model.train()
        return out

    def loss(model: Any, batch: Any) -> jax.Array:
        return cross_entropy(model(batch["x"]), batch["y"])

    module = functools.partial(NnxResNet, width, 3)
    return of_nnx(module, forward, loss, images(batch, size, 10, dtype), 0.01, dtype)


NOISE_LEVELS = 100


class DiffusionBlock(nnx.Module):
    def __init__(self, inputs: int, features: int, embedding: int, rngs: nnx.Rngs):
        self.norm1 = nnx.GroupNorm(inputs, num_groups=4, rngs=rngs)
        self.conv1 = nnx.Conv(inputs, features, (3, 3), rngs=rngs)
        self.time = nnx.Linear(embedding, features, rngs=rngs)
        self.norm2 = nnx.GroupNorm(features, num_groups=4, rngs=rngs)
        self.conv2 = nnx.Conv(features, features, (3, 3), rngs=rngs)
        self.skip = nnx.Conv(inputs, features, (1, 1), rngs=rngs)

    def __call__(self, x: jax.Array, t: jax.Array) -> jax.Array:
        y = self.conv1(nnx.silu(self.norm1(x))) + self.time(nnx.silu(t))[:, None, None]
        return self.conv2(nnx.silu(self.norm2(y))) + self.skip(x)


class DiffusionNet(nnx.Module):
    """The noise in an image at a noise level: a U-Net with a time embedding, group norm, and attention at its bottom."""

    def __init__(self, width: int, rngs: nnx.Rngs):
        w, wide = width, 2 * width
        self.embed1, self.embed2 = nnx.Linear(w, 4 * w, rngs=rngs), nnx.Linear(4 * w, 4 * w, rngs=rngs)
        self.stem = nnx.Conv(3, w, (3, 3), rngs=rngs)
        self.down1 = DiffusionBlock(w, w, 4 * w, rngs)
        self.shrink1 = nnx.Conv(w, wide, (3, 3), 2, rngs=rngs)
        self.down2 = DiffusionBlock(wide, wide, 4 * w, rngs)
        self.shrink2 = nnx.Conv(wide, wide, (3, 3), 2, rngs=rngs)
        self.middle1 = DiffusionBlock(wide, wide, 4 * w, rngs)
        self.norm = nnx.GroupNorm(wide, num_groups=4, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(num_heads=4, in_features=wide, decode=False, rngs=rngs)
        self.middle2 = DiffusionBlock(wide, wide, 4 * w, rngs)
        self.grow2 = nnx.ConvTranspose(wide, wide, (4, 4), (2, 2), rngs=rngs)
        self.up2 = DiffusionBlock(2 * wide, wide, 4 * w, rngs)
        self.grow1 = nnx.ConvTranspose(wide, w, (4, 4), (2, 2), rngs=rngs)
        self.up1 = DiffusionBlock(2 * w, w, 4 * w, rngs)
        self.last = nnx.GroupNorm(w, num_groups=4, rngs=rngs)
        self.head = nnx.Conv(w, 3, (3, 3), rngs=rngs)
        self.width = width

    def __call__(self, x: jax.Array, level: jax.Array) -> jax.Array:
        half = self.width // 2
        angles = level[:, None].astype(x.dtype) * jnp.exp(-jnp.arange(half, dtype=x.dtype) / half * 7)
        t = self.embed2(nnx.silu(self.embed1(jnp.concatenate((jnp.sin(angles), jnp.cos(angles)), -1))))
        one = self.down1(self.stem(x), t)
        two = self.down2(self.shrink1(one), t)
        y = self.middle1(self.shrink2(two), t)
        tokens = self.norm(y).reshape(len(y), -1, y.shape[-1])
        y = self.middle2(y + self.attention(tokens).reshape(y.shape), t)
        y = self.up2(jnp.concatenate((self.grow2(y), two), -1), t)
        y = self.up1(jnp.concatenate((self.grow1(y), one), -1), t)
        return self.head(nnx.silu(self.last(y)))


def noise(key: Any, like: jax.Array) -> jax.Array:
    """The same numbers whatever the dtype."""
    return jax.random.normal(key, like.shape, jnp.float32).astype(like.dtype)


def diffusion(dtype: Any = jnp.float32, size: int = 16, batch: int = 4, width: int = 16) -> Model:
    """DDPM: the loss at random noise levels, and samples by a loop over a few of them."""
    kept = jnp.cumprod(1 - jnp.linspace(1e-4, 0.1, NOISE_LEVELS, dtype=jnp.float32)).astype(dtype)
    pictures = images(batch, size, 10, dtype)

    def loss(model: Any, batch: Any) -> jax.Array:
        x = batch["x"]
        of_level, of_noise = jax.random.split(batch["key"])
        level = jax.random.randint(of_level, (len(x),), 0, NOISE_LEVELS, jnp.int32)
        share, epsilon = kept[level][:, None, None, None], noise(of_noise, x)
        return ((model(jnp.sqrt(share) * x + jnp.sqrt(1 - share) * epsilon, level) - epsilon) ** 2).mean()

    def sample(model: Any, batch: Any) -> jax.Array:
        def denoise(x: jax.Array, levels: Any) -> Any:
            now, then = levels
            epsilon = model(x, jnp.full(len(x), now))
            clean = (x - jnp.sqrt(1 - kept[now]) * epsilon) / jnp.sqrt(kept[now])
            return jnp.sqrt(kept[then]) * clean + jnp.sqrt(1 - kept[then]) * epsilon, None

        levels = jnp.array([60, 40, 20, 0], jnp.int32)
        return lax.scan(denoise, noise(batch["key"], batch["x"]), (levels[:-1], levels[1:]))[0]

    def with_key(seed: int) -> Any:
        return {"x": pictures(seed)["x"], "key": jax.random.key(seed)}

    return of_nnx(functools.partial(DiffusionNet, width), sample, loss, with_key, 0.01, dtype)


# Equinox: a module is of one example, and is mapped over the batch.


class EquinoxBlock(eqx.Module):
    depthwise: eqx.nn.Conv2d
    pointwise: eqx.nn.Conv2d
    norm: eqx.nn.BatchNorm
    activation: Callable[[jax.Array], jax.Array]

    def __init__(self, inputs: int, features: int, stride: int, key: Any):
        one, two = jax.random.split(key)
        self.depthwise = eqx.nn.Conv2d(inputs, inputs, 3, stride, 1, groups=inputs, key=one)
        self.pointwise = eqx.nn.Conv2d(inputs, features, 1, key=two)
        self.norm = eqx.nn.BatchNorm(features, "batch", mode="batch")
        self.activation = jax.nn.relu

    def __call__(self, x: jax.Array, state: Any) -> Any:
        x, state = self.norm(self.pointwise(self.depthwise(x)), state)
        return self.activation(x), state


class EquinoxNet(eqx.Module):
    """Separable convolutions behind a dense one."""

    stem: eqx.nn.Conv2d
    blocks: list[EquinoxBlock]
    head: eqx.nn.Linear

    def __init__(self, width: int, key: Any):
        keys = jax.random.split(key, 8)
        self.stem = eqx.nn.Conv2d(3, width, 3, 2, 1, key=keys[0])
        w = width
        stages = ((w, 2 * w, 1), (2 * w, 4 * w, 2), (4 * w, 4 * w, 1), (4 * w, 8 * w, 2), (8 * w, 8 * w, 1))
        self.blocks = [EquinoxBlock(*stage, key=k) for stage, k in zip(stages, keys[1:], strict=False)]
        self.head = eqx.nn.Linear(8 * w, 10, key=keys[7])

    def __call__(self, x: jax.Array, state: Any) -> Any:
        x = jax.nn.relu(self.stem(x))
        for block in self.blocks:
            x, state = block(x, state)
        return self.head(x.mean((1, 2))), state


def equinox_net(dtype: Any = jnp.float32, size: int = 32, batch: int = 8, width: int = 8) -> Model:
    """The variables are the module's arrays, and the batch norms' state; what else the module holds is static."""
    rate = 0.01
    shapes, state_shapes = eqx.filter_eval_shape(lambda: eqx.nn.make_with_state(EquinoxNet)(width, jax.random.key(0)))
    abstract, static = eqx.partition(shapes, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))

    def mapped(model: Any, state: Any, x: jax.Array) -> Any:
        return jax.vmap(model, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(x, state)

    def forward(variables: Any, batch: Any) -> jax.Array:
        arrays, state = variables
        return mapped(eqx.nn.inference_mode(eqx.combine(arrays, static)), state, batch["x"])[0]

    def step(variables: Any, batch: Any) -> Any:
        @functools.partial(eqx.filter_value_and_grad, has_aux=True)
        def loss(arrays: Any, state: Any) -> Any:
            logits, state = mapped(eqx.combine(arrays, static), state, batch["x"])
            return cross_entropy(logits, batch["y"]), state

        arrays, state = variables
        (value, state), grads = loss(arrays, state)
        return value, grads, (descended(arrays, grads, rate), state)

    pictures = images(batch, size, 10, dtype)

    def channel_first(seed: int) -> Any:
        found = pictures(seed)
        return {"x": found["x"].transpose(0, 3, 1, 2), "y": found["y"]}

    def fresh() -> Any:
        # Means and variances of the batch norms, whose names do not say which is which: all near one.
        state = jax.tree.map(lambda a: a + (a.ndim > 0), filled(state_shapes, dtype))
        return filled(abstract, dtype), state

    return Model(forward, step, fresh, channel_first)


# Haiku: its own networks.


def of_haiku(network: Callable[[], Any], batch: Any, rate: float, dtype: Any) -> Model:
    """The variables are (parameters, state)."""
    run = hk.transform_with_state(lambda x, is_training: network()(x, is_training))

    def forward(variables: Any, batch: Any) -> jax.Array:
        return run.apply(*variables, None, batch["x"], False)[0]

    def step(variables: Any, batch: Any) -> Any:
        def loss(params: Any, state: Any) -> Any:
            logits, state = run.apply(params, state, None, batch["x"], True)
            return cross_entropy(logits, batch["y"]), state

        params, state = variables
        (value, state), grads = jax.value_and_grad(loss, has_aux=True)(params, state)
        return value, grads, (descended(params, grads, rate), state)

    shapes = jax.eval_shape(lambda key, x: run.init(key, x, True), jax.random.key(0), batch(0)["x"])
    return Model(forward, step, lambda: filled(shapes, dtype), batch)


def haiku_resnet18(dtype: Any = jnp.float32, size: int = 64, batch: int = 4) -> Model:
    network = functools.partial(hk.nets.ResNet18, num_classes=10)
    return of_haiku(network, images(batch, size, 10, dtype), 0.0005, dtype)


def haiku_mobilenet(dtype: Any = jnp.float32, size: int = 32, batch: int = 8, whole: bool = False) -> Model:
    """``whole``: as Haiku has it. Else for small images: fewer strides and channels."""
    network = functools.partial(hk.nets.MobileNetV1, num_classes=10)
    if not whole:
        channels = (16, 32, 32, 64, 64, 64, 64, 64, 64, 64, 64, 128, 128)
        network = functools.partial(network, strides=(1, 1, 1, 2, 1, 1, 1, 1, 1, 1, 1, 1, 1), channels=channels)
    return of_haiku(network, images(batch, size, 10, dtype), 0.002, dtype)


# Keras 3.


def keras_network(dtype: Any = jnp.float32, size: int = 32, alpha: float = 0.35, classes: int = 10) -> Any:
    """``keras.applications.MobileNetV2`` with random weights, the same in every dtype."""
    name = jnp.dtype(dtype).name
    before = keras.config.dtype_policy(), keras.config.floatx()
    try:
        keras.config.set_floatx(name)
        keras.config.set_dtype_policy(name)
        keras.backend.clear_session()
        # Every weight is replaced below; to draw them first would take half a minute.
        with mock.patch.object(keras.initializers.VarianceScaling, "__call__", lambda _, shape, dtype: np.zeros(shape)):
            network = keras.applications.MobileNetV2(
                weights=None, input_shape=(size, size, 3), alpha=alpha, classes=classes, classifier_activation=None
            )
    finally:
        keras.config.set_dtype_policy(before[0])
        keras.config.set_floatx(before[1])
    values = filled({v.path: jax.ShapeDtypeStruct(v.shape, jnp.float32) for v in network.weights}, jnp.float32)
    for variable in network.weights:
        variable.assign(values[variable.path])
    return network


def keras_mobilenet(dtype: Any = jnp.float32, size: int = 32, batch: int = 32, alpha: float = 0.35) -> Model:
    """The variables are (trainable, non-trainable), as ``stateless_call`` takes them."""
    network = keras_network(dtype, size, alpha)

    def forward(variables: Any, batch: Any) -> jax.Array:
        return network.stateless_call(*variables, batch["x"], training=False)[0]

    def step(variables: Any, batch: Any) -> Any:
        def loss(trainable: Any, rest: Any) -> Any:
            logits, rest = network.stateless_call(trainable, rest, batch["x"], training=True)
            return cross_entropy(logits, batch["y"]), rest

        trainable, rest = variables
        (value, rest), grads = jax.value_and_grad(loss, has_aux=True)(trainable, rest)
        return value, grads, (descended(trainable, grads, 0.0005), rest)

    def fresh() -> Any:
        return [v.value for v in network.trainable_variables], [v.value for v in network.non_trainable_variables]

    return Model(forward, step, fresh, images(batch, size, 10, dtype))


MODELS: dict[str, Callable[..., Model]] = {
    "Flax Linen ResNet-18": linen_resnet,
    "Flax NNX ResNet": nnx_resnet,
    "Equinox separable net": equinox_net,
    "Haiku ResNet-18": haiku_resnet18,
    "Haiku MobileNetV1": haiku_mobilenet,
    "Keras MobileNetV2": keras_mobilenet,
    "Flax U-Net": linen_unet,
    "Flax diffusion": diffusion,
}
