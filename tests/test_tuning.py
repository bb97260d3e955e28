"""Measured plans: what is stored, what survives, what the planner makes of it. No test depends on a real time."""

import contextlib
import functools
import json
import os
import re
import signal
import subprocess
import sys
import warnings
from dataclasses import dataclass, fields, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES
from jax import export, lax
from typer.testing import CliRunner

import jconv
from jconv import ConvError, ConvProblem, device, planner, store, tuning
from jconv.adjoint import input_problem, weight_problem
from jconv.cli import app
from jconv.planner import plan

ROOT = Path(__file__).resolve().parent.parent
NHWC = ("NHWC", "HWIO", "NHWC")
X, W = jnp.ones((2, 8, 8, 3), np.float32), jnp.ones((3, 3, 3, 4), np.float32)
DENSE = ConvProblem.of(X, W, (1, 1), "SAME", dimension_numbers=NHWC)


def conv(x, w, **more):
    return jconv.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=NHWC, **more)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Each test has a store of its own."""
    monkeypatch.setenv("JCONV_STORE", str(tmp_path / "store"))
    return tmp_path / "store"


def remember(problem, platform="cpu", **times):
    store.store().add([(store.key_of(problem, platform), times)])


def admitted(problem):
    """The algorithms that tune has to time."""
    candidates = planner.plan_given(problem, store.calibrated("cpu"), ()).candidates
    return {c.algorithm.name for c in candidates if c.refusal is None}


def forget():
    """The store as another process would read it."""
    store._open.cache_clear()


def chosen(problem, platform="cpu"):
    return plan(problem, platform).algorithm.name


def lines(folder):
    return [line for line in (folder / "measurements.jsonl").read_text().splitlines() if line]


# The planner.


@pytest.mark.parametrize("fastest", ["xla", "im2col"])
def test_the_fastest_measured_wins(fastest):
    remember(DENSE, **{"xla": 2000, "im2col": 2000, fastest: 1000})
    p = plan(DENSE, "cpu")
    assert (p.algorithm.name, p.reason) == (fastest, "the fastest measured")
    assert {c.algorithm.name: c.measured_ns for c in p.candidates}[fastest] == 1000
    head = str(p).splitlines()[2]
    assert head.split() == ["algorithm", "estimate", "measured", "GFLOP", "MB", "moved", "MB", "workspace"]
    assert "1 us" in str(p)


def test_without_measurements_the_model_speaks_and_the_plan_has_no_such_column():
    p = plan(DENSE, "cpu")
    assert p.reason == "the smallest estimate" and "measured" not in str(p)


def test_what_was_measured_last_replaces_and_what_it_left_out_stays():
    remember(DENSE, xla=10, im2col=20)
    assert chosen(DENSE) == "xla"
    remember(DENSE, xla=30)
    assert chosen(DENSE) == "im2col"
    forget()
    assert chosen(DENSE) == "im2col"


def test_a_failed_algorithm_is_never_chosen_and_says_why():
    remember(DENSE, xla=10, im2col="RESOURCE_EXHAUSTED: out of memory")
    assert chosen(DENSE) == "xla"
    assert "failed when it was timed: RESOURCE_EXHAUSTED: out of memory" in str(plan(DENSE, "cpu"))
    remember(DENSE, xla="too")
    assert plan(DENSE, "cpu").reason == "the smallest estimate", "where all failed nothing was measured"


def test_a_measured_algorithm_that_is_not_admitted_does_not_win():
    remember(DENSE, pointwise=1, nonsense=1, xla=3, im2col=2)
    assert chosen(DENSE) == "im2col"


def test_measurements_beat_the_vendors_default_on_their_own_platform_only(monkeypatch):
    here = store.here("cpu")
    monkeypatch.setattr(
        store, "here", lambda platform: {"cpu": here, "cuda": store.Place("H", "1", "1", 0, 0)}.get(platform)
    )
    remember(DENSE, "cuda", im2col=1, xla=2)
    assert chosen(DENSE, "cuda") == "im2col"
    assert {chosen(DENSE, other) for other in ("rocm", "tpu", "default")} == {"xla"}
    for autodiff in ("primitive", "custom_vjp"):
        for platform, operation in (("cuda", "dot_general"), ("tpu", "convolution")):
            f = jax.jit(functools.partial(conv, autodiff=autodiff))
            text = export.export(f, platforms=[platform])(X, W).mlir_module()
            assert f"stablehlo.{operation}" in text, (autodiff, platform)


def test_an_export_for_another_platform_takes_no_time_of_this_one():
    assert all(store.here(platform) is None for platform in ("cuda", "rocm", "tpu", "default"))
    remember(DENSE, im2col=1, xla=2)
    text = export.export(jax.jit(conv), platforms=["cuda"])(X, W).mlir_module()
    assert "stablehlo.convolution" in text


def test_programs_of_before_keep_their_algorithm_and_new_ones_take_the_new():
    def text(f):
        return f.lower(X, W).as_text()

    remember(DENSE, im2col=2, xla=1)
    assert "stablehlo.convolution" in text(jax.jit(lambda x, w: conv(x, w)))
    remember(DENSE, im2col=1, xla=2)
    assert "stablehlo.convolution" not in text(jax.jit(lambda x, w: conv(x, w)))


# Keys.

KEYS = {
    "dtype": DENSE.replace(dtype=np.dtype(jnp.bfloat16)),
    "layout": DENSE.replace(layout=lax.conv_dimension_numbers((2, 3, 8, 8), (4, 3, 3, 3), None)),
    "batch": DENSE.replace(lhs_shape=(3, 3, 8, 8)),
    "strides": DENSE.replace(strides=(2, 1)),
    "padding": DENSE.replace(padding=((1, 1), (1, 0))),
    "lhs_dilation": DENSE.replace(lhs_dilation=(1, 2)),
    "rhs_dilation": DENSE.replace(rhs_dilation=(1, 2)),
    "precision": DENSE.replace(precision=lax.Precision.HIGHEST),
    "preferred": DENSE.replace(preferred_element_type=np.dtype(np.float64)),
    "input": input_problem(DENSE),
    "weight": weight_problem(DENSE),
}


@pytest.mark.parametrize("name", KEYS)
def test_keys_tell_problems_apart(name):
    remember(DENSE, xla=1, im2col=2)
    assert store.measured(DENSE, "cpu") and not store.measured(KEYS[name], "cpu")


@pytest.mark.parametrize(
    "field, value",
    [("device", "cpu of another make"), ("jax", "0.0.1"), ("jconv", "0.0.1"), ("threads", 99), ("workspace", 1)],
)
def test_keys_tell_places_apart(monkeypatch, field, value):
    remember(DENSE, xla=1, im2col=2)
    elsewhere = store.here("cpu")._replace(**{field: value})
    monkeypatch.setattr(store, "here", lambda platform: elsewhere)
    assert not store.measured(DENSE, "cpu")


def test_a_time_counts_under_its_workspace_limit_only(monkeypatch):
    """In parts, or refused, is an algorithm of another speed."""
    remember(DENSE, xla=1, im2col=2)
    with monkeypatch.context() as wider:
        wider.setattr(device, "_limit", 2 * jconv.workspace_limit())
        assert not store.measured(DENSE, "cpu")
    assert store.measured(DENSE, "cpu")


def test_a_time_counts_for_the_jconv_that_measured_it_only(monkeypatch):
    remember(DENSE, xla=1, im2col=2)
    monkeypatch.setattr(store, "__version__", "99.0")
    assert not store.measured(DENSE, "cpu")


PRECISIONS = (
    None,
    lax.Precision.HIGHEST,
    (lax.Precision.HIGH, lax.Precision.DEFAULT),
    lax.DotAlgorithmPreset.BF16_BF16_F32,
    lax.DotAlgorithm(*[np.dtype(np.float32)] * 3),
)


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
def test_a_problem_goes_through_json(precision):
    problem = DENSE.replace(precision=precision)
    data = json.loads(json.dumps(store.problem_to_json(problem)))
    assert store.problem_from_json(data) == problem


def test_every_field_but_the_sharding_is_in_the_key():
    assert set(store.problem_to_json(DENSE)) == {f.name for f in fields(ConvProblem)} - {"out_sharding"}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_case_goes_through_json(case):
    forward = case.problem(np.float32)
    for problem in (forward, input_problem(forward), weight_problem(forward)):
        assert store.problem_from_json(json.loads(json.dumps(store.problem_to_json(problem)))) == problem


def test_symbolic_sizes_have_no_key():
    batch = export.symbolic_shape("b")[0]
    problem = DENSE.replace(lhs_shape=(batch, 3, 8, 8))
    remember(DENSE, xla=1, im2col=2)
    assert store.key_of(problem, "cpu") is None and not store.measured(problem, "cpu")
    assert tuning.tune_problems([problem]).rows == ()


# The file.


def test_the_next_process_knows(folder):
    remember(DENSE, xla=1, im2col=2)
    code = """
