"""The benchmarks measure what they say: the contenders compute the same, and unlike files are not compared."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("matplotlib")
pytest.importorskip("optax")

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import ledger  # noqa: E402
import networks  # noqa: E402
import problems  # noqa: E402
import report  # noqa: E402
import timing  # noqa: E402
import torch  # noqa: E402

TIMER = timing.Timer(threads=1, runs=1, budget=0.01)
PROBLEMS = {p.name: p for p in problems.all_problems()}
SMALL = ("efficientdet:conv20*2", "conv_dw", "conv1d:7", "densenet:conv1", "dilated_conv:5", "masknet_p1:deconv1")


def test_every_row_is_a_problem_with_the_rows_shapes():
    rows = json.loads(problems.PROBLEMS.read_text())
    found = problems.all_problems()
    assert len({p.name for p in found}) == len(rows) and all(p.name for p in found)
    for row, p in zip(rows, found):
        axes = "dhw"[3 - row["nd"] :]
        assert p.forward.output_shape == (row["mb"], row["oc"], *(row[f"o{a}"] for a in axes))
        assert p.forward.lhs_shape == (row["mb"], row["ic"], *(row[f"i{a}"] for a in axes))
        assert p.kind in report.CLASSES


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=lambda p: p.name)
def test_torch_is_given_the_same_geometry(problem):
    """The output has the row's shape, by torch's own rules and without computing it."""
    p = problem.forward
    x, w = (torch.empty(shape, device="meta") for shape in (p.lhs_shape, p.rhs_shape))
    pads, stride, padding, output_padding = problems._torch_geometry(problem)
    x = torch.nn.functional.pad(x, pads) if pads else x
    w = problems._torch_kernel(p, w) if problem.transposed else w
    geometry = (stride, padding, p.rhs_dilation, problem.transposed, output_padding, p.groups)
    assert torch.convolution(x, w, None, *geometry).shape == p.output_shape


@pytest.mark.parametrize("direction", problems.DIRECTIONS)
@pytest.mark.parametrize("name", SMALL)
def test_contenders_compute_the_same(name, direction):
    """jconv's algorithms, lax and torch in every layout, against torch in float64."""
    row = problems.measure(TIMER, PROBLEMS[name], direction)
    assert {"xla", "lax channel-last", "lax channel-first", "torch contiguous"} <= set(row["contenders"])
    assert row["chosen"] in row["contenders"]
    for contender, found in row["contenders"].items():
        assert found["error"] < 1e-5, contender
        assert found["ms"] > 0


@pytest.mark.parametrize("direction", problems.DIRECTIONS)
def test_complex_numbers_are_judged_by_their_parts(direction, tmp_path):
    problem = next(p for p in problems.all_problems("complex64") if p.name == "dilated_conv:5")
    row = problems.measure(TIMER, problem, direction)
    assert {"xla", "lax channel-last"} <= set(row["contenders"]) and "torch contiguous" in row["left_out"]
    assert all(found["error"] < 1e-5 for found in row["contenders"].values())
    conditions = {"dtype": "complex64", "threads": 1, "clock": "process CPU time"}
    data = {"conditions": conditions, "roofline": {"gflops": 100, "gbytes": 10}, "rows": {"one": row}}
    assert [line[1] for line in report.beside_time(data).rows] == ["jconv", "lax"]
    assert "nan" in report.summary(data).markdown()
    assert report.scatter(data, tmp_path / "scatter.png").stat().st_size > 0


def test_padding_that_torch_lacks():
    """TensorFlow's padding, larger on the high side: F.pad before, and what it added taken off the gradient."""
    whole = PROBLEMS["efficientdet:conv1"]
    p = whole.forward.replace(lhs_shape=(1, 3, 16, 16))
    problem = problems.Problem("small", whole.kind, p, False)
    assert problems._torch_geometry(problem)[0]
    for direction in problems.DIRECTIONS:
        row = problems.measure(TIMER, problem, direction)
        assert max(c["error"] for c in row["contenders"].values()) < 1e-5


def test_grouped_transposed_kernel_and_back():
    p = PROBLEMS["masknet_p1:deconv1"].forward.replace(lhs_shape=(1, 4, 9), rhs_shape=(6, 2, 7), feature_groups=2)
    w = torch.arange(6 * 2 * 7.0).reshape(6, 2, 7)
    assert problems._torch_kernel(p, w).shape == (4, 3, 7)
    assert torch.equal(problems._logical_kernel(p, problems._torch_kernel(p, w)), w)
    problem = problems.Problem("grouped", "transposed", p, True)
    row = problems.measure(TIMER, problem, "forward")
    assert max(c["error"] for c in row["contenders"].values()) < 1e-5


# Narrow and small, but not so small that batch norm sees single values.
SIZES = {"U-Net": 16, "WaveNet": 32, "3-D U-Net": 8}


