"""Files of feedback and audit: appended, rotated, bounded, and read again after a crash."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from chatbot.records.jsonl import JsonLines, read_lines


def files(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.jsonl"))


def test_files_are_rotated_and_the_oldest_removed(tmp_path: Path) -> None:
    """A file holds no more than its bound; of those beyond `keep` the oldest go, and what is kept is in order."""
    lines = JsonLines(tmp_path, "audit", rotate_bytes=100, keep=3)
    for i in range(40):
        lines.append({"n": i, "text": "x" * 20})
    assert len(files(tmp_path)) == 3 and all(path.stat().st_size <= 100 for path in files(tmp_path))
    kept = [line["n"] for line in read_lines(tmp_path, "audit")]
    assert kept == list(range(kept[0], 40)) and len(kept) >= 6


def test_feedback_is_never_removed(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path, "feedback", rotate_bytes=100)
    for i in range(40):
        lines.append({"n": i, "text": "x" * 20})
    assert [line["n"] for line in read_lines(tmp_path, "feedback")] == list(range(40)) and len(files(tmp_path)) > 10


def test_every_line_is_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line is on the disk when `append` returns, and only its owner and group may read it."""
    synced: list[int] = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (synced.append(descriptor), fsync(descriptor)))
    lines = JsonLines(tmp_path, "audit", rotate_bytes=10_000)
    for i in range(3):
        lines.append({"n": i})
    assert len(synced) == 3 and files(tmp_path)[0].stat().st_mode & 0o007 == 0


def test_two_processes_write_files_of_their_own(tmp_path: Path) -> None:
    first, second = (JsonLines(tmp_path, "audit", rotate_bytes=10_000) for _ in range(2))
    for i in range(3):
        first.append({"from": 1, "n": i})
        second.append({"from": 2, "n": i})
    assert len(files(tmp_path)) == 2 and len(read_lines(tmp_path, "audit")) == 6


def test_a_line_cut_by_a_crash_is_left_out(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path, "audit", rotate_bytes=10_000)
    lines.append({"n": 0})
    with files(tmp_path)[0].open("ab") as file:
        file.write(b'{"n": 1, "te')
    assert read_lines(tmp_path, "audit") == [{"n": 0}]


def test_a_full_storage_leaves_no_half_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was written in part is taken back, and the next line is whole."""
    lines = JsonLines(tmp_path, "audit", rotate_bytes=10_000)
    lines.append({"n": 0})
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:5]))
    with pytest.raises(OSError, match="is it full"):
        lines.append({"n": 1})
    monkeypatch.undo()
    lines.append({"n": 2})
    assert [line["n"] for line in read_lines(tmp_path, "audit")] == [0, 2]
    assert files(tmp_path)[0].read_bytes().count(b"\n") == 2
