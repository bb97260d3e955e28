"""State dicts of PyTorch into Flax parameters and back, exact to the bit.

A *slot* is one array of the Flax side, with the PyTorch names it answers to. Loading matches slots with
entries by name, brings every entry into its slot's layout and dtype, and writes only if all is well.
"""

from __future__ import annotations

import os
import re
import sys
import warnings
from collections.abc import Callable, Hashable, Iterable, Mapping
from difflib import get_close_matches
from typing import Any, NamedTuple, TypeVar

import numpy as np

from jconv.checkpoint import read_checkpoint, unwrap
from jconv.errors import StateDictError
from jconv.slots import (
    Slot,
    did_you_mean,
    from_torch_layout,
    is_nnx,
    kind_by_name,
    kind_by_rank,
    kind_lookup,
    kind_of_twin,
    slots_of,
    to_torch_layout,
    where,
)

__all__ = ["load_torch", "read_checkpoint", "to_torch"]

_Target = TypeVar("_Target")
_Rename = Mapping[str, str] | Callable[[str], str]


def load_torch(
    target: _Target,
    source: Any,
    *,
    rename: _Rename | None = None,
    kinds: Mapping[str, str] | None = None,
    strict: bool = True,
    cast: bool = False,
    eps: float | None = None,
) -> _Target:
    """Loads a PyTorch state dict into one Flax layer or a whole Flax model.

    Layers: convolutions, transposed convolutions (jconv's and Flax's), Linear, BatchNorm with its
    statistics, GroupNorm, LayerNorm, Embedding. A bare parameter is copied as it is, under its name.
    ``num_batches_tracked`` has no place in Flax and is ignored; :func:`to_torch` does not emit it.

    **Names.** A Flax path joined by ``.`` is the PyTorch name, the leaf in PyTorch's words: ``weight``,
    ``bias``, ``running_mean``, ``running_var``. The ``layers`` of a Sequential is left out. If the exact
    name is not there, names are compared word by word, split at ``.`` and ``_``: ``_blocks.0._bn1`` is
    ``blocks_0/bn1``. An exact name wins, and what remains ambiguous is reported, never guessed. A prefix
    ``module.`` that all entries have (DataParallel) is dropped. Two paths to one shared NNX layer may
    both be in the state dict, if they agree, or either one.

    **Linen trees** do not say what a kernel is. One of rank 2 is Linear's; one in ``ConvTranspose2d_0``
    (1d, 2d, 3d) has jconv's layout, one in ``ConvTranspose_0`` Flax's; any other is a convolution's if the
    shapes allow that. **A trap:** a square transposed convolution of another name, such as ``up``, looks
    like a convolution and is loaded as one, hence wrongly. Say ``kinds={"up": "conv_transpose"}``, or pass the
    PyTorch module itself as `source`: its classes tell (the layer is then taken for jconv's).

    **eps** is not in a state dict, and Flax's LayerNorm and GroupNorm have 1e-6 where PyTorch has 1e-5. An
    NNX layer takes the ``eps`` given here, or that of its twin where `source` is a PyTorch module; from a
    plain state dict nothing is changed. In Linen construct the layer with ``epsilon=...``.

    Args:
        target: an NNX module, which is filled in place; or the variables of a Linen module (``params``
            and ``batch_stats``; other collections are kept), or bare ``params``, of which a filled copy is
            returned. A Linen leaf may be a ``jax.ShapeDtypeStruct``.
        source: a mapping from name to array or tensor, a path (see :func:`read_checkpoint`), or a
            PyTorch module.
        rename: what a name is to become before it is compared, ``module.`` dropped: a function from name
            to name, or a mapping whose keys are full names or prefixes of whole words (the longest counts;
            a value ``""`` drops the prefix). The new name is the dotted Flax path or its PyTorch form.
        kinds: layouts of kernels, which override what is said above, by pattern (as in ``fnmatch``) over
            the PyTorch name of the layer, such as ``"up.*"``, the name before `rename`: ``"conv"``, also
            for a Flax ConvTranspose with ``transpose_kernel=True``; ``"conv_transpose"``, jconv's layout;
            ``"flax_conv_transpose"``; ``"linear"``; ``"norm"`` and ``"embedding"``, copied as they are.
        strict: whether missing and unexpected entries are an error, else a warning.
        cast: whether a dtype may be converted with loss. Without loss it is always converted.
        eps: the epsilon of all normalisation layers of an NNX module.

    Returns:
        `target`, or for Linen a new tree of the same structure, shapes and dtypes.

    Raises:
        StateDictError: entries are missing, unexpected or misfitting (one report; nothing is written),
            or an argument is none that can be served.

    >>> import numpy as np
    >>> tree = {"params": {"kernel": np.zeros((3, 2), np.float32)}}
    >>> load_torch(tree, {"weight": np.arange(6, dtype=np.float32).reshape(2, 3)})["params"]["kernel"]
    array([[0., 3.],
           [1., 4.],
           [2., 5.]], dtype=float32)
    """
    slots, norms = slots_of(target)
    nnx = is_nnx(target)
    if eps is not None:
        _check_eps(eps, nnx, norms)
    modules = dict(source.named_modules()) if _is_torch_module(source) else {}
    prefix, entries, originals, kind_of = _prepared(slots, source, rename, kinds)
    pairs, unclear_slots, unclear_names, misfits = _match(slots, originals)

    fitted: dict[int, np.ndarray] = {}
    shared: dict[int, tuple[str, np.ndarray]] = {}
    for index, renamed in pairs.items():
        slot, name = slots[index], originals[renamed]
        kind = kind_of(_layer(name))
        if kind is None and not nnx:
            kind = kind_of_twin(slot, modules.get(prefix + _layer(name)))
        array = _fit(slot, name, entries[name], kind, cast)
        if isinstance(array, str):
            misfits.append(array)
            continue
        fitted[index] = array
        if slot.cell is not None:
            first, value = shared.setdefault(id(slot.cell), (name, array))
            if value is not array and value.tobytes() != array.tobytes():
                misfits.append(f"{first!r} and {name!r} differ, and are one array at {where(slot)}")

    filled = {id(slots[index].cell) for index in pairs if slots[index].cell is not None}
    missing = [
        slot
        for index, slot in enumerate(slots)
        if index not in pairs and index not in unclear_slots and id(slot.cell) not in filled
    ]
    taken = {*pairs.values(), *unclear_names}
    unexpected = [name for name in originals if name not in taken and _leaf(name) != "num_batches_tracked"]
    report = _report(missing, unexpected, misfits, originals, entries, strict)
    if misfits or (strict and (missing or unexpected)):
        raise StateDictError(report)

    new = {index: _like(slots[index].array, array) for index, array in fitted.items()}
    if nnx:
        for index, array in new.items():
            slots[index].cell.set_value(array)
        twins = {id(slots[index].layer): _layer(originals[name]) for index, name in pairs.items()}
        for name, norm in norms:
            twin = modules.get(prefix + twins.get(id(norm), name))
            value = getattr(twin, "eps", None) if eps is None else eps
            if value is not None:
                norm.epsilon = float(value)
    if missing or unexpected:
        warnings.warn(report, stacklevel=2)
    return target if nnx else _rebuilt(target, (), {slots[i].path: array for i, array in new.items()})


