"""What was measured, on disk: what was timed once on a device is known to every later process on it.

One file of JSON lines, to which everybody only appends. A record is one write: it opens with a newline, so
that what a killed writer left behind spoils no other record, and concurrent writers never read to write.
An export has the same form, so stores can be joined, shipped and read by eye. The constants of each
kind of CPU are a small file of their own beside it, which is replaced in one step.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform as host
import re
import warnings
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import lax

from jconv import __version__
from jconv.device import Constants, Device, device_for, threads, workspace_limit
from jconv.errors import ConvError
from jconv.problem import ConvProblem, Layout, is_static

# Of the calibrations. A measurement says which jconv took it, and counts for that one only.
SCHEMA = 1

# An algorithm's nanoseconds, or the reason why it failed when it was timed.
Times = Mapping[str, int | str]
Pairs = tuple[tuple[str, int | str], ...]


class Place(NamedTuple):
    """Where a time holds: the device's kind, the versions of JAX and jconv (whose algorithms change), and on CPU the
    threads and the workspace limit in bytes (which decides what runs in parts); both are 0 on other devices."""

    device: str
    jax: str
    jconv: str
    threads: int
    workspace: int


class Key(NamedTuple):
    """What a time belongs to; the problem is a text that :func:`problem_to_json` made."""

    place: Place
    problem: str


class Store:
    """The records of one directory, read at the first question; None keeps them in memory only."""

    def __init__(self, directory: Path | None):
        self.path = None if directory is None else directory / "measurements.jsonl"
        model = re.sub("[^a-z0-9]+", "-", cpu_model().lower())[:100]
        self.calibration = None if directory is None else directory / f"calibration-{model}.json"
        self.constants: Constants | None = None
        self.records: dict[Key, dict[str, int | str]] = {}
        self._pairs: dict[Key, Pairs] = {}
        self._warned: set[str] = set()
        self._read_constants()
        self.reload()

    def reload(self) -> None:
        """Reads what other processes have added since."""
        if self.path is None:
            return
        try:
            content = self.path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError as error:
            return self._warn("read", f"{self.path} cannot be read ({error.strerror}); measured times stay in memory")
        good, bad = parse(content)
        for key, times in good:
            self._keep(key, times)
        if bad:
            more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
            self._warn(
                "read",
                f"{self.path} has lines that are no measurements of this jconv's, line {bad[0]}{more}; they are ignored, "
                "and may be deleted if no newer jconv wrote them",
            )

    def pairs(self, key: Key) -> Pairs:
        """What is known of ``key`` as pairs, which are a key themselves."""
        return self._pairs.get(key, ())

    def add(self, entries: Iterable[tuple[Key, Times]]) -> None:
        """Keeps times, and appends them to the file. A later time of an algorithm replaces an earlier one."""
        entries = list(entries)
        for key, times in entries:
            self._keep(key, times)
        if self.path is None or not entries:
            return
        try:
            _append(self.path, "".join(f"\n{line(key, times)}\n" for key, times in entries).encode())
        except OSError as error:
            self._warn(
                "write",
                f"{self.path} cannot be written ({error.strerror}), so measured times stay in memory; "
                "set JCONV_STORE to a directory that can be, or keep them with jconv.tuning.export_measurements(path)",
            )

    def calibrate(self, constants: Constants) -> None:
        """Keeps this CPU's constants, in memory and in their file."""
        self.constants = constants
        if self.calibration is None:
            return
        record = {"jconv": SCHEMA, "cpu": cpu_model(), "constants": constants._asdict()}
        try:
            self.calibration.parent.mkdir(parents=True, exist_ok=True)
            replace_file(self.calibration, f"{json.dumps(record)}\n")
        except OSError as error:
            self._warn(
                "calibrate",
                f"{self.calibration} cannot be written ({error.strerror}), so the calibration stays in memory; "
                "set JCONV_STORE to a directory that can be",
            )

    def _read_constants(self) -> None:
        if self.calibration is None:
            return
        try:
            self.constants = _constants(json.loads(self.calibration.read_bytes()))
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError as error:
            self._warn("constants", f"{self.calibration} cannot be read ({error.strerror}); it is ignored")
        except (ValueError, KeyError, TypeError, RecursionError):
            self._warn(
                "constants",
                f"{self.calibration} is no calibration of this CPU by this jconv; it is ignored, "
                "and jconv tune --calibrate writes it anew",
            )

    def _keep(self, key: Key, times: Times) -> None:
        known = self.records.setdefault(key, {})
        known.update(times)
        self._pairs[key] = tuple(known.items())

    def _warn(self, what: str, message: str) -> None:
        if what not in self._warned:
            warnings.warn(message, stacklevel=3)
        self._warned.add(what)


