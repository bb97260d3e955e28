"""The laws of docs/design.md, each a test under its name, over the table of cases."""

import functools
import re
from dataclasses import replace
from math import prod

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from cases import CASES, CHANNEL_FIRST, CHANNEL_LAST, Case
from tolerances import AS_USERS, TOLERANCES, assert_close, bfloat16

import jconv
from jconv import ALGORITHMS
from jconv.adjoint import input_problem, weight_problem
from jconv.algorithms.exchanged import Exchanged, exchanged, worth_exchanging
from jconv.algorithms.tiling import InParts, band_axis, in_cache, within
from jconv.algorithms.widened import Widened
from jconv.convolve import input_gradient, weight_gradient
from jconv.device import device_for
from jconv.planner import plan, plan_given
from jconv.store import physical


def name_of(dtype):
    return np.dtype(dtype).name


each_case = pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
FIRST_OF_ROLE = {c.name.split(":")[0]: c.name for c in reversed(CASES)}.values()
# channel_last is xla behind two transposes: one case of each role, and every layout, tell whether they are right.
PAIRS = [
    (c, a)
    for c in CASES
    for a in ALGORITHMS
    if a.why_not(c.problem()) is None
    if a.name != "channel_last" or c.name in FIRST_OF_ROLE or c.name.startswith(("layout", "once"))
]


# Compiling is the suite's time: what serves everything shows its rarer dtypes and its gradients on one case a role.
GENERAL = ("xla", "channel_last", "direct", "fold", "groupwise", "im2col")


def with_dtypes(
    everywhere, first_of_role, wide=lambda dtype: None, accuracy=("direct", "bounded", "loose"), rare=(), special=()
):
    """Case, algorithm and dtype: some dtypes for every case, others for the first variant of each role, or of it
    and of what is not general. The exact law has every geometry in int8."""
    return pytest.mark.parametrize(
        "case,algorithm,dtype",
        [
            pytest.param(c, a, d, id=f"{c.name}-{a.name}-{name_of(d)}")
            for c, a in PAIRS
            if a.accuracy in accuracy
            for d in (
                *everywhere,
                *(special if c.name in FIRST_OF_ROLE or c.name.startswith("once") or a.name not in GENERAL else ()),
                *(first_of_role if c.name in FIRST_OF_ROLE else ()),
                *(rare if c.name in FIRST_OF_ROLE and a.name not in GENERAL else ()),
            )
            if a.why_not(c.problem(d, preferred_element_type=wide(d))) is None
        ],
    )


@with_dtypes((), (bfloat16,), rare=(np.float64, np.float16, np.complex64, np.complex128), special=(np.float32,))
def test_value(case, algorithm, dtype):
    problem = case.problem(dtype)
    lhs, rhs = case.operands(dtype)
    actual = jconv.conv_general_dilated(lhs, rhs, **case.arguments, algorithm=algorithm)
    assert actual.dtype == np.dtype(dtype)
    assert_close(actual, reference.convolve(problem, lhs, rhs), algorithm.name, dtype)


WIDE = {np.int8: np.int32, np.uint8: np.uint32, bfloat16: np.float32}


@with_dtypes((np.int8,), (bfloat16,), WIDE.get, ("direct",), (np.uint8, np.int32, np.float32))
def test_exact(case, algorithm, dtype):
    """Integers small enough to be exact in the dtype give bit-equal results by direct-class algorithms."""
    problem = case.problem(dtype)
    wide = WIDE.get(dtype)
    lhs, rhs = (x.astype(dtype) for x in case.operands(np.uint8 if dtype is np.uint8 else np.int8))
    actual = jconv.conv_general_dilated(lhs, rhs, **case.arguments, algorithm=algorithm, preferred_element_type=wide)
    expected = reference.convolve(problem, lhs, rhs)
    assert actual.dtype == np.dtype(wide or dtype)
    np.testing.assert_array_equal(np.asarray(actual).astype(expected.dtype), expected)


@pytest.mark.parametrize(
    "case,algorithm",
    [
        pytest.param(c, a, id=f"{c.name}-{a.name}")
        for c, a in PAIRS
        if a.name not in GENERAL or c.name in FIRST_OF_ROLE
        if a.why_not(c.problem(np.float64)) is None
    ],
)
def test_gradient(case, algorithm):
    """vjp, jvp, and the Hessian's product with a vector, of both operands, as lax's."""
    ours = functools.partial(jconv.conv_general_dilated, algorithm=algorithm)
    for a, e in zip(everything(case, ours), everything_of_lax(case.name), strict=True):
        assert_close(a, e, algorithm.name, np.float64, factor=4)


def everything(case, conv):
    @functools.partial(jax.jit, compiler_options=AS_USERS)
    def run(x, w, dx, dw):
        def f(x, w):
            return conv(x, w, **case.arguments)

        def loss(x, w):
            return jnp.sin(f(x, w)).sum()

        y, dy = jax.jvp(f, (x, w), (dx, dw))
        gradient, curvature = jax.jvp(jax.grad(loss, (0, 1)), (x, w), (dx, dw))
        return y, dy, gradient, curvature

    return jax.tree.leaves(run(*case.operands(np.float64), *case.operands(np.float64, seed=1)))


@functools.cache
def everything_of_lax(name):
    case = next(c for c in CASES if c.name == name)
    return [np.asarray(leaf) for leaf in everything(case, jax.lax.conv_general_dilated)]


@with_dtypes((), (np.int32,))
def test_adjoint(case, algorithm, dtype):
    """<conv(x, w), g> == <x, conv_input(g, w)> == <w, conv_weight(x, g)>, in integers: exactly."""
    problem = case.problem(dtype)
    x, w = case.operands(dtype)
    g = np.random.default_rng(7).integers(-4, 5, problem.physical_output_shape).astype(dtype)
    for_input, for_weight = (
        algorithm if algorithm.why_not(of(problem)) is None else "auto" for of in (input_problem, weight_problem)
    )

    @jax.jit
    def run(x, w, g):
        y = jconv.conv_general_dilated(x, w, **case.arguments, algorithm=algorithm)
        return y, input_gradient(g, w, problem, for_input), weight_gradient(x, g, problem, for_weight)

    y, gx, gw = (np.asarray(a) for a in run(x, w, g))
    assert gx.shape == x.shape and gw.shape == w.shape
    assert np.vdot(y, g) == np.vdot(x, gx) == np.vdot(w, gw)


# An empty output forgets the geometry, and batch groups come back as feature groups.
REVERSIBLE = [c for c in CASES if 0 not in c.problem().output_shape and c.batch_groups == 1]


@pytest.mark.parametrize("case", REVERSIBLE, ids=lambda c: c.name)
def test_involution(case):
    """The input problem of the input problem is the problem, and so for the weight; in integers alone."""
    problem = case.problem()
    assert input_problem(input_problem(problem)) == reference.trimmed(problem)
    assert weight_problem(weight_problem(problem)) == reference.trimmed(problem)


