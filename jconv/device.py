"""What the planner knows of a platform, in integers."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """One platform as the cost model sees it.

    Attributes:
        platform: JAX's name of the platform, as lowering rules use it.
        flops_per_ns: float32 operations a nanosecond that one core sustains in a matrix product.
        bytes_per_ns: bytes a nanosecond that one core reads or writes from memory.
        workspace_limit: bytes of temporaries beyond which the planner refuses an algorithm.
        vendor_default: True where a vendor's kernels stand behind ``xla``, so that nothing
            untimed replaces them.
    """

    platform: str
    flops_per_ns: int
    bytes_per_ns: int
    workspace_limit: int
    vendor_default: bool


_CPU = Device("cpu", flops_per_ns=90, bytes_per_ns=20, workspace_limit=1 << 30, vendor_default=False)


def device_for(platform: str) -> Device:
    """The device that stands for ``platform``; every platform but ``cpu`` trusts its vendor."""
    if platform == "cpu":
        return _CPU
    return Device(platform, flops_per_ns=10_000, bytes_per_ns=1_000, workspace_limit=1 << 33, vendor_default=True)
