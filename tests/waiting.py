"""Waiting for what a cluster or a machine does by itself."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any


def wait_for(question: Callable[[], Any], seconds: float, what: str, every: float = 0.5) -> Any:
    """Poll a question until its answer is true; returns the answer."""
    deadline = time.monotonic() + seconds
    while not (answer := question()):
        assert time.monotonic() < deadline, f"{what}: not within {seconds:.0f} s"
        time.sleep(every)
    return answer
