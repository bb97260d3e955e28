"""jconv.lax is drop-in: the signatures, shapes, dtypes, weak types and kinds of errors of jax.lax."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import BY_NAME, CASES, CHANNEL_LAST
from jax import lax
from tolerances import assert_close, bfloat16

import jconv

FUNCTIONS = (
    "conv_general_dilated", "conv", "conv_with_general_padding", "conv_transpose", "conv_general_dilated_patches",
    "conv_general_dilated_local",
)  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
def test_signature(name):
    """lax's parameters in lax's order with lax's defaults, then keyword-only algorithm and autodiff."""
    ours = inspect.signature(getattr(jconv, name)).parameters
    theirs = inspect.signature(getattr(lax, name)).parameters
    shared = [p for p in ours.values() if p.kind is not p.KEYWORD_ONLY]
    if len(theirs) < len(shared):
        assert shared[-1].name == "use_consistent_padding", "the only parameter that an older JAX lacks"
    for a, e in zip(shared, theirs.values(), strict=False):
        assert (a.name, a.default, a.kind) == (e.name, e.default, e.kind)
    assert len(theirs) <= len(shared)
    assert [(p.name, p.default) for p in ours.values() if p.kind is p.KEYWORD_ONLY] == [
        ("algorithm", "auto"), ("autodiff", "primitive"),
    ]  # fmt: skip


DTYPES = [
    (np.float16, None), (np.float16, np.float32), (bfloat16, np.float32), (np.float32, None), (np.float64, None),
     (np.complex64, None), (np.complex64, np.complex128), (np.int8, None), (np.int8, np.int32), (np.int16, None),
     (np.uint8, np.uint32), (np.int32, None), (np.int8, np.float32), (np.float32, np.float64),
]  # fmt: skip
TYPED = (
    "dense_2d:same",
    "pointwise_2d:strided",
    "grouped_2d:stride_tail",
    "batch_groups_2d:three",
    "edge_2d:no_output",
)


@pytest.mark.parametrize(
    "case,dtype,preferred",
    [(c, *d) for c in CASES for d in DTYPES if d == (np.float32, None) or c.name in TYPED],
    ids=lambda v: getattr(v, "name", None) or (np.dtype(v).name if v else ""),
)
def test_type(case, dtype, preferred):
    """Shape, dtype and weak type, by tracing alone."""
    lhs, rhs = (jax.ShapeDtypeStruct(s, dtype) for s in case.shapes())
    trace = lambda f: jax.make_jaxpr(lambda a, b: f(a, b, **case.arguments, preferred_element_type=preferred))(lhs, rhs)  # noqa: E731
    ours, theirs = trace(jconv.conv_general_dilated).out_avals[0], trace(lax.conv_general_dilated).out_avals[0]
    assert (ours.shape, ours.dtype, ours.weak_type) == (theirs.shape, theirs.dtype, theirs.weak_type)


def test_weak_type():
    x, w = jnp.broadcast_to(2.0, (1, 1, 4)), jnp.broadcast_to(3.0, (1, 1, 2))
    for a, b in ((x, w), (x, w.astype(np.float64)), (x.astype(np.float64), w)):
        ours, theirs = (f(a, b, (1,), "VALID") for f in (jconv.conv_general_dilated, lax.conv_general_dilated))
        assert (ours.dtype, ours.weak_type) == (theirs.dtype, theirs.weak_type)


def test_numpy_operands_and_default_layout():
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((2, 3, 6, 6)), rng.standard_normal((4, 3, 3, 3))
    assert_close(jconv.conv(x, w, (1, 1), "SAME"), lax.conv(x, w, (1, 1), "SAME"), "auto", np.float64)


def test_conv_with_general_padding():
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((2, 3, 6, 6)), rng.standard_normal((4, 3, 3, 3))
    arguments = ((2, 1), [(1, 2), (0, 3)], (1, 2), (2, 1))
    assert_close(
        jconv.conv_with_general_padding(x, w, *arguments),
        lax.conv_with_general_padding(x, w, *arguments),
        "auto",
        np.float64,
    )


