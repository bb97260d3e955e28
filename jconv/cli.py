"""The command line: ``jconv demo``, ``explain``, ``tune``, ``bench``, ``parity``.

Exit codes: 0 fine, 1 a check failed, 2 bad input. Results go to stdout, everything else to stderr.
"""

from __future__ import annotations

import contextlib
import inspect
import re
import signal
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

try:
    import typer
    from rich.console import Console
except ImportError as error:
    print(f"jconv's command line needs {error.name}; pip install 'jconv[cli]'", file=sys.stderr)
    raise SystemExit(2) from None

import jax
import numpy as np

import jconv
from jconv import bench as benchmark
from jconv import explaining, target, tuning
from jconv.errors import ConvError
from jconv.problem import ConvProblem, integer, layout_of

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False)

# What the library calls an argument, and what the user typed.
_OF_A_PROBLEM = {
    "lhs": "--lhs", "rhs": "--rhs", "window_strides": "--strides", "padding": "--padding",
    "lhs_dilation": "--lhs-dilation", "rhs_dilation": "--rhs-dilation", "feature_group_count": "--groups",
    "dimension_numbers": "--layout",
}  # fmt: skip


@app.callback(invoke_without_command=True)
def options(version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False) -> None:
    """Convolution for JAX and Flax with PyTorch's semantics and a choice of algorithm.

    Exit codes: 0 fine, 1 a check failed, 2 bad input. Results go to stdout,
    progress and errors to stderr.

    \b
    Examples:
      jconv demo
      jconv explain mypackage.model:forward --shape 8,224,224,3
      jconv tune --lhs 8,56,56,64 --rhs 3,3,64,64
      jconv bench --json
      jconv parity
    """
    if version:
        print(f"jconv {jconv.__version__}, jax {jax.__version__}")
        raise typer.Exit()


@app.command()
def demo(
    as_json: Annotated[bool, typer.Option("--json", help="Print the timings as JSON, and nothing else.")] = False,
) -> None:
    """Explain and time a block of three convolutions.

    Shows what runs in the gradient of the block, then times each convolution
    with lax and with jconv, forward and both gradients, and compares results,
    in half a minute. The exit code is 1 if they differ.

    \b
    Examples:
      jconv demo
      jconv demo --json
    """
    with _one_sentence():
        gradient = jax.grad(benchmark.block, (0, 1, 2, 3))
        report = explaining.explain(gradient, *benchmark.block_arguments())
        if not as_json:
            _show(report)
            print()
        forwards = {row.place.layer: row.problem for row in report.rows if row.direction == "forward"}
        timed = benchmark.compare(forwards, seconds=0.3)
    _checked(timed, as_json)


