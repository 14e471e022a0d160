"""Processes of pods are found while pods end: folders of their cgroups go between a look at the list and a look inside."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tools.cluster import down
from tools.layout import Layout


def test_cgroups_that_go_while_they_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pods = tmp_path / "memory" / "kubepods" / "burstable"
    for name, pid in (("pod-a", "11\n"), ("pod-b", "12\n13\n"), ("pod-c", "")):
        (pods / name / "container").mkdir(parents=True)
        (pods / name / "container" / "cgroup.procs").write_text(pid)
    scandir = os.scandir

    def goes(path: Any) -> Iterator[os.DirEntry[str]]:
        if os.fspath(path).endswith("pod-a"):
            raise FileNotFoundError(path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", goes)
    monkeypatch.setattr(down, "CGROUPS", tmp_path)
    found = set(down._pod_processes(Layout(cache=tmp_path / "cache", state=tmp_path / "state", runtime=tmp_path / "run")))
    assert found == {12, 13}
