"""A port with two mistakes, found and mended by ``jconv.parity.compare``.

python examples/find_divergence.py [--html find_divergence.html]
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import jax
import numpy as np
import torch
import typer
from flax import nnx
from torch import nn
from torch.nn import functional as F

import jconv.nnx as jnn
from jconv import parity


class Classifier(nn.Module):
    """The network in PyTorch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.fc = nn.Linear(32 * 8 * 8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.conv2(x))
        return self.fc(x.flatten(1))


class Port(nnx.Module):
    """The same in Flax, as one writes it at first: the padding is Flax's, and the image is flattened as it lies."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.conv1 = nnx.Conv(3, 16, (3, 3), strides=2, padding="SAME", use_bias=False, rngs=rngs)
        self.bn1 = nnx.BatchNorm(16, rngs=rngs)
        self.conv2 = nnx.Conv(16, 32, (3, 3), strides=2, padding="SAME", rngs=rngs)
        self.fc = nnx.Linear(32 * 8 * 8, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.bn1(self.conv1(x)))
        x = nnx.relu(self.conv2(x))
        return self.fc(x.reshape(len(x), -1))


class PaddedPort(Port):
    """The first mistake is mended: PyTorch pads both sides."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        super().__init__(rngs)
        self.conv1 = jnn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False, rngs=rngs)
        self.conv2 = jnn.Conv2d(16, 32, 3, stride=2, padding=1, rngs=rngs)


class RightPort(PaddedPort):
    """The second too: PyTorch flattens (channels, height, width)."""

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.bn1(self.conv1(x)))
        x = nnx.relu(self.conv2(x))
        return self.fc(x.transpose(0, 3, 1, 2).reshape(len(x), -1))


def main(
    html: Annotated[Path | None, typer.Option(help="Where the first comparison is written as a page.")] = None,
) -> None:
    """Compare three versions of a port with its PyTorch network."""
    torch.manual_seed(0)
    theirs = Classifier()
    images = torch.from_numpy(np.random.default_rng(0).standard_normal((4, 3, 32, 32), np.float32))
    theirs.train()(images)  # so that the batch norm has statistics
    for made, what in (
        (Port, "as it was written"),
        (PaddedPort, "padding mended"),
        (RightPort, "flatten order mended"),
    ):
        port = made(nnx.Rngs(0))
        port.eval()
        report = parity.compare(theirs, port, images, load=True)
        print(f"The port, {what}:\n{report.summary()}\n")
        if html is not None and made is Port:
            report.to_html(html)
            print(f"Page: {html}\n")


if __name__ == "__main__":
    typer.run(main)
