"""jconv.nnx against torch.nn, values and gradients in float64, and its drop-ins against Flax's own layers."""

import inspect
import warnings
from functools import partial
from typing import NamedTuple

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx

import jconv
import jconv.nnx
from jconv import ConvError

IN, OUT = 4, 8
SIZES, WINDOW = (7, 6, 5), (3, 2, 3)

# torch's arguments; a tuple has an entry for each of three axes, of which the test takes the first n.
CONV = {
    "plain": {},
    "stride": {"stride": (2, 1, 3)},
    "padding": {"padding": (1, 0, 2)},
    "same": {"padding": "same", "dilation": (1, 3, 2)},
    "valid": {"padding": "valid", "stride": 2},
    "pairs": {"padding": ((0, 2), (1, 0), (2, 1)), "stride": 2, "dilation": (2, 1, 1)},
    "groups": {"groups": 2, "padding": 1, "stride": 2},
    "depthwise": {"groups": IN, "dilation": 2, "padding": 2},
    "no bias": {"bias": False},
    "reflect": {"padding_mode": "reflect", "padding": (2, 1, 1), "stride": 2},
    "reflect same": {"padding_mode": "reflect", "padding": "same", "dilation": (2, 1, 1)},
    "reflect pairs": {"padding_mode": "reflect", "padding": ((0, 3), (2, 0), (1, 1))},
    "replicate": {"padding_mode": "replicate", "padding": 2, "groups": 2},
    "replicate same": {"padding_mode": "replicate", "padding": "same"},
    "replicate valid": {"padding_mode": "replicate", "padding": "valid"},
    "circular": {"padding_mode": "circular", "padding": (3, 1, 2), "dilation": (2, 1, 1)},
    "circular same": {"padding_mode": "circular", "padding": "same"},
    "circular pairs": {"padding_mode": "circular", "padding": ((0, 3), (2, 0), (1, 1)), "stride": (1, 2, 1)},
}
CONV_TRANSPOSE = {
    "plain": {},
    "stride": {"stride": (2, 1, 3)},
    "padding": {"stride": 2, "padding": (1, 0, 1)},
    "pairs": {"padding": ((0, 2), (1, 0), (2, 1)), "stride": 2},
    "output_padding": {"stride": (2, 3, 2), "padding": 1, "output_padding": (1, 2, 0)},
    "output_padding below dilation": {"stride": 1, "dilation": 3, "output_padding": 2},
    "dilation": {"dilation": (2, 1, 3), "padding": (1, 0, 2)},
    "groups": {"groups": 2, "stride": 2, "padding": 1, "dilation": (1, 2, 1)},
    "depthwise": {"groups": IN, "stride": 2},
    "no bias": {"bias": False, "stride": 2},
    "output_size": {"stride": 3, "padding": (1, 0, 0), "output_size": (20, 18, 16), "output_padding": 1},
}
OTHER_FORMATS = ["NCHW", "NWC", "NDHWC", "NCW", "NCDHW"]


def in_two_formats(cases):
    """Each case in NHWC, and in one of the other formats, which take turns: (case, format)."""
    pairs = [(case, "NHWC") for case in cases]
    return pairs + [(case, OTHER_FORMATS[i % len(OTHER_FORMATS)]) for i, case in enumerate(cases)]


class Reference(NamedTuple):
    """What torch computes: the parameters in Flax's layout, the data in ``data_format``."""

    x: np.ndarray
    kernel: np.ndarray
    bias: np.ndarray | None
    cotangent: np.ndarray
    y: np.ndarray
    x_grad: np.ndarray
    kernel_grad: np.ndarray
    bias_grad: np.ndarray | None


def first(n, options):
    return {k: v[:n] if isinstance(v, tuple) else v for k, v in options.items()}


def from_torch(x, data_format):
    return np.moveaxis(x, 1, -1) if data_format.endswith("C") else x


def flax_kernel(weight, transposed, groups):
    """kernel[k, i, o] = W[o, i, k]; transposed: kernel[k, i, g * out / groups + o] = W[g * in / groups + i, o, k]."""
    if transposed:
        weight = np.concatenate(np.split(weight, groups, axis=0), axis=1)
        weight = np.swapaxes(weight, 0, 1)
    return np.moveaxis(weight, (0, 1), (-1, -2))


