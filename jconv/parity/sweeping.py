"""jconv against the PyTorch that is installed, on this machine: a sweep of configurations, gradients included."""

from __future__ import annotations

import contextlib
import functools
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jconv import functional
from jconv.algorithms.table import ALGORITHMS
from jconv.device import threads
from jconv.errors import AlgorithmError, ParityError
from jconv.parity.comparison import torch_or_error
from jconv.parity.tolerances import TOLERANCES
from jconv.printing import aligned
from jconv.tuning import progress

__all__ = ["Case", "Outcome", "SweepReport", "cases", "sweep"]

DTYPES = ("float32", "float64", "bfloat16", "float16", "complex64")
_SIZE = (9, 8, 7)
# Each program is compiled once and run once, so LLVM's optimiser would be most of the time.
_QUICKLY = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
_NAMES = ("input", "weight", "bias")
_LAST = {1: "NWC", 2: "NHWC", 3: "NDHWC"}


@dataclass(frozen=True)
class Case:
    """One call: a function of ``jconv.functional`` and of ``torch.nn.functional``, with shapes, dtype and options.

    Attributes:
        function: its name.
        shapes: of input, weight and bias, as PyTorch has them.
        options: PyTorch's keyword arguments; ``padding_mode`` pads first, as PyTorch's layers do.
        dtype: of all operands.
        algorithm: that jconv is asked for, or ``"auto"``.
        channel_last: whether jconv is given the input so.
    """

    function: str
    shapes: tuple[tuple[int, ...], ...]
    options: tuple[tuple[str, Any], ...] = ()
    dtype: str = "float32"
    algorithm: str = "auto"
    channel_last: bool = False

    def __str__(self) -> str:
        given = [f"{name} {shape}" for name, shape in zip(_NAMES, self.shapes, strict=False)]
        given += [f"{name}={value!r}" for name, value in self.options]
        last = ", channel-last" if self.channel_last else ""
        return f"{self.function}({', '.join(given)}), {self.dtype}{last}, algorithm {self.algorithm!r}"


@dataclass(frozen=True)
class Outcome:
    """What a case gave.

    Attributes:
        case: the call.
        error: the largest difference from float64 over the largest value, of the worst array; NaN where nothing ran.
        tolerance: what the table allows.
        array: the worst: ``"output"``, or the gradient of ``"input"``, ``"weight"`` or ``"bias"``.
        refused: the algorithm's reason not to serve; empty where it did.
        failure: what was raised instead of a result; empty where nothing was.
    """

    case: Case
    error: float = float("nan")
    tolerance: float = float("nan")
    array: str = ""
    refused: str = ""
    failure: str = ""

    @property
    def ok(self) -> bool:
        return bool(self.refused) or (not self.failure and self.error <= self.tolerance)

    @property
    def share(self) -> float:
        """The error over the tolerance; -1 for what was refused."""
        return float("inf") if self.failure else -1.0 if self.refused else self.error / self.tolerance

    def __str__(self) -> str:
        if self.failure:
            return f"{self.case}: {self.failure}"
        what = "the output" if self.array == "output" else f"the gradient of {self.array}"
        return f"{self.case}: {what} is off by {self.error:.2e} of its largest value; {self.tolerance:.0e} is allowed"


