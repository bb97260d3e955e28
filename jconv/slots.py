"""The Flax side of a state dict: which arrays a model has, under which names, and how each lies in memory.

A *slot* is one array of an NNX module or a Linen tree, with the PyTorch names that it answers to. Its kind,
read off the layer's class, its name or the caller's word, says how PyTorch's array is brought into its layout.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from fnmatch import fnmatchcase
from itertools import product
from typing import Any, NamedTuple

import numpy as np

from jconv.errors import StateDictError, needs_flax

_KINDS = ("conv", "conv_transpose", "flax_conv_transpose", "linear", "norm", "embedding")
_CLASSES = {
    **dict.fromkeys(("Conv", "Conv1d", "Conv2d", "Conv3d"), "conv"),
    **dict.fromkeys(("ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d"), "conv_transpose"),
    **dict.fromkeys(("BatchNorm", "GroupNorm", "InstanceNorm", "LayerNorm", "RMSNorm"), "norm"),
    **{"ConvTranspose": "flax_conv_transpose", "Linear": "linear", "Embed": "embedding"},
}
_STATISTICS = {"mean": "running_mean", "var": "running_var"}
_NNX_LEAVES: dict[str | None, dict[str, str]] = {
    **dict.fromkeys(("conv", "conv_transpose", "flax_conv_transpose", "linear"), {"kernel": "weight"}),
    "norm": {"scale": "weight", **_STATISTICS},
    "embedding": {"embedding": "weight"},
    None: {},
}
_LINEN_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight"}


# --- slots of an NNX module or a Linen tree ----------------------------------------------------------


class Slot(NamedTuple):
    path: tuple[str, ...]
    names: tuple[str, ...]  # the PyTorch names it answers to, the one that to_torch emits first
    kind: str | None  # None for the kernel of a Linen tree, which does not say what it is
    array: Any
    cell: Any = None  # the nnx.Variable
    layer: Any = None  # the nnx.Module


def where(slot: Slot) -> str:
    return "/".join(slot.path)


def is_nnx(target: object) -> bool:
    with needs_flax("jconv.interop"):
        from flax import nnx
    return isinstance(target, nnx.Module)


def slots_of(target: Any) -> tuple[list[Slot], list[tuple[str, Any]]]:
    """All slots, and the normalisation layers of an NNX module by name."""
    if is_nnx(target):
        return _nnx_slots(target)
    if not isinstance(target, Mapping):
        raise StateDictError(
            f"The Flax side is a {type(target).__name__}, expected an nnx.Module or a Linen tree; of a Linen "
            "module pass the initialised variables."
        )
    return _linen_slots(target), []


def _nnx_slots(root: Any) -> tuple[list[Slot], list[tuple[str, Any]]]:
    from flax import nnx

    slots: list[Slot] = []
    norms: list[tuple[str, Any]] = []

    def visit(node: Any, path: tuple[str, ...], names: tuple[str, ...], above: tuple[int, ...]) -> None:
        if isinstance(node, nnx.Pytree):
            classes = [cls.__name__ for cls in type(node).__mro__]
            kind = next((_CLASSES[name] for name in classes if name in _CLASSES), None)
            if kind == "flax_conv_transpose" and getattr(node, "transpose_kernel", False):
                kind = "conv"
            if kind == "norm":
                norms.append((".".join(names), node))
            children = {k: v for k, v in vars(node).items() if not k.startswith("_pytree__")}
        elif isinstance(node, (list, tuple, dict)):
            classes, kind = [], None
            children = node if isinstance(node, dict) else dict(enumerate(node))
        else:
            return
        if id(node) in above:
            return
        for key, child in children.items():
            key = str(key)
            if not isinstance(child, nnx.Variable):
                inner = names if key == "layers" and "Sequential" in classes else (*names, key)
                visit(child, (*path, key), inner, (*above, id(node)))
            elif not isinstance(child, (nnx.RngState, nnx.Cache, nnx.Intermediate)):
                array = child.get_value()
                if hasattr(array, "shape") and hasattr(array, "dtype"):
                    leaf = _NNX_LEAVES[kind].get(key, key)
                    spellings = [(*names, leaf), (*names, key), (*path, leaf), (*path, key)]
                    spelled = tuple(dict.fromkeys(map(".".join, spellings)))
                    layout = kind if key == "kernel" and kind else "norm"
                    slots.append(Slot((*path, key), spelled, layout, array, child, node))

    visit(root, (), (), ())
    return slots, norms


def _linen_slots(tree: Mapping[str, Any]) -> list[Slot]:
    whole = any(isinstance(tree.get(collection), Mapping) for collection in ("params", "batch_stats"))
    leaves: dict[tuple[str, ...], Any] = {}

    def visit(node: Mapping[str, Any], path: tuple[str, ...]) -> None:
        for key, value in node.items():
            if isinstance(value, Mapping):
                visit(value, (*path, key))
            elif hasattr(value, "shape") and hasattr(value, "dtype") and not hasattr(value, "get_value"):
                leaves[*path, key] = value
            else:
                raise StateDictError(
                    f"The Flax tree holds a {type(value).__name__} at {'/'.join((*path, key))}, expected an "
                    "array; pass a Linen tree after flax.linen.meta.unbox, or the nnx.Module itself."
                )

    for collection in ("params", "batch_stats") if whole else ():
        visit(tree.get(collection, {}), (collection,))
    if not whole:
        visit(tree, ())

    beside: dict[tuple[str, ...], set[str]] = {}
    for path in leaves:
        path = path[whole:]
        for depth, part in enumerate(path):
            beside.setdefault(path[:depth], set()).add(part)

    slots = []
    for path, array in leaves.items():
        *layer, key = path[whole:]
        statistics = whole and path[0] == "batch_stats"
        leaf = (_STATISTICS if statistics else _LINEN_LEAVES).get(key, key)
        parts = [_linen_names(part, beside[tuple(layer[:depth])]) for depth, part in enumerate(layer)]
        spellings = [*product(*parts, (leaf, key)), (*layer, leaf), (*layer, key)]
        names = tuple(dict.fromkeys(map(".".join, spellings)))
        slots.append(Slot(path, names, None if key == "kernel" else "norm", array))
    return slots


def _linen_names(part: str, beside: set[str]) -> list[str]:
    """What a part of a Linen path may be called in PyTorch, given the names beside it."""
    stem, _, number = part.rpartition("_")
    if not stem or not number.isdecimal():
        return [part]
    if all(re.fullmatch(r"layers_\d+", name) for name in beside):
        return [number, f"layers.{number}"]
    if stem.lstrip("_")[:1].islower() and f"{stem}_0" in beside and stem not in beside:
        return [f"{stem}.{number}"]
    return [part]


# --- layouts -----------------------------------------------------------------------------------------


def from_torch_layout(kind: str, weight: np.ndarray, shape: tuple[int, ...]) -> np.ndarray | None:
    """`weight` in the layout of a Flax kernel of this shape; None if it does not fit."""
    if weight.ndim != len(shape):
        return None
    spatial = range(2, weight.ndim)
    if kind == "linear":
        weight = weight.T if weight.ndim == 2 else weight
    elif kind == "conv" and weight.ndim > 2:
        weight = weight.transpose(*spatial, 1, 0)
    elif kind == "flax_conv_transpose" and weight.ndim > 2:
        weight = np.flip(weight, tuple(spatial)).transpose(*spatial, 0, 1)
    elif kind == "conv_transpose" and weight.ndim > 2:
        inputs, outputs = weight.shape[:2]
        if not shape[-2] or inputs % shape[-2]:
            return None
        groups = inputs // shape[-2]
        weight = weight.reshape(groups, shape[-2], outputs, *weight.shape[2:])
        weight = weight.transpose(*(axis + 1 for axis in spatial), 1, 0, 2)
        weight = weight.reshape(*weight.shape[:-2], groups * outputs)
    elif kind not in ("norm", "embedding"):
        return None
    return weight if weight.shape == shape else None


def to_torch_layout(kind: str, kernel: np.ndarray, slot: Slot) -> np.ndarray:
    kind, _, given = kind.partition(":")
    rank = kernel.ndim - 2
    if kind in ("norm", "embedding"):
        return kernel
    if (rank != 0) if kind == "linear" else (rank < 1):
        raise StateDictError(
            f"{where(slot)} of shape {kernel.shape} is no {kind!r} kernel; pass kinds={{...}} that fits."
        )
    if kind == "linear":
        return kernel.T
    if kind == "conv":
        return kernel.transpose(rank + 1, rank, *range(rank))
    if kind == "flax_conv_transpose":
        return np.flip(kernel, tuple(range(rank))).transpose(rank, rank + 1, *range(rank))
    groups = int(given) if given else _groups(slot, kernel.shape)
    *spatial, inputs, outputs = kernel.shape
    if groups < 1 or outputs % groups:
        raise StateDictError(f"{where(slot)} of shape {kernel.shape} has no {groups} groups; pass another number.")
    kernel = kernel.reshape(*spatial, inputs, groups, outputs // groups)
    return kernel.transpose(rank + 1, rank, rank + 2, *range(rank)).reshape(-1, outputs // groups, *spatial)


def _groups(slot: Slot, shape: tuple[int, ...]) -> int:
    if slot.layer is None:
        return 1
    for name in ("groups", "feature_group_count"):
        if isinstance(groups := getattr(slot.layer, name, None), int):
            return groups
    for name in ("in_features", "in_channels"):
        if isinstance(inputs := getattr(slot.layer, name, None), int):
            return inputs // max(shape[-2], 1)
    raise StateDictError(
        f"{where(slot)} does not tell its number of groups; give the layer an attribute `groups`, or pass "
        'kinds={"...": "conv_transpose:1"}.'
    )


def kind_by_name(slot: Slot) -> str | None:
    match = re.fullmatch(r"(Conv|ConvTranspose)([123]d)?(_\d+)?", "".join(slot.path[-2:-1]))
    return _CLASSES[match[1] + (match[2] or "")] if match else None


def kind_of_twin(slot: Slot, twin: Any) -> str | None:
    """What a PyTorch layer says of its Linen twin's kernel, where the Linen name says nothing."""
    names = {base.__name__ for base in type(twin).__mro__}
    if kind_by_name(slot) is not None or not names & {f"ConvTranspose{n}d" for n in (1, 2, 3)}:
        return None
    return "conv_transpose"


