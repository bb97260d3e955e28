"""The sweep against PyTorch, the command ``jconv parity``, and the examples of parity."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import jconv
from jconv import cli, functional, parity
from jconv.algorithms.im2col import Im2col
from jconv.errors import ParityError
from jconv.parity import sweeping
from jconv.parity.sweeping import DTYPES, Case

ROOT = Path(__file__).resolve().parent.parent
ALL = list(sweeping.cases())
SOME = [
    Case("conv2d", ((2, 3, 9, 8), (4, 3, 3, 3), (4,)), (("stride", 2), ("padding", 1))),
    Case("conv2d", ((2, 3, 9, 8), (4, 3, 3, 3), (4,)), channel_last=True),
    Case("conv_transpose1d", ((2, 4, 9), (4, 2, 4), (4,)), (("stride", 2), ("groups", 2)), "bfloat16"),
    Case("conv1d", ((2, 3, 9), (4, 3, 3), (4,)), (("padding", 1), ("padding_mode", "reflect")), "complex64"),
    Case("conv1d", ((2, 4, 9), (4, 1, 3), (4,)), (("groups", 4),), algorithm="im2col"),
    Case("conv1d", ((2, 4, 9), (4, 1, 3), (4,)), (("groups", 4),), algorithm="pointwise"),
    Case("pad", ((2, 3, 9),), (("pad", (1, 2)), ("mode", "circular")), "float64"),
    Case("fold", ((2, 12, 56),), (("output_size", (9, 8)), ("kernel_size", 2))),
]


def jconv_parity(*arguments):
    return CliRunner().invoke(cli.app, ["parity", *map(str, arguments)])


def test_the_cases_hold_every_function_dtype_and_algorithm():
    assert len(set(ALL)) == len(ALL) > 1000
    convolutions = {f"{kind}{n}d" for kind in ("conv", "conv_transpose") for n in (1, 2, 3)}
    assert {case.function for case in ALL} == convolutions | {"pad", "unfold", "fold"}
    for function in convolutions:
        of_it = [case for case in ALL if case.function == function]
        assert {case.dtype for case in of_it} == set(DTYPES)
        assert {case.algorithm for case in of_it} == {"auto", *(a.name for a in jconv.ALGORITHMS)}
        assert any(case.channel_last for case in of_it)
        options = {name for case in of_it for name, _ in case.options}
        assert {"stride", "padding", "dilation", "groups"} <= options
        assert ("output_padding" if "transpose" in function else "padding_mode") in options


def test_the_sweep_of_some():
    report = parity.sweep(SOME)
    assert report.ok and not report.misses
    assert [bool(o.refused) for o in report.outcomes] == [case.algorithm == "pointwise" for case in SOME]
    for outcome in report.outcomes:
        assert outcome.refused or 0 < outcome.error <= outcome.tolerance or outcome.case.function in ("pad", "fold")
    assert report.worst.share == max(o.share for o in report.outcomes)
    text = str(report)
    assert "pointwise" in text and "8 of 8" in text and str(report.worst) in text
    assert json.loads(report.to_json())["refused"] == 1


def flipped(function):
    return lambda x, w, *rest, **options: function(x, w[..., ::-1], *rest, **options)


def test_a_fault_is_found_and_named(monkeypatch):
    monkeypatch.setattr(functional, "conv1d", flipped(functional.conv1d))
    report = parity.sweep(SOME)
    missed = {outcome.case.function for outcome in report.misses}
    assert not report.ok and missed == {"conv1d"}
    assert report.worst.case.function == "conv1d" and report.worst.share > 1000
    assert "Miss: conv1d(input (2, 3, 9), weight (4, 3, 3), bias (4,)" in str(report)


def test_a_wrong_gradient_is_found(monkeypatch):
    true = functional.conv1d
    wrong = jax.custom_vjp(lambda x, w, b: true(x, w, b))
    wrong.defvjp(
        lambda x, w, b: (true(x, w, b), (x, w, b)),
        lambda held, g: tuple(2 * d if i == 1 else d for i, d in enumerate(jax.vjp(true, *held)[1](g))),
    )
    monkeypatch.setattr(functional, "conv1d", lambda x, w, b, **_: wrong(x, w, b))
    report = parity.sweep([Case("conv1d", ((2, 3, 9), (4, 3, 3), (4,)))])
    assert [(o.array, o.error > 0.5) for o in report.misses] == [("weight", True)]


def test_an_exception_is_a_miss(monkeypatch):
    def broken(*_, **__):
        raise ZeroDivisionError("broken")

    monkeypatch.setattr(functional, "pad", broken)
    report = parity.sweep(SOME)
    assert {o.case.function for o in report.misses} == {"pad", "conv1d"}  # which pads by its padding_mode
    assert all(o.failure == "ZeroDivisionError: broken" for o in report.misses)


def test_a_broken_algorithm_is_a_miss_and_no_refusal(monkeypatch):
    monkeypatch.setattr(Im2col, "run", lambda *_: jnp.zeros(3))
    case = Case("conv1d", ((1, 2, 7), (2, 2, 3), (2,)), algorithm="im2col")
    (outcome,) = parity.sweep([case]).outcomes
    assert not outcome.ok and not outcome.refused and outcome.failure


def test_bad_arguments():
    with pytest.raises(ParityError, match="device must be one that JAX has here, cpu, got 'abacus'"):
        parity.sweep(SOME, device="abacus")
    with pytest.raises(ParityError, match="no cases"):
        parity.sweep([])


def test_the_command_sweeps(monkeypatch):
    monkeypatch.setattr(sweeping, "cases", lambda: iter(SOME))
    done = jconv_parity("--json")
    assert done.exit_code == 0 and json.loads(done.stdout)["ok"] is True
    monkeypatch.setattr(functional, "conv1d", flipped(functional.conv1d))
    done = jconv_parity()
    assert done.exit_code == 1 and "Worst: conv1d(" in done.stdout and "float32 products" in done.stdout


def test_without_torch_one_line_and_exit_code_2():
    program = (
        "import sys; sys.modules['torch'] = None; from jconv.cli import app; sys.argv = ['jconv', 'parity']; app()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "jconv: parity compares with PyTorch, which is not installed; pip install torch\n"


# --- two networks ------------------------------------------------------------------------------------------

THEIRS = """
import torch
def make():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, stride=2, padding=1), torch.nn.ReLU())
"""
OURS = """
from flax import nnx
from jconv.nnx import Conv2d
class Port(nnx.Module):
    def __init__(self, padding):
        self.conv = Conv2d(3, 8, 3, stride=2, padding=padding, rngs=nnx.Rngs(0))
    def __call__(self, x):
        return nnx.relu(self.conv(x))
