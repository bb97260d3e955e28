"""compare: right ports are equal, planted mistakes are found, named and explained."""

import copy
import json
import re
import shutil
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import linen as nn
from flax import nnx
from PIL import Image
from torch import nn as tn
from torch.nn import functional as F

import jconv.linen as jl
import jconv.nnx as jnn
from jconv import functional as JF
from jconv import interop, parity
from jconv.errors import ParityError, StateDictError
from jconv.parity import recording


@pytest.fixture(autouse=True)
def without_x64():
    """As users run: the tool switches 64 bits on where it needs them, and off again."""
    with jax.enable_x64(False):
        yield


def image(*shape):
    return torch.from_numpy(np.random.default_rng(0).standard_normal(shape, np.float32))


def settled(module, *inputs, steps=2):
    """Random weights, and running statistics that are no longer 0 and 1."""
    module = copy.deepcopy(module)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        module.train()
        for _ in range(steps):
            module(*inputs)
    return module.eval()


# --- planted mistakes: a piece between a stem and a head, as PyTorch has it and as the port has it -----------


class Theirs(tn.Module):
    def __init__(self, piece, channels=8, head=8):
        super().__init__()
        self.stem = tn.Conv2d(3, channels, 3, padding=1)
        self.piece = piece
        self.head = tn.Conv2d(head, 5, 1)

    def forward(self, x):
        return self.head(self.piece(self.stem(x)))


class Ours(nnx.Module):
    def __init__(self, piece, channels=8, head=8):
        rngs = nnx.Rngs(0)
        self.head = nnx.Conv(head, 5, (1, 1), rngs=rngs)
        self.piece = piece
        self.stem = jnn.Conv2d(3, channels, 3, padding=1, rngs=rngs)

    def __call__(self, x):
        return self.head(self.piece(self.stem(x)))


class Function(tn.Module):
    """A piece that is no layer of PyTorch's."""

    def __init__(self, fn, **modules):
        super().__init__()
        self.fn = fn
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x):
        return self.fn(self, x)


class Call(nnx.Module):
    """A piece of the port that is a module, with layers of its own."""

    def __init__(self, fn, **modules):
        self.fn = fn
        for name, module in modules.items():
            setattr(self, name, module)

    def __call__(self, x):
        return self.fn(self, x)


R = nnx.Rngs(1)
NHWC = ("NHWC", "HWIO", "NHWC")


def with_kernel(change):
    """Changes the kernel of the layer `piece` after its weights are loaded."""

    def plant(ours):
        ours.piece.kernel.set_value(jnp.asarray(change(np.asarray(ours.piece.kernel.get_value()))))

    return plant


def in_channels_first(fn):
    """A function of channel-last images, of one of channel-first ones."""
    return lambda x: fn(x.transpose(0, 3, 1, 2)).transpose(0, 2, 3, 1)


def pool(window, strides, padding, reduce=jax.lax.max, init=-jnp.inf):
    return lambda x: jax.lax.reduce_window(x, init, reduce, (1, *window, 1), (1, *strides, 1), padding)


def conv(piece, x, **arguments):
    """What a layer computes, with other arguments."""
    given = {"window_strides": (1, 1), "padding": [(1, 1), (1, 1)], "dimension_numbers": NHWC} | arguments
    return jax.lax.conv_general_dilated(x, piece.kernel[...], **given) + piece.bias[...]


def dealt(kernel, groups):
    """The output channels of a kernel dealt to groups in turn."""
    return kernel.reshape(*kernel.shape[:-1], groups, -1).swapaxes(-1, -2).reshape(kernel.shape)


def tf32(piece, x):
    return (
        conv_of(jax.lax.reduce_precision(x, 8, 10), jax.lax.reduce_precision(piece.kernel[...], 8, 10))
        + piece.bias[...]
    )


def conv_of(x, w):
    return jax.lax.conv_general_dilated(x, w, (1, 1), [(1, 1), (1, 1)], dimension_numbers=NHWC)


class Tf32Conv(jnn.Conv2d):
    def __call__(self, inputs):
        return tf32(self, inputs)


class NoBias(jnn.Conv2d):
    def __call__(self, inputs):
        return conv_of(inputs, self.kernel[...])


class SameConv(jnn.Conv2d):
    def __call__(self, inputs):
        return conv(self, inputs, window_strides=(2, 2), padding="SAME")


