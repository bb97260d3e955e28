"""jconv.functional and jconv.grad against torch: values, d/dinput, d/dweight, d/dbias, errors, signatures."""

import functools
import inspect
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from tolerances import assert_close, bfloat16

import jconv
from jconv import functional as F
from jconv import grad as G

TF = torch.nn.functional
EXTRA = ["data_format", "algorithm", "autodiff", "precision", "preferred_element_type"]
POSITIONAL = {
    "conv": "input weight bias stride padding dilation groups",
    "conv_transpose": "input weight bias stride padding output_padding groups dilation",
}
DEFAULTS = {"bias": None, "stride": 1, "padding": 0, "output_padding": 0, "dilation": 1, "groups": 1}


def draw(*shape, dtype=np.float64, seed=0):
    values = np.random.default_rng([seed, *shape]).standard_normal(shape)
    if np.dtype(dtype).kind == "c":
        return (values + 1j * np.random.default_rng([seed, 1, *shape]).standard_normal(shape)).astype(dtype)
    return values.astype(dtype)


SIZE = (9, 8, 7)
# name, spatial rank, channels in, channels out, window, options of torch
CONVS = [
    (f"{name}_{n}d", n, ci, co, window, options)
    for n in (1, 2, 3)
    for name, ci, co, window, options in (
        ("plain", 3, 4, 3, {}),
        ("one_by_one", 3, 4, 1, {}),
        ("strided", 3, 4, 3, {"stride": 2, "padding": 1}),
        ("per_axis", 3, 4, 3, {"stride": (2, 1, 3)[:n], "padding": (1, 0, 2)[:n], "dilation": (1, 2, 1)[:n]}),
        ("valid", 3, 4, 2, {"padding": "valid", "stride": 2}),
        ("same_odd", 3, 4, 3, {"padding": "same"}),
        ("same_even", 3, 4, 4, {"padding": "same"}),
        ("same_dilated", 3, 4, 2, {"padding": "same", "dilation": 3}),
        ("grouped", 6, 4, 3, {"groups": 2, "padding": 1}),
        ("depthwise", 4, 4, 3, {"groups": 4, "padding": 1, "stride": 2}),
        ("multiplier", 2, 6, 3, {"groups": 2}),
        ("singleton", 3, 4, 3, {"stride": (2,), "padding": (1,)}),
        ("large_padding", 2, 2, 2, {"padding": 3}),
    )
]
TRANSPOSED = [
    (f"{name}_{n}d", n, ci, co, window, options)
    for n in (1, 2, 3)
    for name, ci, co, window, options in (
        ("plain", 3, 4, 3, {}),
        ("unet", 3, 4, 2, {"stride": 2}),
        ("gan", 3, 4, 4, {"stride": 2, "padding": 1}),
        ("output_padding", 3, 4, 3, {"stride": 2, "padding": 1, "output_padding": 1}),
        ("output_padding_below_dilation", 2, 3, 2, {"dilation": 3, "output_padding": 2}),
        ("per_axis", 3, 4, 3, {"stride": (2, 3, 1)[:n], "padding": (1, 0, 2)[:n], "output_padding": (1, 2, 0)[:n]}),
        ("dilated", 3, 4, 3, {"dilation": 2, "stride": 2}),
        ("grouped", 4, 6, 3, {"groups": 2, "stride": 2}),
        ("depthwise", 4, 4, 3, {"groups": 4, "stride": 2, "padding": 1}),
        ("cropped", 3, 2, 4, {"padding": 3, "stride": 3}),
    )
]


def torch_call(name, arrays, options):
    tensors = [torch.from_numpy(np.array(a)).requires_grad_() for a in arrays]
    out = getattr(TF, name)(*tensors, **options)
    return tensors, out


def compare_with_torch(name, x, w, b, options, dtype, algorithm="auto", **ours):
    """Value and the three gradients of sum(out * cotangent)."""
    tensors, expected = torch_call(name, (x, w, b), options)
    g = draw(*expected.shape, dtype=dtype, seed=9)
    expected.backward(torch.from_numpy(g))

    @jax.jit
    def run(x, w, b, g):
        out, pull = jax.vjp(lambda *a: getattr(F, name)(*a, **options, algorithm=algorithm, **ours), x, w, b)
        return out, pull(g)

    # torch conjugates: its gradient of a complex product is the conjugate of the transpose's.
    out, gradients = run(x, w, b, np.conj(g))
    assert_close(out, expected.detach().numpy(), algorithm, dtype, factor=2)
    for a, t in zip(gradients, tensors, strict=True):
        assert_close(np.conj(a), t.grad.numpy(), algorithm, dtype, factor=2)