@pytest.mark.parametrize("rank", (0, 1, 2, 3))
@pytest.mark.parametrize("padding", ("SAME", "VALID", "pairs", "consistent"))
@pytest.mark.parametrize("transpose_kernel", (False, True))
@pytest.mark.parametrize("stride,dilation,window", ((1, 1, 3), (2, 1, 3), (3, 1, 2), (2, 2, 3)))
def test_conv_transpose(rank, padding, transpose_kernel, stride, dilation, window):
    rng = np.random.default_rng(0)
    features = (5, 3) if transpose_kernel else (3, 5)
    x, w = rng.standard_normal((2, *(4, 5, 3)[:rank], 3)), rng.standard_normal((*(window,) * rank, *features))
    options = {"rhs_dilation": (dilation,) * rank, "transpose_kernel": transpose_kernel}
    if padding == "consistent":
        if "use_consistent_padding" not in inspect.signature(lax.conv_transpose).parameters:
            pytest.skip("this JAX has no use_consistent_padding")
        options["use_consistent_padding"] = True
    pads = padding if padding in ("SAME", "VALID") else ((1, 0),) * rank
    ours, theirs = (f(x, w, (stride,) * rank, pads, **options) for f in (jconv.conv_transpose, lax.conv_transpose))
    assert_close(ours, theirs, "auto", np.float64)


@pytest.mark.parametrize("layout", (None, ("NHWC", "HWIO", "NHWC"), ("NHWC", "WOIH", "NCHW"), ("CHWN", "OHWI", "HNWC")))
def test_patches(layout):
    x = np.random.default_rng(0).standard_normal((2, 6, 5, 3) if layout and layout[0] == "NHWC" else (3, 6, 5, 2))
    arguments = ((2, 3), (2, 1), [(1, 0), (2, 1)], (1, 1), (2, 1), layout)
    ours, theirs = (f(x, *arguments) for f in (jconv.conv_general_dilated_patches, lax.conv_general_dilated_patches))
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("layout", (None, ("NHWC", "HWIO", "NHWC"), ("NHWC", "WIHO", "NWHC")))
@pytest.mark.parametrize("precision", (None, "highest", (lax.Precision.HIGH, lax.Precision.HIGHEST)))
def test_local(layout, precision):
    rng = np.random.default_rng(0)
    dn = lax.conv_dimension_numbers((1, 1, 1, 1), (1, 1, 1, 1), layout)
    physical = lambda logical, spec: tuple(logical[spec.index(a)] for a in range(4))  # noqa: E731
    x = rng.standard_normal(physical((2, 3, 6, 5), dn.lhs_spec))
    w = rng.standard_normal(physical((4, 3 * 2 * 3, 5, 3), dn.rhs_spec))
    arguments = ((1, 1), "VALID", (2, 3))
    ours, theirs = (
        f(x, w, *arguments, dimension_numbers=layout, precision=precision)
        for f in (jconv.conv_general_dilated_local, lax.conv_general_dilated_local)
    )
    assert_close(ours, theirs, "auto", np.float64)


@pytest.mark.parametrize(
    "precision", (None, "highest", "high", lax.Precision.DEFAULT, ("highest", "default"), "BF16_BF16_F32")
)
def test_precision_reaches_the_operation(precision):
    case = BY_NAME["dense_2d:same"]
    x, w = case.operands(np.float32)
    if precision == "BF16_BF16_F32":
        problem = case.problem(precision=precision)
        assert problem.precision is lax.DotAlgorithmPreset.BF16_BF16_F32
        return
    trace = lambda f: str(jax.make_jaxpr(lambda x, w: f(x, w, **case.arguments, precision=precision))(x, w))  # noqa: E731
    ours = (
        jax.jit(lambda x, w: jconv.conv_general_dilated(x, w, **case.arguments, precision=precision, algorithm="xla"))
        .lower(x, w)
        .as_text()
    )
    theirs = (
        jax.jit(lambda x, w: lax.conv_general_dilated(x, w, **case.arguments, precision=precision))
        .lower(x, w)
        .as_text()
    )
    wanted = [line.split("precision_config")[1] for line in theirs.splitlines() if "precision_config" in line]
    assert wanted == [line.split("precision_config")[1] for line in ours.splitlines() if "precision_config" in line]
    assert "jconv" in trace(jconv.conv_general_dilated)


