"""Times jconv's choice and each algorithm against lax, problem by problem, in three directions.

    python benchmarks/algorithms.py [--only REGEX] [--runs N] [--limit MACS] [--json FILE]

The metric: one pinned core, process CPU time, medians of interleaved runs, float32, channel-last. lax
runs with the same layout. Layout conversions are outside the timed region on all sides.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # before JAX makes its threads

import jax  # noqa: E402
import numpy as np  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import track  # noqa: E402
from rich.table import Table  # noqa: E402

from jconv import ALGORITHMS, ConvProblem  # noqa: E402
from jconv.adjoint import input_problem, weight_problem  # noqa: E402
from jconv.convolve import convolve  # noqa: E402
from jconv.planner import plan  # noqa: E402

PROBLEMS = Path(__file__).with_name("conv_problems.json")
LAYOUTS = {1: ("NWC", "WIO", "NWC"), 2: ("NHWC", "HWIO", "NHWC"), 3: ("NDHWC", "DHWIO", "NDHWC")}
DIRECTIONS: dict[str, Callable[[ConvProblem], ConvProblem]] = {
    "forward": lambda p: p,
    "d/dlhs": input_problem,
    "d/drhs": weight_problem,
}


def problem_of(row: dict[str, Any]) -> ConvProblem:
    """A row of the file as the forward problem of a channel-last convolution."""
    axes = "dhw"[3 - row["nd"] :]
    size, out, window, stride, dilation = ([row[f"{k}{a}"] for a in axes] for k in ("i", "o", "k", "s", "d"))
    pads = [(row[f"p{a}"], row[f"pr{a}"]) for a in axes]
    extent = [(k - 1) * d + 1 for k, d in zip(window, dilation, strict=True)]
    rhs = jax.ShapeDtypeStruct((*window, row["ic"] // row["g"], row["oc"]), np.float32)
    lhs = jax.ShapeDtypeStruct((row["mb"], *size, row["ic"]), np.float32)
    if not row["deconv"]:
        return ConvProblem.of(lhs, rhs, stride, pads, None, dilation, LAYOUTS[row["nd"]], row["g"])
    pads = [
        (r - 1 - lo, o - 1 - (i - 1) * s + lo)
        for r, (lo, _), o, i, s in zip(extent, pads, out, size, stride, strict=True)
    ]
    return ConvProblem.of(lhs, rhs, (1,) * row["nd"], pads, stride, dilation, LAYOUTS[row["nd"]], row["g"])


def kind_of(p: ConvProblem) -> str:
    if p.spatial_rank != 2:
        return f"{p.spatial_rank}-D"
    if p.is_depthwise:
        return "depthwise"
    if p.groups > 1:
        return "grouped"
    if any(d > 1 for d in p.lhs_dilation):
        return "transposed"
    return "1x1" if p.is_pointwise else "strided" if max(p.strides) > 1 else "dense"


def compiled(problem: ConvProblem, algorithm: Any) -> Callable[[], Any]:
    rng = np.random.default_rng(0)
    shapes = [
        tuple(shape[spec.index(a)] for a in range(len(shape)))
        for shape, spec in ((problem.lhs_shape, problem.layout.lhs_spec), (problem.rhs_shape, problem.layout.rhs_spec))
    ]
    operands = [jax.device_put(rng.standard_normal(shape, np.float32)) for shape in shapes]
    program = jax.jit(lambda x, w: convolve(x, w, problem, algorithm)).lower(*operands).compile()
    return lambda: program(*operands).block_until_ready()


def medians(programs: dict[str, Callable[[], Any]], runs: int) -> dict[str, float]:
    """Milliseconds of process CPU time; each program first warms up twice, then all take turns."""
    repeats = {}
    for name, program in programs.items():
        program()
        start = time.process_time()
        program()
        repeats[name] = max(1, min(50, int(2e-3 / max(time.process_time() - start, 1e-6))))
    times: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(runs):
        for name, program in programs.items():
            start = time.process_time()
            for _ in range(repeats[name]):
                program()
            times[name].append(1e3 * (time.process_time() - start) / repeats[name])
    return {name: statistics.median(t) for name, t in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a regular expression that the problem's name must match")
    parser.add_argument("--runs", type=int, default=7, help="interleaved runs of each program")
    parser.add_argument("--limit", type=float, default=3e8, help="multiply-adds above which a problem is left out")
    parser.add_argument("--json", type=Path, help="write every measurement here")
    options = parser.parse_args()
    console = Console()
    rows = [
        r for r in json.loads(PROBLEMS.read_text()) if re.search(options.only, r["name"]) and r["macs"] <= options.limit
    ]
    if not rows:
        sys.exit(f"no problem matches --only {options.only!r} below --limit {options.limit:g} multiply-adds")
    results = []
    for row in track(rows, "timing", console=Console(stderr=True)):
        forward = problem_of(row)
        for direction, of in DIRECTIONS.items():
            problem = of(forward)
            able = [a for a in ALGORITHMS if a.why_not(problem) is None]
            times = medians({a.name: compiled(problem, a) for a in able}, options.runs)
            chosen = plan(problem, "cpu").algorithm.name
            results.append(
                {
                    "problem": row["name"],
                    "kind": kind_of(forward),
                    "direction": direction,
                    "chosen": chosen,
                    "ms": times,
                }
            )
        jax.clear_caches()

    names = [a.name for a in ALGORITHMS]
    table = Table("problem", "kind", "direction", *names, "chosen", "lax / chosen", "best / chosen")
    for r in results:
        ms = r["ms"]
        cells = [f"{ms[n]:.3f}" if n in ms else "" for n in names]
        speed, regret = ms["xla"] / ms[r["chosen"]], min(ms.values()) / ms[r["chosen"]]
        table.add_row(r["problem"], r["kind"], r["direction"], *cells, r["chosen"], f"{speed:.2f}", f"{regret:.2f}")
    console.print(table)
    summary = Table("kind", "direction", "problems", "lax / chosen, geometric mean", "worst", title="Summary")
    for key in sorted({(r["kind"], r["direction"]) for r in results}):
        ratios = [r["ms"]["xla"] / r["ms"][r["chosen"]] for r in results if (r["kind"], r["direction"]) == key]
        mean = math.exp(statistics.fmean(map(math.log, ratios)))
        summary.add_row(*key, str(len(ratios)), f"{mean:.2f}", f"{min(ratios):.2f}")
    console.print(summary)
    if options.json:
        options.json.write_text(json.dumps({"jax": jax.__version__, "threads": 1, "results": results}, indent=1))


if __name__ == "__main__":
    main()
