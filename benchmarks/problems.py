"""Times real-world convolutions: jconv's choice and each algorithm, lax, and torch, in three directions.

    python benchmarks/problems.py [--threads 1|2] [--only REGEX] [--limit MACS] [--dtype NAME] [--quick] [--again]

Without --threads it runs twice, in a process for 1T (one pinned core, process CPU time) and one for 2T (two
cores, wall time). All contenders of a problem share one process and one set of values, and take turns.

What is inside the timed region, and what is not:

- jconv runs channel-last. A gradient is `input_gradient` or `weight_gradient`, kernel reversal included.
- lax runs channel-last and channel-first, each with operands that already lie so; the report takes the faster.
  A gradient is what `jax.vjp` gives of `lax.conv_general_dilated`, for the one operand, compiled.
- torch runs in contiguous and in channels_last memory format, operands, kernel and output gradient already in
  it; the report takes the faster. A gradient is `aten.convolution_backward` with the one output. Where torch
  has no padding that gives the output's shape, `F.pad` is inside.
- A transposed convolution gets its kernel in each library's own form; the conversion is outside.
- A gradient of complex numbers is the bilinear map, nothing conjugated, as in JAX. torch's kernels take real ones only.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ledger
import numpy as np
import timing
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from jconv import ALGORITHMS, Algorithm, ConvProblem, Plan, tuning
from jconv.adjoint import input_problem, weight_problem
from jconv.algorithms.base import inverse, lax_convolution
from jconv.convolve import convolve, input_gradient, weight_gradient
from jconv.planner import plan
from jconv.problem import Layout

PROBLEMS = Path(__file__).with_name("conv_problems.json")
DTYPES = ("float32", "bfloat16", "float16", "float64", "complex64")
FORWARD, TO_INPUT, TO_KERNEL = DIRECTIONS = ("forward", "input gradient", "kernel gradient")
GIVEN = {FORWARD: ("lhs", "rhs"), TO_INPUT: ("grad", "rhs"), TO_KERNEL: ("lhs", "grad")}
TORCH_FORMATS = {
    1: {"contiguous": torch.contiguous_format},
    2: {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last},
    3: {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last_3d},
}
QUICK_LIMIT = 3e7
MOST_BYTES = 1e9
HOPELESS, NOT_SHORT_NS = 20, 5_000_000


@dataclass(frozen=True)
class Problem:
    """A row of the file: the forward problem, channel-last, and whether it is a transposed convolution's."""

    name: str
    kind: str
    forward: ConvProblem
    transposed: bool

    def facing(self, direction: str) -> ConvProblem:
        """The problem that jconv's planner sees in this direction."""
        return {FORWARD: lambda p: p, TO_INPUT: input_problem, TO_KERNEL: weight_problem}[direction](self.forward)

    @property
    def bytes(self) -> int:
        """Both operands and the result, each once; the same in every direction."""
        p = self.forward
        return (prod(p.lhs_shape) + prod(p.rhs_shape) + prod(p.output_shape)) * p.dtype.itemsize


@dataclass(frozen=True)
class Contender:
    """A program without arguments left to give.

    Attributes:
        run: one call, its result awaited.
        value: what a call gave, as float64 or complex128 in logical order.
        compile_s: seconds that XLA took, on the clock of the run.
        temp_bytes: XLA's temporaries.
    """

    run: Callable[[], Any]
    value: Callable[[Any], np.ndarray]
    compile_s: float | None = None
    temp_bytes: int | None = None


def all_problems(dtype: str = "float32") -> list[Problem]:
    """The file's rows. Where a name is missing its source stands in; equal names are told apart by geometry."""
    rows = json.loads(PROBLEMS.read_text())
    names = [r["name"] or r["source"].rpartition("shapes_")[2] for r in rows]
    found = []
    for row, name in zip(rows, names, strict=True):
        p = tuning.problem_of(row, tuning.dtype_of(dtype))
        unique = name if row["name"] and names.count(name) == 1 else f"{name}:{_geometry(p)}"
        found.append(Problem(unique, kind_of(row), p, row["deconv"]))
    return found


def kind_of(row: dict[str, Any]) -> str:
    """The class under which a row is summed up; a row belongs to the first that fits."""
    axes = "dhw"[3 - row["nd"] :]
    window = {row[f"k{a}"] for a in axes}
    if row["deconv"]:
        return "transposed"
    if row["nd"] != 2:
        return f"{row['nd']}-D"
    if row["g"] > 1:
        return "depthwise" if row["g"] == row["ic"] else "grouped"
    if window == {1}:
        return "1x1"
    if any(row[f"s{a}"] > 1 for a in axes):
        return "strided"
    return "dense 3x3" if window == {3} else "dense other"


