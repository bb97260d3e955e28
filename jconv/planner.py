"""Which algorithm serves a problem, and why. The plan speaks: print it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import jax
from jax import lax

from jconv.algorithms.base import Algorithm, Cost, operand_bytes
from jconv.algorithms.exchanged import Exchanged, exchanged, has_holes, worth_exchanging
from jconv.algorithms.table import ALGORITHMS
from jconv.algorithms.tiling import InParts, in_cache, within
from jconv.algorithms.widened import Widened, widened
from jconv.device import Device, MiB
from jconv.errors import AlgorithmError, ConvError, ConvTypeError
from jconv.printing import aligned
from jconv.problem import ConvProblem, is_static
from jconv.store import Pairs, calibrated, measured

_BATCH_GUESS = 8
_COMPLEX = 16  # how much slower XLA:CPU's products and loops of complex numbers are
_XLA = ALGORITHMS[-1]


@dataclass(frozen=True)
class Candidate:
    """One row of a plan: an algorithm with its cost and the time that was measured, or the reason for its refusal.

    ``runner`` is what runs: the algorithm, in parts where its workspace would exceed the limit, and on CPU in
    float32 where the operands are 16-bit floats, or with the operands exchanged; ``cost`` and ``time_ns`` are of all
    parts together, but for the workspace."""

    algorithm: Algorithm
    cost: Cost | None
    time_ns: int | None
    refusal: str | None
    runner: Algorithm | None = None
    measured_ns: int | None = None


@dataclass(frozen=True)
class Plan:
    """The choice for one problem on one platform, with every candidate. ``print(plan)`` shows it."""

    problem: ConvProblem
    device: Device
    algorithm: Algorithm
    reason: str
    candidates: tuple[Candidate, ...]

    @property
    def runner(self) -> Algorithm:
        """What runs: the algorithm, in the manner that its candidate says."""
        chosen = next(c for c in self.candidates if c.algorithm == self.algorithm)
        return chosen.runner or self.algorithm

    def __str__(self) -> str:
        rows = [("algorithm", "estimate", "measured", "GFLOP", "MB moved", "MB workspace", "")]
        for c in self.candidates:
            mark = "<- chosen" if c.algorithm == self.algorithm else ""
            if c.cost is None or c.time_ns is None:
                rows.append((c.algorithm.name, "refused", "", "", "", "", f"{c.refusal}"))
            else:
                note = " ".join(filter(None, (_manner(c.runner), c.refusal, mark)))
                known = "" if c.measured_ns is None else _time(c.measured_ns)
                rows.append(
                    (c.algorithm.name, _time(c.time_ns), known, f"{c.cost.flops / 1e9:.3g}",
                     f"{c.cost.bytes / 1e6:.3g}", f"{c.cost.workspace / 1e6:.3g}", note)
                )  # fmt: skip
        if not any(c.measured_ns for c in self.candidates):
            rows = [(*row[:2], *row[3:]) for row in rows]
        table = [f"  {line}" for line in aligned(rows, left=(0, len(rows[0]) - 1))]
        head = f"{self.problem}\non {self.device.platform}: {self.algorithm.name} ({self.reason})"
        return "\n".join([head, *table])


def plan(problem: ConvProblem, platform: str) -> Plan:
    """The fastest admissible algorithm by what was measured on this device, else by the cost model; a vendor's
    kernels where the device has them and nothing was measured."""
    return plan_given(problem, calibrated(platform), measured(problem, platform))


def platform_named(platform: str | None) -> str:
    """The platform that a caller named, by default that of this process.

    Raises:
        ConvError: for a name that JAX does not know.
    """
    known = ("cpu", "gpu", "cuda", "rocm", "tpu", jax.default_backend())
    if platform is None:
        return jax.default_backend()
    if platform not in known:
        raise ConvError(f"platform must be one of {', '.join(sorted(set(known)))}, got {platform!r}")
    return platform


@lru_cache(maxsize=4096)
def plan_given(problem: ConvProblem, device: Device, times: Pairs) -> Plan:
    """As :func:`plan`, where ``times`` are the measurements: (algorithm, nanoseconds or why it failed) pairs."""
    found = dict(times)
    candidates = tuple(
        _with_measurement(_candidate(algorithm, problem, device), found.get(algorithm.name)) for algorithm in ALGORITHMS
    )
    able = [c for c in candidates if c.refusal is None and c.time_ns is not None]
    timed = [c for c in able if c.measured_ns is not None]
    if timed:
        best = min(timed, key=lambda c: c.measured_ns or 0)
        return Plan(problem, device, best.algorithm, "the fastest measured", candidates)
    if device.vendor_default:
        return Plan(problem, device, _XLA, f"the vendor's kernels are the default on {device.platform}", candidates)
    best = min(able, key=lambda c: c.time_ns or 0)
    return Plan(problem, device, best.algorithm, "the smallest estimate", candidates)


def named(algorithm: Any) -> Algorithm | None:
    """The algorithm that a caller named, or None for ``"auto"``.

    Raises:
        AlgorithmError: if no algorithm has that name.
        ConvTypeError: if it is neither a name nor an Algorithm that can be a key.
    """
    if isinstance(algorithm, str):
        if algorithm == "auto":
            return None
        for candidate in ALGORITHMS:
            if candidate.name == algorithm:
                return candidate
        names = ", ".join(a.name for a in ALGORITHMS)
        raise AlgorithmError(f"algorithm must be 'auto' or one of {names}, got {algorithm!r}")
    if not isinstance(algorithm, Algorithm) or isinstance(algorithm, type):
        raise ConvTypeError(f"algorithm must be a name or an Algorithm, got {algorithm!r}")
    if type(algorithm).__hash__ is None:
        raise ConvTypeError(f"algorithm {algorithm.name!r} is not hashable; make its class a dataclass(frozen=True)")
    return algorithm


def resolve(algorithm: Any, problem: ConvProblem) -> Algorithm | None:
    """As :func:`named`, for a problem that the algorithm must be able to serve.

    Raises:
        AlgorithmError: if it cannot, with its own reason and the names of those that can.
    """
    wish = named(algorithm)
    refusal = None if wish is None else wish.why_not(problem)
    if wish is not None and refusal is not None:
        able = ", ".join(a.name for a in ALGORITHMS if a.why_not(problem) is None)
        raise AlgorithmError(f"algorithm {wish.name!r} cannot serve this convolution: it {refusal}; these can: {able}")
    return wish


def choose(problem: ConvProblem, wish: Algorithm | None, platform: str, devices: int = 1) -> Algorithm:
    """``wish`` where it can serve the problem, else the plan's choice; in parts where it needs them.

    ``devices``: over how many XLA's partitioner may spread the arrays of the program."""
    device = replace(calibrated(platform), devices=devices)
    if wish is not None and wish.why_not(problem) is None:
        found = None if isinstance(wish, Exchanged | InParts | Widened) else _in_parts(wish, problem, device)
        return wish if found is None else found[0]
    return plan_given(problem, device, measured(problem, platform)).runner


