"""What runs in a program: each of its convolutions, where it is written, what the planner takes, and what that saves.

``jconv.explain(fn, *args)`` is the door. Nothing runs: the program is traced, and each convolution planned.
"""

from __future__ import annotations

import functools
import html
import inspect
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import lax

from jconv import __version__, store
from jconv.adjoint import input_problem, weight_problem
from jconv.algorithms.base import Algorithm
from jconv.convolve import conv_p
from jconv.errors import ConvError
from jconv.planner import Candidate, Plan, plan, platform_named
from jconv.printing import aligned, new_figure, number, save, sizes
from jconv.problem import ConvProblem, is_static
from jconv.rewrite import Step, needed, problem_of, program_of, steps_of

__all__ = ["Place", "Report", "Row", "explain", "macs"]

_WIDTH = 100
_MOST_BARS = 30
_Bar = tuple[str, float, float]  # label, milliseconds of lax and of jconv


class Place(NamedTuple):
    """Where a convolution is written.

    Attributes:
        layer: the named scopes around it (Linen's modules are scopes), else the class whose method calls it and the
            layer's class, else the function.
        file, line: of the innermost call that is neither JAX's, Flax's nor jconv's; None where there is none.
    """

    layer: str
    file: str | None
    line: int | None

    @property
    def source(self) -> str:
        """The file's name and the line."""
        return "" if self.file is None else f"{os.path.basename(self.file)}:{self.line}"

    def __str__(self) -> str:
        return f"{self.layer} ({self.source})" if self.source else self.layer


@dataclass(frozen=True)
class Row:
    """A convolution of the program: all that pose the same problem in the same place.

    Attributes:
        place: where it is written.
        direction: ``"forward"``, ``"input gradient"`` or ``"kernel gradient"``.
        plan: every candidate with its cost, its time, or why it was refused.
        wish: the algorithm that the caller named, or None.
        runs: how often it runs, the lengths of scans counted.
        in_while: True inside a ``while``, of which one turn is counted.
        is_lax: True for ``jax.lax``'s convolution, which takes the plan's choice under :func:`jconv.accelerate`.
    """

    place: Place
    direction: str
    plan: Plan
    wish: Algorithm | None
    runs: int
    in_while: bool
    is_lax: bool

    @property
    def problem(self) -> ConvProblem:
        return self.plan.problem

    @property
    def algorithm(self) -> Algorithm:
        """The one that was named, where it can serve, else the plan's choice."""
        return self.wish if self._named else self.plan.algorithm  # pyright: ignore[reportReturnType]

    @property
    def reason(self) -> str:
        return "named by the caller" if self._named else self.plan.reason

    @property
    def macs(self) -> int:
        """Multiply-adds of one run, as :func:`macs` counts them."""
        return macs(self.problem)

    @property
    def candidate(self) -> Candidate | None:
        """The plan's row of the algorithm; None for a caller's own."""
        return next((c for c in self.plan.candidates if c.algorithm == self.algorithm), None)

    @property
    def lax(self) -> Candidate:
        """The plan's row of ``xla``, which is lax's convolution."""
        return self.plan.candidates[-1]

    @property
    def is_measured(self) -> bool:
        """True if both times are measured; else both are estimates, since only like can be compared."""
        return (
            self.lax.measured_ns is not None and self.candidate is not None and self.candidate.measured_ns is not None
        )

    @property
    def lax_ns(self) -> int | None:
        """Nanoseconds of all runs together as ``jax.lax`` runs it."""
        return self._time(self.lax)

    @property
    def jconv_ns(self) -> int | None:
        """Nanoseconds of all runs together by the algorithm; None for a caller's own."""
        return None if self.candidate is None else self._time(self.candidate)

    @property
    def workspace(self) -> int | None:
        """Bytes that the algorithm lays out beside operands and result."""
        cost = None if self.candidate is None else self.candidate.cost
        return None if cost is None else cost.workspace

    @property
    def runner_up(self) -> Candidate | None:
        """The fastest of the others that the planner would take."""
        others = [c for c in self.plan.candidates if c.refusal is None and c.algorithm != self.algorithm]
        measured = [c for c in others if c.measured_ns is not None] if self.is_measured else []
        return min(measured or others, key=lambda c: c.measured_ns if measured else c.time_ns or 0, default=None)  # pyright: ignore

    @property
    def refusals(self) -> dict[str, str]:
        """The algorithms that were refused, each with its reason."""
        return {c.algorithm.name: c.refusal for c in self.plan.candidates if c.refusal is not None}

    @property
    def _named(self) -> bool:
        return self.wish is not None and self.wish.why_not(self.problem) is None

    def _time(self, candidate: Candidate) -> int | None:
        found = candidate.measured_ns if self.is_measured else candidate.time_ns
        return None if found is None else found * self.runs

    def _json(self) -> dict[str, Any]:
        other = self.runner_up
        own = self.candidate
        return {
            **self.place._asdict(),
            "direction": self.direction,
            "problem": store.problem_to_json(self.problem),
            "text": str(self.problem),
            "is_lax": self.is_lax,
            "runs": self.runs,
            "in_while": self.in_while,
            "macs": self.macs,
            "algorithm": self.algorithm.name,
            "reason": self.reason,
            "estimate_ns": None if own is None else own.time_ns,
            "measured_ns": None if own is None else own.measured_ns,
            "lax_estimate_ns": self.lax.time_ns,
            "lax_measured_ns": self.lax.measured_ns,
            "workspace": self.workspace,
            "runner_up": None if other is None else other.algorithm.name,
            "runner_up_estimate_ns": None if other is None else other.time_ns,
            "runner_up_measured_ns": None if other is None else other.measured_ns,
            "refusals": self.refusals,
        }


