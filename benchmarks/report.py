"""Results files as tables, a markdown summary and plots; or two of them compared.

    python benchmarks/report.py [FOLDER] [--readme]
    python benchmarks/report.py --compare OLD.json NEW.json

The first reads every results file of a folder (benchmarks/results by default) and writes summary.md and the
pictures there; --readme also writes the short form between the README's markers. The second lists what takes
over 10 % longer in NEW than in OLD, and exits with 1 if anything does; it refuses files that are not alike.
"""

from __future__ import annotations

import argparse
import math
import re
import statistics
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ledger
import matplotlib
from rich.console import Console
from rich.table import Table

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.lines import Line2D  # noqa: E402

README = ledger.ROOT / "README.md"
BEGIN, END = "<!-- performance:begin -->", "<!-- performance:end -->"
REGRESSION = 1.10
MOST_OTHERS = 0.2
DIRECTIONS = {"forward": "o", "input gradient": "^", "kernel gradient": "s"}
CLASSES = {
    "dense 3x3": "#1f77b4", "dense other": "#17becf", "1x1": "#2ca02c", "strided": "#8c564b", "depthwise": "#d62728",
    "grouped": "#ff7f0e", "transposed": "#9467bd", "1-D": "#7f7f7f", "3-D": "#e377c2",
}  # fmt: skip
Row = dict[str, Any]


@dataclass(frozen=True)
class Grid:
    """A table for both the terminal and markdown."""

    title: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]
    words: int = 1  # how many columns, from the left, are words and not numbers

    def rich(self) -> Table:
        table = Table(title=self.title)
        for i, name in enumerate(self.header):
            table.add_column(name, justify="left" if i < self.words else "right", no_wrap=i < self.words)
        for row in self.rows:
            table.add_row(*row)
        return table

    def markdown(self) -> str:
        rule = ["---"] * self.words + ["---:"] * (len(self.header) - self.words)
        lines = [
            self.header,
            rule,
            *([cell.replace("|", "/").replace("*", "\\*") for cell in row] for row in self.rows),
        ]
        return "\n".join(["| " + " | ".join(line) + " |" for line in lines])


# What a row says.


def best(row: Row, prefix: str) -> str | None:
    """The fastest contender of a library: of jconv the planner's choice, of the others the better layout."""
    if prefix == "jconv" and "chosen" in row:
        return row["chosen"]
    names = [name for name in row["contenders"] if name == prefix or name.startswith(prefix + " ")]
    return min(names, key=lambda name: row["contenders"][name]["ms"], default=None)


def ms(row: Row, prefix: str) -> float:
    """A library's time, nan where it was left out."""
    name = best(row, prefix)
    return math.nan if name is None else row["contenders"][name]["ms"]


def ratio(row: Row, prefix: str) -> float:
    """How many times as long as jconv a library takes: above 1, jconv is faster."""
    return ms(row, prefix) / ms(row, "jconv")


def regret(row: Row) -> float:
    """How many times as long the planner's choice takes as the best of jconv's algorithms that were timed."""
    ours = [c["ms"] for name, c in row["contenders"].items() if not name.startswith(("lax", "torch"))]
    return row["contenders"][row["chosen"]]["ms"] / min(ours)


def share(row: Row, roof: dict[str, float], prefix: str = "jconv") -> float:
    """The time that the roofline allows over the time taken; above 1 where caches hold the operands, or where
    an algorithm needs fewer operations than the definition."""
    least = max(row["flops"] / roof["gflops"], row["bytes"] / roof["gbytes"]) / 1e6
    return least / ms(row, prefix)


def mean(values: Iterable[float]) -> float:
    """The geometric mean of what is there."""
    found = [v for v in values if not math.isnan(v)]
    return math.exp(statistics.fmean(map(math.log, found))) if found else math.nan


def busiest(data: dict[str, Any]) -> float:
    """The most cores that other processes used while a row was timed."""
    return max(row.get("others") or 0.0 for row in data["rows"].values())


# The tables.


def summary(data: dict[str, Any]) -> Grid:
    rows, title = list(data["rows"].values()), f"Single convolutions, {label(data)}"
    lines = []
    for kind in (*CLASSES, "all"):
        for direction in DIRECTIONS:
            here = [r for r in rows if r["direction"] == direction and kind in (r["class"], "all")]
            if here:
                ratios = [[ratio(r, library) for r in here] for library in ("torch", "lax")]
                cells = [f"{value:.2f}" for values in ratios for value in (mean(values), min(values))]
                part = statistics.median(share(r, data["roofline"]) for r in here)
                lines.append((kind, direction, str(len(here)), *cells, f"{mean(map(regret, here)):.2f}", f"{part:.0%}"))
    header = (
        "class", "direction", "count", "torch / jconv", "worst", "lax / jconv", "worst", "jconv / best", "of roofline"
    )  # fmt: skip
    return Grid(title, header, lines, 2)