def store() -> Store:
    """The store of this process: that of ``$JCONV_STORE``, or the user's. An empty variable keeps it off the disk."""
    return _open(os.environ.get("JCONV_STORE"))


def measured(problem: ConvProblem, platform: str) -> Pairs:
    """What is known of a problem on this process's device of ``platform``: (algorithm, nanoseconds or failure) pairs.

    Nothing where the process has no such device: an export for another machine takes no time of this one.
    """
    known = store()
    if not known.records:
        return ()
    key = key_of(problem, platform)
    return () if key is None else known.pairs(key)


def calibrated(platform: str) -> Device:
    """The device that stands for ``platform``, by what :func:`jconv.tuning.calibrate` measured on this CPU, if it did."""
    return device_for(platform, store().constants)


def key_of(problem: ConvProblem, platform: str) -> Key | None:
    """None for a problem with symbolic sizes, and where this process has no such device."""
    place, text = here(platform), _text(problem)
    return None if place is None or text is None else Key(place, text)


def here(platform: str) -> Place | None:
    """This process's place on ``platform``, or None where it has no such device."""
    kind = _kind(platform)
    if kind is None:
        return None
    cpu = (threads(), workspace_limit()) if platform == "cpu" else (0, 0)
    return Place(kind, jax.__version__, __version__, *cpu)


def problem_to_json(problem: ConvProblem) -> dict[str, Any]:
    """The fields of a problem that matter for its time: all but the sharding. The sizes must be numbers."""
    precision, preferred = problem.precision, problem.preferred_element_type
    return {
        "lhs_shape": list(problem.lhs_shape),
        "rhs_shape": list(problem.rhs_shape),
        "layout": [list(spec) for spec in problem.layout],
        "strides": list(problem.strides),
        "padding": [list(pair) for pair in problem.padding],
        "lhs_dilation": list(problem.lhs_dilation),
        "rhs_dilation": list(problem.rhs_dilation),
        "feature_groups": problem.feature_groups,
        "batch_groups": problem.batch_groups,
        "reversed": problem.reversed,
        "dtype": problem.dtype.name,
        "precision": _precision_to_json(precision),
        "preferred_element_type": None if preferred is None else preferred.name,
    }


def problem_from_json(data: Any) -> ConvProblem:
    """The inverse of :func:`problem_to_json`.

    Raises:
        ConvError: if ``data`` is nothing that it could have made, or needs 64-bit types that JAX has switched off.

    >>> x, w = jnp.ones((1, 3, 8, 8)), jnp.ones((4, 3, 3, 3))
    >>> p = ConvProblem.of(x, w, (1, 1), "SAME", precision="highest")
    >>> problem_from_json(problem_to_json(p)) == p
    True
    """
    try:
        layout = Layout(*(tuple(spec) for spec in data["layout"]))
        dtype = np.dtype(data["dtype"])
        if any(type(d) is not int or d < 0 for d in (*data["lhs_shape"], *data["rhs_shape"])):
            raise ValueError("a size is no number of at least 0")
        lhs, rhs = (
            jax.ShapeDtypeStruct(physical(shape, spec), dtype)
            for shape, spec in ((data["lhs_shape"], layout.lhs_spec), (data["rhs_shape"], layout.rhs_spec))
        )
        problem = ConvProblem.of(
            lhs, rhs, data["strides"], data["padding"], data["lhs_dilation"], data["rhs_dilation"], layout,
            data["feature_groups"], data["batch_groups"], _precision_from_json(data["precision"]),
            data["preferred_element_type"],
        ).replace(reversed=bool(data["reversed"]))  # fmt: skip
    except ConvError:
        raise
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise ConvError(f"a problem must be a JSON object of ConvProblem's fields, got {data!r} ({error!r})") from None
    if problem.dtype != dtype:
        raise ConvError(f"dtype {dtype} needs 64-bit types, which JAX has switched off; set JAX_ENABLE_X64=1")
    return problem


