"""explain: what it finds in a program, what it says of it, and the commands that show it."""

import functools
import inspect
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from jax import lax
from typer.testing import CliRunner

import jconv
from jconv import ConvError, ConvProblem, bench, explaining, store, target, tuning
from jconv.adjoint import input_problem, weight_problem
from jconv.cli import app
from jconv.planner import plan

ROOT = Path(__file__).resolve().parent.parent
NHWC = ("NHWC", "HWIO", "NHWC")
X = jax.ShapeDtypeStruct((2, 8, 8, 3), np.float32)
W = jax.ShapeDtypeStruct((3, 3, 3, 4), np.float32)
V = jax.ShapeDtypeStruct((3, 3, 4, 3), np.float32)
MACS = 2 * 8 * 8 * 4 * 3 * 3 * 3
SAME = {"window_strides": (1, 1), "padding": "SAME", "dimension_numbers": NHWC}
conv = functools.partial(lax.conv_general_dilated, **SAME)  # a partial has no frame: the line is its caller's
ours = functools.partial(jconv.conv_general_dilated, **SAME)
CONVS = {"lax": conv, "jconv": ours}


def line_of(function, text):
    lines, first = inspect.getsourcelines(function)
    return first + next(i for i, line in enumerate(lines) if text in line)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Each test has a store and a directory of its own."""
    monkeypatch.setenv("JCONV_STORE", str(tmp_path / "store"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return tmp_path


# What is found.


@pytest.mark.parametrize("who", CONVS)
def test_one_convolution_is_one_row_with_its_plan(who):
    def f(x, w):
        return CONVS[who](x, w)  # here

    report = jconv.explain(f, X, W)
    (row,) = report.rows
    problem = ConvProblem.of(X, W, (1, 1), "SAME", dimension_numbers=NHWC)
    assert row.problem == problem and row.plan == plan(problem, "cpu") and row.algorithm == row.plan.algorithm
    assert (row.direction, row.runs, row.macs, row.is_lax) == ("forward", 1, MACS, who == "lax")
    assert row.place == ("f", __file__, line_of(test_one_convolution_is_one_row_with_its_plan, "# here"))
    assert (report.program, report.platform, report.macs, report.share) == ("f", "cpu", MACS, 1.0)
    assert ("are lax's" in str(report)) == (who == "lax")


def test_the_runner_up_is_the_second_of_the_candidates():
    (row,) = jconv.explain(conv, X, W).rows
    able = sorted((c.time_ns, c.algorithm.name) for c in row.plan.candidates if c.refusal is None)
    assert row.algorithm.name == able[0][1] and row.runner_up.algorithm.name == able[1][1]
    assert set(row.refusals) == {c.algorithm.name for c in row.plan.candidates} - {name for _, name in able}
    assert row.jconv_ns == able[0][0] and row.lax_ns == dict((n, t) for t, n in able)["xla"]
    assert row.workspace == row.candidate.cost.workspace


def test_a_scan_of_five_in_a_jit_called_twice_runs_ten_times():
    @jax.jit
    def f(x, w, v):
        return lax.scan(lambda x, _: (conv(conv(x, w), v), None), x, length=5)[0]

    report = jconv.explain(lambda x, w, v: f(f(x, w, v), w, v), X, W, V)
    assert [(row.runs, row.macs) for row in report.rows] == [(10, MACS), (10, MACS)]
    assert report.macs == 20 * MACS and report.runs == 20
    assert report.lax_ns == sum(10 * row.lax.time_ns for row in report.rows)


def test_nested_scans_multiply():
    def f(x):
        def inner(x, _):
            return lax.scan(lambda x, _: (conv(x, jnp.ones((3, 3, 3, 3), x.dtype)), None), x, length=3)[0], None

        return lax.scan(inner, x, length=4)[0]

    assert [row.runs for row in jconv.explain(f, X).rows] == [12]


def test_a_while_counts_one_turn_and_says_so():
    def f(x, w):
        return lax.while_loop(lambda x: x.sum() < 9, lambda x: conv(x, w), x)

    report = jconv.explain(f, X, jax.ShapeDtypeStruct((3, 3, 3, 3), np.float32))
    assert [(row.runs, row.in_while) for row in report.rows] == [(1, True)]
    assert "inside a while loop, of which one turn is counted" in str(report) and " 1+ " in str(report)


def test_what_no_result_needs_is_left_out():
    report = jconv.explain(jax.jit(lambda x, w: (conv(x, w), x * 2)[1]), X, W)
    assert report.rows == () and report.flops == X.size


def test_both_branches_of_a_cond_count_once():
    def f(flag, x, w):
        return lax.cond(flag, lambda: conv(x, w), lambda: conv(x, 2 * w))

    report = jconv.explain(f, jax.ShapeDtypeStruct((), bool), X, W)
    assert sum(row.runs for row in report.rows) == 2


def test_equal_convolutions_in_one_line_are_one_row_and_in_two_lines_two():
    def f(x, w, v):
        for _ in range(3):
            x = conv(conv(x, w), v)
        return conv(x, w)

    rows = jconv.explain(f, X, W, V).rows
    assert sorted((row.place.line, row.runs) for row in rows) == [
        (line_of(f, "x = conv"), 3), (line_of(f, "x = conv"), 3), (line_of(f, "return"), 1),
    ]  # fmt: skip
    assert [row.place.line for row in rows] == sorted(row.place.line for row in rows), "those of a place stand together"


@pytest.mark.parametrize(
    "outside", [lambda f: f, jconv.accelerate, jax.jit, jax.checkpoint], ids=["", "accelerate", "jit", "remat"]
)
@pytest.mark.parametrize("who", CONVS)
def test_the_gradients_of_two_layers_are_told_apart(who, outside):
    @outside
    def loss(x, w, v):
        x = CONVS[who](x, w)  # first
        return (CONVS[who](x, v, window_strides=(2, 2)) ** 2).sum()  # second

    first, second = (line_of(test_the_gradients_of_two_layers_are_told_apart, text) for text in ("# first", "# second"))
    report = jconv.explain(jax.value_and_grad(loss, (1, 2)), X, W, V)
    found = {(row.place.line, row.direction) for row in report.rows}
    assert found == {(second, "forward"), (second, "kernel gradient"), (second, "input gradient")} | {
        (first, "forward"), (first, "kernel gradient"),
    }  # fmt: skip
    assert {row.macs for row in report.rows} == {MACS, MACS // 4}
    again = [row.runs for row in report.rows if row.place.line == first and row.direction == "forward"]
    assert again == ([2] if outside is jax.checkpoint else [1])


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("who", CONVS)
def test_gradients_of_one_by_one_on_one_by_one_are_told_apart(who, power):
    """As in a squeeze-and-excitation block: no shape alone shows which is which. The gradient of a sum needs no forward."""
    x, w = jax.ShapeDtypeStruct((4, 1, 1, 64), np.float32), jax.ShapeDtypeStruct((1, 1, 64, 16), np.float32)
    report = jconv.explain(jax.grad(lambda x, w: (CONVS[who](x, w) ** power).sum(), (0, 1)), x, w)
    shapes = {row.direction: row.problem.output_shape for row in report.rows}
    assert shapes.pop("forward", None) == (None if power == 1 else (4, 16, 1, 1))
    assert shapes == {"input gradient": (4, 64, 1, 1), "kernel gradient": (64, 16, 1, 1)}


def test_a_backward_program_alone_is_told_by_its_shapes():
    def backward(x, w, g):
        return jax.linear_transpose(lambda w: conv(x, w), w)(g), jax.linear_transpose(lambda x: conv(x, w), x)(g)

    rows = jconv.explain(backward, X, W, jax.ShapeDtypeStruct((2, 8, 8, 4), np.float32)).rows
    assert {row.direction for row in rows} == {"kernel gradient", "input gradient"}


def test_a_named_algorithm_is_shown_as_such():
    (row,) = jconv.explain(functools.partial(ours, algorithm="winograd4"), X, W).rows
    assert (row.algorithm.name, row.reason) == ("winograd4", "named by the caller")
    (row,) = jconv.explain(ours, X, W).rows
    assert row.reason == "the smallest estimate"


def test_what_jconv_cannot_express_is_named(monkeypatch):
    monkeypatch.setattr(explaining, "problem_of", lambda equation, turns=None: None)

    def f(x, w):
        return conv(x, w)

    report = jconv.explain(f, X, W)
    assert report.rows == () and report.conv_flops == 2 * MACS
    assert re.search(r"f \(test_explain.py:\d+\) stays lax's: jconv cannot express it", str(report))


# Places.


class Block(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Conv(4, (3, 3), name="inner")(x)  # linen


class Net(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Conv(4, (1, 1))(Block(name="block")(x)).sum()


def test_linen_modules_are_named_by_their_scopes():
    net = Net()
    variables = jax.eval_shape(net.init, jax.random.key(0), X)
    report = jconv.explain(jax.grad(net.apply), variables, X)
    assert report.program == "Net.apply"
    layers = {row.place.layer for row in report.rows}
    assert layers == {"Net/block/inner", "Net/Conv_0"}
    assert {row.place.line for row in report.rows if "inner" in row.place.layer} == {line_of(Block, "# linen")}


class Model(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 4, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)

    def __call__(self, x):
        return self.norm(self.conv(x))  # nnx


@pytest.mark.parametrize("way", ["fn", "argument", "jitted", "accelerated", "abstract", "method"])
def test_nnx_models_with_state(way):
    model = nnx.eval_shape(lambda: Model(nnx.Rngs(0))) if way == "abstract" else Model(nnx.Rngs(0))
    before = model.norm.mean.get_value()
    apply = lambda model, x: model(x)
    apply = {"jitted": nnx.jit, "accelerated": jconv.accelerate}.get(way, lambda f: f)(apply)
    if way in ("fn", "method"):
        report = jconv.explain(model if way == "fn" else model.__call__, X)
    else:
        report = jconv.explain(apply, model, X)
    (row,) = report.rows
    assert row.place == ("Model/Conv", __file__, line_of(Model, "# nnx")) and row.is_lax == (way != "accelerated")
    assert model.norm.mean.get_value() is before, "nothing ran"


def test_an_nnx_train_step():
    def loss(model, x):
        return (model(x) ** 2).sum()

    report = jconv.explain(lambda model, x: nnx.grad(loss)(model, x), Model(nnx.Rngs(0)), X)
    assert [row.direction for row in report.rows] == ["forward", "kernel gradient"]


def test_named_scopes_are_the_layer():
    def f(x, w):
        with jax.named_scope("encoder"), jax.named_scope("stage (1)"):
            return ours(x, w)

    assert [row.place.layer for row in jconv.explain(f, X, W).rows] == ["encoder/stage (1)"]


# Flops.

STRIDED = ConvProblem.of(X, W, (2, 2), "SAME", dimension_numbers=NHWC)
PROBLEMS = {
    "plain": (ConvProblem.of(X, W, (1, 1), "SAME", dimension_numbers=NHWC), MACS),
    "strided": (STRIDED, MACS // 4),
    "input gradient": (input_problem(STRIDED), MACS // 4),
    "kernel gradient": (weight_problem(STRIDED), MACS // 4),
    "grouped": (
        ConvProblem.of(jnp.ones((1, 6, 5)), jnp.ones((4, 3, 2)), (1,), "VALID", feature_group_count=2), 4 * 4 * 3 * 2,
    ),
    "holes": (ConvProblem.of(jnp.ones((1, 1, 3)), jnp.ones((1, 1, 2)), (1,), [(0, 0)], (3,)), 4),
    "holes and both dilations": (
        # positions 0 1 2 3 4 of an image with holes at 1 and 3; taps at 0 and 2
        ConvProblem.of(jnp.ones((1, 1, 3)), jnp.ones((1, 1, 2)), (1,), [(0, 0)], (2,), (2,)), 4,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PROBLEMS)
def test_macs_by_hand(name):
    problem, wanted = PROBLEMS[name]
    assert explaining.macs(problem) == wanted


@pytest.mark.parametrize(
    "fn, shapes, flops",
    [
        (lambda a, b: a @ b, [(4, 5), (5, 6)], 2 * 4 * 5 * 6),
        (lambda a, b: jnp.einsum("bij,bjk->bik", a, b), [(3, 4, 5), (3, 5, 6)], 2 * 3 * 4 * 5 * 6),
        (lambda a: jnp.sin(a) + 1, [(7, 3)], 2 * 21),
        (lambda a: lax.reduce_sum_p.bind(a, axes=(1,), out_sharding=None), [(7, 3)], 21),
        (lambda a: a.reshape(3, 7).T[None], [(7, 3)], 0),
        (lambda a: lax.scan(lambda c, _: (c * 2, None), a, length=9)[0], [(7,)], 63),
        (lambda a: lax.reduce_window(a, -jnp.inf, lax.max, (2, 3), (1, 1), "VALID"), [(4, 4)], 3 * 2 * 6),
        (lambda a, b: a.at[:2].add(b), [(9,), (2,)], 2),
    ],
)
def test_flops_by_hand(fn, shapes, flops):
    arguments = [jax.ShapeDtypeStruct(shape, np.float32) for shape in shapes]
    counted = jconv.explain(fn, *arguments)
    extra = 6 if fn.__code__.co_names[-1:] == ("add",) else 0  # of the index
    assert counted.conv_flops == 0 and flops <= counted.flops <= flops + extra


def test_the_share_of_flops_by_hand():
    def f(x, w, m):
        return jnp.tanh(conv(x, w)) @ m

    report = jconv.explain(f, X, W, jax.ShapeDtypeStruct((4, 10), np.float32))
    elements = 2 * 8 * 8
    assert report.conv_flops == 2 * MACS and report.flops == 2 * MACS + elements * 4 + 2 * elements * 4 * 10
    assert report.share == report.conv_flops / report.flops
    assert f"{100 * report.share:.3g} % of the program's flops" in str(report)


# What is shown.


def remember(problem, **times):
    store.store().add([(store.key_of(problem, "cpu"), times)])


def two_layers(x, w, v):
    return (conv(conv(x, w), v, window_strides=(2, 2)) ** 2).sum()


def test_measured_times_are_shown_where_both_are_known():
    first = ConvProblem.of(X, W, (1, 1), "SAME", dimension_numbers=NHWC)
    remember(first, xla=8_000_000, im2col=2_000_000, fold=3_000_000)
    report = jconv.explain(two_layers, X, W, V)
    measured, estimated = report.rows
    assert (measured.lax_ns, measured.jconv_ns, measured.reason) == (8_000_000, 2_000_000, "the fastest measured")
    assert measured.runner_up.algorithm.name == "fold" and not estimated.is_measured
    assert "(1 row measured, 1 estimated)" in str(report)
    remember(first, xla="failed")
    assert not jconv.explain(two_layers, X, W, V).rows[0].is_measured, "a measurement is not set beside an estimate"


def test_json_and_back():
    report = jconv.explain(jax.grad(two_layers, (1, 2)), X, W, V)
    data = json.loads(report.to_json())
    assert [data[name] for name in ("macs", "flops", "conv_flops", "lax_ns", "jconv_ns")] == [
        report.macs, report.flops, report.conv_flops, report.lax_ns, report.jconv_ns,
    ]  # fmt: skip
    assert len(data["rows"]) == len(report.rows) == 5
    for found, row in zip(data["rows"], report.rows):
        assert store.problem_from_json(found["problem"]) == row.problem
        assert explaining.Place(found["layer"], found["file"], found["line"]) == row.place
        assert (found["algorithm"], found["direction"], found["runs"]) == (row.algorithm.name, row.direction, row.runs)
        assert found["refusals"] == row.refusals and found["runner_up"] == row.runner_up.algorithm.name
        assert found["estimate_ns"] == row.candidate.time_ns and found["lax_estimate_ns"] == row.lax.time_ns


def test_text_is_narrow_and_says_the_totals():
    report = jconv.explain(jax.grad(two_layers, (1, 2)), X, W, V)
    text = str(report)
    assert max(map(len, text.splitlines())) <= 100
    assert text.count("two_layers (test_explain.py") == 1 and text.count("kernel gradient") == 2
    assert "5 convolutions in 5 runs" in text and "All are lax's: under jconv.accelerate" in text
    assert f"{report.lax_ns / report.jconv_ns:.2f} times" in text


@pytest.mark.parametrize("width", [80, 110, 140, 250])
def test_a_rich_report_fits_its_terminal(width):
    from rich.console import Console

    report = jconv.explain(jax.grad(two_layers, (1, 2)), X, W, V)
    out = Console(file=io.StringIO(), width=width)
    out.print(report)
    shown = out.file.getvalue()
    assert max(map(len, shown.splitlines())) <= width and "…" not in shown
    assert shown.count("kernel gradient") == 2 and ("workspace" in shown) == (width == 250)
    assert "3x2x8x8 * 4x2x8x8" in shown, "the shapes are never left out"


def test_html_is_escaped_and_has_the_plans():
    def f(x, w):
        with jax.named_scope("<script>alert(1)</script>"):
            return conv(x, w)

    f.__name__ = "<b>f"
    report = jconv.explain(f, X, W)
    text = report._repr_html_()
    assert "<script>" not in text and "<b>" not in text and "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "&lt;- chosen" in text and text.count("<tr>") == 2
    from html.parser import HTMLParser

    depth = []

    class Balanced(HTMLParser):
        def handle_starttag(self, tag, attrs):
            depth.append(tag)

        def handle_endtag(self, tag):
            assert depth.pop() == tag

    Balanced().feed(text)
    assert not depth


@pytest.mark.parametrize("layers", [3, 60])
def test_a_picture_has_a_bar_for_each_row_up_to_thirty(tmp_path, layers):
    def f(x, w, v):
        for i in range(layers):
            with jax.named_scope(f"a_rather_long_name_of_a_stage_{i}/of_a_network_with_many_blocks_{i}"):
                x = conv(x, w)[..., :3]
        return x

    report = jconv.explain(f, X, W, V)
    figure = report.plot(tmp_path / "time.png")
    (axes,) = figure.axes
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert len(labels) == (3 if layers == 3 else 31) and ("30 others, together" in labels) == (layers == 60)
    shown = report.rows[:30]
    drawn = sum(bar.get_width() for bar in axes.patches)
    assert np.isclose(drawn, sum(row.lax_ns + row.jconv_ns for row in shown) / 1e6)
    picture = (tmp_path / "time.png").read_bytes()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n" and len(picture) > 10_000
    figure.savefig(io.BytesIO(), dpi=figure.dpi)
    boxes = [label.get_window_extent() for label in axes.get_yticklabels()]
    assert all(not a.overlaps(b) for a, b in zip(boxes, boxes[1:])) and min(box.x0 for box in boxes) >= 0
    (legend,) = figure.legends
    assert not legend.get_window_extent().overlaps(axes.get_window_extent())


# Errors.


def test_what_cannot_be_traced_is_one_sentence():
    def f(x):
        return int(x.sum())

    with pytest.raises(
        ConvError, match=r"^f cannot be traced: ConcretizationTypeError: Abstract tracer value"
    ) as caught:
        jconv.explain(f, X)
    assert "\n" not in str(caught.value)
    with pytest.raises(ConvError, match="conv_general_dilated cannot be traced: ValueError: .*feature") as caught:
        jconv.explain(conv, X, V)
    assert isinstance(caught.value.__cause__, ValueError), "the caller's own error is kept"
    with pytest.raises(ConvError, match="platform must be one of"):
        jconv.explain(conv, X, W, platform="mars")
    (n,) = jax.export.symbolic_shape("n")
    with pytest.raises(ConvError, match="explain needs sizes that are numbers"):
        jconv.explain(conv, jax.ShapeDtypeStruct((n, 8, 8, 3), np.float32), W)


def test_a_picture_that_cannot_be_is_one_sentence(tmp_path, monkeypatch):
    report = jconv.explain(conv, X, W)
    with pytest.raises(ConvError, match="path '/no/where.png' cannot be written"):
        report.plot("/no/where.png")
    with pytest.raises(ConvError, match="name a .png, .pdf or .svg"):
        report.plot(tmp_path / "time.nonsense")
    with pytest.raises(ConvError, match="plot needs a convolution"):
        jconv.explain(jnp.sin, X).plot()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConvError, match="A picture needs matplotlib, which is not installed"):
        report.plot()


# The command line.

MODULE = """
import jax, jax.numpy as jnp
from flax import linen, nnx
print("imported")