def _candidate(algorithm: Algorithm, problem: ConvProblem, device: Device) -> Candidate:
    if device.vendor_default or not worth_exchanging(problem):
        return _as_posed(algorithm, problem, device)
    other = _as_posed(algorithm, exchanged(problem), device)
    if not has_holes(problem):
        posed = _as_posed(algorithm, problem, device)
        if _rank(posed) <= _rank(replace(other, time_ns=2 * (other.time_ns or 0))):
            return posed
    return other if other.runner is None else replace(other, runner=Exchanged(other.runner))


def _rank(candidate: Candidate) -> tuple[bool, bool, int]:
    """What can run first, then the faster."""
    return candidate.runner is None, candidate.refusal is not None, candidate.time_ns or 0


def _as_posed(algorithm: Algorithm, problem: ConvProblem, device: Device) -> Candidate:
    wide = not device.vendor_default and widened(problem) is not problem
    way = Widened(algorithm) if wide else algorithm
    refusal = way.why_not(problem)
    if refusal is not None:
        return Candidate(algorithm, None, None, refusal)
    sized = _sized(problem)
    cost = way.cost(sized, device)
    found = _in_parts(way, problem, device)
    limit = device.devices * device.workspace_limit
    if found is None or (found[0] is way and cost.workspace > limit):
        sizes = (f"{size / MiB:.3g} MiB" for size in (cost.workspace, limit))
        refusal = "needs {} of workspace, the limit is {}".format(*sizes)
        return Candidate(algorithm, cost, _time_ns(sized, cost, device), refusal)
    runner, cost = found
    refusal = _not_by_itself(algorithm, problem, cost)
    return Candidate(algorithm, cost, _time_ns(sized, cost, device), refusal, runner)


