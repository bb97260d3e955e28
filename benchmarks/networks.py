"""Times whole networks: Flax on jconv, stock Flax, torch eager and compiled, ONNX Runtime; forward and train step.

    python benchmarks/networks.py [--threads 1|2] [--only REGEX] [--quick] [--no-torch-compile] [--again]

Each network is written once, as a tree of layers, and built twice: in Flax NNX, channel-last, with jconv's or
Flax's own convolution classes; and in torch. torch's weights are loaded into Flax. A contender whose output (or,
for a train step, whose change of the weights) is not torch's is not timed.

Without --threads it runs twice, for 1T (one pinned core, process CPU time) and 2T (two cores, wall time).

- Forward: batch norm uses its running statistics and is not folded into convolutions, except by ONNX Runtime,
  whose optimiser does that when it loads the network.
- Train step: mean squared error, backward, SGD with momentum (optax, torch.optim), batch norm in train mode.
  jconv and stock Flax compile the whole step, and its state is donated. torch.compile compiles network and
  backward; the optimizer is torch's own.
- Inputs lie in each contender's own layout before the clock starts: channel-last for JAX, contiguous and
  channels_last for torch eager (the report takes the faster), channels_last for torch.compile where there is one,
  channel-first for ONNX Runtime. float32 throughout.
"""

from __future__ import annotations

import argparse
import copy
import functools
import io
import logging
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax
import jax.numpy as jnp
import ledger
import numpy as np
import optax
import timing
import torch
from flax import nnx
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import jconv.nnx
from jconv import interop

LEARNING_RATE, MOMENTUM = 1e-2, 0.9
FORWARD, STEP = MODES = ("forward", "train step")
# Gradients in float32 through batch norm of few values are themselves uncertain: at 64 x 64, torch's two memory
# formats are 0.05 apart. A wrong gradient is apart by its own size.
MOST_DIFFERENCE = {FORWARD: 1e-3, STEP: 0.1}
JAX_LAYERS = {
    "jconv": (jconv.nnx.Conv, jconv.nnx.ConvTranspose),
    "stock Flax": (nnx.Conv, nnx.ConvTranspose),
}

# The layers of which the networks are made.


