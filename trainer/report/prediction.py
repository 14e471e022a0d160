"""What `plan` predicts for the workers that a run really had, beside what was measured."""

from __future__ import annotations

import statistics
from dataclasses import replace
from typing import Any

from trainer.config import Config, GroupConfig
from trainer.errors import ConfigError
from trainer.paths import RunPaths
from trainer.plan import plan
from trainer.plan.hardware import find
from trainer.report.metrics import finite, samples, transferred


def on_workers(config: Config, layout: list[dict[str, Any]]) -> Config:
    """The configuration with the resources that the run had. `layout`: as in metrics.jsonl (trainer/train/loop.py)."""
    groups = []
    for number, part in enumerate(layout):
        try:
            gpu = find(part["device"]).name
        except ConfigError:  # a CPU, or a GPU that plan does not know
            gpu = ""
        groups.append(GroupConfig(name=f"group-{number}", workers=part["workers"], gpu=gpu, node_workers=part["node_workers"]))
    workers = sum(group.workers for group in groups)
    return replace(config, resources=replace(config.resources, workers=workers, min_workers=0, gpu="", groups=groups))


def comparison(config: Config, paths: RunPaths, lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows `quantity`, `predicted`, `measured`: of the newest layout of the workers; medians of its steps.

    Seconds and tokens/s where plan knows the GPUs; the bytes that a node sends in a step where there are several nodes. Empty if the
    workers did not tell what they are, or plan does not know the model.
    """
    layout = next((line["workers"]["layout"] for line in reversed(lines) if line.get("workers", {}).get("layout")), None)
    if layout is None:
        return []
    try:
        found = plan(on_workers(config, layout), advise=False)
    except ConfigError:
        return []
    begin = max((i + 1 for i, line in enumerate(lines) if line.get("workers", {}).get("layout", layout) != layout), default=0)
    steps = [line for line in lines[begin:] if finite(line.get("tokens_per_second"))]
    rows = []
    if found.step_seconds and steps:
        seconds = statistics.median(line["tokens"] / line["tokens_per_second"] for line in steps)
        rows += [{"quantity": "Seconds a step", "predicted": found.step_seconds, "measured": seconds},
                 {"quantity": "Tokens/s", "predicted": found.tokens_per_second,
                  "measured": statistics.median(line["tokens_per_second"] for line in steps)}]
    if found.nodes > 1 and len(steps) > 1:
        series = samples(paths.network, ("rx_bytes_per_s", "tx_bytes_per_s"))
        sent = [transferred(times, 1, steps[0]["time"], steps[-1]["time"]) / (len(steps) - 1) for times in series.values()]
        if sent:
            rows.append({"quantity": "Sent by a node in a step, bytes", "predicted": found.wire_bytes, "measured": statistics.fmean(sent)})
    return rows
