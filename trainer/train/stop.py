"""Being asked to end (SIGTERM, or the drain of a pod that is deleted) as a flag that the training loop asks for.

A pod's preStop hook cannot signal the training processes, which are Ray's children. It touches the file that LLM_FINETUNE_DRAIN_FILE names
and waits while a `<file>.busy.<pid>` of a living process is there.

In a Ray worker the main thread waits inside Ray's native code, where Python's signal handlers do not run for seconds. The wake-up
descriptor is written by the C handler itself, so a thread that reads it learns of the signal at once.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

log = logging.getLogger(__name__)

requested = threading.Event()
"""Set when the process was asked to end while the loop was running."""

_watching = threading.Event()
_installed = False


class Preempted(RuntimeError):  # noqa: N818
    """The run was asked to end, has saved its state, and can be started again."""


def install() -> None:
    """Take over SIGTERM; to be called in the main thread. Outside of `watching` the signal still ends the process, at once."""
    global _installed
    if _installed:
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=_wait, args=(reader,), name="sigterm", daemon=True).start()
    _installed = True


def _wait(reader: int) -> None:
    while True:
        if signal.SIGTERM in os.read(reader, 64):
            if not _watching.is_set():
                os._exit(128 + signal.SIGTERM)
            log.warning("SIGTERM: the state is saved after this step, then the process ends.")
            requested.set()


@contextlib.contextmanager
def watching(every_s: float = 0.5) -> Iterator[threading.Event]:
    """While the loop runs: SIGTERM and the drain file set the flag instead of ending the process."""
    requested.clear()
    _watching.set()
    with contextlib.ExitStack() as at_end:
        at_end.callback(_watching.clear)
        if drain := os.environ.get("LLM_FINETUNE_DRAIN_FILE"):
            busy = Path(f"{drain}.busy.{os.getpid()}")
            busy.touch()
            at_end.callback(busy.unlink, missing_ok=True)
            ended = threading.Event()
            watcher = threading.Thread(target=_watch_drain, args=(Path(drain), time.time(), ended, every_s), name="drain", daemon=True)
            watcher.start()
            at_end.callback(ended.set)
        yield requested


def _watch_drain(file: Path, since: float, ended: threading.Event, every_s: float) -> None:
    """Set the flag when the file is touched. One from before `since` is of a container that was started again in the same pod."""
    while not ended.wait(every_s):
        try:
            touched = file.stat().st_mtime
        except OSError:
            continue
        if touched >= since - 0.01:  # a file system's clock ticks more coarsely than time.time
            log.warning("This pod is to go: the state is saved after this step, then the process ends.")
            requested.set()
            return