def line(key: Key, times: Times) -> str:
    """One record as it stands in a file."""
    record = {**key.place._asdict(), "problem": json.loads(key.problem), "times": dict(times)}
    return json.dumps(record, separators=(",", ":"))


def parse(content: bytes) -> tuple[list[tuple[Key, Times]], list[int]]:
    """The records of a file, and the numbers of the lines that are none."""
    good: list[tuple[Key, Times]] = []
    bad: list[int] = []
    for number, text in enumerate(content.split(b"\n"), start=1):
        if text.strip():
            try:
                good.append(_record(json.loads(text)))
            except (ValueError, KeyError, TypeError, RecursionError):
                bad.append(number)
    return good, bad


def replace_file(path: Path, text: str) -> None:
    """Writes a file in one step: whoever reads it sees the old one or the new one, whole."""
    draft = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        draft.write_text(text)
        draft.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            draft.unlink()
        raise


def physical(shape: Any, spec: Any) -> tuple[int, ...]:
    """A shape in logical order as it lies in memory."""
    return tuple(shape[spec.index(axis)] for axis in range(len(shape)))


def _record(data: Any) -> tuple[Key, Times]:
    if data["jconv"] == 1 and type(data["jconv"]) is int:  # from before a record knew these two: it counts nowhere
        data = {**data, "jconv": "", "workspace": 0}
    place, times = Place(*(data[field] for field in Place._fields)), data["times"]
    sound = (
        all(isinstance(text, str) for text in place[:3])
        and all(type(number) is int for number in place[3:])
        and isinstance(data["problem"], dict)
        and isinstance(times, dict)
        and all(isinstance(t, str) or (type(t) is int and t > 0) for t in times.values())
    )
    if not sound:
        raise ValueError("no measurement")
    return Key(place, _canonical(data["problem"])), times


def _constants(data: Any) -> Constants:
    constants = Constants(**data["constants"])
    if data["jconv"] != SCHEMA or data["cpu"] != cpu_model() or any(type(c) is not int or c < 1 for c in constants):
        raise ValueError("no calibration")
    return constants


@lru_cache(maxsize=16)
def _kind(platform: str) -> str | None:
    try:
        device = jax.local_devices(backend="cpu" if platform == "cpu" else None)[0]
    except RuntimeError:
        return None
    names = {device.platform}
    if device.platform == "gpu":
        names.add("rocm" if "rocm" in device.client.platform_version.lower() else "cuda")
    if platform not in names:
        return None
    return f"cpu {cpu_model()}" if platform == "cpu" else device.device_kind


@lru_cache(maxsize=16)
def _open(directory: str | None) -> Store:
    if directory is not None:
        return Store(Path(directory) if directory else None)
    import platformdirs

    return Store(platformdirs.user_data_path("jconv", appauthor=False))


def _append(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        # On a local disk the one write in append mode is atomic already; over NFS it is not.
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        if os.write(file, content) < len(content):
            raise OSError(28, "only a part was written: the disk is full")
        os.fsync(file)
    finally:
        os.close(file)


@lru_cache(maxsize=4096)
def _text(problem: ConvProblem) -> str | None:
    if not is_static(*problem.lhs_shape, *problem.rhs_shape, *(p for pair in problem.padding for p in pair)):
        return None
    return _canonical(problem_to_json(problem))


def _canonical(problem: Any) -> str:
    return json.dumps(problem, sort_keys=True, separators=(",", ":"))


def _precision_to_json(precision: Any) -> Any:
    if isinstance(precision, lax.DotAlgorithm):
        fields = precision._asdict()
        return {name: value if isinstance(value, int) else np.dtype(value).name for name, value in fields.items()}
    if isinstance(precision, tuple):
        return [p.name.lower() for p in precision]
    if isinstance(precision, lax.Precision):
        return precision.name.lower()
    return None if precision is None else precision.name  # a preset's name, in capitals


def _precision_from_json(data: Any) -> Any:
    if isinstance(data, dict):
        fields: Any = {name: np.dtype(v) if isinstance(v, str) else v for name, v in data.items()}
        return lax.DotAlgorithm(**fields)
    return data


@lru_cache(maxsize=1)
def cpu_model() -> str:
    """The processor's name. JAX calls every CPU "cpu"; a home directory may be shared by several kinds."""
    with contextlib.suppress(OSError):
        for entry in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = entry.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return host.processor() or host.machine()