@dataclass(frozen=True)
class Report:
    """What :func:`explain` found. ``print(report)`` shows it as text, ``rich.print(report)`` as rich's table, a notebook
    as HTML with each plan to unfold; ``print(report.rows[3].plan)`` shows all that was weighed for row 3.

    Attributes:
        program: the function's name.
        platform: that the plans are for.
        rows: by place, in the order of the program; each forward one before its gradients.
        others: convolutions that jconv cannot express and leaves to lax: (place, how often it runs).
        flops: of the whole program, as :func:`explain` counts them.
        conv_flops: of its convolutions.
    """

    program: str
    platform: str
    rows: tuple[Row, ...]
    others: tuple[tuple[Place, int], ...]
    flops: int
    conv_flops: int

    @property
    def runs(self) -> int:
        """How often the convolutions of all rows run."""
        return sum(row.runs for row in self.rows)

    @property
    def macs(self) -> int:
        """Multiply-adds of all runs."""
        return sum(row.macs * row.runs for row in self.rows)

    @property
    def share(self) -> float:
        """Of the program's flops, the part that is convolutions'."""
        return self.conv_flops / self.flops if self.flops else 0.0

    @property
    def lax_ns(self) -> int:
        """Nanoseconds of all convolutions as ``jax.lax`` runs them; those of a caller's own algorithm are left out."""
        return sum(row.lax_ns or 0 for row in self.rows if row.jconv_ns is not None)

    @property
    def jconv_ns(self) -> int:
        """Nanoseconds of all convolutions by their algorithms; those of a caller's own are left out."""
        return sum(row.jconv_ns or 0 for row in self.rows)

    def __str__(self) -> str:
        return "\n".join(line for line, _ in self._lines(_WIDTH))

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        """rich's table, with the columns that there is room for; or, where the terminal is narrower, lines by layer."""
        from rich import box
        from rich.table import Table
        from rich.text import Text

        columns = _fitting(_columns(self.rows, layers=True), options.max_width - 2, gap=2, least=1)
        if columns is None or not self.rows:
            yield from (Text(line, style="bold" if is_head else "") for line, is_head in self._lines(options.max_width))
            return
        table = Table(
            title=self._title(), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
        )
        for column in columns:
            table.add_column(Text(column.name), justify="left" if column.is_left else "right", no_wrap=True)
        for cells in zip(*(column.cells for column in columns), strict=True):
            table.add_row(*map(Text, cells))
        yield table
        yield from map(Text, self._notes())

    def _repr_html_(self) -> str:
        """A table for notebooks, each row's plan folded in the cell of its algorithm."""
        columns = _columns(self.rows, layers=True)
        align = ["left" if column.is_left else "right" for column in columns]
        heads = "".join(
            f'<th style="text-align:{side}">{html.escape(column.name)}</th>'
            for column, side in zip(columns, align, strict=True)
        )
        body = []
        for row, cells in zip(self.rows, zip(*(column.cells for column in columns), strict=True), strict=True):
            written = [html.escape(cell) for cell in cells]
            index = next(i for i, column in enumerate(columns) if column.name == "algorithm")
            written[index] = (
                f"<details><summary>{written[index]}</summary>"
                f'<pre style="text-align:left">{html.escape(str(row.plan))}</pre></details>'
            )
            body.append(
                "<tr>"
                + "".join(
                    f'<td style="text-align:{side};vertical-align:top">{cell}</td>'
                    for cell, side in zip(written, align, strict=True)
                )
                + "</tr>"
            )
        notes = "".join(f"<p>{html.escape(note)}</p>" for note in self._notes())
        return (
            f"<table><caption>{html.escape(self._title())}</caption><thead><tr>{heads}</tr></thead>"
            f"<tbody>{''.join(body)}</tbody></table>{notes}"
        )

    def to_json(self) -> str:
        """The report as a JSON object: totals, and a list of rows with the times of one run in nanoseconds, bytes of
        workspace, and every refusal."""
        place = store.here(self.platform)
        return json.dumps(
            {
                "program": self.program,
                "platform": self.platform,
                "device": None if place is None else place.device,
                "threads": self._threads(),
                "jax": jax.__version__,
                "jconv": __version__,
                "flops": self.flops,
                "conv_flops": self.conv_flops,
                "share": self.share,
                "runs": self.runs,
                "macs": self.macs,
                "lax_ns": self.lax_ns,
                "jconv_ns": self.jconv_ns,
                "rows": [row._json() for row in self.rows],
                "others": [{**found._asdict(), "runs": runs} for found, runs in self.others],
            },
            indent=1,
        )

    def plot(self, path: str | os.PathLike[str] | None = None) -> Any:
        """A bar chart of the time of each row, as lax runs it and as jconv does, the largest first.

        Args:
            path: where the picture is written, in the format that its ending names; None to write none.

        Returns:
            matplotlib's Figure. At most 30 rows have bars; the rest is summed in a line.

        Raises:
            ConvError: if matplotlib is not installed, if there is nothing to draw, or if the file cannot be written.
        """
        bars, rest = self._bars()
        if not bars:
            raise ConvError("plot needs a convolution whose time is known, and the program has none")
        labels, before, after = map(list, zip(*bars, strict=True))
        where = np.arange(len(bars))
        figure = new_figure(figsize=(10, 2 + 0.34 * (len(bars) + bool(rest))), layout="constrained")
        axes = figure.add_subplot()
        for offset, times, name, color in ((-0.2, before, "lax", "#b9c2cc"), (0.2, after, "jconv", "#3b6ea5")):
            drawn = axes.barh(where + offset, times, 0.38, label=name, color=color)
            axes.bar_label(drawn, [number(t) for t in times], padding=3, fontsize=7)
        if rest:
            labels.append(f"{len(rest)} others, together")
            _, of_lax, of_ours = map(list, zip(*rest, strict=True))
            sums = f"  {number(sum(of_lax))} ms with lax, {number(sum(of_ours))} ms with jconv"
            axes.text(0, len(bars), sums, va="center", fontsize=8)
        axes.set_yticks(range(len(labels)), labels, fontsize=8)
        axes.set_ylim(len(labels) - 0.4, -0.6)
        axes.set_xlim(0, 1.12 * max(*before, *after, 1e-9))
        axes.set_xlabel(f"ms, all runs together; {self._basis()}")
        axes.spines[["top", "right"]].set_visible(False)
        figure.legend(loc="outside upper right", ncols=2, frameon=False, fontsize=9)
        axes.set_title(_shortened(f"{self.program}: {self._speed()}", 90), fontsize=10, loc="left")
        if path is not None:
            save(figure, path)
        return figure

    def _bars(self) -> tuple[list[_Bar], list[_Bar]]:
        """The rows as bars, the largest first, and what is left beyond the most that a picture has."""
        bars = [
            (
                f"{_shortened(row.place.layer, 44)}, {row.direction}  {index}",
                (row.lax_ns or 0) / 1e6,
                row.jconv_ns / 1e6,
            )
            for index, row in enumerate(self.rows)
            if row.jconv_ns is not None
        ]
        bars.sort(key=lambda bar: -max(bar[1:]))
        most = _MOST_BARS if len(bars) > _MOST_BARS + 1 else len(bars)
        return bars[:most], bars[most:]

    def _title(self) -> str:
        place = store.here(self.platform)
        device = self.platform if place is None else place.device
        threads = self._threads()
        return f"{self.program} on {device}{f', threads {threads}' if threads else ''}, jax {jax.__version__}"

    def _threads(self) -> int | None:
        """Those that the plans are for; None where they have none to do with it."""
        return self.rows[0].plan.device.threads if self.rows and self.platform == "cpu" else None

    def _basis(self) -> str:
        measured = sum(row.is_measured for row in self.rows)
        if measured in (0, len(self.rows)):
            return "measured" if measured else "estimates"
        return f"{_count(measured, 'row')} measured, {len(self.rows) - measured} estimated"

    def _speed(self) -> str:
        lax_ms, ours = _milliseconds(self.lax_ns), _milliseconds(self.jconv_ns)
        ratio = f", {self.lax_ns / self.jconv_ns:.2f} times" if self.jconv_ns else ""
        return f"{lax_ms} ms with lax, {ours} ms with jconv{ratio}"

    def _lines(self, width: int) -> Iterator[tuple[str, bool]]:
        """The report's lines by layer; True for a title."""
        yield self._title(), True
        every = _columns(self.rows, layers=False)
        roomy = _fitting(every, width, gap=2)
        columns = roomy or _fitting(every, width, gap=1) or [column for column in every if not column.rank]
        gap = " " * (2 if roomy else 1)
        left = [index for index, column in enumerate(columns) if column.is_left]
        table = zip(*((column.name, *column.cells) for column in columns), strict=True)
        head, *texts = (gap + line for line in aligned(list(table), left, gap))
        if self.rows:
            yield head, False
        last = None
        for row, text in zip(self.rows, texts, strict=True):
            if row.place != last:
                yield str(row.place), True
                last = row.place
            yield text, False
        yield from ((note, False) for note in self._notes())

    def _notes(self) -> list[str]:
        if not self.rows and not self.others:
            return [f"{self.program} has no convolution of lax's or jconv's."]
        of_lax = sum(row.is_lax for row in self.rows)
        in_while = sum(row.in_while for row in self.rows)
        whose = "All" if of_lax == len(self.rows) else f"{of_lax} of {len(self.rows)}"
        return [
            f"{_count(len(self.rows), 'convolution')} in {_count(self.runs, 'run')}, {number(self.macs / 1e9)} GMAC: "
            f"{100 * self.share:.3g} % of the program's flops.",
            f"Together they take {self._speed()} ({self._basis()}).",
            *([f"{whose} are lax's: under jconv.accelerate they run as shown."] if of_lax else []),
            *([f"{in_while} marked + are inside a while loop, of which one turn is counted."] if in_while else []),
            *(f"{place} stays lax's: jconv cannot express it." for place, _ in self.others),
        ]