def to_torch(
    source: Any, *, rename: _Rename | None = None, kinds: Mapping[str, str] | None = None
) -> dict[str, np.ndarray]:
    """The PyTorch state dict of a Flax layer or model, exact to the bit; the inverse of :func:`load_torch`.

    The names are the dotted paths that :func:`load_torch` tells of. In a Linen tree ``blocks_3`` becomes
    ``blocks.3`` if its stem begins with a small letter, ``blocks_0`` is beside it and ``blocks`` is not;
    where all that a module holds is called ``layers_N``, it counts as a Sequential and ``layers`` is left
    out. A shared NNX layer is emitted under each of its names, as PyTorch does.

    A Linen kernel that neither its name nor `kinds` says to be transposed is emitted as a convolution's,
    one in ``ConvTranspose_0`` as with ``transpose_kernel=False``, and one of jconv's transposed layout as
    with one group: for more, say ``kinds={"up": "conv_transpose:4"}``, here with 4 groups.

    Args:
        source: an NNX module, or the variables or ``params`` of a Linen module.
        rename: from the name that would be emitted to the one that shall be; as in :func:`load_torch` a
            function, or a mapping of full names or prefixes of whole words.
        kinds: layouts by pattern over the emitted names of layers, as in :func:`load_torch`.

    Returns:
        A dict from PyTorch name to a new C-contiguous array of the parameter's dtype. (PyTorch reads a
        bfloat16 array ``a`` by ``torch.from_numpy(a.view("int16")).view(torch.bfloat16)``.)

    Raises:
        StateDictError: two arrays have one name, a layout does not fit, or the number of groups of a
            transposed convolution is not known.

    >>> import numpy as np
    >>> to_torch({"params": {"head": {"kernel": np.zeros((3, 2)), "bias": np.zeros(2)}}})["head.weight"].shape
    (2, 3)
    """
    slots, _ = slots_of(source)
    emitted: dict[str, Slot] = {}
    for slot in slots:
        if emitted.setdefault(slot.names[0], slot) is not slot:
            raise StateDictError(
                f"{where(emitted[slot.names[0]])} and {where(slot)} would both be called {slot.names[0]!r} in "
                "PyTorch; give one of them another name in the Flax model."
            )
    originals = _renamed(emitted, rename)
    kind_of = kind_lookup(kinds, (_layer(name) for name in originals))
    state = {}
    for name, original in originals.items():
        slot = emitted[original]
        array = np.asarray(slot.array)
        given = kind_of(_layer(name)) if slot.path[-1] == "kernel" else None
        kind = given or slot.kind or kind_by_name(slot) or kind_by_rank(array.ndim)
        array = to_torch_layout(kind, array, slot)
        state[name] = np.array(array, order="C", copy=True)
    return state