class Reflecting(jnn.Conv2d):
    def __call__(self, inputs):
        padded = jnp.pad(inputs, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect")
        return conv(self, padded, padding="VALID")


def conv3(groups=1, **options):
    return tn.Conv2d(8, 8, 3, padding=1, groups=groups, **options)


def ours3(cls=jnn.Conv2d, groups=1, **options):
    return cls(8, 8, 3, padding=1, groups=groups, rngs=R, **options)


def residual(self, x):
    return x + F.relu(self.conv(x))


# name: (mistake, where it shows, PyTorch's piece, the port's piece, what is done to the port once it is loaded)
MISTAKES = {
    "kernel flipped": (
        "kernel flipped", "piece", conv3(), lambda: ours3(), with_kernel(lambda k: k[::-1, ::-1])
    ),
    "kernel flipped along one axis": (
        "kernel flipped", "piece", conv3(), lambda: ours3(), with_kernel(lambda k: k[::-1])
    ),
    "kernel's window transposed": (
        "kernel transposed", "piece", conv3(), lambda: ours3(), with_kernel(lambda k: k.transpose(1, 0, 2, 3))
    ),
    "kernel's channels swapped": (
        "kernel channels swapped", "piece", conv3(), lambda: ours3(), with_kernel(lambda k: k.transpose(0, 1, 3, 2))
    ),
    "input channels reversed": (
        "channels reversed", "piece", conv3(), lambda: ours3(), with_kernel(lambda k: k[:, :, ::-1])
    ),
    "output channels sorted otherwise": (
        "channel order", "piece", conv3(bias=False), lambda: ours3(bias=False),
        with_kernel(lambda k: k[..., [1, 0, 2, 3, 7, 5, 6, 4]]),
    ),
    "groups reshaped": (
        "groups reshaped", "piece", conv3(4, bias=False), lambda: ours3(groups=4, bias=False),
        with_kernel(lambda k: dealt(k, 4)),
    ),
    "bias missing": ("bias missing", "piece", conv3(), lambda: ours3(NoBias), None),
    "SAME at stride 2": (
        "SAME padding", "piece", tn.Conv2d(8, 8, 3, 2, padding=1),
        lambda: SameConv(8, 8, 3, 2, padding=1, rngs=R), None,
    ),
    "padding mode": ("padding mode", "piece", conv3(), lambda: ours3(Reflecting), None),
    "padding missing": ("padding missing", "piece", conv3(), lambda: jnn.Conv2d(8, 8, 3, rngs=R), None),
    "stride missing": (
        "stride missing", "piece", tn.Conv2d(8, 8, 3, 2, padding=1), lambda: ours3(), None
    ),
    "dilation missing, with the padding of none": (
        "dilation", "piece", tn.Conv2d(8, 8, 3, padding=2, dilation=2), lambda: jnn.Conv2d(8, 8, 3, padding=1, rngs=R), None
    ),
    "dilation missing, reflected": (
        "dilation", "piece", tn.Conv2d(8, 8, 3, padding="same", dilation=2, padding_mode="reflect"),
        lambda: jnn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect", rngs=R), None
    ),
    "dilation too many": (
        "dilation", "piece", tn.Conv2d(8, 8, 3, padding=1), lambda: jnn.Conv2d(8, 8, 3, padding=2, dilation=2, rngs=R), None
    ),
    "dilation missing": (
        "dilation missing", "piece", tn.Conv2d(8, 8, 3, padding=1, dilation=2), lambda: ours3(), None
    ),
    "bfloat16": ("precision", "piece", conv3(), lambda: ours3(dtype=jnp.bfloat16), None),
    "TF32": ("precision", "piece", conv3(), lambda: ours3(Tf32Conv), None),
    "transposed convolution SAME": (
        "transposed convolution padding", "piece", tn.ConvTranspose2d(8, 8, 3, 2, padding=1, output_padding=1),
        lambda: nnx.ConvTranspose(8, 8, (3, 3), (2, 2), padding="SAME", rngs=R), None,
    ),
    "transposed convolution VALID": (
        "transposed convolution padding", "piece", tn.ConvTranspose2d(8, 8, 4, 2, padding=1),
        lambda: nnx.ConvTranspose(8, 8, (4, 4), (2, 2), padding="VALID", rngs=R), None,
    ),
    "transposed kernel not flipped": (
        "kernel flipped", "piece", tn.ConvTranspose2d(8, 8, 4, 2, padding=1),
        lambda: jnn.ConvTranspose2d(8, 8, 4, 2, padding=1, rngs=R), with_kernel(lambda k: k[::-1, ::-1]),
    ),
    "transposed kernel's groups": (
        "groups reshaped", "piece", tn.ConvTranspose2d(8, 8, 4, 2, padding=1, groups=2, bias=False),
        lambda: jnn.ConvTranspose2d(8, 8, 4, 2, padding=1, groups=2, bias=False, rngs=R),
        with_kernel(lambda k: dealt(k, 2)),
    ),
    "BatchNorm epsilon": (
        "norm epsilon", "piece", tn.BatchNorm2d(8), lambda: nnx.BatchNorm(8, epsilon=1e-3, rngs=R),
        lambda ours: setattr(ours.piece, "epsilon", 1e-3),
    ),
    "BatchNorm in train mode": (
        "BatchNorm in train mode", "piece", tn.BatchNorm2d(8), lambda: nnx.BatchNorm(8, rngs=R),
        lambda ours: ours.train(),
    ),
    "BatchNorm statistics not loaded": (
        "BatchNorm statistics", "piece", tn.BatchNorm2d(8), lambda: nnx.BatchNorm(8, rngs=R),
        lambda ours: (ours.piece.mean.set_value(jnp.zeros(8)), ours.piece.var.set_value(jnp.ones(8))),
    ),
    "GroupNorm epsilon": (
        "norm epsilon", "piece", tn.GroupNorm(2, 8, eps=1e-2),
        lambda: nnx.GroupNorm(8, num_groups=2, rngs=R), lambda ours: setattr(ours.piece, "epsilon", 1e-6),
    ),
    "GroupNorm with another number of groups": (
        "number of groups", "piece", tn.GroupNorm(4, 8), lambda: nnx.GroupNorm(8, num_groups=2, rngs=R), None,
    ),
    "dropout in train mode": (
        "dropout in train mode", "piece", tn.Dropout(0.3), lambda: nnx.Dropout(0.3, rngs=nnx.Rngs(0)),
        lambda ours: ours.train(),
    ),
    "average counts no padding": (
        "count_include_pad", "piece", tn.AvgPool2d(3, 2, 1),
        lambda: Call(lambda _, x: nnx.avg_pool(x, (3, 3), (2, 2), [(1, 1), (1, 1)], count_include_pad=False)), None,
    ),
    "ceil_mode": (
        "ceil_mode", "piece", tn.MaxPool2d(2, ceil_mode=True),
        lambda: Call(lambda _, x: nnx.max_pool(x, (2, 2), (2, 2))), None,
    ),
    "max_pool padded with zeros": (
        "padding value", "piece", tn.MaxPool2d(3, 2, 1),
        lambda: Call(lambda _, x: nnx.max_pool(jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))), (3, 3), (2, 2))), None,
    ),
    "max_pool SAME": (
        "SAME padding", "piece", tn.MaxPool2d(3, 2, 1),
        lambda: Call(lambda _, x: nnx.max_pool(x, (3, 3), (2, 2), "SAME")), None,
    ),
    "mean for maximum": (
        "kind of pooling", "piece", tn.MaxPool2d(2), lambda: Call(lambda _, x: nnx.avg_pool(x, (2, 2), (2, 2))), None
    ),
    "align_corners": (
        "align_corners", "piece", tn.Upsample(scale_factor=2, mode="bilinear", align_corners=True),
        lambda: Call(lambda _, x: jax.image.resize(x, (2, 24, 24, 8), "bilinear")), None,
    ),
    "antialias": (
        "antialias", "piece", Function(lambda _, x: F.interpolate(x, (5, 5), mode="bilinear")),
        lambda: Call(lambda _, x: jax.image.resize(x, (2, 5, 5, 8), "bilinear")), None,
    ),
    "nearest for bilinear": (
        "interpolation mode", "piece", tn.Upsample(scale_factor=2, mode="bilinear"),
        lambda: Call(lambda _, x: jax.image.resize(x, (2, 24, 24, 8), "nearest")), None,
    ),
    "gelu approximation": (
        "gelu approximation", "piece", tn.GELU(), lambda: Call(lambda _, x: nnx.gelu(x)), None
    ),
    "activation missing": ("activation missing", "piece", tn.ReLU(), lambda: Call(lambda _, x: x), None),
    "another activation": (
        "activation", "piece", tn.LeakyReLU(0.2), lambda: Call(lambda _, x: nnx.leaky_relu(x)), None
    ),
    "addition missing": (
        "addition missing", "piece", Function(residual, conv=conv3()),
        lambda: Call(lambda self, x: nnx.relu(self.conv(x)), conv=ours3()), None,
    ),
    "order of concatenation": (
        "order of concatenation", "piece", Function(lambda _, x: torch.cat([x, F.relu(x)], 1)),
        lambda: Call(lambda _, x: jnp.concatenate([nnx.relu(x), x], -1)), None,
    ),
    "softmax axis": (
        "softmax axis", "piece", Function(lambda _, x: torch.softmax(x, 1)),
        lambda: Call(lambda _, x: jax.nn.softmax(x, 1)), None,
    ),
    "padding sides": (
        "padding sides", "piece", Function(lambda _, x: F.pad(x, (1, 0, 1, 0))),
        lambda: Call(lambda _, x: jnp.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)))), None,
    ),
    "pixel shuffle": (
        "pixel shuffle order", "piece", tn.PixelShuffle(2),
        lambda: Call(lambda _, x: x.reshape(2, 12, 12, 2, 2, 2).transpose(0, 1, 3, 2, 4, 5).reshape(2, 24, 24, 2)), None,
    ),
    "weights not loaded": (
        "weights not loaded", "piece", conv3(), lambda: ours3(), with_kernel(lambda k: k[::-1] * 0.5 + 1)
    ),
}  # fmt: skip
HEADS = {"order of concatenation": 16, "pixel shuffle": 2}


def networks(name, as_function=False):
    _, _, theirs, ours, _ = MISTAKES[name]
    x = image(2, 3, *((11, 11) if name == "ceil_mode" else (12, 12)))
    theirs = settled(Theirs(theirs, head=HEADS.get(name, 8)), x)
    piece = ours()
    if as_function:
        call = piece.fn
        piece = lambda x: call(None, x)
    port = interop.load_torch(Ours(piece, head=HEADS.get(name, 8)), theirs)
    port.eval()
    return theirs, port, x


@pytest.mark.parametrize("name", MISTAKES)
def test_a_planted_mistake_is_found_and_named(name):
    mistake, place, _, _, plant = MISTAKES[name]
    theirs, port, x = networks(name)
    if plant:
        plant(port)
    report = parity.compare(theirs, port, x)
    assert not report.ok
    first = report.diagnoses[0]
    assert first.mistake == mistake, str(report)
    assert first.layer == report.first_divergent == place, str(report)
    assert str(first) in str(report) and json.loads(report.to_json())["diagnoses"][0]["mistake"] == mistake


