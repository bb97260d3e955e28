"""Measured plans: times what the planner admits, on the device at hand, and keeps the times in the store.

``jconv.tune(fn, *args)`` is the door. From then on the planner takes the fastest algorithm that was measured,
in this process and in later ones. Measurements travel by :func:`export_measurements` and
:func:`import_measurements`. :func:`calibrate` measures the constants of the estimates themselves.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jconv import store
from jconv.adjoint import input_problem, weight_problem
from jconv.algorithms.base import Algorithm
from jconv.convolve import convolve
from jconv.device import Constants, MiB, reference
from jconv.errors import ConvError
from jconv.planner import plan_given
from jconv.printing import aligned
from jconv.problem import ConvProblem, integer
from jconv.rewrite import problems_of

__all__ = [
    "DIRECTIONS", "Calibration", "Report", "Row", "calibrate", "export_measurements", "import_measurements",
    "in_directions", "problem_of", "progress", "race", "read_problems", "tune", "tune_problems",
]  # fmt: skip

DIRECTIONS: dict[str, Callable[[ConvProblem], ConvProblem]] = {
    "forward": lambda problem: problem,
    "input": input_problem,
    "weight": weight_problem,
}
CHANNEL_LAST = {1: ("NWC", "WIO", "NWC"), 2: ("NHWC", "HWIO", "NHWC"), 3: ("NDHWC", "DHWIO", "NDHWC")}

_AXES = "dhw"
_TURNS = 31
_SAMPLE_NS = 1_000_000
_MOST_REPEATS = 100
_LEAST_TURNS = 3
_SHORT_NS = 20_000_000
_LONG_NS = 1_000_000_000
_SAMPLES = 5
_CHAIN = 100
_now: Callable[[], int] = time.perf_counter_ns
_T = TypeVar("_T")


@dataclass(frozen=True)
class Row:
    """One problem of a report.

    Attributes:
        problem: the convolution.
        times: nanoseconds of each algorithm that was timed, or the reason why it failed. Empty where only one
            algorithm can serve, so that there is nothing to choose.
        winner: the algorithm that the planner takes now.
        model: the one that it would take without measurements.
        timed: False if the times were known before, or there was nothing to choose.
    """

    problem: ConvProblem
    times: dict[str, int | str]
    winner: str
    model: str
    timed: bool

    @property
    def failures(self) -> dict[str, str]:
        """The algorithms that failed, each with its reason."""
        return {name: found for name, found in self.times.items() if isinstance(found, str)}

    @property
    def speedup(self) -> float | None:
        """xla's time over the winner's, or None where one of them is not known."""
        xla, best = self.times.get("xla"), self.times.get(self.winner)
        return xla / best if isinstance(xla, int) and isinstance(best, int) else None


@dataclass(frozen=True)
class Report:
    """What :func:`tune` found. ``print(report)`` shows it as text, ``rich.print(report)`` as rich's table."""

    place: store.Place
    rows: tuple[Row, ...]

    def __str__(self) -> str:
        return "\n".join([self._title(), *aligned(self._cells()), *self._notes()])

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        """rich's table; or, where the terminal is narrower, a short one for each problem."""
        from rich.table import Column, Table
        from rich.text import Text

        head, *rows = self._cells()
        if sum(3 + max(map(len, column)) for column in zip(head, *rows, strict=True)) < options.max_width:
            table = Table(title=self._title(), title_justify="left")
            for index, name in enumerate(head):
                table.add_column(name, justify="right" if index else "left")
            for row in rows:
                table.add_row(*map(Text, row))
            yield table
        else:
            yield Text(self._title())
            for row in self.rows:
                table = Table.grid("", Column(justify="right"), "", padding=(0, 0, 0, 2), pad_edge=True)
                for line in _ranking(row):
                    table.add_row(*map(Text, line))
                yield from (Text(), Text(str(row.problem)), table)
            yield Text()
        yield from map(Text, self._notes())

    def to_json(self) -> str:
        """The report as a JSON object: the place, and a list of rows with times in nanoseconds."""
        rows = [
            {
                "problem": store.problem_to_json(row.problem),
                "times": {name: found for name, found in row.times.items() if isinstance(found, int)},
                "failures": row.failures,
                "winner": row.winner,
                "model": row.model,
                "speedup_over_xla": row.speedup,
                "timed": row.timed,
            }
            for row in self.rows
        ]
        return json.dumps({**self.place._asdict(), "rows": rows}, indent=1)

    def _title(self) -> str:
        threads = f", threads {self.place.threads}" if self.place.threads else ""
        return f"{self.place.device}{threads}, jax {self.place.jax}; times in ms"

    def _cells(self) -> list[tuple[str, ...]]:
        names = list(dict.fromkeys(name for row in self.rows for name in row.times))
        cells = [("problem", *names, "fastest", "by the model", "xla / fastest")]
        for row in self.rows:
            times = [_milliseconds(row.times.get(name)) for name in names]
            speedup = "" if row.speedup is None else f"{row.speedup:.2f}"
            cells.append((str(row.problem), *times, row.winner, row.model, speedup))
        return cells

    def _notes(self) -> list[str]:
        if not self.rows:
            return ["no convolution of known sizes was found"]
        known = sum(bool(row.times) and not row.timed for row in self.rows)
        return [
            *(
                [f"{known} of {len(self.rows)} had been measured before; again=True (--again) measures anew"]
                if known
                else []
            ),
            *(f"{name} failed on {row.problem}: {why}" for row in self.rows for name, why in row.failures.items()),
        ]


