"""lax against jconv, on this machine, in a minute: what the commands ``jconv bench`` and ``jconv demo`` time.

The benchmarks of the repository, with networks and other libraries, are another thing: ``make bench``.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jconv import store
from jconv.algorithms.base import lax_convolution
from jconv.convolve import convolve
from jconv.errors import ConvError
from jconv.planner import plan
from jconv.printing import aligned, number
from jconv.problem import ConvProblem
from jconv.tuning import CHANNEL_LAST, DIRECTIONS, progress, race

__all__ = ["Comparison", "Report", "compare", "networks"]

TOLERANCE = 1e-4
_NUMBERS = ("lax", "jconv", "ratio")
_WORDS = {"forward": "forward", "input": "input gradient", "weight": "kernel gradient"}
_NETWORKS = (
    # name, image, window, out features, stride, dilation, groups
    ("ResNet-50 7x7/2", (1, 224, 224, 3), (7, 7), 64, 2, 1, 1),
    ("ResNet-50 3x3", (1, 28, 28, 128), (3, 3), 128, 1, 1, 1),
    ("ResNet-50 1x1", (1, 14, 14, 1024), (1, 1), 256, 1, 1, 1),
    ("MobileNetV2 depthwise 3x3", (1, 56, 56, 144), (3, 3), 144, 1, 1, 144),
    ("ConvNeXt-T depthwise 7x7", (1, 56, 56, 96), (7, 7), 96, 1, 1, 96),
    ("ResNeXt-50 3x3, 32 groups", (1, 28, 28, 256), (3, 3), 256, 1, 1, 32),
    ("WaveNet 1-D, dilation 8", (1, 16000, 32), (2,), 64, 1, 8, 1),
    ("3-D U-Net 3x3x3", (1, 32, 32, 32, 32), (3, 3, 3), 32, 1, 1, 1),
)

_BLOCK = {"widen": (1, 1, 24, 144), "depthwise": (3, 3, 1, 144), "dense": (3, 3, 144, 32)}


@dataclass(frozen=True)
class Comparison:
    """One convolution in one direction.

    Attributes:
        name: of the convolution.
        direction: ``"forward"``, or the gradients ``"input"`` and ``"weight"``.
        problem: the convolution of that direction.
        lax, jconv: nanoseconds of a run, or the reason why it failed.
        algorithm: the planner's choice.
        error: the largest difference of the results over the largest value; NaN where one failed.
    """

    name: str
    direction: str
    problem: ConvProblem
    lax: int | str
    jconv: int | str
    algorithm: str
    error: float

    @property
    def ratio(self) -> float | None:
        """lax's time over jconv's."""
        return self.lax / self.jconv if isinstance(self.lax, int) and isinstance(self.jconv, int) else None

    @property
    def agrees(self) -> bool:
        return self.error <= TOLERANCE


@dataclass(frozen=True)
class Report:
    """What :func:`compare` found. ``print(report)`` shows it as text, ``rich.print(report)`` as rich's table."""

    place: store.Place
    rows: tuple[Comparison, ...]

    @property
    def ratio(self) -> float:
        """The geometric mean of lax's times over jconv's."""
        ratios = [row.ratio for row in self.rows if row.ratio is not None]
        return float(np.exp(np.mean(np.log(ratios)))) if ratios else float("nan")

    @property
    def agrees(self) -> bool:
        return all(row.agrees for row in self.rows)

    def __str__(self) -> str:
        cells = self._cells()
        left = [index for index, name in enumerate(cells[0]) if name not in _NUMBERS]
        return "\n".join([self._title(), *aligned(cells, left), *self._notes()])

    def __rich_console__(self, console: Any, options: Any) -> Any:
        from rich import box
        from rich.table import Table
        from rich.text import Text

        head, *rows = self._cells()
        table = Table(title=self._title(), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for name in head:
            table.add_column(name, justify="right" if name in _NUMBERS else "left")
        for row in rows:
            table.add_row(*map(Text, row))
        yield table
        yield from map(Text, self._notes())

    def to_json(self) -> str:
        """The report as a JSON object: the place, and a list of rows with times in nanoseconds."""
        rows = [
            {
                "name": row.name,
                "direction": row.direction,
                "problem": store.problem_to_json(row.problem),
                "lax_ns": row.lax if isinstance(row.lax, int) else None,
                "jconv_ns": row.jconv if isinstance(row.jconv, int) else None,
                "lax_over_jconv": row.ratio,
                "algorithm": row.algorithm,
                "error": None if np.isnan(row.error) else row.error,
                "agrees": row.agrees,
            }
            for row in self.rows
        ]
        mean = None if np.isnan(self.ratio) else self.ratio
        return json.dumps({**self.place._asdict(), "lax_over_jconv": mean, "rows": rows}, indent=1)

    def _title(self) -> str:
        threads = f", threads {self.place.threads}" if self.place.threads else ""
        return f"{self.place.device}{threads}, jax {self.place.jax}, jconv {self.place.jconv}; ms"

    def _cells(self) -> list[tuple[str, ...]]:
        cells: list[tuple[str, ...]] = [("convolution", "direction", "lax", "jconv", "ratio", "algorithm")]
        for row in self.rows:
            times = [number(t / 1e6) if isinstance(t, int) else "failed" for t in (row.lax, row.jconv)]
            ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
            cells.append((row.name, _WORDS[row.direction], *times, ratio, row.algorithm))
        return cells

    def _notes(self) -> list[str]:
        failed = [
            f"{who} failed on {row.name}, {row.direction}: {found}"
            for row in self.rows
            for who, found in (("lax", row.lax), ("jconv", row.jconv))
            if isinstance(found, str)
        ]
        apart = [
            f"{row.name}, {row.direction}: the results differ by {row.error:.1e} of the largest value"
            for row in self.rows
            if row.error > TOLERANCE
        ]
        same = [f"The results agree within {TOLERANCE:.0e} of the largest value."] if self.agrees else []
        return [f"lax over jconv, geometric mean: {self.ratio:.2f}.", *failed, *apart, *same]


def networks() -> dict[str, ConvProblem]:
    """Eight convolutions of well-known networks, in float32.

    >>> networks()["ResNet-50 1x1"].output_shape
    (1, 256, 14, 14)
    """
    problems = {}
    for name, image, window, features, stride, dilation, groups in _NETWORKS:
        n = len(window)
        kernel = (*window, image[-1] // groups, features)
        lhs, rhs = (jax.ShapeDtypeStruct(shape, np.float32) for shape in (image, kernel))
        problems[name] = ConvProblem.of(
            lhs, rhs, (stride,) * n, "SAME", None, (dilation,) * n, CHANNEL_LAST[n], groups
        )  # fmt: skip
    return problems


def block(image: Any, *kernels: Any) -> jax.Array:
    """The sum of what three convolutions make of an image: widen, depthwise, dense, each under its name.

    >>> jax.eval_shape(block, *block_arguments()).shape
    ()
    """
    for name, kernel in zip(_BLOCK, kernels, strict=True):
        groups = image.shape[-1] // kernel.shape[2]
        with jax.named_scope(name):
            image = jax.nn.relu(
                lax.conv_general_dilated(
                    image, kernel, (1, 1), "SAME", dimension_numbers=CHANNEL_LAST[2], feature_group_count=groups
                )
            )
    return image.sum()


def block_arguments() -> list[jax.ShapeDtypeStruct]:
    """The shapes of an image and of the kernels for :func:`block`.

    >>> [argument.shape for argument in block_arguments()][:2]
    [(1, 56, 56, 24), (1, 1, 24, 144)]
    """
    return [jax.ShapeDtypeStruct(shape, np.float32) for shape in ((1, 56, 56, 24), *_BLOCK.values())]


def compare(
    problems: Mapping[str, ConvProblem], *, directions: Sequence[str] = tuple(DIRECTIONS), seconds: float = 0.5
) -> Report:
    """Times lax's convolution and its gradients against jconv's, and compares the results.

    Wall time of compiled programs on random operands, on JAX's default device: medians of runs that take turns, after
    a warm-up. Times are worth what the machine's quiet is worth.

    Args:
        problems: forward convolutions, by name.
        directions: any of ``"forward"``, ``"input"``, ``"weight"``.
        seconds: for the runs of one convolution in one direction, compiling not counted.

    Returns:
        A :class:`Report` with one row for each problem and direction.

    Raises:
        ConvError: if JAX's default device is not on its first backend.

    >>> problem = ConvProblem.of(jnp.ones((1, 3, 8, 8)), jnp.ones((4, 3, 3, 3)), (1, 1), "SAME")
    >>> compare({"mine": problem}, directions=["weight"], seconds=0).agrees
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
    wanted = [(name, problem, direction) for name, problem in problems.items() for direction in directions]
    with contextlib.closing(progress(wanted, "timing")) as steps:
        return Report(place, tuple(_compared(*step, platform, seconds) for step in steps))


def _compared(name: str, problem: ConvProblem, direction: str, platform: str, seconds: float) -> Comparison:
    rng = np.random.default_rng(0)
    shapes = {
        "lhs": store.physical(problem.lhs_shape, problem.layout.lhs_spec),
        "rhs": store.physical(problem.rhs_shape, problem.layout.rhs_spec),
        "out": problem.physical_output_shape,
    }
    lhs, rhs, out = (jnp.asarray(rng.standard_normal(shape, np.float32), problem.dtype) for shape in shapes.values())
    operands = {"forward": (lhs, rhs), "input": (out, rhs), "weight": (lhs, out)}[direction]
    results: dict[str, np.ndarray] = {}

    def compiler(who: str, conv: Callable[[Any, Any], Any]) -> Callable[[], Callable[[], Any]]:
        functions = {
            "forward": conv,
            "input": lambda g, w: jax.linear_transpose(lambda x: conv(x, w), lhs)(g)[0],
            "weight": lambda x, g: jax.linear_transpose(lambda w: conv(x, w), rhs)(g)[0],
        }

        def compiled() -> Callable[[], Any]:
            program = jax.jit(functions[direction]).lower(*operands).compile()
            results[who] = np.asarray(program(*operands), np.float64)
            return lambda: program(*operands).block_until_ready()

        return compiled

    contenders = {
        "lax": lambda x, w: lax_convolution(problem, x, w),
        "jconv": lambda x, w: convolve(x, w, problem),
    }
    times = race({who: compiler(who, conv) for who, conv in contenders.items()}, seconds)
    error = float("nan")
    if len(results) == 2:
        largest = np.abs(results["lax"]).max(initial=0)
        error = float(np.abs(results["lax"] - results["jconv"]).max(initial=0) / (largest or 1))
    posed = DIRECTIONS[direction](problem)
    chosen = plan(posed, platform).algorithm.name
    return Comparison(name, direction, posed, times["lax"], times["jconv"], chosen, error)
