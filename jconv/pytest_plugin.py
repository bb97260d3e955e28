"""A pytest fixture: ``pytest_plugins = ["jconv.pytest_plugin"]`` in a ``conftest.py`` gives tests the fixture ``assert_parity``.

It is not registered by itself, for then every run of pytest would import JAX before any ``conftest.py`` could set it up.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


@pytest.fixture
def assert_parity() -> Callable[..., Any]:
    """:func:`jconv.parity.assert_parity`; without PyTorch the test is skipped."""
    pytest.importorskip("torch", reason="parity needs PyTorch")
    from jconv import parity

    return parity.assert_parity
