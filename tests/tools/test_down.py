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


def test_a_disk_on_a_folder_of_ours_stays_mounted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sites give caches and the kubelet's folder disks of their own: `make down` empties them, and unmounts only what is below."""
    ours = tmp_path / "kubelet"
    table = tmp_path / "mountinfo"
    targets = [ours, ours / "pods/a/volume", tmp_path / "kubelet-of-others", ours / "pods/a", ours]
    table.write_text("".join(f"1 0 0:1 / {target} rw - ext4 /dev/sda rw\n" for target in targets))
    real = Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda self, *a, **k: real(table if str(self) == "/proc/self/mountinfo" else self, *a, **k))
    monkeypatch.setattr(Path, "is_mount", lambda self: self == ours)
    unmounted: list[Path] = []
    monkeypatch.setattr(down.shell, "succeeds", lambda command: not unmounted.append(command[-1]))
    down._unmount([ours])
    assert unmounted == [ours, ours / "pods/a", ours / "pods/a/volume"], "the folder once: the kubelet mounts it on itself"

    (ours / "pods").mkdir(parents=True)
    (ours / "config").write_text("")
    (ours / "link").symlink_to(tmp_path)
    down._remove(ours)
    assert list(ours.iterdir()) == [] and table.exists()


def test_a_folder_mounted_on_itself_is_unmounted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, table = tmp_path / "kubelet", tmp_path / "mountinfo"
    table.write_text(f"22 61 254:0 /var/lib/kubelet {ours} rw shared:5 - ext4 /dev/vda rw\n")
    real = Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda self, *a, **k: real(table if str(self) == "/proc/self/mountinfo" else self, *a, **k))
    unmounted: list[Path] = []
    monkeypatch.setattr(down.shell, "succeeds", lambda command: not unmounted.append(command[-1]))
    down._unmount([ours])
    assert unmounted == [ours]
