"""The report's metrics by name, numbers as text, and what metrics.jsonl, network.csv and gpu.csv say in short."""

from __future__ import annotations

import csv
import math
import re
from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from trainer.paths import RunPaths
from trainer.train.metrics import read


@dataclass(frozen=True)
class Title:
    """How a metric is shown."""

    key: str
    title: str
    about: str
    main: bool = True
    """In the first table; the others are details."""
    headline: bool = False
    """In the sentence at the top. One of each kind: perplexity says what the loss says."""
    neutral: bool = False
    """Neither direction is better."""


METRICS = (
    Title("loss", "Held-out loss", "Mean negative log-likelihood of a token of the reference answer, in nats", headline=True),
    Title("perplexity", "Perplexity", "exp(held-out loss)"),
    Title("token_f1", "Token-F1", "Overlap of words between generated and reference answer (SQuAD's normalisation)", headline=True),
    Title("rouge_l", "ROUGE-L", "Longest common subsequence of generated and reference answer, F-measure", headline=True),
    Title("decision_accuracy", "Decision accuracy", "Yes, no or maybe by log-likelihood, with lm-evaluation-harness's PubMedQA prompt",
          headline=True),
    Title("macro_f1", "Decision macro-F1", "The same decisions, mean of the F1 of yes, no and maybe"),
    Title("decision_accuracy_own_prompt", "Decision accuracy, own prompt", "The same with the prompt that the run was trained on"),
    Title("macro_f1_own_prompt", "Decision macro-F1, own prompt", "The same with the prompt that the run was trained on"),
    Title("looping", "Looping answers", "Share of generated answers that repeat themselves", main=False),
    Title("cut", "Cut answers", "Share of generated answers that ran into the limit of tokens", main=False),
    Title("empty", "Empty answers", "Share of generated answers without text", main=False),
    Title("answer_tokens", "Length of an answer", "Mean tokens of a generated answer", main=False, neutral=True),
)


def number(value: Any, signed: bool = False) -> str:
    """Four significant digits with a true minus sign; "–" for what is not a finite number."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        return "–"
    if abs(value) < 5e-5:
        text = "0"
    elif abs(value) >= 1000:
        text = f"{value:,.0f}"
    else:
        text = f"{value:.{max(0, min(4, 3 - math.floor(math.log10(abs(value)))))}f}"
    return ("+" if signed and value > 0 and text != "0" else "") + text.replace("-", "−")


def rate(value: float | None) -> str:
    """Bytes per second with a decimal prefix."""
    if value is None:
        return "–"
    for unit in ("B/s", "kB/s", "MB/s", "GB/s"):
        if value < 1000 or unit == "GB/s":
            return f"{value:.0f} {unit}" if unit == "B/s" else f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f} {unit}"
        value /= 1000
    raise AssertionError


def duration(seconds: Any) -> str:
    """Hours, minutes and seconds."""
    if not isinstance(seconds, int | float) or not math.isfinite(seconds):
        return "–"
    if seconds < 10:
        return f"{seconds:.1f} s"
    hours, rest = divmod(round(seconds), 3600)
    minutes, left = divmod(rest, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {left:02d} s" if minutes else f"{left} s"


def records(paths: RunPaths) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl by step; of a step that was done twice (resumed), the later line."""
    if not paths.metrics.exists():
        return []
    return [r for _, r in sorted({r["step"]: r for r in read(paths.metrics)}.items())]


def finite(value: Any) -> float | None:
    """The value as a float if it is a finite number."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) else None


def training_summary(paths: RunPaths) -> dict[str, Any]:
    """Steps, epoch, tokens, rows, seconds (of the steps alone), tokens_per_second, final_loss (mean of the last tenth of the steps,
    at most 20), eval_loss, best_eval_loss, mfu (mean); zero or None where nothing is recorded."""
    lines = records(paths)
    tokens, seconds = 0.0, 0.0
    for line in lines:
        speed, step_tokens = finite(line.get("tokens_per_second")), finite(line.get("tokens")) or 0.0
        tokens += step_tokens
        seconds += step_tokens / speed if speed else 0.0
    losses = [v for line in lines if (v := finite(line.get("loss"))) is not None]
    last = losses[-max(1, min(20, len(losses) // 10)):]
    evals = [v for line in lines if (v := finite(line.get("eval_loss"))) is not None]
    mfu = [v for line in lines if (v := finite(line.get("mfu"))) is not None]
    return {"steps": lines[-1]["step"] if lines else 0, "epoch": (finite(lines[-1].get("epoch")) or 0.0) if lines else 0.0,
            "tokens": round(tokens), "rows": round(sum(finite(line.get("rows")) or 0.0 for line in lines)), "seconds": seconds,
            "tokens_per_second": tokens / seconds if seconds else None, "final_loss": sum(last) / len(last) if last else None,
            "eval_loss": evals[-1] if evals else None, "best_eval_loss": min(evals) if evals else None,
            "mfu": sum(mfu) / len(mfu) if mfu else None}


def phase_seconds(lines: list[dict[str, Any]]) -> dict[str, float]:
    """Seconds of all steps by phase, in the order in which they are recorded."""
    total: dict[str, float] = defaultdict(float)
    for line in lines:
        for phase, seconds in (line.get("seconds") or {}).items():
            total[phase] += finite(seconds) or 0.0
    return dict(total)


_VIRTUAL = re.compile(r"(veth|docker|cni|br-|virbr|flannel|cali|tunl|vxlan|kube-|nodelocaldns|dummy|tap|cilium|lxc)")

Series = dict[str, dict[float, list[float]]]
"""node -> time -> summed values."""


def samples(path: Path, columns: tuple[str, ...], average: bool = False) -> Series:
    """Rows of network.csv or gpu.csv by node, each column summed over interfaces (or averaged over GPUs) of the same second.

    Broken rows and the loopback interface are left out. Only the physical way counts: of a node's interfaces, virtual ones
    (bridges, veth and tunnels, through which the same bytes go again) are left out as long as it has another.
    """
    if not path.exists():
        return {}
    rows: dict[str, list[tuple[float, str, list[float]]]] = defaultdict(list)
    with open(path, encoding="utf-8", errors="replace", newline="") as file:
        for row in csv.DictReader(file):
            try:
                values, when = [float(row[c]) for c in columns], float(row["time"])
            except (KeyError, TypeError, ValueError):
                continue
            name = row.get("interface") or ""
            if name != "lo" and all(map(math.isfinite, [when, *values])):
                rows[row.get("node") or "?"].append((when, name, values))
    series: Series = {}
    for node, found in rows.items():
        physical = [r for r in found if not _VIRTUAL.match(r[1])] or found
        by_time: dict[float, list[list[float]]] = defaultdict(list)
        for when, _, values in physical:
            by_time[when].append(values)
        series[node] = {when: [sum(column) / (len(group) if average else 1) for column in zip(*group, strict=True)]
                        for when, group in sorted(by_time.items())}
    return dict(sorted(series.items()))


def transferred(times: dict[float, list[float]], column: int, begin: float, end: float) -> float:
    """What one node's samples of a rate (`column` of `samples`) add up to between two moments."""
    return sum(times[now][column] * max(0.0, min(now, end) - max(before, begin)) for before, now in pairwise(times))
