"""Write the golden loss curves anew: `python -m tests.trainer.golden.regenerate` from the repository's root.

They are one process's curves in float32 without sharding. Regenerate only when a change is meant to change the numbers, and say so in
the commit.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from tests.trainer.ranks import Ranks

CURVES = Path(__file__).with_name("curves.json")
CASES = {"full": {}, "full-tied": {"tied": True}, "lora": {"method": "lora"}, "lora-new-tokens": {"method": "lora", "tokens": 53}}
"""Keywords of tests.trainer.engine_cases.curve."""


def main() -> None:
    from tests.trainer.engine_cases import write_rows

    with tempfile.TemporaryDirectory() as directory, Ranks() as ranks:
        write_rows(Path(directory))
        calls = {name: ("curve", {"data": directory, **config}) for name, config in CASES.items()}
        curves = ranks.run(1, "tests.trainer.engine_cases:many", {"calls": calls})[0]
    CURVES.write_text("{\n" + ",\n".join(f' "{k}": {json.dumps(v)}' for k, v in curves.items()) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
