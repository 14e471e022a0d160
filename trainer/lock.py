"""One process at a time works on a run: a lock file with a lease on the shared storage.

The holder renews the file every few seconds. Whoever finds it watches it for a lease's length by his own clock (nodes' clocks differ):
if it is renewed meanwhile, the run is held and the holder is named; if not, the holder is gone and the lock is taken over.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import socket
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainer.errors import UserError
from trainer.files import sync_directory, write_json

log = logging.getLogger(__name__)


class Held(UserError):  # noqa: N818
    """Another process works on the run."""

    def __init__(self, run: str, holder: str) -> None:
        super().__init__(f"Run {run} is being worked on by {holder}. Wait until it has ended, or stop it; a holder that is gone is "
                         "replaced by itself.")
        self.holder = holder


class Lock:
    """The lock of one run directory; a context manager. Raises Held on entry."""

    def __init__(self, path: Path, holder: str = "", lease_s: float = 15.0, lost: Callable[[], None] | None = None) -> None:
        """`holder`: how this process is named to others (default: host and process). `lost`: called in the renewing thread if
        another process has taken the lock over because this one stood still for longer than the lease."""
        self._path, self._lease, self._lost = path, lease_s, lost
        self._token = secrets.token_hex(8)
        self._me = {"holder": holder or default_holder(), "host": socket.gethostname(), "boot": _boot(), "pid": os.getpid(),
                    "started": _started(os.getpid()), "token": self._token}
        self._count = 0
        self._renewed = 0.0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Lock:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        while not self._create():
            held = self._read()
            if held is None:
                continue  # released or replaced between the two looks
            if not _dead(held) and (alive := self._renewed_meanwhile(held)):
                raise Held(self._path.parent.name, str(alive.get("holder", "an unknown process")))
            if self._take_over(held):
                break
        self._renewed = time.monotonic()
        self._thread = threading.Thread(target=self._renew, name="lock", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=self._lease)
        held = self._read()
        if held is not None and held.get("token") == self._token:
            self._path.unlink(missing_ok=True)

    def _document(self) -> dict[str, Any]:
        self._count += 1
        return {**self._me, "count": self._count, "lease_s": self._lease, "time": time.time()}

    def _create(self) -> bool:
        """Link a finished file to the lock's name: atomic, also on NFS, and never seen half-written."""
        descriptor, temporary = tempfile.mkstemp(dir=self._path.parent, prefix=".lock.")
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                json.dump(self._document(), file)
                file.flush()
                os.fsync(file.fileno())
            os.link(temporary, self._path)
            sync_directory(self._path.parent)
            return True
        except FileExistsError:
            return False
        finally:
            os.unlink(temporary)

    def _read(self) -> dict[str, Any] | None:
        """The lock's content; {} if it cannot be understood, None if there is no lock."""
        try:
            value = json.loads(self._path.read_text(encoding="utf-8"))
            return value if isinstance(value, dict) else {}
        except FileNotFoundError:
            return None
        except (OSError, ValueError):
            return {}

    def _renewed_meanwhile(self, held: dict[str, Any]) -> dict[str, Any] | None:
        """The lock's newer content if it changes within the lease; None if it does not, or is released."""
        lease = held.get("lease_s")
        lease = float(lease) if isinstance(lease, int | float) and 0 < lease < 3600 else self._lease
        log.warning("The run is locked by %s; watching for %.0f s whether it still works.", held.get("holder", "an unknown process"), lease)
        until = time.monotonic() + lease
        while time.monotonic() < until:
            time.sleep(min(0.5, lease / 10))
            now = self._read()
            if now is None:
                return None
            if now and (now.get("token"), now.get("count")) != (held.get("token"), held.get("count")):
                return now
        return None

    def _take_over(self, held: dict[str, Any]) -> bool:
        """Replace a stale lock. Of several that try, the one that creates the marker of the stale lock's token does."""
        if self._read() is None:
            return False
        marker = self._path.with_name(f".lock.after-{held.get('token') or 'unreadable'}")
        try:
            os.close(os.open(marker, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
        except FileExistsError:
            time.sleep(self._lease / 5)
            try:  # whoever made the marker may have died before it used it
                if time.time() - marker.stat().st_mtime > 4 * self._lease:
                    marker.unlink(missing_ok=True)
            except FileNotFoundError:
                pass
            return False
        try:
            now = self._read()
            if now is not None and now.get("token") != held.get("token"):
                return False
            log.warning("Taking over the lock of %s, which no longer renews it.", held.get("holder", "an unknown process"))
            write_json(self._path, self._document())
            return True
        finally:
            marker.unlink(missing_ok=True)

    def _renew(self) -> None:
        while not self._stop.wait(self._lease / 4):
            try:
                late = time.monotonic() - self._renewed > self._lease
                held = self._read()
                if held is None or held.get("token") != self._token:
                    if held is None or held:  # {}: a storage error, looked at again next time
                        log.error("The run's lock was taken over by %s.", (held or {}).get("holder", "an unknown process"))
                        if self._lost is not None:
                            self._lost()
                        return
                    continue
                if late:
                    log.warning("The lock was not renewed for %.0f s; the storage or this process stood still.",
                                time.monotonic() - self._renewed)
                write_json(self._path, self._document())
                self._renewed = time.monotonic()
            except OSError as error:
                log.warning("The lock could not be renewed: %s", error)


def default_holder() -> str:
    """`host, process N`, with the RayJob's name if there is one."""
    job = os.environ.get("RAYJOB_NAME")
    return f"{f'RayJob {job} on ' if job else ''}{socket.gethostname()}, process {os.getpid()}"


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _started(pid: int) -> str:
    """The process's start time, which tells it from a later one with the same number; empty if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def _dead(held: dict[str, Any]) -> bool:
    """Whether the holder was a process of this host that is no more (then there is nothing to wait for)."""
    same = held.get("host") == socket.gethostname() and held.get("boot") and held.get("boot") == _boot()
    return bool(same) and isinstance(held.get("pid"), int) and _started(held["pid"]) != held.get("started")
