"""Shared storage as a run uses it: large files, fsync, rename over a name that others read, hard links and flock between two pods.

Everything lies in one directory of the storage, which the caller removes. Two-sided measurements meet there: one pod calls `holds` or
`renames`, another `tries` or `watches` on the same directory at the same time.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

from trainer.files import sync_directory, write_atomic
from trainer.lock import Held, Lock

_BLOCK = 4 << 20
PATIENCE = 30.0
"""Seconds that one side waits for the other."""
LEASE = 2.0


def _pattern(name: str) -> bytes:
    """4 MiB that do not compress and differ by name."""
    seed = hashlib.sha256(name.encode()).digest()
    return hashlib.shake_256(seed).digest(_BLOCK)


def space(directory: Path) -> dict[str, int]:
    """Bytes and file names that the storage has left for this user."""
    found = os.statvfs(directory)
    return {"free_bytes": found.f_bavail * found.f_frsize, "total_bytes": found.f_blocks * found.f_frsize, "free_files": found.f_favail}


def write(directory: Path, name: str, megabytes: int) -> dict[str, float]:
    """Write a large file from its start to its end and sync it: MB/s, the sync counted."""
    directory.mkdir(parents=True, exist_ok=True)
    block, blocks = _pattern(name), max(1, round(megabytes * 1e6 / _BLOCK))
    begin = time.perf_counter()
    with open(directory / name, "wb", buffering=0) as file:
        for _ in range(blocks):
            file.write(block)
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return {"write_mb_s": blocks * _BLOCK / 1e6 / (time.perf_counter() - begin)}


def read(directory: Path, name: str) -> dict[str, Any]:
    """Read a file that (another) `write` has made: MB/s, and whether it is what was written."""
    block, whole, size = _pattern(name), True, 0
    buffer = bytearray(_BLOCK)
    path = directory / name
    with open(path, "rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # this machine's cache is not the storage
        begin = time.perf_counter()
        while got := file.readinto(buffer):
            size += got
            if got == _BLOCK:
                whole &= buffer == block
            else:
                whole = False
        took = time.perf_counter() - begin
    return {"read_mb_s": size / 1e6 / took, "read_whole": whole and size > 0}


def fsyncs(directory: Path, count: int = 200) -> dict[str, float]:
    """Append a line and sync, again and again: milliseconds, median and 99th percentile."""
    directory.mkdir(parents=True, exist_ok=True)
    times = []
    with open(directory / f"fsync-{os.getpid()}", "wb", buffering=0) as file:
        for _ in range(count):
            begin = time.perf_counter()
            file.write(b"x" * 200)
            os.fsync(file.fileno())
            times.append(time.perf_counter() - begin)
    times.sort()
    return {"fsync_ms": times[len(times) // 2] * 1e3, "fsync_p99_ms": times[int(len(times) * 0.99)] * 1e3}


def _wait(path: Path) -> float:
    """Seconds until a name of the other side is seen here. Raises TimeoutError."""
    begin = time.monotonic()
    while not path.exists():
        if time.monotonic() - begin > PATIENCE:
            raise TimeoutError(f"{path.name} of the other pod was not seen within {PATIENCE:.0f} s")
        try:
            os.listdir(path.parent)  # lets an NFS client look again
        except OSError:
            pass
        time.sleep(0.02)
    return time.monotonic() - begin


# --- rename


def renames(directory: Path, seconds: float = 2.0) -> dict[str, Any]:
    """Replace one file again and again, as checkpoints, reports and locks are written, while another pod `watches` it."""
    directory.mkdir(parents=True, exist_ok=True)
    count, path = 0, directory / "renamed"

    def content(number: int) -> bytes:
        body = str(number).encode() * 997
        return hashlib.sha256(body).hexdigest().encode() + body

    write_atomic(path, content(0))
    (directory / "renames").touch()
    _wait(directory / "watches")
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        count += 1
        write_atomic(path, content(count))
    write_atomic(directory / "renames-ended", b"")
    return {"renames": count, "renames_s": count / seconds}


def watches(directory: Path) -> dict[str, int]:
    """Read the file that another pod `renames`: how often it was seen whole, torn, missing, or with a stale NFS handle."""
    _wait(directory / "renames")
    (directory / "watches").touch()
    found, path = {"whole": 0, "torn": 0, "missing": 0, "stale": 0}, directory / "renamed"
    until = time.monotonic() + PATIENCE
    while not (directory / "renames-ended").exists() and time.monotonic() < until:
        try:
            text = path.read_bytes()
            found["whole" if hashlib.sha256(text[64:]).hexdigest().encode() == text[:64] else "torn"] += 1
        except FileNotFoundError:
            found["missing"] += 1
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise
            found["stale"] += 1  # the file was replaced while it was read: opened again, it is whole
    return found


# --- locks


def _flock(path: Path) -> bool:
    """Whether a flock on a file is free for this process; it is given back at once."""
    with open(path, "a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def holds(directory: Path) -> dict[str, Any]:
    """Hold a run's lock and a flock until the other pod has `tried` them."""
    directory.mkdir(parents=True, exist_ok=True)
    with Lock(directory / "lock", lease_s=LEASE), open(directory / "flock", "a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        write_atomic(directory / "held", b"")
        _wait(directory / "tried")
    write_atomic(directory / "released", b"")
    return {"held": True}


def tries(directory: Path) -> dict[str, Any]:
    """Try the locks that another pod `holds` (both must be refused), and again when it has released them (both must be given)."""
    seen = _wait(directory / "held")
    try:
        with Lock(directory / "lock", lease_s=LEASE):
            lock = False
    except Held:
        lock = True
    flock = not _flock(directory / "flock")
    write_atomic(directory / "tried", b"")
    _wait(directory / "released")
    with Lock(directory / "lock", lease_s=LEASE):
        again = _flock(directory / "flock")
    return {"lock_refused": lock, "flock_refused": flock, "released": again, "seen_after_s": seen}


def races(directory: Path, side: str, rounds: int = 40) -> dict[str, Any]:
    """Two pods (`side` a and b) link to the same names: which rounds this one won. Every round must have one winner."""
    directory.mkdir(parents=True, exist_ok=True)
    own, other = directory / f"race-{side}", "b" if side == "a" else "a"
    write_atomic(own, side.encode())
    _wait(directory / f"race-{other}")
    won = []
    for number in range(rounds):
        try:
            os.link(own, directory / f"round-{number}")
            won.append(number)
        except FileExistsError:
            pass
    sync_directory(directory)
    return {"won": won, "rounds": rounds}


def remove(directory: Path) -> dict[str, Any]:
    """Take the check's directory away. Measurements that this pod still makes in it (of a check that was interrupted) are ended first:
    they would make it again."""
    for process in _measuring(directory):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    until = time.monotonic() + 10
    while _measuring(directory) and time.monotonic() < until:
        time.sleep(0.05)
    shutil.rmtree(directory)
    return {"removed": str(directory)}


def _measuring(directory: Path) -> list[int]:
    """Other processes of the check that were told this directory, those that have ended but are not waited for left out."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (entry / "cmdline").read_bytes().split(b"\0")  # empty for a process that has ended
            if b"trainer.sitecheck" in words and os.fsencode(directory) in words and int(entry.name) != os.getpid():
                found.append(int(entry.name))
    return found
