"""SIGTERM (preemption, drain, a pod that is deleted) as a flag that the training loop asks for.

In a Ray worker the main thread waits inside Ray's native code, where Python's signal handlers do not run for seconds. The wake-up
descriptor is written by the C handler itself, so a thread that reads it learns of the signal at once.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Iterator

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
def watching() -> Iterator[threading.Event]:
    """While the loop runs: SIGTERM sets the flag instead of ending the process."""
    requested.clear()
    _watching.set()
    try:
        yield requested
    finally:
        _watching.clear()
