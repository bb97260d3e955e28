"""What a comparison found, row by row: the numbers, the verdict, and how it prints itself."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from jconv.errors import ParityError
from jconv.parity import page
from jconv.parity.pairing import View
from jconv.printing import aligned, save, sizes

__all__ = [
    "Diagnosis", "Numbers", "Report", "Row", "cells", "noise_of", "numbers_of", "row_lines", "ulp",
]  # fmt: skip

# In units of PyTorch's own rounding error in float32. A port's summation order is its own, so that its error is a few of
# these; in float64, where only what is no rounding can reach such a size, there is less room.
MOST_IN_FLOAT64, MOST_IN_FLOAT32, MOST_WITHOUT_FLOAT64 = 4, 100, 16


@dataclass(frozen=True)
class Numbers:
    """How far the port's array is from PyTorch's in float64.

    Attributes:
        largest: PyTorch's largest absolute value.
        unit: PyTorch's own largest difference between float32 and float64.
        difference: the largest absolute difference of the port's float32 result.
        relative: the same over `largest`.
        ulps: the same in float32's units in the last place, at `largest`.
        noise: the same in `unit`s.
        exact: the largest absolute difference of the port's float64 result over `largest`; None if it did not run.
        ok: whether that is rounding.
        ours_largest: the port's largest absolute value.
    """

    largest: float
    unit: float
    difference: float
    relative: float
    ulps: float
    noise: float
    exact: float | None
    ok: bool
    ours_largest: float


def noise_of(exact: np.ndarray, plain: np.ndarray) -> float:
    """PyTorch's own rounding error: its largest difference between float64 and float32, of two ulps or more."""
    with np.errstate(invalid="ignore"):
        found = float(np.nan_to_num(np.abs(plain - exact), posinf=0).max(initial=0))
    return max(found, 2 * ulp(_largest(exact)))


def numbers_of(
    exact: np.ndarray, plain: np.ndarray, ours: np.ndarray, wide: np.ndarray | None, *,
    gradient: bool = False, double: bool = False,
) -> Numbers:  # fmt: skip
    """Compares arrays of one shape: PyTorch's in float64 and float32, the port's in float32 and float64.

    Args:
        exact, plain, ours, wide: the four.
        gradient: whether float32 is judged by a twentieth of the largest value: at a kink it turns an element on or off, in
            PyTorch as in the port, and not the same element.
        double: whether the port is known to keep float64 all the way, which leaves no room for float32's rounding.

    >>> x = np.array([1.0, 2.0])
    >>> numbers_of(x, x.astype(np.float32), x.astype(np.float32), x + 1e-3).ok
    False
    """
    size = np.abs(np.nan_to_num(np.asarray(exact, np.float64)))
    huge = size > 1e5 * np.median(size[size > 0]) if (size > 0).any() else np.zeros(size.shape, bool)
    if huge.any() and not huge.all():  # a mask of -1e9, say, must not hide the rest
        parts = [
            numbers_of(
                exact[part],
                plain[part],
                ours[part],
                None if wide is None else wide[part],
                gradient=gradient,
                double=double,
            )
            for part in (huge, ~huge)
        ]
        return parts[1] if parts[0].ok else parts[0]
    largest, unit = _largest(exact), noise_of(exact, plain)
    difference = _difference(exact, ours)
    apart = None if wide is None else _difference(exact, wide)
    if exact.dtype.kind in "iu":
        ok = (difference if apart is None else apart) <= _difference(exact, plain)
    elif apart is None:
        ok = difference <= MOST_WITHOUT_FLOAT64 * unit
    else:
        most = max(1e-4 * unit, 1e-9 * largest) if double else MOST_IN_FLOAT64 * unit
        room = max(1000 * unit, 0.05 * largest) if gradient else MOST_IN_FLOAT32 * unit
        ok = apart <= most and difference <= room
    scale = largest or 1.0
    return Numbers(
        largest, unit, difference, difference / scale, difference / ulp(largest), difference / unit,
        None if apart is None else apart / scale, ok, _largest(ours),
    )  # fmt: skip


def _largest(array: np.ndarray) -> float:
    finite = array[np.isfinite(array)]
    return float(np.abs(finite).max(initial=0))


def ulp(value: float) -> float:
    """float32's unit in the last place."""
    return float(np.spacing(np.float32(min(value, np.finfo(np.float32).max)))) or float(
        np.finfo(np.float32).smallest_subnormal
    )


def _difference(exact: np.ndarray, ours: np.ndarray) -> float:
    """The largest difference; infinite where one has a NaN or an infinity that the other has not."""
    exact, ours = np.asarray(exact, np.float64), np.asarray(ours, np.float64)
    finite = np.isfinite(exact) & np.isfinite(ours)
    same = (exact == ours) | (np.isnan(exact) & np.isnan(ours))
    if not (finite | same).all():
        return float("inf")
    return float(np.abs(exact[finite] - ours[finite]).max(initial=0))


