"""jconv.linen against torch.nn, values and gradients in float64, and its drop-ins against Flax's own layers."""

import dataclasses
import inspect
from functools import partial

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import linen as nn
from test_nnx import (
    BAD,
    BEYOND_TORCH,
    CONV,
    CONV_TRANSPOSE,
    DROP_INS,
    INIT_CASES,
    OUT,
    SIZES,
    WINDOW,
    assert_equal_trees,
    assert_like_flax,
    check_initial_values,
    close,
    drop_in_case,
    first,
    primitives,
    torch_reference,
)

import jconv
import jconv.linen
from jconv import ConvError

KEY = jax.random.key(0)
FORMATS = ["NHWC", "NCHW", "NWC", "NDHWC", "NCW", "NCDHW"]


def formats_in_turn(cases):
    return [(case, FORMATS[i % len(FORMATS)]) for i, case in enumerate(cases)]


def check_against_torch(layer, expected, **call):
    x = jnp.asarray(expected.x)
    theirs = {"kernel": expected.kernel} | ({} if expected.bias is None else {"bias": expected.bias})
    ours = jax.eval_shape(partial(layer.init, **call), KEY, x)["params"]
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}

    def loss(params, x):
        y = layer.apply({"params": params}, x, **call)
        return jnp.sum(y * expected.cotangent), y

    differentiated = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    (_, y), (grads, x_grad) = differentiated(jax.tree.map(jnp.asarray, theirs), x)
    close(y, expected.y)
    close(x_grad, expected.x_grad)
    close(grads["kernel"], expected.kernel_grad)
    if expected.bias is not None:
        close(grads["bias"], expected.bias_grad)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
@pytest.mark.parametrize(("case", "data_format"), formats_in_turn(CONV))
def test_conv_is_torchs(case, data_format):
    n = len(data_format) - 2
    options = first(n, CONV[case])
    expected = torch_reference(n, data_format, options)
    layer = getattr(jconv.linen, f"Conv{n}d")(OUT, WINDOW[:n], data_format=data_format, **options)
    check_against_torch(layer, expected)


@pytest.mark.parametrize(("case", "data_format"), formats_in_turn(CONV_TRANSPOSE))
def test_conv_transpose_is_torchs(case, data_format):
    n = len(data_format) - 2
    options = first(n, CONV_TRANSPOSE[case])
    expected = torch_reference(n, data_format, options, transposed=True)
    call = {"output_size": options.pop("output_size")} if "output_size" in options else {}
    layer = getattr(jconv.linen, f"ConvTranspose{n}d")(OUT, WINDOW[:n], data_format=data_format, **options)
    check_against_torch(layer, expected, **call)


@pytest.mark.parametrize("name", [f"Conv{t}{n}d" for t in ("", "Transpose") for n in (1, 2, 3)])
def test_arguments_are_torchs(name):
    theirs = inspect.signature(getattr(torch.nn, f"Lazy{name}").__init__).parameters.values()
    ours = [(f.name, f.default) for f in dataclasses.fields(getattr(jconv.linen, name))]
    missing = inspect.Parameter.empty
    expected = [
        (p.name, dataclasses.MISSING if p.default is missing else p.default)
        for p in theirs if p.name not in ("self", "device", "dtype")
    ]  # fmt: skip
    assert ours[: len(expected)] == expected
    layer, n = getattr(jconv.linen, name), int(name[-2])
    assert layer(4, 3).data_format == {1: "NWC", 2: "NHWC", 3: "NDHWC"}[n]
    by_name = layer(4, 3, 2, 1).init(KEY, jnp.ones((1, *(6,) * n, 2)))["params"]
    assert by_name["kernel"].shape == (*(3,) * n, 2, 4)


@pytest.mark.parametrize("data_format", ["NHWC", "NCHW"])
@pytest.mark.parametrize("name", ["Conv2d", "ConvTranspose2d"])
def test_batch_dimensions(name, data_format):
    mode = {"padding_mode": "reflect"} if name == "Conv2d" else {}
    layer = getattr(jconv.linen, name)(5, 3, padding=1, data_format=data_format, **mode)
    shape = (7, 6, 3) if data_format == "NHWC" else (3, 7, 6)
    x = jax.random.normal(KEY, (6, *shape), jnp.float32)
    y, variables = layer.init_with_output(KEY, x[0])
    assert variables["params"]["kernel"].shape == (3, 3, 3, 5)
    batch = layer.apply(variables, x)
    close(batch[0], y, 1e-5)
    close(layer.apply(variables, x.reshape(2, 3, *shape)), batch.reshape(2, 3, *y.shape), 1e-5)
    assert layer.apply(variables, x[:0]).shape == (0, *y.shape)