def explain(fn: Callable[..., Any], *args: Any, platform: str | None = None, **kwargs: Any) -> Report:
    """Each convolution of ``fn(*args, **kwargs)``: where it is, how often it runs, what jconv takes for it and why.

    ``fn`` is traced, as by :func:`jconv.accelerate`, and not run. Convolutions of lax's and of jconv's are found, inside
    ``jit``, ``scan``, ``cond`` and the like too, and those of gradients if ``fn`` computes them. Times are measured
    where :func:`jconv.tune` has measured, else the cost model's estimates. What runs under ``autodiff="custom_vjp"``
    is not seen, nor what no result needs: the gradient of a sum needs no convolution before it. A ``while`` counts one
    turn, a ``cond`` each branch once, a ``shard_map`` one device.

    Flops: two for each multiply-add of convolutions and of dot products; one for each element that an elementwise
    operation makes, that a reduction reads, that a window of a pooling covers; none for what only moves or converts. What else there is (an FFT, say) counts as
    elementwise.

    Args:
        fn: a function of arrays, ``jax.grad(loss)`` or a train step among them. An NNX module may be ``fn`` or an
            argument.
        args, kwargs: its arguments: pytrees of arrays or ``jax.ShapeDtypeStruct``s.
        platform: as in :func:`jconv.plan`.

    Returns:
        A :class:`Report`; print it, show it in a notebook, ``.plot("time.png")``, ``.to_json()``.

    Raises:
        ConvError: if ``fn`` cannot be traced with these arguments, in one sentence; if a size is a symbol.

    >>> x, w = jnp.ones((1, 8, 8, 3)), jnp.ones((3, 3, 3, 4))
    >>> numbers = ("NHWC", "HWIO", "NHWC")
    >>> loss = lambda w: jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=numbers).sum()
    >>> [(row.direction, row.runs, row.macs) for row in explain(jax.grad(loss), w).rows]
    [('kernel gradient', 1, 6912)]
    """
    name, where = _name(fn), platform_named(platform)
    if any(not is_static(*np.shape(leaf)) for leaf in jax.tree.leaves((args, kwargs)) if hasattr(leaf, "shape")):
        raise ConvError("explain needs sizes that are numbers, got symbolic ones; give each a value")
    try:
        program = program_of(fn, *args, **kwargs)
    except Exception as error:
        cause = error.__cause__ if isinstance(error.__cause__, jax.errors.ConcretizationTypeError) else error
        raise ConvError(
            f"{name} cannot be traced: {type(cause).__name__}: {str(cause).strip().partition(chr(10))[0][:300]}"
        ) from error
    made = _posed(steps_of(program))
    steps = list(steps_of(needed(program)))
    posed = _posed(steps)
    directions = _Directions(problem for step, problem in made if problem is not None and not step.transposed)
    rows: dict[Any, Row] = {}
    others: dict[Place, int] = {}
    places: dict[Place, int] = {}
    for step, problem in posed:
        place = _place(step)
        if problem is None:
            others[place] = others.get(place, 0) + step.runs
            continue
        family, direction = directions.of(problem, step.transposed)
        is_lax, wish = step.equation.primitive is not conv_p, step.equation.params.get("wish")
        order = places.setdefault(place, len(places)), family, DIRECTIONS.index(direction)
        key = (order, problem, wish, is_lax, step.in_while)
        before = rows[key].runs if key in rows else 0
        rows[key] = Row(place, direction, plan(problem, where), wish, before + step.runs, step.in_while, is_lax)
    ordered = [rows[key] for key in sorted(rows, key=lambda key: key[0])]
    flops = sum(_flops(step.equation) * step.runs for step in steps)
    conv_flops = sum(_flops(step.equation) * step.runs for step, _ in posed)
    return Report(name, where, tuple(ordered), tuple(others.items()), flops, conv_flops)