class Net(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Conv(4, (1, 1))(linen.Conv(4, (3, 3), name="stem")(x))

class Model(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.conv, self.norm = nnx.Conv(3, 4, (3, 3), rngs=rngs), nnx.BatchNorm(4, rngs=rngs)
    def __call__(self, x):
        return self.norm(self.conv(x))

def conv(x, w):
    return jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

def alone():
    return conv(jnp.ones((1, 8, 8, 3)), jnp.ones((3, 3, 3, 4)))

def pair():
    return Net(), Net().init(jax.random.key(0), jnp.ones((1, 8, 8, 3)))

def nothing(x):
    return 2 * x

def untraceable(x):
    return int(x.sum())

def failing():
    raise RuntimeError("out of luck")

number = 3
"""


@pytest.fixture
def module(folder, monkeypatch):
    (folder / "mine.py").write_text(MODULE)
    (folder / "broken.py").write_text("import nonsense_that_is_not_there\n")
    (folder / "syntax.py").write_text("def f(:\n")
    for name in ("mine", "broken", "syntax", "target_mine"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield folder
    for name in ("mine", "target_mine"):
        sys.modules.pop(name, None)


def run(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)))


def explained(*arguments):
    done = run("explain", *arguments, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


FOUND = {
    "mine:conv --shape 2,8,8,3 --shape 3,3,3,4": ["forward"],
    "mine.py:conv --shape 2,8,8,3 --shape 3,3,3,4 --grad": ["kernel gradient", "input gradient"],
    "mine:alone": ["forward"],
    "mine:Net() --shape 2,8,8,3": ["forward", "forward"],
    "mine:Net() --shape 2,8,8,3 --grad": ["forward", "kernel gradient", "kernel gradient", "input gradient"],
    "mine:pair() --shape 2,8,8,3": ["forward", "forward"],
    "mine:pair() --shape 2,8,8,3 --grad": ["forward", "kernel gradient", "kernel gradient", "input gradient"],
    "mine:Model() --shape 2,8,8,3": ["forward"],
    "mine:Model() --shape 2,8,8,3 --grad": ["forward", "kernel gradient"],
    "mine:Model().conv --shape 2,8,8,3 --dtype bfloat16": ["forward"],
    "mine:nothing --shape 2": [],
}


@pytest.mark.parametrize("typed", FOUND)
def test_the_command_explains(module, typed):
    data = explained(*typed.split())
    assert sorted(row["direction"] for row in data["rows"]) == sorted(FOUND[typed])
    assert all(row["file"].endswith("mine.py") for row in data["rows"] if "Model().conv" not in typed)


def test_the_command_prints_a_table(module):
    done = run("explain", "mine:Net()", "--shape", "2,8,8,3")
    assert done.exit_code == 0 and "Net/stem (mine.py:9)" in done.stdout and "\x1b" not in done.stdout
    assert "imported" not in done.stdout, "what the module prints is not the report"
    done = run("explain", "mine:nothing", "--shape", "2")
    assert done.exit_code == 0 and "nothing has no convolution of lax's or jconv's." in done.stdout
    assert [row["platform"] for row in [explained("mine:alone", "--platform", "tpu")]] == ["tpu"]


def test_the_command_draws_and_tunes(module, monkeypatch):
    monkeypatch.setattr(tuning, "race", lambda programs, seconds: dict.fromkeys(programs, 5) | {"im2col": 2})
    done = run("explain", "mine:alone", "--tune", "--plot", "time.png", "--json")
    assert done.exit_code == 0 and "Picture: time.png" in done.stderr and (module / "time.png").stat().st_size > 5000
    (row,) = json.loads(done.stdout)["rows"]
    assert (row["algorithm"], row["measured_ns"], row["lax_measured_ns"]) == ("im2col", 2, 5)
    monkeypatch.setattr(tuning, "race", lambda programs, seconds: dict.fromkeys(programs, 5) | {"im2col": "it broke"})
    assert run("explain", "mine:conv", "--shape", "1,9,9,3", "--shape", "3,3,3,4", "--tune").exit_code == 1


BAD = {
    "conv": "TARGET must be package.module:function or path/file.py:function, got 'conv'",
    "nowhere:conv": "there is no module 'nowhere'",
    "jax.nowhere:conv": "there is no module 'jax.nowhere'",
    "nowhere.py:conv": "there is no file 'nowhere.py'",
    "broken:conv": "importing broken fails: ModuleNotFoundError: No module named 'nonsense_that_is_not_there'",
    "syntax:f": "importing syntax fails: SyntaxError",
    "mine:nonsense": "mine has no 'nonsense'; it has Net, Model, conv",
    "mine:conv.nonsense": "mine:conv has no 'nonsense'; it has no callables",
    "mine:make(3)": "TARGET must name attributes with dots between them",
    "mine:failing()": "calling mine:failing() fails: RuntimeError: out of luck",
    "mine:Model": "mine:Model is a class; name an instance, or mine:Model() to make one",
    "mine:number": "mine:number is of type int, which cannot be called",
    "mine:conv": "mine:conv takes x, w, but --shape gives 0",
    "mine:conv --shape 1,8,8,3": "mine:conv takes x, w, but --shape gives 1",
    "mine:alone --shape 1": "mine:alone takes no arguments, but --shape gives 1",
    "mine:Net()": "mine:Net() cannot be initialised with these shapes: TypeError",
    "mine:conv --shape 1x8x8x3 --shape 3": "--shape must be integers with commas between them, as 8,56,56,64, got '1x8x8x3'",
    "mine:conv --shape 1,0,8,3 --shape 3": "--shape must be at least 1, got 0",
    "mine:conv --shape 1,8,8,3 --shape 3,3,5,4": "conv cannot be traced: ValueError: conv_general_dilated lhs feature",
    "mine:untraceable --shape 3": "untraceable cannot be traced: ConcretizationTypeError",
    "mine:alone --grad": "--grad needs an argument to differentiate by; give --shape",
    "mine:alone --dtype floot": "--dtype must be the name of a number's dtype",
    "mine:alone --platform mars": "--platform must be one of cpu,",
    "mine:alone --platform tpu --tune": "--tune times this machine's cpu, not --platform tpu",
    "mine:alone --plot /no/where.png": "--plot '/no/where.png' cannot be written",
}


@pytest.mark.parametrize("typed", BAD)
def test_bad_input_is_a_sentence_and_exit_code_2(module, typed):
    done = run("explain", *typed.split())
    assert done.exit_code == 2 and not done.stdout, done.output
    (line,) = [line for line in done.stderr.splitlines() if line != "imported"]
    assert line.startswith(f"jconv: {BAD[typed]}")


FAST = {"seconds": 0}
SMALL = {"small": ConvProblem.of(X, W, (1, 1), "SAME", dimension_numbers=NHWC)}


def test_lax_and_jconv_are_timed_and_compared(monkeypatch):
    report = bench.compare(SMALL, **FAST)
    assert [row.direction for row in report.rows] == ["forward", "input", "weight"]
    assert report.agrees and all(row.ratio > 0 and row.error < 1e-5 for row in report.rows)
    assert [row.problem for row in report.rows] == [f(SMALL["small"]) for f in tuning.DIRECTIONS.values()]
    data = json.loads(report.to_json())
    assert data["threads"] == report.place.threads and data["rows"][0]["lax_over_jconv"] == report.rows[0].ratio
    assert "The results agree" in str(report)
    real = bench.convolve
    monkeypatch.setattr(bench, "convolve", lambda x, w, p: 1.001 * real(x, w, p))
    report = bench.compare(SMALL, **FAST)
    assert not report.agrees and "small, forward: the results differ by 1.0e-03 of the largest value" in str(report)
    monkeypatch.setattr(bench, "convolve", lambda x, w, p: 1 / 0)
    report = bench.compare(SMALL, directions=["forward"], **FAST)
    assert not report.agrees and "jconv failed on small, forward: ZeroDivisionError" in str(report)
    assert json.loads(report.to_json())["rows"][0]["error"] is None


def test_the_contenders_times_make_the_ratio(monkeypatch):
    monkeypatch.setattr(bench, "race", lambda programs, seconds: {"lax": 8_000_000, "jconv": 2_000_000})
    report = bench.compare(SMALL)
    assert report.ratio == pytest.approx(4) and "geometric mean: 4.00" in str(report)


def test_the_networks_convolutions_are_those_of_the_names():
    problems = bench.networks()
    assert len(problems) == 8
    assert {name for name, p in problems.items() if p.is_depthwise} == {n for n in problems if "depthwise" in n}
    assert problems["ResNet-50 7x7/2"].macs == 112 * 112 * 64 * 7 * 7 * 3
    assert problems["WaveNet 1-D, dilation 8"].rhs_dilation == (8,)


@pytest.mark.parametrize("command", ["demo", "bench"])
def test_the_commands_time_and_check(monkeypatch, command):
    monkeypatch.setattr(bench, "networks", lambda: SMALL)
    monkeypatch.setattr(bench, "_BLOCK", {"dense": (3, 3, 24, 4)})
    monkeypatch.setattr(bench, "race", lambda programs, seconds: {n: p() and 4_000_000 for n, p in programs.items()})
    if command == "demo":
        monkeypatch.setattr(jax, "grad", lambda f, wrt, grad=jax.grad: grad(f, (0, 1)))
    done = run(command)
    assert done.exit_code == 0 and "geometric mean: 1.00" in done.stdout and not done.stderr
    assert ("of the program's flops" in done.stdout) == (command == "demo")
    data = json.loads(run(command, "--json").stdout)
    assert {row["direction"] for row in data["rows"]} == {"forward", "input", "weight"}
    real = bench.convolve
    monkeypatch.setattr(bench, "convolve", lambda x, w, p: 2 * real(x, w, p))
    done = run(command)
    assert done.exit_code == 1 and "the results differ" in done.stdout


def test_bench_refuses_nonsense():
    done = run("bench", "--seconds", "-1")
    assert (
        done.exit_code == 2
        and done.stderr == "jconv: --seconds must be a number of at least 0, got -1.0; the default is 0.5\n"
    )


@pytest.mark.parametrize("command", [[], ["demo"], ["explain"], ["bench"]], ids=str)
def test_help_has_examples_and_fits_a_terminal(command):
    text = CliRunner().invoke(app, [*command, "--help"], terminal_width=80, env={"COLUMNS": "80"}).stdout
    assert max(map(len, text.splitlines())) <= 80 and "..." not in text.partition("Examples:")[2]
    assert f"jconv {command[0] if command else 'demo'}" in text.partition("Examples:")[2]


def test_the_shell_completes():
    env = {**os.environ, "_JCONV_COMPLETE": "complete_bash", "COMP_WORDS": "jconv explain --p", "COMP_CWORD": "2"}
    code = "import sys; sys.argv[0] = 'jconv'; from jconv.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.stdout.split() == ["--platform", "--plot"]


def test_a_file_is_found_beside_its_neighbours(folder):
    (folder / "src").mkdir()
    (folder / "src" / "neighbour.py").write_text("value = 7\n")
    (folder / "src" / "random.py").write_text("import neighbour\nnumber = lambda: neighbour.value\n")
    import random

    assert target.load(str(folder / "src" / "random.py") + ":number()") == 7
    assert sys.modules["random"] is random, "a file does not take the place of a module of its name"
