"""Which layer of a port is which of PyTorch's, and how the port's array lies against PyTorch's."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from math import prod
from typing import Any

import numpy as np

from jconv.errors import ParityError
from jconv.parity.recording import Layer

__all__ = ["Pair", "View", "pair", "view_of", "views"]

_LETTERS = {3: ("NLC", "NCL"), 4: ("NHWC", "NCHW"), 5: ("NDHWC", "NCDHW")}


@dataclass(frozen=True)
class View:
    """How an array of the port becomes one of PyTorch's shape: a transposition, then axes of one put in or left out."""

    axes: tuple[int, ...]
    shape: tuple[int, ...]

    def bring(self, array: Any) -> Any:
        return array.transpose(self.axes).reshape(self.shape)

    def __str__(self) -> str:
        rank = len(self.axes)
        if self.axes == tuple(range(rank)):
            return "" if rank == len(self.shape) else "reshape"
        if rank == len(self.shape) and self.axes == _to_channel_first(rank):
            return "->".join(_LETTERS.get(rank, (str(self.axes),)))
        return f"transpose{self.axes}"


def views(shape: Sequence[int], port: Sequence[int]) -> Iterator[View]:
    """The views that bring an array of shape ``port`` to ``shape``: as it lies, or from channel-last to channel-first.

    No other transposition is offered, so that an image whose axes are swapped is seen to differ.

    >>> [str(view) for view in views((2, 3, 8, 8), (2, 8, 8, 3))]
    ['NHWC->NCHW']
    >>> [str(view) for view in views((2, 3, 1, 1), (2, 3))]
    ['reshape']
    """
    shape, port = tuple(shape), tuple(port)
    rank = len(port)
    usual = [tuple(range(rank)), *([_to_channel_first(rank)] if rank > 2 else [])]
    yield from (View(axes, shape) for axes in dict.fromkeys(usual) if _fits(axes, shape, port))


def _fits(axes: tuple[int, ...], shape: tuple[int, ...], port: tuple[int, ...]) -> bool:
    brought = tuple(port[axis] for axis in axes)
    k = len(shape) - 1
    if k >= 0 and len(port) > len(shape) and axes == tuple(range(len(port))) and port[:k] == shape[:k]:
        return prod(port[k:]) == shape[k]  # heads beside each other
    return brought == shape or (len(shape) != len(port) and _without_ones(brought) == _without_ones(shape))


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1)


def _to_channel_first(rank: int) -> tuple[int, ...]:
    return (0, rank - 1, *range(1, rank - 1))


def view_of(theirs: np.ndarray, ours: np.ndarray, channel_last: bool, whole: bool = False) -> View | None:
    """The view under which the port's array is PyTorch's; None where the shapes do not fit.

    Args:
        theirs, ours: the arrays.
        channel_last: whether the port takes images so. Where several views fit and the array is near to PyTorch's under
            none, images lie as the port's inputs do.
        whole: whether it is what the network returns, which lies as PyTorch's if the inputs do.
    """
    found = list(views(theirs.shape, ours.shape))
    if whole and not channel_last:
        found = [view for view in found if view.axes == tuple(range(ours.ndim))]
    if len(found) < 2:
        return found[0] if found else None
    apart = [_distance(theirs, view.bring(ours)) for view in found]
    best = int(np.argmin(apart))
    if apart[best] > 1e-2 * float(np.abs(theirs).max(initial=0)) and channel_last:
        return found[-1]
    return found[best]


def unchanged(shape: tuple[int, ...], port: tuple[int, ...]) -> View | None:
    """The view of an array that is in PyTorch's layout already."""
    return View(tuple(range(len(port))), shape) if shape == port else None


def _distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.nan_to_num(np.abs(a - b)).max(initial=0))


@dataclass(frozen=True)
class Pair:
    """A layer of PyTorch's and its layer in the port, and why they are taken for each other."""

    theirs: Layer
    ours: Layer
    why: str