class Twin(NamedTuple):
    """An array of a Flax model that has a twin in a PyTorch module: the twin's name, the path in Flax, and the array in
    PyTorch's layout."""

    name: str
    path: tuple[str, ...]
    array: np.ndarray


def twins(
    target: Any, module: Any, *, rename: _Rename | None = None, kinds: Mapping[str, str] | None = None
) -> list[Twin]:
    """The arrays of a Flax model that :func:`load_torch` would fill from a PyTorch module, in PyTorch's layout.

    What is in the place of the parameters is taken as it is: a tree of gradients gives gradients.

    Args:
        target, module, rename, kinds: as in :func:`load_torch`.
    """
    slots, _ = slots_of(target)
    modules = dict(module.named_modules())
    prefix, _, originals, kind_of = _prepared(slots, module, rename, kinds)
    found = []
    for index, renamed in _match(slots, originals)[0].items():
        slot, name = slots[index], originals[renamed]
        twin = modules.get(prefix + _layer(name))
        kind = kind_of(_layer(name)) or slot.kind or kind_by_name(slot) or kind_of_twin(slot, twin)
        kind = kind or kind_by_rank(slot.array.ndim)
        if kind == "conv_transpose" and slot.path[-1] == "kernel":
            kind = f"conv_transpose:{getattr(twin, 'groups', 1)}"
        found.append(Twin(prefix + name, slot.path, to_torch_layout(kind, np.asarray(slot.array), slot)))
    return found


# --- entries of a state dict -------------------------------------------------------------------------


def _prepared(
    slots: list[Slot], source: Any, rename: _Rename | None, kinds: Mapping[str, str] | None
) -> tuple[str, dict[str, np.ndarray], dict[str, str], Callable[[str], str | None]]:
    """The prefix that is dropped, the entries without it, old names by new ones, and the kinds that the caller gave."""
    entries = _entries(source)
    prefix = "module." if entries and all(name.startswith("module.") for name in entries) else ""
    if any(slot.names[0].startswith("module.") for slot in slots):
        prefix = ""
    entries = {name.removeprefix(prefix): array for name, array in entries.items()}
    kind_of = kind_lookup(kinds, (_layer(name) for name in entries))
    return prefix, entries, _renamed(entries, rename), kind_of


def _is_torch_module(source: object) -> bool:
    return hasattr(source, "state_dict") and hasattr(source, "named_modules")


def _entries(source: Any) -> dict[str, np.ndarray]:
    if isinstance(source, (str, os.PathLike)):
        return read_checkpoint(source)
    if _is_torch_module(source):
        source = source.state_dict()
    if not isinstance(source, Mapping):
        raise StateDictError(
            f"The state dict is a {type(source).__name__}, expected a mapping from name to array, a path, or "
            "a PyTorch module; pass model.state_dict()."
        )
    return {name: _as_numpy(name, value) for name, value in unwrap(source).items()}