@pytest.mark.parametrize("name", networks.NETWORKS)
def test_networks_agree(name):
    task = networks.task_of(networks.NETWORKS[name](SIZES.get(name, 64), 0.125), networks.FORWARD, 2)
    expected = networks.torch_contender(task, torch.contiguous_format, compile=False).result
    assert np.isfinite(expected).all() and expected.std() > 1e-3
    for layers in networks.JAX_LAYERS.values():
        got = networks.jax_contender(TIMER, task, layers).result
        assert networks.difference(task, got, expected) < 1e-3
    for memory_format in task.formats.values():
        got = networks.torch_contender(task, memory_format, compile=False).result
        assert networks.difference(task, got, expected) < 1e-3


def test_train_steps_agree():
    """One step of jconv, stock Flax and torch changes the weights alike, batch statistics and momentum included."""
    task = networks.task_of(networks.unet(16, depth=1, base=8), networks.STEP, 2)
    expected = networks.torch_contender(task, torch.contiguous_format, compile=False).result
    for layers in networks.JAX_LAYERS.values():
        got = networks.jax_contender(TIMER, task, layers)
        assert networks.difference(task, got.result, expected) < 1e-3
        got.run()
    spoilt = {name: value * 1.001 for name, value in expected.items()}
    assert networks.difference(task, spoilt, expected) > networks.MOST_DIFFERENCE[networks.STEP]


def test_parameters_of_the_networks():
    """The networks are those of their papers: parameters in millions."""
    published = {
        "EfficientNet-Lite0": 4.65, "MobileNetV2": 3.5, "ResNet-50": 25.6, "ResNeXt-50 32x4d": 25.0, "ConvNeXt-T": 28.6
    }  # fmt: skip
    for name, millions in published.items():
        net = networks.torch_net(networks.NETWORKS[name]().layers)
        assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(millions, rel=0.01), name


# The results files.


@pytest.fixture
def measured():
    rows = {}
    for name in ("conv_dw", "dilated_conv:5"):
        for direction in problems.DIRECTIONS:
            contenders = {
                who: {"ms": 1.0 + len(who) / 10, "error": 1e-7, "compile_s": None, "temp_bytes": None}
                for who in ("im2col", "xla", "lax channel-last", "lax channel-first", "torch contiguous")
            }
            rows[f"{name}|{direction}"] = {
                "state": "s", "problem": name, "class": PROBLEMS[name].kind, "direction": direction, "flops": 10**6,
                "bytes": 10**5, "chosen": "im2col", "contenders": contenders, "left_out": {},
            }  # fmt: skip
    conditions = ledger.conditions("problems", 1, "process CPU time", "float32", False)
    return {"conditions": conditions, "rows": rows, "roofline": {"gflops": 100.0, "gbytes": 30.0}}


def run_report(*arguments):
    command = [sys.executable, ROOT / "benchmarks" / "report.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_compare_flags_a_planted_regression(measured, tmp_path):
    slower = copy.deepcopy(measured)
    row = slower["rows"]["conv_dw|kernel gradient"]
    row["contenders"]["im2col"]["ms"] *= 1.2
    slower["rows"]["conv_dw|forward"]["contenders"]["im2col"]["ms"] *= 1.05
    assert [key for _, key in report.regressions(measured, slower)[0]] == ["conv_dw|kernel gradient"]
    assert report.regressions(slower, measured)[0] == []
    paths = tmp_path / "old.json", tmp_path / "new.json"
    for path, data in zip(paths, (measured, slower)):
        path.write_text(json.dumps(data))
    done = run_report("--compare", *paths)
    assert done.returncode == 1 and "conv_dw|kernel gradient" in done.stdout and "1.2" in done.stdout
    assert run_report("--compare", paths[0], paths[0]).returncode == 0
    missing = run_report("--compare", paths[0], tmp_path / "missing.json")
    assert missing.returncode == 1 and missing.stderr.startswith("report: ")


@pytest.mark.parametrize("change", ({"threads": 2}, {"dtype": "bfloat16"}, {"clock": "wall time"}, {"malloc": {}}))
def test_unlike_files_are_not_compared(measured, change, tmp_path):
    other = copy.deepcopy(measured)
    other["conditions"] |= change
    with pytest.raises(ledger.Unlike, match=next(iter(change))):
        report.regressions(measured, other)
    path = tmp_path / "results.json"
    path.write_text(json.dumps(other))
    with pytest.raises(ledger.Unlike):
        ledger.Ledger(path, measured["conditions"])


def test_a_run_goes_on_where_it_stopped(measured, tmp_path):
    path = tmp_path / "results.json"
    ledger.Ledger(path, measured["conditions"]).add("a|forward", {"ms": 1})
    again = ledger.Ledger(path, measured["conditions"])
    assert again.has("a|forward") and not again.has("b|forward")
    again.data["rows"]["a|forward"]["state"] = "an older jconv"
    assert not again.has("a|forward")


def test_report_writes_its_files(measured, tmp_path):
    (tmp_path / "problems-float32-1t.json").write_text(json.dumps(measured))
    done = run_report(tmp_path)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "summary.md").read_text()
    assert "torch / jconv" in text and "glibc" in text and report.BEGIN in done.stdout
    for name in ("scatter", "roofline"):
        assert (tmp_path / f"{name}-float32-1t.png").read_bytes().startswith(b"\x89PNG")
    assert run_report(tmp_path / "nothing").returncode == 1