def _geometry(p: ConvProblem) -> str:
    shapes = ("x".join(map(str, shape)) for shape in (p.lhs_shape, p.rhs_shape))
    return "*".join(shapes)


class Operands:
    """lhs, kernel and output gradient, the same values for every contender.

    Attributes:
        values: by name ("lhs", "rhs", "grad") in logical order, float32 or complex64, rounded to the problem's dtype.
    """

    def __init__(self, p: ConvProblem):
        rng = np.random.default_rng(0)
        shapes = {"lhs": p.lhs_shape, "rhs": p.rhs_shape, "grad": p.output_shape}
        self.dtype = p.dtype
        self.values = {name: self._drawn(rng, shape) for name, shape in shapes.items()}
        self._placed: dict[tuple[str, tuple[int, ...]], jax.Array] = {}

    def _drawn(self, rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        drawn = rng.standard_normal(shape, np.float32)
        if self.dtype.kind == "c":
            return drawn + 1j * rng.standard_normal(shape, np.float32)
        return drawn.astype(self.dtype).astype(np.float32)

    def taken(self, parts: dict[str, Callable[[np.ndarray], np.ndarray]]) -> Operands:
        """The real parts of the operands, or what ``parts`` takes of those that it names."""
        other = copy.copy(self)
        other.values = {
            name: np.ascontiguousarray(parts.get(name, np.real)(value)) for name, value in self.values.items()
        }
        return other

    def placed(self, name: str, spec: Sequence[int]) -> jax.Array:
        """The array for JAX in the layout ``spec``; made once, and shared by all who want that layout."""
        key = (name, tuple(spec))
        if key not in self._placed:
            array = np.ascontiguousarray(self.values[name].transpose(inverse(spec)))
            self._placed[key] = jax.device_put(array.astype(self.dtype))
        return self._placed[key]


def jconv_contender(
    timer: timing.Timer, problem: Problem, direction: str, algorithm: Algorithm, values: Operands
) -> Contender:
    p = problem.forward
    call = {FORWARD: convolve, TO_INPUT: input_gradient, TO_KERNEL: weight_gradient}[direction]
    return _compiled(timer, p, direction, lambda a, b: call(a, b, p, algorithm), values)


def lax_contender(
    timer: timing.Timer, problem: Problem, direction: str, channel_last: bool, values: Operands
) -> Contender:
    p = problem.forward
    if not channel_last:
        order = tuple(range(p.spatial_rank + 2))
        p = p.replace(layout=Layout(order, order, order))
    lhs, rhs = (
        jax.ShapeDtypeStruct(tuple(shape[i] for i in inverse(spec)), p.dtype)
        for shape, spec in ((p.lhs_shape, p.layout.lhs_spec), (p.rhs_shape, p.layout.rhs_spec))
    )

    def to_input(grad: jax.Array, w: jax.Array) -> jax.Array:
        return jax.vjp(lambda x: lax_convolution(p, x, w), jnp.zeros(lhs.shape, lhs.dtype))[1](grad)[0]

    def to_kernel(x: jax.Array, grad: jax.Array) -> jax.Array:
        return jax.vjp(lambda w: lax_convolution(p, x, w), jnp.zeros(rhs.shape, rhs.dtype))[1](grad)[0]

    call = {FORWARD: lambda x, w: lax_convolution(p, x, w), TO_INPUT: to_input, TO_KERNEL: to_kernel}[direction]
    return _compiled(timer, p, direction, call, values)


def _compiled(
    timer: timing.Timer, p: ConvProblem, direction: str, call: Callable[..., jax.Array], values: Operands
) -> Contender:
    specs: dict[str, Sequence[int]] = {"lhs": p.layout.lhs_spec, "rhs": p.layout.rhs_spec, "grad": p.layout.out_spec}
    (spec,) = (spec for name, spec in specs.items() if name not in GIVEN[direction])
    arrays = [values.placed(name, specs[name]) for name in GIVEN[direction]]
    start = timer.now()
    program = jax.jit(call).lower(*arrays).compile()
    compile_s = timer.now() - start
    memory = program.memory_analysis()
    return Contender(
        run=lambda: program(*arrays).block_until_ready(),
        value=lambda out: np.asarray(out).astype(_exact_dtype(p)).transpose(spec),
        compile_s=compile_s,
        temp_bytes=None if memory is None else memory.temp_size_in_bytes,
    )


def torch_contender(
    problem: Problem, direction: str, memory_format: torch.memory_format, dtype: torch.dtype, values: Operands
) -> Contender:
    p = problem.forward
    x, w, g = (torch.from_numpy(values.values[name]).to(dtype) for name in ("lhs", "rhs", "grad"))
    if problem.transposed:
        w = _torch_kernel(p, w)
    x, w, g = (t.contiguous(memory_format=memory_format) for t in (x, w, g))
    pads, stride, padding, output_padding = _torch_geometry(problem)
    geometry = (stride, padding, p.rhs_dilation, problem.transposed, output_padding, p.groups)
    mask = [direction == TO_INPUT, direction == TO_KERNEL, False]

    @torch.inference_mode()
    def run() -> torch.Tensor:
        padded = torch.nn.functional.pad(x, pads) if pads else x
        if direction == FORWARD:
            return torch.convolution(padded, w, None, *geometry)
        found = torch.ops.aten.convolution_backward(g, padded, w, None, *geometry, mask)
        if direction == TO_KERNEL:
            return found[1]
        return torch.nn.functional.pad(found[0], [-side for side in pads]) if pads else found[0]

    def value(out: torch.Tensor) -> np.ndarray:
        out = out.to(torch.float64)
        if direction == TO_KERNEL and problem.transposed:
            out = _logical_kernel(p, out)
        return out.numpy()

    return Contender(run, value)


def _torch_geometry(problem: Problem) -> tuple[list[int], tuple[int, ...], list[int], list[int]]:
    """What F.pad must do first (nothing, if the list is empty), stride, padding and output padding."""
    p = problem.forward
    n, out, size = p.spatial_rank, p.output_shape[2:], p.lhs_shape[2:]
    low = [lo for lo, _ in p.padding]
    if problem.transposed:
        padding = [r - 1 - lo for r, lo in zip(p.rhs_extent, low, strict=True)]
        extra = [
            o - (i - 1) * s + 2 * lo - r
            for o, i, s, lo, r in zip(out, size, p.lhs_dilation, padding, p.rhs_extent, strict=True)
        ]
        return [], p.lhs_dilation, padding, extra
    fits = all(
        (i + 2 * lo - r) // s + 1 == o for i, lo, r, s, o in zip(size, low, p.rhs_extent, p.strides, out, strict=True)
    )
    if fits:
        return [], p.strides, low, [0] * n
    return [side for pair in reversed(p.padding) for side in pair], p.strides, [0] * n, [0] * n


def _torch_kernel(p: ConvProblem, w: torch.Tensor) -> torch.Tensor:
    """(out, in / groups, *window) as torch's (in, out / groups, *window), reversed."""
    out, inner, *window = w.shape
    grouped = w.reshape(p.groups, out // p.groups, inner, *window).transpose(1, 2)
    return grouped.reshape(p.groups * inner, out // p.groups, *window).flip(tuple(range(2, w.ndim)))


def _logical_kernel(p: ConvProblem, w: torch.Tensor) -> torch.Tensor:
    """The inverse of :func:`_torch_kernel`."""
    features, inner, *window = w.shape
    grouped = w.reshape(p.groups, features // p.groups, inner, *window).transpose(1, 2)
    return grouped.reshape(p.groups * inner, features // p.groups, *window).flip(tuple(range(2, w.ndim)))


def contenders(
    timer: timing.Timer, problem: Problem, direction: str, values: Operands
) -> tuple[Plan, dict[str, Contender], dict[str, str]]:
    """The plan, whoever can serve, and why others were left out."""
    p = problem.forward
    chosen = plan(problem.facing(direction), "cpu")
    best = min(c.time_ns for c in chosen.candidates if c.refusal is None and c.time_ns is not None)
    found: dict[str, Contender] = {}
    left_out: dict[str, str] = {}
    for algorithm, candidate in zip(ALGORITHMS, chosen.candidates, strict=True):
        if candidate.refusal is not None or candidate.time_ns is None:
            left_out[algorithm.name] = str(candidate.refusal)
        elif candidate.time_ns > max(HOPELESS * best, NOT_SHORT_NS) and algorithm.name != "xla":
            left_out[algorithm.name] = f"its estimate is {candidate.time_ns / best:.0f} times the best"
        else:
            found[algorithm.name] = jconv_contender(timer, problem, direction, candidate.runner or algorithm, values)
    for name, channel_last in (("channel-last", True), ("channel-first", False)):
        found[f"lax {name}"] = lax_contender(timer, problem, direction, channel_last, values)
    dtype = getattr(torch, p.dtype.name)
    for name, memory_format in TORCH_FORMATS[p.spatial_rank].items():
        if dtype.is_complex:
            left_out[f"torch {name}"] = "its kernels take real numbers only"
        else:
            found[f"torch {name}"] = torch_contender(problem, direction, memory_format, dtype, values)
    return chosen, found, left_out


def _exact_dtype(p: ConvProblem) -> type[np.generic]:
    return np.complex128 if p.dtype.kind == "c" else np.float64


def exact(problem: Problem, direction: str, values: Operands) -> np.ndarray:
    """torch's result in float64; of complex operands, from the products of their parts."""

    def of(values: Operands) -> np.ndarray:
        contender = torch_contender(problem, direction, torch.contiguous_format, torch.float64, values)
        return contender.value(contender.run())

    if values.dtype.kind != "c":
        return of(values)
    first, second = GIVEN[direction]
    parts = ((np.real, 1), (np.imag, 1j))
    terms = [
        a * b * of(values.taken({first: of_first, second: of_second}))
        for (of_first, a), (of_second, b) in itertools.product(parts, parts)
    ]
    return np.sum(terms, axis=0)


def measure(timer: timing.Timer, problem: Problem, direction: str) -> dict[str, Any]:
    """One row of the results."""
    values = Operands(problem.forward)
    wanted = exact(problem, direction, values)
    chosen, found, left_out = contenders(timer, problem, direction, values)
    largest = np.abs(wanted).max()
    errors, first = {}, {}
    for name, contender in found.items():
        start = timer.now()
        out = contender.run()
        first[name] = timer.now() - start
        errors[name] = float(np.abs(contender.value(out) - wanted).max() / largest)
    others = timing.Bystanders()
    times = timer.medians({name: c.run for name, c in found.items()}, first)
    return {
        "problem": problem.name,
        "class": problem.kind,
        "direction": direction,
        "geometry": str(problem.forward),
        "flops": 2 * problem.forward.macs * (4 if values.dtype.kind == "c" else 1),
        "bytes": problem.bytes,
        "chosen": chosen.algorithm.name,
        "contenders": {
            name: times[name] | {"error": errors[name], "compile_s": c.compile_s, "temp_bytes": c.temp_bytes}
            for name, c in found.items()
        },
        "left_out": left_out,
        "others": others.cores(),
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, choices=(1, 2), help="by default 1, then 2 in a process of its own")
    parser.add_argument("--only", default="", help="a regular expression that the problem's name or class must match")
    parser.add_argument("--limit", type=float, help="multiply-adds above which a problem is left out")
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--runs", type=int, default=7, help="interleaved samples of each contender")
    parser.add_argument("--budget", type=float, default=10, help="seconds for one problem and direction")
    parser.add_argument("--quick", action="store_true", help="1T, small problems, few samples, a folder of its own")
    parser.add_argument("--again", action="store_true", help="measure again what is there")
    parser.add_argument("--output", type=Path, help=f"by default {ledger.RESULTS.name}/, with --quick its quick/")
    return parser.parse_args()


def main() -> None:
    options = parse()
    if options.threads is None:
        for threads in (1,) if options.quick else (1, 2):
            status = subprocess.run([sys.executable, *sys.argv, "--threads", str(threads)]).returncode
            if status:
                sys.exit(status)
        return
    if options.quick:
        options.limit, options.runs, options.budget = options.limit or QUICK_LIMIT, 3, 0.5
    timer = timing.Timer(options.threads, options.runs, options.budget)
    timer.pin()
    if options.dtype == "float64":
        jax.config.update("jax_enable_x64", True)
    folder = options.output or (ledger.RESULTS / "quick" if options.quick else ledger.RESULTS)
    clock = timing.CLOCKS[options.threads]
    try:
        book = ledger.Ledger(
            folder / f"problems-{options.dtype}-{options.threads}t.json",
            ledger.conditions("problems", options.threads, clock, options.dtype, options.quick),
        )
    except ledger.Unlike as error:
        sys.exit(f"problems: {error}")
    wanted = [p for p in all_problems(options.dtype) if any(re.search(options.only, s) for s in (p.name, p.kind))]
    wanted = [p for p in wanted if options.limit is None or p.forward.macs <= options.limit]
    console = Console(stderr=True)
    if not wanted:
        console.print(f"no problem matches --only {options.only!r} within --limit {options.limit}")
        return
    roof, before = timing.roofline(timer), book.data.get("roofline", {})
    book.data["roofline"] = {name: max(value, before.get(name, 0)) for name, value in roof.items()}  # the best seen
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("problems", total=len(wanted))
        for problem in wanted:
            progress.update(task, description=f"{options.threads}T {problem.name}")
            if problem.bytes > MOST_BYTES:
                reason = f"operands and result are {problem.bytes / 1e9:.1f} GB, the bound is {MOST_BYTES / 1e9:g}"
                book.data.setdefault("left_out", {})[problem.name] = reason
            else:
                for direction in DIRECTIONS:
                    key = f"{problem.name}|{direction}"
                    if options.again or not book.has(key):
                        book.add(key, measure(timer, problem, direction))
                jax.clear_caches()
            progress.advance(task)
    book.save()
    console.print(f"{len(book.data['rows'])} rows in {book.path}", soft_wrap=True)


if __name__ == "__main__":
    main()
