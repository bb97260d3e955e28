"""Reading checkpoint files into numpy arrays: ``.safetensors``, and ``.pth``/``.pt`` without PyTorch.

A ``.pth`` file is a pickle, and a pickle may run code. This reader admits the few names that a state
dict needs, replaces each by an inert stand-in, and refuses every other name before it is looked up.
The pickle only says where each tensor lies; the bytes are read afterwards, within the file's bounds.
"""

from __future__ import annotations

import os
import pickle
import pickletools
import re
import struct
import sys
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Mapping
from io import BufferedReader, BytesIO
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from jconv.errors import StateDictError

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_WRAPPERS = ("state_dict", "model_state_dict", "model")
_REMEDY = "save torch.save(model.state_dict(), path) anew with PyTorch"

_STORAGE_DTYPES = {
    **{"DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16"},
    **{"BFloat16Storage": "bfloat16", "BoolStorage": "bool", "UntypedStorage": "uint8"},
    **{"LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8"},
    **{"ByteStorage": "uint8", "ComplexFloatStorage": "complex64", "ComplexDoubleStorage": "complex128"},
}
_FLOAT8_DTYPES = {"float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz"}
_TORCH_DTYPES = {*_STORAGE_DTYPES.values(), "uint16", "uint32", "uint64", *_FLOAT8_DTYPES}
_SAFETENSORS_DTYPES = {
    **{f"F{bits}": f"float{bits}" for bits in (16, 32, 64)},
    **{f"I{bits}": f"int{bits}" for bits in (8, 16, 32, 64)},
    **{f"U{bits}": f"uint{bits}" for bits in (8, 16, 32, 64)},
    **{"BF16": "bfloat16", "BOOL": "bool", "C64": "complex64"},
    **{"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"},
}


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The tensors of a checkpoint file by name, as numpy arrays, bit for bit.

    The content decides the format, not the suffix: safetensors (read by the safetensors package), or
    what ``torch.save`` writes, in its zip format and in the older one. PyTorch is not needed, and no
    code in the file is run. Of a checkpoint that holds more than a state dict, the entry
    ``state_dict``, ``model_state_dict`` or ``model`` is taken where exactly one of them is there.

    Args:
        path: the file.

    Returns:
        A dict from name to array. bfloat16 and float8 arrays have the dtypes of ml_dtypes. As in
        PyTorch, tensors that shared a storage share memory, and strided tensors are strided views.

    Raises:
        StateDictError: the file is missing, truncated, corrupt or foreign, or its pickle asks for
            anything but tensors, or safetensors is not installed.

    >>> import os, tempfile, numpy as np, safetensors.numpy
    >>> path = os.path.join(tempfile.mkdtemp(), "model.safetensors")
    >>> safetensors.numpy.save_file({"weight": np.eye(2)}, path)
    >>> read_checkpoint(path)["weight"]
    array([[1., 0.],
           [0., 1.]])
    """
    try:
        with Path(path).open("rb") as file:
            return _read(file)
    except StateDictError as error:
        raise StateDictError(f"Cannot read {str(path)!r}: {error}") from error
    except OSError as error:
        raise StateDictError(f"Cannot read {str(path)!r}: {error.strerror or error}.") from error
    except Exception as error:
        why = f"{type(error).__name__}: {str(error)[:200]}"
        raise StateDictError(
            f"Cannot read {str(path)!r}: the file is truncated or corrupt ({why}); fetch it anew."
        ) from error


def unwrap(checkpoint: object) -> dict[str, Any]:
    """The state dict in a checkpoint: itself, or its one entry that is known to hold a state dict.

    Args:
        checkpoint: a mapping from names to tensors, or one that holds such a mapping under
            ``state_dict``, ``model_state_dict`` or ``model``.

    Returns:
        The entries by name. Whether the values are tensors is left to the caller.

    Raises:
        StateDictError: it is no mapping, a name is no string, or none or several of the keys are there.

    >>> unwrap({"state_dict": {"weight": 1.0}, "epoch": 3})
    {'weight': 1.0}
    """
    entries = _items(checkpoint)
    if any(isinstance(value, Mapping) for value in entries.values()):
        held = [key for key in _WRAPPERS if isinstance(entries.get(key), Mapping)]
        if len(held) != 1:
            raise StateDictError(
                f"the checkpoint has the keys {sorted(entries)[:20]}, of which exactly one of {_WRAPPERS} "
                "was expected to hold a state dict; pass the state dict itself."
            )
        entries = _items(entries[held[0]])
    return entries


def _items(mapping: object) -> dict[str, Any]:
    if not isinstance(mapping, Mapping):
        raise StateDictError(f"it holds a {type(mapping).__name__}, not a state dict; {_REMEDY}.")
    # dict.items, as a pickle may have put an attribute `items` on an OrderedDict.
    entries = dict(dict.items(mapping)) if isinstance(mapping, dict) else dict(mapping.items())
    for key in entries:
        if not isinstance(key, str):
            raise StateDictError(f"a state dict has strings for names, and here one is a {type(key).__name__}.")
    return entries


def _read(file: BufferedReader) -> dict[str, np.ndarray]:
    head = file.read(9)
    file.seek(0)
    if not head:
        raise StateDictError("the file is empty; fetch it anew.")
    if head.startswith(b"PK\x03\x04"):
        return _read_zip(file)
    if head[8:] == b"{":
        return _read_safetensors(file)
    if head.startswith(b"\x80"):
        return _read_legacy(file)
    raise StateDictError(
        "the content is neither that of a .safetensors file nor that of a .pth or .pt file of torch.save; "
        "fetch it anew, or convert it to one of these."
    )


# --- safetensors -------------------------------------------------------------------------------------


def _read_safetensors(file: BufferedReader) -> dict[str, np.ndarray]:
    try:
        from safetensors import deserialize
    except ImportError as error:
        raise StateDictError("safetensors is not installed; run `pip install safetensors`.") from error
    arrays = {}
    for name, entry in deserialize(file.read()):
        if entry["dtype"] not in _SAFETENSORS_DTYPES:
            raise StateDictError(f"the tensor {name!r} has the dtype {entry['dtype']}, which numpy has not.")
        data = np.frombuffer(bytearray(entry["data"]), np.uint8)
        dtype = _SAFETENSORS_DTYPES[entry["dtype"]]
        arrays[name] = _elements(data, dtype, "little").reshape(entry["shape"])
    return arrays


# --- the pickle: what it may name, and the inert records that it builds ------------------------------


def _forged(what: str) -> StateDictError:
    return StateDictError(f"{what}; no writer of PyTorch's does that, so do not trust this file.")


class _StorageType(NamedTuple):
    dtype: str


class _DType(NamedTuple):
    name: str


class _Storage(NamedTuple):
    key: str
    dtype: str
    start: int
    size: int


class _Tensor(NamedTuple):
    storage: _Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Callable(NamedTuple):
    """A function that a pickle may call: a tuple, so that no pickle can alter it."""

    function: Callable[..., Any]

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any) -> _Tensor:
    if not isinstance(storage, _Storage):
        raise _forged("the pickle builds a tensor on something that is no storage")
    return _Tensor(storage, storage.dtype, _count(offset), _counts(shape), _counts(strides))


def _rebuild_tensor_v2(
    storage: Any, offset: Any, shape: Any, strides: Any, grad: Any, hooks: Any, metadata: Any = None
) -> _Tensor:
    if metadata:
        raise StateDictError(f"a tensor carries view metadata (conj or neg); resolve it and {_REMEDY}.")
    return _rebuild_tensor(storage, offset, shape, strides)


def _rebuild_tensor_v3(
    storage: Any,
    offset: Any,
    shape: Any,
    strides: Any,
    grad: Any,
    hooks: Any,
    dtype: Any,
    metadata: Any = None,
) -> _Tensor:
    tensor = _rebuild_tensor_v2(storage, offset, shape, strides, grad, hooks, metadata)
    if not isinstance(dtype, _DType):
        raise _forged("the pickle gives a tensor a dtype that is none")
    return tensor._replace(dtype=dtype.name)


def _rebuild_parameter(tensor: Any, grad: Any, hooks: Any) -> _Tensor:
    if not isinstance(tensor, _Tensor):
        raise _forged("the pickle builds a parameter on something that is no tensor")
    return tensor


def _size(counts: Any = ()) -> tuple[int, ...]:
    return _counts(counts)


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise _forged("a tensor's size, stride or offset is no natural number")
    return value


def _counts(values: Any) -> tuple[int, ...]:
    if not isinstance(values, (tuple, list)):
        raise _forged("a tensor's size or stride is no tuple")
    return tuple(_count(value) for value in values)


_ADMITTED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch", "Size"): _Callable(_size),
    ("torch._utils", "_rebuild_tensor"): _Callable(_rebuild_tensor),
    ("torch._utils", "_rebuild_tensor_v2"): _Callable(_rebuild_tensor_v2),
    ("torch._utils", "_rebuild_tensor_v3"): _Callable(_rebuild_tensor_v3),
    ("torch._utils", "_rebuild_parameter"): _Callable(_rebuild_parameter),
    **{("torch", name): _DType(name) for name in _TORCH_DTYPES},
    **{
        (module, name): _StorageType(dtype)
        for module in ("torch", "torch.cuda", "torch.storage")
        for name, dtype in _STORAGE_DTYPES.items()
    },
}


class _Unpickler(pickle.Unpickler):
    """Unpickles tensors as records, and notes every storage that they lie in."""

    def __init__(self, data: bytes, storages: dict[str, _Storage]):
        super().__init__(BytesIO(data), encoding="utf-8")
        self._storages = storages

    def find_class(self, module_name: str, global_name: str) -> Any:
        try:
            return _ADMITTED[module_name, global_name]
        except KeyError:
            raise StateDictError(
                f"the pickle asks for {module_name}.{global_name}, and only tensors are admitted; if you "
                f"trust the file, load it with PyTorch and {_REMEDY}."
            ) from None

    def persistent_load(self, pid: Any) -> _Storage:
        if isinstance(pid, tuple) and pid[:1] == ("module",):
            raise StateDictError(f"the file holds a whole pickled model; {_REMEDY}.")
        if not isinstance(pid, tuple) or len(pid) not in (5, 6) or pid[0] != "storage":
            raise _forged("a persistent id of the pickle is no storage's")
        kind, key, view = pid[1], pid[2], pid[5] if len(pid) == 6 else None
        if not isinstance(kind, _StorageType) or not isinstance(key, str):
            raise _forged("a persistent id of the pickle names no storage")
        root = _Storage(key, kind.dtype, 0, _count(pid[4]))
        if self._storages.setdefault(root.key, root) != root:
            raise _forged(f"the storage {root.key!r} is described in two ways")
        if view is None:
            return root
        _, start, size = view
        if _count(start) + _count(size) > root.size:
            raise _forged(f"a view of the storage {root.key!r} exceeds it")
        return root._replace(start=start, size=size)


_REFUSED_OPCODES = {"EXT1", "EXT2", "EXT4", "PERSID", "BYTEARRAY8", "NEXT_BUFFER", "READONLY_BUFFER"}


def _unpickle(file: BinaryIO, storages: dict[str, _Storage]) -> Any:
    """Unpickles the one object that begins at the file's position, and leaves the position behind it."""
    start = file.tell()
    for opcode, argument, _ in pickletools.genops(file):
        if opcode.name in _REFUSED_OPCODES:
            raise _forged(f"the pickle uses {opcode.name}, which no state dict needs")
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and not 0 <= int(argument or 0) <= file.tell():
            raise _forged("the pickle asks for an absurd amount of memory")
    end = file.tell()
    file.seek(start)
    return _Unpickler(file.read(end - start), storages).load()


