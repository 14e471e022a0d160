"""report.json: everything that is known about a run, as one document."""

from __future__ import annotations

import json
import statistics
from typing import Any

import yaml

from trainer.config import Config, to_dict
from trainer.evaluate.gate import judge, load_gate
from trainer.files import directory_digest, read_manifest
from trainer.paths import RunPaths
from trainer.report.card import describe_data, describe_model
from trainer.report.metrics import METRICS, finite, number, phase_seconds, records, samples, training_summary
from trainer.report.prediction import comparison
from trainer.report.workers import worker_table

FORMAT = 1
"""Version of report.json."""


def network_table(paths: RunPaths) -> list[dict[str, Any]]:
    """Mean and maximum of received and sent bytes per second by node, over the whole run."""
    table = []
    for node, times in samples(paths.network, ("rx_bytes_per_s", "tx_bytes_per_s")).items():
        received, sent = ([v[i] for v in times.values()] for i in (0, 1))
        table.append({"node": node, "samples": len(times), "rx_mean": statistics.fmean(received), "rx_max": max(received),
                      "tx_mean": statistics.fmean(sent), "tx_max": max(sent)})
    return table


def gpu_table(paths: RunPaths) -> list[dict[str, Any]]:
    """Mean utilisation (%), largest memory (bytes) and mean power (W) of a GPU, by node."""
    table = []
    for node, times in samples(paths.gpu, ("utilisation", "memory_bytes", "power_w"), average=True).items():
        columns = list(zip(*times.values(), strict=True))
        table.append({"node": node, "samples": len(times), "utilisation_mean": statistics.fmean(columns[0]),
                      "memory_max": max(columns[1]), "power_mean": statistics.fmean(columns[2])})
    return table


def verdict(evaluation: dict[str, Any]) -> dict[str, Any]:
    """Which headline metrics are better, worse or not told apart (the 95 % interval holds 0), and the sentence that says so."""
    groups: dict[str, list[str]] = {"better": [], "worse": [], "same": []}
    for metric in METRICS:
        difference = evaluation.get("difference", {}).get(metric.key)
        if not metric.headline or difference is None:
            continue
        sign = -1 if difference["better"] == "lower" else 1
        low, high = (finite(difference[k]) for k in ("low", "high"))
        if low is None or high is None or low <= 0 <= high:
            groups["same"].append(metric.title)
        else:
            groups["better" if low * sign > 0 else "worse"].append(metric.title)
    parts = []
    if groups["better"]:
        parts.append(f"better than base on {_list(groups['better'])}")
    if groups["worse"]:
        parts.append(f"worse on {_list(groups['worse'])}" if parts else f"worse than base on {_list(groups['worse'])}")
    if groups["same"]:
        parts.append(f"no clear difference on {_list(groups['same'])}")
    text = f"Tuned is {'; '.join(parts)}." if parts else "The model has not been evaluated."
    state = ("mixed" if groups["better"] and groups["worse"] else "better" if groups["better"] else "worse" if groups["worse"] else "same")
    return {"state": state if parts else "none", "text": text, **groups}


def _list(names: list[str]) -> str:
    names = [n if n[:2].isupper() or n.startswith(("ROUGE", "Token-F1")) else n[0].lower() + n[1:] for n in names]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _evaluation(paths: RunPaths) -> dict[str, Any]:
    try:
        value = json.loads(paths.evaluation.read_text(encoding="utf-8"))
        return value if isinstance(value, dict) else {}
    except (OSError, ValueError):
        return {}


def build(config: Config, paths: RunPaths, gate: dict[str, Any] | None = None) -> dict[str, Any]:
    """The document of report.json from what lies in the run directory. Parts that are missing there are None or empty."""
    evaluation = _evaluation(paths)
    model, dataset = read_manifest(paths.model), read_manifest(paths.dataset) or {}
    lines = records(paths)
    shown = {m.key for m in METRICS}
    document: dict[str, Any] = {
        "format": FORMAT, "run": config.run_id,
        "state": "finished" if model is not None and evaluation.get("difference") else "incomplete",
        "base_model": describe_model(config.run.model), "base_revision": config.run.model.revision or None,
        "dataset": describe_data(config.run.data), "method": config.run.method.kind,
        "checkpoint_sha256": directory_digest(model) if model else None, "checkpoint_step": model.get("step") if model else None,
        "parameters": model.get("parameters") if model else None,
        **{part: {k: v for k, v in evaluation.get(part, {}).items() if k in shown} for part in ("base", "tuned", "difference")},
        "verdict": verdict(evaluation), "contamination": evaluation.get("contamination"),
        "evaluation": {k: evaluation.get(k) for k in (
            "rows", "generated_rows", "tokens", "rows_sha256", "seconds", "device", "dtype", "world", "decisions", "decisions_own_prompt")},
        "train": {**training_summary(paths), "phases": phase_seconds(lines)},
        "data": {k: dataset.get(k) for k in ("rows_read", "rows_kept", "rejected")} | {"splits": {
            name: {k: split.get(k) for k in ("rows", "tokens", "answer_tokens")} for name, split in dataset.get("splits", {}).items()}},
        "workers": worker_table(lines), "prediction": comparison(config, paths, lines), "network": network_table(paths),
        "gpu": gpu_table(paths), "samples": evaluation.get("samples", []),
        "config": yaml.safe_load(paths.config.read_text(encoding="utf-8")) if paths.config.exists() else to_dict(config),
    }
    document["gate"] = judge(document, gate or load_gate())
    return document


def cells(report: dict[str, Any], main: bool) -> list[dict[str, Any]]:
    """Rows of the table base against tuned: texts, and whether the difference is good, bad or neither."""
    rows = []
    for metric in METRICS:
        difference = report["difference"].get(metric.key)
        if difference is None or metric.main != main:
            continue
        low, high = finite(difference["low"]), finite(difference["high"])
        told = low is not None and high is not None and not low <= 0 <= high and not metric.neutral
        good = told and (low or 0) * (-1 if difference["better"] == "lower" else 1) > 0
        rows.append({"title": metric.title, "about": metric.about, "base": number(report["base"].get(metric.key)),
                     "tuned": number(report["tuned"].get(metric.key)), "difference": number(difference["mean"], True),
                     "low": number(low, True), "high": number(high, True), "rows": difference["rows"],
                     "direction": "" if metric.neutral else difference["better"],
                     "state": "good" if good else "bad" if told else "same"})
    return rows


def run_yaml(report: dict[str, Any]) -> str:
    """The run's configuration as YAML."""
    return yaml.safe_dump(report["config"], sort_keys=False, allow_unicode=True, width=100)