def macs(problem: ConvProblem) -> int:
    """Multiply-adds of direct summation: padding counts as data does, the holes of a dilated input do not.

    So the input gradient of a strided convolution counts as much as the convolution.

    >>> p = ConvProblem.of(jnp.ones((1, 3, 8, 8)), jnp.ones((4, 3, 2, 2)), (2, 2), "VALID")
    >>> macs(p), macs(input_problem(p)), macs(weight_problem(p))
    (768, 768, 768)
    """
    pairs = 1
    for out, taps, stride, holes, gap, (low, _) in zip(
        problem.output_shape[2:], problem.window, problem.strides, problem.rhs_dilation, problem.lhs_dilation,
        problem.padding, strict=True,
    ):  # fmt: skip
        if gap == 1:
            pairs *= out * taps
        else:
            starts = np.bincount((np.arange(out) * stride - low) % gap, minlength=gap)
            reached = np.bincount(-np.arange(taps) * holes % gap, minlength=gap)
            pairs *= int(starts @ reached)
    return pairs * prod(problem.output_shape[:2]) * problem.rhs_shape[1]


def _name(fn: Any) -> str:
    if isinstance(fn, functools.partial):
        return _name(fn.func)
    fn = inspect.unwrap(fn, stop=inspect.ismethod)
    name = getattr(fn, "__name__", None) or type(fn).__name__
    return f"{type(fn.__self__).__name__}.{name}" if inspect.ismethod(fn) else name


