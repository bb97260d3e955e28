"""The results files: what was measured, under which conditions, and what may be compared with what."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
from pathlib import Path
from typing import Any

from jconv.store import cpu_model

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).with_name("results")
PACKAGES = ("jconv", "jax", "flax", "torch")
ALIKE = ("benchmark", "threads", "clock", "dtype", "cpu", "malloc", "xla_flags", "quick")


class Unlike(ValueError):
    """Two files, or a file and a run, that must not be put side by side."""


def conditions(benchmark: str, threads: int, clock: str, dtype: str, quick: bool) -> dict[str, Any]:
    """What must be equal for two times to be compared."""
    tunables = {k: v for k, v in sorted(os.environ.items()) if k.startswith("MALLOC_") or k == "LD_PRELOAD"}
    return {
        "benchmark": benchmark,
        "threads": threads,
        "clock": clock,
        "dtype": dtype,
        "cpu": f"{cpu_model()}, {os.cpu_count()} cores",
        "malloc": tunables | {k: v for k, v in os.environ.items() if k == "GLIBC_TUNABLES"} or "glibc's defaults",
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "quick": quick,
    }


def state(packages: tuple[str, ...] = PACKAGES) -> str:
    """Whose code was timed: versions, and a digest of jconv's source. A row of another state is stale."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "jconv").rglob("*.py")):
        digest.update(path.read_bytes())
    versions = [f"{name} {importlib.metadata.version(name)}" for name in packages]
    return f"{', '.join(versions)}, source {digest.hexdigest()[:10]}"


class Ledger:
    """One file of rows by key, saved after each row, so that a run that was cut off goes on where it stopped."""

    def __init__(self, path: Path, conditions: dict[str, Any], packages: tuple[str, ...] = PACKAGES):
        self.path, self.state = path, state(packages)
        self.data: dict[str, Any] = {"conditions": conditions, "rows": {}}
        if path.exists():
            self.data = load(path)
            refuse_unlike(path.name, self.data["conditions"], "this run", conditions)

    def has(self, key: str) -> bool:
        return key in self.data["rows"] and self.data["rows"][key]["state"] == self.state

    def add(self, key: str, row: dict[str, Any]) -> None:
        self.data["rows"][key] = {"state": self.state, **row}
        self.save()

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        draft = self.path.with_suffix(".part")
        draft.write_text(json.dumps(self.data, indent=1) + "\n")
        draft.replace(self.path)


def load(path: Path) -> dict[str, Any]:
    """A results file.

    Raises:
        Unlike: if it is missing or something else.
    """
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise Unlike(f"{path} cannot be read as a results file: {error}") from None
    if not isinstance(data, dict) or not {"conditions", "rows"} <= set(data):
        raise Unlike(f"{path} is no results file of these benchmarks")
    return data


def refuse_unlike(one: str, a: dict[str, Any], other: str, b: dict[str, Any]) -> None:
    """Raises Unlike with the first condition in which two measurements differ."""
    for name in ALIKE:
        if a.get(name) != b.get(name):
            raise Unlike(
                f"{one} and {other} are not alike: {name} is {a.get(name)!r} and {b.get(name)!r}; "
                "measure both under the same conditions, or write to another folder with --output"
            )
