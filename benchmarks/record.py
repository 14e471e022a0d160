"""How every benchmark says its result: one JSON object on standard output, appended to a file if one is named."""

from __future__ import annotations

import json
import os
from typing import Any

BESIDE = "BENCHMARK_BESIDE"
"""Environment variable: how many other benchmarks run at the same time on this machine."""


def record(result: dict[str, Any], out: str) -> None:
    """Print a result; append it to `out` unless that is empty. It tells of runs beside it on the machine's other GPUs (gpu_session.py)."""
    if beside := int(os.environ.get(BESIDE, "0")):
        result = {**result, "beside": beside}
    text = json.dumps(result)
    print(text, flush=True)
    if out:
        with open(out, "a") as file:
            file.write(text + "\n")