# Directions.

_CONVOLUTIONS = (conv_p, lax.conv_general_dilated_p)
DIRECTIONS = ("forward", "input gradient", "kernel gradient")


def _signature(problem: ConvProblem) -> tuple[Any, ...]:
    """What a gradient has in common whether lax derived it or jconv."""
    return problem.lhs_shape, problem.rhs_shape, problem.output_shape, problem.layout.lhs_spec[:2]


def _posed(steps: Iterable[Step]) -> list[tuple[Step, ConvProblem | None]]:
    """The convolutions among the steps, each with its problem where jconv can express it."""
    return [(step, problem_of(step.equation, step.turns)) for step in steps if step.equation.primitive in _CONVOLUTIONS]


class _Directions:
    """Tells what a convolution is to the forward ones of its program: its direction, and of which it is one."""

    def __init__(self, forwards: Iterable[ConvProblem]) -> None:
        self._forwards = {problem: index for index, problem in enumerate(dict.fromkeys(forwards))}
        self._gradients: dict[tuple[Any, ...], dict[str, int]] = {}
        for problem, index in self._forwards.items():
            for direction, adjoint in zip(DIRECTIONS[1:], (input_problem, weight_problem), strict=True):
                self._gradients.setdefault(_signature(adjoint(problem)), {}).setdefault(direction, index)

    def of(self, problem: ConvProblem, transposed: bool) -> tuple[int, str]:
        if not transposed:
            return self._forwards[problem], DIRECTIONS[0]
        found = self._gradients.get(_signature(problem), {})
        if not found and problem in self._forwards:  # run anew by a rule of custom_vjp
            return self._forwards[problem], DIRECTIONS[0]
        by_shape = DIRECTIONS[2] if problem.is_weight_gradient else DIRECTIONS[1]
        direction = next(iter(found)) if len(found) == 1 else by_shape
        return found.get(direction, len(self._forwards)), direction


