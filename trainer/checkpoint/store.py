"""The checkpoints of a run on the storage: which are whole, which is the newest or the best, which are kept."""

from __future__ import annotations

import logging
import math
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from trainer.checkpoint.reader import STATE, rank_file
from trainer.config import CheckpointConfig
from trainer.files import MANIFEST, manifest_files, read_json, read_manifest, sha256, sync_directory

log = logging.getLogger(__name__)

STEP = re.compile(r"^step-(\d+)$")


@dataclass(frozen=True)
class Saved:
    """A checkpoint whose files all have the sizes of its manifest, and whose state (a small file) has its sha256."""

    step: int
    path: Path
    eval_loss: float | None
    """Held-out loss at that step, if it was evaluated there."""
    config_sha256: str


def directory_of(checkpoints: Path, step: int) -> Path:
    """Directory of a step's checkpoint."""
    return checkpoints / f"step-{step}"


def whole(checkpoints: Path, warn: bool = True) -> list[Saved]:
    """The whole checkpoints, by rising step. Broken ones are passed over, with a warning that names what is wrong."""
    found = []
    for path in checkpoints.glob("step-*"):
        match = STEP.match(path.name)
        if not match:
            continue
        try:
            manifest = read_manifest(path)
            if manifest is None:
                raise ValueError(_what_is_wrong(path))
            # No more names than the manifest can have: its number of ranks may be any.
            expected = [STATE, *map(rank_file, range(min(manifest["world"], len(manifest["files"]))))]
            if missing := [name for name in expected if name not in manifest["files"]]:
                raise ValueError(f"{MANIFEST} does not name {missing[0]}")
            if sha256(path / STATE) != manifest["files"][STATE]["sha256"]:
                raise ValueError(f"{STATE} does not have its sha256")
            state = read_json(path / STATE)
            loss = state["metrics"].get("eval_loss")
            if loss is not None and not (isinstance(loss, int | float) and math.isfinite(loss)):
                raise ValueError(f"{STATE} has the held-out loss {loss!r}")
            found.append(Saved(int(match[1]), path, loss, state["config_sha256"]))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            if warn:
                log.warning("Checkpoint %s is not whole and is passed over: %s", path.name, error)
    return sorted(found, key=lambda saved: saved.step)


def _what_is_wrong(path: Path) -> str:
    try:
        for name, entry in manifest_files(read_json(path / MANIFEST)).items():
            file = path / name
            if not file.exists():
                return f"{name} is missing"
            if file.stat().st_size != entry["size"]:
                return f"{name} has {file.stat().st_size} bytes instead of {entry['size']}"
    except (OSError, ValueError) as error:
        return f"{MANIFEST} is missing or not readable ({error})"
    return "it changed while it was read"


def newest(checkpoints: Path) -> Saved | None:
    """The newest whole checkpoint."""
    saved = whole(checkpoints)
    return saved[-1] if saved else None


def best(checkpoints: Path) -> Saved | None:
    """The whole checkpoint with the lowest held-out loss; the newest one if none was evaluated."""
    saved = whole(checkpoints)
    evaluated = [s for s in saved if s.eval_loss is not None]
    if evaluated:
        return min(evaluated, key=lambda s: s.eval_loss or 0.0)
    return saved[-1] if saved else None


def remove(path: Path) -> None:
    """Take a checkpoint's name away first, then its files: a half-deleted one is never found under its name."""
    doomed = path.with_name(f".{path.name}.deleted")
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(path, doomed)
    sync_directory(path.parent)
    shutil.rmtree(doomed, ignore_errors=True)


def retain(checkpoints: Path, config: CheckpointConfig) -> list[int]:
    """Remove what is neither among the newest `keep_last` nor among the best `keep_best`. Returns the removed steps."""
    saved = whole(checkpoints, warn=False)
    keep = {s.step for s in saved[-config.keep_last:]}
    evaluated = sorted((s for s in saved if s.eval_loss is not None), key=lambda s: (s.eval_loss, s.step))
    keep |= {s.step for s in evaluated[:config.keep_best]}
    removed = []
    for s in saved:
        if s.step not in keep:
            remove(s.path)
            removed.append(s.step)
    known = {s.step for s in saved}
    for path in checkpoints.glob("step-*"):  # broken ones that are older than all that a restart would try first
        match = STEP.match(path.name)
        if match and int(match[1]) not in known and saved and int(match[1]) < saved[-config.keep_last:][0].step:
            remove(path)
    return removed


def sweep(checkpoints: Path) -> None:
    """Remove temporary directories that an interrupted save or removal left. Only while no other process of the run writes."""
    if checkpoints.is_dir():
        for path in checkpoints.glob(".step-*"):
            shutil.rmtree(path, ignore_errors=True)
