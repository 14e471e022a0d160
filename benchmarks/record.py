"""How every benchmark ends: one JSON object on standard output, appended to a file if one is named; nothing left running."""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import Any

BESIDE = "BENCHMARK_BESIDE"
"""Environment variable: how many other benchmarks run at the same time on this machine."""


def clean_up_when_terminated() -> None:
    """SIGTERM leaves by way of every `finally` and `with`, so that what was started is ended and what was made is removed."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))


def record(result: dict[str, Any], out: str) -> None:
    """Print a result; append it to `out` unless that is empty. It tells of runs beside it on the machine's other GPUs (gpu_session.py)."""
    if beside := int(os.environ.get(BESIDE, "0")):
        result = {**result, "beside": beside}
    text = json.dumps(result)
    print(text, flush=True)
    if out:
        with open(out, "a") as file:
            file.write(text + "\n")
