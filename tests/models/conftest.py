"""The models run longer than they compile, and as users run them: optimised, one device, without float64."""

import os
import sys
from pathlib import Path

import jax
import pytest

# Set by the conftest above for thousands of tiny programs; JAX reads them when it first makes a device.
UNWANTED = (
    "--xla_backend_optimization_level",
    "--xla_llvm_disable_expensive",
    "--xla_cpu_use_fusion_emitters",
    "--xla_force_host_platform",
)
os.environ["XLA_FLAGS"] = " ".join(f for f in os.environ.get("XLA_FLAGS", "").split() if not f.startswith(UNWANTED))
os.environ["KERAS_BACKEND"] = "jax"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent / "benchmarks"))


@pytest.fixture(autouse=True)
def single_precision():
    with jax.enable_x64(False):
        yield
