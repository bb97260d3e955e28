import itertools
import os
import sys

# Thousands of small programs are compiled once and run once: LLVM's optimiser would be most of the time, and XLA's
# emitters of fusions half of the rest. Eight virtual devices serve the sharding tests. A flag of the caller's wins.
os.environ["XLA_FLAGS"] = " ".join(
    [
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
        "--xla_cpu_use_fusion_emitters=false",
        "--xla_force_host_platform_device_count=8",
        os.environ.get("XLA_FLAGS", ""),
    ]
)

# What the user once measured on this machine, or set, must not choose the algorithms of the tests.
os.environ["JCONV_STORE"] = ""
os.environ.pop("JCONV_WORKSPACE_MIB", None)

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_enable_x64", True)

pytest_plugins = ["pytester"]

_tests = itertools.count(1)


@pytest.fixture(autouse=True)
def same_weights():
    """The weights of PyTorch's layers do not depend on the tests before."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(autouse=True)
def fresh_caches():
    """Compiled programs pile up to gigabytes over thousands of cases."""
    yield
    if next(_tests) % 100 == 0:
        jax.clear_caches()
