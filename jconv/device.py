"""What the planner knows of a platform, in integers."""

from __future__ import annotations

import json
import operator
import os
import platform as host
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib import resources
from typing import NamedTuple, SupportsIndex

from jconv.errors import ConvError, ConvTypeError

MiB = 1 << 20
_CACHE = 2 * MiB


class Constants(NamedTuple):
    """A processor as the cost model or a yardstick sees it; the fields are :class:`Device`'s."""

    dot: int
    conv: int
    vector: int
    fft: int
    bytes_per_ns: int
    launch_ns: int


@dataclass(frozen=True)
class Device:
    """One platform as the cost model sees it.

    Attributes:
        platform: JAX's name of the platform, as lowering rules use it.
        dot, conv, vector, fft: float32 operations a nanosecond that one core sustains in matrix products,
            in XLA's own convolution, in fused loops of multiply-adds and in FFTs.
        bytes_per_ns: bytes a nanosecond that are read or written outside those, by all cores together.
        launch_ns: nanoseconds that a fused loop or a library call takes before it does any work.
        threads: threads that run a program.
        workspace_limit: bytes of temporaries above which an algorithm works in parts.
        cache: bytes of a core's second-level cache; temporaries that stay in it cost less. 0 where nobody knows.
        devices: over how many of its kind XLA's partitioner may spread a program's arrays; each has its share of the
            temporaries.
        vendor_default: True where a vendor's kernels stand behind ``xla``, so that nothing untimed
            replaces them.
    """

    platform: str
    dot: int
    conv: int
    vector: int
    fft: int
    bytes_per_ns: int
    launch_ns: int
    threads: int
    workspace_limit: int = 32 * MiB
    cache: int = 0
    devices: int = 1
    vendor_default: bool = False

    @property
    def near(self) -> int:
        """Bytes of operands that are at hand in the cache however often they are read."""
        return self.cache // 4


def device_for(platform: str, measured: Constants | None = None) -> Device:
    """The device that stands for ``platform``; every platform but ``cpu`` trusts its vendor.

    ``measured`` are this machine's yardsticks of ``cpu``, in place of those that the package brings.
    """
    if platform == "cpu":
        return _cpu(shipped() if measured is None else fitted(measured), threads(), workspace_limit())
    return _accelerator(platform)


@cache
def shipped() -> Constants:
    """The constants that the cost model was fitted with, on the machine whose yardsticks are :func:`reference`."""
    return _read("fitted")


@cache
def reference() -> Constants:
    """What ``jconv.tuning.calibrate`` measured on the machine that the cost model was fitted on."""
    return _read("reference")


def fitted(measured: Constants) -> Constants:
    """The fitted constants, each scaled by what this machine's yardstick is to that of the reference.

    A yardstick is one small program; a constant is what whole algorithms reached. Only the ratio carries over.
    """
    scaled = (f * m // r for f, m, r in zip(shipped(), measured, reference(), strict=True))
    return Constants(*(max(1, constant) for constant in scaled))


def _read(which: str) -> Constants:
    """Of this architecture; those of x86-64, the only ones known, for others."""
    known = json.loads(resources.files("jconv").joinpath("calibration.json").read_text("utf-8"))
    return Constants(**known.get(host.machine(), known["x86_64"])[which])


@cache
def threads() -> int:
    """The threads of XLA's pool on CPU, which is made once and reads the same two variables."""
    for variable in ("PJRT_NPROC", "NPROC"):
        if os.environ.get(variable, "").isdecimal():
            return max(1, int(os.environ[variable]))
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


_limit: int | None = None


def workspace_limit(bytes: SupportsIndex | None = None) -> int:
    """The bytes of temporaries that one convolution may use on CPU; above them an algorithm works in parts.

    Plans that are made afterwards keep to it. A program that is compiled keeps its parts: set the limit first, or
    call ``jax.clear_caches()``. GPU and TPU are not concerned: there ``xla`` is the default, and it allocates by itself.

    Args:
        bytes: the new limit, or None to leave it. 1 admits only algorithms that need no temporaries, such as ``xla``.

    Returns:
        The limit in force. Before one is set it is ``$JCONV_WORKSPACE_MIB``, read once, or 32 MiB.

    Raises:
        ConvError: if ``bytes`` is no integer of at least 1, or if the variable is none.

    >>> before = workspace_limit()
    >>> workspace_limit(64 << 20)
    67108864
    >>> workspace_limit(before) == workspace_limit()
    True
    """
    global _limit
    if bytes is not None:
        _limit = _positive(bytes)
    elif _limit is None:
        _limit = _from_environment()
    return _limit


def _positive(bytes: SupportsIndex) -> int:
    try:
        if isinstance(bytes, bool):
            raise TypeError
        number = operator.index(bytes)
    except TypeError:
        raise ConvTypeError(f"bytes must be an integer, got {bytes!r}; 32 MiB, the default, are {32 * MiB}") from None
    if number < 1:
        raise ConvError(
            f"bytes must be at least 1, which admits no temporaries, got {number}; the default is {32 * MiB}"
        )
    return number


def _from_environment() -> int:
    text = os.environ.get("JCONV_WORKSPACE_MIB", "32")
    if not text.isdecimal() or int(text) < 1:
        raise ConvError(f"JCONV_WORKSPACE_MIB must be an integer of at least 1, got {text!r}; unset it for 32")
    return int(text) * MiB


@lru_cache(maxsize=64)
def _cpu(constants: Constants, threads: int, limit: int) -> Device:
    return Device("cpu", *constants, threads=threads, workspace_limit=limit, cache=_CACHE)


@cache
def _accelerator(platform: str) -> Device:
    return Device(
        platform, dot=10_000, conv=10_000, vector=1_000, fft=500, bytes_per_ns=1_000, launch_ns=5_000, threads=1,
        workspace_limit=1 << 33, vendor_default=True,
    )  # fmt: skip