@dataclass(frozen=True)
class Row:
    """One array of a layer, of a gradient or of a statistic, in PyTorch and in the port.

    Attributes:
        part: ``"layer"``, ``"gradient"``, ``"statistic"``, or of a training ``"parameter"``.
        name, port: of the layer or of the parameter, on the two sides; empty for the whole network.
        kind: the class of PyTorch's layer.
        shape, port_shape: of the arrays.
        view: the transposition that aligns the port's; empty where it lies alike.
        paired: why the two are taken for each other.
        numbers: None where the shapes do not fit.
        maps: for images, a channel of the first one on both sides, thinned out.
    """

    part: str
    name: str
    port: str
    kind: str
    shape: tuple[int, ...]
    port_shape: tuple[int, ...]
    view: str
    paired: str
    numbers: Numbers | None
    maps: tuple[np.ndarray, np.ndarray] | None = field(default=None, repr=False, compare=False)

    @property
    def ok(self) -> bool:
        return self.numbers is not None and self.numbers.ok

    @property
    def is_double(self) -> bool:
        """Whether the port's float64 result has float64's own error."""
        return self.numbers is not None and self.numbers.exact is not None and self.numbers.exact < 1e-10

    @property
    def label(self) -> str:
        return self.name or "(output)"

    @classmethod
    def of(
        cls, part: str, name: str, port: str, kind: str, exact: np.ndarray, plain: np.ndarray, ours: np.ndarray,
        wide: np.ndarray | None, view: View | None, paired: str, *, gradient: bool = False, double: bool = False,
    ) -> Row:  # fmt: skip
        numbers = maps = None
        if view is not None:
            brought = view.bring(ours)
            fits = wide is not None and wide.shape == ours.shape
            numbers = numbers_of(
                exact, plain, brought, view.bring(wide) if fits else None, gradient=gradient, double=double
            )
            if part == "layer" and exact.ndim == 4 and min(exact.shape[2:], default=1) > 1:
                maps = _maps(exact, brought)
        return cls(part, name, port, kind, exact.shape, ours.shape, str(view or ""), paired, numbers, maps)


