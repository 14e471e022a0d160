"""What is said about the model that answers: where it comes from and how good it is."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

METRICS = ("loss", "perplexity", "token_f1", "rouge_l", "decision_accuracy", "macro_f1")
"""Figures of report.json that are shown, base beside tuned."""


@dataclass(frozen=True)
class Facts:
    """Attribution of a served run; part of every answer of the API and shown on the page."""

    run: str
    """Run id; its last ten digits are the hash over everything that decides the result."""
    hash: str
    checkpoint_sha256: str
    """Digest of the exported weights."""
    base_model: str
    dataset: str
    evaluation: dict[str, dict[str, float]] = field(default_factory=dict)
    """`base` and `tuned`, each metric by name; empty if the run has no report."""
    report: str = ""
    """Path of the report on this server; empty if there is none."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def _read(path: Path, parse: Any) -> dict[str, Any]:
    """A mapping from a file; empty if it is missing or not one (attribution must not stop the serving)."""
    try:
        value = parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return value if isinstance(value, dict) else {}


def describe_model(model: dict[str, Any]) -> str:
    """`run.model` of a run.yaml in a few words."""
    name = model.get("name") or model.get("path") or "unknown"
    revision = str(model.get("revision") or "")[:10]
    return f"{name}@{revision}" if revision else str(name)


def describe_data(data: dict[str, Any]) -> str:
    """`run.data` of a run.yaml in a few words."""
    if data.get("sample"):
        return "shipped sample (PubMedQA format)"
    name = str(data.get("name") or data.get("path") or "unknown")
    subsets = ", ".join(map(str, data.get("subsets") or []))
    revision = str(data.get("revision") or "")[:10]
    return name + (f" ({subsets})" if subsets else "") + (f"@{revision}" if revision else "")


def gather(root: Path, digest: str) -> Facts:
    """Facts of a run directory whose model has this digest."""
    run = _read(root / "run.yaml", yaml.safe_load).get("run") or {}
    report = _read(root / "report.json", json.loads)
    figures = {side: {m: v for m in METRICS if isinstance(v := (report.get(side) or {}).get(m), int | float)}
               for side in ("base", "tuned") if isinstance(report.get(side), dict)}
    hashed = root.name.rpartition("-")[2]
    return Facts(run=root.name, hash=hashed if len(hashed) == 10 else "", checkpoint_sha256=digest,
                 base_model=describe_model(run.get("model") or {}), dataset=describe_data(run.get("data") or {}),
                 evaluation={k: v for k, v in figures.items() if v},
                 report="/report" if (root / "report.html").exists() else "")
