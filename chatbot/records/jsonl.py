"""Lines of JSON that are kept: appended, synced, rotated by size."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any


class JsonLines:
    """Appends to `<directory>/<name>-<host>-<time>-<n>.jsonl`. Several replicas on shared storage each write files of their own.

    A line is on the disk when `append` returns. Thread-safe.
    """

    def __init__(self, directory: Path, name: str, rotate_bytes: int, keep: int = 0) -> None:
        self.directory, self.name, self.rotate_bytes, self.keep = directory, name, rotate_bytes, keep
        self._lock = threading.Lock()
        self._descriptor = -1
        self._size = 0
        self._count = 0
        self._started = time.strftime("%Y%m%dT%H%M%S", time.gmtime())

    def append(self, value: dict[str, Any]) -> None:
        """Write one line. Raises OSError if the storage does not take it."""
        line = (json.dumps(value, ensure_ascii=False, separators=(",", ":")) + "\n").encode()
        with self._lock:
            if self._descriptor < 0 or self._size + len(line) > self.rotate_bytes:
                self._open()
            # One write: a reader never sees the beginning of a line without its end being on the way.
            written = os.write(self._descriptor, line)
            if written < len(line):
                os.ftruncate(self._descriptor, self._size)
                raise OSError(f"{self.directory} took {written} of {len(line)} bytes: is it full?")
            os.fsync(self._descriptor)
            self._size += len(line)

    def _open(self) -> None:
        self.close()
        self.directory.mkdir(parents=True, exist_ok=True)
        while True:
            path = self.directory / f"{self.name}-{socket.gethostname()}-{self._started}-{self._count:04d}.jsonl"
            self._count += 1
            try:
                self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL, 0o640)
                break
            except FileExistsError:
                continue
        self._size = 0
        if self.keep:
            mine = sorted(self.directory.glob(f"{self.name}-{socket.gethostname()}-*.jsonl"))
            for old in mine[:-self.keep]:
                old.unlink(missing_ok=True)

    def close(self) -> None:
        """Close the file; the next line begins a new one."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def read_lines(directory: Path, name: str) -> list[dict[str, Any]]:
    """All whole lines of all files of a name, in order; a line cut by a crash is left out."""
    values = []
    for path in sorted(directory.glob(f"{name}-*.jsonl")):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                values.append(json.loads(line))
            except ValueError:
                continue
    return values
