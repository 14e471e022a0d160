"""`make down` leaves the host as it was before `make up`."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.host import snapshot
from tools.cluster import preflight
from tools.layout import REPOSITORY, Layout


@pytest.mark.timeout(300)
def test_nothing_is_left_behind(layout: Layout, snapshot_file: Path) -> None:
    assert preflight.ours(layout), "no local cluster: tests/host/test_up.py brings it up"
    before = json.loads(snapshot_file.read_text())
    during = snapshot.new(before, snapshot.take(layout))
    kinds = {"processes", "mounts", "links", "nft tables", "ipsets", "cgroups", "folders"}
    assert kinds <= set(during), "the comparison sees a running cluster"
    subprocess.run([sys.executable, "-m", "tools", "down"], cwd=REPOSITORY, check=True, timeout=200)
    deadline = time.monotonic() + 15  # a process that was killed may be shown until it is reaped
    while (left := snapshot.new(before, snapshot.take(layout))) and time.monotonic() < deadline:
        time.sleep(1)
    assert not left
    lost = snapshot.new(snapshot.take(layout), before)
    lost.pop("processes", None)  # of others, which come and go
    assert not lost, "something of the host's own is gone"


def test_it_can_be_repeated(layout: Layout) -> None:
    subprocess.run([sys.executable, "-m", "tools", "down"], cwd=REPOSITORY, check=True, timeout=60)
    assert not preflight.ours(layout)