def test_default_matmul_precision_is_read_at_the_call():
    case = BY_NAME["dense_2d:same"]
    with jax.default_matmul_precision("highest"):
        assert case.problem().precision == lax.Precision.HIGHEST
    assert case.problem().precision is None


NHWC = CHANNEL_LAST[2]
X, W = np.ones((2, 7, 8, 4), np.float32), np.ones((3, 3, 4, 6), np.float32)
BAD = {
    "channels": ((X, W[:, :, :3], (1, 1), "SAME"), {}, "lhs has 4 features.*rhs needs 4 input features, got 3"),
    "feature_groups": ((X, W, (1, 1), "SAME"), {"feature_group_count": 3}, "divide the features of lhs, got 3 groups for 4"),
    "groups_of_rhs": ((X, W[:, :, :2, :5], (1, 1), "SAME"), {"feature_group_count": 2}, "output features of rhs, got 2 groups for 5"),
    "batch_groups": ((X, W, (1, 1), "SAME"), {"batch_group_count": 3}, "divide the batch of lhs, got 3 groups for a batch of 2"),
    "both_groups": ((X, W[:, :, :2], (1, 1), "SAME"), {"batch_group_count": 2, "feature_group_count": 2}, "cannot both be above 1"),
    "no_groups": ((X, W, (1, 1), "SAME"), {"feature_group_count": 0}, "feature_group_count must be at least 1, got 0"),
    "rank": ((X[0], W, (1, 1), "SAME"), {}, r"same number of dimensions, got shapes \(7, 8, 4\) and \(3, 3, 4, 6\)"),
    "layout": ((X, W, (1, 1), "SAME"), {"dimension_numbers": ("NHWC", "HWIO", "NHWX")}, "dimension_numbers"),
    "layout_kind": ((X, W, (1, 1), "SAME"), {"dimension_numbers": "NHWC"}, "dimension_numbers"),
    "strides": ((X, W, (1,), "SAME"), {}, "window_strides has 1 entries.*needs 2"),
    "pads": ((X, W, (1, 1), [(1, 1)]), {}, "padding has 1 pairs.*2 spatial dimensions"),
    "pad_kind": ((X, W, (1, 1), 1), {}, r"padding must be 'SAME'.*\(low, high\) pairs of integers, got 1"),
    "pad_fraction": ((X, W, (1, 1), [(0.5, 1), (0, 0)]), {}, "pairs of integers"),
    "crop": ((X, W, (1, 1), [(-5, -4), (0, 0)]), {}, r"padding \(-5, -4\) takes more than spatial axis 0 has: 7"),
    "same_with_holes": ((X, W, (1, 1), "SAME"), {"lhs_dilation": (2, 2)}, "'SAME' has no agreed meaning with lhs_dilation"),
    "dtypes": ((X, W.astype(np.float16), (1, 1), "SAME"), {}, "same dtype, got float32 and float16.*astype"),
    "narrower": ((X, W, (1, 1), "SAME"), {"preferred_element_type": np.float16}, "narrower"),
    "precision": ((X, W, (1, 1), "SAME"), {"precision": "extreme"}, "precision must be None.*got 'extreme'"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_errors_of_laxs_kind(name):
    """A ConvError with what came and what was expected, that `except` clauses written for lax catch too."""
    args, options, message = BAD[name]
    options = {"dimension_numbers": NHWC, **options}
    with pytest.raises(Exception) as theirs:
        lax.conv_general_dilated(*args, **options)
    with pytest.raises(jconv.ConvError, match=message) as ours:
        jconv.conv_general_dilated(*args, **options)
    kind = TypeError if isinstance(theirs.value, TypeError) else ValueError
    assert isinstance(ours.value, kind)


@pytest.mark.parametrize(
    "change,message",
    [
        ({"window_strides": (0, 1)}, r"window_strides\[0\] must be at least 1, got 0"),
        ({"window_strides": (1, -2)}, r"window_strides\[1\] must be at least 1, got -2"),
        ({"window_strides": (True, 1)}, r"window_strides\[0\] must be an integer, got True"),
        ({"window_strides": "11"}, "window_strides must be a sequence of 2 integers, got '11'"),
        ({"window_strides": 2}, "window_strides must be a sequence of 2 integers, got 2"),
        ({"window_strides": (1.5, 1)}, r"window_strides\[0\] must be an integer known at trace time, got 1.5"),
        ({"rhs_dilation": (0, 1)}, r"rhs_dilation\[0\] must be at least 1"),
        ({"lhs_dilation": (1, 0), "padding": [(0, 0)] * 2}, r"lhs_dilation\[1\] must be at least 1"),
        ({"padding": "SAMEISH"}, "padding must be 'SAME', 'SAME_LOWER', 'VALID'.*got 'SAMEISH'"),
        ({"feature_group_count": True}, "feature_group_count must be an integer, got True"),
        ({"preferred_element_type": "floaty"}, "preferred_element_type must be a dtype, got 'floaty'"),
        ({"lhs": [[1.0]]}, "lhs must be an array, got list; wrap it"),
        ({"rhs": None}, "rhs must be an array, got NoneType"),
        ({"lhs": jax.random.split(jax.random.key(0), 3).reshape(1, 1, 1, 3)}, "cannot be multiplied"),
    ],
)  # fmt: skip
def test_nonsense_is_named(change, message):
    arguments = {"lhs": X, "rhs": W, "window_strides": (1, 1), "padding": "SAME", "dimension_numbers": NHWC, **change}
    with pytest.raises(jconv.ConvError, match=message):
        jconv.conv_general_dilated(**arguments)


X4, K4 = np.ones((1, 4, 4, 2), np.float32), np.ones((3, 3, 2, 5), np.float32)
UNFIT = {
    "strides": lambda: jconv.conv_transpose(X4, K4, 5, "SAME"),
    "strides_none": lambda: jconv.conv_transpose(X4, K4, None, "SAME"),
    "strides_short": lambda: jconv.conv_transpose(X4, K4, (1,), "SAME"),
    "strides_words": lambda: jconv.conv_transpose(X4, K4, ("a", "b"), "SAME"),
    "strides_set": lambda: jconv.conv_general_dilated(X, W, {2, 1}, "SAME", dimension_numbers=NHWC),
    "strides_array": lambda: jconv.conv_general_dilated(X, W, jnp.ones(()), "SAME", dimension_numbers=NHWC),
    "dilation": lambda: jconv.conv_transpose(X4, K4, (1, 1), "SAME", rhs_dilation=2),
    "padding_word": lambda: jconv.conv_transpose(X4, K4, (1, 1), "nonsense", use_consistent_padding=True),
    "padding_number": lambda: jconv.conv_transpose(X4, K4, (1, 1), 5, use_consistent_padding=True),
    "padding_uneven": lambda: jconv.conv_transpose(X4, K4, (1, 1), ((1, 2), (3,)), use_consistent_padding=True),
    "padding_bools": lambda: jconv.conv_general_dilated(X, W, (1, 1), [(True, True)] * 2, dimension_numbers=NHWC),
    "layout": lambda: jconv.conv_transpose(X4, K4, (1, 1), "SAME", dimension_numbers="nonsense"),
    "patches_layout": lambda: jconv.conv_general_dilated_patches(X4, (2, 2), (1, 1), "SAME", dimension_numbers="x"),
    "patches_shape": lambda: jconv.conv_general_dilated_patches(X4, 5, (1, 1), "SAME"),
    "patches_short": lambda: jconv.conv_general_dilated_patches(X4, (1,), (1, 1), "SAME"),
    "patches_fraction": lambda: jconv.conv_general_dilated_patches(X4, (1.5, 2), (1, 1), "SAME"),
    "patches_rank": lambda: jconv.conv_general_dilated_patches(np.ones(3), (), (), "SAME"),
    "local_rank": lambda: jconv.conv_general_dilated_local(X4, np.ones(3), (1, 1), "VALID", (2, 2)),
    "local_precision": lambda: jconv.conv_general_dilated_local(X4, K4, (1, 1), "VALID", (2, 2), precision=()),
    "precision_bool": lambda: jconv.conv_general_dilated(X, W, (1, 1), "SAME", dimension_numbers=NHWC, precision=True),
    "sharding": lambda: jconv.conv_general_dilated(X, W, (1, 1), "SAME", dimension_numbers=NHWC, out_sharding="a"),
    "to_integers": lambda: jconv.plan(X, W, (1, 1), "SAME", dimension_numbers=NHWC, preferred_element_type=np.int32),
    "to_complex": lambda: jconv.plan(X, W, (1, 1), "SAME", dimension_numbers=NHWC, preferred_element_type=np.complex64),
    "platform": lambda: jconv.plan(X, W, (1, 1), "SAME", dimension_numbers=NHWC, platform="cpuu"),
    "gradient_size": lambda: jconv.grad.conv2d_input(5, K4, X4),
    "pad_value": lambda: jconv.functional.pad(X, (1, 1), value="nonsense"),
    "pad_mode": lambda: jconv.functional.pad(X, (1, 1), mode=[]),
    "bytes": lambda: jconv.functional.conv2d(X, X, stride=b"x"),
    "bool_input": lambda: jconv.functional.conv1d(np.ones((1, 1, 3), bool), np.ones((1, 1, 1), bool)),
    "no_output_channels": lambda: jconv.functional.conv1d(np.ones((1, 1, 3)), np.ones((0, 1, 1))),
}


@pytest.mark.parametrize("name", UNFIT)
def test_nonsense_everywhere(name):
    """These once came as errors from five calls down."""
    with pytest.raises(jconv.ConvError) as caught:
        UNFIT[name]()
    assert len(str(caught.value)) > 20


def test_plan_speaks():
    """Structs are enough; the text shows every candidate, its cost or its refusal, and the choice."""
    x, w = jax.ShapeDtypeStruct((1, 56, 56, 64), np.float32), jax.ShapeDtypeStruct((3, 3, 64, 64), np.float32)
    p = jconv.plan(x, w, (1, 1), "SAME", dimension_numbers=NHWC, platform="cpu")
    text = str(p)
    assert "needs a window of ones, got (3, 3)" in text
    assert "<- chosen" in next(line for line in text.splitlines() if line.strip().startswith(p.algorithm.name))
    assert "float32 1x64x56x56 * 64x64x3x3 -> 1x64x56x56" in text
    assert jconv.plan(x, w, (1, 1), "SAME", dimension_numbers=NHWC, platform="cuda").algorithm.name == "xla"
    assert "vendor" in str(jconv.plan(x, w, (1, 1), "SAME", dimension_numbers=NHWC, platform="tpu"))
    assert jconv.plan(x, w, (1, 1), "SAME", dimension_numbers=NHWC).device.platform == jax.default_backend()


def test_plans_of_a_function():
    """Forward and gradients, inside jit, scan and cond, in the order of the program."""
    x, w = np.ones((1, 8, 8, 4), np.float32), np.ones((3, 3, 4, 4), np.float32)
    conv = lambda x, w: jconv.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=NHWC)

    @jax.jit
    def loss(w, x):
        x = lax.cond(x.sum() > 0, lambda x: conv(x, w), lambda x: x, x)
        return lax.scan(lambda x, _: (jnp.sin(conv(x, w)), None), x, length=3)[0].sum()

    found = jconv.plans(loss, w, x)
    assert [p.problem for p in found] == [found[0].problem] * 2 and found[0].problem.output_shape == (1, 4, 8, 8)
    gradient = jconv.plans(jax.grad(loss), w, x, platform="cuda")
    assert sum(p.problem.is_weight_gradient for p in gradient) == 2
    assert {p.algorithm.name for p in gradient} == {"xla"}
    assert jconv.plans(jnp.sin, x) == []


def test_columns_too_large_for_the_workspace_are_made_in_parts():
    """Images apart, then rows of them; where neither helps, as with a single wide row, the reason is given."""
    x, w = jax.ShapeDtypeStruct((64, 512, 512, 64), np.float32), jax.ShapeDtypeStruct((3, 3, 64, 64), np.float32)
    p = jconv.plan(x, w, (1, 1), "SAME", dimension_numbers=NHWC, platform="cpu")
    im2col = next(c for c in p.candidates if c.algorithm.name == "im2col")
    assert im2col.cost.workspace <= 32 << 20 and f"in {im2col.runner.count} parts" in str(p)
    assert im2col.runner.images == 64 < im2col.runner.count
    wide = jax.ShapeDtypeStruct((1, 1, 1 << 20, 64), np.float32)
    p = jconv.plan(wide, w, (1, 1), "SAME", dimension_numbers=NHWC, platform="cpu")
    assert "MiB of workspace, the limit is 32 MiB" in str(p)