@dataclass(frozen=True)
class SweepReport:
    """What :func:`sweep` found. ``print(report)`` shows it as text, ``rich.print(report)`` as rich's tables.

    Attributes:
        outcomes: one for each case.
        conditions: versions, device and precision.
    """

    outcomes: tuple[Outcome, ...]
    conditions: dict[str, str]

    @property
    def ok(self) -> bool:
        return bool(self.outcomes) and all(outcome.ok for outcome in self.outcomes)

    @property
    def misses(self) -> tuple[Outcome, ...]:
        return tuple(outcome for outcome in self.outcomes if not outcome.ok)

    @property
    def worst(self) -> Outcome:
        """The case nearest to its tolerance, or farthest above it."""
        return max(self.outcomes, key=lambda outcome: outcome.share)

    def __str__(self) -> str:
        return "\n".join([*aligned(self._cells(), left=range(2)), *self._ends()])

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        from rich import box
        from rich.table import Table
        from rich.text import Text

        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        head, *rows = self._cells()
        for index, name in enumerate(head):
            table.add_column(name, justify="left" if index < 2 else "right")
        for row in rows:
            table.add_row(*map(Text, row), style="red" if row[-1] != "0" else "", end_section=row[1] == "all")
        yield table
        for line in self._ends():
            yield Text(line)

    def to_json(self) -> str:
        """The report as a JSON object: verdict, conditions, totals, the worst case, and every miss."""
        return json.dumps(
            {
                "ok": self.ok,
                "conditions": self.conditions,
                "cases": len(self.outcomes),
                "refused": sum(bool(outcome.refused) for outcome in self.outcomes),
                "worst": str(self.worst),
                "misses": [str(outcome) for outcome in self.misses],
                "groups": [dict(zip(self._cells()[0], row, strict=True)) for row in self._cells()[1:]],
            },
            indent=1,
        )

    def _cells(self) -> list[tuple[str, ...]]:
        """By function, by dtype and by algorithm."""
        cells: list[tuple[str, ...]] = [("", "", "compared", "refused", "worst error", "of what is allowed", "misses")]
        keys: dict[str, Callable[[Case], str]] = {
            "function": lambda case: case.function,
            "dtype": lambda case: case.dtype,
            "algorithm": lambda case: case.algorithm,
        }
        for title, key in keys.items():
            for name in dict.fromkeys(key(outcome.case) for outcome in self.outcomes):
                cells.append(_row(title, name, [o for o in self.outcomes if key(o.case) == name]))
        return [*cells, _row("", "all", list(self.outcomes))]

    def _ends(self) -> list[str]:
        found = [f"Miss: {outcome}" for outcome in self.misses[:10]]
        if len(self.misses) > 10:
            found.append(f"... and {len(self.misses) - 10} more")
        verdict = "jconv is PyTorch's equal" if self.ok else "jconv is not PyTorch's equal"
        return [
            *found, f"Worst: {self.worst}.", f"{verdict} in {len(self.outcomes) - len(self.misses)} of {len(self.outcomes)}.",
            "; ".join(f"{name} {value}" for name, value in self.conditions.items()),
        ]  # fmt: skip


def _row(title: str, name: str, outcomes: list[Outcome]) -> tuple[str, ...]:
    ran = [outcome for outcome in outcomes if not outcome.refused]
    worst = max(ran, key=lambda outcome: outcome.share, default=None)
    error = "" if worst is None or worst.failure else f"{worst.error:.1e}"
    share = "" if worst is None or worst.failure else f"{100 * worst.share:.0f} %"
    misses = sum(not outcome.ok for outcome in outcomes)
    return title, name, str(len(ran)), str(len(outcomes) - len(ran)), error, share, str(misses)