def _maps(exact: np.ndarray, ours: np.ndarray, most: int = 56) -> tuple[np.ndarray, np.ndarray]:
    """The channel of the first image in which the two differ most, or which varies most."""
    with np.errstate(invalid="ignore"):
        apart = np.nan_to_num(np.abs(ours[0] - exact[0])).max((1, 2))
        channel = int(np.argmax(apart if apart.max() > 1e-3 * _largest(exact) else np.nan_to_num(exact[0].std((1, 2)))))
    step = -(-max(exact.shape[2:]) // most)
    return tuple(a[0, channel, ::step, ::step].astype(np.float32) for a in (exact, ours))  # type: ignore[return-value]


@dataclass(frozen=True)
class Diagnosis:
    """A mistake that explains a layer's numbers: made on purpose in PyTorch, it gives them.

    Attributes:
        layer, port: the layer where it shows, on the two sides.
        mistake: its name: ``"norm epsilon"``, ``"flatten order"``, ...
        text: what the port does, what PyTorch does, and the remedy.
        place: where it is, if not in the layer itself.
    """

    layer: str
    port: str
    mistake: str
    text: str
    place: str = ""

    def __str__(self) -> str:
        return f"{self.place or self.layer or '(output)'}: {self.mistake}: {self.text}."


@dataclass(frozen=True)
class Report:
    """What :func:`jconv.parity.compare` found. ``print(report)`` shows it, ``rich.print(report)`` as rich's table.

    Attributes:
        rows: the layers in PyTorch's order, then gradients and statistics.
        diagnoses: the mistakes that explain what diverges, that of the first layer first; empty where none does.
        unpaired: PyTorch's layers, and the port's, that were compared with none.
        notes: what was not compared and why.
        conditions: versions and precision.
    """

    rows: tuple[Row, ...]
    diagnoses: tuple[Diagnosis, ...]
    unpaired: tuple[tuple[str, ...], tuple[str, ...]]
    notes: tuple[str, ...]
    conditions: dict[str, str]

    @property
    def ok(self) -> bool:
        """Whether every row is equal within rounding."""
        return bool(self.rows) and all(row.ok for row in self.rows)

    @property
    def first_divergent(self) -> str | None:
        """PyTorch's name of the first layer that diverges; of a gradient, the parameter nearest to the output.

        ``"(output)"`` is what the whole network returns; None if none diverges.
        """
        for part, order in (("layer", 1), ("gradient", -1), ("statistic", 1)):
            failed = [row for row in self.rows if row.part == part and not row.ok][::order]
            if failed:
                return failed[0].label
        return None

    @property
    def verdict(self) -> str:
        """One sentence."""
        counts = [f"{sum(r.part == part for r in self.rows)} {part}s" for part in ("layer", "gradient", "statistic")]
        counted = ", ".join(count for count in counts if not count.startswith("0 "))
        if self.ok:
            return f"Equal within rounding: {counted}."
        failed = sum(not row.ok for row in self.rows)
        return f"First divergent: {self.first_divergent}. {failed} of {len(self.rows)} rows differ (of {counted})."

    def __str__(self) -> str:
        return "\n".join([self.verdict, *row_lines(self.rows), *self._ends()])

    def summary(self, around: int = 3) -> str:
        """The verdict, the diagnoses, and the rows around the first that diverges."""
        at = next((i for i, row in enumerate(self.rows) if row.label == self.first_divergent and not row.ok), 0)
        shown = self.rows[max(0, at - around) : at + around + 1]
        return "\n".join([self.verdict, *map(str, self.diagnoses), *row_lines(shown)])

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        from rich import box
        from rich.table import Table
        from rich.text import Text

        yield Text(self.verdict, style="bold green" if self.ok else "bold red")
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        head, *rows = cells(self.rows)
        wide = options.max_width >= 150
        kept = [i for i, name in enumerate(head) if wide or name not in _WIDE]
        for i in kept:
            table.add_column(head[i], justify="right" if head[i] in _NUMBERS else "left", overflow="fold")
        for row, written in zip(self.rows, rows, strict=True):
            table.add_row(*(Text(written[i]) for i in kept), style="" if row.ok else "red")
        yield table
        for line in self._ends():
            yield Text(line)

    def _repr_html_(self) -> str:
        return page.page(self, cells)

    def to_json(self) -> str:
        """The report as a JSON object: verdict, rows, diagnoses, conditions. Numbers that are not finite are null."""
        rows = []
        for row in self.rows:
            given = {k: v for k, v in vars(row).items() if k not in ("maps", "numbers")}
            numbers = {} if row.numbers is None else {k: _finite(v) for k, v in asdict(row.numbers).items()}
            rows.append({**given, **numbers, "ok": row.ok})
        return json.dumps(
            {
                "ok": self.ok,
                "first_divergent": self.first_divergent,
                "verdict": self.verdict,
                "diagnoses": [asdict(d) for d in self.diagnoses],
                "unpaired": {"torch": self.unpaired[0], "port": self.unpaired[1]},
                "notes": self.notes,
                "conditions": self.conditions,
                "rows": rows,
            },
            indent=1,
        )

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Writes one HTML page, which needs nothing else: errors of each layer, feature maps, rows. Needs matplotlib."""
        page.write(page.page(self, cells), path)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draws the error of each layer on a logarithmic axis, as .png, .svg or .pdf. Needs matplotlib."""
        save(page.error_figure(self.rows, "layer"), path, ParityError)

    @property
    def remarks(self) -> list[str]:
        """What was compared with nothing, and notes."""
        lines = []
        for names, side in zip(self.unpaired, ("PyTorch's", "The port's"), strict=True):
            if names:
                shown = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
                lines.append(f"{side} layers compared with none ({len(names)}): {shown}")
        return [*lines, *self.notes]

    def _ends(self) -> list[str]:
        lines = [f"Diagnosis, {d}" for d in self.diagnoses]
        if not self.ok and not self.diagnoses:
            lines.append("No known mistake gives these numbers.")
        return [*lines, *self.remarks, "; ".join(f"{name} {value}" for name, value in self.conditions.items())]


_NUMBERS = ("largest", "difference", "relative", "ulps", "noise", "float64")
_WIDE = ("kind", "paired by", "difference", "ulps")


def cells(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """The table of rows as texts, its head first."""
    found: list[tuple[str, ...]] = [(
        "", "PyTorch", "kind", "port", "paired by", "shape", "layout", "largest", "difference", "relative", "ulps",
        "noise", "float64",
    )]  # fmt: skip
    for row in rows:
        shape = sizes(row.shape)
        if row.numbers is None:
            found.append(
                (
                    "NO",
                    row.label,
                    row.kind,
                    row.port,
                    row.paired,
                    row.view or f"{shape} / {sizes(row.port_shape)}",
                    *[""] * 7,
                )
            )
            continue
        n = row.numbers
        exact = "" if n.exact is None else f"{n.exact:.1e}"
        found.append((
            "ok" if row.ok else "NO", row.label, row.kind, row.port, row.paired, shape, row.view, f"{n.largest:.3g}",
            f"{n.difference:.1e}", f"{n.relative:.1e}", f"{n.ulps:.3g}", f"{n.noise:.3g}", exact,
        ))  # fmt: skip
    return found


def row_lines(rows: Sequence[Row]) -> list[str]:
    """The table of rows as lines."""
    return aligned(cells(rows), left=range(7)) if rows else []


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not np.isfinite(value) else value