def beside_time(data: dict[str, Any]) -> Grid:
    """Error, compile time and temporaries, jconv's choice beside the others."""
    lines = []
    for direction in DIRECTIONS:
        here = [r for r in data["rows"].values() if r["direction"] == direction]
        if not here:
            continue
        for library in ("jconv", "lax", "torch"):
            names = [best(r, library) for r in here]
            if None in names:
                continue
            found = [r["contenders"][name] for r, name in zip(here, names, strict=True)]
            errors = [c["error"] for c in found]
            compiles = [c["compile_s"] for c in found if c["compile_s"] is not None]
            temps = [c["temp_bytes"] for c in found if c["temp_bytes"] is not None]
            laxs = [r["contenders"][best(r, "lax")]["error"] for r in here]  # pyright: ignore[reportArgumentType]
            # Below a unit in the last place two errors say nothing of each other.
            worst = max(e / max(x, 2**-23) for e, x in zip(errors, laxs, strict=True))
            lines.append(
                (
                    direction, library, f"{statistics.median(errors):.1e}", f"{max(errors):.1e}", f"{worst:.2f}",
                    f"{1e3 * statistics.median(compiles):.0f}" if compiles else "",
                    f"{1e3 * max(compiles):.0f}" if compiles else "",
                    f"{statistics.fmean(temps) / 1e6:.1f}" if temps else "", f"{max(temps) / 1e6:.1f}" if temps else "",
                )
            )  # fmt: skip
    header = (
        "direction", "library", "error, median", "worst", "worst / lax's", "compile ms, median", "worst", "temporaries MB, mean", "worst"
    )  # fmt: skip
    return Grid(f"Error against float64, compile time, temporaries, {label(data)}", header, lines, 2)


def slowest(data: dict[str, Any], count: int | None) -> Grid:
    """Problem by problem, those first where jconv does worst against torch; ``count`` of them, or all."""
    ordered = sorted(data["rows"].values(), key=lambda r: ratio(r, "torch") or math.inf)[:count]
    lines = []
    for r in ordered:
        times = [f"{ms(r, library):.3g}" for library in ("jconv", "torch", "lax")]
        others = {name: c["ms"] for name, c in r["contenders"].items() if not name.startswith(("lax", "torch"))}
        fastest = min(others, key=lambda name: others[name])
        ratios = [f"{ratio(r, library):.2f}" for library in ("torch", "lax")]
        error = f"{r['contenders'][r['chosen']]['error']:.0e}"
        part = f"{share(r, data['roofline']):.0%}"
        lines.append((r["problem"], r["class"], r["direction"], r["chosen"], fastest, *times, *ratios, part, error))
    header = (
        "problem", "class", "direction", "chosen", "best", "jconv ms", "torch ms", "lax ms", "torch / jconv",
        "lax / jconv", "of roofline", "error",
    )  # fmt: skip
    title = "All problems" if count is None else f"The {len(lines)} worst against torch"
    return Grid(f"{title}, {label(data)}", header, lines, 5)


def networks(data: dict[str, Any]) -> Grid:
    libraries = ("jconv", "stock Flax", "torch", "torch.compile", "ONNX Runtime")
    lines = [
        (
            r["network"], r["mode"], r["input"], *(_number(ms(r, name)) for name in libraries),
            *(_number(ratio(r, name)) for name in ("stock Flax", "torch")),
        )
        for r in data["rows"].values()
    ]  # fmt: skip
    header = ("network", "mode", "input", *(f"{name} ms" for name in libraries), "stock / jconv", "torch / jconv")
    return Grid(f"Networks, {label(data)}", header, lines, 3)


def compilation(data: dict[str, Any]) -> Grid:
    """What XLA takes for a network with jconv's layers and with Flax's."""
    lines = []
    for r in data["rows"].values():
        pair = [r["contenders"].get(name, {}) for name in ("jconv", "stock Flax")]
        seconds = [c.get("compile_s", math.nan) for c in pair]
        megabytes = [c.get("temp_bytes", math.nan) / 1e6 for c in pair]
        cells = (*seconds, seconds[0] / seconds[1], *megabytes, megabytes[0] / megabytes[1])
        lines.append((r["network"], r["mode"], r["input"], *map(_number, cells)))
    header = (
        "network", "mode", "input", "compile s, jconv", "stock", "jconv / stock", "temporaries MB, jconv", "stock",
        "jconv / stock",
    )  # fmt: skip
    return Grid(f"Networks: compile time and temporaries, {label(data)}", header, lines, 3)


