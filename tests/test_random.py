"""Random geometry: every algorithm against the definition, and the planner's choice against torch."""

import hypothesis.strategies as st
import numpy as np
import reference
import torch
from hypothesis import HealthCheck, given, settings
from tolerances import assert_close

import jconv
from jconv import ALGORITHMS
from jconv.adjoint import input_problem, weight_problem
from jconv.convolve import convolve, input_gradient, weight_gradient

SETTINGS = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@st.composite
def problems(draw):
    """Any layout, stride, dilations, groups and padding, negative too, with at least one output."""
    n = draw(st.integers(1, 3))
    small = st.integers(1, 3 if n < 3 else 2)
    groups = draw(st.integers(1, 3))
    kind = draw(st.sampled_from(("feature", "batch")))
    window = draw(st.tuples(*[st.integers(1, 4 if n < 3 else 2)] * n))
    strides, lhs_dilation, rhs_dilation = (draw(st.tuples(*[small] * n)) for _ in range(3))
    spatial, padding = [], []
    for k, h, d in zip(window, lhs_dilation, rhs_dilation):
        size = draw(st.integers(1, 7 if n < 3 else 4))
        extent, reach = (size - 1) * h + 1, (k - 1) * d + 1
        low = draw(st.integers(-min(2, extent - 1), 3))
        high = draw(st.integers(max(-2, reach - extent - low, -extent - low), max(3, reach - extent - low)))
        spatial.append(size)
        padding.append((low, high))
    features, out = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    batch = draw(st.integers(1, 3))
    lhs = (batch * (groups if kind == "batch" else 1), features * (groups if kind == "feature" else 1), *spatial)
    rhs = (out * groups, features, *window)
    specs = [tuple(draw(st.permutations(range(n + 2)))) for _ in range(3)]
    physical = [tuple(shape[spec.index(axis)] for axis in range(n + 2)) for shape, spec in zip((lhs, rhs), specs)]
    arrays = [
        np.random.default_rng([i, *shape]).integers(-3, 4, shape).astype(np.int64) for i, shape in enumerate(physical)
    ]
    from jax.lax import ConvDimensionNumbers

    problem = jconv.ConvProblem.of(
        *arrays, strides, padding, lhs_dilation, rhs_dilation, ConvDimensionNumbers(*specs),
        groups if kind == "feature" else 1, groups if kind == "batch" else 1,
    )  # fmt: skip
    return problem, arrays


@SETTINGS
@given(problems())
def test_value_and_adjoint(drawn):
    """Exact in integers: the value by the definition, the two adjoints by the inner product."""
    problem, (lhs, rhs) = drawn
    expected = reference.convolve(problem, lhs, rhs)
    assert problem.output_shape == tuple(expected.transpose(problem.layout.out_spec).shape)
    g = np.random.default_rng(0).integers(-3, 4, expected.shape).astype(np.int64)
    for algorithm in ALGORITHMS:
        if algorithm.why_not(problem) is None:
            np.testing.assert_array_equal(convolve(lhs, rhs, problem, algorithm), expected, err_msg=algorithm.name)
        wish = [algorithm if algorithm.why_not(q(problem)) is None else "auto" for q in (input_problem, weight_problem)]
        gx, gw = input_gradient(g, rhs, problem, wish[0]), weight_gradient(lhs, g, problem, wish[1])
        assert gx.shape == lhs.shape and gw.shape == rhs.shape
        assert np.vdot(expected, g) == np.vdot(lhs, gx) == np.vdot(rhs, gw)


@settings(SETTINGS, max_examples=100)
@given(problems())
def test_involution(drawn):
    problem, _ = drawn
    if problem.batch_groups == 1:
        assert input_problem(input_problem(problem)) == reference.trimmed(problem)
    assert weight_problem(weight_problem(problem)) == reference.trimmed(problem)


@st.composite
def torch_calls(draw):
    n = draw(st.integers(1, 3))
    transposed = draw(st.booleans())
    groups, per_in, per_out = (draw(st.integers(1, 3)) for _ in range(3))
    window, stride, dilation = (draw(st.tuples(*[st.integers(1, 3)] * n)) for _ in range(3))
    padding = draw(st.tuples(*[st.integers(0, 2)] * n))
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    size = draw(st.tuples(*[st.integers(1, 6 if n < 3 else 4)] * n))
    if transposed:
        options["output_padding"] = tuple(draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation))
    shape = (groups * per_in, per_out) if transposed else (groups * per_out, per_in)
    rng = np.random.default_rng([n, groups, *size, *window])
    arrays = [
        rng.standard_normal(s)
        for s in ((draw(st.integers(1, 2)), groups * per_in, *size), (*shape, *window), (groups * per_out,))
    ]
    return f"conv{'_transpose' * transposed}{n}d", arrays, options


@settings(SETTINGS, max_examples=40)
@given(torch_calls())
def test_as_torch(call):
    """The same value, or an error where torch raises one."""
    name, arrays, options = call
    try:
        expected = getattr(torch.nn.functional, name)(*map(torch.from_numpy, arrays), **options).numpy()
    except RuntimeError:
        expected = None
    try:
        actual = getattr(jconv.functional, name)(*arrays, **options)
    except jconv.ConvError:
        actual = None
    assert (actual is None) == (expected is None)
    if actual is not None:
        assert_close(actual, expected, "auto", np.float64, factor=2)