@dataclass(frozen=True)
class Conv:
    inputs: int
    outputs: int
    window: tuple[int, ...]
    stride: int = 1
    padding: tuple[tuple[int, int], ...] | None = None  # None: half the window on both sides
    dilation: int = 1
    groups: int = 1
    bias: bool = False

    @property
    def pads(self) -> tuple[tuple[int, int], ...]:
        return self.padding or tuple((k // 2, k // 2) for k in self.window)


@dataclass(frozen=True)
class Up:
    """A transposed convolution whose window and stride are 2."""

    inputs: int
    outputs: int
    rank: int


@dataclass(frozen=True)
class BatchNorm:
    features: int
    rank: int
    epsilon: float


@dataclass(frozen=True)
class LayerNorm:
    """Over the channels."""

    features: int


@dataclass(frozen=True)
class Linear:
    """Over the channels."""

    inputs: int
    outputs: int


@dataclass(frozen=True)
class Scale:
    """A factor for each channel."""

    features: int


@dataclass(frozen=True)
class Activation:
    name: str


@dataclass(frozen=True)
class MaxPool:
    window: int
    stride: int
    padding: int
    rank: int


@dataclass(frozen=True)
class GlobalMean:
    rank: int


@dataclass(frozen=True)
class Join:
    """What the branches make of one input, joined. No branches: the input itself."""

    how: str  # "chain" (each gets the result of the one before), "sum", "product" or "concatenation" over channels
    branches: tuple[Any, ...]


def chain(*parts: Any) -> Join:
    return Join("chain", parts)


SAME = chain()

# The networks.


@dataclass(frozen=True)
class Network:
    """A tree of layers, the spatial size of its input, and the batches that it is timed with."""

    layers: Join
    size: tuple[int, ...]
    channels: int
    batches: dict[str, tuple[int, ...]]


IMAGE_BATCHES = {FORWARD: (1, 8), STEP: (8,)}
LARGE_BATCHES = {FORWARD: (1,), STEP: (1,)}


def conv_norm(conv: Conv, activation: str | None = None, epsilon: float = 1e-5) -> Iterator[Any]:
    yield conv
    yield BatchNorm(conv.outputs, len(conv.window), epsilon)
    if activation is not None:
        yield Activation(activation)


def inverted_residual(
    inputs: int, outputs: int, expand: int, window: int, stride: int, pads: Any, epsilon: float
) -> Join:
    wide, parts = inputs * expand, []
    if expand != 1:
        parts += conv_norm(Conv(inputs, wide, (1, 1)), "relu6", epsilon)
    parts += conv_norm(Conv(wide, wide, (window,) * 2, stride, pads, groups=wide), "relu6", epsilon)
    parts += conv_norm(Conv(wide, outputs, (1, 1)), None, epsilon)
    return Join("sum", (SAME, chain(*parts))) if stride == 1 and inputs == outputs else chain(*parts)


def mobile(stages: Any, size: int, width: float, *, same: bool, epsilon: float) -> Network:
    """MobileNetV2 and EfficientNet-Lite0. ``same``: TensorFlow's padding, which is larger on the high side."""

    def pads(here: int, window: int, stride: int) -> tuple[tuple[int, int], ...] | None:
        total = max((-(-here // stride) - 1) * stride + window - here, 0)
        return ((total // 2, total - total // 2),) * 2 if same else None

    inputs = _scaled(32, width)
    parts = list(conv_norm(Conv(3, inputs, (3, 3), 2, pads(size, 3, 2)), "relu6", epsilon))
    here = -(-size // 2)
    for repeats, window, stride, expand, channels in stages:
        for repeat in range(repeats):
            step = stride if repeat == 0 else 1
            outputs = _scaled(channels, width)
            parts.append(inverted_residual(inputs, outputs, expand, window, step, pads(here, window, step), epsilon))
            inputs, here = outputs, -(-here // step)
    head = _scaled(1280, width)
    parts += [*conv_norm(Conv(inputs, head, (1, 1)), "relu6", epsilon), GlobalMean(2), Linear(head, 1000)]
    return Network(chain(*parts), (size, size), 3, IMAGE_BATCHES)


def efficientnet_lite0(size: int = 224, width: float = 1) -> Network:
    stages = (  # repeats, window, stride, expansion, channels
        (1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112), (4, 5, 2, 6, 192),
        (1, 3, 1, 6, 320),
    )  # fmt: skip
    return mobile(stages, size, width, same=True, epsilon=1e-3)


def mobilenet_v2(size: int = 224, width: float = 1) -> Network:
    stages = (
        (1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (3, 3, 2, 6, 32), (4, 3, 2, 6, 64), (3, 3, 1, 6, 96), (3, 3, 2, 6, 160),
        (1, 3, 1, 6, 320),
    )  # fmt: skip
    return mobile(stages, size, width, same=False, epsilon=1e-5)


def resnet(size: int, width: float, groups: int, base: int) -> Network:
    """Bottlenecks of (1x1, 3x3, 1x1) in stages of 3, 4, 6, 3; the stride is the 3x3's."""
    inputs = _scaled(64, width)
    parts = [*conv_norm(Conv(3, inputs, (7, 7), 2), "relu"), MaxPool(3, 2, 1, 2)]
    for stage, repeats in enumerate((3, 4, 6, 3)):
        middle, outputs = _scaled(base << stage, width), _scaled(256 << stage, width)
        for repeat in range(repeats):
            stride = 2 if repeat == 0 and stage > 0 else 1
            main = chain(
                *conv_norm(Conv(inputs, middle, (1, 1)), "relu"),
                *conv_norm(Conv(middle, middle, (3, 3), stride, groups=groups), "relu"),
                *conv_norm(Conv(middle, outputs, (1, 1))),
            )
            shortcut = chain(*conv_norm(Conv(inputs, outputs, (1, 1), stride))) if repeat == 0 else SAME
            parts += [Join("sum", (main, shortcut)), Activation("relu")]
            inputs = outputs
    parts += [GlobalMean(2), Linear(inputs, 1000)]
    return Network(chain(*parts), (size, size), 3, IMAGE_BATCHES)


def resnet50(size: int = 224, width: float = 1) -> Network:
    return resnet(size, width, groups=1, base=64)


def resnext50(size: int = 224, width: float = 1) -> Network:
    return resnet(size, width, groups=32 if width == 1 else 4, base=128)


def convnext_tiny(size: int = 224, width: float = 1) -> Network:
    parts: list[Any] = []
    inputs = 3
    for stage, (repeats, channels) in enumerate(zip((3, 3, 9, 3), (96, 192, 384, 768), strict=True)):
        c, k = _scaled(channels, width), 4 if stage == 0 else 2
        down = Conv(inputs, c, (k, k), k, ((0, 0), (0, 0)), bias=True)
        parts += [down, LayerNorm(c)] if stage == 0 else [LayerNorm(inputs), down]
        for _ in range(repeats):
            block = chain(
                Conv(c, c, (7, 7), groups=c, bias=True), LayerNorm(c), Linear(c, 4 * c), Activation("gelu"),
                Linear(4 * c, c), Scale(c),
            )  # fmt: skip
            parts.append(Join("sum", (SAME, block)))
        inputs = c
    parts += [GlobalMean(2), LayerNorm(inputs), Linear(inputs, 1000)]
    return Network(chain(*parts), (size, size), 3, IMAGE_BATCHES)


def unet(size: int = 256, width: float = 1, *, rank: int = 2, base: int = 32, depth: int = 4, channels: int = 3):
    """Two 3x3 convolutions a level, with batch norm; half the size and twice the channels on each level below."""

    def twice(inputs: int, outputs: int) -> Join:
        window = (3,) * rank
        first, second = (Conv(c, outputs, window) for c in (inputs, outputs))
        return chain(*conv_norm(first, "relu"), *conv_norm(second, "relu"))

    def level(inputs: int, below: int) -> Join:
        c = _scaled(base << (depth - below), width)
        if below == 0:
            return twice(inputs, c)
        deeper = chain(
            MaxPool(2, 2, 0, rank), level(c, below - 1), Up(_scaled(base << (depth - below + 1), width), c, rank)
        )
        return chain(twice(inputs, c), Join("concatenation", (SAME, deeper)), twice(2 * c, c))

    head = Conv(_scaled(base, width), 2, (1,) * rank, bias=True)
    return Network(chain(level(channels, depth), head), (size,) * rank, channels, LARGE_BATCHES)


def unet_3d(size: int = 64, width: float = 1) -> Network:
    return unet(size, width, rank=3, base=16, depth=3, channels=1)


def wavenet(size: int = 16000, width: float = 1) -> Network:
    """Two cycles of ten gated, causal, dilated convolutions with a window of 2."""
    c = _scaled(32, width)
    parts: list[Any] = [Conv(1, c, (1,), bias=True)]
    for dilation in 2 * [1 << i for i in range(10)]:
        dilated = Conv(c, c, (2,), padding=((dilation, 0),), dilation=dilation, bias=True)
        gate = Join("product", (chain(dilated, Activation("tanh")), chain(dilated, Activation("sigmoid"))))
        parts.append(Join("sum", (SAME, chain(gate, Conv(c, c, (1,), bias=True)))))
    parts += [Activation("relu"), Conv(c, c, (1,), bias=True), Activation("relu"), Conv(c, 256, (1,), bias=True)]
    return Network(chain(*parts), (size,), 1, LARGE_BATCHES)


NETWORKS: dict[str, Callable[..., Network]] = {
    "EfficientNet-Lite0": efficientnet_lite0,
    "MobileNetV2": mobilenet_v2,
    "ResNet-50": resnet50,
    "ResNeXt-50 32x4d": resnext50,
    "ConvNeXt-T": convnext_tiny,
    "U-Net": unet,
    "WaveNet": wavenet,
    "3-D U-Net": unet_3d,
}
QUICK = ("EfficientNet-Lite0", "WaveNet")


def _scaled(channels: int, width: float) -> int:
    return channels if width == 1 else max(8, int(channels * width) // 8 * 8)


# The two builders. Both nest Sequential and Branches alike, so that torch's names are Flax's.


def flax_net(node: Any, layers: tuple[Any, Any], rngs: nnx.Rngs) -> Any:
    """The tree in Flax NNX, channel-last; ``layers``: the classes for a convolution and for a transposed one."""
    conv, conv_transpose = layers
    match node:
        case Conv():
            return conv(
                node.inputs, node.outputs, node.window, node.stride, padding=node.pads,
                kernel_dilation=node.dilation, feature_group_count=node.groups, use_bias=node.bias, rngs=rngs,
            )  # fmt: skip
        case Up():
            window = (2,) * node.rank
            return conv_transpose(node.inputs, node.outputs, window, window, padding="VALID", rngs=rngs)
        case BatchNorm():
            return nnx.BatchNorm(node.features, momentum=0.9, epsilon=node.epsilon, rngs=rngs)
        case LayerNorm():
            return nnx.LayerNorm(node.features, epsilon=1e-6, rngs=rngs)
        case Linear():
            return nnx.Linear(node.inputs, node.outputs, rngs=rngs)
        case Scale():
            return FlaxScale(node.features)
        case Activation("gelu"):
            return functools.partial(nnx.gelu, approximate=False)
        case Activation():
            return getattr(nnx, node.name)
        case MaxPool():
            window, strides = (node.window,) * node.rank, (node.stride,) * node.rank
            pads: Any = ((node.padding, node.padding),) * node.rank
            return functools.partial(nnx.max_pool, window_shape=window, strides=strides, padding=pads)
        case GlobalMean():
            return functools.partial(jnp.mean, axis=tuple(range(1, node.rank + 1)))
        case Join():
            branches = [flax_net(branch, layers, rngs) for branch in node.branches]
            return nnx.Sequential(*branches) if node.how == "chain" else FlaxBranches(node.how, branches)
    raise TypeError(node)


class FlaxScale(nnx.Module):
    def __init__(self, features: int):
        self.gamma = nnx.Param(jnp.ones(features))

    def __call__(self, x: jax.Array) -> jax.Array:
        return x * self.gamma[...]


class FlaxBranches(nnx.Module):
    def __init__(self, how: str, branches: list[Any]):
        self.how = how
        self.branches = nnx.List(branches)

    def __call__(self, x: jax.Array) -> jax.Array:
        first, second = (branch(x) for branch in self.branches)
        if self.how == "concatenation":
            return jnp.concatenate((first, second), -1)
        return first + second if self.how == "sum" else first * second


def torch_net(node: Any) -> torch.nn.Module:
    """The tree in torch, channel-first."""
    nn = torch.nn
    match node:
        case Conv():
            low, high = ([pair[side] for pair in node.pads] for side in (0, 1))
            rank = len(node.window)
            geometry = (node.inputs, node.outputs, node.window, node.stride)
            if low == high:
                conv = getattr(nn, f"Conv{rank}d")
                return conv(*geometry, low, node.dilation, node.groups, node.bias)
            conv = {1: PadConv1d, 2: PadConv2d}[rank](*geometry, 0, node.dilation, node.groups, node.bias)
            conv.sides = [side for pair in reversed(node.pads) for side in pair]
            return conv
        case Up():
            return getattr(nn, f"ConvTranspose{node.rank}d")(node.inputs, node.outputs, 2, 2)
        case BatchNorm():
            return getattr(nn, f"BatchNorm{node.rank}d")(node.features, eps=node.epsilon)
        case LayerNorm():
            return ChannelLayerNorm(node.features, eps=1e-6)
        case Linear():
            return ChannelLinear(node.inputs, node.outputs)
        case Scale():
            return TorchScale(node.features)
        case Activation():
            names = {"relu": nn.ReLU, "relu6": nn.ReLU6, "gelu": nn.GELU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid}
            return names[node.name]()
        case MaxPool():
            return getattr(nn, f"MaxPool{node.rank}d")(node.window, node.stride, node.padding)
        case GlobalMean():
            return TorchMean()
        case Join():
            branches = [torch_net(branch) for branch in node.branches]
            return nn.Sequential(*branches) if node.how == "chain" else TorchBranches(node.how, branches)
    raise TypeError(node)


class PadConv1d(torch.nn.Conv1d):
    sides: list[int]

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(torch.nn.functional.pad(input, self.sides))


class PadConv2d(torch.nn.Conv2d):
    sides: list[int]

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(torch.nn.functional.pad(input, self.sides))


class ChannelLinear(torch.nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input.movedim(1, -1)).movedim(-1, 1)


class ChannelLayerNorm(torch.nn.LayerNorm):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input.movedim(1, -1)).movedim(-1, 1)


class TorchScale(torch.nn.Module):
    def __init__(self, features: int):
        super().__init__()
        self.gamma = torch.nn.Parameter(torch.ones(features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.gamma.view(-1, *(1,) * (x.ndim - 2))


class TorchMean(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(2).mean(2)


class TorchBranches(torch.nn.Module):
    def __init__(self, how: str, branches: list[torch.nn.Module]):
        super().__init__()
        self.how = how
        self.branches = torch.nn.ModuleList(branches)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = (branch(x) for branch in self.branches)
        if self.how == "concatenation":
            return torch.cat((first, second), 1)
        return first + second if self.how == "sum" else first * second


# What is timed.


@dataclass(frozen=True)
class Contender:
    """A program without arguments left to give.

    Attributes:
        run: one call, its result awaited.
        result: the network's output, channel-first; or, after one train step, its weights under torch's names.
        compile_s: seconds that XLA took, on the clock of the run.
        temp_bytes: XLA's temporaries.
    """

    run: Callable[[], Any]
    result: Any
    compile_s: float | None = None
    temp_bytes: int | None = None


@dataclass(frozen=True)
class Task:
    """One network with its weights and input, channel-first, and for a train step with the wanted output."""

    network: Network
    mode: str
    weights: torch.nn.Module
    x: torch.Tensor
    target: torch.Tensor

    @property
    def formats(self) -> dict[str, torch.memory_format]:
        contiguous = {"contiguous": torch.contiguous_format}
        last = {2: torch.channels_last, 3: torch.channels_last_3d}.get(len(self.network.size))
        return contiguous if last is None else contiguous | {"channels_last": last}


def task_of(network: Network, mode: str, batch: int) -> Task:
    """Weights whose signal neither fades nor grows: He's normal values, and the input's own batch statistics."""
    torch.manual_seed(0)
    net = torch_net(network.layers)
    for module in net.modules():
        if isinstance(module, torch.nn.modules.conv._ConvNd):
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    x = torch.randn(batch, network.channels, *network.size)
    norms = [m for m in net.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        net.train()(x)
    for norm in norms:
        norm.momentum = 0.1
    with torch.inference_mode():
        target = torch.randn(net.eval()(x).shape)
    return Task(network, mode, net, x, target.clone())


def jax_contender(timer: timing.Timer, task: Task, layers: tuple[Any, Any]) -> Contender:
    shapes = nnx.eval_shape(lambda: flax_net(task.network.layers, layers, nnx.Rngs(0)))
    model = interop.load_torch(shapes, task.weights)
    x, y = (jnp.asarray(np.moveaxis(t.numpy(), 1, -1).copy()) for t in (task.x, task.target))
    if task.mode == FORWARD:
        model.eval()
        graph, state = nnx.split(model)
        program, compile_s, temp_bytes = compiled(timer, lambda state, x: nnx.merge(graph, state)(x), state, x)
        out = np.moveaxis(np.asarray(program(state, x)), -1, 1)
        return Contender(lambda: program(state, x).block_until_ready(), out, compile_s, temp_bytes)

    model.train()
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    optimizer = optax.sgd(LEARNING_RATE, MOMENTUM)

    def step(held: Any, x: jax.Array, y: jax.Array) -> Any:
        params, rest, momentum = held

        def loss_of(params: Any) -> Any:
            model = nnx.merge(graph, params, rest, copy=True)
            return ((model(x) - y) ** 2).mean(), nnx.state(model, nnx.Not(nnx.Param))

        (loss, rest), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
        updates, momentum = optimizer.update(grads, momentum, params)
        return (optax.apply_updates(params, updates), rest, momentum), loss

    held = (params, rest, optimizer.init(params))
    program, compile_s, temp_bytes = compiled(timer, step, held, x, y, donate_argnums=0)

    def run() -> None:
        nonlocal held
        held, loss = program(held, x, y)
        loss.block_until_ready()

    run()
    weights = interop.to_torch(nnx.merge(graph, *held[:2]))
    return Contender(run, weights, compile_s, temp_bytes)


def compiled(timer: timing.Timer, call: Callable[..., Any], *operands: Any, **options: Any) -> tuple[Any, float, int]:
    start = timer.now()
    program = jax.jit(call, **options).lower(*operands).compile()
    compile_s = timer.now() - start
    memory = program.memory_analysis()
    assert memory is not None
    return program, compile_s, memory.temp_size_in_bytes


def torch_contender(task: Task, memory_format: torch.memory_format, *, compile: bool) -> Contender:
    net: Any = copy.deepcopy(task.weights)
    net.to(memory_format=memory_format)
    x, y = (t.contiguous(memory_format=memory_format) if t.ndim > 2 else t for t in (task.x, task.target))
    call = torch.compile(net) if compile else net
    if task.mode == FORWARD:
        net.eval()

        def forward() -> torch.Tensor:
            with torch.inference_mode():
                return call(x)

        return Contender(forward, forward().contiguous().numpy())

    net.train()
    optimizer = torch.optim.SGD(net.parameters(), LEARNING_RATE, MOMENTUM)

    def step() -> None:
        optimizer.zero_grad()
        ((call(x) - y) ** 2).mean().backward()
        optimizer.step()

    step()
    return Contender(step, {name: t.detach().clone().numpy() for name, t in net.state_dict().items()})


def onnx_contender(timer: timing.Timer, task: Task) -> Contender:
    import onnxruntime  # pyright: ignore[reportMissingImports]

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = timer.threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.force_spinning_stop", "1")  # else its threads spin in others' samples
    with TemporaryDirectory() as folder:
        path = Path(folder) / "network.onnx"
        with redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the exporter's own
            logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # that torchvision is not there
            torch.onnx.export(task.weights.eval(), (task.x,), path, dynamo=True, verbose=False)
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: task.x.numpy()}
    return Contender(lambda: session.run(None, feed), session.run(None, feed)[0])


def contenders(timer: timing.Timer, task: Task, torch_compile: bool) -> tuple[dict[str, Contender], dict[str, str]]:
    """Whoever can run, and why others were left out."""
    makers: dict[str, Callable[[], Contender]] = {
        f"torch {name}": functools.partial(torch_contender, task, memory_format, compile=False)
        for name, memory_format in task.formats.items()
    }
    for name, layers in JAX_LAYERS.items():
        makers[name] = functools.partial(jax_contender, timer, task, layers)
    left_out = {}
    if torch_compile:
        last = list(task.formats.values())[-1]
        makers["torch.compile"] = functools.partial(torch_contender, task, last, compile=True)
    else:
        left_out["torch.compile"] = "left out by --quick or --no-torch-compile"
    if task.mode == FORWARD:
        makers["ONNX Runtime"] = functools.partial(onnx_contender, timer, task)
    found = {}
    for name, make in makers.items():
        try:
            found[name] = make()
        except Exception as error:  # what another library cannot run is reported, not fatal
            if name in JAX_LAYERS or name == "torch contiguous":
                raise
            left_out[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
    return found, left_out


def difference(task: Task, result: Any, expected: Any) -> float:
    """Of outputs the largest over the largest value; of train steps, of the change of the weights, in L2 norm."""
    if task.mode == FORWARD:
        return float(np.abs(result - expected).max() / np.abs(expected).max())
    names = [name for name, _ in task.weights.named_parameters()]
    before = {name: t.detach().numpy() for name, t in task.weights.named_parameters()}
    apart = sum(float(np.square(result[n] - expected[n], dtype=np.float64).sum()) for n in names)
    moved = sum(float(np.square(expected[n] - before[n], dtype=np.float64).sum()) for n in names)
    return (apart / moved) ** 0.5


def measure(timer: timing.Timer, network: Network, mode: str, batch: int, torch_compile: bool) -> dict[str, Any]:
    """One row of the results, but for its names. Contenders that disagree with torch eager are left out."""
    task = task_of(network, mode, batch)
    found, left_out = contenders(timer, task, torch_compile)
    expected = found["torch contiguous"].result
    apart = {name: difference(task, c.result, expected) for name, c in found.items()}
    for name, value in apart.items():
        if not value <= MOST_DIFFERENCE[mode]:
            left_out[name] = f"differs from torch eager by {value:.1e}, the bound is {MOST_DIFFERENCE[mode]:.0e}"
            del found[name]
    others = timing.Bystanders()
    times = timer.medians({name: c.run for name, c in found.items()})
    return {
        "contenders": {
            name: times[name] | {"difference": apart[name], "compile_s": c.compile_s, "temp_bytes": c.temp_bytes}
            for name, c in found.items()
        },
        "left_out": left_out,
        "others": others.cores(),
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, choices=(1, 2), help="by default 1, then 2 in a process of its own")
    parser.add_argument("--only", default="", help="a regular expression that 'NAME MODE' must match")
    parser.add_argument("--size", type=int, help="the input's spatial size, instead of the network's own")
    parser.add_argument("--batch", type=int, help="the only batch, instead of the network's own")
    parser.add_argument("--runs", type=int, default=7, help="interleaved samples of each contender")
    parser.add_argument("--budget", type=float, default=60, help="seconds for one network, mode and batch")
    parser.add_argument("--torch-compile", action=argparse.BooleanOptionalAction, help="on, but for --quick")
    parser.add_argument("--quick", action="store_true", help=f"1T, {' and '.join(QUICK)}, in a folder of its own")
    parser.add_argument("--again", action="store_true", help="measure again what is there")
    parser.add_argument("--output", type=Path, help=f"by default {ledger.RESULTS.name}/, with --quick its quick/")
    return parser.parse_args()


def main() -> None:
    options = parse()
    if options.threads is None:
        for threads in (1,) if options.quick else (1, 2):
            status = subprocess.run([sys.executable, *sys.argv, "--threads", str(threads)]).returncode
            if status:
                sys.exit(status)
        return
    if options.quick:
        options.runs, options.budget = 3, 5
    torch_compile = not options.quick if options.torch_compile is None else options.torch_compile
    timer = timing.Timer(options.threads, options.runs, options.budget)
    timer.pin()
    folder = options.output or (ledger.RESULTS / "quick" if options.quick else ledger.RESULTS)
    try:
        book = ledger.Ledger(
            folder / f"networks-float32-{options.threads}t.json",
            ledger.conditions("networks", options.threads, timing.CLOCKS[options.threads], "float32", options.quick),
        )
    except ledger.Unlike as error:
        sys.exit(f"networks: {error}")
    wanted = []
    for name, build in NETWORKS.items():
        network = build(options.size) if options.size else build()
        for mode in MODES:
            for batch in (options.batch,) if options.batch else network.batches[mode]:
                if re.search(options.only, f"{name} {mode}") and not (
                    options.quick and (name not in QUICK or batch > 1)
                ):
                    wanted.append((name, network, mode, batch))
    console = Console(stderr=True)
    if not wanted:
        console.print(f"no network matches --only {options.only!r}")
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("networks", total=len(wanted))
        for name, network, mode, batch in wanted:
            shape = "x".join(map(str, (batch, *network.size, network.channels)))
            progress.update(bar, description=f"{options.threads}T {name}, {mode}, {shape}")
            key = f"{name}|{mode}|{shape}"
            if options.again or not book.has(key):
                row = {"network": name, "mode": mode, "input": shape}
                book.add(key, row | measure(timer, network, mode, batch, torch_compile))
            jax.clear_caches()
            torch.compiler.reset()
            progress.advance(bar)
    console.print(f"{len(book.data['rows'])} rows in {book.path}", soft_wrap=True)


if __name__ == "__main__":
    main()