# --- the two formats of torch.save -------------------------------------------------------------------


def _read_zip(file: BufferedReader) -> dict[str, np.ndarray]:
    try:
        members = {info.filename: info for info in zipfile.ZipFile(file).infolist()}
    except zipfile.BadZipFile as error:
        raise StateDictError(f"the zip archive is truncated or corrupt ({error}); fetch it anew.") from error
    pickles = [name for name in members if re.fullmatch(r"([^/]*/)?data\.pkl", name)]
    if len(pickles) != 1:
        raise StateDictError("the zip archive holds no data.pkl, so torch.save did not write it.")
    prefix = pickles[0].removesuffix("data.pkl")
    if prefix + "constants.pkl" in members:
        raise StateDictError(f"the file is a TorchScript archive, not a state dict; {_REMEDY}.")

    order = sys.byteorder
    if prefix + "byteorder" in members:
        order = _member(file, members[prefix + "byteorder"]).tobytes().decode("ascii")
        if order not in ("little", "big"):
            raise StateDictError(f"the byte order is {order!r}, expected 'little' or 'big'; fetch the file anew.")
    storages: dict[str, _Storage] = {}
    pickled = _member(file, members[pickles[0]]).tobytes()
    checkpoint = _unpickle(BytesIO(pickled), storages)
    _check_total(file, storages)

    data = {}
    for key, storage in storages.items():
        info = members.get(f"{prefix}data/{key}")
        if info is None:
            raise StateDictError(f"the storage {key!r} is not in the archive; fetch the file anew.")
        if info.file_size != (size := _bytes(storage)):
            raise StateDictError(
                f"the storage {key!r} has {info.file_size} bytes, expected {size}; fetch the file anew."
            )
        data[key] = _elements(_member(file, info), storage.dtype, order)
    return _arrays(checkpoint, data, _length(file))