def tune(fn: Callable[..., Any], *args: Any, seconds: float = 0.5, again: bool = False) -> Report:
    """Times the algorithms for every convolution in ``fn(*args)`` and has the planner use the fastest.

    ``fn`` is traced and not run. Each problem is timed alone, with random operands of its shapes, on JAX's default
    device: wall time, programs compiled before, medians of runs that take turns. What is more than twice as slow as
    the best is not run again after its second run (a short one after its fourth). Every finished problem is in the
    store at once, so that an interrupt loses none. Programs that were compiled before keep the algorithms that they
    have: tune first, or call ``jax.clear_caches()``. Times are worth what the machine's quiet is worth.

    Args:
        fn: a function of arrays, ``jax.grad(loss)`` or a train step among them, whose gradients are then found too.
            As in :func:`jconv.plans`, convolutions with ``autodiff="custom_vjp"`` are not seen.
        args: its arguments: pytrees of arrays or ``jax.ShapeDtypeStruct``s.
        seconds: for the runs of one problem, compiling not counted; every algorithm runs twice at least.
        again: measure also what the store knows already.

    Returns:
        A :class:`Report`; print it.

    Raises:
        ConvError: if ``seconds`` is not a number of at least 0.

    >>> x, w = jnp.ones((1, 8, 8, 3)), jnp.ones((3, 3, 3, 4))
    >>> from jconv.lax import conv_transpose
    >>> report = tune(jax.grad(lambda w: conv_transpose(x, w, (2, 2), "SAME").sum()), w, seconds=0)
    >>> len(report.rows), report.rows[0].winner in report.rows[0].times
    (2, True)
    """
    return tune_problems(problems_of(fn, *args), seconds=seconds, again=again)


def tune_problems(problems: Iterable[ConvProblem], *, seconds: float = 0.5, again: bool = False) -> Report:
    """As :func:`tune`, for problems in hand; those with symbolic sizes are left out, since they cannot be run.

    Args:
        problems: each as ``ConvProblem.of`` makes it.
        seconds, again: as in :func:`tune`.

    Returns:
        A :class:`Report` with one row for each different problem.

    Raises:
        ConvError: if ``seconds`` is not a number of at least 0.

    >>> p = ConvProblem.of(jnp.ones((1, 3, 8, 8)), jnp.ones((4, 3, 3, 3)), (1, 1), "SAME")
    >>> tune_problems([p, p], seconds=0).rows[0].problem == p
    True
    """
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not seconds >= 0:
        raise ConvError(f"seconds must be a number of at least 0, got {seconds!r}; the default is 0.5")
    platform = next(iter(jax.device_put(0).devices())).platform
    place = store.here(platform)
    if place is None:
        raise ConvError(
            f"JAX's default device is on {platform}, which is not its first backend; choose it by JAX_PLATFORMS"
        )
    found = dict.fromkeys(problem.replace(out_sharding=None) for problem in problems)
    wanted = [p for p in found if store.key_of(p, platform) is not None]
    store.store().reload()
    with contextlib.closing(progress(wanted, "tuning")) as steps:
        return Report(place, tuple(_tuned(problem, platform, seconds, again) for problem in steps))