def _number(value: float) -> str:
    """Three digits, without an exponent."""
    if math.isnan(value):
        return "-"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def label(data: dict[str, Any]) -> str:
    c = data["conditions"]
    return f"{c['dtype']}, {c['threads']}T, {c['clock']}"


def short(files: list[dict[str, Any]]) -> str:
    """What the README shows of float32: the circumstances, ratios by class, and the networks."""
    shown = [data for data in files if data["conditions"]["dtype"] == "float32"]
    return "\n\n".join([circumstances(shown)] + [f"{grid.title}:\n\n{grid.markdown()}" for grid in map(_short, shown)])


def circumstances(files: list[dict[str, Any]]) -> str:
    """The machine, what stood in the environment, and whose code it was."""
    where = {(f"{c['cpu']}", str(c["malloc"])) for c in (data["conditions"] for data in files)}
    versions: dict[str, list[str]] = {}
    for state in sorted({row["state"] for data in files for row in data["rows"].values()}):
        version, _, source = state.rpartition(", source ")
        versions.setdefault(version, []).append(source)
    whose = [f"{version}, source {', '.join(sources)}" for version, sources in versions.items()]
    places = "; ".join(f"{cpu}, allocator {malloc}" for cpu, malloc in sorted(where))
    return f"Measured on {places}. Code: {'; '.join(whose)}."


def _short(data: dict[str, Any]) -> Grid:
    if data["conditions"]["benchmark"] == "networks":
        return networks(data)
    lines = []
    for kind in CLASSES:
        cells = []
        for library in ("torch", "lax"):
            for direction in DIRECTIONS:
                rows = [r for r in data["rows"].values() if (r["class"], r["direction"]) == (kind, direction)]
                ratios = [ratio(r, library) for r in rows]
                cells.append(f"{mean(ratios):.2f} ({min(ratios):.2f})" if ratios else "-")
        if set(cells) != {"-"}:
            lines.append((kind, *cells))
    header = ("class", *(f"{library} / jconv, {d}" for library in ("torch", "lax") for d in DIRECTIONS))
    title = f"Single convolutions, {label(data)}: geometric mean (and worst), above 1 jconv is faster"
    return Grid(title, header, lines)


def markdown(files: list[dict[str, Any]], pictures: dict[int, list[Path]]) -> str:
    """The whole summary."""
    parts = [
        "# Benchmarks",
        "Written by `benchmarks/report.py`. Ratios are times over jconv's time: above 1, jconv is faster. Means are\n"
        "geometric. torch and lax count with the faster of their layouts; what the timed region holds is told at the\n"
        'top of `benchmarks/problems.py` and `benchmarks/networks.py`. "jconv / best": the planner\'s choice over the\n'
        'best of the algorithms that were timed. "of roofline": the time that the measured peak and bandwidth allow\n'
        "for the definition's operations, and for reading and writing everything once, over jconv's time; it exceeds\n"
        "100 % where caches hold the operands or an algorithm saves operations.",
    ]
    for index, data in enumerate(files):
        c = data["conditions"]
        states = sorted({r["state"] for r in data["rows"].values()})
        facts = [f"CPU: {c['cpu']}", f"threads: {c['threads']}, {c['clock']}", f"malloc: {c['malloc']}"]
        if c["xla_flags"]:
            facts.append(f"XLA_FLAGS: {c['xla_flags']}")
        if "roofline" in data:
            facts.append(
                "measured: {gflops:.0f} GFLOP/s in a float32 matrix product, {gbytes:.1f} GB/s from memory".format(
                    **data["roofline"]
                )
            )
        facts += [f"measured with {s}" for s in states]
        if len(states) > 1:
            facts.append("NOT ONE STATE: the rows above were measured with different code")
        facts.append(f"other processes used at most {busiest(data):.2f} cores while a row was timed")
        if c["threads"] > 1 and busiest(data) > MOST_OTHERS:
            facts.append("NOT AN IDLE MACHINE: wall times of two threads on a shared core say little, torch's least")
        if c["quick"]:
            facts.append("QUICK: few problems and few samples, an impression only")
        problems = c["benchmark"] == "problems"
        grids = (
            [summary(data), beside_time(data), slowest(data, None)] if problems else [networks(data), compilation(data)]
        )
        parts.append(f"## {c['benchmark'].capitalize()}, {label(data)}\n\n" + "\n".join(f"- {fact}" for fact in facts))
        parts += [f"![{p.stem}]({p.name})" for p in pictures.get(index, [])]
        parts += [f"### {grid.title}\n\n{grid.markdown()}" for grid in grids]
        absent = [f"- {name}: {reason}" for name, reason in data.get("left_out", {}).items()]
        if not problems:
            for r in data["rows"].values():
                absent += [f"- {r['network']}, {r['mode']}: {who}: {why}" for who, why in r["left_out"].items()]
        if absent:
            parts.append("Left out:\n\n" + "\n".join(absent))
    return "\n\n".join(parts) + "\n"