def _member(file: BufferedReader, info: zipfile.ZipInfo) -> np.ndarray:
    """The bytes of a stored member. zipfile's own reader refuses files saved without check sums."""
    if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size or info.flag_bits & 1:
        raise StateDictError(f"the member {info.filename!r} is compressed, which torch.save never does.")
    file.seek(info.header_offset)
    header = file.read(30)
    if header[:4] != b"PK\x03\x04" or len(header) < 30:
        raise StateDictError(f"the member {info.filename!r} has no header; fetch the file anew.")
    name_length, extra_length = struct.unpack("<HH", header[26:])
    if file.read(name_length) != info.orig_filename.encode("utf-8"):
        raise StateDictError(f"the member {info.filename!r} has another name in its header; fetch the file anew.")
    file.seek(extra_length, os.SEEK_CUR)
    data = _bytes_at(file, info.file_size)
    if info.CRC and zlib.crc32(data.data) != info.CRC:
        raise StateDictError(f"the check sum of {info.filename!r} is wrong; fetch the file anew.")
    return data


def _read_legacy(file: BufferedReader) -> dict[str, np.ndarray]:
    storages: dict[str, _Storage] = {}
    if _unpickle(file, storages) != _LEGACY_MAGIC:
        raise StateDictError(f"the file is a pickle, but not one of torch.save; {_REMEDY}.")
    if _unpickle(file, storages) != _LEGACY_PROTOCOL:
        raise StateDictError(f"the file is not of PyTorch's protocol {_LEGACY_PROTOCOL}; {_REMEDY}.")
    _unpickle(file, storages)  # the writer's word sizes; the data are little endian whatever these say
    checkpoint = _unpickle(file, storages)
    keys = _unpickle(file, {})
    if not isinstance(keys, list) or any(not isinstance(key, str) for key in keys):
        raise StateDictError("the list of storages is no list of names; fetch the file anew.")
    if sorted(keys) != sorted(storages):
        raise StateDictError("the list of storages is not that of the tensors; fetch the file anew.")
    _check_total(file, storages)

    data = {}
    for key in keys:
        storage = storages[key]
        size = int(_bytes_at(file, 8).view("<i8")[0])
        if size != storage.size:
            raise StateDictError(
                f"the storage {key!r} has {size} elements, expected {storage.size}; fetch the file anew."
            )
        data[key] = _elements(_bytes_at(file, _bytes(storage)), storage.dtype, "little")
    return _arrays(checkpoint, data, _length(file))