def _as_numpy(name: str, value: Any) -> np.ndarray:
    """A numpy array of what is an array, or a PyTorch tensor, which has no bfloat16 in numpy."""
    array = None
    try:
        if hasattr(value, "detach"):
            value = value.detach().cpu()
            if str(value.dtype) == "torch.bfloat16":
                import ml_dtypes

                array = value.view(sys.modules["torch"].int16).numpy().view(ml_dtypes.bfloat16)
            else:
                array = value.numpy()
        elif hasattr(value, "__array__"):
            array = np.asarray(value)
    except Exception as error:
        raise StateDictError(f"The entry {name!r} cannot become a numpy array: {error}") from error
    if array is None or array.dtype.kind in "OSUMm":
        what = type(value).__name__ if array is None else f"{array.dtype} array"
        raise StateDictError(f"The entry {name!r} holds a {what}, expected an array or tensor; leave it out.")
    return array


def _renamed(names: Iterable[str], rename: _Rename | None) -> dict[str, str]:
    """From new name to old name."""
    names = list(names)
    if rename is not None and not callable(rename) and not isinstance(rename, Mapping):
        raise StateDictError(f"rename must be a function or a mapping of names, got {rename!r}.")
    unused = set() if rename is None or callable(rename) else set(rename)
    renamed: dict[str, str] = {}
    for name in names:
        new = name
        if callable(rename):
            new = rename(name)
        elif rename is not None:
            prefixes = [key for key in rename if name == key or name.startswith(key + ".")]
            if prefixes:
                longest = max(prefixes, key=len)
                unused.discard(longest)
                new = ".".join(filter(None, (rename[longest], name[len(longest) + 1 :])))
        if not isinstance(new, str) or not new:
            raise StateDictError(f"rename makes {new!r} of {name!r}, expected a name; correct it.")
        if renamed.setdefault(new, name) != name:
            raise StateDictError(f"rename makes {new!r} of both {renamed[new]!r} and {name!r}; correct it.")
    for key in sorted(unused):
        layers = {layer for name in names for layer in (name, _layer(name))}
        raise StateDictError(f"rename has the key {key!r}, which is no entry or layer; {did_you_mean(key, layers)}")
    return renamed


def _layer(name: str) -> str:
    return name.rpartition(".")[0]


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


# --- matching, fitting, reporting --------------------------------------------------------------------


def _words(name: str) -> tuple[str, ...]:
    return tuple(filter(None, re.split(r"[._/]", name)))


def _match(slots: list[Slot], names: Iterable[str]) -> tuple[dict[int, str], set[int], set[str], list[str]]:
    """Pairs slots with names: first by the slot's own name, then by its other names, then word by word.

    Returns the name of each slot by index; the slots, then the names that are ambiguous; a line on each.
    """
    pairs: dict[int, str] = {}
    unclear_slots: set[int] = set()
    unclear_names: set[str] = set()
    lines: dict[str, None] = {}
    free = set(names)
    steps: list[tuple[Callable[[str], Hashable], int | None]] = [(str, 1), (str, None), (_words, None)]
    for spell, count in steps:
        given: dict[Hashable, set[str]] = {}
        for name in free:
            given.setdefault(spell(name), set()).add(name)
        hits: dict[int, set[str]] = {}
        claims: dict[str, set[int]] = {name: set() for name in free}
        for index, slot in enumerate(slots):
            if index not in pairs and index not in unclear_slots:
                hits[index] = {n for own in slot.names[:count] for n in given.get(spell(own), ())}
                for name in hits[index]:
                    claims[name].add(index)
        for index, found in hits.items():
            rivals = {rival for name in found for rival in claims[name]}
            if len(found) == 1 and len(rivals) == 1:
                pairs[index] = next(iter(found))
            elif found:
                places = " and ".join(sorted(where(slots[rival]) for rival in rivals))
                lines[f"{' and '.join(map(repr, sorted(found)))} for {places}: ambiguous; pass rename"] = None
                unclear_slots |= rivals
                unclear_names |= found
        free -= {*pairs.values(), *unclear_names}
    return pairs, unclear_slots, unclear_names, list(lines)


def _fit(slot: Slot, name: str, weight: np.ndarray, given: str | None, cast: bool) -> np.ndarray | str:
    """A copy of the entry in the slot's layout and dtype, or a line that says why that cannot be."""
    array = _arranged(slot, name, weight, given)
    dtype = np.dtype(slot.array.dtype)
    if isinstance(array, str):
        return array
    if array.dtype == dtype or _is_lossless(array.dtype, dtype):
        return array.astype(dtype)
    if array.dtype.kind == "c" and dtype.kind != "c":
        return f"{name!r} is {array.dtype}, which does not fit the {dtype} of {where(slot)}"
    return array.astype(dtype) if cast else f"{name!r}: {array.dtype} does not fit {dtype} exactly; pass cast=True"