def _in_parts(way: Algorithm, problem: ConvProblem, device: Device) -> tuple[Algorithm, Cost] | None:
    """What runs, and its cost: ``way`` in as few parts as the limit admits or, where that is estimated to be faster, in
    as many as let the temporaries of one stay in a cache. None if no split keeps to the limit."""
    sized = _sized(problem)
    ways = [within(way, problem, device, device.workspace_limit)]
    if ways[0] is not None and device.cache and is_static(*problem.lhs_shape, *problem.rhs_shape):
        limits = (
            limit for limit in (4 * device.cache, 2 * device.cache, device.cache) if limit < device.workspace_limit
        )
        ways += (within(way, problem, device, limit) for limit in limits)
        ways.append(in_cache(way, problem, device))
    found = [
        (w, w.whole_cost(problem, device) if isinstance(w, InParts) else w.cost(sized, device))
        for w in dict.fromkeys(ways)
        if w is not None
    ]
    return min(found, key=lambda pair: _time_ns(sized, pair[1], device), default=None)


def _manner(runner: Algorithm | None) -> str:
    words = []
    while isinstance(runner, Exchanged | InParts | Widened):
        if isinstance(runner, InParts):
            words.append(f"in {runner.count} parts")
        else:
            words.append("operands exchanged" if isinstance(runner, Exchanged) else "in float32")
        runner = runner.inner
    return ", ".join(words)


def _not_by_itself(algorithm: Algorithm, problem: ConvProblem, cost: Cost) -> str | None:
    """Why the planner does not take what could serve."""
    if algorithm.accuracy == "loose":
        return "runs only when it is named: its error is larger than direct summation's"
    if algorithm.accuracy == "bounded" and lax.Precision.HIGHEST in _precisions(problem):
        return "is no direct summation, which precision HIGHEST asks for"
    if cost.unit != "conv" and isinstance(problem.precision, lax.DotAlgorithm | lax.DotAlgorithmPreset):
        return f"leaves {problem.precision} to XLA's convolution, which knows it on every platform"
    return None


def _precisions(problem: ConvProblem) -> tuple[Any, ...]:
    return problem.precision if isinstance(problem.precision, tuple) else (problem.precision,)


def _time_ns(problem: ConvProblem, cost: Cost, device: Device) -> int:
    """Arithmetic at its unit's rate, then memory, then launches. Threads divide the first alone: two moved what lies outside
    products and convolutions hardly faster than one. What is moved beyond the operands and the result are temporaries: if
    they stay in the cache, up to three times as fast."""
    rate = {"dot": device.dot, "conv": device.conv, "vector": device.vector, "fft": device.fft}[cost.unit]
    if cost.unit in ("dot", "vector") and problem.dtype.kind == "c":
        rate = rate // _COMPLEX + 1
    threads = min(device.threads, cost.threads or device.threads)
    arithmetic = 1000 * cost.flops // (rate * cost.efficiency * threads)
    moved, held, cache = cost.bytes, cost.workspace, device.cache
    if cache:
        once = min(moved, operand_bytes(problem))
        moved = once + (moved - once) * (held + cache) // (held + 3 * cache)
    return arithmetic + moved // device.bytes_per_ns + cost.kernels * device.launch_ns


def _with_measurement(candidate: Candidate, found: int | str | None) -> Candidate:
    if isinstance(found, str) and candidate.refusal is None:
        return replace(candidate, refusal=f"failed when it was timed: {found}")
    return replace(candidate, measured_ns=found) if isinstance(found, int) else candidate


def _sized(problem: ConvProblem) -> ConvProblem:
    """The problem with a guess in place of every symbolic size, for the cost model only."""
    if is_static(*problem.lhs_shape, *problem.rhs_shape):
        return problem

    def guess(shape: tuple[Any, ...]) -> tuple[int, ...]:
        return tuple(d if is_static(d) else _BATCH_GUESS for d in shape)

    return problem.replace(lhs_shape=guess(problem.lhs_shape), rhs_shape=guess(problem.rhs_shape))


def _time(ns: int) -> str:
    return f"{ns / 1e6:.3g} ms" if ns >= 100_000 else f"{ns / 1e3:.3g} us"
