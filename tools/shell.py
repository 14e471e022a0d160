"""Running other programs: their output goes to a log file, a failure shows its end."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path

from tools.errors import OperatorError


def _tail(path: Path, lines: int = 25) -> str:
    with open(path, encoding="utf-8", errors="replace") as file:
        return "".join(deque(file, lines)).rstrip()


def run(command: Sequence[str | Path], log: Path, *, env: Mapping[str, str] | None = None, cwd: Path | None = None,
        stdin: str | None = None) -> None:
    """Run a program, its output appended to `log`. Raises OperatorError with the log's end if it fails."""
    log.parent.mkdir(parents=True, exist_ok=True)
    text = shlex.join(map(str, command))
    with open(log, "a", encoding="utf-8") as file:
        file.write(f"$ {text}\n")
        file.flush()
        done = subprocess.run([str(c) for c in command], stdout=file, stderr=subprocess.STDOUT, cwd=cwd,
                              env={**os.environ, **(env or {})}, input=stdin, stdin=None if stdin is not None else subprocess.DEVNULL,
                              text=True, check=False)
    if done.returncode != 0:
        raise OperatorError(f"{text[:300]}\nended with code {done.returncode}. The end of its log ({log}):\n{_tail(log)}")


def output(command: Sequence[str | Path], *, env: Mapping[str, str] | None = None, cwd: Path | None = None,
           stdin: str | None = None, timeout: float | None = 120) -> str:
    """Run a program and return its standard output. Raises OperatorError with its standard error if it fails."""
    done = subprocess.run([str(c) for c in command], capture_output=True, cwd=cwd, env={**os.environ, **(env or {})}, input=stdin,
                          stdin=None if stdin is not None else subprocess.DEVNULL, text=True, timeout=timeout, check=False)
    if done.returncode != 0:
        text = shlex.join(map(str, command))
        raise OperatorError(f"{text[:300]}\nended with code {done.returncode}: {(done.stderr or done.stdout).strip()[-2000:]}")
    return done.stdout


def succeeds(command: Sequence[str | Path], *, env: Mapping[str, str] | None = None) -> bool:
    """Whether a program exits with 0; its output is not kept."""
    return subprocess.run([str(c) for c in command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                          stdin=subprocess.DEVNULL, env={**os.environ, **(env or {})}, check=False).returncode == 0
