"""The manifest of an exported model: what lies in the directory, and whether it is whole.

The rule is the trainer's (trainer/files.py); the images are separate, so it is written here again and a test holds the two together.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from chatbot.errors import UserError

MANIFEST = "manifest.json"


CARD = "README.md"
"""The model card: it is written again when the evaluation's figures are there, so it is neither in the digest nor checked."""


def served_files(manifest: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What of a manifest decides the answers."""
    return {name: entry for name, entry in manifest["files"].items() if name != CARD}


def directory_digest(manifest: dict[str, Any]) -> str:
    """sha256 over the canonical JSON (sorted keys, no spaces) of a manifest's files but the card: names what is served."""
    return hashlib.sha256(json.dumps(served_files(manifest), sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _files(manifest: Any) -> dict[str, dict[str, Any]]:
    """`served_files`, each a name below the directory with its size and sha256. Raises ValueError."""
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise ValueError("it names no files")
    for name, entry in manifest["files"].items():
        place = PurePosixPath(name)
        if not place.parts or place.is_absolute() or ".." in place.parts or "\0" in name:
            raise ValueError(f"{name!r} is no file below the directory")
        if not (isinstance(entry, dict) and type(entry.get("size")) is int and isinstance(entry.get("sha256"), str)):
            raise ValueError(f"size and sha256 of {name!r} are missing")
    return served_files(manifest)


def read(directory: Path) -> dict[str, Any] | None:
    """The manifest if it is present and every file has its size, else None. Cheap: no file is read."""
    try:
        manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        for name, entry in _files(manifest).items():
            path = directory / name
            if not path.is_file() or path.stat().st_size != entry["size"]:
                return None
        return manifest
    except (OSError, ValueError, RecursionError):
        return None


@dataclass(frozen=True)
class Progress:
    """How far the reading of a model is."""

    done: int
    total: int


def verify(directory: Path, manifest: dict[str, Any], progress: Callable[[Progress], None] = lambda _: None) -> None:
    """Read every file and compare its sha256. Raises UserError naming the file. `progress` gets bytes."""
    total = sum(entry["size"] for entry in served_files(manifest).values())
    done = 0
    for name, entry in served_files(manifest).items():
        digest = hashlib.sha256()
        try:
            with open(directory / name, "rb") as file:
                while chunk := file.read(1 << 22):
                    digest.update(chunk)
                    done += len(chunk)
                    progress(Progress(done, total))
        except OSError as error:
            raise UserError(f"{directory / name} cannot be read: {error}.") from error
        if digest.hexdigest() != entry["sha256"]:
            raise UserError(f"{directory / name} is not what was exported (its sha256 differs from the manifest's). "
                            "Restore it, or remove the model directory and run the export again.")
