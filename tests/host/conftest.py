"""The host before and after the local cluster. The first test takes a running cluster down, the last one leaves none."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.layout import Layout


@pytest.fixture(scope="session")
def layout() -> Layout:
    return Layout()


@pytest.fixture(scope="session")
def snapshot_file(layout: Layout) -> Path:
    """The host as it was before `make up`, from test_up.py for test_down.py: the end-to-end tests run between them."""
    return layout.cache / "tests/host.json"