@dataclass(frozen=True)
class Calibration:
    """What :func:`calibrate` found. ``print(calibration)`` shows it.

    Attributes:
        cpu: the processor's model.
        threads: those that ran.
        before: the yardsticks until now, at first those of the machine that the cost model was fitted on.
        after: those that were measured; the model's constants, in ``jconv.plan(...).device``, scale with them.
    """

    cpu: str
    threads: int
    before: Constants
    after: Constants

    def __str__(self) -> str:
        rows = zip(Constants._fields, map(str, self.before), map(str, self.after), strict=True)
        title = f"{self.cpu}, threads {self.threads}; float32 operations of one core and bytes of all, a nanosecond"
        return "\n".join([title, *aligned([("constant", "was", "is"), *rows])])

    def to_json(self) -> str:
        """The calibration as a JSON object."""
        before, after = self.before._asdict(), self.after._asdict()
        return json.dumps({"cpu": self.cpu, "threads": self.threads, "before": before, "after": after}, indent=1)


def calibrate(rounds: int = 15) -> Calibration:
    """Measures the constants of the cost model on this machine's CPU, and has the planner estimate by them.

    Some seconds of small programs: a product of matrices, a convolution of XLA's, a fused loop of multiply-adds, FFTs, a
    pass over memory and a chain of tiny products. Each runs on all threads of JAX's; a rate of arithmetic is what they do
    together, divided by their number, since the model multiplies by it again. Of each program the best round counts,
    which is a median; the time of a call that does next to nothing is taken off. The constants are kept in the store, for this
    model of processor. Measured times go before estimates, and programs that were compiled before keep the algorithms
    that they have. Calibrate while the machine is quiet.

    Args:
        rounds: how often each program has its turn, a warm-up not counted.

    Returns:
        A :class:`Calibration`; print it.

    Raises:
        ConvError: if ``rounds`` is no integer of at least 1, or if JAX has no CPU device in this process.

    >>> calibrate(rounds=1).after.dot >= 1
    True
    """
    rounds = integer("rounds", rounds, 1)
    place = store.here("cpu")
    if place is None:
        raise ConvError("calibrate needs JAX's CPU device, which this process has not; add cpu to JAX_PLATFORMS")
    before = store.store().constants or reference()
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        after = _constants(_times(_yardsticks(), rounds), place.threads)
    store.store().calibrate(after)
    return Calibration(place.device, place.threads, before, after)


def export_measurements(path: str | os.PathLike[str]) -> int:
    """Writes all that the store knows, of every device, to a file that :func:`import_measurements` reads.

    Args:
        path: the file; an old one is replaced, in one step.

    Returns:
        The number of records.

    Raises:
        ConvError: if the file cannot be written.

    >>> import os, tempfile
    >>> path = os.path.join(tempfile.mkdtemp(), "measured.jsonl")
    >>> export_measurements(path) >= 0, import_measurements(path)
    (True, 0)
    """
    target = Path(path)
    known = store.store()
    known.reload()
    lines = sorted(store.line(key, times) for key, times in known.records.items())
    try:
        store.replace_file(target, "".join(f"{line}\n" for line in lines))
    except OSError as error:
        raise ConvError(
            f"path {str(target)!r} cannot be written ({error.strerror}); name a file in a folder that can be"
        ) from None
    return len(lines)


