"""The programs that run on the node itself: started apart from the caller's session, found again by their pid files."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tools.errors import OperatorError
from tools.layout import Layout


def _start_time(pid: int) -> str | None:
    """A process's start in clock ticks since boot: with the pid it names one process for good. None if there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


@dataclass(frozen=True)
class Daemon:
    """One long-running program."""

    name: str
    command: Sequence[str | Path]
    ready: Callable[[], bool]
    """Whether it does its work."""
    env: Mapping[str, str] = field(default_factory=dict)
    timeout: float = 60.0
    """Seconds within which it must be ready."""

    def pid_file(self, layout: Layout) -> Path:
        return layout.runtime / "pids" / self.name

    def pid(self, layout: Layout) -> int | None:
        """Of the running program; None if it does not run."""
        return running_pid(self.pid_file(layout))

    def start(self, layout: Layout) -> bool:
        """Start it if it does not run, and wait until it is ready. Returns False if it ran."""
        if self.pid(layout) is not None and self.ready():
            return False
        log = layout.logs / f"{self.name}.log"
        pid = self.pid(layout)
        if pid is None:
            log.parent.mkdir(parents=True, exist_ok=True)
            with open(log, "a") as file:
                process = subprocess.Popen([str(c) for c in self.command], stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
                                           env={**os.environ, **layout.environment(), **self.env}, cwd="/", start_new_session=True)
            pid = process.pid
            path = self.pid_file(layout)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{pid} {_start_time(pid)}")
        deadline = time.monotonic() + self.timeout
        while not self.ready():
            if running_pid(self.pid_file(layout)) is None:
                raise OperatorError(f"{self.name} ended right after its start. Its log: {log}\n{log.read_text(errors='replace')[-2000:]}")
            if time.monotonic() > deadline:
                raise OperatorError(f"{self.name} was not ready within {self.timeout:.0f} s. Its log: {log}")
            time.sleep(0.2)
        return True


def running_pid(pid_file: Path) -> int | None:
    """The process that a pid file names, if it still runs."""
    try:
        pid, start = pid_file.read_text().split()
    except (OSError, ValueError):
        return None
    return int(pid) if _start_time(int(pid)) == start else None


def stop(pid_file: Path, timeout: float = 10.0) -> None:
    """Stop the process that a pid file names: SIGTERM, then SIGKILL."""
    pid = running_pid(pid_file)
    if pid is not None:
        os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + timeout
        while running_pid(pid_file) is not None and time.monotonic() < deadline:
            time.sleep(0.1)
        if running_pid(pid_file) is not None:
            os.kill(pid, signal.SIGKILL)
        try:
            os.waitpid(pid, os.WNOHANG)  # our own child, if it was started by this very process
        except ChildProcessError:
            pass
    pid_file.unlink(missing_ok=True)
