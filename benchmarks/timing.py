"""The clock: pinned cores, interleaved medians, and what the machine can do at best.

One thread (1T): one pinned core and the process's CPU time, which other processes do not lengthen.
Two threads (2T): two pinned cores and wall time, since only that says what a second core is worth.
"""

from __future__ import annotations

import os
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax

torch: Any
try:
    import torch
except ModuleNotFoundError:  # models.py needs none
    torch = None

# Named in the results, so that what is timed otherwise is not mixed with them.
CLOCKS = {1: "process CPU time, after a call", 2: "wall time, after a call"}
STAT = Path("/proc/stat")
_LEAST_SAMPLE = 2e-3
_MOST_REPEATS = 50


@dataclass(frozen=True)
class Timer:
    """How one process measures.

    Attributes:
        threads: 1 or 2.
        runs: interleaved samples of each program.
        budget: seconds for all programs that are timed against each other; a slow one runs less often.
    """

    threads: int
    runs: int
    budget: float

    def pin(self) -> None:
        """Binds the process to its cores. JAX and torch make their threads at the first use, which is later."""
        cores = sorted(os.sched_getaffinity(0))
        if len(cores) < self.threads:
            raise SystemExit(f"--threads {self.threads} needs as many cores, this process may use {len(cores)}")
        os.sched_setaffinity(0, cores[: self.threads])
        if torch is not None:
            torch.set_num_threads(self.threads)
            torch.set_num_interop_threads(1)

    def now(self) -> float:
        return time.process_time() if self.threads == 1 else time.perf_counter()

    def once(self, program: Callable[[], Any]) -> float:
        """Seconds of one call."""
        start = self.now()
        program()
        return self.now() - start

    def medians(
        self, programs: dict[str, Callable[[], Any]], first: Mapping[str, float] = MappingProxyType({})
    ) -> dict[str, dict[str, Any]]:
        """For each program the median in milliseconds, the quartiles, and how many samples there were.

        Each program runs once to warm up and once to see how long it takes; then all take turns, in another
        order each time, since who runs before leaves the caches as they are. A sample is as many calls as fill
        two milliseconds, after one that is not timed: a step follows a step, and where a virtual machine's host takes
        back what lies free, fetching it again took 3.5 s of a step of 1.5 s. One that takes longer than a quarter of
        the budget is not run again: its first call is its time. ``first``: seconds of first calls that were made
        already.
        """
        samples: dict[str, list[float]] = {name: [] for name in programs}
        repeats, rounds = {}, {}
        for name, program in programs.items():
            warm = first[name] if name in first else self.once(program)
            if warm > self.budget / 4:
                samples[name], rounds[name], repeats[name] = [warm], 0, 1
                continue
            second = max(self.once(program), 1e-7)
            repeats[name] = max(1, min(_MOST_REPEATS, int(_LEAST_SAMPLE / second)))
            share = self.budget / len(programs)
            rounds[name] = max(1, min(self.runs, int(share / (second * (repeats[name] + 1)))))
        order, shuffled = list(programs), random.Random(0)
        for turn in range(self.runs):
            shuffled.shuffle(order)
            for name in order:
                program = programs[name]
                if turn < rounds[name]:
                    count = repeats[name]
                    program()
                    samples[name].append(self.once(lambda p=program, n=count: [p() for _ in range(n)]) / count)
        return {name: _summary(values) for name, values in samples.items()}


class Bystanders:
    """How much of the machine everyone else used since this was made."""

    def __init__(self) -> None:
        self.start = self._now()

    def cores(self) -> float | None:
        """The cores' worth of other processes and of a hypervisor's theft; None where /proc does not tell."""
        wall, own, busy = (after - before for after, before in zip(self._now(), self.start, strict=True))
        return round(max(0.0, (busy - own) / wall), 2) if STAT.exists() else None

    def _now(self) -> tuple[float, float, float]:
        busy = 0.0
        if STAT.exists():
            user, nice, system, _, _, irq, softirq, steal = map(int, STAT.read_text().split()[1:9])
            busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
        return time.perf_counter(), time.process_time(), busy


def _summary(seconds: list[float]) -> dict[str, Any]:
    ordered = sorted(1e3 * s for s in seconds)
    quarter = len(ordered) // 4
    return {
        "ms": statistics.median(ordered),
        "quartiles": [ordered[quarter], ordered[-1 - quarter]],
        "samples": len(ordered),
    }


def roofline(timer: Timer) -> dict[str, float]:
    """GFLOP/s of a float32 matrix product of 1024 (the better of XLA's and torch's) and GB/s of a + b into c,
    arrays of 128 MB that are written before: no cache holds them and no page is new."""
    a = jax.random.normal(jax.random.key(0), (1024, 1024))
    product = jax.jit(lambda a, b: a @ b).lower(a, a).compile()
    m = torch.randn(1024, 1024)
    into = torch.empty_like(m)
    x, y, z = (torch.ones(32 << 20) for _ in range(3))
    times = timer.medians(
        {
            "xla": lambda: product(a, a).block_until_ready(),
            "torch": lambda: torch.mm(m, m, out=into),
            "stream": lambda: torch.add(x, y, out=z),
        }
    )
    fastest = min(times["xla"]["ms"], times["torch"]["ms"])
    return {"gflops": 2 * 1024**3 / fastest / 1e6, "gbytes": 3 * x.nbytes / times["stream"]["ms"] / 1e6}