def torch_reference(n, data_format, options, transposed=False, batch=2):
    """torch.nn's layer on random data; (low, high) pairs, which it lacks, through F.pad or a crop."""
    options = dict(options)
    output_size = options.pop("output_size", None)
    pairs = options["padding"] if np.ndim(options.get("padding", 0)) == 2 else None
    mode = options.get("padding_mode", "zeros")
    if pairs is not None:
        options |= {"padding": 0, "padding_mode": "zeros"}
    torch.manual_seed(0)
    make = getattr(torch.nn, f"Conv{'Transpose' if transposed else ''}{n}d")
    layer = make(IN, OUT, WINDOW[:n], dtype=torch.float64, **options)
    x = torch.randn(batch, IN, *SIZES[:n], dtype=torch.float64, requires_grad=True)
    padded = x
    if pairs is not None and not transposed:
        flat = [p for pair in reversed(pairs) for p in pair]
        padded = torch.nn.functional.pad(x, flat, mode="constant" if mode == "zeros" else mode)
    y = layer(padded) if output_size is None else layer(padded, output_size)
    if pairs is not None and transposed:
        y = y[(..., *(slice(low, y.shape[2 + i] - high) for i, (low, high) in enumerate(pairs)))]
    cotangent = torch.randn(y.shape, dtype=torch.float64)
    y.backward(cotangent)
    groups = options.get("groups", 1)
    return Reference(
        from_torch(x.detach().numpy(), data_format),
        flax_kernel(layer.weight.detach().numpy(), transposed, groups),
        None if layer.bias is None else layer.bias.detach().numpy(),
        from_torch(cotangent.numpy(), data_format),
        from_torch(y.detach().numpy(), data_format),
        from_torch(x.grad.numpy(), data_format),
        flax_kernel(layer.weight.grad.numpy(), transposed, groups),
        None if layer.bias is None else layer.bias.grad.numpy(),
    )


def close(actual, expected, tolerance=1e-11):
    assert np.shape(actual) == np.shape(expected)
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


def float64_layer(name, *args, **options):
    return getattr(jconv.nnx, name)(*args, param_dtype=jnp.float64, rngs=nnx.Rngs(0), **options)


