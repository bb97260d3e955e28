"""The constants of the cost model: those that are shipped, those that are measured, and the workspace limit."""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from typer.testing import CliRunner

import jconv
from jconv import ConvError, device, store, tuning
from jconv.algorithms import tiling
from jconv.cli import app
from jconv.device import Constants, MiB, device_for, fitted, reference, shipped

ROOT = Path(__file__).resolve().parent.parent
X, W = jnp.ones((8, 16, 16, 64), np.float32), jnp.ones((3, 3, 64, 96), np.float32)
OTHERS = Constants(dot=2, conv=1_000_000, vector=3, fft=4, bytes_per_ns=5, launch_ns=6)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Each test has a store of its own, and the workspace limit of a new process."""
    monkeypatch.setenv("JCONV_STORE", str(tmp_path / "store"))
    monkeypatch.setattr(device, "_limit", None)
    store._open.cache_clear()
    yield tmp_path / "store"
    store._open.cache_clear()


@pytest.fixture
def fresh_threads():
    device.threads.cache_clear()
    yield
    device.threads.cache_clear()


def planned(platform="cpu", x=X, w=W):
    return jconv.plan(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), platform=platform)


def conv(x, w):
    return jconv.conv_general_dilated(
        x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), algorithm="im2col"
    )


def of_plan():
    return Constants(*(getattr(planned().device, name) for name in Constants._fields))


def file():
    return store.store().calibration


# What is shipped.


def test_what_is_shipped_is_complete_and_positive():
    known = json.loads((ROOT / "jconv" / "calibration.json").read_text())
    assert "x86_64" in known
    for constants in (of[which] for of in known.values() for which in ("fitted", "reference")):
        assert list(constants) == list(Constants._fields)
        assert all(type(c) is int and c >= 1 for c in constants.values())
    assert set(Constants._fields) < set(asdict(device_for("cpu")))


def test_a_calibration_scales_what_was_fitted():
    """A machine that measures as the reference did keeps the fitted constants; one twice as fast has twice them."""
    assert fitted(reference()) == shipped()
    twice = fitted(Constants(*(2 * r for r in reference())))
    assert twice == Constants(*(2 * f for f in shipped()))


def test_an_architecture_without_numbers_takes_x86s(monkeypatch):
    found = set()
    for machine in ("x86_64", "arm64", ""):
        monkeypatch.setattr(device.host, "machine", lambda machine=machine: machine)
        shipped.cache_clear()
        found.add(shipped())
    assert len(found) == 1


def test_the_same_device_is_the_same_object():
    """So that a plan is found by comparing one pointer."""
    assert all(store.calibrated(p) is store.calibrated(p) for p in ("cpu", "cuda", "tpu", "default"))
    assert planned() is planned()


# Threads.


def test_threads_follow_affinity_and_xlas_variables(monkeypatch, fresh_threads):
    def threads():
        device.threads.cache_clear()
        return device.threads()

    for variable in ("NPROC", "PJRT_NPROC"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3, 5, 8}, raising=False)
    assert threads() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert threads() == 1, "macOS and Windows have no affinity"
    for number, expected in (("7", 7), ("0", 1), ("many", 1), ("²", 1)):
        monkeypatch.setenv("NPROC", number)
        assert threads() == expected
    monkeypatch.setenv("PJRT_NPROC", "5")
    assert threads() == 5
    assert planned().device.threads == 5


# What is measured.


def test_a_stored_calibration_changes_the_plan_at_once_and_in_the_next_process():
    assert of_plan() == shipped()
    store.store().calibrate(OTHERS._replace(conv=1))
    assert planned().algorithm.name != "xla"
    store.store().calibrate(OTHERS)
    assert planned().algorithm.name == "xla" and of_plan() == fitted(OTHERS)
    assert planned("cuda").device == device_for("cuda"), "it is the CPU's"
    store._open.cache_clear()
    assert of_plan() == fitted(OTHERS)
    code = "from jconv import store; print(store.calibrated('cpu').conv)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == str(fitted(OTHERS).conv) and not done.stderr
    assert not list(file().parent.glob("*.part"))


GOOD = {"jconv": store.SCHEMA, "cpu": store.cpu_model(), "constants": OTHERS._asdict()}
BAD = {
    "png": b"\x89PNG\r\n\x1a\n\x00\xff",
    "empty": b"",
    "half": json.dumps(GOOD).encode()[:40],
    "deep": b"[" * 100_000,
    "list": b"[1, 2]",
    "newer": json.dumps(GOOD | {"jconv": 99}).encode(),
    "another CPU": json.dumps(GOOD | {"cpu": "of another make"}).encode(),
    "zero": json.dumps(GOOD | {"constants": OTHERS._asdict() | {"fft": 0}}).encode(),
    "fraction": json.dumps(GOOD | {"constants": OTHERS._asdict() | {"fft": 1.5}}).encode(),
    "true": json.dumps(GOOD | {"constants": OTHERS._asdict() | {"fft": True}}).encode(),
    "incomplete": json.dumps(GOOD | {"constants": {"fft": 1}}).encode(),
    "more": json.dumps(GOOD | {"constants": OTHERS._asdict() | {"speed": 1}}).encode(),
}


@pytest.mark.parametrize("name", BAD)
def test_a_foreign_calibration_is_ignored_and_named_once(folder, name):
    store.store().calibrate(OTHERS)
    assert file().read_bytes() == json.dumps(GOOD).encode() + b"\n"
    file().write_bytes(BAD[name])
    store._open.cache_clear()
    with pytest.warns(UserWarning, match=r"calibration-.*json is no calibration.*jconv tune --calibrate") as caught:
        assert of_plan() == shipped()
        store.store().reload()
        planned()
    assert len(caught) == 1
    assert file().read_bytes() == BAD[name]
    store.store().calibrate(OTHERS)
    store._open.cache_clear()
    assert of_plan() == fitted(OTHERS)


def test_an_unreadable_calibration_is_named(folder):
    path = file()
    path.mkdir(parents=True)
    store._open.cache_clear()
    with pytest.warns(UserWarning, match="calibration-.*cannot be read") as caught:
        assert of_plan() == shipped()
    assert len(caught) == 1


def test_a_directory_that_cannot_be_written_keeps_it_in_memory(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("JCONV_STORE", str(tmp_path / "file" / "below"))
    with pytest.warns(UserWarning, match="cannot be written.*stays in memory; set JCONV_STORE") as caught:
        store.store().calibrate(OTHERS)
        store.store().calibrate(OTHERS)
    assert len(caught) == 1 and of_plan() == fitted(OTHERS)


def test_an_empty_variable_keeps_it_in_memory(folder, monkeypatch):
    monkeypatch.setenv("JCONV_STORE", "")
    store.store().calibrate(OTHERS)
    assert of_plan() == fitted(OTHERS) and not folder.exists()


# calibrate().

MS = 1_000_000
TIMES = {
    "dot": 11 * MS,
    "conv": 3 * MS,
    "vector": MS,
    "fft": 2 * MS,
    "bytes_per_ns": MS,
    "one": 10_000,
    "chain": 60_000,
}


@pytest.fixture
def clock(monkeypatch):
    """Time that passes only in programs, which take ``TIMES``, and longer in the first rounds."""
    now, calls = [0], dict.fromkeys(TIMES, 0)

    def runner(name):
        def run():
            calls[name] += 1
            now[0] += TIMES[name] * (9 if calls[name] <= 10 else 1)

        return run

    monkeypatch.setattr(tuning, "_now", lambda: now[0])
    monkeypatch.setattr(tuning, "_yardsticks", lambda: {name: runner(name) for name in TIMES})
    return calls


def test_the_arithmetic_of_a_calibration(clock, monkeypatch):
    here = store.here("cpu")._replace(threads=4)
    monkeypatch.setattr(store, "here", lambda platform: here)
    found = tuning.calibrate(rounds=5)
    assert found.before == reference() and fitted(found.after) == of_plan()
    assert found.after == Constants(
        dot=round(2 * 1024**3 / (4 * 10_990_000)),
        conv=round(2 * 4 * 28 * 28 * 9 * 128 * 128 / (4 * 2_990_000)),
        vector=round(2 * 9 * 56 * 56 * 128 / (4 * 990_000)),
        fft=round(2 * 256 * 2.5 * 1024 * 10 / (4 * 1_990_000)),
        bytes_per_ns=round(16 * MiB / 990_000),
        launch_ns=500,
    )
    assert clock["dot"] == 6 * tuning._SAMPLES
    assert tuning.calibrate(rounds=1).before == found.after


def test_no_constant_is_below_one(clock, monkeypatch):
    for name in Constants._fields[:-1]:
        monkeypatch.setitem(TIMES, name, 10**14)
    monkeypatch.setitem(TIMES, "chain", TIMES["one"])
    assert tuning.calibrate(rounds=2).after == Constants(1, 1, 1, 1, 1, 1)


def test_every_yardstick_compiles():
    runs = tuning._yardsticks()
    assert set(runs) == set(tuning._YARDSTICKS) == {*Constants._fields[:-1], "one", "chain"}
    for run in runs.values():
        assert run().dtype == np.float32


def test_a_calibration_in_words_and_in_json(clock):
    found = tuning.calibrate(rounds=2)
    head, columns, first, *_ = str(found).splitlines()
    assert head.startswith(f"{found.cpu}, threads {found.threads}; ") and columns.split() == ["constant", "was", "is"]
    assert first.split() == ["dot", str(found.before.dot), str(found.after.dot)]
    assert json.loads(found.to_json())["after"] == found.after._asdict()


def test_calibrate_refuses_nonsense(monkeypatch):
    for rounds in (0, 1.5, "3", True):
        with pytest.raises(ConvError, match="rounds must be"):
            tuning.calibrate(rounds)
    monkeypatch.setattr(store, "here", lambda platform: None)
    with pytest.raises(ConvError, match="needs JAX's CPU device.*JAX_PLATFORMS"):
        tuning.calibrate()


def run(*arguments):
    return CliRunner().invoke(app, ["tune", *map(str, arguments)])


def test_the_command_calibrates(clock):
    done = run("--calibrate")
    assert done.exit_code == 0 and "launch_ns" in done.stdout and not done.stderr
    data = json.loads(run("--calibrate", "--json").stdout)
    assert data["before"] == data["after"] and fitted(Constants(**data["after"])) == of_plan()


def test_the_command_refuses_a_calibration_with_problems(clock):
    done = run("--calibrate", "--lhs", "1,8,8,3", "--export", "x.jsonl")
    assert done.exit_code == 2 and not done.stdout
    assert done.stderr == "jconv: --calibrate goes alone, got also --lhs, --export; run jconv tune for each\n"


# The workspace limit.


def parts():
    chosen = next(c for c in planned().candidates if c.algorithm.name == "im2col")
    return getattr(chosen.runner, "count", 1)


def test_the_workspace_limit_changes_the_parts_and_back():
    assert jconv.workspace_limit() == 32 * MiB == planned().device.workspace_limit
    whole = parts()
    assert jconv.workspace_limit(MiB) == MiB == jconv.workspace_limit()
    assert parts() > whole == 1
    assert device_for("cuda").workspace_limit > MiB, "a vendor's kernels allocate by themselves"
    jconv.workspace_limit(32 * MiB)
    assert parts() == whole
    assert jconv.workspace_limit(np.int64(MiB)) == MiB


def test_one_byte_leaves_what_needs_no_temporaries():
    jconv.workspace_limit(1)
    p = planned()
    assert next(c.cost.workspace for c in p.candidates if c.algorithm == p.algorithm) <= 1
    assert "of workspace, the limit is" in str(p)


def test_calls_and_new_programs_follow_the_limit_and_compiled_ones_keep_theirs(monkeypatch):
    ran, real = [], tiling.InParts.run
    monkeypatch.setattr(tiling.InParts, "run", lambda self, *args: ran.append(self.count) or real(self, *args))
    jax.clear_caches()
    old = jax.jit(lambda x, w: conv(x, w))
    whole, eager = old(X, W), conv(X, W)
    jconv.workspace_limit(MiB)
    np.testing.assert_array_equal(old(X, W), whole)
    assert not ran
    np.testing.assert_array_equal(conv(X, W), eager)
    assert len(ran) == 1 and ran[0] > 1
    text = jax.jit(lambda x, w: conv(x, w)).lower(X, W).as_text()
    assert "stablehlo.while" in text
    jconv.workspace_limit(32 * MiB)
    assert "stablehlo.while" not in jax.jit(lambda x, w: conv(x, w)).lower(X, W).as_text()


@pytest.mark.parametrize(
    "value, sentence",
    [
        (-1, "bytes must be at least 1, which admits no temporaries, got -1; the default is 33554432"),
        (0, "bytes must be at least 1, which admits no temporaries, got 0; the default is 33554432"),
        (True, "bytes must be an integer, got True; 32 MiB, the default, are 33554432"),
        ("64", "bytes must be an integer, got '64'; 32 MiB, the default, are 33554432"),
        (1e6, "bytes must be an integer, got 1000000.0; 32 MiB, the default, are 33554432"),
    ],
)
def test_nonsense_is_no_limit(value, sentence):
    with pytest.raises(ConvError) as caught:
        jconv.workspace_limit(value)
    assert str(caught.value) == sentence
    assert jconv.workspace_limit() == 32 * MiB


def test_the_variable_is_read_once(monkeypatch):
    monkeypatch.setenv("JCONV_WORKSPACE_MIB", "5")
    assert planned().device.workspace_limit == jconv.workspace_limit() == 5 * MiB
    monkeypatch.setenv("JCONV_WORKSPACE_MIB", "6")
    assert jconv.workspace_limit() == 5 * MiB


@pytest.mark.parametrize("text", ["", "0", "-1", "1.5", "32 MiB", "²"])
def test_a_variable_of_nonsense_is_a_sentence(monkeypatch, text):
    monkeypatch.setenv("JCONV_WORKSPACE_MIB", text)
    with pytest.raises(
        ConvError, match="JCONV_WORKSPACE_MIB must be an integer of at least 1, got .*; unset it for 32"
    ):
        planned()
    assert jconv.workspace_limit(7) == 7, "which mends it for this process"