import jax.numpy as jnp
import jconv
x, w = jnp.ones((2, 8, 8, 3)), jnp.ones((3, 3, 3, 4))
print(jconv.plan(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")).reason)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "the fastest measured" and not done.stderr


def test_concurrent_writers_lose_nothing(folder):
    code = """
import sys
from jconv import store
place = store.Place("d", "j", "v", 1, 1)
for n in range(200):
    store.store().add([(store.Key(place, '{"writer":%s,"n":%d}' % (sys.argv[1], n)), {"xla": 1 + n, "im2col": "x" * 500})])
"""
    writers = [subprocess.Popen([sys.executable, "-c", code, str(i)], cwd=ROOT) for i in range(4)]
    assert [w.wait() for w in writers] == [0] * 4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(store.store().records) == 800


def test_a_kill_in_the_middle_of_a_write_spoils_that_record_only(folder):
    others = [weight_problem(DENSE), input_problem(DENSE)]
    for problem in (DENSE, others[0]):
        remember(problem, xla=1, im2col=2)
    file = folder / "measurements.jsonl"
    whole = file.read_bytes()
    first = whole.index(b"\n", 1) + 1
    for length in range(first, len(whole)):
        file.write_bytes(whole[:length])
        forget()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert store.measured(DENSE, "cpu"), length
            remember(others[1], xla=3, im2col=4)
            forget()
            assert store.measured(DENSE, "cpu") and store.measured(others[1], "cpu"), length


@pytest.mark.parametrize(
    "content",
    [b"\x89PNG\r\n\x1a\n\x00\xff", b"[1, 2]\n", b'{"jconv":99}\n', b"[" * 100_000, b'"text"\n', b"NaN\n{}\n3\n\n"],
    ids=["png", "list", "newer", "deep", "string", "several"],
)
def test_a_foreign_file_is_kept_and_named_once(folder, content):
    folder.mkdir()
    file = folder / "measurements.jsonl"
    file.write_bytes(content)
    with pytest.warns(UserWarning, match="measurements.jsonl has lines that are no measurements") as caught:
        assert plan(DENSE, "cpu").reason == "the smallest estimate"
        remember(DENSE, xla=1, im2col=2)
        store.store().reload()
    assert len(caught) == 1
    assert file.read_bytes().startswith(content)
    forget()
    with pytest.warns(UserWarning):
        assert store.measured(DENSE, "cpu")


def test_an_old_record_counts_nowhere_and_is_kept(folder, tmp_path):
    """Records once did not say which jconv took them, nor under which limit; their problems can be tuned anew."""
    remember(DENSE, xla=1, im2col=2)
    file = folder / "measurements.jsonl"
    record = json.loads(file.read_text())
    del record["workspace"]
    file.write_text(json.dumps(record | {"jconv": 1}) + "\n")
    forget()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not store.measured(DENSE, "cpu")
        remember(weight_problem(DENSE), xla=1, im2col=2)
        assert tuning.import_measurements(file) == 0
        assert tuning.read_problems(file) == [DENSE, weight_problem(DENSE)]
        assert tuning.export_measurements(tmp_path / "all.jsonl") == 2
        assert len(tuning.read_problems(tmp_path / "all.jsonl")) == 2


@pytest.mark.parametrize(
    "damage",
    [{"times": {"xla": -1}}, {"times": {"xla": True}}, {"times": 3}, {"threads": "2"}, {"problem": "p"}, {"jconv": 2}, {"jconv": True}, {"device": 1}, {"workspace": "32 MiB"}],
    ids=str,
)  # fmt: skip
def test_a_record_of_another_form_is_no_record(damage):
    remember(DENSE, xla=1)
    record = json.loads(store.line(store.key_of(DENSE, "cpu"), {"xla": 1}))
    assert store.parse(json.dumps(record).encode()) == ([(store.key_of(DENSE, "cpu"), {"xla": 1})], [])
    assert store.parse(json.dumps(record | damage).encode()) == ([], [1])


def test_a_directory_that_cannot_be_written_falls_back_to_memory(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("JCONV_STORE", str(tmp_path / "file" / "below"))
    with pytest.warns(UserWarning, match="cannot be written.*stay in memory; set JCONV_STORE") as caught:
        remember(DENSE, xla=1, im2col=2)
        remember(weight_problem(DENSE), xla=1, im2col=2)
    assert len(caught) == 1
    assert chosen(DENSE) == chosen(weight_problem(DENSE)) == "xla"
    store.store().reload()
    assert chosen(DENSE) == "xla"
    assert tuning.export_measurements(tmp_path / "saved.jsonl") == 2


def test_an_unreadable_file_is_named_once(folder):
    (folder / "measurements.jsonl").mkdir(parents=True)
    with pytest.warns(UserWarning, match="measurements.jsonl cannot be read") as caught:
        plan(DENSE, "cpu")
        plan(DENSE, "cpu")
    assert len(caught) == 1


def test_a_full_disk_keeps_the_record_in_memory(monkeypatch, folder):
    real = os.write
    with monkeypatch.context() as full:
        full.setattr(store.os, "write", lambda file, content: real(file, content[:10]))
        with pytest.warns(UserWarning, match="the disk is full"):
            remember(DENSE, xla=1, im2col=2)
    assert (chosen(DENSE), plan(DENSE, "cpu").reason) == ("xla", "the fastest measured")


def test_an_empty_variable_keeps_off_the_disk_and_none_means_the_users_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("JCONV_STORE", "")
    assert store.store().path is None
    monkeypatch.delenv("JCONV_STORE")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    forget()
    assert store.store().path.name == "measurements.jsonl" and store.store().path.parent.name == "jconv"
    forget()


# Export and import.


def test_export_and_import(tmp_path, monkeypatch):
    remember(DENSE, xla=1, im2col=2)
    remember(weight_problem(DENSE), xla=1, im2col="broke")
    path = tmp_path / "all.jsonl"
    assert tuning.export_measurements(path) == 2
    monkeypatch.setenv("JCONV_STORE", str(tmp_path / "elsewhere"))
    remember(DENSE, xla=50, im2col=40)
    assert tuning.import_measurements(path) == 1, "what was measured here stays"
    assert tuning.import_measurements(path) == 0
    forget()
    assert dict(store.measured(DENSE, "cpu")) == {"xla": 50, "im2col": 40}
    assert dict(store.measured(weight_problem(DENSE), "cpu")) == {"xla": 1, "im2col": "broke"}
    assert set(tuning.read_problems(path)) == {DENSE, weight_problem(DENSE)}
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("content", [b"no measurements\n", b"\xff\xfe", b'{"jconv":99}\n', b"{}\n"], ids=str)
def test_a_file_that_is_no_export_is_refused_whole(tmp_path, monkeypatch, content):
    remember(DENSE, xla=1, im2col=2)
    path = tmp_path / "bad.jsonl"
    tuning.export_measurements(path)
    path.write_bytes(path.read_bytes() + content)
    monkeypatch.setenv("JCONV_STORE", str(tmp_path / "elsewhere"))
    with pytest.raises(ConvError, match="bad.jsonl' is no whole file of measurements: line 2 is no record"):
        tuning.import_measurements(path)
    assert not store.store().records


def test_paths_that_cannot_be_used_are_named(tmp_path):
    with pytest.raises(ConvError, match="missing.jsonl' cannot be read .No such file"):
        tuning.import_measurements(tmp_path / "missing.jsonl")
    with pytest.raises(ConvError, match="cannot be written"):
        tuning.export_measurements(tmp_path / "nowhere" / "x.jsonl")
    with pytest.raises(ConvError, match="cannot be written"):
        tuning.export_measurements(tmp_path)


# tune.


def test_tune_finds_the_forward_and_both_gradients(folder):
    def loss(x, w):
        return (conv(x, w) ** 2).sum()

    report = jconv.tune(jax.grad(loss, (0, 1)), X, W, seconds=0)
    assert {row.problem for row in report.rows} == {DENSE, input_problem(DENSE), weight_problem(DENSE)}
    for row in report.rows:
        assert set(row.times) == admitted(row.problem) and row.timed and not row.failures
        assert row.winner == min(row.times, key=row.times.get) == chosen(row.problem)
        assert row.speedup == row.times["xla"] / row.times[row.winner]
    assert len(lines(folder)) == 3


def test_what_is_known_is_not_timed_again(monkeypatch, folder):
    remember(DENSE, **dict.fromkeys(admitted(DENSE), 5) | {"xla": 1})
    raced = []

    def race(programs, seconds):
        raced.append(set(programs))
        return dict.fromkeys(programs, 7) | {"im2col": 3}

    monkeypatch.setattr(tuning, "race", race)
    report = jconv.tune(conv, X, W)
    assert not raced and not report.rows[0].timed and report.rows[0].winner == "xla"
    assert "1 of 1 had been measured before" in str(report)
    report = jconv.tune(conv, X, W, again=True)
    assert raced == [admitted(DENSE)] and report.rows[0].timed and report.rows[0].winner == "im2col" == chosen(DENSE)
    remember(weight_problem(DENSE), xla=1)
    tuning.tune_problems([weight_problem(DENSE)])
    assert len(raced) == 2, "one algorithm was not measured yet"


def test_nothing_is_timed_where_there_is_no_choice(monkeypatch):
    monkeypatch.setattr(tuning, "race", None)
    empty = DENSE.replace(lhs_shape=(0, 3, 8, 8))
    report = tuning.tune_problems([empty])
    assert [(r.winner, r.times, r.timed, r.speedup) for r in report.rows] == [("xla", {}, False, None)]
    assert "no convolution" in str(jconv.tune(jnp.sin, X)) and "xla" in str(report)


def test_an_interrupt_keeps_what_was_finished(monkeypatch, folder):
    times = iter([{"xla": 1, "im2col": 2}, KeyboardInterrupt()])

    def race(programs, seconds):
        found = next(times)
        if isinstance(found, BaseException):
            raise found
        return found

    monkeypatch.setattr(tuning, "race", race)
    with pytest.raises(KeyboardInterrupt):
        tuning.tune_problems([DENSE, weight_problem(DENSE)])
    forget()
    assert store.measured(DENSE, "cpu") and not store.measured(weight_problem(DENSE), "cpu")


@dataclass(frozen=True)
class Broken(type(jconv.ALGORITHMS[-1])):
    """xla as it could be: done in no time, by its own estimate."""

    name: str = "broken"

    def cost(self, problem, device):
        return replace(super().cost(problem, device), flops=0, bytes=0)

    def run(self, problem, lhs, rhs):
        raise RuntimeError("I am broken\nin two lines")


def test_a_broken_algorithm_is_reported_and_never_chosen(monkeypatch):
    problem = DENSE.replace(lhs_shape=(64, 3, 8, 8))
    monkeypatch.setattr(planner, "ALGORITHMS", (Broken(), *planner.ALGORITHMS))
    planner.plan_given.cache_clear()
    assert chosen(problem) == "broken", "its estimate is nothing"
    report = tuning.tune_problems([problem], seconds=0)
    assert report.rows[0].failures == {"broken": "RuntimeError: I am broken"}
    assert report.rows[0].winner != "broken" and report.rows[0].model == "broken"
    assert f"broken failed on {problem}: RuntimeError: I am broken" in str(report)
    assert chosen(problem) != "broken"
    planner.plan_given.cache_clear()


class Clock:
    """Time that passes only in programs."""

    def __init__(self, monkeypatch):
        self.now, self.calls = 0, {}
        monkeypatch.setattr(tuning, "_now", lambda: self.now)

    def program(self, name, *nanoseconds):
        """A program whose runs take these times, the last one from then on."""

        def run():
            index = self.calls[name] = self.calls.get(name, 0) + 1
            self.now += nanoseconds[min(index, len(nanoseconds)) - 1]

        return lambda: run


MS = 1_000_000


def test_a_clear_loser_runs_twice(monkeypatch):
    clock = Clock(monkeypatch)
    programs = {
        "slow": clock.program("slow", 25 * MS),
        "fast": clock.program("fast", 10 * MS),
        "near": clock.program("near", 15 * MS),
    }
    assert tuning.race(programs, 100) == {"slow": 25 * MS, "fast": 10 * MS, "near": 15 * MS}
    assert clock.calls == {"slow": 2, "fast": 1 + tuning._TURNS, "near": 1 + tuning._TURNS}


def test_a_loser_of_seconds_runs_once(monkeypatch):
    clock = Clock(monkeypatch)
    programs = {"slow": clock.program("slow", 3000 * MS), "fast": clock.program("fast", 10 * MS)}
    assert tuning.race(programs, 100) == {"slow": 3000 * MS, "fast": 10 * MS}
    assert clock.calls == {"slow": 1, "fast": 4}


def test_a_slow_first_run_is_no_loss(monkeypatch):
    clock = Clock(monkeypatch)
    programs = {"late": clock.program("late", 900 * MS, 5 * MS), "even": clock.program("even", 10 * MS)}
    assert tuning.race(programs, 100) == {"late": 5 * MS, "even": 10 * MS}


def test_a_hiccup_does_not_decide_between_short_programs(monkeypatch):
    clock = Clock(monkeypatch)
    programs = {"late": clock.program("late", 5 * MS, 4 * MS, MS // 25), "even": clock.program("even", MS // 5)}
    assert tuning.race(programs, 100) == {"late": MS // 25, "even": MS // 5}


def test_the_budget_ends_the_turns(monkeypatch):
    clock = Clock(monkeypatch)
    programs = {name: clock.program(name, 100 * MS) for name in "ab"}
    tuning.race(programs, 0.5)
    assert clock.calls == {"a": 4, "b": 4}
    assert tuning.race({name: clock.program(name, MS) for name in "cd"}, 0) == {"c": MS, "d": MS}
    assert clock.calls["c"] == 2


def test_short_programs_are_repeated_and_medians_taken(monkeypatch):
    clock = Clock(monkeypatch)
    assert tuning.race({"a": clock.program("a", MS // 10)}, 100) == {"a": MS // 10}
    assert clock.calls == {"a": 1 + 10 * 3}
    times = [10 * MS, 30 * MS, 11 * MS, 12 * MS, 10 * MS]
    programs = {"b": clock.program("b", *times), "c": clock.program("c", 10 * MS)}
    assert tuning.race(programs, 0.07) == {"b": 12 * MS, "c": 10 * MS}
    assert clock.calls["b"] == 1 + 3, "the first run is not in the median"


def test_a_program_that_breaks_later_has_failed(monkeypatch):
    clock = Clock(monkeypatch)
    runs = iter([None, None, MemoryError("no more")])

    def flaky():
        clock.now += MS
        error = next(runs)
        if error:
            raise error

    result = tuning.race({"flaky": lambda: flaky, "fast": clock.program("fast", 10 * MS)}, 100)
    assert result == {"flaky": "MemoryError: no more", "fast": 10 * MS}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "uint8", "complex64", "float64"])
def test_every_dtype_can_be_timed(dtype):
    problem = DENSE.replace(dtype=np.dtype(dtype))
    row = tuning.tune_problems([problem], seconds=0).rows[0]
    assert not row.failures and row.timed


def test_tune_refuses_nonsense():
    for seconds in (-1, "1", float("nan"), True):
        with pytest.raises(ConvError, match="seconds must be a number of at least 0"):
            jconv.tune(conv, X, W, seconds=seconds)


def test_tune_of_an_nnx_train_step():
    import optax
    from flax import nnx

    from jconv.nnx import Conv2d

    net = nnx.Sequential(Conv2d(3, 4, 3, rngs=nnx.Rngs(0)), nnx.relu, Conv2d(4, 2, 3, rngs=nnx.Rngs(0)))
    optimizer = nnx.Optimizer(net, optax.sgd(1e-2), wrt=nnx.Param)

    @nnx.jit
    def step(net, optimizer, x):
        optimizer.update(net, nnx.grad(lambda net: (net(x) ** 2).sum())(net))

    report = jconv.tune(step, net, optimizer, X, seconds=0)
    assert len(report.rows) == 5, "two forwards, two kernel gradients, one input gradient"


def test_a_report_in_json_and_in_rich():
    import io

    from rich.console import Console

    remember(DENSE, **dict.fromkeys(admitted(DENSE), 4000) | {"im2col": 2000})
    report = jconv.tune(conv, X, W)
    data = json.loads(report.to_json())
    assert data["threads"] == report.place.threads
    (row,) = data["rows"]
    assert store.problem_from_json(row["problem"]) == DENSE
    assert (row["winner"], row["speedup_over_xla"], row["timed"]) == ("im2col", 2.0, False)
    out = Console(file=io.StringIO(), width=200)
    out.print(report)
    assert "im2col" in out.file.getvalue() and "2.00" in out.file.getvalue()


@pytest.mark.parametrize("width", [60, 80])
def test_a_report_wider_than_the_terminal_goes_by_problem(width):
    import io

    from rich.console import Console

    able = admitted(DENSE)
    remember(DENSE, **dict.fromkeys(able, 4000) | {"im2col": 2000, "fold": "RuntimeError: broke"})
    report = jconv.tune(conv, X, W)
    out = Console(file=io.StringIO(), width=width)
    out.print(report)
    shown = out.file.getvalue().splitlines()
    assert max(map(len, shown)) <= width
    rows = [line.split(maxsplit=2) for line in shown if line.startswith("  ")]
    assert rows[0] == ["im2col", "0.002", "fastest, 2.00 times xla's speed"]
    assert rows[-1] == ["fold", "failed"] and {row[0] for row in rows} == able


def test_without_rich_tune_and_its_report_are_plain():
    code = """
import sys
sys.modules["rich"] = None
import jax.numpy as jnp
import jconv
print(jconv.tune(lambda x, w: jconv.conv(x, w, (1, 1), "SAME"), jnp.ones((1, 2, 5, 5)), jnp.ones((2, 2, 3, 3)), seconds=0))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "im2col" in done.stdout and not done.stderr, done.stderr


# The command line.

PROBLEM = ["--lhs", "2,8,8,3", "--rhs", "3,3,3,4", "--seconds", "0"]


def run(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)))


def test_the_command_tunes_a_problem_in_three_directions(folder):
    done = run("tune", *PROBLEM, "--json")
    assert done.exit_code == 0, done.output
    found = {store.problem_from_json(row["problem"]) for row in json.loads(done.stdout)["rows"]}
    assert found == {DENSE, input_problem(DENSE), weight_problem(DENSE)} and not done.stderr
    again = run("tune", *PROBLEM)
    assert "3 of 3 had been measured before" in again.stdout and "\x1b" not in again.stdout


def test_the_command_takes_every_option():
    done = run(
        "tune", "--lhs", "1,4,9,9", "--rhs", "6,2,3,3", "--layout", "NCHW,OIHW,NCHW", "--groups", 2, "--strides", "2,1",
        "--padding", "0:1,-1:2", "--rhs-dilation", "1,2", "--lhs-dilation", "2,1", "--dtype", "bfloat16",
        "--directions", "forward", "--seconds", "0", "--json",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    (row,) = json.loads(done.stdout)["rows"]
    x, w = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((1, 4, 9, 9), (6, 2, 3, 3)))
    wanted = ConvProblem.of(x, w, (2, 1), ((0, 1), (-1, 2)), (2, 1), (1, 2), feature_group_count=2)
    assert store.problem_from_json(row["problem"]) == wanted


def test_the_command_exports_and_merges(tmp_path, monkeypatch):
    path = tmp_path / "measured.jsonl"
    assert "3 records in" in run("tune", *PROBLEM, "--export", path).stderr
    monkeypatch.setenv("JCONV_STORE", str(tmp_path / "elsewhere"))
    done = run("tune", "--merge", path)
    assert done.exit_code == 0 and "3 new records from" in done.stderr
    done = run("tune", path)
    assert done.exit_code == 0 and "3 of 3 had been measured before" in done.stdout


def test_the_command_reads_the_benchmarks_problems(monkeypatch, tmp_path):
    rows = json.loads((ROOT / "benchmarks" / "conv_problems.json").read_text())
    problems = tuning.read_problems(ROOT / "benchmarks" / "conv_problems.json", directions=("forward",))
    for row, problem in zip(rows, problems, strict=True):
        assert problem.output_shape == (row["mb"], row["oc"], *(row[f"o{a}"] for a in "dhw"[3 - row["nd"] :]))
    monkeypatch.setattr(tuning, "race", lambda programs, seconds: dict.fromkeys(programs, 5))
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows[:2]))
    assert len(json.loads(run("tune", path, "--json").stdout)["rows"]) == 6


ROW = {"nd": 1, "mb": 1, "g": 1, "ic": 4, "oc": 8, "deconv": False, "iw": 9, "ow": 9, "kw": 3, "sw": 1, "pw": 1, "prw": 1, "dw": 1}  # fmt: skip

BAD = {
    "nothing to do": (["tune"], "nothing to tune: name --lhs and --rhs, or a FILE"),
    "half a problem": (["tune", "--lhs", "1,8,8,3"], "--lhs and --rhs go together, got only --lhs"),
    "letters": (["tune", "--lhs", "1,8,x,3", "--rhs", "3,3,3,4"], "--lhs must be integers"),
    "a zero": (["tune", "--lhs", "1,8,0,3", "--rhs", "3,3,3,4"], "--lhs must be at least 1, got 0"),
    "ranks": (["tune", "--lhs", "1,8", "--rhs", "3,4"], "--lhs must have 3 to 5 sizes"),
    "features": (
        ["tune", "--lhs", "1,8,8,3", "--rhs", "3,3,5,4"],
        "--lhs has 3 features in 1 group(s), so --rhs needs 3",
    ),
    "padding": (["tune", *PROBLEM, "--padding", "1"], "--padding must be SAME, SAME_LOWER, VALID or low:high"),
    "padding's name": (["tune", *PROBLEM, "--padding", "full"], "--padding must be SAME, SAME_LOWER, VALID or low"),
    "a pair too few": (
        ["tune", *PROBLEM, "--padding", "0:1"],
        "low:high for each of 2 spatial axes, as 0:1,0:1, got '0:1'",
    ),
    "too much padding": (
        ["tune", *PROBLEM, "--padding=-9:0,0:0"],
        "--padding (-9, 0) takes more than spatial axis 0 has",
    ),
    "padding of holes": (
        ["tune", *PROBLEM, "--lhs-dilation", "2,2"],
        "--padding SAME has no agreed meaning with --lhs-dilation 2,2",
    ),
    "strides": (["tune", *PROBLEM, "--strides", "1,1,1"], "--strides has 3 entries"),
    "dilation": (["tune", *PROBLEM, "--rhs-dilation", "1"], "--rhs-dilation has 1 entries"),
    "no groups": (["tune", *PROBLEM, "--groups", "0"], "--groups must be at least 1, got 0"),
    "groups": (["tune", *PROBLEM, "--groups", "2"], "--groups must divide the features of --lhs, got 2"),
    "layout": (["tune", *PROBLEM, "--layout", "NHWC,HWIO"], "--layout must be the axes of input, kernel and output"),
    "another layout": (["tune", *PROBLEM, "--layout", "NCHW,OIHW,NCHW"], "check --layout and --groups"),
    "empty": (
        ["tune", "--lhs", "1,3,3,3", "--rhs", "5,5,3,4", "--padding", "VALID"],
        "the output is empty: the window, 5x5",
    ),
    "unequal ranks": (
        ["tune", "--lhs", "1,8,3", "--rhs", "3,3,3,4"],
        "--lhs and --rhs must have the same number of sizes",
    ),
    "no problem for it": (
        ["tune", "some.json", "--strides", "2,2"],
        "--lhs and --rhs must be given for --strides to belong to",
    ),
    "seconds": (["tune", *PROBLEM[:-2], "--seconds", "-1"], "--seconds must be a number of at least 0, got -1.0"),
    "nowhere": (
        ["tune", *PROBLEM, "--directions", "forward", "--export", "/no/where"],
        "--export '/no/where' cannot be written",
    ),
    "dtype": (["tune", *PROBLEM, "--dtype", "floot"], "--dtype must be the name of a number's dtype"),
    "no number": (["tune", *PROBLEM, "--dtype", "object"], "--dtype must be the name of a number's dtype"),
    "direction": (["tune", *PROBLEM, "--directions", "back"], "--directions must be of forward, input, weight"),
    "no file": (["tune", "missing.json"], "FILE 'missing.json' cannot be read"),
    "no export": (["tune", "--merge", "missing.jsonl"], "--merge 'missing.jsonl' cannot be read"),
    "an option": (["tune", "--nonsense"], "No such option"),
    "a command": (["nonsense"], "No such command"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_a_sentence_and_exit_code_2(name):
    arguments, sentence = BAD[name]
    done = run(*arguments)
    assert done.exit_code == 2 and sentence in done.stderr and "Traceback" not in done.output and not done.stdout


@pytest.mark.parametrize(
    "content, sentence",
    [
        ("[", "starts as a JSON list but is none"),
        ("[3]", "row 0: it must be an object with nd"),
        ("[" * 100_000, "starts as a JSON list but is none"),
        ("[{}]", "row 0: it lacks nd, the number of spatial axes"),
        (
            json.dumps([ROW, {k: v for k, v in ROW.items() if k not in ("g", "prw")}]),
            "FILE .*row 1: it lacks g, prw, which",
        ),
        (json.dumps([ROW, {**ROW, "ow": 8}]), "row 1: ow is 8, but 9 follows from iw 9, kw 3, sw 1, pw 1, prw 1, dw 1"),
        (json.dumps([{**ROW, "kw": 13, "ow": 1}]), "row 0: ow is 1, but 0 follows"),
        (json.dumps([{**ROW, "deconv": True, "sw": 2, "ow": 18}]), "row 0: ow is 18, but 17 follows"),
        (json.dumps([{**ROW, "deconv": "false"}]), "row 0: deconv must be true or false, got 'false'"),
        (json.dumps([ROW, {**ROW, "ic": 0}]), "row 1: ic must be at least 1"),
        (json.dumps([{**ROW, "g": 3}]), "row 0: g must divide ic and oc, got g 3 for ic 4 and oc 8"),
        (json.dumps([{**ROW, "nd": 4}]), "nd must be 1, 2 or 3"),
        (json.dumps([{**ROW, "kw": "3"}]), "kw must be an integer"),
        ("[]", "has none"),
        ("hello", "no whole file of measurements"),
    ],
)
def test_a_bad_file_of_problems_is_a_sentence(tmp_path, content, sentence):
    path = tmp_path / "problems.json"
    path.write_text(content)
    done = run("tune", path)
    assert done.exit_code == 2 and not done.stdout
    assert re.search(sentence, done.stderr), done.stderr


def test_a_record_of_no_problem_is_a_sentence(tmp_path):
    key = store.key_of(DENSE, "cpu")
    for problem in ({"lhs_shape": [1]}, store.problem_to_json(DENSE) | {"lhs_shape": [-1, 3, 8, 8]}):
        path = tmp_path / "problems.jsonl"
        path.write_text(store.line(key._replace(problem=json.dumps(problem)), {"xla": 1}))
        done = run("tune", path)
        assert done.exit_code == 2 and "a problem must be a JSON object of ConvProblem's fields" in done.stderr


def test_a_failed_algorithm_is_exit_code_1(monkeypatch):
    monkeypatch.setattr(tuning, "race", lambda programs, seconds: {"xla": 5, "im2col": "RuntimeError: broke"})
    done = run("tune", *PROBLEM)
    assert done.exit_code == 1 and "im2col failed on" in done.stdout


def test_version_and_help():
    assert f"jconv {jconv.__version__}" in run("--version").stdout
    text = run("tune", "--help").stdout
    assert "jconv tune --lhs 8,56,56,64 --rhs 3,3,64,64\n" in text and "Examples" in text
    row = json.loads(re.search(r'{"nd".*?}', text, re.S)[0])
    assert tuning.problem_of(row, np.dtype(np.float32)).output_shape == (8, 32, 28)


@pytest.mark.parametrize("arguments", [["--help"], ["tune", "--help"]])
def test_help_fits_a_terminal(arguments):
    text = CliRunner().invoke(app, arguments, terminal_width=80, env={"COLUMNS": "80"}).stdout
    assert max(map(len, text.splitlines())) <= 80 and "plans then take the fastest.\n" in text


def command(*arguments, **more):
    """The command in a process of its own."""
    code = "import sys; sys.argv[0] = 'jconv'; from jconv.cli import main; main()"
    env = {**os.environ, **more.pop("env", {})}
    return subprocess.Popen([sys.executable, "-c", code, *arguments], cwd=ROOT, env=env, **more)


def test_the_shell_completes():
    env = {"_JCONV_COMPLETE": "complete_bash", "COMP_WORDS": "jconv tune --lh", "COMP_CWORD": "2"}
    out, _ = command(env=env, stdout=subprocess.PIPE, text=True).communicate()
    assert out.split() == ["--lhs", "--lhs-dilation"]


def test_an_unknown_option_is_exit_code_2():
    done = command("tune", "--nonsense", stderr=subprocess.PIPE, text=True)
    assert "No such option: --nonsense" in done.communicate()[1] and done.returncode == 2


@pytest.mark.skipif(not hasattr(signal, "SIGPIPE"), reason="a closed pipe is another thing here")
@pytest.mark.parametrize("arguments", [["--help"], ["tune", *PROBLEM, "--directions", "forward"]], ids=len)
def test_a_closed_pipe_ends_it_quietly(folder, arguments):
    done = command(*arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    done.stdout.close()
    assert done.stderr.read() == "" and done.wait() == -signal.SIGPIPE
    assert arguments == ["--help"] or len(lines(folder)) == 1, "the times are stored before they are shown"


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such terminals")
def test_in_a_terminal_there_is_a_bar_and_a_table_that_fits():
    """And colours, unless NO_COLOR asks for none. Where output goes elsewhere, nothing but the report is written."""
    import pty

    ours, theirs = pty.openpty()
    env = {"COLUMNS": "80", "TERM": "xterm-256color", "NO_COLOR": "1"}
    process = command("tune", *PROBLEM, stdout=theirs, stderr=theirs, env=env)
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # the other side is closed
        while piece := os.read(ours, 4096):
            shown += piece
    os.close(ours)
    assert process.wait() == 0
    text = shown.decode()
    assert "tuning" in text and not re.search(r"\x1b\[(3|4|9|10)[0-9]", text)
    report = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text.rpartition("tuning")[2]).splitlines()
    assert max(map(len, report)) <= 80 and "fastest" in text
    process = command("tune", *PROBLEM, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env)
    out, errors = process.communicate()
    assert b"3 of 3" in out and b"\x1b" not in out and not errors


def test_without_typer_the_command_names_the_remedy():
    code = "import sys; sys.modules['typer'] = None; import jconv.cli"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "jconv's command line needs typer; pip install 'jconv[cli]'\n"


def test_the_command_warns_in_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    done = subprocess.run(
        [sys.executable, "-m", "jconv.cli", "tune", *PROBLEM, "--directions", "forward"],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, "JCONV_STORE": str(tmp_path / "file" / "x")},
    )  # fmt: skip
    assert done.returncode == 0 and "im2col" in done.stdout
    assert done.stderr.startswith("jconv: ") and len(done.stderr.splitlines()) == 1