@pytest.mark.parametrize("dtype", (bfloat16, np.float16), ids=name_of)
@pytest.mark.parametrize("case", [c for c in CASES if c.name in FIRST_OF_ROLE and c.rank == 2], ids=lambda c: c.name)
def test_widened(case, dtype):
    """In 32 bits and rounded once, 16-bit floats come out at least as near to the exact sum as lax's."""
    problem = case.problem(dtype)
    lhs, rhs = case.operands(dtype)
    exact = reference.convolve(problem, lhs, rhs)
    if exact.size == 0:
        return

    def error(out):
        assert out.dtype == np.dtype(dtype)
        return np.abs(np.asarray(out, np.float64) - exact).max() / max(np.abs(exact).max(), 1e-30)

    stock = functools.partial(jax.lax.conv_general_dilated, **case.arguments)
    laxs = error(jax.jit(stock, compiler_options=AS_USERS)(lhs, rhs))
    for name in ("im2col", "fold"):
        way = Widened(next(a for a in ALGORITHMS if a.name == name))
        if way.why_not(problem) is None:
            run = jax.jit(lambda lhs, rhs, way=way: way.run(problem, lhs, rhs), compiler_options=AS_USERS)
            ours = error(run(lhs, rhs))
            assert ours <= laxs + TOLERANCES[name, "float32"], (name, ours, laxs)


@each_case
@pytest.mark.parametrize("platform", ("cpu", "cuda", "rocm", "tpu"))
def test_total(case, platform):
    """A plan always has an algorithm that can serve, and gives its reason for each refusal."""
    for problem in (case.problem(), input_problem(case.problem()), weight_problem(case.problem())):
        p = plan(problem, platform)
        assert p.runner.why_not(problem) is None
        assert len(p.candidates) == len(ALGORITHMS)
        for c in p.candidates:
            assert (c.refusal is None) or len(c.refusal) > 10
            assert c.algorithm.name in str(p)
            assert c.refusal is None or c.refusal in str(p)
        if platform != "cpu":
            assert p.algorithm.name == "xla"


def test_not_vacuous():
    """Each algorithm serves at least this many of the cases."""
    served = {a.name: sum(a.why_not(c.problem()) is None for c in CASES) for a in ALGORITHMS}
    assert served["xla"] == len(CASES) >= 60
    assert served["im2col"] >= len(CASES) - 4
    least = {
        "pointwise": 10, "patches": 3, "direct": 60, "winograd": 20, "winograd4": 20, "fold": 25, "fft": 8, "volume": 8,
        "phase": 8, "subpixel": 5, "depthwise": 14, "grouped": 12, "groupwise": 14, "groupwise_winograd": 6, "channel_last": 90,
        "eigen": 2 * (jax.__version_info__ >= (0, 10)),
    }  # fmt: skip
    assert all(served[name] >= count for name, count in least.items()), served
    assert len({c.name for c in CASES}) == len(CASES)


def test_refused_never_runs():
    """A named algorithm that cannot serve says why in its own words, and names those that can."""
    case = next(c for c in CASES if c.name == "dense_2d:same")
    x, w = case.operands(np.float32)
    with pytest.raises(jconv.AlgorithmError, match=r"needs a window of ones, got \(3, 3\).*winograd, .*im2col, .*xla"):
        jconv.conv_general_dilated(x, w, **case.arguments, algorithm="pointwise")
    with pytest.raises(jconv.AlgorithmError, match="'auto' or one of pointwise, .*xla, got 'winogrand'"):
        jconv.conv_general_dilated(x, w, **case.arguments, algorithm="winogrand")
    with pytest.raises(jconv.ConvTypeError, match="a name or an Algorithm, got 3"):
        jconv.conv_general_dilated(x, w, **case.arguments, algorithm=3)


def test_a_faulty_algorithm_is_named():
    from dataclasses import dataclass

    case = next(c for c in CASES if c.name == "dense_2d:same")
    x, w = case.operands(np.float32)

    class Base:
        name = "mine"
        accuracy = "direct"

        def why_not(self, problem):
            return None

        def cost(self, problem, device):
            return jconv.Cost(0, 0, 0, 1000)

        def run(self, problem, lhs, rhs):
            return lhs

    with pytest.raises(jconv.AlgorithmError, match=r"'mine' gave float32\[2, 7, 8, 3\], but.*float32\[2, 7, 8, 4\]"):
        jconv.conv_general_dilated(
            x, w, **case.arguments, algorithm=dataclass(frozen=True)(type("Frozen", (Base,), {}))()
        )
    with pytest.raises(jconv.ConvTypeError, match="not hashable.*frozen=True"):
        jconv.conv_general_dilated(
            x, w, **case.arguments, algorithm=dataclass(type("Mine", (Base,), {"__hash__": None}))()
        )


def test_a_foreign_algorithm_runs():
    """``algorithm=`` takes any object with the protocol's five members, for gradients too."""
    from dataclasses import dataclass

    calls = []

    @dataclass(frozen=True)
    class Mine:
        name: str = "mine"
        accuracy: str = "direct"

        def why_not(self, problem):
            return None

        def cost(self, problem, device):
            return jconv.Cost(0, 0, 0, 1000)

        def run(self, problem, lhs, rhs):
            calls.append(problem)
            return ALGORITHMS[-1].run(problem, lhs, rhs)

    case = next(c for c in CASES if c.name == "dense_2d:same")
    x, w = case.operands(np.float64)
    jax.grad(lambda w: jconv.conv_general_dilated(x, w, **case.arguments, algorithm=Mine()).sum())(w)
    problem = case.problem(np.float64)
    assert {p.replace(out_sharding=None) for p in calls} >= {problem, weight_problem(problem)}


def test_a_named_algorithm_is_what_runs():
    case = next(c for c in CASES if c.name == "dense_2d:same")
    x, w = case.operands(np.float32)
    for name, operation in (("im2col", "dot_general"), ("xla", "convolution")):
        text = (
            jax.jit(lambda x, w, name=name: jconv.conv_general_dilated(x, w, **case.arguments, algorithm=name))
            .lower(x, w)
            .as_text()
        )
        assert f"stablehlo.{operation}" in text
        assert ("stablehlo.convolution" in text) == (name == "xla")


SPLITS = [
    pytest.param(c, a, InParts(a, images, bands), id=f"{c.name}-{a.name}-{images}x{bands}")
    for c, a in PAIRS
    if c.name in FIRST_OF_ROLE and 0 not in c.problem().output_shape
    for p in (c.problem(),)
    for images, bands in ((p.lhs_shape[1], 2) if p.is_weight_gradient else (p.lhs_shape[0], 3),)
    for bands in ((bands,) if c.rank and p.lhs_dilation[band_axis(p)] == 1 else (1,))
    if images * bands > 1 and (p.feature_groups if p.is_weight_gradient else p.batch_groups) == 1
    if InParts(a, images, bands).why_not(p) is None
]