@pytest.mark.parametrize("case", CONVS, ids=lambda c: c[0])
@pytest.mark.parametrize("algorithm", ("auto", "im2col", "xla"))
def test_conv(case, algorithm):
    _, n, ci, co, window, options = case
    x, w, b = draw(2, ci, *SIZE[:n]), draw(co, ci // options.get("groups", 1), *(window,) * n), draw(co)
    compare_with_torch(f"conv{n}d", x, w, b, options, np.float64, algorithm)


@pytest.mark.parametrize("case", TRANSPOSED, ids=lambda c: c[0])
@pytest.mark.parametrize("algorithm", ("auto", "im2col", "xla"))
def test_conv_transpose(case, algorithm):
    _, n, ci, co, window, options = case
    x, w, b = draw(2, ci, *(4, 3, 4)[:n]), draw(ci, co // options.get("groups", 1), *(window,) * n), draw(co)
    compare_with_torch(f"conv_transpose{n}d", x, w, b, options, np.float64, algorithm)


COMPLEX = ("per_axis_1d", "per_axis_2d", "grouped_2d", "output_padding_2d", "plain_3d")


@pytest.mark.parametrize(
    "case,dtype",
    [(c, d) for c in (*CONVS, *TRANSPOSED) for d in (np.float32, np.complex64, np.complex128)
     if d is np.float32 or c[0] in COMPLEX],
    ids=lambda v: v[0] if isinstance(v, tuple) else np.dtype(v).name,
)  # fmt: skip
def test_dtypes(case, dtype):
    name, n, ci, co, window, options = case
    transposed = case in TRANSPOSED
    groups = options.get("groups", 1)
    shape = (ci, co // groups) if transposed else (co, ci // groups)
    x, w, b = draw(2, ci, *(5, 6, 5)[:n], dtype=dtype), draw(*shape, *(window,) * n, dtype=dtype), draw(co, dtype=dtype)
    compare_with_torch(f"conv{'_transpose' * transposed}{n}d", x, w, b, options, dtype)


@pytest.mark.parametrize("case", [*CONVS, *TRANSPOSED], ids=lambda c: c[0])
def test_channel_last_unbatched_and_custom_vjp(case):
    """data_format moves the channels of input and result alone; no batch means no batch."""
    _, n, ci, co, window, options = case
    transposed = case in TRANSPOSED
    name, groups = f"conv{'_transpose' * transposed}{n}d", options.get("groups", 1)
    shape = (ci, co // groups) if transposed else (co, ci // groups)
    x, w, b = draw(2, ci, *(5, 6, 5)[:n]), draw(*shape, *(window,) * n), draw(co)
    expected = torch_call(name, (x, w, b), options)[1].detach().numpy()
    f = getattr(F, name)
    last = {"data_format": "N" + "DHW"[-n:] + "C"}
    if n == 1:
        last = {"data_format": "NWC"}
    actual = f(np.moveaxis(x, 1, -1), w, b, **options, **last)
    assert_close(np.moveaxis(actual, -1, 1), expected, "auto", np.float64, factor=2)
    single = f(x[1], w, b, **options, autodiff="custom_vjp")
    assert_close(single, expected[1], "auto", np.float64, factor=2)
    single = f(np.moveaxis(x[1], 0, -1), w, b, **options, **last)
    assert_close(np.moveaxis(single, -1, 0), expected[1], "auto", np.float64, factor=2)


def test_pairs_pad_each_side():
    x, w = draw(2, 3, 6, 6), draw(4, 3, 3, 3)
    expected = TF.conv2d(TF.pad(torch.from_numpy(x), (3, 0, 1, 2)), torch.from_numpy(w)).numpy()
    assert_close(F.conv2d(x, w, padding=((1, 2), (3, 0))), expected, "auto", np.float64)


@pytest.mark.parametrize("transposed", (False, True))
def test_empty_batch(transposed):
    name = "conv_transpose2d" if transposed else "conv2d"
    compare_with_torch(name, draw(0, 3, 5, 5), draw(3, 3, 3, 3), draw(3), {"padding": 1}, np.float64)


@pytest.mark.parametrize("dtype", (np.float16, bfloat16), ids=lambda d: np.dtype(d).name)
def test_bias_gradient_of_16_bits_is_summed_in_32(dtype):
    """40,000 ones: a sum in 16 bits sticks at 256 or 2048."""
    x, w, b = (jnp.ones(s, dtype) for s in ((1, 1, 200, 200), (1, 1, 1, 1), (1,)))
    g = jax.grad(lambda b: F.conv2d(x, w, b).sum())(b)
    expected = TF.conv2d(torch.ones(1, 1, 200, 200), torch.ones(1, 1, 1, 1), torch.ones(1)).numel()
    assert g.dtype == np.dtype(dtype)
    assert abs(float(g[0]) - expected) <= expected / 200


@pytest.mark.parametrize("dtype", ("float16", "bfloat16"))
def test_16_bits_are_as_near_as_torch(dtype):
    x, w, b = draw(2, 8, 9, 9), draw(8, 8, 3, 3), draw(8)
    exact = TF.conv2d(*(torch.from_numpy(a).to(getattr(torch, dtype)).double() for a in (x, w, b)), padding=1).numpy()
    theirs = TF.conv2d(*(torch.from_numpy(a).to(getattr(torch, dtype)) for a in (x, w, b)), padding=1).double().numpy()
    ours = np.asarray(F.conv2d(*(jnp.asarray(a, dtype) for a in (x, w, b)), padding=1)).astype(np.float64)
    assert np.abs(ours - exact).max() <= 2 * np.abs(theirs - exact).max()


def test_preferred_element_type():
    x, w, b = (jnp.asarray(draw(*s), jnp.bfloat16) for s in ((1, 3, 5, 5), (4, 3, 3, 3), (4,)))
    out = F.conv2d(x, w, b, preferred_element_type=jnp.float32)
    assert out.dtype == jnp.float32
    assert_close(out, F.conv2d(*(a.astype(jnp.float32) for a in (x, w, b))), "auto", np.float32, factor=2)


@pytest.mark.parametrize("kind,n", itertools.product(POSITIONAL, (1, 2, 3)))
def test_signature(kind, n):
    """torch's positional order and defaults; its own docstring states them."""
    name = f"{kind}{n}d"
    parameters = inspect.signature(getattr(F, name)).parameters
    positional = [p.name for p in parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    keywords = [p.name for p in parameters.values() if p.kind is p.KEYWORD_ONLY]
    assert positional == POSITIONAL[kind].split() and keywords == EXTRA
    assert {p.name: p.default for p in parameters.values() if p.name in DEFAULTS} == {
        k: v for k, v in DEFAULTS.items() if k in positional
    }
    stated = getattr(TF, name).__doc__.split("->")[0].replace("\n", " ")
    stated = [part.split("=")[0].strip(" )") for part in stated[stated.index("(") + 1 :].split(",")]
    assert stated == positional


@pytest.mark.parametrize("name", ("pad", "unfold", "fold"))
def test_signature_of_the_others(name):
    ours, theirs = (inspect.signature(getattr(m, name)).parameters for m in (F, TF))
    assert [(p.name, p.default) for p in ours.values()] == [(p.name, p.default) for p in theirs.values()]


@pytest.mark.parametrize("name", [f"conv{n}d_{of}" for n in (1, 2, 3) for of in ("input", "weight")])
def test_signature_of_the_gradients(name):
    ours, theirs = (inspect.signature(getattr(m, name)).parameters for m in (G, torch.nn.grad))
    assert [(p.name, p.default) for p in ours.values() if p.kind is not p.KEYWORD_ONLY] == [
        (p.name, p.default) for p in theirs.values()
    ]


@pytest.mark.parametrize("case", [c for c in CONVS if not isinstance(c[-1].get("padding"), str)], ids=lambda c: c[0])
@pytest.mark.parametrize("algorithm", ("auto", "xla"))
def test_gradients_as_functions(case, algorithm):
    _, n, ci, co, window, options = case
    x, w = draw(2, ci, *SIZE[:n]), draw(co, ci // options.get("groups", 1), *(window,) * n)
    out = getattr(TF, f"conv{n}d")(torch.from_numpy(x), torch.from_numpy(w), **options)
    g = draw(*out.shape, seed=3)
    expected = getattr(torch.nn.grad, f"conv{n}d_input")(x.shape, torch.from_numpy(w), torch.from_numpy(g), **options)
    actual = getattr(G, f"conv{n}d_input")(x.shape, w, g, **options, algorithm=algorithm)
    assert_close(actual, expected.numpy(), algorithm, np.float64)
    expected = getattr(torch.nn.grad, f"conv{n}d_weight")(torch.from_numpy(x), w.shape, torch.from_numpy(g), **options)
    actual = getattr(G, f"conv{n}d_weight")(x, w.shape, g, **options, algorithm=algorithm)
    assert_close(actual, expected.numpy(), algorithm, np.float64)
    jax.grad(lambda g: getattr(G, f"conv{n}d_input")(x.shape, w, g, **options).sum())(g)


@functools.partial(jax.jit, static_argnums=0)
def value_and_pullback(f, x, g):
    out, pull = jax.vjp(f, x)
    return out, pull(g)[0]


# pad


def pads_of(axes):
    rows = (
        (1, 2),
        (0, 3),
        (2, 0),
        (-1, 2),
        (2, -1),
        (-1, -2),
        (0, 0),
        (3, 3),
        (-4, 2),
        (2, -4),
        (-5, 3),
        (-4, 0),
        (-9, 3),
    )
    for row in rows:
        yield row * axes
    if axes > 1:
        yield (1, 2, 0, -1, 2, 1)[: 2 * axes]


@pytest.mark.parametrize("mode", ("constant", "reflect", "replicate", "circular"))
@pytest.mark.parametrize("axes,extra", [(1, 2), (2, 1), (2, 2), (3, 2)])
def test_pad(mode, axes, extra):
    x = draw(*(2, 3)[:extra], *(5, 4, 6)[:axes])
    for pads in pads_of(axes):
        tensor = torch.from_numpy(x).requires_grad_()
        if mode == "circular" and any(
            max(pads[2 * i : 2 * i + 2]) > n + min(pads[2 * i], 0) + min(pads[2 * i + 1], 0)
            for i, n in enumerate(reversed(x.shape[-axes:]))
        ):
            with pytest.raises(jconv.ConvError):  # torch hands out memory that it never wrote, or its own error
                F.pad(x, pads, mode)
            continue
        try:
            expected = TF.pad(tensor, pads, mode)
        except (RuntimeError, NotImplementedError):
            with pytest.raises(jconv.ConvError):
                F.pad(x, pads, mode)
            continue
        g = draw(*expected.shape, seed=2)
        out, gradient = value_and_pullback(lambda x: F.pad(x, pads, mode), x, g)  # noqa: B023
        np.testing.assert_array_equal(out, expected.detach().numpy(), err_msg=str(pads))
        expected.backward(torch.from_numpy(g))
        if g.size == 0:  # of an empty result torch's gradient is memory that it never wrote
            assert not np.asarray(gradient).any()
            continue
        assert_close(gradient, tensor.grad.numpy(), "auto", np.float64)


@pytest.mark.parametrize("mode", ("reflect", "replicate", "circular"))
@pytest.mark.parametrize("shape", ((1, 2, 0), (1, 0, 4), (0, 2, 4)))
@pytest.mark.parametrize("pads", ((0, 0), (1, 1)))
def test_pad_of_nothing(mode, shape, pads):
    x = np.zeros(shape)
    try:
        expected = TF.pad(torch.from_numpy(x), pads, mode).numpy()
    except RuntimeError:
        with pytest.raises(jconv.ConvError):
            F.pad(x, pads, mode)
        return
    np.testing.assert_array_equal(F.pad(x, pads, mode), expected)


def test_pad_keeps_dtype_and_value():
    for dtype in (np.int32, np.float32, np.bool_, np.complex64):
        x = np.ones((2, 3), dtype)
        expected = TF.pad(torch.from_numpy(x), (1, 2, 0, 1), value=1).numpy()
        actual = F.pad(x, (1, 2, 0, 1), value=1)
        assert actual.dtype == dtype
        np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize(
    "args,message",
    [
        (((1,),), "even length.*got 1"),
        (((1,) * 10,), "names 5 axes, but input has 4"),
        (((1, 2), "mirror"), "mode must be 'constant'.*got 'mirror'"),
        (((1, 2), "reflect", 3.0), "takes no value, got 3.0"),
        (((6, 1), "reflect"), r"reflect padding \(6, 1\) must be smaller than axis 2 of the input: 6 elements"),
        (((7, 0), "circular"), "wrap axis 2 of the input more than once"),
        (((-4, -3),), "crops more than axis 3 has: 6"),
        (((True, 1),), r"pad\[0\] must be an integer, got True"),
        ((3,), "pad must be a sequence of integers, got 3"),
        (((1.5, 1),), r"pad\[0\] must be an integer"),
    ],
)
def test_pad_errors(args, message):
    with pytest.raises(jconv.ConvError, match=message):
        F.pad(draw(2, 3, 5, 6) if len(args) == 1 else draw(2, 3, 6), *args)


# unfold and fold


FOLDS = [
    (2, {}), ((2, 3), {"stride": 2}), (3, {"padding": 1, "dilation": 2}), ((1, 2), {"padding": (0, 2), "stride": (3, 1)}),
    (1, {}), ((3, 2), {"dilation": (1, 3), "stride": 2, "padding": 1}),
]  # fmt: skip


@pytest.mark.parametrize("kernel_size,options", FOLDS)
@pytest.mark.parametrize("batched", (True, False))
def test_unfold_and_fold(kernel_size, options, batched):
    x = draw(2, 3, 7, 8)[slice(None) if batched else 0]
    tensor = torch.from_numpy(x).requires_grad_()
    expected = TF.unfold(tensor, kernel_size, **options)
    g = draw(*expected.shape, seed=2)
    columns, gradient = value_and_pullback(lambda x: F.unfold(x, kernel_size, **options), x, g)
    np.testing.assert_array_equal(columns, expected.detach().numpy())
    expected.backward(torch.from_numpy(g))
    assert_close(gradient, tensor.grad.numpy(), "auto", np.float64)
    image = F.fold(g, (7, 8), kernel_size, **options)
    assert_close(image, TF.fold(torch.from_numpy(g), (7, 8), kernel_size, **options).numpy(), "auto", np.float64)


def test_unfold_keeps_infinities():
    """No multiplication by zero: lax.conv_general_dilated_patches would make NaN of it."""
    x = draw(1, 1, 3, 3)
    x[0, 0, 1, 1] = np.inf
    np.testing.assert_array_equal(F.unfold(x, 2), TF.unfold(torch.from_numpy(x), 2).numpy())


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda: F.unfold(draw(2, 3), 2), r"input must be \(N, C, H, W\)"),
        (lambda: F.unfold(draw(1, 1, 3, 3), 4), "larger than the image"),
        (lambda: F.unfold(draw(1, 1, 3, 3), 2, stride=0), "stride must be at least 1, got 0"),
        (lambda: F.unfold(draw(1, 1, 3, 3), (2, 2, 2)), "kernel_size must be an int or 2 ints, got 3"),
        (lambda: F.unfold(draw(1, 1, 3, 3), 2, padding=-1), "padding must be at least 0"),
        (lambda: F.unfold(np.zeros((1, 0, 3, 3)), 2), "nothing else that is empty"),
        (lambda: F.unfold(draw(1, 1, 3, 3), (2,)), "kernel_size must be an int or 2 ints, got 1"),
        (
            lambda: F.fold(draw(1, 7, 4), 3, 2),
            r"7 rows in each column, which kernel_size \(2, 2\) \(4\) does not divide",
        ),
        (lambda: F.fold(draw(1, 8, 5), 3, 2), "has 5 columns, but output_size.*2 x 2 = 4"),
        (lambda: F.fold(draw(1, 8, 4, 1), 3, 2), "input must be"),
        (lambda: F.fold(draw(1, 4, 1), (0, 3), 2), "output_size"),
    ],
)
def test_fold_errors(call, message):
    with pytest.raises(jconv.ConvError, match=message):
        call()


# Bad input, where torch raises too.

X, W, B = draw(2, 4, 6, 6), draw(6, 4, 3, 3), draw(6)
BAD = {
    "channels": (("conv2d", X[:, :3], W, B), {}, "input has 3 channels.*expects 4"),
    "groups_of_input": (("conv2d", X, W, B), {"groups": 3}, "input has 4 channels.*groups=3 expects 12"),
    "groups_of_output": (("conv2d", X, W[:5, :2], None), {"groups": 2}, "divide the output channels, got groups=2 for 5"),
    "no_groups": (("conv2d", X, W, B), {"groups": 0}, "groups must be at least 1, got 0"),
    "kernel": (("conv2d", X, draw(6, 4, 7, 3), B), {}, r"kernel, \(7, 3\).*larger than the padded input, \(6, 6\)"),
    "kernel_dilated": (("conv2d", X, W, B), {"dilation": 4}, r"kernel, \(9, 9\)"),
    "negative_padding": (("conv2d", X, W, B), {"padding": -1}, "padding must be at least 0, got -1"),
    "rank": (("conv2d", X[0, 0], W, B), {}, r"input must have 4 dimensions.*got shape \(6, 6\)"),
    "rank_5": (("conv2d", X[None], W, B), {}, "input must have 4 dimensions"),
    "weight_rank": (("conv2d", X, W[0], B), {}, r"weight must have 4 dimensions.*got shape \(4, 3, 3\)"),
    "dtype": (("conv2d", X, W.astype(np.float32), B), {}, "weight needs the input's dtype float64, got float32"),
    "bias_dtype": (("conv2d", X, W, B.astype(np.float32)), {}, "bias needs the input's dtype"),
    "bias": (("conv2d", X, W, B[:5]), {}, r"bias must have shape \(6,\).*got \(5,\)"),
    "stride": (("conv2d", X, W, B), {"stride": 0}, "stride must be at least 1, got 0"),
    "stride_length": (("conv2d", X, W, B), {"stride": (1, 1, 1)}, "stride must be an int or 2 ints, got 3"),
    "dilation": (("conv2d", X, W, B), {"dilation": 0}, "dilation must be at least 1, got 0"),
    "same_stride": (("conv2d", X, W, B), {"padding": "same", "stride": 2}, r"'same' needs stride 1, got stride \(2, 2\)"),
    "padding_word": (("conv2d", X, W, B), {"padding": "SAME"}, "padding must be 'same', 'valid'.*got 'SAME'"),
    "stride_word": (("conv2d", X, W, B), {"stride": "2"}, "stride must be an integer, got '2'"),
    "stride_fraction": (("conv2d", X, W, B), {"stride": 1.5}, "stride must be an integer"),
    "t_channels": (("conv_transpose2d", X[:, :3], W.swapaxes(0, 1), B), {}, "input has 3 channels"),
    "t_groups": (("conv_transpose2d", X, W.swapaxes(0, 1), None), {"groups": 3}, "groups must divide the input channels of weight, got groups=3 for 4"),
    "t_output_padding": (("conv_transpose2d", X, W.swapaxes(0, 1), B), {"output_padding": 1}, "output_padding must be smaller"),
    "t_empty": (("conv_transpose2d", X[..., :1], W.swapaxes(0, 1), B), {"padding": 2}, "output would have spatial size"),
    "t_padding": (("conv_transpose2d", X, W.swapaxes(0, 1), B), {"padding": -1}, "padding must be at least 0"),
    "t_bias": (("conv_transpose2d", X, W.swapaxes(0, 1), B[:4]), {}, r"bias must have shape \(6,\)"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_errors(name):
    (function, *arrays), options, message = BAD[name]
    with pytest.raises((RuntimeError, TypeError, ValueError)):
        getattr(TF, function)(
            *(None if a is None else torch.from_numpy(np.ascontiguousarray(a)) for a in arrays), **options
        )
    with pytest.raises(jconv.ConvError, match=message):
        getattr(F, function)(*arrays, **options)


@pytest.mark.parametrize(
    "options,message",
    [
        ({"stride": True}, "stride must be an integer, got True"),
        ({"groups": True}, "groups must be an integer, got True"),
        ({"data_format": "NWHC"}, "data_format must be 'NCHW' or 'NHWC', got 'NWHC'"),
        ({"padding": ((1, 2),)}, r"padding must have 2 \(low, high\) pairs, got 1"),
        ({"algorithm": "fastest"}, "algorithm must be 'auto' or one of"),
        ({"autodiff": "both"}, "autodiff must be"),
    ],
)
def test_errors_of_our_own(options, message):
    with pytest.raises(jconv.ConvError, match=message):
        F.conv2d(X, W, B, **options)
    with pytest.raises(jconv.ConvError, match="input must be an array, got list"):
        F.conv2d([1.0], W)


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda: G.conv2d_input((2, 4, 6), W, draw(2, 6, 4, 4)), "input_size has 3 entries"),
        (lambda: G.conv2d_input((2, 4, 6, 6), W, draw(2, 6, 5, 4)), r"shape \(2, 6, 4, 4\) of the convolution's result, got \(2, 6, 5, 4\)"),
        (lambda: G.conv2d_weight(X, (6, 4, 3, 3), draw(2, 6, 4, 4).astype(np.float32)), "grad_output needs the input's dtype"),
        (lambda: G.conv2d_weight(X, (6, 3, 3, 3), draw(2, 6, 4, 4)), "rhs needs 4 input features, got 3"),
    ],
)  # fmt: skip
def test_errors_of_the_gradients(call, message):
    with pytest.raises(jconv.ConvError, match=message):
        call()
