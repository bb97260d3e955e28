"""What the planner knows of a platform, in integers."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

MiB = 1 << 20


@dataclass(frozen=True)
class Device:
    """One platform as the cost model sees it.

    Attributes:
        platform: JAX's name of the platform, as lowering rules use it.
        dot, conv, vector, fft: float32 operations a nanosecond that one core sustains in matrix products,
            in XLA's own convolution, in fused loops of multiply-adds and in FFTs.
        bytes_per_ns: bytes a nanosecond that one core reads or writes outside those.
        launch_ns: nanoseconds that a fused loop or a library call takes before it does any work.
        threads: threads that run a program.
        workspace_limit: bytes of temporaries above which an algorithm works in parts.
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
    vendor_default: bool = False


_CPU = Device("cpu", dot=220, conv=215, vector=90, fft=13, bytes_per_ns=30, launch_ns=2000, threads=1)


def device_for(platform: str) -> Device:
    """The device that stands for ``platform``; every platform but ``cpu`` trusts its vendor."""
    if platform == "cpu":
        return replace(_CPU, threads=len(os.sched_getaffinity(0)))
    return Device(
        platform, dot=10_000, conv=10_000, vector=1_000, fft=500, bytes_per_ns=1_000, launch_ns=5_000, threads=1,
        workspace_limit=1 << 33, vendor_default=True,
    )  # fmt: skip
