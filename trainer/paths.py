"""Names of everything in a run directory (shared storage)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from trainer.config import Config


@dataclass(frozen=True)
class RunPaths:
    """The run directory `<storage>/runs/<run>-<hash>` and what lies in it."""

    root: Path

    @classmethod
    def of(cls, config: Config) -> RunPaths:
        return cls(config.storage_path / "runs" / config.run_id)

    @property
    def config(self) -> Path:
        """The resolved configuration, exactly as used."""
        return self.root / "run.yaml"

    @property
    def inputs(self) -> Path:
        """Digests of the base model's files when the run began (trainer/inputs.py)."""
        return self.root / "inputs.json"

    @property
    def dataset(self) -> Path:
        """Shards, held-out rows and their manifest.json."""
        return self.root / "dataset"

    @property
    def checkpoints(self) -> Path:
        """step-N directories, each with a manifest.json."""
        return self.root / "checkpoints"

    @property
    def model(self) -> Path:
        """The exported model, with a manifest.json."""
        return self.root / "model"

    @property
    def metrics(self) -> Path:
        """One JSON object a step."""
        return self.root / "metrics.jsonl"

    @property
    def progress(self) -> Path:
        """Stage, percent, tokens/s, ETA."""
        return self.root / "progress.json"

    @property
    def network(self) -> Path:
        return self.root / "network.csv"

    @property
    def gpu(self) -> Path:
        return self.root / "gpu.csv"

    @property
    def samples(self) -> Path:
        """What each node's sampler wrote; network.csv and gpu.csv are made of it."""
        return self.root / "samples"

    @property
    def lock(self) -> Path:
        """Who works on this run now (trainer/lock.py)."""
        return self.root / "lock.json"

    @property
    def ray(self) -> Path:
        """What Ray Train stores of its own."""
        return self.root / "ray"

    @property
    def evaluation(self) -> Path:
        """Base and tuned side by side."""
        return self.root / "evaluation.json"

    @property
    def tensorboard(self) -> Path:
        return self.root / "tensorboard"

    def report(self, kind: str) -> Path:
        """report.json, report.md or report.html."""
        return self.root / f"report.{kind}"