def sweep(
    chosen: Sequence[Case] | None = None, *, device: str | None = None, precision: str | None = None
) -> SweepReport:
    """Compares jconv's functions and their gradients with PyTorch's, which computes in float64 on the CPU.

    Args:
        chosen: the cases; by default all of :func:`cases`.
        device: JAX's name of a platform, such as ``"cpu"`` or ``"gpu"``; by default JAX's default.
        precision: of float32's products; by default ``"highest"`` on devices other than a CPU, whose own default may
            round operands to TF32 or bfloat16.

    Returns:
        A :class:`SweepReport`: ``.ok``, ``.outcomes``, ``.worst``. It prints itself.

    Raises:
        ParityError: if JAX has no such device.
        ImportError: if torch is not installed.

    >>> sweep([Case("conv1d", ((1, 2, 8), (3, 2, 3), (3,)))]).ok
    True
    """
    torch = torch_or_error()
    try:
        where = jax.devices(device)[0]
    except RuntimeError as error:
        found = ", ".join(sorted({d.platform for d in jax.devices()}))
        raise ParityError(f"device must be one that JAX has here, {found}, got {device!r}") from error
    if precision is None and where.platform != "cpu":
        precision = "highest"
    chosen = list(cases()) if chosen is None else list(chosen)
    if not chosen:
        raise ParityError("There are no cases to compare.")
    outcomes: list[Outcome] = []

    def compared(case: Case) -> Outcome:
        with jax.enable_x64(True), jax.default_device(where):
            return _compared(case, precision, where.platform == "cpu")

    with (
        ThreadPoolExecutor(min(4, threads())) as pool,
        contextlib.closing(progress(chosen, "comparing")) as steps,
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", "Using padding='same'")  # that PyTorch copies what it pads
        for start in range(0, len(chosen), 200):
            for outcome in pool.map(compared, chosen[start : start + 200]):
                outcomes.append(outcome)
                next(steps, None)
            jax.clear_caches()  # hundreds of small programs
    return SweepReport(
        tuple(outcomes),
        {
            "device": where.device_kind, "jax": jax.__version__, "torch": torch.__version__,
            "float32 products": f"at precision {precision!r}" if precision else "at the default precision",
        },
    )  # fmt: skip


def cases() -> Iterator[Case]:
    """Every configuration in every dtype, channel-last too, and in float32 by every algorithm.

    >>> {case.algorithm for case in cases()} == {"auto", *(a.name for a in ALGORITHMS)}
    True
    """
    for function, shapes, options in _configurations():
        for dtype in DTYPES:
            yield Case(function, shapes, options, dtype)
        if not function.startswith(("pad", "unfold", "fold")):
            yield Case(function, shapes, options, channel_last=True)
            for algorithm in ALGORITHMS:
                yield Case(function, shapes, options, algorithm=algorithm.name)


def _configurations() -> Iterator[tuple[str, tuple[tuple[int, ...], ...], tuple[tuple[str, Any], ...]]]:
    for n in (1, 2, 3):
        size = _SIZE[:n]
        convolutions: tuple[tuple[int, int, int, dict[str, Any]], ...] = (
            # channels in and out, window, options
            (3, 4, 3, {}),
            (3, 4, 1, {}),
            (3, 4, 3, {"stride": 2, "padding": 1}),
            (3, 4, 3, {"stride": (2, 1, 3)[:n], "padding": (1, 0, 2)[:n], "dilation": (1, 2, 1)[:n]}),
            (3, 4, 3, {"padding": "same"}),
            (3, 4, 4, {"padding": "same"}),
            (3, 4, 2, {"padding": "same", "dilation": 3}),
            (4, 6, 2, {"stride": 2}),
            (6, 4, 3, {"groups": 2, "padding": 1}),
            (4, 4, 3, {"groups": 4, "padding": 1}),
            (2, 6, 3, {"groups": 2, "stride": 2}),
            (16, 16, 3, {"groups": 2, "padding": 1}),
            (3, 4, 3, {"padding": 1, "padding_mode": "reflect"}),
            (3, 4, 3, {"padding": 2, "padding_mode": "replicate"}),
            (3, 4, 3, {"padding": 1, "padding_mode": "circular"}),
        )
        for inputs, outputs, k, options in convolutions:
            groups = options.get("groups", 1)
            shapes = ((2, inputs, *size), (outputs, inputs // groups, *(k,) * n), (outputs,))
            yield f"conv{n}d", shapes, tuple(options.items())
        transposed: tuple[tuple[int, int, int, dict[str, Any]], ...] = (
            (3, 4, 3, {}),
            (3, 4, 2, {"stride": 2}),
            (3, 4, 4, {"stride": 2, "padding": 1}),
            (3, 4, 3, {"stride": 2, "padding": 1, "output_padding": 1}),
            (3, 4, 3, {"stride": (2, 1, 3)[:n], "padding": (1, 0, 2)[:n]}),
            (3, 4, 3, {"dilation": 2}),
            (4, 6, 3, {"groups": 2, "stride": 2, "padding": 1}),
            (4, 4, 4, {"groups": 4, "stride": 2, "padding": 1}),
        )
        for inputs, outputs, k, options in transposed:
            groups = options.get("groups", 1)
            shapes = ((2, inputs, *size), (inputs, outputs // groups, *(k,) * n), (outputs,))
            yield f"conv_transpose{n}d", shapes, tuple(options.items())
        for mode in ("constant", "reflect", "replicate", "circular"):
            yield "pad", ((2, 3, *size),), (("pad", (1, 2) * n), ("mode", mode))
    for options in ({"kernel_size": 3}, {"kernel_size": (2, 3), "stride": 2, "padding": 1, "dilation": (1, 2)}):
        yield "unfold", ((2, 3, 9, 8),), tuple(options.items())
    yield "fold", ((2, 12, 56),), (("output_size", (9, 8)), ("kernel_size", 2))
    yield "fold", ((2, 12, 20),), (("output_size", (9, 8)), ("kernel_size", 2), ("stride", 2), ("padding", (1, 0)))


def _compared(case: Case, precision: str | None, cpu: bool) -> Outcome:
    try:
        if refused := _refusal(case, precision):
            return Outcome(case, refused=refused)
        theirs = _theirs(replace(case, algorithm="auto", channel_last=False))
        ours = _ours(case, theirs["output"].shape, precision, cpu)
    except Exception as error:  # whatever it is, it is not PyTorch's result
        return Outcome(case, failure=f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")
    tolerance = TOLERANCES[case.algorithm, case.dtype]
    errors = {name: _error(ours[name], expected) for name, expected in theirs.items()}
    worst = max(errors, key=lambda name: errors[name])
    return Outcome(case, errors[worst], tolerance, worst)


def _drawn(shape: tuple[int, ...], dtype: str, seed: int) -> np.ndarray:
    rng = np.random.default_rng([seed, *shape])
    values: Any = rng.standard_normal(shape)
    if dtype.startswith("complex"):
        values = values + 1j * rng.standard_normal(shape)
    return np.asarray(values).astype(jnp.dtype(dtype))


def _error(ours: Any, theirs: np.ndarray) -> float:
    wide = np.complex128 if theirs.dtype.kind == "c" else np.float64
    ours = np.asarray(ours).astype(wide)
    if ours.shape != theirs.shape or not np.isfinite(ours).all():
        return float("inf")
    return float(np.abs(ours - theirs).max() / (np.abs(theirs).max() or 1.0))


def _cotangent(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    return _drawn(shape, dtype, 7)


def _operands(case: Case) -> list[np.ndarray]:
    return [_drawn(shape, case.dtype, seed) for seed, shape in enumerate(case.shapes)]


@functools.lru_cache(16)  # every algorithm is compared with the same
def _theirs(case: Case) -> dict[str, np.ndarray]:
    """PyTorch's result and gradients, in 64 bits a number."""
    import torch
    from torch.nn import functional as F

    wide = np.complex128 if case.dtype.startswith("complex") else np.float64
    tensors = [torch.from_numpy(x.astype(wide)).requires_grad_() for x in _operands(case)]
    out = _call(F, case, tensors)
    g = torch.from_numpy(_cotangent(tuple(out.shape), case.dtype).astype(wide))
    found = torch.autograd.grad(out, tensors, g)
    names = _NAMES[: len(tensors)]
    return {"output": out.detach().numpy()} | {
        name: grad.resolve_conj().numpy() for name, grad in zip(names, found, strict=True)
    }


def _refusal(case: Case, precision: str | None) -> str:
    """Why the named algorithm does not serve, as the door says it; what fails further in is broken."""
    if case.algorithm == "auto":
        return ""

    def call(*arrays: Any) -> Any:
        return _call(functional, case, arrays, algorithm=case.algorithm, precision=precision)

    try:
        jax.eval_shape(call, *_operands(case))
    except AlgorithmError as error:
        return str(error)
    return ""


def _ours(case: Case, shape: tuple[int, ...], precision: str | None, cpu: bool) -> dict[str, Any]:
    convolves = case.function.startswith("conv")
    n = int(case.function[-2]) if convolves else 0
    settings: dict[str, Any] = {"algorithm": case.algorithm, "precision": precision} if convolves else {}
    operands = _operands(case)
    if case.channel_last:
        settings["data_format"] = _LAST[n]
        operands = [np.moveaxis(operands[0], 1, -1), *operands[1:]]

    def call(*arrays: Any) -> Any:
        return _call(functional, case, arrays, **settings)

    def program(g: Any, *arrays: Any) -> Any:
        out, pullback = jax.vjp(call, *arrays)
        return out, pullback(g)

    g = _cotangent(shape, case.dtype)
    if case.dtype.startswith("complex"):
        g = g.conj()  # JAX's gradient of complex numbers is the conjugate of PyTorch's
    g = np.moveaxis(g, 1, -1) if case.channel_last else g
    out, found = jax.jit(program, compiler_options=_QUICKLY if cpu else None)(g, *operands)
    if case.dtype.startswith("complex"):
        found = [grad.conj() for grad in found]
    if case.channel_last:
        out, found = np.moveaxis(out, -1, 1), [np.moveaxis(found[0], -1, 1), *found[1:]]
    return {"output": out, **dict(zip(_NAMES, found, strict=False))}


def _call(module: Any, case: Case, arrays: Sequence[Any], **settings: Any) -> Any:
    """The function of one of the two libraries; a padding mode pads first, as the layers of both do."""
    options = dict(case.options)
    mode = options.pop("padding_mode", None)
    x, *rest = arrays
    if mode is not None:
        n = int(case.function[-2])
        pads = (options.pop("padding"),) * 2 * n
        if settings.get("data_format"):
            x = jnp.moveaxis(module.pad(jnp.moveaxis(x, -1, 1), pads, mode=mode), 1, -1)
        else:
            x = module.pad(x, pads, mode=mode)
    return getattr(module, case.function)(x, *rest, **options, **settings)