@pytest.mark.parametrize("case,algorithm,split", SPLITS)
def test_in_parts(case, algorithm, split):
    """Images and bands of rows, one after the other, are the whole."""
    lhs, rhs = case.operands(np.float32)
    problem = case.problem()
    actual = jax.jit(lambda lhs, rhs: split.run(problem, lhs, rhs), compiler_options=AS_USERS)(lhs, rhs)
    assert_close(actual, reference.convolve(problem, lhs, rhs), algorithm.name, np.float32, factor=2)


@pytest.mark.parametrize("gradient", (False, True))
@pytest.mark.parametrize("dtype", (np.int32, bfloat16, np.float64, np.complex64), ids=name_of)
def test_bands_of_any_dtype(dtype, gradient):
    """A band is cut out by a call of its own, which XLA does not inline."""
    im2col = next(a for a in ALGORITHMS if a.name == "im2col")
    problem = next(c for c in CASES if c.name == "dense_2d:batch_5").problem(dtype)
    problem = weight_problem(problem) if gradient else problem
    rng, layout = np.random.default_rng(0), problem.layout
    lhs, rhs = (
        rng.integers(-4, 5, [shape[spec.index(axis)] for axis in range(len(spec))]).astype(dtype)
        for shape, spec in ((problem.lhs_shape, layout.lhs_spec), (problem.rhs_shape, layout.rhs_spec))
    )
    in_bands, whole = (
        jax.jit(functools.partial(way.run, problem), compiler_options=AS_USERS).lower(lhs, rhs).compile()
        for way in (InParts(im2col, 1, 3), im2col)
    )
    np.testing.assert_array_equal(in_bands(lhs, rhs), whole(lhs, rhs))
    text = in_bands.as_text()
    assert 'inlineable="false"' in text and " call(" in text


@pytest.mark.parametrize("layout", (("NHWC", "HWIO", "NHWC"), ("NCHW", "OIHW", "NCHW")))
@pytest.mark.parametrize("strides,dilation", (((1, 1), (1, 1)), ((2, 3), (1, 1)), ((1, 2), (2, 1))))
def test_channel_last_pads_what_has_no_padding(strides, dilation, layout):
    """XLA:CPU runs it up to five times slower without: a row more, which is cut off. Values are the definition's."""
    channel_last = next(a for a in ALGORITHMS if a.name == "channel_last")
    sizes = {"N": 2, "C": 5, "I": 5, "O": 7, "H": 11, "W": 12}
    window = {**sizes, "H": 3, "W": 2}
    rng = np.random.default_rng(0)
    lhs, rhs = (
        rng.standard_normal([of[letter] for letter in spec]).astype(np.float32)
        for spec, of in ((layout[0], sizes), (layout[1], window))
    )
    problem = jconv.ConvProblem.of(lhs, rhs, strides, "VALID", rhs_dilation=dilation, dimension_numbers=layout)
    program = jax.jit(lambda lhs, rhs: channel_last.run(problem, lhs, rhs))
    assert_close(program(lhs, rhs), reference.convolve(problem, lhs, rhs), "channel_last", np.float32)
    assert f"pad = [[0, {strides[0]}], [0, 0]]" in program.lower(lhs, rhs).as_text()
    turned = problem.replace(reversed=True)
    assert_close(
        jax.jit(lambda lhs, rhs: channel_last.run(turned, lhs, rhs))(lhs, rhs),
        reference.convolve(turned, lhs, rhs), "channel_last", np.float32,
    )  # fmt: skip


