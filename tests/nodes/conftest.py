"""A second server, which is a guest on this machine (tests/nodes/guest.py)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.nodes.guest import Guest


@pytest.fixture(scope="session")
def guest() -> Iterator[Guest]:
    """Booted from an empty disk; taken away at the end."""
    guest = Guest()
    guest.remove()
    guest.build()
    guest.boot()
    yield guest
    guest.remove()