def _arranged(slot: Slot, name: str, weight: np.ndarray, given: str | None) -> np.ndarray | str:
    shape, is_kernel = tuple(slot.array.shape), slot.path[-1] == "kernel"
    told = slot.kind or kind_by_name(slot)
    if given and is_kernel:
        kinds = [given.partition(":")[0]]
    elif told:
        # Flax's layer with transpose_kernel=True has the layout of a convolution.
        kinds = [told, "conv"] if told == "flax_conv_transpose" and slot.kind is None else [told]
    else:
        kinds = [kind_by_rank(len(shape))]
    arrays = [from_torch_layout(kind, weight, shape) for kind in kinds]
    if not told and not given and arrays[0] is None:
        kinds = ["conv_transpose", "flax_conv_transpose"]
        arrays = [from_torch_layout(kind, weight, shape) for kind in kinds]
        if len({array.tobytes() for array in arrays if array is not None}) == 2:
            return (
                f"{name!r} {weight.shape} fits {where(slot)} {shape} as a transposed convolution only; pass "
                f"kinds={{{_layer(name)!r}: 'conv_transpose'}}, or 'flax_conv_transpose' for Flax's layer"
            )
    fitting = [array for array in arrays if array is not None]
    if fitting:
        return fitting[0]
    what = f" as the kernel of kind {' or '.join(kinds)}" if is_kernel else ""
    return f"{name!r} {weight.shape} does not fit {where(slot)} {shape}{what}"


def _is_lossless(given: np.dtype, wanted: np.dtype) -> bool:
    """numpy calls int64 to float64 safe, which it is not."""
    return np.can_cast(given, wanted, "safe") and not (
        given.kind in "iu" and given.itemsize == 8 and wanted.kind in "fc"
    )


def _report(
    missing: list[Slot],
    unexpected: list[str],
    misfits: list[str],
    originals: dict[str, str],
    entries: dict[str, np.ndarray],
    strict: bool,
) -> str:
    absent = []
    for slot in missing[:21]:
        close = get_close_matches(slot.names[0], unexpected, n=1)
        hint = f"; did you mean {originals[close[0]]!r}?" if close else ""
        absent.append(f"{slot.names[0]!r} for {where(slot)} {tuple(slot.array.shape)}{hint}")
    surplus = [f"{originals[name]!r} {entries[originals[name]].shape}" for name in unexpected[:21]]
    text = "The state dict does not fit the Flax parameters."
    for title, lines, total in (
        ("Missing in the state dict", absent, len(missing)),
        ("Unexpected, with no place in Flax", surplus, len(unexpected)),
        ("Misfitting", misfits, len(misfits)),
    ):
        if total:
            text += f"\n{title} ({total}):" + "".join(f"\n  {line}" for line in lines[:20])
            text += f"\n  ... and {total - 20} more" if total > 20 else ""
    if missing or unexpected:
        text += "\nPass rename={...} where names differ" + (", or strict=False to load what fits." if strict else ".")
    return text


def _check_eps(eps: float, nnx: bool, norms: list[tuple[str, Any]]) -> None:
    if not nnx:
        raise StateDictError("eps is not part of a Linen tree; construct the module with epsilon=... instead.")
    if not norms:
        raise StateDictError("eps was given, and the module has no normalisation layer; leave it out.")
    if isinstance(eps, bool) or not isinstance(eps, (int, float)) or not eps >= 0:
        raise StateDictError(f"eps is {eps!r}, expected a number that is not negative.")


# --- writing -----------------------------------------------------------------------------------------


def _like(old: Any, array: np.ndarray) -> Any:
    """The array, which nobody else holds, as one of the old one's sort and on its devices."""
    if isinstance(old, np.ndarray):
        return array
    import jax

    if jax.dtypes.canonicalize_dtype(array.dtype) != array.dtype:
        return array  # 64 bits, which JAX would halve unless jax_enable_x64 is set
    return jax.device_put(array, old.sharding) if getattr(old, "committed", False) else jax.numpy.asarray(array)


def _rebuilt(tree: Any, path: tuple[str, ...], values: dict[tuple[str, ...], Any]) -> Any:
    new = {}
    for key, value in tree.items():
        inner = (*path, key)
        new[key] = _rebuilt(value, inner, values) if isinstance(value, Mapping) else values.get(inner, value)
    return new if type(tree) is dict else type(tree)(new)