def import_measurements(path: str | os.PathLike[str]) -> int:
    """Adds the measurements of a file to the store. What was measured here stays; only what is new is taken.

    Args:
        path: a file of :func:`export_measurements`, of any device; the planner uses those of its own.

    Returns:
        The number of records that held something new.

    Raises:
        ConvError: if the file is missing, damaged, or something else; nothing is taken then.

    >>> import_measurements("nowhere.jsonl")
    Traceback (most recent call last):
    jconv.errors.ConvError: path 'nowhere.jsonl' cannot be read (No such file or directory); name a file that can be
    """
    good = _records(Path(path), _read(Path(path)))
    known = store.store()
    known.reload()
    new: dict[store.Key, store.Times] = {}
    for key, times in good:
        mine = {**new.get(key, {}), **known.records.get(key, {})}
        news = {name: found for name, found in times.items() if name not in mine}
        if news:
            new[key] = {**new.get(key, {}), **news}
    known.add(new.items())
    return len(new)


def read_problems(
    path: str | os.PathLike[str], *, dtype: str = "float32", directions: Sequence[str] = tuple(DIRECTIONS)
) -> list[ConvProblem]:
    """The problems of a file.

    Args:
        path: either a JSON list of rows as :func:`problem_of` takes them; or a file of :func:`export_measurements`.
        dtype: of the rows; an export has its own.
        directions: of the rows: ``"forward"``, and the gradients ``"input"`` and ``"weight"``; an export lists
            each apart.

    Raises:
        ConvError: if the file is missing or something else, with the row that is wrong.

    >>> import json, os, tempfile
    >>> row = dict(nd=1, mb=1, g=1, ic=4, oc=8, deconv=False, iw=9, ow=9, kw=3, sw=1, pw=1, prw=1, dw=1)
    >>> path = os.path.join(tempfile.mkdtemp(), "rows.json")
    >>> with open(path, "w") as file:
    ...     json.dump([row], file)
    >>> [p.output_shape for p in read_problems(path, directions=("forward", "weight"))]
    [(1, 8, 9), (4, 8, 3)]
    """
    element = dtype_of(dtype)
    content = _read(Path(path))
    if not content.lstrip().startswith(b"["):
        return list(
            dict.fromkeys(store.problem_from_json(json.loads(k.problem)) for k, _ in _records(Path(path), content))
        )
    try:
        rows = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ConvError(f"path {str(path)!r} starts as a JSON list but is none ({error}); write it anew") from None
    problems = []
    for number, row in enumerate(rows):
        try:
            forward = problem_of(row, element)
        except ConvError as error:
            raise ConvError(f"path {str(path)!r}, row {number}: {error}") from None
        problems += in_directions(forward, directions)
    return problems