def right():
    return Port(1)
def wrong():
    return Port([(0, 1), (0, 1)])
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "theirs.py").write_text(THEIRS)
    (tmp_path / "ours.py").write_text(OURS)
    np.save(tmp_path / "x.npy", np.random.default_rng(0).standard_normal((1, 3, 12, 12), np.float32))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_command_compares(folder):
    done = jconv_parity("theirs.py:make", "ours.py:right", "--load", "--input", "1,3,12,12")
    assert done.exit_code == 0 and "Equal within rounding" in done.stdout, done.output
    done = jconv_parity("theirs.py:make", "ours.py:wrong", "--load", "--input", "x.npy", "--html", "page.html")
    assert done.exit_code == 1 and "SAME padding" in done.stdout, done.output
    assert "SAME padding" in (folder / "page.html").read_text()
    done = jconv_parity("theirs.py:make", "ours.py:right", "--input", "x.npy", "--json", "--no-gradients")
    found = json.loads(done.stdout)
    assert done.exit_code == 1 and found["diagnoses"][0]["mistake"] == "weights not loaded"
    assert {row["part"] for row in found["rows"]} == {"layer"}


def test_weights_of_a_file_are_loaded_into_both(folder):
    torch.manual_seed(5)
    module = torch.nn.Conv2d(3, 8, 3)
    torch.save({f"0.{name}": value for name, value in module.state_dict().items()}, "w.pth")
    done = jconv_parity("theirs.py:make", "ours.py:right", "--weights", "w.pth", "--input", "x.npy", "--json")
    assert done.exit_code == 0, done.output
    bias = next(row for row in json.loads(done.stdout)["rows"] if row["name"] == "0")
    out = torch.nn.functional.conv2d(torch.from_numpy(np.load("x.npy")), module.weight, module.bias, 2, 1)
    assert bias["largest"] == pytest.approx(float(out.detach().abs().max()), rel=1e-5)


BAD = {
    "one network": (["theirs.py:make"], "TORCH and JAX go together"),
    "no input": (["theirs.py:make", "ours.py:right"], "--input is missing"),
    "no such input": (["theirs.py:make", "ours.py:right", "--input", "no.npy"], "--input no.npy cannot be read"),
    "sizes": (["theirs.py:make", "ours.py:right", "--input", "1,x"], "--input must be integers"),
    "options alone": (["--load"], "--load belongs to a comparison"),
    "no module": (["ours.py:right", "ours.py:right", "--input", "1,3,8,8"], "expected a torch.nn.Module"),
    "no such function": (["theirs.py:mak", "ours.py:right", "--input", "1,3,8,8"], "has no 'mak'"),
    "a device": (["--device", "abacus"], "--device must be one that JAX has here"),
    "a device, compared": (
        ["theirs.py:make", "ours.py:right", "--input", "1,3,8,8", "--device", "abacus"], "--device must be one"
    ),
    "channels": (["theirs.py:make", "ours.py:right", "--input", "1,4,8,8"], "The PyTorch module cannot be called"),
    "weights": (
        ["theirs.py:make", "ours.py:right", "--input", "1,3,8,8", "--weights", "no.pth"], "no.pth"
    ),
    "page": (
        ["theirs.py:make", "ours.py:right", "--input", "1,3,8,8", "--html", "no/page.html"], "--html 'no/page.html'"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_sentence_and_exit_code_2(folder, name):
    arguments, text = BAD[name]
    done = jconv_parity(*arguments)
    assert done.exit_code == 2, done.output
    assert done.stderr.count("\n") == 1 and text in done.stderr, done.stderr


# --- the examples --------------------------------------------------------------------------------------------


def example(name, *arguments, folder):
    command = [sys.executable, ROOT / "examples" / f"{name}.py", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)


def test_the_example_finds_and_mends_its_mistakes(tmp_path):
    done = example("find_divergence", "--html", "page.html", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    first, second, third = done.stdout.split("The port, ")[1:]
    assert "First divergent: conv1." in first and "conv1: SAME padding" in first and "conv2: SAME padding" in first
    assert "First divergent: fc." in second and "before fc: flatten order" in second
    assert "Equal within rounding" in third
    assert "SAME padding" in (tmp_path / "page.html").read_text()


def test_efficientnet_is_its_pytorch_source(tmp_path):
    pytest.importorskip("efficientnet_lite_pytorch")
    done = example("parity_efficientnet", "--no-gradients", "--plot", "errors.png", folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Equal within rounding: 116 layers." in done.stdout
    assert (tmp_path / "errors.png").read_bytes().startswith(b"\x89PNG")