def pair(
    theirs: Sequence[Layer], ours: Sequence[Layer], mapping: Mapping[str, str] | None, twins: Mapping[str, str]
) -> list[Pair]:
    """Pairs layers: as the caller says, by their parameters, by their names, then by order, kind and shape.

    Args:
        theirs, ours: PyTorch's layers and the port's, the whole networks last.
        mapping: from PyTorch's names to the port's.
        twins: the same, of the layers whose parameters are known to be twins.

    Returns:
        The pairs, in PyTorch's order.

    Raises:
        ParityError: if the mapping names a layer that is not there.
    """
    found: dict[int, Pair] = {id(theirs[-1]): Pair(theirs[-1], ours[-1], "the whole")}
    by_name = {layer.name: layer for layer in theirs}
    ours_by_name = {layer.name: layer for layer in ours}

    def add(layer: Layer | None, other: Layer | None, why: str) -> None:
        taken = {id(p.ours) for p in found.values()}
        if layer is not None and other is not None and id(layer) not in found and id(other) not in taken:
            found[id(layer)] = Pair(layer, other, why)

    for name, other in (mapping or {}).items():
        for given, names, side in ((name, by_name, "PyTorch module"), (other, ours_by_name, "port")):
            if given not in names:
                close = get_close_matches(given, list(names), n=1, cutoff=0.4)
                hint = f"did you mean {close[0]!r}?" if close else f"it has {', '.join(map(repr, names)) or 'none'}."
                raise ParityError(f"mapping names {given!r}, which is no layer that the {side} called; {hint}")
        add(by_name[name], ours_by_name[other], "mapping")
    for layer in theirs:
        name, sign, times = layer.name.partition("#")
        if name in twins:
            add(layer, ours_by_name.get(twins[name] + sign + times), "parameters")
    spelled: dict[tuple[str, ...], list[Layer]] = defaultdict(list)
    for layer in ours[:-1]:
        spelled[_words(layer.name)].append(layer)
    for layer in theirs[:-1]:
        same = spelled[_words(layer.name)]
        if len(same) == 1 and not (layer.family and same[0].family and layer.family != same[0].family):
            add(layer, same[0], "name")
    for layer, other in _aligned(theirs[:-1], ours[:-1], found):
        add(layer, other, "order")
    return [found[id(layer)] for layer in theirs if id(layer) in found]


def _words(name: str) -> tuple[str, ...]:
    return tuple(filter(None, re.split(r"[._/]", name.lower())))


def _aligned(theirs: Sequence[Layer], ours: Sequence[Layer], found: dict[int, Pair]) -> list[tuple[Layer, Layer]]:
    """The best alignment of two sequences in order, where what is paired already holds the rest in its place."""
    left, right = ([layer for layer in side if layer.is_leaf] for side in (theirs, ours))
    taken = {id(p.ours): id(p.theirs) for p in found.values()}
    score = np.zeros((len(left) + 1, len(right) + 1))
    gain = np.full((len(left), len(right)), -np.inf)
    for i, layer in enumerate(left):
        for j, other in enumerate(right):
            if id(layer) in found or id(other) in taken:
                gain[i, j] = 100 if taken.get(id(other)) == id(layer) else -np.inf
            elif layer.family and layer.family == other.family and (like := _like(layer, other)) is not None:
                gain[i, j] = 4 if like else 2
    for i in range(len(left) - 1, -1, -1):
        for j in range(len(right) - 1, -1, -1):
            score[i, j] = max(score[i + 1, j], score[i, j + 1], score[i + 1, j + 1] + gain[i, j])
    i = j = 0
    pairs = []
    while i < len(left) and j < len(right):
        if score[i, j] == score[i + 1, j + 1] + gain[i, j]:
            pairs.append((left[i], right[j]))
            i, j = i + 1, j + 1
        elif score[i, j] == score[i + 1, j]:
            i += 1
        else:
            j += 1
    return pairs


def _like(layer: Layer, other: Layer) -> bool | None:
    """Whether the shapes fit; None where not even the number of channels does."""
    shapes = [[out.shape for out in side.outputs] for side in (layer, other)]
    if len(shapes[0]) != len(shapes[1]) or not shapes[0]:
        return None
    if all(next(views(a, b), None) for a, b in zip(*shapes, strict=True)):
        return True
    a, b = shapes[0][0], shapes[1][0]
    return False if len(a) == len(b) > 1 and a[1] in (b[1], b[-1]) else None