FUNCTIONS = [name for name, row in MISTAKES.items() if isinstance(row[3](), Call) and name != "addition missing"]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_mistake_between_the_layers_is_found_and_named(name):
    """What a port writes as a function has no layer to pair: the next layer's input tells."""
    theirs, port, x = networks(name, as_function=True)
    report = parity.compare(theirs, port, x)
    assert report.first_divergent == "head"
    first = report.diagnoses[0]
    assert (first.mistake, first.place) == (MISTAKES[name][0], "before head"), str(report)


@pytest.mark.parametrize("name", [name for name, row in MISTAKES.items() if row[4]])
def test_the_same_port_without_the_mistake_is_equal(name):
    """Where the port's piece is PyTorch's own layer, not to plant the mistake is to mend it."""
    theirs, port, x = networks(name)
    report = parity.compare(theirs, port, x)
    assert report.ok and not report.diagnoses and report.first_divergent is None, str(report)


# --- right ports: none is called wrong ----------------------------------------------------------------------


class BasicBlock(tn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1 = tn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = tn.BatchNorm2d(outputs)
        self.relu = tn.ReLU(inplace=True)
        self.conv2 = tn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = tn.BatchNorm2d(outputs)
        self.down = tn.Conv2d(inputs, outputs, 1, stride) if stride > 1 else tn.Identity()

    def forward(self, x):
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(y + self.down(x))


class ResNet(tn.Module):
    def __init__(self):
        super().__init__()
        self.stem = tn.Conv2d(3, 8, 7, 2, 3)
        self.pool = tn.MaxPool2d(3, 2, 1)
        self.layer1 = tn.Sequential(BasicBlock(8, 8, 1), BasicBlock(8, 8, 1))
        self.layer2 = tn.Sequential(BasicBlock(8, 16, 2))
        self.fc = tn.Linear(16, 5)

    def forward(self, x):
        x = self.layer2(self.layer1(self.pool(F.relu(self.stem(x)))))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


class NnxBlock(nnx.Module):
    def __init__(self, inputs, outputs, stride, rngs):  # the attributes in another order than PyTorch's
        self.down = jnn.Conv2d(inputs, outputs, 1, stride, rngs=rngs) if stride > 1 else None
        self.bn2 = nnx.BatchNorm(outputs, momentum=0.9, rngs=rngs)
        self.bn1 = nnx.BatchNorm(outputs, momentum=0.9, rngs=rngs)
        self.conv2 = jnn.Conv2d(outputs, outputs, 3, 1, 1, bias=False, rngs=rngs)
        self.conv1 = jnn.Conv2d(inputs, outputs, 3, stride, 1, bias=False, rngs=rngs)

    def __call__(self, x):
        shortcut = x if self.down is None else self.down(x)
        return nnx.relu(shortcut + self.bn2(self.conv2(nnx.relu(self.bn1(self.conv1(x))))))


class NnxResNet(nnx.Module):
    def __init__(self, rngs):
        self.fc = nnx.Linear(16, 5, rngs=rngs)
        self.layer2 = nnx.List([NnxBlock(8, 16, 2, rngs)])
        self.layer1 = nnx.List([NnxBlock(8, 8, 1, rngs), NnxBlock(8, 8, 1, rngs)])
        self.stem = jnn.Conv2d(3, 8, 7, 2, 3, rngs=rngs)

    def __call__(self, x):
        x = nnx.max_pool(nnx.relu(self.stem(x)), (3, 3), (2, 2), [(1, 1), (1, 1)])
        for block in (*self.layer1, *self.layer2):
            x = block(x)
        return self.fc(x.mean((1, 2)))


class LinenBlock(nn.Module):
    outputs: int
    stride: int

    @nn.compact
    def __call__(self, x, train):
        norm = dict(use_running_average=not train, momentum=0.9)
        y = jl.Conv2d(self.outputs, 3, self.stride, 1, bias=False, name="conv1")(x)
        y = nn.relu(nn.BatchNorm(**norm, name="bn1")(y))
        y = nn.BatchNorm(**norm, name="bn2")(jl.Conv2d(self.outputs, 3, 1, 1, bias=False, name="conv2")(y))
        if self.stride > 1:
            x = jl.Conv2d(self.outputs, 1, self.stride, name="down")(x)
        return nn.relu(x + y)


class LinenResNet(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(jl.Conv2d(8, 7, 2, 3, name="stem")(x))
        x = nn.max_pool(x, (3, 3), (2, 2), [(1, 1), (1, 1)])
        for index in range(2):
            x = LinenBlock(8, 1, name=f"layer1_{index}")(x, train)
        x = LinenBlock(16, 2, name="layer2_0")(x, train)
        return nn.Dense(5, name="fc")(x.mean((1, 2)))


def as_function(state):
    """The same ResNet as a function of a tree of PyTorch's own arrays, channel-first, with a scope for each layer."""

    def block(p, x, name, stride):
        def conv(x, layer, stride=1, padding=0):
            with jax.named_scope(f"{name}.{layer}"):
                return JF.conv2d(x, p[f"{name}.{layer}.weight"], p.get(f"{name}.{layer}.bias"), stride, padding)

        def norm(x, layer):
            with jax.named_scope(f"{name}.{layer}"):
                mean, var, weight, bias = (
                    p[f"{name}.{layer}.{leaf}"][:, None, None]
                    for leaf in ("running_mean", "running_var", "weight", "bias")
                )
                return (x - mean) / jnp.sqrt(var + 1e-5) * weight + bias

        y = jax.nn.relu(norm(conv(x, "conv1", stride, 1), "bn1"))
        y = norm(conv(y, "conv2", 1, 1), "bn2")
        return jax.nn.relu(y + (conv(x, "down", stride) if stride > 1 else x))

    def fn(p, x):
        with jax.named_scope("stem"):
            x = JF.conv2d(x, p["stem.weight"], p["stem.bias"], 2, 3)
        x = jax.lax.reduce_window(
            jax.nn.relu(x), -jnp.inf, jax.lax.max, (1, 1, 3, 3), (1, 1, 2, 2), ((0, 0), (0, 0), (1, 1), (1, 1))
        )
        x = block(p, block(p, x, "layer1.0", 1), "layer1.1", 1)
        x = block(p, x, "layer2.0", 2)
        with jax.named_scope("fc"):
            return x.mean((2, 3)) @ p["fc.weight"].T + p["fc.bias"]

    return fn, {name: jnp.asarray(value) for name, value in state.items() if value.is_floating_point()}


class Seq(nnx.Module):
    def __init__(self, *layers):
        self.layers = nnx.List(
            [layer if isinstance(layer, nnx.Module) else Call(lambda _, x, f=layer: f(x)) for layer in layers]
        )

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class Transformer(tn.Module):
    def __init__(self):
        super().__init__()
        self.embed = tn.Embedding(20, 8)
        self.norm = tn.LayerNorm(8)
        self.up = tn.Linear(8, 32)
        self.drop = tn.Dropout(0.1)
        self.down = tn.Linear(32, 8)

    def forward(self, tokens):
        x = self.embed(tokens)
        y = self.norm(x)
        weights = torch.softmax(y @ y.transpose(1, 2) / 8**0.5, -1)
        return x + self.down(self.drop(F.gelu(self.up(weights @ y))))


class NnxTransformer(nnx.Module):
    def __init__(self, rngs):
        self.down = nnx.Linear(32, 8, rngs=rngs)
        self.up = nnx.Linear(8, 32, rngs=rngs)
        self.drop = nnx.Dropout(0.1, rngs=rngs)
        self.norm = nnx.LayerNorm(8, epsilon=1e-5, rngs=rngs)
        self.embed = nnx.Embed(20, 8, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        y = self.norm(x)
        weights = jax.nn.softmax(y @ y.transpose(0, 2, 1) / 8**0.5)
        return x + self.down(self.drop(nnx.gelu(self.up(weights @ y), approximate=False)))


def nnx_resnet(theirs):
    port = interop.load_torch(NnxResNet(nnx.Rngs(0)), theirs)
    port.eval()
    return port


def linen_resnet(theirs):
    module = LinenResNet()
    variables = module.init(jax.random.key(0), jnp.ones((1, 32, 32, 3)))
    return module, interop.load_torch(variables, theirs)


def loaded(*layers):
    def port(theirs):
        made = interop.load_torch(Seq(*(layer() for layer in layers)), theirs, rename=lambda n: f"layers.{n}")
        made.eval()
        return made

    return port


def relu():
    return nnx.relu


TOKENS = torch.from_numpy(np.random.default_rng(0).integers(0, 20, (2, 7)))
RIGHT = {
    "NNX, attributes in another order": (ResNet(), nnx_resnet, image(2, 3, 32, 32)),
    "Linen, module and variables": (ResNet(), linen_resnet, image(2, 3, 32, 32)),
    "Linen, bound": (ResNet(), lambda t: linen_resnet(t)[0].bind(linen_resnet(t)[1]), image(2, 3, 32, 32)),
    "a function of a tree, with scopes": (ResNet(), lambda t: as_function(t.state_dict()), image(2, 3, 32, 32)),
    "a function of the inputs": (
        tn.Conv2d(3, 4, 3, 2, 1), lambda t: lambda x: JF.conv2d(x, *map(jnp.asarray, t.state_dict().values()), 2, 1),
        image(2, 3, 9, 9),
    ),
    "a function of an NNX module": (ResNet(), lambda t: (lambda model, x: model(x), nnx_resnet(t)), image(2, 3, 32, 32)),
    "transformer": (Transformer(), lambda t: loaded_transformer(t), TOKENS),
    "1-D, dilated": (
        tn.Sequential(tn.Conv1d(2, 8, 2, dilation=1), tn.ReLU(), tn.Conv1d(8, 8, 2, dilation=4), tn.Tanh()),
        loaded(lambda: jnn.Conv1d(2, 8, 2, rngs=R), relu, lambda: jnn.Conv1d(8, 8, 2, dilation=4, rngs=R), lambda: jnp.tanh),
        image(2, 2, 30),
    ),
    "3-D with groups": (
        tn.Sequential(tn.Conv3d(4, 8, 3, padding=1, groups=2), tn.BatchNorm3d(8), tn.ReLU(), tn.MaxPool3d(2)),
        loaded(lambda: jnn.Conv3d(4, 8, 3, padding=1, groups=2, rngs=R), lambda: nnx.BatchNorm(8, rngs=R), relu,
               lambda: lambda x: nnx.max_pool(x, (2, 2, 2), (2, 2, 2))),
        image(2, 4, 6, 6, 6),
    ),
    "up and down": (
        tn.Sequential(tn.Conv2d(3, 8, 4, 2, 1), tn.GroupNorm(2, 8), tn.SiLU(), tn.ConvTranspose2d(8, 4, 4, 2, 1, groups=2),
                      tn.ReflectionPad2d(1), tn.Conv2d(4, 4, 3, padding="same", padding_mode="circular"), tn.Sigmoid()),
        loaded(lambda: jnn.Conv2d(3, 8, 4, 2, 1, rngs=R), lambda: nnx.GroupNorm(8, num_groups=2, epsilon=1e-5, rngs=R),
               lambda: nnx.silu, lambda: jnn.ConvTranspose2d(8, 4, 4, 2, 1, groups=2, rngs=R),
               lambda: lambda x: jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect"),
               lambda: jnn.Conv2d(4, 4, 3, padding="same", padding_mode="circular", rngs=R), lambda: nnx.sigmoid),
        image(2, 3, 16, 16),
    ),
    "flattened": (
        tn.Sequential(tn.Conv2d(3, 4, 3), tn.AvgPool2d(2), tn.Flatten(), tn.Linear(36, 5), tn.Softmax(1)),
        loaded(lambda: nnx.Conv(3, 4, (3, 3), padding="VALID", rngs=R), lambda: lambda x: nnx.avg_pool(x, (2, 2), (2, 2)),
               lambda: lambda x: x.transpose(0, 3, 1, 2).reshape(len(x), -1), lambda: nnx.Linear(36, 5, rngs=R),
               lambda: jax.nn.softmax),
        image(2, 3, 8, 8),
    ),
    "stock Flax with SAME": (
        tn.Sequential(tn.Conv2d(3, 8, 3, padding="same"), tn.LeakyReLU(0.01), tn.Conv2d(8, 8, 3, padding=1, groups=8)),
        loaded(lambda: nnx.Conv(3, 8, (3, 3), rngs=R), lambda: nnx.leaky_relu,
               lambda: nnx.Conv(8, 8, (3, 3), feature_group_count=8, rngs=R)),
        image(2, 3, 9, 9),
    ),
}  # fmt: skip


def loaded_transformer(theirs):
    port = interop.load_torch(NnxTransformer(nnx.Rngs(0)), theirs)
    port.eval()
    return port


@pytest.mark.parametrize(
    "name, float64", [*((name, True) for name in RIGHT), ("Linen, bound", False), ("up and down", False)]
)
def test_a_right_port_is_equal(name, float64):
    theirs, make, x = RIGHT[name]
    theirs = settled(theirs, x, steps=2)
    report = parity.compare(theirs, make(theirs), x, float64=float64)
    assert report.ok and report.first_divergent is None and report.diagnoses == (), str(report)
    layers = [row for row in report.rows if row.part == "layer"]
    leaves = [m for m in theirs.modules() if not list(m.children()) and next(m.parameters(), None) is not None]
    if name != "a function of the inputs":
        assert len(layers) > len(leaves), str(report)  # each layer with parameters, and the whole
    if "inputs" not in name:
        gradients = [row.name for row in report.rows if row.part == "gradient"]
        assert {n for n, _ in theirs.named_parameters()} <= set(gradients)
    for row in report.rows:
        # A function closes over float32 weights.
        assert (row.numbers.exact is not None) == (float64 and name != "a function of the inputs")
        assert row.numbers.relative < 1e-3 and (row.numbers.exact or 0) < 1e-11


@pytest.mark.parametrize("make", [nnx_resnet, linen_resnet])
def test_train_mode_compares_statistics(make):
    theirs, x = settled(ResNet(), image(2, 3, 32, 32)), image(2, 3, 32, 32)
    port = make(theirs)
    kwargs = {"port_kwargs": {"train": True}} if isinstance(port, tuple) else {}
    if not kwargs:
        port.train()
    report = parity.compare(theirs, port, x, train=True, **kwargs)
    assert report.ok, str(report)
    statistics = {row.name for row in report.rows if row.part == "statistic"}
    assert statistics == {n for n, b in theirs.named_buffers() if b.is_floating_point()}
    assert sum("divides the variance" in note for note in report.notes) == 1
    wrong = parity.compare(theirs, make(theirs), x, train=True)
    assert wrong.diagnoses[0].mistake == "BatchNorm in eval mode", str(wrong)


def test_batch_norm_momentum():
    theirs, x = settled(tn.Sequential(tn.BatchNorm2d(3)), image(4, 3, 8, 8)), image(4, 3, 8, 8)
    port = interop.load_torch(nnx.Sequential(nnx.BatchNorm(3, momentum=0.99, rngs=nnx.Rngs(0))), theirs)
    report = parity.compare(theirs, port, x, train=True)
    assert [d.mistake for d in report.diagnoses] == ["BatchNorm momentum"]
    assert "momentum=0.9" in report.diagnoses[0].text and "0.01 of the way" in report.diagnoses[0].text
    assert report.first_divergent == "0.running_mean"


def test_two_mistakes_are_both_found():
    x = image(2, 3, 12, 12)
    theirs = settled(tn.Sequential(tn.Conv2d(3, 8, 3, 2, 1), tn.ReLU(), tn.BatchNorm2d(8)), x)
    port = loaded(lambda: SameConv(3, 8, 3, 2, 1, rngs=R), relu, lambda: nnx.BatchNorm(8, rngs=R))(theirs)
    port.layers[2].epsilon = 1e-3
    report = parity.compare(theirs, port, x)
    assert [(d.layer, d.mistake) for d in report.diagnoses] == [("0", "SAME padding"), ("2", "norm epsilon")], str(
        report
    )


def test_gradient_that_is_stopped():
    class Stopping(jnn.Conv2d):
        def __call__(self, inputs):
            return super().__call__(jax.lax.stop_gradient(inputs))

    x = image(2, 3, 9, 9)
    theirs = settled(tn.Sequential(tn.Conv2d(3, 4, 3), tn.Conv2d(4, 4, 3)), x)
    port = loaded(lambda: jnn.Conv2d(3, 4, 3, rngs=R), lambda: Stopping(4, 4, 3, rngs=R))(theirs)
    report = parity.compare(theirs, port, x)
    assert report.first_divergent == "0.bias"
    assert {d.mistake for d in report.diagnoses} == {"gradient stopped"}
    assert parity.compare(theirs, port, x, gradients=False).ok


# --- what is given, and what is said ------------------------------------------------------------------------


def small():
    theirs = settled(tn.Sequential(tn.Conv2d(3, 4, 3, padding=1), tn.BatchNorm2d(4), tn.ReLU()), image(2, 3, 8, 8))
    make = loaded(lambda: jnn.Conv2d(3, 4, 3, padding=1, rngs=R), lambda: nnx.BatchNorm(4, rngs=R), relu)
    return theirs, make(theirs), image(2, 3, 8, 8)


def test_neither_network_is_changed():
    theirs, port, x = small()
    port.train()
    theirs.train()
    before = {n: v.clone() for n, v in theirs.state_dict().items()}, nnx.state(port)
    leaves = [np.array(leaf) for leaf in jax.tree.leaves(before[1])]
    parity.compare(theirs, port, x, train=True)
    assert theirs.training and all((theirs.state_dict()[n] == v).all() for n, v in before[0].items())
    assert all((np.array(a) == b).all() for a, b in zip(jax.tree.leaves(nnx.state(port)), leaves, strict=True))
    assert next(theirs.parameters()).dtype == torch.float32
    assert not jax.config.jax_enable_x64


def test_load_by_names_and_by_order():
    theirs, _, x = small()
    bare = Seq(jnn.Conv2d(3, 4, 3, padding=1, rngs=nnx.Rngs(3)), nnx.BatchNorm(4, rngs=R), nnx.relu)
    bare.eval()
    assert not parity.compare(theirs, bare, x).ok
    assert parity.compare(theirs, bare, x).diagnoses[0].mistake == "weights not loaded"
    report = parity.compare(theirs, bare, x, load=True)  # "0" is "layers/0" by order
    assert report.ok and "layers/0/kernel" in {row.port for row in report.rows}
    module, variables = linen_resnet(settled(ResNet(), image(2, 3, 32, 32)))
    fresh = module.init(jax.random.key(1), jnp.ones((1, 32, 32, 3)))
    assert parity.compare(settled(ResNet(), image(2, 3, 32, 32)), (module, fresh), image(2, 3, 32, 32), load=True).ok
    with pytest.raises(StateDictError, match="does not fit"):
        parity.compare(theirs, Seq(jnn.Conv2d(3, 5, 3, padding=1, rngs=R), nnx.relu), x, load=True)


def test_mapping():
    x = image(2, 4, 8, 8)
    theirs = settled(tn.Sequential(tn.Tanh(), tn.Tanh()), x)

    def port(x):
        with jax.named_scope("a"):
            x = jnp.tanh(x)
        with jax.named_scope("b"):
            return jnp.tanh(x)

    assert [row.name for row in parity.compare(theirs, port, x).rows] == ["", "input 0"]
    rows = parity.compare(theirs, port, x, mapping={"0": "a", "1": "b"}).rows
    assert [(row.name, row.port, row.paired) for row in rows[:2]] == [("0", "a", "mapping"), ("1", "b", "mapping")]
    assert not parity.compare(theirs, port, x, mapping={"0": "b"}).ok
    with pytest.raises(ParityError, match=r"mapping names 'c', which is no layer that the port called; it has"):
        parity.compare(theirs, port, x, mapping={"0": "c"})
    with pytest.raises(ParityError, match=r"mapping names '00'.*did you mean '0'"):
        parity.compare(theirs, port, x, mapping={"00": "a"})


def test_shapes_that_differ():
    x = image(2, 3, 9, 9)
    theirs = settled(tn.Sequential(tn.Conv2d(3, 4, 3), tn.ReLU()), x)
    port = loaded(lambda: jnn.Conv2d(3, 4, 3, padding=1, rngs=R), relu)(theirs)
    report = parity.compare(theirs, port, x)
    assert report.first_divergent == "0" and report.rows[0].numbers is None
    assert "2x4x7x7 / 2x9x9x4" in str(report)
    assert any("outputs have different shapes" in note for note in report.notes)


def test_ambiguous_layout_follows_the_inputs():
    """8 channels of 8 x 8: where values say nothing, images lie as the port's inputs do."""
    x = image(2, 3, 16, 16)
    theirs = settled(tn.Sequential(tn.Conv2d(3, 8, 3, 2, padding=1)), x)
    port = loaded(lambda: SameConv(3, 8, 3, 2, padding=1, rngs=R))(theirs)
    assert [d.mistake for d in parity.compare(theirs, port, x).diagnoses] == ["SAME padding"]


def test_not_a_number_is_a_difference_unless_both_have_it():
    x = image(2, 3)
    assert not parity.compare(tn.Tanh(), lambda x: jnp.tanh(x).at[0, 0].set(jnp.nan), x, gradients=False).ok
    x[0, 0] = float("nan")
    assert parity.compare(tn.Tanh(), jnp.tanh, x, gradients=False).ok


def test_layers_inside_scan_and_jit_are_recorded():
    class Deep(nnx.Module):
        def __init__(self):
            self.conv = jnn.Conv2d(3, 3, 3, padding=1, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return nnx.jit(lambda conv, x: conv(x))(self.conv, x)

    theirs, x = settled(tn.Sequential(tn.Conv2d(3, 3, 3, padding=1)), image(2, 3, 8, 8)), image(2, 3, 8, 8)
    port = interop.load_torch(Deep(), theirs, rename={"0": "conv"})
    report = parity.compare(theirs, port, x, rename={"0": "conv"})
    assert report.ok and report.rows[0].kind == "Conv2d", str(report)


ERRORS = {
    "no module": (lambda: parity.compare(torch.relu, jnp.tanh, image(2)), "torch_module is of type"),
    "no port": (lambda: parity.compare(tn.ReLU(), 3, image(2)), "The port is of type int, expected"),
    "Linen without variables": (
        lambda: parity.compare(tn.Linear(2, 2), nn.Dense(2), image(2, 2)), "Linen module, Dense, without variables"
    ),
    "inputs of PyTorch": (
        lambda: parity.compare(tn.Linear(2, 2), jnp.tanh, image(2, 3)), "PyTorch module cannot be called with these inputs"
    ),
    "inputs of the port": (
        lambda: parity.compare(tn.Linear(2, 2), lambda x: x @ jnp.ones((5, 5)), image(2, 2)),
        "The port cannot be called with these inputs, as PyTorch takes them",
    ),
    "dropout": (
        lambda: parity.compare(tn.Sequential(tn.Dropout(0.5)), jnp.tanh, image(2), train=True), "'0' draws random numbers"
    ),
    "text": (lambda: parity.compare(tn.ReLU(), jnp.tanh, "x"), "Input 0 is of type str"),
    "load into a function": (
        lambda: parity.compare(tn.Linear(2, 2), jnp.tanh, image(2, 2), load=True), "load=True needs a port with parameters"
    ),
    "a class": (lambda: parity.compare(tn.Linear(2, 2), NnxDigits, image(2, 2)), "The port is a class, NnxDigits"),
    "bare parameters": (
        lambda: parity.compare(tn.Linear(2, 2), (nn.Dense(2), {"kernel": 1}), image(2, 2)), "must be what its init returned"
    ),
    "not finite": (lambda: parity.compare(tn.ReLU(), jnp.tanh, image(2) * float("nan")), "gives no finite number"),
    "batches": (
        lambda: parity.compare_training(Digits(), 0, image(2, 1, 8, 8), optimizer=OPTIMIZERS["SGD"](Digits())),
        "batches must hold pairs",
    ),
    "an optimizer of the port": (
        lambda: parity.compare_training(Digits(), 0, batches(), optimizer=OPTIMIZERS["SGD"](Digits()), port_optimizer=3),
        "port_optimizer is of type int",
    ),
    "an optimizer of another module": (
        lambda: parity.compare_training(Digits(), 0, batches(), optimizer=OPTIMIZERS["SGD"](Digits())),
        "a parameter that is none of torch_module's",
    ),
    "groups": (
        lambda: parity.optax_of(torch.optim.SGD([{"params": [torch.ones(1)]}, {"params": [torch.ones(2)]}], lr=1)),
        "2 parameter groups",
    ),
    "another optimizer": (lambda: parity.optax_of(torch.optim.Rprop([torch.ones(1)])), "of type Rprop, expected"),
    "amsgrad": (lambda: parity.optax_of(torch.optim.Adam([torch.ones(1)], amsgrad=True)), "amsgrad=True, which optax has not"),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_bad_input_is_one_sentence(name):
    call, text = ERRORS[name]
    with pytest.raises(ParityError, match=re.escape(text)) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_assert_parity_names_the_layer_and_the_mistake():
    theirs, port, x = small()
    assert parity.assert_parity(theirs, port, x).ok
    port.layers[1].epsilon = 1e-3
    with pytest.raises(AssertionError, match=r"First divergent: 1\..*\n1: norm epsilon: epsilon is 0\.001"):
        parity.assert_parity(theirs, port, x)


def test_the_pytest_fixture(pytester):
    pytester.makeconftest('pytest_plugins = ["jconv.pytest_plugin"]')
    pytester.makepyfile(
        """
        import jax.numpy as jnp, torch
        def test_right(assert_parity): assert_parity(torch.nn.Tanh(), jnp.tanh, torch.ones(2, 3))
        def test_wrong(assert_parity): assert_parity(torch.nn.Tanh(), jnp.sin, torch.ones(2, 3))
        """
    )
    result = pytester.runpytest("-p", "no:cacheprovider")
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["*AssertionError: First divergent: (output)*"])


# --- training -----------------------------------------------------------------------------------------------


class Digits(tn.Module):
    def __init__(self):
        super().__init__()
        self.conv = tn.Conv2d(1, 6, 3, padding=1)
        self.bn = tn.BatchNorm2d(6)
        self.fc = tn.Linear(6 * 4 * 4, 10)

    def forward(self, x):
        return self.fc(F.max_pool2d(F.relu(self.bn(self.conv(x))), 2).flatten(1))


class NnxDigits(nnx.Module):
    def __init__(self, rngs):
        self.fc = nnx.Linear(6 * 4 * 4, 10, rngs=rngs)
        self.bn = nnx.BatchNorm(6, momentum=0.9, rngs=rngs)
        self.conv = jnn.Conv2d(1, 6, 3, padding=1, rngs=rngs)

    def __call__(self, x):
        x = nnx.max_pool(nnx.relu(self.bn(self.conv(x))), (2, 2), (2, 2))
        return self.fc(x.transpose(0, 3, 1, 2).reshape(len(x), -1))


class LinenDigits(nn.Module):
    @nn.compact
    def __call__(self, x, train=True):
        x = jl.Conv2d(6, 3, padding=1, name="conv")(x)
        x = nn.relu(nn.BatchNorm(not train, momentum=0.9, name="bn")(x))
        x = nn.max_pool(x, (2, 2), (2, 2))
        return nn.Dense(10, name="fc")(x.transpose(0, 3, 1, 2).reshape(len(x), -1))


def batches():
    rng = np.random.default_rng(0)
    return [
        (torch.from_numpy(rng.standard_normal((8, 1, 8, 8), np.float32)), torch.from_numpy(rng.integers(0, 10, 8)))
        for _ in range(3)
    ]


def with_groups(module):
    return torch.optim.SGD(
        [{"params": module.conv.parameters(), "lr": 0.01, "weight_decay": 0.1},
         {"params": [*module.bn.parameters(), *module.fc.parameters()]}], lr=0.1, momentum=0.5,
    )  # fmt: skip


OPTIMIZERS = {
    "SGD": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2),
    "Nesterov": lambda m: torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9, nesterov=True),
    "Adam": lambda m: torch.optim.Adam(m.parameters(), lr=1e-2, betas=(0.8, 0.99), eps=1e-6, weight_decay=1e-2),
    "AdamW": lambda m: torch.optim.AdamW(m.parameters(), lr=1e-2, weight_decay=0.1),
    "two groups": with_groups,
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_trainings_are_equal(name):
    torch.manual_seed(0)
    theirs = Digits()
    optimizer = OPTIMIZERS[name](theirs)
    report = parity.compare_training(theirs, NnxDigits(nnx.Rngs(0)), batches(), optimizer=optimizer, steps=7)
    assert report.ok and report.parts_at is None, str(report)
    assert len(report.exact) == 7 and report.exact[3] != report.exact[0]
    assert np.abs(report.wide - report.exact).max() < 1e-11
    assert {row.name for row in report.rows} == {"bn.running_mean", *(n for n, _ in theirs.named_parameters())}
    assert json.loads(report.to_json())["losses"]["torch_float64"] == report.exact.tolist()


def test_trainings_of_linen_are_equal():
    torch.manual_seed(0)
    theirs = Digits()
    variables = LinenDigits().init(jax.random.key(0), jnp.ones((1, 8, 8, 1)))
    report = parity.compare_training(
        theirs, (LinenDigits(), variables), batches(), optimizer=OPTIMIZERS["SGD"](theirs), float64=False
    )
    assert report.ok and report.wide is None, str(report)


PARTING = {
    # PyTorch's optimizer, optax's, what is said
    "momentum left out": (
        "SGD",
        lambda: optax.chain(optax.add_decayed_weights(1e-2), optax.sgd(0.1)),
        "momentum is 0.0",
    ),
    "weight decay left out": ("Adam", lambda: optax.adam(1e-2, 0.8, 0.99, 1e-6), "weight_decay is 0.0"),
    "weight decay decoupled": ("Adam", lambda: optax.adamw(1e-2, 0.8, 0.99, 1e-6, weight_decay=1e-2), "decoupled"),
    "Nesterov left out": ("Nesterov", lambda: optax.sgd(0.05, 0.9), "nesterov is False"),
    "another rate": ("AdamW", lambda: optax.adamw(1e-3, weight_decay=0.1), "learning rate is 0.001"),
    "another optimizer": ("AdamW", lambda: optax.rmsprop(1e-2), "the port's optimizer is not PyTorch's"),
}


@pytest.mark.parametrize("name", PARTING)
def test_an_optimizer_that_differs_is_named(name):
    torch.manual_seed(0)
    theirs, (kind, other, said) = Digits(), PARTING[name]
    report = parity.compare_training(
        theirs, NnxDigits(nnx.Rngs(0)), batches(), optimizer=OPTIMIZERS[kind](theirs), port_optimizer=other()
    )
    assert not report.ok and report.parts_at in (1, 2) and report.comparison.ok
    assert report.diagnoses[0][0] == "optimizer" and said in report.diagnoses[0][1], str(report)


def test_a_training_parts_by_a_mistake_of_the_network():
    torch.manual_seed(0)
    theirs = Digits()
    port = interop.load_torch(NnxDigits(nnx.Rngs(0)), theirs)
    port.bn.epsilon = 1e-2  # which is the port's own, also where weights are loaded
    report = parity.compare_training(
        theirs, port, batches(), optimizer=OPTIMIZERS["SGD"](theirs), load=True, loss=(F.cross_entropy, cross_entropy)
    )
    assert report.parts_at == 0 and report.comparison.first_divergent == "bn"
    assert report.diagnoses[0][0] == "norm epsilon", str(report)


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


# --- pages and pictures ---------------------------------------------------------------------------------------


def pages(folder):
    theirs, port, x = small()
    parity.compare(theirs, port, x).to_html(folder / "right.html")
    port.layers[1].epsilon = 1e-2
    parity.compare(theirs, port, x).to_html(folder / "wrong.html")
    torch.manual_seed(0)
    digits = Digits()
    trained = parity.compare_training(
        digits, NnxDigits(nnx.Rngs(0)), batches(), optimizer=OPTIMIZERS["SGD"](digits), port_optimizer=optax.sgd(0.1)
    )
    trained.to_html(folder / "training.html")
    trained.plot(folder / "losses.png")
    return [folder / f"{name}.html" for name in ("right", "wrong", "training")]


def test_pages_need_nothing_else(tmp_path):
    for path in pages(tmp_path):
        text = path.read_text()
        assert "<script" not in text and not re.search(r"""(?:src|href)=["'](?!data:|#)""", text)
        assert text.count("<svg") >= 1
    assert "norm epsilon" in (tmp_path / "wrong.html").read_text()
    assert (tmp_path / "wrong.html").read_text().count(
        'src="data:image/png;base64,'
    ) == 9  # two layers and the whole, three maps
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ParityError, match="cannot be written"):
        theirs, port, x = small()
        parity.compare(theirs, port, x, gradients=False).to_html(tmp_path / "no" / "page.html")


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(BROWSER is None, reason="needs a browser: chromium")
def test_a_browser_shows_the_pages_without_an_error(tmp_path):
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--window-size=1240,1600"]
    planted = tmp_path / "planted.html"
    planted.write_text("<script>console.error('planted')</script>")
    for path in [planted, *pages(tmp_path)]:
        picture = path.with_suffix(".png")
        command = [BROWSER, *flags, f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={picture}", path.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert picture.exists(), done.stderr
        assert ("CONSOLE" in done.stderr) == (path is planted), done.stderr
        if path is not planted:
            pixels = np.asarray(Image.open(picture).convert("L"), np.float64)
            assert pixels.shape == (1600, 1240) and pixels.std() > 10  # something is drawn


# --- several outputs, and of any kind -------------------------------------------------------------------------


class Several(tn.Module):
    def forward(self, x, tokens):
        return {"b": x * 2, "a": (x.argmax(1), tokens > 2), "c": torch.fft.rfft(x)}


def several(x, tokens):
    return {"c": jnp.fft.rfft(x), "b": x * 2, "a": (x.argmax(1), tokens > 2)}


def test_dicts_integers_truth_values_and_complex_numbers():
    x, tokens = image(2, 8), torch.arange(6).reshape(2, 3)
    report = parity.compare(Several(), several, x, tokens)
    assert report.ok, str(report)
    assert [row.name for row in report.rows] == ["[0]", "[1]", "[2]", "[3]", "input 0"]


@pytest.mark.parametrize(
    "key, wrong", [("b", lambda v: v + 1e-3), ("c", lambda v: v.conj()), ("a", lambda v: (v[0] + 1, v[1]))]
)
def test_one_of_several_outputs_differs(key, wrong):
    def port(x, tokens):
        out = several(x, tokens)
        return out | {key: wrong(out[key])}

    assert not parity.compare(Several(), port, image(2, 8), torch.arange(6).reshape(2, 3)).ok


def test_another_number_of_outputs_differs():
    report = parity.compare(Several(), lambda x, t: several(x, t)["b"], image(2, 8), torch.arange(6).reshape(2, 3))
    assert report.first_divergent == "(output)" and "4 arrays / 1 arrays" in str(report)


def test_a_network_that_draws_random_numbers_judges_nothing():
    with pytest.raises(ParityError, match="draws random numbers, or float32 is not enough"):
        parity.compare(Function(lambda _, x: x + torch.randn_like(x)), lambda x: x, image(2, 8))


def test_a_gradient_is_judged_in_float64():
    """A gradient that is off by a millionth, which float32 would not show."""

    @jax.custom_vjp
    def tanh(x):
        return jnp.tanh(x)

    tanh.defvjp(lambda x: (jnp.tanh(x), x), lambda x, g: (g * (1 - jnp.tanh(x) ** 2) * (1 + 1e-7),))
    report = parity.compare(tn.Tanh(), tanh, image(2, 8))
    assert report.first_divergent == "input 0" and report.rows[0].ok


# --- what a review found: each once called wrong networks equal, or right ones wrong ------------------------------


def test_an_output_that_is_not_there_is_no_parity():
    x = image(2, 5)
    two = Function(lambda _, x: (torch.tanh(x), torch.exp(x)))
    for port in (lambda x: None, jnp.tanh, lambda x: (jnp.tanh(x), None)):
        assert not parity.compare(two, port, x).ok
    with pytest.raises(ParityError, match="returns no tensors"):
        parity.compare(Function(lambda _, x: 3), jnp.tanh, x)


@pytest.mark.parametrize(
    "axes, shape", [((1, 0), (5, 7)), ((1, 0, 2), (3, 5, 7)), ((0, 2, 1), (2, 8, 8)), ((0, 2, 1), (2, 5, 7))]
)
def test_axes_that_are_swapped_differ(axes, shape):
    assert not parity.compare(tn.Tanh(), lambda x: jnp.tanh(x).transpose(axes), image(*shape)).ok


def test_an_image_whose_axes_are_swapped_differs():
    x = image(2, 3, 8, 10)
    theirs = settled(tn.Sequential(tn.Conv2d(3, 4, 3)), x)
    port = loaded(lambda: jnn.Conv2d(3, 4, 3, rngs=R), lambda: lambda x: x.swapaxes(1, 2))(theirs)
    assert not parity.compare(theirs, port, x).ok


def test_a_gradient_that_is_not_finite_in_float32_differs():
    x = image(2, 5)
    x[0, 0] = 100
    softplus = lambda x: jnp.where(x > 50, x, jnp.log1p(jnp.exp(x)))
    report = parity.compare(Function(lambda _, x: F.softplus(x)), softplus, x)
    assert report.first_divergent == "input 0" and report.rows[0].ok


def test_a_mask_hides_nothing():
    x = image(4, 6)
    mask = np.arange(6) > 3

    def masked(fill, where):
        return lambda y: where(mask, fill, y)

    theirs = settled(
        Function(lambda self, x: self.l(x).masked_fill(torch.from_numpy(mask), -1e9), l=tn.Linear(6, 6)), x
    )
    w, b = (jnp.asarray(p.detach().numpy()) for p in theirs.parameters())
    assert parity.compare(theirs, lambda x: jnp.where(mask, -1e9, x @ w.T + b), x, gradients=False).ok
    assert not parity.compare(theirs, lambda x: jnp.where(mask, -1e9, x @ w.T), x, gradients=False).ok


def test_integers_are_exact():
    x = image(3, 4)
    theirs = Function(lambda _, x: (x * 1e7).long())
    assert not parity.compare(theirs, lambda x: (x * 1e7).astype(int) + 3, x).ok


def test_epsilon_is_not_mended_by_loading():
    theirs, _, x = small()
    port = Seq(jnn.Conv2d(3, 4, 3, padding=1, rngs=R), nnx.BatchNorm(4, epsilon=1e-1, rngs=R), nnx.relu)
    port.eval()
    report = parity.compare(theirs, port, x, load=True)
    assert [d.mistake for d in report.diagnoses] == ["norm epsilon"] and port.layers[1].epsilon == 1e-1


def test_the_momentum_of_a_training_is_seen_at_its_end():
    torch.manual_seed(0)
    theirs, port = Digits(), NnxDigits(nnx.Rngs(0))
    port.bn.momentum = 0.99
    report = parity.compare_training(theirs, port, batches(), optimizer=OPTIMIZERS["SGD"](theirs))
    assert not report.ok and report.parts_at is None and report.diagnoses[0][0] == "BatchNorm momentum", str(report)


def test_a_part_of_the_parameters_is_trained():
    torch.manual_seed(0)
    theirs = Digits()
    theirs.bn.weight.requires_grad_(False)
    optimizer = torch.optim.SGD([*theirs.fc.parameters(), *theirs.bn.parameters()], lr=0.1)
    report = parity.compare_training(theirs, NnxDigits(nnx.Rngs(0)), batches(), optimizer=optimizer)
    assert report.ok, str(report)


def test_modules_without_parameters_run_in_float64():
    x = image(2, 5)
    report = parity.compare(
        Function(lambda _, x: torch.exp(x).pow(9).cumprod(-1)), lambda x: jnp.cumprod(jnp.exp(x) ** 9, -1), x
    )
    assert report.ok and report.rows[0].numbers.exact < 1e-12, str(report)
    cell = settled(tn.GRUCell(5, 4), x)  # which makes its own state
    assert parity.compare(cell, lambda x: gru(x, *(jnp.asarray(p.detach().numpy()) for p in cell.parameters())), x).ok


def gru(x, w, u, b, c):
    h = jnp.zeros((len(x), 4))
    r, z, n = jnp.split(x @ w.T + b, 3, -1)
    hr, hz, hn = jnp.split(h @ u.T + c, 3, -1)
    z = jax.nn.sigmoid(z + hz)
    return (1 - z) * jnp.tanh(n + jax.nn.sigmoid(r + hr) * hn) + z * h


class Rematerialised(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(5, name="head")(nn.remat(nn.Dense)(6, name="body")(x))


@nnx.jit
def traced_before(layer, x):
    return layer(x)


def test_layers_inside_remat_and_jit():
    x = image(3, 4)
    theirs = settled(Function(lambda self, x: self.head(self.body(x)), body=tn.Linear(4, 6), head=tn.Linear(6, 5)), x)
    module = Rematerialised()
    report = parity.compare(theirs, (module, module.init(jax.random.key(0), jnp.ones((1, 4)))), x, load=True)
    assert report.ok and {"head"} <= {row.name for row in report.rows}, str(report)
    port = Call(
        lambda self, x: self.head(traced_before(self.body, x)),
        body=nnx.Linear(4, 6, rngs=R),
        head=nnx.Linear(6, 5, rngs=R),
    )
    port(jnp.asarray(x))
    report = parity.compare(theirs, port, x, load=True)
    assert report.ok and {"head"} <= {row.name for row in report.rows}, str(report)


@pytest.mark.parametrize("before", [True, False], ids=["traced_before", "first_traced_here"])
def test_a_port_that_runs_traced_only_is_judged_in_float64(before):
    """Its hidden layers are looked for operation by operation, where it raises; that attempt leaves nothing behind."""
    x = image(3, 4)
    theirs = settled(Function(lambda self, x: self.head(self.body(x)), body=tn.Linear(4, 6), head=tn.Linear(6, 5)), x)
    body = nnx.jit(lambda layer, x: layer(x))

    def traced_only(self, x):
        if not isinstance(x, jax.core.Tracer):
            raise ValueError("runs under jit")
        return self.head(body(self.body, x))

    port = Call(traced_only, body=nnx.Linear(4, 6, rngs=R), head=nnx.Linear(6, 5, rngs=R))
    if before:
        body(port.body, jnp.asarray(x))
    report = parity.compare(theirs, port, x, load=True)
    assert report.ok and not any("float64" in note for note in report.notes), str(report)


def test_a_fused_layer_is_paired_with_none_of_its_parts():
    x = image(3, 8)
    theirs = settled(Function(lambda self, x: sum(self.qkv(x).chunk(3, -1)), qkv=tn.Linear(8, 24)), x)
    parts = [nnx.Linear(8, 8, rngs=R) for _ in range(3)]
    for index, part in enumerate(parts):
        part.kernel.set_value(jnp.asarray(theirs.qkv.weight.detach().numpy()[8 * index :][:8].T))
        part.bias.set_value(jnp.asarray(theirs.qkv.bias.detach().numpy()[8 * index :][:8]))
    port = Call(lambda self, x: self.q(x) + self.k(x) + self.v(x), **dict(zip("qkv", parts)))
    report = parity.compare(theirs, port, x)
    assert report.ok and any("not compared" in note for note in report.notes), str(report)


def test_relu_for_dropout_is_not_dropout():
    x = image(2, 3, 12, 12)
    theirs = settled(Theirs(tn.Dropout(0.5)), x)
    port = interop.load_torch(Ours(Call(lambda _, x: nnx.relu(x))), theirs)
    assert "dropout in train mode" not in {d.mistake for d in parity.compare(theirs, port, x).diagnoses}


def test_flax_is_left_as_it_was():
    before = {cls: vars(cls)["__call__"] for cls in (nnx.Linear, nnx.Conv, nnx.BatchNorm, jnn.Conv2d.__mro__[1])}
    theirs, port, x = small()

    def compare(_):
        return parity.compare(theirs, port, x, gradients=False).ok

    with ThreadPoolExecutor(3) as pool:
        assert all(pool.map(compare, range(6)))
    assert before == {cls: vars(cls)["__call__"] for cls in before}


def test_threads_leave_the_default_dtype_as_it_was():
    """PyTorch's default dtype is the process's: two that set it and put it back in turns would leave float64."""
    entered = threading.Barrier(2)

    def other():
        entered.wait()
        with recording.new_tensors(torch.float64):
            time.sleep(0.2)

    with ThreadPoolExecutor(1) as pool:
        with recording.new_tensors(torch.float64):
            done = pool.submit(other)
            entered.wait()
            time.sleep(0.1)
        done.result()
    assert torch.get_default_dtype() == torch.float32


def test_heads_beside_each_other_are_features():
    """PyTorch's Linear to 16 features, and the port's to 4 heads of 4."""
    x = image(2, 7, 16)
    theirs = settled(Function(lambda self, x: torch.tanh(self.query(x)), query=tn.Linear(16, 16)), x)
    port = Call(lambda self, x: jnp.tanh(self.query(x)).reshape(2, 7, 16), query=nnx.LinearGeneral(16, (4, 4), rngs=R))
    port.query.kernel.set_value(jnp.asarray(theirs.query.weight.detach().numpy().T.reshape(16, 4, 4)))
    port.query.bias.set_value(jnp.asarray(theirs.query.bias.detach().numpy().reshape(4, 4)))
    report = parity.compare(theirs, port, x)
    assert report.ok and report.rows[0].view == "reshape" and any("not compared" in n for n in report.notes), str(
        report
    )


def test_a_layer_that_takes_keywords_differs_without_an_exception():
    class Scaled(tn.Module):
        def forward(self, x, *, scale):
            return x * scale

    class Outer(tn.Module):
        def __init__(self):
            super().__init__()
            self.scaled = Scaled()

        def forward(self, x):
            return self.scaled(x, scale=torch.full_like(x, 2.0))

    port = Call(lambda self, x: self.scaled(x, scale=jnp.full_like(x, 3.0)), scaled=Tripled())
    report = parity.compare(Outer(), port, image(2, 5))
    assert report.first_divergent == "scaled", str(report)


class Tripled(nnx.Module):
    def __call__(self, x, *, scale):
        return x * scale
