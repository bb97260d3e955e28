"""What the reports share: a table as lines of text, a number in three digits, a picture and its file."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from jconv.errors import ConvError

__all__ = ["aligned", "new_figure", "number", "save", "sizes"]


def aligned(table: Sequence[Sequence[str]], left: Collection[int] = (0,), gap: str = "  ") -> list[str]:
    """A table of texts as lines: the columns in `left` to the left, the others to the right.

    >>> print(*aligned([("name", "ms"), ("xla", "12.5")]), sep="\\n")
    name    ms
    xla   12.5
    """
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    sides = [str.ljust if index in left else str.rjust for index in range(len(widths))]
    return [
        gap.join(side(cell, width) for side, cell, width in zip(sides, row, widths, strict=True)).rstrip()
        for row in table
    ]


def number(value: float) -> str:
    """Three digits of a number, without an exponent above.

    >>> number(1234.5), number(0.012345)
    ('1234', '0.0123')
    """
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}" if value >= 0.001 or value == 0 else f"{value:.1g}"


def sizes(shape: Iterable[int]) -> str:
    """The sizes of a shape, as a table has them.

    >>> sizes((1, 3, 224, 224)), sizes(())
    ('1x3x224x224', 'scalar')
    """
    return "x".join(map(str, shape)) or "scalar"


def new_figure(error: type[ConvError] = ConvError, **options: Any) -> Any:
    """matplotlib's Figure, which needs no display.

    Raises:
        error: if matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise error("A picture needs matplotlib, which is not installed; pip install matplotlib.") from None
    return Figure(**options)


def save(figure: Any, path: str | os.PathLike[str], error: type[ConvError] = ConvError) -> None:
    """Writes a picture in the format that its ending names.

    Raises:
        error: if the file cannot be written.
    """
    try:
        figure.savefig(path, dpi=110)
    except (OSError, ValueError) as found:
        raise error(
            f"path {str(path)!r} cannot be written ({found}); name a .png, .pdf or .svg in a folder that can be"
        ) from None
