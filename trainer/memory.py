"""Memory of the process and of the container that it runs in."""

from __future__ import annotations

import ctypes
import gc
import socket
from dataclasses import dataclass
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Container:
    """What the kernel says of the container that a process runs in (cgroup 1 or 2)."""

    name: str
    """Host name; in Kubernetes the pod's."""
    limit: int
    """Bytes that it may hold; 0: no limit is known."""
    killed: int
    """Processes that the kernel has ended in it because that limit was reached."""


def container(root: Path = CGROUP) -> Container:
    """The container of this process. What cannot be read counts as none."""
    limit = _number(root / "memory.max") or _number(root / "memory/memory.limit_in_bytes")
    killed = max(_field(root / "memory.events", "oom_kill"), _field(root / "memory/memory.oom_control", "oom_kill"))
    return Container(socket.gethostname(), limit if limit < 1 << 60 else 0, killed)  # cgroup 1 writes 2^63 for "none"


def _number(path: Path) -> int:
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):  # also "max"
        return 0


def _field(path: Path, name: str) -> int:
    try:
        return int(dict(line.split() for line in path.read_text(encoding="ascii").splitlines()).get(name, 0))
    except (OSError, ValueError):
        return 0


def release() -> None:
    """Return what is no longer used: Python's cycles, torch's cache on the GPU, and what glibc would keep.

    glibc keeps freed memory (0.6 GiB after loading a model of 0.5), and a pod's memory limit counts it.
    """
    import torch

    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):  # glibc alone has it
        library.malloc_trim(0)