# --- from bytes to arrays ----------------------------------------------------------------------------


def _dtype(name: str) -> np.dtype:
    if name.startswith(("bfloat", "float8")):
        import ml_dtypes

        return np.dtype(getattr(ml_dtypes, name))
    return np.dtype(name)


def _bytes(storage: _Storage) -> int:
    return storage.size * _dtype(storage.dtype).itemsize


def _length(file: BufferedReader) -> int:
    return os.fstat(file.fileno()).st_size


def _check_total(file: BufferedReader, storages: dict[str, _Storage]) -> None:
    total = sum(_bytes(storage) for storage in storages.values())
    if total > _length(file):
        raise StateDictError(
            f"the tensors take {total} bytes and the file has {_length(file)}; it is truncated or corrupt."
        )


def _bytes_at(file: BufferedReader, count: int) -> np.ndarray:
    left = _length(file) - file.tell()
    if count > left:
        raise StateDictError(f"the file ends {count - left} bytes early; fetch it anew.")
    data = np.empty(count, np.uint8)
    if file.readinto(data.data) != count:
        raise StateDictError("the file became shorter while it was read; try again.")
    return data


def _elements(data: np.ndarray, name: str, order: str) -> np.ndarray:
    dtype = _dtype(name)
    if name == "bool":
        return data != 0
    if order != sys.byteorder:
        word = dtype.itemsize // 2 if dtype.kind == "c" else dtype.itemsize
        data = data.view(f"u{word}").byteswap()
    return data.view(dtype)


def _arrays(checkpoint: object, data: dict[str, np.ndarray], limit: int) -> dict[str, np.ndarray]:
    arrays = {}
    for name, value in unwrap(checkpoint).items():
        if not isinstance(value, _Tensor):
            raise StateDictError(f"the entry {name!r} holds a {type(value).__name__}, not a tensor; {_REMEDY}.")
        arrays[name] = _array(name, value, data[value.storage.key], limit)
    return arrays


def _array(name: str, tensor: _Tensor, root: np.ndarray, limit: int) -> np.ndarray:
    storage, shape, strides = tensor.storage, tensor.shape, tensor.strides
    elements = root[storage.start : storage.start + storage.size]
    if tensor.dtype != storage.dtype:
        elements = _elements(elements.view(np.uint8), tensor.dtype, sys.byteorder)
    if len(shape) != len(strides):
        raise StateDictError(f"the tensor {name!r} has {len(shape)} sizes and {len(strides)} strides.")
    if 0 in shape:
        return np.empty(shape, elements.dtype)
    last = tensor.offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if last >= elements.size or prod(shape) > limit:
        raise _forged(f"the tensor {name!r} of shape {shape} exceeds its storage of {elements.size} elements")
    # A dimension of size 1 may have any stride, even one beyond 64 bits.
    steps = [(t if s > 1 else 1) * elements.itemsize for s, t in zip(shape, strides, strict=True)]
    return np.lib.stride_tricks.as_strided(elements[tensor.offset :], shape, steps)
