"""What several tests of the operator's tools use."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator

import pytest

from tools.cluster import debian, registry
from tools.cluster.settings import Settings
from tools.layout import Layout


class Here(Settings):
    """The node's registry on the loopback."""

    @property
    def address(self) -> str:
        return "127.0.0.1"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as one:
        return int(one.getsockname()[1])


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The node's own registry program, as `make up` starts it; its host and port."""
    real, folder = Layout(), tmp_path_factory.mktemp("node")
    debian.unpack(real, print)
    (folder / "cache").mkdir()
    (folder / "cache/debian").symlink_to(real.debian)
    layout, settings = Layout(cache=folder / "cache", state=folder, runtime=folder), Here(registry_port=free_port())
    daemon = registry.registry(layout, settings)
    daemon.start(layout)
    yield settings.registry
    pid = daemon.pid(layout)
    assert pid
    os.kill(pid, signal.SIGTERM)