@pytest.mark.parametrize(("name", "groups", "fan_in"), INIT_CASES)
def test_initial_values_are_torchs(name, groups, fan_in):
    params = getattr(jconv.linen, name)(264, 3, groups=groups).init(KEY, jnp.ones((1, 8, 12)))["params"]
    assert params["kernel"].dtype == params["bias"].dtype == jnp.float32
    check_initial_values(name, groups, fan_in, params["kernel"], params["bias"])


def test_initializers_and_partitioning():
    spec = (None, None, None, "model")
    layer = jconv.linen.Conv2d(
        6, (3, 2), groups=2, param_dtype=jnp.bfloat16, bias_init=nn.initializers.ones,
        kernel_init=nn.with_partitioning(nn.initializers.zeros, spec),
    )  # fmt: skip
    variables = layer.init(KEY, jnp.ones((1, 5, 5, 4), jnp.bfloat16))
    assert nn.get_partition_spec(variables)["params"]["kernel"] == jax.sharding.PartitionSpec(*spec)
    params = nn.unbox(variables)["params"]
    assert params["kernel"].shape == (3, 2, 2, 6) and params["kernel"].dtype == jnp.bfloat16
    assert (params["kernel"] == 0).all() and (params["bias"] == 1).all()
    assert (layer.apply(variables, jnp.ones((1, 5, 5, 4))) == 1).all()


@pytest.mark.parametrize("name", ["Conv2d", "ConvTranspose2d"])
def test_dtypes(name):
    make = partial(getattr(jconv.linen, name), 4, 3)
    x = jnp.ones((1, 5, 5, 3), jnp.float32)
    params = make().init(KEY, x)
    assert make().apply(params, x).dtype == jnp.float32
    assert make().apply(params, x.astype(jnp.bfloat16)).dtype == jnp.float32
    half = make(dtype=jnp.bfloat16).apply(params, x)
    assert half.dtype == jnp.bfloat16
    close(half.astype(jnp.float32), make().apply(params, x), 0.03)
    wide = make(dtype=jnp.bfloat16, preferred_element_type=jnp.float32).apply(params, x)
    assert wide.dtype == jnp.float32


@pytest.mark.parametrize("name", ["Conv2d", "ConvTranspose2d"])
def test_algorithm_and_autodiff_reach_the_convolution(name):
    x = jnp.ones((2, 6, 6, 3), jnp.float32)
    plain = getattr(jconv.linen, name)(4, 3, stride=2)
    params = plain.init(KEY, x)
    assert "jconv" in primitives(plain.apply, params, x)
    named = plain.clone(algorithm="im2col", autodiff="custom_vjp", precision="highest")
    jaxpr = str(jax.make_jaxpr(named.apply)(params, x))
    assert "custom_vjp" in jaxpr and "jconv.im2col" in jaxpr and "HIGHEST" in jaxpr
    close(named.apply(params, x), plain.apply(params, x), 1e-5)


@pytest.mark.parametrize(("name", "options", "message"), BAD + BEYOND_TORCH)
def test_errors(name, options, message):
    layer = getattr(jconv.linen, name)(**{"out_channels": 8, "kernel_size": 3, **options})
    with pytest.raises(ConvError, match=message):
        layer.init(KEY, jnp.ones((1, 9, 9, 4)))


def test_errors_of_the_input():
    layer = jconv.linen.Conv2d(8, 3)
    with pytest.raises(ConvError, match="at least 3 dimensions"):
        layer.init(KEY, jnp.ones((5, 4)))
    with pytest.raises(ConvError, match="larger than the padded input"):
        layer.init(KEY, jnp.ones((1, 2, 2, 4)))


# Linen.


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        h = nn.relu(jconv.linen.Conv2d(8, 3, stride=2, padding=1, padding_mode="replicate")(x))
        h = nn.relu(jconv.linen.Conv2d(8, 3, padding="same", groups=2, bias=False, name="mix")(h))
        return jconv.linen.ConvTranspose2d(2, 3, stride=2, padding=1)(h, output_size=x.shape)


