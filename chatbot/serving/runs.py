"""Runs on the shared storage."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from chatbot.config import RUN_ID, ServeConfig
from chatbot.errors import NotReadyError, UserError
from chatbot.serving import manifest as manifests


@dataclass(frozen=True)
class Run:
    """A finished run: its model is whole."""

    root: Path
    manifest: dict[str, Any]
    digest: str

    @property
    def id(self) -> str:
        return self.root.name

    @property
    def model(self) -> Path:
        return self.root / "model"

    def present(self) -> bool:
        """The same model is still there, by name, size and manifest."""
        found = manifests.read(self.model)
        return found is not None and manifests.directory_digest(found) == self.digest


def open_run(root: Path) -> Run | None:
    """The run of a directory, or None if its model is missing or not whole."""
    found = manifests.read(root / "model")
    return None if found is None else Run(root, found, manifests.directory_digest(found))


def latest(storage: Path) -> Run | None:
    """The newest finished run: its report.json is there and its model is whole."""
    try:
        reports = [(p.stat().st_mtime_ns, p.parent.name, p.parent) for p in (storage / "runs").glob("*/report.json")]
    except OSError:
        return None
    for _, name, root in sorted(reports, reverse=True):
        if RUN_ID.fullmatch(name) and (run := open_run(root)):
            return run
    return None


def resolve(storage: Path, serve: ServeConfig) -> Run:
    """The run to serve. Raises NotReadyError if it is not there (yet), UserError if it is there and is not the one named."""
    if serve.follow == "latest":
        run = latest(storage)
        if run is None:
            raise NotReadyError(f"No finished run in {storage / 'runs'} yet.")
        return run
    run = open_run(storage / "runs" / serve.run)
    if run is None:
        raise NotReadyError(f"{storage / 'runs' / serve.run / 'model'} is missing or not whole.")
    if serve.sha256 and run.digest != serve.sha256:
        raise UserError(f"serve.sha256: the model of {serve.run} has digest {run.digest}, not {serve.sha256}. "
                        "Promote the run again, or restore its model directory.")
    return run


@dataclass(frozen=True)
class BaseModel:
    """Where the base model lies."""

    directory: Path
    gguf_file: str


def base_of(run: Run, storage: Path, serve: ServeConfig) -> BaseModel:
    """The base model's directory: serve.base_path, or run.model.path of the run's run.yaml. Raises UserError."""
    if serve.base_path:
        found = BaseModel(storage / serve.base_path, serve.base_gguf_file)
    else:
        try:
            model = (yaml.safe_load((run.root / "run.yaml").read_text(encoding="utf-8")) or {})["run"]["model"]
        except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
            raise UserError(f"serve.base: {run.root / 'run.yaml'} does not say what the base model is. Set serve.base_path.") from error
        if not model.get("path"):
            raise UserError(f"serve.base: the base model {model.get('name')} is not on the shared storage. Put it under models/ and set "
                            "serve.base_path, or set serve.base: false.")
        found = BaseModel(storage / model["path"], model.get("gguf_file") or "")
    if not found.directory.is_dir():
        raise UserError(f"serve.base: {found.directory} is not there. Put the base model there, or set serve.base: false.")
    return found