# The pictures.


def scatter(data: dict[str, Any], path: Path) -> Path:
    """jconv's time over torch's and over lax's, one point a problem and direction."""
    figure, panels = plt.subplots(1, 2, figsize=(13, 6.4), sharey=True, layout="constrained")
    rows = list(data["rows"].values())
    times = [ms(r, library) for r in rows for library in ("jconv", "torch", "lax")]
    times = [t for t in times if not math.isnan(t)]
    ends = (0.7 * min(times), 1.4 * max(times))
    for axes, library in zip(panels, ("torch", "lax"), strict=True):
        for r in rows:
            _point(axes, ms(r, library), ms(r, "jconv"), r)
        axes.plot(ends, ends, color="black", lw=1)
        for factor in (10, 0.1):
            axes.plot(ends, [factor * e for e in ends], color="black", lw=0.7, ls=":")
        axes.set(xscale="log", yscale="log", xlim=ends, ylim=ends, xlabel=f"{library}, ms")
        axes.grid(color="0.9")
        axes.set_axisbelow(True)
        wins = sum(ratio(r, library) > 1 for r in rows)
        axes.set_title(f"against {library}: jconv faster in {wins} of {len(rows)} (below the line)", fontsize=11)
    panels[0].set_ylabel("jconv, ms")
    figure.suptitle(f"One convolution, {label(data)}; dotted: ten times", fontsize=12)
    _legend(figure, data)
    return _save(figure, path)


def roofline(data: dict[str, Any], path: Path) -> Path:
    """GFLOP/s of the definition's operations over operations a byte, under the measured roofs."""
    roof = data["roofline"]
    corner = roof["gflops"] / roof["gbytes"]
    intensities = [r["flops"] / r["bytes"] for r in data["rows"].values()]
    low, high = 0.7 * min(*intensities, corner), 1.4 * max(*intensities, corner)
    figure, panels = plt.subplots(1, 2, figsize=(13, 6), sharey=True, layout="constrained")
    for axes, library in zip(panels, ("jconv", "torch"), strict=True):
        for r in data["rows"].values():
            _point(axes, r["flops"] / r["bytes"], r["flops"] / ms(r, library) / 1e6, r)
        axes.plot([low, corner, high], [low * roof["gbytes"], roof["gflops"], roof["gflops"]], color="black", lw=1.2)
        axes.set(xscale="log", yscale="log", xlim=(low, high), xlabel="operations a byte", title=library)
        axes.grid(color="0.9")
        axes.set_axisbelow(True)
    panels[0].set_ylabel("GFLOP/s, the definition's operations")
    roofs = "roofs: {gflops:.0f} GFLOP/s (a float32 matrix product), {gbytes:.0f} GB/s (memory)".format(**roof)
    figure.suptitle(f"Roofline, {label(data)}; {roofs}", fontsize=12)
    _legend(figure, data)
    return _save(figure, path)


def _point(axes: Any, x: float, y: float, r: Row) -> None:
    axes.plot(x, y, DIRECTIONS[r["direction"]], color=CLASSES[r["class"]], ms=6, alpha=0.75, mew=0)


def _legend(figure: Any, data: dict[str, Any]) -> None:
    present = {r["class"] for r in data["rows"].values()}
    handles = [Line2D([], [], marker="o", ls="", color=c, label=k) for k, c in CLASSES.items() if k in present]
    handles += [Line2D([], [], marker=m, ls="", color="0.3", label=d) for d, m in DIRECTIONS.items()]
    figure.legend(handles=handles, loc="outside right upper", frameon=False)


def _save(figure: Any, path: Path) -> Path:
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


# Two files.