def test_training_lowers_the_loss():
    x = jax.random.normal(KEY, (8, 8, 8, 2), jnp.float32)
    target = jnp.roll(x, 1, axis=2) - 0.5 * x
    model, optimizer = Net(), optax.adam(2e-2)
    params = model.init(KEY, x)
    assert {k: set(v) for k, v in params["params"].items()} == {
        "Conv2d_0": {"kernel", "bias"},
        "mix": {"kernel"},
        "ConvTranspose2d_0": {"kernel", "bias"},
    }
    state = optimizer.init(params)

    @jax.jit
    def step(params, state):
        loss, grads = jax.value_and_grad(lambda params: jnp.mean((model.apply(params, x) - target) ** 2))(params)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), state, loss

    losses = []
    for _ in range(60):
        params, state, loss = step(params, state)
        losses.append(float(loss))
    assert np.isfinite(losses).all()
    assert losses[-1] < 0.4 * losses[0]


def test_scan_over_stacked_layers():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.tanh(jconv.linen.Conv1d(4, 3, padding="same")(x)), None

    stack = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)()
    x = jax.random.normal(KEY, (2, 9, 4), jnp.float32)
    (y, _), variables = stack.init_with_output(KEY, x, None)
    params = variables["params"]["Conv1d_0"]
    assert params["kernel"].shape == (3, 3, 4, 4) and not jnp.array_equal(params["kernel"][0], params["kernel"][1])
    expected = x
    for i in range(3):
        one = {"params": {"Conv1d_0": jax.tree.map(lambda leaf, i=i: leaf[i], params)}}
        expected = Block().apply(one, expected, None)[0]
    close(y, expected, 1e-6)
    grads = jax.grad(lambda v: jnp.sum(stack.apply(v, x, None)[0] ** 2))(variables)["params"]["Conv1d_0"]["kernel"]
    assert all(float(jnp.abs(grads[i]).max()) > 0 for i in range(3))


def test_tabulate_and_vmap():
    x = jnp.ones((2, 8, 8, 2), jnp.float32)
    table = Net().tabulate(KEY, x, console_kwargs={"width": 200})
    for part in ("ConvTranspose2d_0", "[3,3,8,2]", "mix"):
        assert part in table
    layer = jconv.linen.Conv2d(3, 3, padding=1)
    variables = layer.init(KEY, x)
    mapped = jax.vmap(lambda image: layer.apply(variables, image))(x)
    close(mapped, jax.jit(layer.apply)(variables, x), 1e-6)
    lifted = nn.vmap(jconv.linen.Conv2d, variable_axes={"params": 0}, split_rngs={"params": True})(3, 3)
    assert lifted.init(KEY, x)["params"]["kernel"].shape == (2, 3, 3, 2, 3)


# The drop-ins for Flax's own layers.


def flax_options(name, case):
    n, options = drop_in_case(name, case)
    options = dict(options)
    options["features"] = options.pop("out_features")
    del options["in_features"]
    return n, options


@pytest.mark.parametrize(("name", "case"), DROP_INS)
def test_drop_in(name, case):
    n, options = flax_options(name, case)
    ours, theirs = (getattr(module, name)(**options) for module in (jconv.linen, nn))
    x = jax.random.normal(KEY, (2, *SIZES[:n], 4), jnp.float32)
    variables = ours.init(KEY, x)
    assert_equal_trees(variables, theirs.init(KEY, x))

    def differentiated(layer):
        def loss(variables, x):
            y = layer.apply(variables, x)
            return jnp.sum(jnp.sin(y.astype(jnp.float32))), y

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(variables, x)

    ((_, y), grads), ((_, expected), expected_grads) = differentiated(ours), differentiated(theirs)
    assert_like_flax(y, expected)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True):
        assert_like_flax(a, b, options.get("dtype"))
    used = primitives(ours.apply, variables, x)
    assert "jconv" in used and "conv_general_dilated" not in used
    assert "conv_general_dilated" in primitives(theirs.apply, variables, x)


@pytest.mark.parametrize(("name", "case"), [("Conv", "strides"), ("ConvTranspose", "circular")])
def test_drop_in_batch_dimensions(name, case):
    n, options = flax_options(name, case)
    ours, theirs = (getattr(module, name)(**options) for module in (jconv.linen, nn))
    x = jax.random.normal(KEY, (2, 3, *SIZES[:n], 4), jnp.float32)
    y, variables = ours.init_with_output(KEY, x)
    for z in (x, x[0, 0], x[None]):
        assert_like_flax(ours.apply(variables, z), theirs.apply(variables, z))
    assert ours.apply(variables, x[:, :0]).shape == (2, 0, *y.shape[2:])