# Places.


def _place(step: Step) -> Place:
    frames = step.frames
    index = next((i for i, (file, _, _) in enumerate(frames) if not _is_library(file)), None)
    file, line, function = (None, None, "") if index is None else frames[index]
    scopes = [scope for scope in step.scopes if scope != "jconv"]
    if scopes:
        return Place("/".join(scopes), file, line)
    layers = (_class_of(function) for file, _, function in frames[:index] if _holds_layers(file))
    layer = next((layer for layer in layers if layer), "")
    name = _class_of(function) or function.rpartition(".")[2]
    return Place(
        "/".join(part for part in (name, layer) if part and part != "<lambda>") or name or "no source", file, line
    )


def _class_of(function: str) -> str:
    """The class of a method by its qualified name; empty for a function."""
    owner = function.rpartition(".")[0].rpartition(".")[2]
    return "" if owner == "<locals>" else owner.lstrip("_")


def _is_library(file: str) -> bool:
    if file.startswith("<frozen"):
        return True
    return file.startswith(_folders("jax", "jaxlib", "flax", "jconv"))


def _holds_layers(file: str) -> bool:
    ours = os.path.join(os.path.dirname(__file__), "nnx.py")
    return file == ours or file.startswith(tuple(os.path.join(folder, "nnx", "nn") for folder in _folders("flax")))


def _folders(*packages: str) -> tuple[str, ...]:
    files = (getattr(sys.modules.get(name), "__file__", None) for name in packages)
    return tuple(os.path.dirname(file) + os.sep for file in files if file)


# Flops.