def problem_of(row: Any, dtype: np.dtype) -> ConvProblem:
    """The forward problem of a row in oneDNN's letters, channel-last.

    Args:
        row: a dict of ``nd`` spatial axes, ``mb`` images, ``g`` groups, ``ic`` and ``oc`` features, ``deconv`` (true for
            a transposed convolution), and for each spatial axis d, h, w: ``i`` input, ``o`` output, ``k`` window,
            ``s`` stride, ``p`` and ``pr`` low and high padding, ``d`` kernel dilation from 1. Other entries are ignored.
        dtype: of both operands.

    Raises:
        ConvError: for a row that lacks a letter or whose letters contradict each other.

    >>> row = dict(nd=1, mb=1, g=1, ic=4, oc=8, deconv=True, iw=9, ow=18, kw=4, sw=2, pw=1, prw=1, dw=1)
    >>> problem_of(row, np.dtype(np.float32)).output_shape
    (1, 8, 18)
    """
    if not isinstance(row, dict):
        raise ConvError(
            f"it must be an object with nd, mb, g, ic, oc, deconv and the letters of each axis, got {str(row)[:80]}"
        )
    if "nd" not in row:
        raise ConvError("it lacks nd, the number of spatial axes, which must be 1, 2 or 3")
    n = integer("nd", row["nd"], 1)
    if n not in CHANNEL_LAST:
        raise ConvError(f"nd must be 1, 2 or 3, got {n}")
    axes = _AXES[-n:]
    of_axes = [f"{letter}{axis}" for axis in axes for letter in ("i", "o", "k", "s", "p", "pr", "d")]
    missing = [name for name in ("mb", "g", "ic", "oc", "deconv", *of_axes) if name not in row]
    if missing:
        raise ConvError(f"it lacks {', '.join(missing)}, which a row of nd {n} must have")

    def along(letter: str, least: int) -> list[int]:
        return [integer(f"{letter}{axis}", row[f"{letter}{axis}"], least) for axis in axes]

    size, out, window, stride, holes = (along(letter, 1) for letter in "ioksd")
    pads = list(zip(along("p", -(1 << 31)), along("pr", -(1 << 31)), strict=True))
    batch, groups, features, out_features = (integer(name, row[name], 1) for name in ("mb", "g", "ic", "oc"))
    deconv, layout = row["deconv"], CHANNEL_LAST[n]
    if not isinstance(deconv, bool):
        raise ConvError(f"deconv must be true or false, got {deconv!r}")
    if features % groups or out_features % groups:
        raise ConvError(f"g must divide ic and oc, got g {groups} for ic {features} and oc {out_features}")
    reach = [(k - 1) * d for k, d in zip(window, holes, strict=True)]
    for axis, i, o, r, s, (low, high) in zip(axes, size, out, reach, stride, pads, strict=True):
        follows = (i - 1) * s + r + 1 - low - high if deconv else (i + low + high - r - 1) // s + 1
        if o != follows:
            given = ", ".join(f"{letter}{axis} {row[f'{letter}{axis}']}" for letter in ("i", "k", "s", "p", "pr", "d"))
            raise ConvError(f"o{axis} is {o}, but {max(0, follows)} follows from {given}; correct one of them")
    lhs = jax.ShapeDtypeStruct((batch, *size, features), dtype)
    rhs = jax.ShapeDtypeStruct((*window, features // groups, out_features), dtype)
    if not deconv:
        return ConvProblem.of(lhs, rhs, stride, pads, None, holes, layout, groups)
    pads = [(r - low, r - high) for r, (low, high) in zip(reach, pads, strict=True)]
    return ConvProblem.of(lhs, rhs, (1,) * n, pads, stride, holes, layout, groups)


def in_directions(forward: ConvProblem, directions: Sequence[str]) -> list[ConvProblem]:
    """A convolution and its gradients.

    Args:
        forward: the convolution.
        directions: any of ``"forward"``, ``"input"``, ``"weight"``.

    Raises:
        ConvError: for another direction.

    >>> p = ConvProblem.of(jnp.ones((1, 3, 8, 8)), jnp.ones((4, 3, 3, 3)), (1, 1), "SAME")
    >>> [q.output_shape for q in in_directions(p, ["input", "weight"])]
    [(1, 3, 8, 8), (3, 4, 3, 3)]
    """
    for direction in directions:
        if direction not in DIRECTIONS:
            raise ConvError(f"directions must be of {', '.join(DIRECTIONS)}, got {direction!r}")
    return [DIRECTIONS[direction](forward) for direction in directions]


def _tuned(problem: ConvProblem, platform: str, seconds: float, again: bool) -> Row:
    device = store.calibrated(platform)
    model = plan_given(problem, device, ())
    able = [c.runner or c.algorithm for c in model.candidates if c.refusal is None]
    key = store.key_of(problem, platform)
    assert key is not None
    known = dict(store.measured(problem, platform))
    timed = len(able) > 1 and (again or not all(a.name in known for a in able))
    if timed:
        store.store().add([(key, race(_programs(problem, able), seconds))])
    pairs = store.measured(problem, platform)
    chosen = plan_given(problem, device, pairs)
    return Row(problem, dict(pairs), chosen.algorithm.name, model.algorithm.name, timed)


# What the constants are measured with: a program, the shapes of its operands, and the operations or bytes of one run.
_YARDSTICKS: dict[str, tuple[Callable[..., Any], tuple[tuple[int, ...], ...], int]] = {
    "dot": (jnp.dot, ((1024, 1024), (1024, 1024)), 2 * 1024**3),
    "conv": (
        lambda x, w: lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=CHANNEL_LAST[2]),
        ((4, 28, 28, 128), (3, 3, 128, 128)),
        2 * 4 * 28 * 28 * 9 * 128 * 128,
    ),
    "vector": (
        lambda x, w: sum(x[:, i : i + 56, j : j + 56] * w[i, j] for i in range(3) for j in range(3)),
        ((1, 58, 58, 128), (3, 3, 128)),
        2 * 9 * 56 * 56 * 128,
    ),
    "fft": (lambda x: jnp.fft.irfft(jnp.fft.rfft(x)), ((256, 1024),), 2 * 256 * 5 * 1024 * 10 // 2),
    "bytes_per_ns": (lambda x: x + 1, ((2 * MiB,),), 2 * 8 * MiB),
    "one": (lambda x: x @ x, ((8, 8),), 0),
    "chain": (lambda x: functools.reduce(jnp.dot, [x] * (2 + _CHAIN)), ((8, 8),), 0),
}


def _yardsticks() -> dict[str, Callable[[], Any]]:
    """Each program, compiled, on operands of its own."""
    runs: dict[str, Callable[[], Any]] = {}
    for name, (fn, shapes, _) in _YARDSTICKS.items():
        operands = [jnp.full(shape, 0.125, np.float32) for shape in shapes]
        program = jax.jit(fn).lower(*operands).compile()
        runs[name] = lambda program=program, operands=operands: program(*operands).block_until_ready()
    return runs


def _times(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, int]:
    """Nanoseconds of each: the least of the rounds' medians. A first round warms up."""
    medians: dict[str, list[int]] = {name: [] for name in runs}
    with contextlib.closing(progress(range(1 + rounds), "calibrating")) as steps:
        for _ in steps:
            for name, run in runs.items():
                medians[name].append(int(statistics.median(_sample(run, medians[name]) for _ in range(_SAMPLES))))
    return {name: min(found[1:]) for name, found in medians.items()}


def _constants(times: dict[str, int], threads: int) -> Constants:
    """Operations of one core, and bytes of all, without the time that a call takes which does next to nothing."""

    def rate(name: str) -> int:
        sharing = 1 if name == "bytes_per_ns" else threads
        return max(1, round(_YARDSTICKS[name][2] / (max(1, times[name] - times["one"]) * sharing)))

    launch = max(1, (times["chain"] - times["one"]) // _CHAIN)
    return Constants(*(rate(name) for name in Constants._fields[:-1]), launch_ns=launch)


def _programs(problem: ConvProblem, able: list[Algorithm]) -> dict[str, Callable[[], Callable[[], Any]]]:
    """For each algorithm what compiles it, which gives what runs it once."""
    rng = np.random.default_rng(0)
    shapes = (problem.lhs_shape, problem.layout.lhs_spec), (problem.rhs_shape, problem.layout.rhs_spec)
    values = [rng.standard_normal(store.physical(shape, spec), np.float32) for shape, spec in shapes]
    unsigned = problem.dtype.kind == "u"
    operands = [jax.device_put((np.abs(v) if unsigned else v).astype(problem.dtype)) for v in values]

    def compiler(algorithm: Algorithm) -> Callable[[], Callable[[], Any]]:
        def compiled() -> Callable[[], Any]:
            program = jax.jit(lambda lhs, rhs: convolve(lhs, rhs, problem, algorithm)).lower(*operands).compile()
            return lambda: program(*operands).block_until_ready()

        return compiled

    return {algorithm.name: compiler(algorithm) for algorithm in able}


def race(programs: dict[str, Callable[[], Callable[[], Any]]], seconds: float) -> dict[str, int | str]:
    """Median nanoseconds of each program, or the reason why it failed.

    The first turn compiles, warms up, and says how many runs make a sample that the clock resolves; it counts for
    the median only if there is no other.

    Args:
        programs: by name what compiles a program, which gives what runs it once.
        seconds: for all runs together, compiling not counted.

    >>> race({"sum": lambda: lambda: sum(range(9)), "broken": lambda: 1 / 0}, 0)["broken"]
    'ZeroDivisionError: division by zero'
    """
    samples: dict[str, list[int]] = {name: [] for name in programs}
    runs: dict[str, Callable[[], Any]] = {}
    failures: dict[str, str] = {}
    alive = list(programs)
    deadline = 0
    for turn in range(1 + _TURNS):
        for name in alive:
            try:
                if turn == 0:
                    runs[name] = programs[name]()
                samples[name].append(_sample(runs[name], samples[name]))
            except Exception as error:
                failures[name] = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"
                del samples[name]
        best = min(map(min, samples.values()), default=0)
        alive = [name for name in alive if name in samples and not _clear_loser(samples[name], best)]
        if turn == 0:
            deadline = _now() + int(1e9 * seconds)
        elif _now() >= deadline or (len(alive) < 2 and turn >= _LEAST_TURNS):
            break
    return {name: int(statistics.median(s[1:] or s)) for name, s in samples.items()} | failures


def _clear_loser(samples: list[int], best: int) -> bool:
    """Above twice the best in each run. A short program gets four runs: one hiccup could make it lose two, and little
    is gained by stopping it. Two do for a longer one, and one does if it took a second."""
    runs, spent = len(samples), sum(samples)
    return min(samples) > 2 * best and (runs >= 4 or (runs >= 2 and spent > _SHORT_NS) or spent > _LONG_NS)


def _sample(run: Callable[[], Any], before: list[int]) -> int:
    """Nanoseconds of one run; of a short one the mean of as many as the clock resolves."""
    repeats = max(1, min(_MOST_REPEATS, _SAMPLE_NS // min(before))) if before else 1
    start = _now()
    for _ in range(repeats):
        run()
    return max(1, (_now() - start) // repeats)


def progress(items: Sequence[_T], title: str) -> Generator[_T]:
    """The items, with a bar on stderr where that is a terminal and rich is installed.

    >>> list(progress([1, 2], "counting"))
    [1, 2]
    """
    try:
        from rich.console import Console
        from rich.progress import track
    except ImportError:
        yield from items
        return
    console = Console(stderr=True)
    yield from track(items, title, console=console, transient=True, disable=not console.is_terminal)


def dtype_of(name: str) -> np.dtype:
    """The dtype of a name.

    Raises:
        ConvError: if no number's dtype has it, or if JAX has switched its 64 bits off.

    >>> dtype_of("bfloat16").itemsize
    2
    """
    try:
        dtype = np.dtype(name)
        if not jnp.issubdtype(dtype, jnp.number):
            raise TypeError
    except TypeError:
        raise ConvError(
            f"dtype must be the name of a number's dtype such as float32 or bfloat16, got {name!r}"
        ) from None
    if dtype != jax.dtypes.canonicalize_dtype(dtype):
        raise ConvError(f"dtype {dtype} needs 64-bit types, which JAX has switched off; set JAX_ENABLE_X64=1")
    return dtype


def _ranking(row: Row) -> Iterator[tuple[str, str, str]]:
    """The algorithms of one problem, the fastest first: name, time and what is to be said of it."""
    times: dict[str, int | str | None] = {row.winner: None, row.model: None, **row.times}
    for name, found in sorted(times.items(), key=lambda item: item[1] if isinstance(item[1], int) else math.inf):
        notes = ["fastest"] if name == row.winner else []
        if name == row.winner != "xla" and row.speedup is not None:
            notes.append(f"{row.speedup:.2f} times xla's speed")
        yield name, _milliseconds(found), ", ".join([*notes, *(["by the model"] if name == row.model else [])])


def _milliseconds(found: int | str | None) -> str:
    if isinstance(found, int):
        return f"{found / 1e6:.3g}"
    return "" if found is None else "failed"


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConvError(f"path {str(path)!r} cannot be read ({error.strerror}); name a file that can be") from None


def _records(path: Path, content: bytes) -> list[tuple[store.Key, store.Times]]:
    good, bad = store.parse(content)
    if bad:
        raise ConvError(
            f"path {str(path)!r} is no whole file of measurements: line {bad[0]} is no record; export it anew"
        )
    return good
