"""Files that are whole or absent: temporary name, fsync, rename; directories with a manifest of sizes and sha256."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

from trainer.errors import UserError

MANIFEST = "manifest.json"
HASHED_AT_ONCE = 4
"""Files."""
MAX_HEADER = 100_000_000
"""Bytes; the bound that safetensors itself sets against hostile headers."""


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a file so that a reader sees the old content or the new one, also after a crash."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def write_json(path: Path, value: Any) -> None:
    """`write_atomic` of a JSON document; NaN is refused."""
    write_atomic(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def sha256(path: Path, block: int = 1 << 22) -> str:
    """Hex digest of a file's content."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(block):
            digest.update(chunk)
    return digest.hexdigest()


def describe(directory: Path) -> dict[str, dict[str, Any]]:
    """Size and sha256 of every file below a directory but its manifest, by relative name; each file is synced."""
    def one(path: Path) -> dict[str, Any]:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        return {"size": path.stat().st_size, "sha256": sha256(path)}

    paths = sorted(p for p in directory.rglob("*") if p.is_file() and p.name != MANIFEST)
    with ThreadPoolExecutor(HASHED_AT_ONCE) as pool:
        return {path.relative_to(directory).as_posix(): entry for path, entry in zip(paths, pool.map(one, paths), strict=True)}


def write_directory(path: Path, fill: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """Make a directory whole or not at all: `fill(temporary)` writes its files and returns the manifest's own fields.

    The manifest gets `files` (size and sha256 each). An existing directory of that name is replaced. Returns the manifest.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        manifest = {**fill(temporary), "files": describe(temporary)}
        write_json(temporary / MANIFEST, manifest)
        os.chmod(temporary, 0o755)
        if path.exists():
            shutil.rmtree(path)
        os.rename(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_directory(path.parent)
    return manifest


def read_json(path: Path) -> Any:
    """A JSON file's value. Raises OSError or ValueError, whatever the file holds."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def manifest_files(manifest: Any) -> dict[str, dict[str, Any]]:
    """The `files` of a manifest. Raises ValueError unless each is a name below the directory with its size and sha256."""
    files = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(files, dict):
        raise ValueError("it names no files")
    for name, entry in files.items():
        place = PurePosixPath(name)
        if not place.parts or place.is_absolute() or ".." in place.parts or "\0" in name:
            raise ValueError(f"it names {name!r}, which is no file below its directory")
        if not (isinstance(entry, dict) and type(entry.get("size")) is int and isinstance(entry.get("sha256"), str)):
            raise ValueError(f"it lacks size and sha256 of {name!r}")
    return files


def read_manifest(directory: Path, hashes: bool = False) -> dict[str, Any] | None:
    """The manifest of a directory if it is present and every file has its size (and, with `hashes`, its sha256); else None."""
    try:
        manifest = read_json(directory / MANIFEST)
        for name, entry in manifest_files(manifest).items():
            path = directory / name
            if not path.is_file() or path.stat().st_size != entry["size"] or (hashes and sha256(path) != entry["sha256"]):
                return None
        return manifest
    except (OSError, ValueError):
        return None


def require_manifest(directory: Path, made_by: str) -> dict[str, Any]:
    """`read_manifest`, or an error that says which stage makes the directory."""
    manifest = read_manifest(directory)
    if manifest is None:
        raise UserError(f"{directory} is missing or not whole. Run `python -m trainer {made_by}` first.")
    return manifest


def directory_digest(manifest: dict[str, Any]) -> str:
    """Hex sha256 that names the content of an exported model: over the canonical JSON of its manifest's `files`.

    README.md (the model card) is left out: it gains the evaluation's figures later and changes nothing that is served.
    """
    files = {name: entry for name, entry in manifest["files"].items() if name != "README.md"}
    return hashlib.sha256(json.dumps(files, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