_MOVES = frozenset((
    "bitcast_convert_type", "broadcast_in_dim", "concatenate", "convert_element_type", "copy", "copy_p", "device_put",
    "dynamic_slice", "dynamic_update_slice", "gather", "iota", "optimization_barrier", "pad", "pvary", "random_unwrap",
    "random_wrap", "reduce_precision", "reshape", "rev", "scatter", "select_n", "sharding_constraint", "slice", "split",
    "squeeze", "transpose",
))  # fmt: skip
_REDUCTIONS = ("reduce", "arg", "cum", "sort", "top_k")


def _flops(equation: Any) -> int:
    name, params = equation.primitive.name, equation.params
    if equation.primitive in _CONVOLUTIONS:
        problem = problem_of(equation)
        if problem is not None:
            return 2 * macs(problem)
        kernel = equation.invars[1].aval
        features = kernel.shape[params["dimension_numbers"].rhs_spec[0]]
        return 2 * _size(equation.outvars[0]) * kernel.size // max(1, features)
    if name in _MOVES or not equation.outvars:
        return 0
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        return 2 * _size(equation.outvars[0]) * prod(equation.invars[0].aval.shape[axis] for axis in contracted)
    if name.startswith(("reduce_window", "select_and_")):
        inner = equation.invars[0] if name.startswith("select_and_scatter") else equation.outvars[0]
        return _size(inner) * prod(params.get("window_dimensions", ()))
    if name.startswith("scatter"):
        return _size(equation.invars[2])
    return max(map(_size, equation.invars if name.startswith(_REDUCTIONS) else equation.outvars), default=0)


def _size(variable: Any) -> int:
    return prod(getattr(variable.aval, "shape", ()))


# Tables.


class _Column(NamedTuple):
    name: str
    cells: list[str]
    is_left: bool = False
    rank: int = 0  # the highest goes first where room is short; 0 stays

    @property
    def width(self) -> int:
        return max(map(len, (self.name, *self.cells)))


def _columns(rows: tuple[Row, ...], layers: bool) -> list[_Column]:
    def times(ns: int | None) -> str:
        return "" if ns is None else _milliseconds(ns)

    def runner_up(row: Row) -> str:
        other = row.runner_up
        if other is None:
            return "none"
        return f"{other.algorithm.name} {times(row._time(other))}"

    runs = [f"{row.runs}{'+' if row.in_while else ''}" for row in rows]
    columns = [
        _Column("", [str(index) for index in range(len(rows))]),
        _Column("layer", [str(row.place) for row in rows], True),
        _Column("direction", [row.direction for row in rows], True),
        _Column(
            "image * kernel", [f"{sizes(r.problem.lhs_shape)} * {sizes(r.problem.rhs_shape)}" for r in rows], True, 1
        ),
        _Column("runs", runs, rank=0 if any(run != "1" for run in runs) else 2),
        _Column("MMAC", [number(row.macs * row.runs / 1e6) for row in rows], rank=3),
        _Column("lax ms", [times(row.lax_ns) for row in rows]),
        _Column("jconv ms", [times(row.jconv_ns) for row in rows]),
        _Column("algorithm", [row.algorithm.name for row in rows], True),
        _Column("runner-up", [runner_up(row) for row in rows], True, rank=4),
        _Column("why", [row.reason for row in rows], True, rank=5),
        _Column("MB workspace", ["" if r.workspace is None else number(r.workspace / 1e6) for r in rows], rank=6),
        _Column("refused", [str(len(row.refusals)) for row in rows], rank=7),
    ]
    return columns if layers else [column for column in columns if column.name != "layer"]


def _fitting(columns: list[_Column], width: int, gap: int, least: int = 0) -> list[_Column] | None:
    """As many of the columns as fit, or None where those up to the rank ``least`` do not."""
    for most in range(max(column.rank for column in columns), least - 1, -1):
        kept = [column for column in columns if column.rank <= most]
        if sum(column.width + gap for column in kept) <= width:
            return kept
    return None


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _milliseconds(ns: float) -> str:
    return number(ns / 1e6)


def _shortened(text: str, most: int) -> str:
    """The end of a text says more than its beginning: it is the layer's own name."""
    return text if len(text) <= most else f"…{text[1 - most :]}"
