"""How every benchmark says its result: one JSON object on standard output, appended to a file if one is named."""

from __future__ import annotations

import json
from typing import Any


def record(result: dict[str, Any], out: str) -> None:
    """Print a result; append it to `out` unless that is empty."""
    text = json.dumps(result)
    print(text, flush=True)
    if out:
        with open(out, "a") as file:
            file.write(text + "\n")