def kind_by_rank(rank: int) -> str:
    return "linear" if rank == 2 else "conv" if rank > 2 else "norm"


def kind_lookup(kinds: Mapping[str, str] | None, layers: Iterable[str]) -> Callable[[str], str | None]:
    """The kind that the caller gave to a layer, by its name; checks that every pattern is of use."""
    layers = set(layers)
    if kinds is not None and not isinstance(kinds, Mapping):
        raise StateDictError(
            f"kinds must map patterns of layer names to kinds, got {kinds!r}; write {{'up': 'conv_transpose'}}."
        )
    for pattern, kind in (kinds or {}).items():
        if kind not in _KINDS and not re.fullmatch(r"conv_transpose:[1-9]\d*", str(kind)):
            raise StateDictError(f"kinds[{pattern!r}] is {kind!r}, expected one of {', '.join(_KINDS)}.")
        if not any(fnmatchcase(layer, pattern) for layer in layers):
            raise StateDictError(
                f"kinds has the pattern {pattern!r}, which no layer matches; {did_you_mean(pattern, layers)}"
            )
    return lambda layer: next((k for p, k in (kinds or {}).items() if fnmatchcase(layer, p)), None)


def did_you_mean(name: str, names: Iterable[str]) -> str:
    close = get_close_matches(name, sorted(names), n=1, cutoff=0.4)
    return f"did you mean {close[0]!r}?" if close else "leave it out."