@pytest.mark.parametrize("images,features,written_out", ((4, 16, True), (4, 17, False), (5, 16, False)))
@pytest.mark.parametrize("padding", (((1, 1), (1, 1)), ((2, 0), (0, 3)), ((-1, 2), (1, 0))))
def test_channel_last_writes_out_the_padding_of_narrow_kernel_gradients(images, features, written_out, padding):
    """XLA:CPU runs those of at most four images to at most 16 features up to eight times slower else."""
    channel_last = next(a for a in ALGORITHMS if a.name == "channel_last")
    rng = np.random.default_rng(0)
    x = rng.standard_normal((images, 9, 10, 5)).astype(np.float32)
    forward = jconv.ConvProblem.of(
        x, np.zeros((3, 3, 5, features), np.float32), (1, 2), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    g = rng.standard_normal(forward.physical_output_shape).astype(np.float32)
    gradient = weight_problem(forward)
    for problem in (gradient, gradient.replace(reversed=True)):
        run = jax.jit(functools.partial(channel_last.run, problem), compiler_options=AS_USERS)
        program = run.lower(x, g).compile()
        assert_close(program(x, g), reference.convolve(problem, x, g), "channel_last", np.float32)
        # What XLA made of it: the padding of a convolution's window.
        assert ("pad=" in program.as_text()) != written_out


@pytest.mark.parametrize("layout", (CHANNEL_LAST[3], CHANNEL_FIRST[3]))
@pytest.mark.parametrize(
    "padding, holes",
    ((((1, 1), (2, -3), (0, 1)), (1, 1, 1)), (((1, 1), (-1, 2), (1, 1)), (2, 1, 2))),
    ids=("cropped", "holes"),
)
def test_bands_of_another_axis(padding, holes, layout):
    """A short first axis is left whole, and so is one with holes: what has them along the divided axis is refused."""
    im2col, rng = next(a for a in ALGORITHMS if a.name == "im2col"), np.random.default_rng(0)
    case = Case("", (2, 4, 3, 40, 5), (3, 4, 2, 3, 2), (1, 2, 1), padding, holes, layout=layout)
    forward = case.problem()
    for problem in (
        forward,
        forward.replace(reversed=True),
        *((p := weight_problem(forward)), p.replace(reversed=True)),
    ):
        assert band_axis(problem) == 1
        lhs, rhs = (rng.standard_normal(of.shape).astype(np.float32) for of in _operands(problem))
        split = InParts(im2col, 2, 3)
        actual = jax.jit(functools.partial(split.run, problem))(lhs, rhs)
        assert_close(actual, reference.convolve(problem, lhs, rhs), "im2col", np.float32, factor=2)
    everywhere = Case("", (1, 2, 9, 9), (2, 2, 3, 3), None, ((0, 0), (0, 0)), (2, 2)).problem()
    assert "an axis without holes" in InParts(im2col, 1, 3).why_not(everywhere)


def test_the_workspace_limit_splits():
    """An algorithm works in as few parts as its limit asks for, and a plan says so."""
    problem = next(c for c in CASES if c.name == "dense_2d:batch_5").problem()
    im2col = next(a for a in ALGORITHMS if a.name == "im2col")
    device = device_for("cpu")
    whole = im2col.cost(problem, device).workspace
    for limit, images, bands in ((whole, 1, 1), (whole - 1, 5, 1), (whole // 6, 5, 3)):
        runner = within(im2col, problem, device, limit)
        assert runner == (im2col if images * bands == 1 else InParts(im2col, images, bands))
        assert runner.cost(problem, device).workspace <= limit
    assert within(im2col, problem, device, 8) is None
    spread = replace(device, devices=8)
    assert within(im2col, problem, spread, whole // 8) == im2col and within(im2col, problem, spread, whole // 9) is None


@pytest.mark.parametrize("dtype", (np.float16, bfloat16), ids=name_of)
def test_a_plan_computes_16_bits_in_32(dtype):
    problem = SIZED["3x3"].replace(dtype=np.dtype(dtype))
    for posed in (problem, input_problem(problem), weight_problem(problem)):
        chosen = plan(posed, "cpu")
        program = jax.jit(functools.partial(chosen.runner.run, posed)).lower(*_operands(posed)).as_text()
        products = [
            line for line in program.splitlines() if "stablehlo.dot_general" in line or "stablehlo.convolution" in line
        ]
        assert products and not any("f16" in line for line in products)
        assert "in float32" in str(chosen)


def test_parts_keep_to_the_limit_and_to_what_the_algorithm_serves():
    """Bands can be so low that a part's window is no larger than its result, which makes it another kind of problem."""
    odd = weight_problem(_problem((1, 22, 38, 256), (9, 9, 256, 64), padding="VALID"))
    for problem in (odd, *(turn(p) for p in SIZED.values() for turn in (lambda p: p, input_problem, weight_problem))):
        for algorithm in (a for a in ALGORITHMS if a.why_not(problem) is None):
            for limit in (1 << 16, 1 << 18, 1 << 21):
                found = within(algorithm, problem, device_for("cpu"), limit)
                if found is not None:
                    assert found.why_not(problem) is None
                    workspace = found.cost(problem, device_for("cpu")).workspace
                    assert workspace <= limit
                    if isinstance(found, InParts) and found.bands > 1:  # which are copied
                        assert workspace >= prod(found.part(problem).lhs_shape) * problem.dtype.itemsize


def test_parts_that_fit_the_cache():
    """Temporaries are made smaller than the limit asks where that is estimated to be faster."""
    problem = _problem((1, 112, 112, 64), (3, 3, 64, 128))
    device = replace(device_for("cpu"), threads=1)
    for algorithm, gradient in (("winograd", False), ("channel_last", True)):
        posed = weight_problem(problem) if gradient else problem
        counts = {}
        for cache in (0, device.cache):
            of = plan_given(posed, replace(device, cache=cache), ())
            runner = next(c.runner for c in of.candidates if c.algorithm.name == algorithm)
            counts[bool(cache)] = getattr(runner, "count", 1)
        assert counts[False] < counts[True], algorithm


@pytest.mark.parametrize("layouts", (CHANNEL_LAST, CHANNEL_FIRST), ids=("last", "first"))
@pytest.mark.parametrize(
    "lhs, window, strides, padding, holes, dilation",
    (
        ((2, 3, 20, 17), (9, 8), (2, 3), ((4, 3), (2, -1)), None, None),
        ((2, 3, 9, 8), (9, 8), (1, 2), ((5, 4), (6, 7)), (2, 3), None),
        ((2, 3, 24, 21), (9, 8), (1, 2), ((-1, 4), (3, 4)), None, (2, 1)),
        ((1, 2, 9, 8, 7), (5, 5, 3), None, ((2, 2), (2, 2), (1, 1)), None, None),
    ),
    ids=("strided", "holes", "dilated", "3d"),
)
def test_depthwise_kernel_gradients_of_many_taps(lhs, window, strides, padding, holes, dilation, layouts):
    """Above 64 taps those of the first axis take turns."""
    depthwise, rng = next(a for a in ALGORITHMS if a.name == "depthwise"), np.random.default_rng(0)
    features, layout = lhs[1], layouts[len(window)]
    case = Case("", lhs, (features, 1, *window), strides, padding, holes, dilation, features, layout=layout)
    gradient = weight_problem(case.problem())
    for problem in (gradient, gradient.replace(reversed=True)):
        x, g = (rng.standard_normal(of.shape).astype(np.float32) for of in _operands(problem))
        run = jax.jit(functools.partial(depthwise.run, problem), compiler_options=AS_USERS)
        assert "while" in run.lower(x, g).as_text()
        assert_close(run(x, g), reference.convolve(problem, x, g), "depthwise", np.float32)


@pytest.mark.parametrize("size", (3, 5, 7, 11))
def test_a_part_in_the_cache_is_estimated_below_the_whole(size):
    """However often a depthwise kernel gradient reads what stays there."""
    depthwise = next(a for a in ALGORITHMS if a.name == "depthwise")
    problem = weight_problem(_problem((8, 56, 56, 144), (size, size, 1, 144), groups=144))
    device = replace(device_for("cpu"), threads=1, cache=1 << 21)
    runner = next(c.runner for c in plan_given(problem, device, ()).candidates if c.algorithm == depthwise)
    assert runner == in_cache(depthwise, problem, device) and runner.cost(problem, device).reread <= device.near


@pytest.mark.skipif(jax.__version_info__ < (0, 10), reason="YNNPACK came with jax 0.10")
@pytest.mark.parametrize(
    "features, out, filled",
    (
        (3, 24, (4, 24)),
        (3, 32, (4, 32)),
        (9, 32, (12, 32)),
        (10, 48, (12, 48)),
        (7, 72, (8, 72)),
        (4, 32, (4, 32)),
        (3, 64, (3, 64)),
        (3, 96, (3, 96)),
        (1, 32, (1, 32)),
        (20, 28, (20, 32)),
        (17, 60, (17, 64)),
        (32, 48, (32, 48)),
        (3, 16, (4, 20)),
        (8, 8, (8, 20)),
        (12, 16, (12, 20)),
        (16, 4, (20, 4)),
        (16, 16, (16, 16)),
    ),
)
def test_features_that_ynnpack_is_slow_with_are_filled_up(features, out, filled):
    """It takes four input features at a time, and is up to eight times slower where some are left; of up to 64 outputs the last 32
    want to be full; and what has at most 16 of both it does not get. Not so a kernel gradient, whose images are shared out otherwise."""
    last = next(a for a in ALGORITHMS if a.name == "channel_last")
    problem, rng = _problem((2, 8, 8, features), (3, 3, features, out)), np.random.default_rng(0)
    x, w = (rng.standard_normal(of.shape).astype(np.float32) for of in _operands(problem))
    run = jax.jit(functools.partial(last.run, problem), compiler_options=AS_USERS)
    (of,) = re.findall(r"stablehlo.convolution.*tensor<3x3x(\d+)x(\d+)xf32>", run.lower(x, w).as_text())
    assert tuple(map(int, of)) == filled
    assert_close(run(x, w), reference.convolve(problem, x, w), "channel_last", np.float32)
    gradient = weight_problem(problem)
    text = jax.jit(lambda lhs, rhs: last.run(gradient, lhs, rhs)).lower(*_operands(gradient)).as_text()
    assert f"tensor<8x8x2x{out}xf32>" in text


@pytest.mark.skipif(jax.__version_info__ < (0, 10), reason="YNNPACK came with jax 0.10")
@pytest.mark.parametrize(
    "features, window, padding, dilation, left",
    (
        ((32, 24), (3, 3), ((2, 2), (2, 2)), (1, 1), "[0, 2], [0, 2]"),
        ((32, 24), (3, 3), ((0, 4), (3, 1)), (1, 1), "[0, 2], [1, 1]"),
        ((24, 32), (3, 5), ((4, 3), (2, 2)), (2, 1), "[1, 3], [2, 2]"),
        ((24, 24), (2, 2), ((1, 1), (0, 1)), (1, 1), "[0, 1], [0, 1]"),
        ((24, 24), (3, 3), ((5, -1), (1, 1)), (1, 1), "[2, 0], [1, 1]"),
        ((72, 72), (3, 3), ((2, 2), (2, 2)), (1, 1), "[2, 2], [2, 2]"),
        ((160, 160), (3, 3), ((1, 1), (1, 1)), (1, 1), "[1, 1], [1, 2]"),
        ((160, 160), (5, 1), ((2, 2), (0, 0)), (1, 1), "[2, 2], [0, 1]"),
        ((160, 160), (3, 3), ((1, 0), (1, 0)), (1, 1), "[1, 0], [1, 0]"),
        ((160, 128), (3, 3), ((1, 1), (1, 1)), (1, 1), "[1, 1], [1, 1]"),
        ((24, 24), (3, 3), ((0, 0), (0, 0)), (1, 1), "[0, 1], [0, 0]"),
        ((8, 8), (3, 3), ((0, 0), (0, 0)), (1, 1), "[0, 1], [0, 0]"),
        ((24, 24), (1, 3), ((0, 0), (0, 0)), (1, 1), "[0, 0], [0, 1]"),
    ),
)
def test_what_ynnpack_leaves_to_eigen(features, window, padding, dilation, left):
    """It is asked for no result that is larger than the image, which is slow of few features and fast of many; nor for one without
    padding, which it does slowly."""
    last, rng = next(a for a in ALGORITHMS if a.name == "channel_last"), np.random.default_rng(0)
    case = Case("", (2, features[0], 7, 9), (features[1], features[0], *window), None, padding, None, dilation)
    posed = case.problem()
    for problem in (posed, posed.replace(reversed=True)):
        x, w = (rng.standard_normal(of.shape).astype(np.float32) for of in _operands(problem))
        run = jax.jit(functools.partial(last.run, problem), compiler_options=AS_USERS)
        assert re.findall(r"pad = \[(\[.*?\])\]", run.lower(x, w).as_text()) == [left]
        assert_close(run(x, w), reference.convolve(problem, x, w), "channel_last", np.float32)


@pytest.mark.skipif(jax.__version_info__ < (0, 10), reason="YNNPACK came with jax 0.10")
def test_many_features_of_few_positions_are_left_to_eigen():
    """Which is estimated as it was measured: up to 1.7 times faster."""
    posed = _problem((1, 7, 7, 512), (3, 3, 512, 512))
    found = {c.algorithm.name: c for c in plan_given(posed, replace(device_for("cpu"), threads=1), ()).candidates}
    assert found["channel_last"].time_ns < 0.9 * found["xla"].time_ns


@pytest.mark.skipif(jax.__version_info__ < (0, 10), reason="YNNPACK came with jax 0.10")
@pytest.mark.parametrize("features", (24, 72))
def test_doubles_are_kept_from_growing(features):
    """There XLA:CPU has nothing but a loop of scalars."""
    last, rng = next(a for a in ALGORITHMS if a.name == "channel_last"), np.random.default_rng(0)
    case = Case("", (2, features, 7, 9), (features, features, 3, 3), None, ((2, 2), (2, 2)))
    with jax.enable_x64(True):
        problem = case.problem(np.float64)
        x, w = (rng.standard_normal(of.shape) for of in _operands(problem))
        run = jax.jit(functools.partial(last.run, problem), compiler_options=AS_USERS)
        assert "pad = [[0, 2], [0, 2]]" in run.lower(x, w).as_text()
        assert_close(run(x, w), reference.convolve(problem, x, w), "channel_last", np.float64)


@pytest.mark.skipif(jax.__version_info__ < (0, 10), reason="YNNPACK came with jax 0.10")
def test_eigen_serves_what_ynnpack_runs_on_one_thread():
    """Where there are several, and where the image is not Eigen's anyway."""
    eigen, device = next(a for a in ALGORITHMS if a.name == "eigen"), device_for("cpu")
    posed = _problem((8, 56, 56, 64), (3, 3, 64, 64))
    chosen = [plan_given(posed, replace(device, threads=n), ()).algorithm.name for n in (1, 2)]
    assert chosen[0] != "eigen" and chosen[1] == "eigen"
    x, w = _operands(posed)
    assert "pad = [[1, 2], [1, 1]]" in jax.jit(functools.partial(eigen.run, posed)).lower(x, w).as_text()
    for refused in (
        _problem((8, 56, 56, 64), (3, 3, 64, 64), strides=(2, 2)),
        _problem((8, 56, 56, 64), (3, 3, 64, 64), padding="VALID"),
        _problem((8, 56, 56, 16), (3, 3, 16, 16)),
        _problem((8, 56, 56, 160), (3, 3, 160, 160)),
        _problem((8, 56, 56, 64), (1, 1, 64, 64)),
        _problem((8, 56, 64), (3, 64, 64), strides=(1,)),
        weight_problem(posed),
    ):
        assert "image of YNNPACK" in eigen.why_not(refused)


@pytest.mark.skipif(jax.__version_info__ < (0, 10), reason="YNNPACK came with jax 0.10")
@pytest.mark.parametrize(
    "features, window, axes",
    (((32, 24), 5, "0, 1"), ((1, 24), 5, "0, 1"), ((64, 96), 3, "0, 1"), ((72, 96), 3, "0"), ((32, 24), 1, "0")),
)
def test_signals_of_few_features_are_images_of_one_row(features, window, axes):
    """YNNPACK knows no signals."""
    last, rng = next(a for a in ALGORITHMS if a.name == "channel_last"), np.random.default_rng(0)
    case = Case("", (2, features[0], 23), (features[1], features[0], window), (2,), ((3, 1),), None, (2,))
    for problem in (case.problem(), case.problem().replace(reversed=True), weight_problem(case.problem())):
        x, w = (rng.standard_normal(of.shape).astype(np.float32) for of in _operands(problem))
        run = jax.jit(functools.partial(last.run, problem), compiler_options=AS_USERS)
        (of,) = re.findall(r"dim_numbers = \[b, ([01, ]+), f\]", run.lower(x, w).as_text())
        assert of == ("0" if problem.is_weight_gradient else axes)
        assert_close(run(x, w), reference.convolve(problem, x, w), "channel_last", np.float32)


@pytest.mark.parametrize("turned", (None, input_problem, weight_problem), ids=("forward", "input", "kernel"))
@pytest.mark.parametrize(
    "lhs, rhs, padding",
    [
        ((2, 9, 9, 3), (3, 3, 3, 30), "SAME"),
        ((2, 9, 9, 12), (3, 3, 12, 8), "VALID"),
        ((1, 9, 9, 16), (3, 3, 16, 16), "SAME"),
        ((2, 9, 9, 40), (3, 3, 40, 24), ((2, 3), (2, 2))),
        ((1, 9, 9, 160), (3, 3, 160, 176), "SAME"),
        ((2, 19, 24), (3, 24, 32), "SAME"),
    ],
    ids=("odd_and_ragged", "few_bare", "narrow", "growing", "one_row_more", "signal"),
)
def test_a_nan_spreads_as_with_lax_however_channel_last_poses_it(lhs, rhs, padding, turned):
    """Features and rows that it fills up hold zeros, and what they give is cut off."""
    forward = _problem(lhs, rhs, (1,) * (len(lhs) - 2), padding)
    problem, rng = forward if turned is None else turned(forward), np.random.default_rng(0)
    last, xla = (next(a for a in ALGORITHMS if a.name == name) for name in ("channel_last", "xla"))
    for broken in (0, 1):
        operands = [rng.standard_normal(of.shape).astype(np.float32) for of in _operands(problem)]
        operands[broken].flat[operands[broken].size // 2 + 1] = np.nan
        masks = [
            np.isnan(jax.jit(functools.partial(a.run, problem), compiler_options=AS_USERS)(*operands))
            for a in (last, xla)
        ]
        np.testing.assert_array_equal(*masks)
        assert 0 < masks[0].sum() < masks[0].size


@pytest.mark.parametrize(
    "algorithm, lhs, rhs, strides, width, apart",
    (
        ("pointwise", (1, 32, 32, 64), (1, 1, 64, 96), (1, 1), 64, True),
        ("pointwise", (1, 32, 32, 128), (1, 1, 128, 64), (1, 1), 64, True),
        ("pointwise", (1, 32, 32, 96), (1, 1, 96, 96), (1, 1), 96, True),
        ("pointwise", (1, 32, 32, 48), (1, 1, 48, 96), (1, 1), 48, False),
        ("pointwise", (1, 20, 51, 64), (1, 1, 64, 96), (1, 1), 64, False),
        ("pointwise", (1, 32, 32, 64), (1, 1, 64, 342), (1, 1), 64, False),
        ("pointwise", (1, 32, 32, 32), (1, 1, 32, 96), (1, 1), 32, False),
        ("patches", (1, 64, 64, 16), (2, 2, 16, 80), (2, 2), 64, True),
        ("im2col", (1, 50, 48, 32), (3, 3, 32, 64), (1, 1), 64, True),
        ("winograd", (2, 8, 8, 32), (3, 3, 32, 33), (1, 1), 32, True),
        ("winograd", (2, 8, 8, 33), (3, 3, 33, 32), (1, 1), 32, True),
    ),
)
def test_rows_that_collide_in_the_cache_are_taken_apart(algorithm, lhs, rhs, strides, width, apart):
    """A product over rows reads its left operand down a few columns at a time: 128 bytes apart, rows evict one another."""
    algorithm = next(a for a in ALGORITHMS if a.name == algorithm)
    problem, rng = weight_problem(_problem(lhs, rhs, strides)), np.random.default_rng(0)
    x, g = (rng.standard_normal(of.shape).astype(np.float32) for of in _operands(problem))
    run = jax.jit(functools.partial(algorithm.run, problem), compiler_options=AS_USERS)
    padded = [int(n) for n in re.findall(r"stablehlo.pad.* -> tensor<(?:\d+x)*(\d+)xf32>", run.lower(x, g).as_text())]
    assert padded.count(width + 4) == apart
    assert_close(run(x, g), reference.convolve(problem, x, g), algorithm.name, np.float32)
    doubles = problem.replace(dtype=np.dtype(np.float64))
    with jax.enable_x64(True):
        operands = [jax.ShapeDtypeStruct(of.shape, np.float64) for of in _operands(problem)]
        text = jax.jit(functools.partial(algorithm.run, doubles)).lower(*operands).as_text()
    assert f"x{width + 4}xf64>" not in text


def test_depthwise_kernel_gradients_are_taken_in_parts_that_stay_in_the_cache():
    """Images, or bands of their rows, of which no more than a sixteenth is filled up. Not over several devices, and no bands
    where features are not innermost: there rows are short. Of few groups, too, XLA's own are no rival."""
    device = replace(device_for("cpu"), threads=1, cache=1 << 21)
    for shape, parts in (
        ((8, 28, 28, 192), (8, 4)),
        ((16, 56, 56, 144), (16, 14)),
        ((1, 74, 74, 128), (1, 15)),
        ((1, 112, 112, 96), (1, 28)),
        ((4, 512, 512, 3), (4, 16)),
        ((8, 7, 7, 960), (8, 1)),
        ((1, 14, 14, 64), (1, 1)),
        ((1, 16384, 48), (1, 1)),
        ((1024, 600), (1, 1)),
    ):
        channels, rank = shape[-1], len(shape) - 2
        problem = _problem(shape, (*(3,) * rank, 1, channels), (1,) * rank, groups=channels)
        for devices in (1, 8):
            of = plan_given(weight_problem(problem), replace(device, devices=devices), ())
            assert of.algorithm.name == "depthwise"
            split = getattr(of.runner, "images", 1), getattr(of.runner, "bands", 1)
            assert split == (parts if devices == 1 else (1, 1)), shape
    x, w = (jax.ShapeDtypeStruct(shape, np.float32) for shape in ((8, 192, 28, 28), (192, 1, 3, 3)))
    problem = jconv.ConvProblem.of(
        x, w, (1, 1), "SAME", feature_group_count=192, dimension_numbers=("NCHW", "OIHW", "NCHW")
    )
    of = plan_given(weight_problem(problem), device, ())
    assert of.algorithm.name == "depthwise" and getattr(of.runner, "bands", 1) == 1


@pytest.mark.parametrize("layout", (("NHWC", "HWIO", "NHWC"), ("NCHW", "OIHW", "NCHW")))
def test_winograd_transforms_a_kernel_as_it_lies(layout):
    """Its features lie one way round forward and the other for an input gradient; read transposed, the transform is
    scalar."""
    winograd = next(a for a in ALGORITHMS if a.name == "winograd")
    sizes = {"N": 1, "C": 16, "I": 16, "O": 24, "H": 8, "W": 8}
    x, w = (
        jax.ShapeDtypeStruct([of[letter] for letter in spec], np.float32)
        for spec, of in ((layout[0], sizes), (layout[1], {**sizes, "H": 3, "W": 3}))
    )
    forward = jconv.ConvProblem.of(x, w, (1, 1), "SAME", dimension_numbers=layout)
    for problem, turned in ((forward, layout[1] == "OIHW"), (input_problem(forward), layout[1] == "HWIO")):
        text = jax.jit(lambda lhs, rhs, p=problem: winograd.run(p, lhs, rhs)).lower(*_operands(problem)).as_text()
        assert f"contracting_dims = [2] x [{1 + turned}]" in text


@pytest.mark.parametrize("gradient", (False, True))
def test_depthwise_workspace_is_what_it_lays_out(gradient):
    """XLA's temporaries agree. Where lhs has holes, an input gradient skips them, the kernel gradient of a transposed
    convolution fills them."""
    depthwise = next(a for a in ALGORITHMS if a.name == "depthwise")
    transposed = input_problem(_problem((4, 32, 32, 16), (3, 3, 1, 16), (2, 2), groups=16))
    problem = weight_problem(transposed) if gradient else transposed
    run = jax.jit(functools.partial(depthwise.run, problem), compiler_options=AS_USERS)
    program = run.lower(*_operands(problem)).compile()
    counted, used = depthwise.cost(problem, device_for("cpu")).workspace, program.memory_analysis().temp_size_in_bytes
    assert counted <= 1.1 * used and used <= 1.5 * counted


@pytest.mark.parametrize("name, groups", (("im2col", 1), ("grouped", 2)))
def test_a_kernel_gradient_needs_no_columns_for_the_last_axis(name, groups):
    """9 taps of the input and 3 of the cotangent, not 27 of the input; with a stride, all 27."""
    algorithm = next(a for a in ALGORITHMS if a.name == name)
    for strides, columns in ((1, 1, 1), 9 + 3), ((1, 1, 2), 27):
        forward = _problem((1, 8, 16, 32, 32), (3, 3, 3, 32 // groups, 32), strides, groups=groups)
        problem = weight_problem(forward)
        run = jax.jit(functools.partial(algorithm.run, problem), compiler_options=AS_USERS)
        used = run.lower(*_operands(problem)).compile().memory_analysis().temp_size_in_bytes
        bytes_of_all = prod(forward.output_shape[2:]) * 32 // groups * 4 * columns
        assert 0.9 * bytes_of_all <= used <= 2.1 * bytes_of_all
        assert 0.5 * used <= algorithm.cost(problem, device_for("cpu")).workspace <= 1.3 * used


_VOLUME = ((1, 26, 28, 28, 128), (3, 3, 3, 128, 256), (1, 1, 1), "VALID")


@pytest.mark.parametrize(
    "name, lhs, rhs, strides, padding, groups, turned",
    [
        ("winograd", *_VOLUME, 1, None),
        ("winograd", *_VOLUME, 1, input_problem),
        ("winograd", *_VOLUME, 1, weight_problem),
        ("volume", (1, 64, 64, 64, 16), (3, 3, 3, 16, 16), (1, 1, 1), "SAME", 1, None),
        ("volume", (1, 64, 64, 64, 16), (3, 3, 3, 16, 16), (1, 1, 1), "SAME", 1, weight_problem),
        ("im2col", (22, 17, 17, 160), (7, 1, 160, 192), (1, 1), "SAME", 1, weight_problem),
        ("im2col", (2, 20, 84, 256), (5, 5, 256, 512), (2, 2), "SAME", 1, None),
        ("fold", (1, 12, 13, 13, 256), (3, 3, 3, 256, 256), (1, 1, 1), "VALID", 1, input_problem),
        ("grouped", (6, 8, 56, 56, 128), (3, 3, 3, 16, 128), (2, 2, 2), "SAME", 8, input_problem),
        ("grouped", (12, 28, 28, 1024), (3, 3, 32, 1024), (1, 1), "SAME", 32, None),
        ("groupwise", (12, 28, 28, 1024), (3, 3, 32, 1024), (1, 1), "SAME", 32, None),
        ("grouped", (16, 56, 56, 8), (3, 3, 2, 512), (1, 1), "SAME", 4, None),
        ("direct", (6, 8, 56, 56, 64), (3, 3, 3, 4, 64), (1, 1, 1), "SAME", 16, None),
        ("im2col", (32, 112, 112, 4), (3, 3, 4, 256), (1, 1), "SAME", 1, None),
        ("im2col", (16, 112, 112, 4), (3, 3, 4, 256), (1, 1), "SAME", 1, weight_problem),
        ("groupwise", (32, 56, 56, 128), (3, 3, 64, 512), (1, 1), "SAME", 2, None),
        ("groupwise", (64, 56, 56, 64), (1, 1, 4, 1024), (1, 1), "SAME", 16, None),
    ],
)
def test_temporaries_keep_to_the_limit(name, lhs, rhs, strides, padding, groups, turned):
    """XLA's own account of what each takes, in as many parts as it needs by ours."""
    forward = _problem(lhs, rhs, strides, padding, groups)
    problem, device = forward if turned is None else turned(forward), device_for("cpu")
    algorithm = within(next(a for a in ALGORITHMS if a.name == name), problem, device, device.workspace_limit)
    if algorithm is None:
        pytest.fail(f"{name} does not keep to the limit by its own account")
    run = jax.jit(functools.partial(algorithm.run, problem), compiler_options=AS_USERS)
    used = run.lower(*_operands(problem)).compile().memory_analysis().temp_size_in_bytes
    assert used <= 1.1 * device.workspace_limit
    assert used <= 1.5 * algorithm.cost(problem, device).workspace + 2**20


@pytest.mark.parametrize("name", ("grouped", "groupwise"))
def test_a_loop_over_groups_writes_bfloat16_in_place(name):
    """XLA:CPU would convert the whole result to float32 and back at every turn."""
    problem = _problem((2, 12, 12, 64), (3, 3, 16, 96), groups=4).replace(dtype=np.dtype(jnp.bfloat16))
    algorithm = next(a for a in ALGORITHMS if a.name == name)
    text = jax.jit(functools.partial(algorithm.run, problem)).lower(*_operands(problem)).compile().as_text()
    assert re.search(r"bf16\[2,12,12,96\]\S* convert\(", text)
    assert not re.search(r"f32\[2,12,12,96\]\S* convert\(", text)


def test_groups_of_few_features_are_read_where_they_lie():
    """direct pads the input, where a block of groups has columns."""
    problem = _problem((2, 32, 32, 64), (3, 3, 4, 64), groups=16)
    direct = next(a for a in ALGORITHMS if a.name == "direct")
    run = jax.jit(functools.partial(direct.run, problem), compiler_options=AS_USERS)
    used = run.lower(*_operands(problem)).compile().memory_analysis().temp_size_in_bytes
    assert used <= 1.1 * 2 * 34 * 34 * 64 * 4 == 1.1 * direct.cost(problem, device_for("cpu")).workspace
    assert plan(problem, "cpu").algorithm.name == "direct"


def test_direct_counts_the_phases_that_holes_make():
    """Each is two loops, and all of them lie apart before they interleave."""
    forward = _problem((2, 32, 32, 64), (3, 3, 4, 64), (2, 2), groups=16)
    problem = input_problem(forward)
    direct = next(a for a in ALGORITHMS if a.name == "direct")
    run = jax.jit(functools.partial(direct.run, problem), compiler_options=AS_USERS)
    used = run.lower(*_operands(problem)).compile().memory_analysis().temp_size_in_bytes
    counted = direct.cost(problem, device_for("cpu"))
    assert used <= 1.1 * counted.workspace and counted.workspace <= 2 * used
    assert counted.kernels == 8 and direct.cost(forward, device_for("cpu")).kernels == 2


def test_devices_share_the_workspace():
    """What a partitioner spreads over eight devices may take eight times the limit, whole; on one it needs parts."""
    problem, device = _problem((8, 112, 112, 64), (3, 3, 64, 64)), replace(device_for("cpu"), threads=1)
    for devices in (1, 8):
        of = plan_given(problem, replace(device, devices=devices), ())
        winograd = next(c for c in of.candidates if c.algorithm.name == "winograd")
        assert winograd.refusal is None
        assert isinstance(winograd.runner, InParts) == (devices == 1)


def test_a_kernel_gradient_left_to_xla_lies_channel_last():
    """XLA:CPU brings a convolution into its order at the top of a program only; in a loop it would be 200 times slower."""
    x, w = (jax.ShapeDtypeStruct(s, np.float32) for s in ((2, 224, 224, 3), (7, 7, 3, 64)))
    stem = jconv.ConvProblem.of(x, w, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    assert plan(stem, "cpu").algorithm.name == "xla"
    assert plan(weight_problem(stem), "cpu").algorithm.name != "xla"


def _operands(problem):
    lhs_spec, rhs_spec, _ = problem.layout
    pairs = ((problem.lhs_shape, lhs_spec), (problem.rhs_shape, rhs_spec))
    return [jax.ShapeDtypeStruct(physical(shape, spec), problem.dtype) for shape, spec in pairs]


def _problem(lhs, rhs, strides=(1, 1), padding="SAME", groups=1):
    x, w = (jax.ShapeDtypeStruct(s, np.float32) for s in (lhs, rhs))
    layout = CHANNEL_LAST[len(lhs) - 2]
    return jconv.ConvProblem.of(x, w, strides, padding, dimension_numbers=layout, feature_group_count=groups)


SIZED = {
    "3x3": _problem((2, 28, 28, 64), (3, 3, 64, 64)),
    "stem": _problem((1, 64, 64, 3), (7, 7, 3, 32), (2, 2)),
    "1x1": _problem((2, 28, 28, 64), (1, 1, 64, 128)),
    "strided": _problem((1, 28, 28, 32), (3, 3, 32, 64), (2, 2)),
    "depthwise": _problem((2, 28, 28, 48), (3, 3, 1, 48), groups=48),
    "depthwise 7x7": _problem((1, 28, 28, 32), (7, 7, 1, 32), groups=32),
    "depthwise 15x15": _problem((1, 28, 28, 8), (15, 15, 1, 8), groups=8),
    "grouped": _problem((1, 14, 14, 64), (3, 3, 8, 64), groups=8),
    "grouped wide": _problem((1, 14, 14, 128), (3, 3, 64, 128), groups=2),
    "patches": _problem((1, 32, 32, 3), (4, 4, 3, 48), (4, 4), "VALID"),
    "1-D": _problem((1, 512, 32), (5, 32, 32), (1,)),
    "3-D": _problem((1, 8, 12, 12, 16), (3, 3, 3, 16, 16), (1, 1, 1)),
}


@pytest.mark.parametrize("dtype", (np.float32, bfloat16), ids=name_of)
@pytest.mark.parametrize("name", SIZED)
def test_the_default_is_as_accurate_as_lax(name, dtype):
    """In each direction, at most twice lax's own error against float64; or, where lax's sum is a plain loop that
    happens to be closer, the scatter of direct summation itself, a quarter of what F(4x4, 3x3) is off."""
    slack = 8 * float(jnp.finfo(dtype).eps) if dtype == np.float32 else float(jnp.finfo(dtype).eps)
    forward = SIZED[name].replace(dtype=np.dtype(dtype))
    rng = np.random.default_rng(3)

    def error(problem, wide, lhs, rhs, algorithm):
        run = jax.jit(lambda lhs, rhs: jconv.convolve.convolve(lhs, rhs, problem, algorithm), compiler_options=AS_USERS)
        exact = jax.jit(lambda lhs, rhs: jconv.convolve.convolve(lhs, rhs, wide, "xla"))
        expected = np.asarray(exact(lhs.astype(np.float64), rhs.astype(np.float64)))
        return np.abs(np.asarray(run(lhs, rhs), np.float64) - expected).max() / np.abs(expected).max()

    for problem in (forward, input_problem(forward), weight_problem(forward)):
        wide = problem.replace(dtype=np.dtype(np.float64))
        shapes = ((problem.lhs_shape, problem.layout.lhs_spec), (problem.rhs_shape, problem.layout.rhs_spec))
        lhs, rhs = (rng.standard_normal([s[spec.index(a)] for a in range(len(s))]).astype(dtype) for s, spec in shapes)
        ours, laxs = (error(problem, wide, lhs, rhs, algorithm) for algorithm in ("auto", "xla"))
        assert ours <= max(2 * laxs, slack), plan(problem, "cpu")


EXCHANGED = [
    pytest.param(p, a, id=f"{c.name}-{a.name}")
    for c in (*CASES, Case("transposed_2d:dilated", (2, 3, 5, 6), (4, 3, 3, 2), None, ((2, 1), (1, 1)), (3, 2), (2, 1)))
    for p in (weight_problem(c.problem(np.int32)),)
    if worth_exchanging(p)
    for a in ALGORITHMS
    if a.why_not(exchanged(p)) is None
]


@pytest.mark.parametrize("problem,algorithm", EXCHANGED)
def test_exchanged(problem, algorithm):
    """Convolution commutes: kernel gradients of transposed convolutions, with their operands exchanged."""
    rng = np.random.default_rng(0)
    shapes = ((problem.lhs_shape, problem.layout.lhs_spec), (problem.rhs_shape, problem.layout.rhs_spec))
    lhs, rhs = (rng.integers(-9, 9, [s[spec.index(a)] for a in range(len(s))], np.int32) for s, spec in shapes)
    np.testing.assert_array_equal(
        Exchanged(algorithm).run(problem, jnp.asarray(lhs), jnp.asarray(rhs)), reference.convolve(problem, lhs, rhs)
    )


def test_transposed_kernel_gradients_are_exchanged():
    assert len(EXCHANGED) > 30
    up = _problem((1, 16, 16, 32), (2, 2, 32, 16), padding=((1, 1), (1, 1)))
    p = plan(weight_problem(up.replace(lhs_dilation=(2, 2))), "cpu")
    assert p.algorithm.name in ("im2col", "patches") and "operands exchanged" in str(p)
    assert plan(p.problem, "cuda").runner.name == "xla" and "exchanged" not in str(plan(p.problem, "cuda"))