def test_drop_in_preferred_element_type():
    options = {"dtype": jnp.bfloat16, "preferred_element_type": jnp.float32}
    ours, theirs = (module.ConvTranspose(6, (3, 2), **options) for module in (jconv.linen, nn))
    x = jax.random.normal(KEY, (2, 7, 6, 4), jnp.float32)
    y, variables = ours.init_with_output(KEY, x)
    assert y.dtype == jnp.float32
    assert_like_flax(y, theirs.apply(variables, x))


@pytest.mark.parametrize("name", ["Conv", "ConvTranspose"])
def test_drop_in_takes_flaxs_arguments(name):
    ours, theirs = (getattr(module, name) for module in (jconv.linen, nn))
    assert list(inspect.signature(ours).parameters) == list(inspect.signature(theirs).parameters)
    for a, b in zip(dataclasses.fields(ours), dataclasses.fields(theirs), strict=True):
        assert a.name == b.name
        assert a.default == b.default or a.default is jconv.conv_general_dilated
    assert issubclass(ours, theirs)


def test_drop_in_respects_the_users_own_convolution():
    x = jnp.ones((1, 5, 2), jnp.float32)
    lax_conv = jax.lax.conv_general_dilated
    for options in ({"conv_general_dilated": lax_conv}, {"conv_general_dilated_cls": lambda: lax_conv}):
        layer = jconv.linen.Conv(3, (3,), **options)
        assert "conv_general_dilated" in primitives(layer.apply, layer.init(KEY, x), x)
    named = partial(jconv.conv_general_dilated, algorithm="im2col", autodiff="custom_vjp")
    layer = jconv.linen.Conv(3, (3,), conv_general_dilated=named)
    assert "jconv.im2col" in str(jax.make_jaxpr(layer.apply)(layer.init(KEY, x), x))


def test_drop_in_mask_of_the_wrong_shape():
    for name in ("Conv", "ConvTranspose"):
        layer = getattr(jconv.linen, name)(3, (3,), mask=np.ones((3, 3, 2)))
        with pytest.raises(ValueError, match="[Mm]ask"):
            layer.init(KEY, jnp.ones((1, 5, 2)))


def flax_net(layers):
    """A model that knows its layers by the module they come from only."""

    class FlaxNet(nn.Module):
        @nn.compact
        def __call__(self, x):
            h = nn.gelu(layers.Conv(4, (3, 3), strides=2)(x))
            return layers.ConvTranspose(2, (3, 3), strides=(2, 2))(layers.Conv(4, (1, 1))(h))

    return FlaxNet()


def test_drop_in_reads_flaxs_checkpoint():
    theirs, ours = flax_net(nn), flax_net(jconv.linen)
    x = jax.random.normal(KEY, (2, 8, 8, 2), jnp.float32)
    saved, fresh = theirs.init(jax.random.key(1), x), ours.init(jax.random.key(2), x)
    assert set(fresh["params"]) == {"Conv_0", "Conv_1", "ConvTranspose_0"}
    checkpoint = flax.serialization.to_bytes(saved)
    restored = flax.serialization.from_bytes(fresh, checkpoint)
    close(ours.apply(restored, x), theirs.apply(saved, x), 1e-5)
    assert not np.allclose(ours.apply(fresh, x), theirs.apply(saved, x), atol=1e-3)
    assert flax.serialization.to_bytes(restored) == checkpoint
    assert_equal_trees(ours.init(jax.random.key(1), x), saved)


@pytest.mark.parametrize("name", jconv.linen.__all__)
def test_wrong_arguments_name_the_layer(name):
    """Not the private base that has the signature; and a user's subclass may call it."""
    cls = getattr(jconv.linen, name)
    with pytest.raises(TypeError, match=rf"^{name}\.__init__\(\) missing 2 required positional arguments"):
        cls()
    with pytest.raises(TypeError, match=rf"^{name}\.__init__\(\) got an unexpected keyword argument 'nonsense'"):
        cls(2, (3,), nonsense=3)
    if name[-1] == "d":
        with pytest.raises(TypeError, match=rf"^{name}\.__call__\(\) missing 1 required positional argument: 'inputs'"):
            cls(2, 3).init(KEY)

        class Mine(cls):
            @nn.compact
            def __call__(self, inputs):
                return super().__call__(2 * inputs)

        x = jnp.ones((1, *SIZES[: cls.spatial], 2))
        y, variables = Mine(2, 3).init_with_output(KEY, x)
        np.testing.assert_array_equal(y, cls(2, 3).apply(variables, 2 * x))