def check_against_torch(layer, expected, **call):
    assert layer.kernel.shape == expected.kernel.shape
    assert (layer.bias is None) == (expected.bias is None)
    layer.kernel[...] = jnp.asarray(expected.kernel)
    if layer.bias is not None:
        layer.bias[...] = jnp.asarray(expected.bias)

    def loss(layer, x):
        y = layer(x, **call)
        return jnp.sum(y * expected.cotangent), y

    differentiated = nnx.jit(nnx.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    (_, y), (grads, x_grad) = differentiated(layer, jnp.asarray(expected.x))
    close(y, expected.y)
    close(x_grad, expected.x_grad)
    close(grads["kernel"][...], expected.kernel_grad)
    if expected.bias is not None:
        close(grads["bias"][...], expected.bias_grad)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
@pytest.mark.parametrize(("case", "data_format"), in_two_formats(CONV))
def test_conv_is_torchs(case, data_format):
    n = len(data_format) - 2
    options = first(n, CONV[case])
    expected = torch_reference(n, data_format, options)
    layer = float64_layer(f"Conv{n}d", IN, OUT, WINDOW[:n], data_format=data_format, **options)
    check_against_torch(layer, expected)


@pytest.mark.parametrize(("case", "data_format"), in_two_formats(CONV_TRANSPOSE))
def test_conv_transpose_is_torchs(case, data_format):
    n = len(data_format) - 2
    options = first(n, CONV_TRANSPOSE[case])
    expected = torch_reference(n, data_format, options, transposed=True)
    call = {"output_size": options.pop("output_size")} if "output_size" in options else {}
    layer = float64_layer(f"ConvTranspose{n}d", IN, OUT, WINDOW[:n], data_format=data_format, **options)
    check_against_torch(layer, expected, **call)


@pytest.mark.parametrize("name", [f"Conv{t}{n}d" for t in ("", "Transpose") for n in (1, 2, 3)])
def test_arguments_are_torchs(name):
    theirs = list(inspect.signature(getattr(torch.nn, name).__init__).parameters.values())
    ours = list(inspect.signature(getattr(jconv.nnx, name).__init__).parameters.values())
    expected = [(p.name, p.default, p.kind) for p in theirs if p.name not in ("device", "dtype")]
    assert [(p.name, p.default, p.kind) for p in ours[: len(expected)]] == expected
    assert all(p.kind is p.KEYWORD_ONLY for p in ours[len(expected) :])
    layer = getattr(jconv.nnx, name)(4, 4, 3, rngs=nnx.Rngs(0))
    assert layer.data_format == {"1": "NWC", "2": "NHWC", "3": "NDHWC"}[name[-2]]


@pytest.mark.parametrize("data_format", ["NHWC", "NCHW"])
@pytest.mark.parametrize("name", ["Conv2d", "ConvTranspose2d"])
def test_batch_dimensions(name, data_format):
    mode = {"padding_mode": "circular"} if name == "Conv2d" else {}
    layer = float64_layer(name, 3, 5, 3, stride=2, padding=1, data_format=data_format, **mode)
    shape = (7, 6, 3) if data_format == "NHWC" else (3, 7, 6)
    x = jax.random.normal(jax.random.key(0), (6, *shape), jnp.float64)
    y = layer(x)
    close(layer(x[0]), y[0])
    close(layer(x.reshape(2, 3, *shape)), y.reshape(2, 3, *y.shape[1:]))
    close(layer(x.reshape(1, 2, 3, *shape)), y.reshape(1, 2, 3, *y.shape[1:]))
    assert layer(x[:0]).shape == (0, *y.shape[1:])
    assert layer(x[:0].reshape(3, 0, *shape)).shape == (3, 0, *y.shape[1:])
    if name == "ConvTranspose2d":
        size = tuple(s + 1 for s, c in zip(y.shape, data_format, strict=True) if c in "HW")
        full = (2, 3, *size, 3) if data_format == "NHWC" else (2, 3, 3, *size)
        larger = layer(x, output_size=size)
        close(layer(x.reshape(2, 3, *shape), output_size=full), larger.reshape(2, 3, *larger.shape[1:]))


def test_output_size_is_torchs():
    theirs = torch.nn.ConvTranspose2d(IN, OUT, 3, stride=(2, 3), padding=1, dilation=(1, 2))
    layer = jconv.nnx.ConvTranspose2d(IN, OUT, 3, stride=(2, 3), padding=1, dilation=(1, 2), rngs=nnx.Rngs(0))
    x = torch.zeros(1, IN, 5, 4)
    for size in [(8, 11), (9, 12), (10, 13), (10, 14), (11, 12), (9, 15)]:
        try:
            expected = tuple(theirs(x, output_size=size).shape[2:])
        except ValueError:
            with pytest.raises(ConvError, match=r"output_size must lie between \(9, 12\) and \(10, 14\)"):
                layer(jnp.zeros((1, 5, 4, IN)), output_size=size)
        else:
            assert expected == size == layer(jnp.zeros((1, 5, 4, IN)), output_size=size).shape[1:3]
    for size in [(9,), (9, 12, 1), 9]:
        with pytest.raises(ConvError, match="output_size must be 2 integers"):
            layer(jnp.zeros((1, 5, 4, IN)), output_size=size)


# Initial values.


def kolmogorov_smirnov(a, b):
    """The largest distance of two empirical distributions, in units of its 0.1% quantile."""
    a, b = np.sort(np.ravel(a)), np.sort(np.ravel(b))
    points = np.concatenate([a, b])
    distance = np.abs(np.searchsorted(a, points, "right") / a.size - np.searchsorted(b, points, "right") / b.size).max()
    return distance / (1.95 * np.sqrt((a.size + b.size) / (a.size * b.size)))


INIT_CASES = [("Conv1d", 1, 36), ("Conv1d", 3, 12), ("ConvTranspose1d", 1, 792), ("ConvTranspose1d", 3, 264)]
"""Name, groups and fan in, of 12 channels to 264 with a window of 3."""


def check_initial_values(name, groups, fan_in, kernel, bias):
    torch.manual_seed(0)
    theirs = getattr(torch.nn, name)(12, 264, 3, groups=groups)
    bound = 1 / np.sqrt(fan_in)
    for ours, reference in ((kernel, theirs.weight), (bias, theirs.bias)):
        ours, reference = np.asarray(ours), reference.detach().numpy()
        assert np.abs(reference).max() <= bound * (1 + 1e-6)
        assert 0.95 * bound < np.abs(ours).max() <= bound
        assert abs(ours.var() / (bound**2 / 3) - 1) < 6 / np.sqrt(ours.size)
        assert abs(ours.mean()) < 4 * bound / np.sqrt(3 * ours.size)
        assert kolmogorov_smirnov(ours, reference) < 1
    assert kolmogorov_smirnov(kernel, 1.2 * np.asarray(theirs.weight.detach())) > 1


@pytest.mark.parametrize(("name", "groups", "fan_in"), INIT_CASES)
def test_initial_values_are_torchs(name, groups, fan_in):
    layer = getattr(jconv.nnx, name)(12, 264, 3, groups=groups, rngs=nnx.Rngs(0))
    assert layer.kernel.dtype == layer.bias.dtype == jnp.float32
    check_initial_values(name, groups, fan_in, layer.kernel[...], layer.bias[...])
    again = getattr(jconv.nnx, name)(12, 264, 3, groups=groups, rngs=nnx.Rngs(params=0))
    np.testing.assert_array_equal(layer.kernel[...], again.kernel[...])


def test_initializers_and_their_keys():
    seen = []

    def init(key, shape, dtype):
        seen.append((key, shape, dtype))
        return jnp.full(shape, len(seen), dtype)

    rngs = nnx.Rngs(params=3)
    layer = jconv.nnx.Conv2d(
        4, 6, (3, 2), groups=2, param_dtype=jnp.bfloat16, kernel_init=init, bias_init=init, rngs=rngs
    )
    expected = nnx.Rngs(params=3)
    assert [(s, d) for _, s, d in seen] == [((3, 2, 2, 6), jnp.bfloat16), ((6,), jnp.bfloat16)]
    assert all(jnp.array_equal(key, expected.params()) for key, _, _ in seen)
    assert (layer.kernel[...] == 1).all() and (layer.bias[...] == 2).all()


def test_metadata_and_partitioning():
    layer = jconv.nnx.Conv2d(3, 4, 3, kernel_metadata={"note": "k"}, bias_metadata={"note": "b"}, rngs=nnx.Rngs(0))
    assert layer.kernel.note == "k" and layer.bias.note == "b"
    mesh = jax.make_mesh((1,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = (None, None, None, "model")
    with jax.set_mesh(mesh):
        init = nnx.with_partitioning(nnx.initializers.lecun_normal(), spec)
        for layer in (
            jconv.nnx.Conv2d(3, 4, 3, kernel_init=init, rngs=nnx.Rngs(0)),
            jconv.nnx.Conv2d(3, 4, 3, kernel_metadata={"out_sharding": spec}, rngs=nnx.Rngs(0)),
        ):
            assert nnx.get_partition_spec(nnx.state(layer))["kernel"].get_value() == jax.sharding.PartitionSpec(*spec)
            assert layer(jnp.ones((1, 5, 5, 3))).shape == (1, 3, 3, 4)


# Dtypes, algorithms, errors.


@pytest.mark.parametrize("name", ["Conv2d", "ConvTranspose2d"])
def test_dtypes(name):

    def make(**options):
        return getattr(jconv.nnx, name)(3, 4, 3, rngs=nnx.Rngs(0), **options)

    x = jnp.ones((1, 5, 5, 3))
    assert make()(x.astype(jnp.float32)).dtype == jnp.float32
    assert make()(x.astype(jnp.bfloat16)).dtype == jnp.float32
    assert make()(x.astype(jnp.int32)).dtype == jnp.float32
    assert make(param_dtype=jnp.bfloat16)(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16
    half = make(dtype=jnp.bfloat16)
    assert half.kernel.dtype == jnp.float32 and half(x).dtype == jnp.bfloat16
    wide = make(dtype=jnp.bfloat16, preferred_element_type=jnp.float32)
    assert wide(x).dtype == jnp.float32
    close(np.asarray(half(x), np.float32), np.asarray(make()(x), np.float32), 0.03)


@pytest.mark.parametrize("name", ["Conv2d", "ConvTranspose2d"])
def test_algorithm_and_autodiff_reach_the_convolution(name):
    x = jax.random.normal(jax.random.key(0), (2, 6, 6, 3), jnp.float64)
    plain = float64_layer(name, 3, 4, 3, stride=2)
    named = float64_layer(name, 3, 4, 3, stride=2, algorithm="im2col", autodiff="custom_vjp", precision="highest")
    assert "jconv" in str(jax.make_jaxpr(plain)(x)) and "custom_vjp" not in str(jax.make_jaxpr(plain)(x))
    jaxpr = str(jax.make_jaxpr(named)(x))
    assert "custom_vjp" in jaxpr and "jconv.im2col" in jaxpr and "HIGHEST" in jaxpr

    def loss(layer):
        return jnp.sum(layer(x) ** 2)

    close(nnx.grad(loss)(named)["kernel"][...], nnx.grad(loss)(plain)["kernel"][...])
    with pytest.raises(jconv.AlgorithmError, match="nonsense"):
        float64_layer(name, 3, 4, 3, algorithm="nonsense")


BAD = [
    ("Conv2d", {"groups": 3}, "in_channels must be divisible by groups, got in_channels=4 with groups=3"),
    ("Conv2d", {"groups": 4, "out_channels": 6}, "out_channels must be divisible by groups"),
    ("Conv2d", {"groups": 0}, "groups"),
    ("Conv2d", {"padding": "SAME"}, "'same', 'valid'"),
    ("Conv2d", {"padding": "same", "stride": 2}, "stride 1"),
    ("Conv2d", {"padding_mode": "edge"}, "padding_mode must be one of"),
    ("ConvTranspose2d", {"padding_mode": "reflect"}, "padding_mode must be one of \\('zeros',\\)"),
    ("ConvTranspose2d", {"groups": 3}, "in_channels must be divisible by groups"),
]
"""What torch refuses at construction, too."""
BEYOND_TORCH = [
    ("Conv2d", {"kernel_size": (3, 3, 3)}, "kernel_size must be an int or 2 ints"),
    ("Conv2d", {"kernel_size": 0}, "kernel_size"),
    ("Conv2d", {"stride": 0}, "stride"),
    ("Conv2d", {"padding": -1}, "padding"),
    ("Conv2d", {"padding": ((1, 1),)}, "2 \\(low, high\\) pairs"),
    ("Conv2d", {"dilation": (1, 1.5)}, "dilation"),
    ("Conv2d", {"data_format": "NWC"}, "data_format must be one of \\('NHWC', 'NCHW'\\), got 'NWC'"),
    ("Conv2d", {"algorithm": "winogrand"}, "algorithm must be 'auto' or one of"),
    ("Conv2d", {"autodiff": "both"}, "autodiff must be"),
    ("ConvTranspose2d", {"padding": "same"}, "padding of a transposed convolution"),
    ("ConvTranspose2d", {"output_padding": (1, -1)}, "output_padding"),
]


@pytest.mark.parametrize(("name", "options", "message"), BAD + BEYOND_TORCH)
def test_errors_at_construction(name, options, message):
    arguments = {"in_channels": 4, "out_channels": 8, "kernel_size": 3, **options}
    with pytest.raises(ConvError, match=message):
        getattr(jconv.nnx, name)(**arguments, rngs=nnx.Rngs(0))
    if (name, options, message) in BAD:
        with pytest.raises(ValueError):
            getattr(torch.nn, name)(**arguments)


def test_errors_at_the_call():
    layer = jconv.nnx.Conv2d(4, 8, 3, padding=2, padding_mode="reflect", rngs=nnx.Rngs(0))
    with pytest.raises(ConvError, match="at least 3 dimensions"):
        layer(jnp.ones((5, 4)))
    with pytest.raises(ConvError, match="3 channels"):
        layer(jnp.ones((1, 5, 5, 3)))
    with pytest.raises(ConvError, match="smaller than axis"):
        layer(jnp.ones((1, 2, 5, 4)))
    with pytest.raises(ConvError, match="output_padding must be smaller"):
        jconv.nnx.ConvTranspose2d(4, 8, 3, output_padding=1, rngs=nnx.Rngs(0))(jnp.ones((1, 5, 5, 4)))


# NNX.


class Net(nnx.Module):
    def __init__(self, rngs):
        self.down = jconv.nnx.Conv2d(2, 8, 3, stride=2, padding=1, padding_mode="replicate", rngs=rngs)
        self.mix = jconv.nnx.Conv2d(8, 8, 3, padding="same", groups=2, bias=False, rngs=rngs)
        self.up = jconv.nnx.ConvTranspose2d(8, 2, 3, stride=2, padding=1, rngs=rngs)

    def __call__(self, x):
        h = jax.nn.relu(self.mix(jax.nn.relu(self.down(x))))
        return self.up(h, output_size=x.shape)


def test_training_lowers_the_loss():
    x = jax.random.normal(jax.random.key(0), (8, 8, 8, 2), jnp.float32)
    target = jnp.roll(x, 1, axis=2) - 0.5 * x
    model = Net(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(2e-2), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        loss, grads = nnx.value_and_grad(lambda model: jnp.mean((model(x) - target) ** 2))(model)
        optimizer.update(model, grads)
        return loss

    losses = [float(step(model, optimizer)) for _ in range(60)]
    assert np.isfinite(losses).all()
    assert losses[-1] < 0.4 * losses[0]


def test_nnx_transformations_and_no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = Net(nnx.Rngs(0))
        x = jax.random.normal(jax.random.key(0), (3, 6, 6, 2), jnp.float32)
        y = model(x)
        close(nnx.jit(lambda model, x: model(x))(model, x), y, 1e-5)
        close(jax.jit(lambda model, x: model(x))(model, x), y, 1e-5)
        graph, state = nnx.split(model)
        assert set(nnx.to_pure_dict(state)["mix"]) == {"kernel"}
        assert set(nnx.to_pure_dict(state)["up"]) == {"kernel", "bias"}
        close(nnx.merge(graph, state)(x), y, 1e-6)
        close(nnx.vmap(lambda model, x: model(x), in_axes=(None, 0))(model, x), y, 1e-5)
        abstract = nnx.eval_shape(lambda: Net(nnx.Rngs(0)))
        assert abstract.up.kernel.get_value() == jax.ShapeDtypeStruct((3, 3, 8, 2), jnp.float32)
        close(nnx.merge(nnx.split(abstract)[0], state)(x), y, 1e-6)
        text = repr(model.mix)
    assert isinstance(model.down.bias, nnx.Param) and model.mix.bias is None
    for part in ("Conv2d(", "groups=2", "padding='same'", "kernel_size=(3, 3)", "kernel=Param("):
        assert part in text


def test_scan_over_stacked_layers():
    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=0, out_axes=0)
    def stack(rngs):
        return jconv.nnx.Conv1d(4, 4, 3, padding="same", rngs=rngs)

    layers = stack(nnx.Rngs(0))
    assert layers.kernel.shape == (3, 3, 4, 4)
    assert not jnp.array_equal(layers.kernel[0], layers.kernel[1])

    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    def forward(x, layer):
        return jnp.tanh(layer(x))

    x = jax.random.normal(jax.random.key(1), (2, 9, 4), jnp.float32)
    expected = x
    for i in range(3):
        one = nnx.merge(nnx.split(layers)[0], jax.tree.map(lambda leaf, i=i: leaf[i], nnx.split(layers)[1]))
        expected = jnp.tanh(one(expected))
    close(forward(x, layers), expected, 1e-6)
    grads = nnx.grad(lambda layers, x: jnp.sum(forward(x, layers) ** 2))(layers, x)
    assert all(float(jnp.abs(grads["kernel"][i]).max()) > 0 for i in range(3))


# The drop-ins for Flax's own layers.

MASK = np.arange(3 * 2 * 4 * 6).reshape(3, 2, 4, 6) % 3 > 0
FLAX_CONV = {
    "plain": (2, {}),
    "int kernel": (1, {"kernel_size": 3}),
    "strides": (2, {"strides": (2, 3)}),
    "no bias": (2, {"strides": 2, "use_bias": False}),
    "no strides": (2, {"strides": None, "kernel_dilation": None, "input_dilation": None}),
    "valid": (2, {"padding": "VALID", "kernel_dilation": (2, 1)}),
    "circular": (2, {"padding": "CIRCULAR", "strides": 2, "kernel_dilation": 2}),
    "reflect": (2, {"padding": "REFLECT"}),
    "causal": (1, {"padding": "CAUSAL", "kernel_dilation": 2}),
    "pairs": (2, {"padding": ((0, 2), (1, 0))}),
    "ints": (2, {"padding": (1, 2)}),
    "input dilation": (2, {"input_dilation": (2, 1), "padding": 1}),
    "groups": (2, {"feature_group_count": 2}),
    "depthwise": (1, {"feature_group_count": 4, "out_features": 8}),
    "mask": (2, {"mask": MASK}),
    "bfloat16": (2, {"dtype": jnp.bfloat16}),
    "bfloat16 parameters": (2, {"param_dtype": jnp.bfloat16}),
    "precision": (2, {"precision": "highest"}),
    "three axes": (3, {"strides": (1, 2, 1)}),
}
FLAX_CONV_TRANSPOSE = {
    "plain": (2, {}),
    "int kernel": (1, {"kernel_size": 3}),
    "strides": (2, {"strides": (2, 3)}),
    "valid": (2, {"padding": "VALID", "strides": (2, 1)}),
    "transpose_kernel": (2, {"transpose_kernel": True, "strides": (2, 2)}),
    "transpose_kernel valid": (2, {"transpose_kernel": True, "padding": "VALID", "strides": (1, 3)}),
    "circular": (2, {"padding": "CIRCULAR", "strides": (2, 3)}),
    "circular even": (2, {"padding": "CIRCULAR", "kernel_size": (6, 4), "strides": (2, 2)}),
    "circular transpose_kernel": (2, {"padding": "CIRCULAR", "transpose_kernel": True, "kernel_size": (6, 4)}),
    "circular odd strides": (1, {"padding": "CIRCULAR", "transpose_kernel": True, "strides": (3,), "kernel_size": 2}),
    "pairs": (2, {"padding": ((0, 2), (1, 0)), "strides": (2, 2)}),
    "dilation": (2, {"kernel_dilation": (2, 1), "strides": (2, 1)}),
    "no bias": (2, {"use_bias": False}),
    "mask": (2, {"mask": MASK, "strides": (2, 2)}),
    "bfloat16": (2, {"dtype": jnp.bfloat16, "strides": (2, 2)}),
    "bfloat16 circular": (2, {"dtype": jnp.bfloat16, "padding": "CIRCULAR"}),
    "three axes": (3, {"strides": (1, 2, 1)}),
}
DROP_INS = [("Conv", c) for c in FLAX_CONV] + [("ConvTranspose", c) for c in FLAX_CONV_TRANSPOSE]


def drop_in_case(name, case):
    n, options = (FLAX_CONV if name == "Conv" else FLAX_CONV_TRANSPOSE)[case]
    return n, {"in_features": 4, "out_features": 6, "kernel_size": WINDOW[:n], **options}


def primitives(function, *args):
    """The names of all primitives of a function's jaxpr, inner ones included."""
    names, todo = set(), [jax.make_jaxpr(function)(*args).jaxpr]
    while todo:
        for equation in todo.pop().eqns:
            names.add(equation.primitive.name)
            todo += [p.jaxpr if hasattr(p, "jaxpr") else p for p in equation.params.values() if hasattr(p, "jaxpr")]
    return names


def assert_like_flax(ours, theirs, computed=None):
    """``computed``: the dtype that a float32 gradient has passed through."""
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
    narrow = jnp.bfloat16 in (ours.dtype, computed)
    close(np.asarray(ours, np.float64), np.asarray(theirs, np.float64), 3e-2 if narrow else 1e-5)


def assert_equal_trees(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(("name", "case"), DROP_INS)
def test_drop_in(name, case):
    n, options = drop_in_case(name, case)
    ours, theirs = (getattr(module, name)(**options, rngs=nnx.Rngs(7)) for module in (jconv.nnx, nnx))
    assert_equal_trees(nnx.to_pure_dict(nnx.state(ours)), nnx.to_pure_dict(nnx.state(theirs)))
    x = jax.random.normal(jax.random.key(0), (2, *SIZES[:n], 4), jnp.float32)

    @nnx.jit
    @partial(nnx.value_and_grad, argnums=(0, 1), has_aux=True)
    def differentiated(layer, x):
        y = layer(x)
        return jnp.sum(jnp.sin(y.astype(jnp.float32))), y

    ((_, y), grads), ((_, expected), expected_grads) = differentiated(ours, x), differentiated(theirs, x)
    assert_like_flax(y, expected)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True):
        assert_like_flax(a, b, options.get("dtype"))
    used = primitives(lambda x: ours(x), x)
    assert "jconv" in used and "conv_general_dilated" not in used
    assert "conv_general_dilated" in primitives(lambda x: theirs(x), x)


@pytest.mark.parametrize(("name", "case"), [("Conv", "strides"), ("ConvTranspose", "circular")])
def test_drop_in_batch_dimensions(name, case):
    n, options = drop_in_case(name, case)
    ours, theirs = (getattr(module, name)(**options, rngs=nnx.Rngs(7)) for module in (jconv.nnx, nnx))
    x = jax.random.normal(jax.random.key(0), (2, 3, *SIZES[:n], 4), jnp.float32)
    y = ours(x)
    for z in (x, x[0, 0], x[None]):
        assert_like_flax(ours(z), theirs(z))
    assert ours(x[:, :0]).shape == (2, 0, *y.shape[2:])


def test_drop_in_preferred_element_type():
    options = {"dtype": jnp.bfloat16, "preferred_element_type": jnp.float32}
    for name in ("Conv", "ConvTranspose"):
        ours, theirs = (getattr(m, name)(4, 6, (3, 2), rngs=nnx.Rngs(7), **options) for m in (jconv.nnx, nnx))
        x = jax.random.normal(jax.random.key(0), (2, 7, 6, 4), jnp.float32)
        assert ours(x).dtype == jnp.float32
        assert_like_flax(ours(x), theirs(x))


@pytest.mark.parametrize("name", ["Conv", "ConvTranspose"])
def test_drop_in_takes_flaxs_arguments(name):
    ours, theirs = getattr(jconv.nnx, name), getattr(nnx, name)
    assert inspect.signature(ours.__init__) == inspect.signature(theirs.__init__)
    rngs, attributes = nnx.Rngs(0), vars(theirs(2, 3, (3,), rngs=nnx.Rngs(0)))
    assert set(vars(ours(2, 3, (3,), rngs=rngs))) == set(attributes)
    assert isinstance(ours(2, 3, (3,), rngs=rngs), theirs)


def test_drop_in_respects_the_users_own_convolution():
    layer = jconv.nnx.Conv(2, 3, (3,), conv_general_dilated=jax.lax.conv_general_dilated, rngs=nnx.Rngs(0))
    assert "conv_general_dilated" in primitives(lambda x: layer(x), jnp.ones((1, 5, 2)))
    named = partial(jconv.conv_general_dilated, algorithm="im2col", autodiff="custom_vjp")
    layer = jconv.nnx.Conv(2, 3, (3,), conv_general_dilated=named, rngs=nnx.Rngs(0))
    assert "jconv.im2col" in str(jax.make_jaxpr(lambda x: layer(x))(jnp.ones((1, 5, 2))))


def test_drop_in_mask_of_the_wrong_shape():
    for name in ("Conv", "ConvTranspose"):
        layer = getattr(jconv.nnx, name)(2, 3, (3,), mask=np.ones((3, 3, 2)), rngs=nnx.Rngs(0))
        with pytest.raises(ValueError, match="[Mm]ask"):
            layer(jnp.ones((1, 5, 2)))


class FlaxNet(nnx.Module):
    """A model that knows its layers by the module they come from only."""

    def __init__(self, layers, rngs):
        self.encode = layers.Conv(2, 4, (3, 3), strides=2, rngs=rngs)
        self.decode = layers.ConvTranspose(4, 2, (3, 3), strides=2, rngs=rngs)

    def __call__(self, x):
        return self.decode(jax.nn.gelu(self.encode(x)))


def test_drop_in_reads_flaxs_checkpoint():
    theirs, ours = FlaxNet(nnx, nnx.Rngs(1)), FlaxNet(jconv.nnx, nnx.Rngs(2))
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 2), jnp.float32)
    assert not np.allclose(ours(x), theirs(x), atol=1e-3)
    checkpoint = flax.serialization.to_bytes(nnx.to_pure_dict(nnx.state(theirs)))
    state = nnx.state(ours)
    nnx.replace_by_pure_dict(state, flax.serialization.from_bytes(nnx.to_pure_dict(state), checkpoint))
    nnx.update(ours, state)
    close(ours(x), theirs(x), 1e-5)
    assert flax.serialization.to_bytes(nnx.to_pure_dict(nnx.state(ours))) == checkpoint


@pytest.mark.parametrize("name", jconv.nnx.__all__)
def test_wrong_arguments_name_the_layer(name):
    """Not the private base that has the signature; nor does a subclass of a user's lose it."""
    cls = getattr(jconv.nnx, name)
    with pytest.raises(TypeError, match=rf"^{name}\.__init__\(\) missing 3 required positional arguments"):
        cls()
    with pytest.raises(TypeError, match=rf"^{name}\.__init__\(\) got an unexpected keyword argument 'nonsense'"):
        cls(1, 2, (3,), nonsense=3, rngs=nnx.Rngs(0))
    if name[-1] == "d":
        layer = type("Mine", (cls,), {})(1, 2, 3, rngs=nnx.Rngs(0))
        with pytest.raises(TypeError, match=rf"^{name}\.__call__\(\) missing 1 required positional argument: 'inputs'"):
            layer()
        assert inspect.signature(cls.__init__) == inspect.signature(jconv.nnx.Conv1d.__init__) or "Transpose" in name
