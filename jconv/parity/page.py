"""A report as one HTML page that needs nothing else, and as a picture. matplotlib draws; there is no script."""

from __future__ import annotations

import base64
import html
import io
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jconv.errors import ParityError
from jconv.printing import new_figure

__all__ = ["error_figure", "loss_figure", "page", "training_page", "write"]

MOST_MAPS = 12
_FLOOR = 1e-17
_GOOD, _BAD, _QUIET, _INK = "#3b6ea5", "#c0392b", "#b9c2cc", "#1f2933"
_PARTS = {"layer": "Layers", "gradient": "Gradients", "statistic": "Statistics after the run"}
_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1f2933; background: #fff; max-width: 1180px; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.4rem; margin: 0 0 .3rem; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
.ok { color: #1e7d46; } .no { color: #c0392b; }
.conditions { color: #5f6c7b; font-size: .85rem; }
.diagnosis { border-left: 4px solid #c0392b; background: #fdf1ef; padding: .6rem 1rem; margin: .6rem 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .82rem; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .6rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #e4e8ee; }
th:nth-child(-n+7), td:nth-child(-n+7) { text-align: left; }
thead th { border-bottom: 2px solid #1f2933; }
tr.no td { background: #fdf1ef; color: #a5281b; }
.maps { display: grid; grid-template-columns: repeat(auto-fill, minmax(340px, 1fr)); gap: 1.2rem; }
figure { margin: 0; } figcaption { font-size: .82rem; margin-bottom: .2rem; }
.maps figure.no figcaption { color: #a5281b; font-weight: 600; }
.three { display: grid; grid-template-columns: repeat(3, 1fr); gap: 6px; font-size: .72rem; color: #5f6c7b; }
.three img { width: 100%; image-rendering: pixelated; display: block; }
svg { max-width: 100%; height: auto; }
"""


def page(report: Any, cells: Callable[[Sequence[Any]], list[tuple[str, ...]]]) -> str:
    """The page of a comparison; `cells` makes the texts of its rows, their head first."""
    state = "ok" if report.ok else "no"
    body = [f'<h1 class="{state}">{html.escape(report.verdict)}</h1>', _conditions(report.conditions)]
    body += [_diagnosis(d.place or d.layer or "(output)", d.mistake, d.text) for d in report.diagnoses]
    if any(row.part == "layer" for row in report.rows):
        body += ["<h2>How far each layer is from PyTorch in float64</h2>", _svg(error_figure(report.rows, "layer"))]
    body.append(_maps(report.rows))
    if any(row.part == "gradient" for row in report.rows):
        body += ["<h2>How far each gradient is</h2>", _svg(error_figure(report.rows, "gradient"))]
    for part, title in _PARTS.items():
        rows = [row for row in report.rows if row.part == part]
        if rows:
            body += [f"<h2>{title}</h2>", _table(rows, cells(rows))]
    body += [f"<p>{html.escape(line)}</p>" for line in report.remarks]
    return _document("Parity with PyTorch", body)


def training_page(report: Any, cells: Callable[[Sequence[Any]], list[tuple[str, ...]]]) -> str:
    """The page of a comparison of trainings."""
    state = "ok" if report.ok else "no"
    body = [f'<h1 class="{state}">{html.escape(report.verdict)}</h1>', _conditions(report.conditions)]
    body += [_diagnosis("training", mistake, text) for mistake, text in report.diagnoses]
    body += ["<h2>The losses</h2>", _svg(loss_figure(report))]
    head, *rows = report.cells()
    body += ["<h2>Step by step</h2>", _cells_table(head, [(cells, "") for cells in rows])]
    if report.rows:
        body += ["<h2>Parameters after the last step</h2>", _table(report.rows, cells(report.rows))]
    body += [f"<p>{html.escape(note)}</p>" for note in report.notes]
    return _document("Training parity with PyTorch", body)


def write(text: str, path: str | os.PathLike[str]) -> None:
    """Writes a page.

    Raises:
        ParityError: if the file cannot be written.
    """
    try:
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise ParityError(
            f"path {str(path)!r} cannot be written ({error}); name a file in a folder that can be"
        ) from None


def error_figure(rows: Sequence[Any], part: str) -> Any:
    """The relative error of each row on a logarithmic axis: the port's in float32 and in float64, and PyTorch's own."""
    shown = [row for row in rows if row.part == part]
    figure = new_figure(ParityError, figsize=(11, 1.6 + 0.2 * len(shown)), layout="constrained")
    axes = figure.add_subplot()
    where = np.arange(len(shown))
    floor = np.full(len(shown), _FLOOR)
    plain, exact, noise = (np.array([value(row) for row in shown]) for value in (_plain, _exact, _noise))
    colors = [_GOOD if row.ok else _BAD for row in shown]
    axes.barh(where, plain - floor, 0.7, left=floor, color=colors)
    axes.plot(noise, where, "|", color=_INK, markersize=9, markeredgewidth=1.6, label="PyTorch's own rounding error")
    if np.isfinite(exact).any():
        axes.plot(exact, where, "o", color=_QUIET, markeredgecolor=_INK, markersize=4, label="the port in float64")
    axes.barh([0], [0], color=_GOOD, label="the port in float32")
    if not all(row.ok for row in shown):
        axes.barh([0], [0], color=_BAD, label="the port where it diverges")
    axes.set_xscale("log")
    axes.set_xlim(_FLOOR, max(10.0, 3 * np.nanmax(plain, initial=1)))
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.set_yticks(where, [row.label for row in shown], fontsize=7)
    axes.set_xlabel("largest difference / largest value")
    axes.grid(axis="x", color="#e4e8ee", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper right", ncols=4, frameon=False, fontsize=8)
    return figure


def loss_figure(report: Any) -> Any:
    """The loss curves, and below how far the port's are from PyTorch's in float64."""
    figure = new_figure(ParityError, figsize=(11, 6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    steps = np.arange(len(report.exact))
    above.plot(steps, report.exact, color=_INK, linewidth=2.5, label="PyTorch, float64")
    above.plot(steps, report.plain, color=_QUIET, linewidth=1.6, label="PyTorch, float32")
    above.plot(
        steps, report.ours, "--", color=_BAD if not report.ok else _GOOD, linewidth=1.6, label="the port, float32"
    )
    above.set_ylabel("loss")
    scale = np.maximum(np.abs(report.exact), 1e-30)
    for curve, color, label in (
        (report.plain, _QUIET, "PyTorch, float32"), (report.ours, _GOOD, "the port, float32"),
        (report.wide, _INK, "the port, float64"),
    ):  # fmt: skip
        if curve is not None:
            below.semilogy(steps, np.maximum(np.abs(curve - report.exact) / scale, _FLOOR), color=color, label=label)
    if report.parts_at is not None:
        for axes in (above, below):
            axes.axvline(report.parts_at, color=_BAD, linewidth=1, linestyle=":")
        above.annotate(f"parts at step {report.parts_at}", (report.parts_at, 1.0), xycoords=("data", "axes fraction"),
                       xytext=(5, 0), textcoords="offset points", color=_BAD, fontsize=9, va="top")  # fmt: skip
    below.set_ylabel("difference from PyTorch\nin float64, relative")
    below.set_xlabel("step")
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#e4e8ee", linewidth=0.7)
        axes.legend(frameon=False, fontsize=8)
    return figure


def _plain(row: Any) -> float:
    return 10.0 if row.numbers is None or not np.isfinite(row.numbers.relative) else max(row.numbers.relative, _FLOOR)


def _exact(row: Any) -> float:
    return np.nan if row.numbers is None or row.numbers.exact is None else min(max(row.numbers.exact, _FLOOR), 10.0)


def _noise(row: Any) -> float:
    n = row.numbers
    if n is None or not np.isfinite(n.difference):
        return np.nan
    return max(n.unit / (n.largest or 1.0), _FLOOR)


def _svg(figure: Any) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return f'<div class="scroll">{text[text.index("<svg") :]}</div>'


def _maps(rows: Sequence[Any]) -> str:
    """Of layers that give images: those that diverge first, then some of the others."""
    images = [row for row in rows if row.maps is not None]
    failed = [row for row in images if not row.ok][:MOST_MAPS]
    fine = [row for row in images if row.ok]
    room = MOST_MAPS - len(failed)
    if len(fine) > room:
        fine = [fine[i] for i in np.linspace(0, len(fine) - 1, room).astype(int)] if room else []
    shown = [row for row in images if row in failed or row in fine]
    if not shown:
        return ""
    figures = []
    for row in shown:
        theirs, ours = row.maps
        low, high = float(np.nanmin(theirs)), float(np.nanmax(theirs))
        apart = np.abs(ours - theirs)
        most = float(np.nan_to_num(apart).max())
        parts = [
            (_png(theirs, low, high, "viridis"), "PyTorch"),
            (_png(ours, low, high, "viridis"), "port"),
            (_png(apart, 0, most or 1, "magma"), f"difference, up to {most:.1e}"),
        ]
        pictures = "".join(
            f'<div><img alt="{text} of {html.escape(row.label)}" src="{data}">{text}</div>' for data, text in parts
        )
        caption = html.escape(f"{row.label} {'x'.join(map(str, row.shape))}")
        figures.append(
            f'<figure class="{"" if row.ok else "no"}"><figcaption>{caption}</figcaption>'
            f'<div class="three">{pictures}</div></figure>'
        )
    return (
        "<h2>Feature maps</h2><p class='conditions'>Of the first image the channel that differs most, or varies most.</p>"
        f'<div class="maps">{"".join(figures)}</div>'
    )


def _png(array: np.ndarray, low: float, high: float, colors: str) -> str:
    from matplotlib import colormaps
    from matplotlib.image import imsave

    buffer = io.BytesIO()
    scaled = np.clip((np.nan_to_num(array) - low) / ((high - low) or 1), 0, 1)
    imsave(buffer, colormaps[colors](scaled), format="png")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _table(rows: Sequence[Any], cells: list[tuple[str, ...]]) -> str:
    head, *body = cells
    return _cells_table(head, [(row, "" if r.ok else "no") for row, r in zip(body, rows, strict=True)])


def _cells_table(head: Sequence[str], rows: Sequence[tuple[Sequence[str], str]]) -> str:
    heads = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    body = "".join(
        f'<tr class="{state}">{"".join(f"<td>{html.escape(cell)}</td>" for cell in cells)}</tr>'
        for cells, state in rows
    )
    return f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>'


def _conditions(conditions: dict[str, str]) -> str:
    text = "; ".join(f"{name} {value}" for name, value in conditions.items())
    return f'<p class="conditions">{html.escape(text)}</p>'


def _diagnosis(place: str, mistake: str, text: str) -> str:
    return f'<div class="diagnosis"><b>{html.escape(place)}: {html.escape(mistake)}</b><br>{html.escape(text)}.</div>'


def _document(title: str, body: Sequence[str]) -> str:
    icon = '<link rel="icon" href="data:,">'  # else a browser asks for one, and logs that there is none
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>{icon}'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head>'
        f"<body>{''.join(body)}</body></html>\n"
    )