def regressions(old: dict[str, Any], new: dict[str, Any]) -> tuple[list[tuple[float, str]], dict[str, float]]:
    """(new time / old time, key) of jconv where it is above :data:`REGRESSION`, the largest first; and by library
    the mean of that ratio over all rows, which for the others says how much the machine itself has changed.

    Raises:
        ledger.Unlike: if the files were not measured alike, or have no row in common.
    """
    ledger.refuse_unlike("the old file", old["conditions"], "the new file", new["conditions"])
    common = [key for key in old["rows"] if key in new["rows"]]
    if not common:
        raise ledger.Unlike("the two files have no row in common; measure the same problems")
    drift: dict[str, float] = {}
    for library in ("jconv", "lax", "stock Flax", "torch"):
        drift[library] = mean(ms(new["rows"][key], library) / ms(old["rows"][key], library) for key in common)
    slower = [(ms(new["rows"][key], "jconv") / ms(old["rows"][key], "jconv"), key) for key in common]
    slower = sorted(((times, key) for times, key in slower if times > REGRESSION), reverse=True)
    return slower, {library: value for library, value in drift.items() if not math.isnan(value)}


def compare(old_path: Path, new_path: Path, console: Console) -> int:
    """Prints the comparison; the exit status."""
    try:
        old, new = ledger.load(old_path), ledger.load(new_path)
        slower, drift = regressions(old, new)
    except ledger.Unlike as error:
        sys.exit(f"report: {error}")
    console.print("new time / old time, geometric mean: " + ", ".join(f"{k} {v:.3f}" for k, v in drift.items()))
    only = [len(set(a["rows"]) - set(b["rows"])) for a, b in ((old, new), (new, old))]
    console.print(f"rows in one file only: {only[0]} in the old, {only[1]} in the new")
    lines = []
    for times, key in slower:
        before, after = old["rows"][key], new["rows"][key]
        others = [ms(after, name) / ms(before, name) for name in ("lax", "stock Flax", "torch")]
        lines.append((key, *map(_number, (ms(before, "jconv"), ms(after, "jconv"), times, *others))))
    if not lines:
        console.print(f"nothing takes over {REGRESSION - 1:.0%} longer")
        return 0
    header = ("row", "old ms", "new ms", "jconv new / old", "lax", "stock Flax", "torch")
    console.print(Grid(f"{len(lines)} regressions over {REGRESSION - 1:.0%}", header, lines).rich())
    return 1


def write_readme(block: str) -> None:
    text = README.read_text()
    if BEGIN not in text or END not in text:
        sys.exit(f"report: the README has no {BEGIN} and {END} to write between; put them where the figures belong")
    pattern = re.escape(BEGIN) + ".*?" + re.escape(END)
    README.write_text(re.sub(pattern, lambda _: f"{BEGIN}\n\n{block}\n\n{END}", text, flags=re.S))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=ledger.RESULTS)
    parser.add_argument("--readme", action="store_true", help="write the short form into the README")
    parser.add_argument("--compare", type=Path, nargs=2, metavar=("OLD", "NEW"))
    options = parser.parse_args()
    console = Console() if sys.stdout.isatty() else Console(width=160)
    if options.compare:
        old, new = options.compare
        sys.exit(compare(old, new, console))
    paths = sorted(options.folder.glob("problems-*.json")) + sorted(options.folder.glob("networks-*.json"))
    files = [data for data in map(ledger.load, paths) if data["rows"]]
    if not files:
        sys.exit(f"report: no results in {options.folder}; run benchmarks/problems.py or benchmarks/networks.py first")
    drawings: dict[str, Callable[[dict[str, Any], Path], Path]] = {"scatter": scatter, "roofline": roofline}
    pictures: dict[int, list[Path]] = {}
    for index, data in enumerate(files):
        c = data["conditions"]
        if c["threads"] > 1 and busiest(data) > MOST_OTHERS:
            console.print(
                f"{label(data)}: other processes used up to {busiest(data):.2f} cores; measure on an idle machine"
            )
        if c["benchmark"] == "networks":
            for grid in (networks(data), compilation(data)):
                console.print(grid.rich())
            continue
        for grid in (summary(data), beside_time(data), slowest(data, 10)):
            console.print(grid.rich())
        pictures[index] = [
            draw(data, options.folder / f"{name}-{c['dtype']}-{c['threads']}t.png") for name, draw in drawings.items()
        ]
    target = options.folder / "summary.md"
    target.write_text(markdown(files, pictures))
    console.print(f"{target} and {sum(map(len, pictures.values()))} pictures beside it", soft_wrap=True)
    if options.readme:
        write_readme(short(files))
    else:
        console.print(f"\n{BEGIN}\n\n{short(files)}\n\n{END}", soft_wrap=True, markup=False, highlight=False)


if __name__ == "__main__":
    main()