@app.command()
def explain(
    target_: Annotated[
        str, typer.Argument(metavar="TARGET", help="package.module:function, or path/file.py:function.")
    ],
    shape: Annotated[
        list[str] | None,
        typer.Option(metavar="SIZES", help="Of an argument, as 8,224,224,3; once for each argument."),
    ] = None,
    dtype: Annotated[str, typer.Option(metavar="NAME", help="Of the arguments.")] = "float32",
    grad: Annotated[
        bool, typer.Option("--grad", help="The gradient of the sum of what it returns, instead of it.")
    ] = False,
    platform: Annotated[
        str | None, typer.Option(metavar="NAME", help="cpu, cuda, rocm or tpu.  [default: that of this machine]")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the time of each layer, as .png, .pdf or .svg.")
    ] = None,
    tune: Annotated[bool, typer.Option("--tune", help="First time its convolutions on this device.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Show each convolution of a function, and why it runs so.

    Where it is written, how often it runs, by which algorithm and why, what
    lax's takes and what jconv's takes.

    The function is traced with arguments of these shapes, and not run. TARGET
    may be a path of attributes (module:model.encoder); what ends in () is
    called without arguments first (module:make_model()). It must give a
    function of arrays, an NNX module, a Linen module, or a pair of one with its
    variables. --grad differentiates a model by its parameters and a function by
    its arguments. Modules are found as python -m finds them.

    \b
    Examples:
      jconv explain mypackage.model:forward --shape 8,224,224,3
      jconv explain train.py:make_model() --shape 8,32,32,3 --grad
      jconv explain layers.py:block --shape 1,64,64,8 --shape 3,3,8,8 \\
        --plot time.png
      jconv explain train.py:step --tune --json
    """
    with _one_sentence():
        with _options(dtype="--dtype"):
            element = tuning.dtype_of(dtype)
        arguments = [jax.ShapeDtypeStruct(_numbers("--shape", text, 1), element) for text in shape or ()]
        with contextlib.redirect_stdout(sys.stderr), _options(platform="--platform"):
            made = target.call(target.load(target_), target_, arguments)
            if grad:
                made = target.gradient(made)
            report = explaining.explain(made.fn, *made.args, platform=platform)
        failed = False
        if tune:
            if report.platform != jax.default_backend():
                raise ConvError(
                    f"--tune times this machine's {jax.default_backend()}, not --platform {platform}; leave one of them out"
                )
            timed = tuning.tune_problems(row.problem for row in report.rows)
            failed = any(row.failures for row in timed.rows)
            report = explaining.explain(made.fn, *made.args, platform=platform)
        if plot is not None and report.rows:
            with _options(path="--plot", plot="--plot"):
                report.plot(plot)
            print(f"Picture: {plot}", file=sys.stderr)
    print(report.to_json()) if as_json else _show(report)
    if failed:
        raise typer.Exit(1)


@app.command()
def bench(
    seconds: Annotated[float, typer.Option(metavar="SECONDS", help="For the runs of one convolution.")] = 0.5,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Time eight convolutions with lax and with jconv.

    Of well-known networks, each forward and both gradients, in float32, in about a minute: wall time,
    medians of runs that take turns. The exit code is 1 if results differ. The
    full benchmark, with networks and other libraries, is make bench in jconv's
    repository.

    \b
    Examples:
      jconv bench
      jconv bench --seconds 2 --json
    """
    with _one_sentence(), _options(seconds="--seconds"):
        timed = benchmark.compare(benchmark.networks(), seconds=seconds)
    _checked(timed, as_json)


@app.command()
def tune(
    file: Annotated[
        Path | None,
        typer.Argument(metavar="FILE", help="Problems: a JSON list of rows in oneDNN's letters, or an export."),
    ] = None,
    lhs: Annotated[
        str | None, typer.Option(metavar="SIZES", help="Sizes of the input, in the order of --layout.")
    ] = None,
    rhs: Annotated[
        str | None, typer.Option(metavar="SIZES", help="Sizes of the kernel, in the order of --layout.")
    ] = None,
    strides: Annotated[
        str | None, typer.Option(metavar="NUMBERS", help="One for each spatial axis.  [default: ones]")
    ] = None,
    padding: Annotated[
        str,
        typer.Option(metavar="PADDING", help="SAME, SAME_LOWER, VALID, or low:high for each spatial axis, as 0:1,0:1."),
    ] = "SAME",
    layout: Annotated[
        str | None,
        typer.Option(metavar="AXES", help="Of input, kernel and output, as NCHW,OIHW,NCHW.  [default: channel-last]"),
    ] = None,
    lhs_dilation: Annotated[
        str | None, typer.Option(metavar="NUMBERS", help="One for each spatial axis.  [default: ones]")
    ] = None,
    rhs_dilation: Annotated[
        str | None, typer.Option(metavar="NUMBERS", help="One for each spatial axis.  [default: ones]")
    ] = None,
    groups: Annotated[int, typer.Option(metavar="NUMBER", help="Feature groups.")] = 1,
    dtype: Annotated[
        str, typer.Option(metavar="NAME", help="Of input and kernel, and of the rows of FILE.")
    ] = "float32",
    directions: Annotated[
        str, typer.Option(metavar="NAMES", help="The convolution itself, and its two gradients.")
    ] = "forward,input,weight",
    seconds: Annotated[float, typer.Option(metavar="SECONDS", help="For the runs of one problem.")] = 0.5,
    again: Annotated[bool, typer.Option("--again", help="Measure also what is known already.")] = False,
    merge: Annotated[
        Path | None, typer.Option(metavar="FILE", help="First take the measurements of this export.")
    ] = None,
    export: Annotated[
        Path | None, typer.Option(metavar="FILE", help="At the end write all measurements to this file.")
    ] = None,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Measure the constants of the estimates on this CPU; goes alone.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Time the algorithms on this device; plans then take the fastest.

    The times are kept in the user's data directory, or in $JCONV_STORE, and later processes use them, too. What is
    known is not timed again. The exit code is 1 if an algorithm failed, and 2 for bad input.

    \b
    A row of a FILE; of the spatial axes d, h, w, the last "nd" have letters:
      {"nd": 1, "mb": 8, "g": 1, "ic": 64, "oc": 32, "deconv": false,
       "iw": 56, "ow": 28, "kw": 3, "sw": 2, "pw": 1, "prw": 0, "dw": 1}
    That is: images, groups, features of input and output, whether transposed;
    and of each axis input, output, kernel, stride, padding on its two sides,
    dilation.

    \b
    Examples:
      jconv tune --lhs 8,56,56,64 --rhs 3,3,64,64
      jconv tune --lhs 1,64,28,28 --rhs 64,1,3,3 --groups 64 \\
        --layout NCHW,OIHW,NCHW --directions forward
      jconv tune problems.json --export measured.jsonl
      jconv tune --merge measured.jsonl
      jconv tune --calibrate
    """
    with _one_sentence():
        if calibrate:
            others = {"FILE": file, "--lhs": lhs, "--rhs": rhs, "--merge": merge, "--export": export}
            given = [name for name, value in others.items() if value is not None]
            if given:
                raise ConvError(f"--calibrate goes alone, got also {', '.join(given)}; run jconv tune for each")
            calibration = tuning.calibrate()
            print(calibration.to_json() if as_json else calibration)
            return
        shape = {
            "--strides": strides, "--padding": None if padding == "SAME" else padding, "--layout": layout,
            "--lhs-dilation": lhs_dilation, "--rhs-dilation": rhs_dilation, "--groups": None if groups == 1 else groups,
        }  # fmt: skip
        if lhs is None and rhs is None and any(shape.values()):
            given = ", ".join(name for name, value in shape.items() if value is not None)
            raise ConvError(f"--lhs and --rhs must be given for {given} to belong to; a row of a FILE has its own")
        problems = []
        if file is not None:
            with _options(path="FILE", dtype="--dtype", directions="--directions"):
                problems += tuning.read_problems(file, dtype=dtype, directions=directions.split(","))
        if lhs is not None or rhs is not None:
            forward = _problem(lhs, rhs, strides, padding, layout, lhs_dilation, rhs_dilation, groups, dtype)
            with _options(directions="--directions"):
                problems += tuning.in_directions(forward, directions.split(","))
        if not problems and merge is None and export is None:
            what = (
                "--lhs and --rhs, or a FILE of problems" if file is None else f"a FILE with problems; {file} has none"
            )
            raise ConvError(f"nothing to tune: name {what}")
        if merge is not None:
            with _options(path="--merge"):
                print(f"{tuning.import_measurements(merge)} new records from {merge}", file=sys.stderr)
        with _options(seconds="--seconds"):
            report = tuning.tune_problems(problems, seconds=seconds, again=again)
        if export is not None:
            with _options(path="--export"):
                print(f"{tuning.export_measurements(export)} records in {export}", file=sys.stderr)
    if as_json:
        print(report.to_json())
    elif problems:
        _show(report)
    if any(row.failures for row in report.rows):
        raise typer.Exit(1)


@app.command()
def parity(
    theirs: Annotated[
        str | None,
        typer.Argument(metavar="TORCH", help="package.module:factory or path/file.py:factory of a torch.nn.Module."),
    ] = None,
    ours: Annotated[
        str | None,
        typer.Argument(metavar="JAX", help="The same of its port: what jconv.parity.compare takes."),
    ] = None,
    inputs: Annotated[
        list[str] | None,
        typer.Option(
            "--input",
            metavar="FILE_OR_SIZES",
            help="As PyTorch takes it: a .npy file, or sizes as 1,3,224,224 of random numbers; once for each input.",
        ),
    ] = None,
    weights: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A .pth or .safetensors file to load into PyTorch's module and the port."),
    ] = None,
    load: Annotated[bool, typer.Option("--load", help="Load the PyTorch module's own weights into the port.")] = False,
    train: Annotated[bool, typer.Option("--train", help="Compare in train mode.")] = False,
    gradients: Annotated[bool, typer.Option(help="Compare gradients, too.")] = True,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the report as one HTML page.")] = None,
    device: Annotated[str | None, typer.Option(metavar="NAME", help="cpu, gpu or tpu.  [default: JAX's own]")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Compare with PyTorch: this library, or a network and its port.

    Without arguments, the library's own check on this machine: a sweep of
    convolutions, gradients included, against the PyTorch that is installed,
    which computes in float64; in a few minutes. With two, a PyTorch network and
    its JAX port, layer by layer, with the first layer that diverges and why.

    A factory is a function without arguments that makes the network, or the
    network itself. A port is an NNX module, a pair of a Linen module and its
    variables, a pair of a function and its parameters, or a function.

    The exit code is 1 if something differs, and 2 for bad input or where
    PyTorch is not installed.

    \b
    Examples:
      jconv parity
      jconv parity model_torch.py:make model_jax.py:make --load \\
        --input 1,3,224,224 --html report.html
      jconv parity --device gpu --json
    """
    with _one_sentence():
        try:
            import torch
        except ImportError:
            raise ConvError("parity compares with PyTorch, which is not installed; pip install torch") from None
        from jconv import parity as tool

        if theirs is None:
            alone = {"--input": inputs, "--weights": weights, "--load": load, "--train": train, "--html": html}
            given = [name for name, value in alone.items() if value]
            if given:
                raise ConvError(
                    f"{', '.join(given)} belong{'s' if len(given) == 1 else ''} to a comparison of two networks; name both, TORCH and JAX"
                )
            with _options(device="--device"):
                report = tool.sweep(device=device)
        else:
            if ours is None:
                raise ConvError(f"TORCH and JAX go together, got only {theirs!r}; name the port, too")
            if not inputs:
                raise ConvError(
                    "--input is missing; give sizes as PyTorch takes them, such as 1,3,224,224, or a .npy file"
                )
            arrays = [_array(text, seed) for seed, text in enumerate(inputs)]
            with contextlib.redirect_stdout(sys.stderr), _on(device):
                module, port = _made(theirs, torch.nn.Module), _made(ours)
                if weights is not None:
                    _load(module, weights)
                report = tool.compare(
                    module, port, *arrays, gradients=gradients, train=train, load=load or weights is not None
                )
            if html is not None:
                with _options(path="--html"):
                    report.to_html(html)
                print(f"Page: {html}", file=sys.stderr)
    print(report.to_json()) if as_json else _show(report)
    if not report.ok:
        raise typer.Exit(1)


def main() -> None:
    """The entry point of ``jconv``."""
    warnings.showwarning = lambda message, *_: print(f"jconv: {message}", file=sys.stderr)
    if hasattr(signal, "SIGPIPE"):  # in front of `head` end as any other command does
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    app()


def _show(report: Any) -> None:
    """rich's table in a terminal, plain text elsewhere."""
    console = Console()
    console.print(report) if console.is_terminal else print(report)


def _checked(report: benchmark.Report, as_json: bool) -> None:
    print(report.to_json()) if as_json else _show(report)
    if not report.agrees:
        raise typer.Exit(1)


@contextlib.contextmanager
def _one_sentence() -> Iterator[None]:
    """Bad input as one sentence and exit code 2."""
    try:
        yield
    except ConvError as error:
        print(f"jconv: {error}", file=sys.stderr)
        raise typer.Exit(2) from None


@contextlib.contextmanager
def _options(**typed: str) -> Iterator[None]:
    """Errors in the user's words: each argument by what was typed for it, but not what stands in quotes."""
    try:
        yield
    except ConvError as error:
        names = rf"'[^']*'|\b(?:{'|'.join(typed)})\b"
        raise ConvError(re.sub(names, lambda found: typed.get(found[0], found[0]), str(error))) from None


def _problem(
    lhs: str | None, rhs: str | None, strides: str | None, padding: str, layout: str | None,
    lhs_dilation: str | None, rhs_dilation: str | None, groups: int, dtype: str,
) -> ConvProblem:  # fmt: skip
    if lhs is None or rhs is None:
        raise ConvError(f"--lhs and --rhs go together, got only {'--rhs' if lhs is None else '--lhs'}; give both")
    with _options(dtype="--dtype"):
        element = tuning.dtype_of(dtype)
    x, w = (jax.ShapeDtypeStruct(_numbers(name, text, 1), element) for name, text in (("--lhs", lhs), ("--rhs", rhs)))
    if len(x.shape) != len(w.shape):
        raise ConvError(f"--lhs and --rhs must have the same number of sizes, got {lhs!r} and {rhs!r}")
    n = len(x.shape) - 2
    if layout is None and n not in tuning.CHANNEL_LAST:
        raise ConvError(f"--lhs must have 3 to 5 sizes, got {lhs!r}; for other ranks give --layout")
    axes = tuning.CHANNEL_LAST[n] if layout is None else tuple(layout.split(","))
    try:
        layout_of(x.shape, w.shape, axes)
    except ConvError:
        raise ConvError(
            "--layout must be the axes of input, kernel and output, a letter for each of the "
            f"{n + 2} sizes, as NCHW,OIHW,NCHW for 4, got {layout!r}"
        ) from None
    holes = None if lhs_dilation is None else _numbers("--lhs-dilation", lhs_dilation, 1)
    pads = _padding(padding, n)
    if isinstance(pads, str) and max(holes or (), default=1) > 1:
        raise ConvError(
            f"--padding {pads} has no agreed meaning with --lhs-dilation {lhs_dilation}; "
            "give low:high for each spatial axis, as 0:1,0:1"
        )
    with _options(**_OF_A_PROBLEM):
        problem = ConvProblem.of(
            x, w, (1,) * n if strides is None else _numbers("--strides", strides, 1), pads, holes,
            None if rhs_dilation is None else _numbers("--rhs-dilation", rhs_dilation, 1), axes, groups,
        )  # fmt: skip
    if problem.is_empty:
        window, inside = ("x".join(map(str, sizes)) for sizes in (problem.rhs_extent, problem.padded))
        raise ConvError(
            f"nothing to time, since the output is empty: the window, {window} with --rhs-dilation, "
            f"is larger than the input, {inside} with --padding; give a larger --lhs or --padding"
        )
    return problem


def _made(name: str, kind: type | None = None) -> Any:
    """What stands at a name; what a factory there makes."""
    found = target.load(name)
    is_factory = inspect.isfunction(found) and not inspect.signature(found).parameters
    try:
        made = found() if is_factory or inspect.isclass(found) else found
    except TypeError as error:
        raise ConvError(f"{name} cannot be called without arguments ({error}); name a function that can") from None
    if kind is not None and not isinstance(made, kind):
        raise ConvError(
            f"{name} is of type {type(made).__name__}, expected a torch.nn.Module or a function that makes one"
        )
    return made


def _load(module: Any, path: Path) -> None:
    """A checkpoint into PyTorch's module, read without running what is in it."""
    import torch

    from jconv import interop

    state = {name: torch.from_numpy(array) for name, array in interop.read_checkpoint(path).items()}
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise ConvError(f"--weights {path} does not fit the PyTorch module: {error}") from None


def _array(text: str, seed: int) -> np.ndarray:
    """The array in a file, or random numbers of the sizes that are given."""
    if not text.endswith(".npy"):
        shape = _numbers("--input", text, 1)
        return np.random.default_rng(seed).standard_normal(shape, np.float32)
    try:
        return np.load(text, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ConvError(f"--input {text} cannot be read ({error}); give a .npy file, or sizes as 1,3,224,224") from None


@contextlib.contextmanager
def _on(device: str | None) -> Iterator[None]:
    try:
        found = jax.devices(device)[0]
    except RuntimeError:
        here = ", ".join(sorted({d.platform for d in jax.devices()}))
        raise ConvError(f"--device must be one that JAX has here, {here}, got {device!r}") from None
    with jax.default_device(found):
        yield


def _numbers(option: str, text: str, least: int) -> tuple[int, ...]:
    try:
        numbers = tuple(int(number) for number in text.split(","))
    except ValueError:
        raise ConvError(f"{option} must be integers with commas between them, as 8,56,56,64, got {text!r}") from None
    return tuple(integer(option, number, least) for number in numbers)


def _padding(text: str, n: int) -> str | tuple[tuple[int, int], ...]:
    if text.upper() in ("SAME", "SAME_LOWER", "VALID"):
        return text.upper()
    try:
        pairs = [tuple(int(side) for side in axis.split(":")) for axis in text.split(",")]
        if len(pairs) == n:
            return tuple((low, high) for low, high in pairs)
    except ValueError:
        pass
    raise ConvError(
        f"--padding must be SAME, SAME_LOWER, VALID or low:high for each of {n} spatial axes, as 0:1,0:1, got {text!r}"
    )


if __name__ == "__main__":
    main()
