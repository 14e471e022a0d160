"""The gate: thresholds that a report must pass before its model is promoted.

A gate file is YAML; every entry is optional, unknown ones are refused:

    loss:              {better_than_base: true, confidence: 0.95}
    decision_accuracy: {min_difference: 0.0, min: 0.55}
    token_f1:          {not_worse_by: 0.02}
    rouge_l:           {not_clearly_worse: true, optional: true}
    macro_f1:          {not_worse_than_served: 0.01}
    contamination:     none            # or the largest share of held-out rows that may be flagged
    min_rows:          100             # fewest held-out rows behind the loss

For a metric (loss, perplexity, token_f1, rouge_l, decision_accuracy, macro_f1, ...):

    better_than_base       the mean over the rows is better than the base's; with `confidence` the improvement's one-sided bootstrap
                           bound at that level is above 0
    min_difference         the improvement is at least this (in the metric's good direction; a bound with `confidence`)
    not_worse_by           the improvement is at least minus this (a bound with `confidence`)
    not_clearly_worse      the 95 % interval of the difference is not wholly on the bad side: for few rows, where a margin would be
                           passed or failed by chance
    not_worse_than_served  the tuned model is at most this much worse than the model that is served now, on the same held-out rows
    min, max               limits of the tuned model's value
    optional               passes where the report does not have the metric at all (no decisions in the data, no answers generated)

A pure function of documents: no torch, usable where only PyYAML is installed (`make promote`).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import yaml

from trainer.errors import UserError

DEFAULT = Path(__file__).with_name("gate.yaml")
"""The gate that the report is judged by where no other is given."""

_METRIC_KEYS = ("better_than_base", "confidence", "min_difference", "not_worse_by", "not_clearly_worse", "not_worse_than_served", "min",
                "max", "optional")
_OTHER_KEYS = ("contamination", "min_rows")


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def check_gate(gate: Any, where: str = "gate") -> dict[str, Any]:
    """The gate itself if it is well formed; UserError naming the entry, its value and the remedy otherwise."""

    def check(ok: bool, name: str, value: Any, remedy: str) -> None:
        if not ok:
            raise UserError(f"{where}: {name}: {value!r} is not usable. {remedy}")

    check(isinstance(gate, dict) and bool(gate), "the file", gate, "Give a mapping with at least one threshold.")
    for name, entry in gate.items():
        if name == "contamination":
            check(entry == "none" or (_number(entry) and 0 <= entry <= 1), name, entry, "Give none or a share from 0 to 1.")
        elif name == "min_rows":
            check(_number(entry) and entry >= 1, name, entry, "Give a number of rows, at least 1.")
        else:
            check(isinstance(entry, dict) and bool(entry), name, entry, f"Give a mapping of {', '.join(_METRIC_KEYS)}, "
                  f"or use one of {', '.join(_OTHER_KEYS)}.")
            for key, value in entry.items():
                place = f"{name}.{key}"
                check(key in _METRIC_KEYS, place, value, f"Unknown; a metric has {', '.join(_METRIC_KEYS)}.")
                if key in ("better_than_base", "not_clearly_worse", "optional"):
                    check(value is True, place, value, "Give true, or leave the entry out.")
                elif key == "confidence":
                    check(_number(value) and 0.5 < value < 1, place, value, "Give a level above 0.5 and below 1, for example 0.95.")
                    check(any(k in entry for k in ("better_than_base", "min_difference", "not_worse_by")), place, value,
                          "It goes with better_than_base, min_difference or not_worse_by.")
                else:
                    check(_number(value), place, value, "Give a number.")
                    check(not key.startswith("not_worse_") or value >= 0, place, value, "Give 0 or a positive margin.")
    return gate


def load_gate(path: Path = DEFAULT) -> dict[str, Any]:
    """Read and check a gate file."""
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"The gate file {path} cannot be read: {error}") from None
    return check_gate(document, str(path))


def _text(value: float) -> str:
    return f"{value:.4g}"


def _metric(name: str, entry: dict[str, Any], report: dict[str, Any], served: dict[str, Any] | None) -> list[tuple[bool, str]]:
    """(passed, reason) for each threshold of one metric."""
    if entry.get("optional") and name not in report.get("difference", {}):
        return [(True, f"{name}: not evaluated, and optional")]
    tuned, difference = report.get("tuned", {}).get(name), report.get("difference", {}).get(name)
    if not _number(tuned) or not isinstance(difference, dict) or not _number(difference.get("mean")):
        return [(False, f"{name}: the report has no such figure (not evaluated, no rows for it, or not a finite number)")]
    sign = -1 if difference["better"] == "lower" else 1
    gain, basis = sign * difference["mean"], "on average"
    if (level := entry.get("confidence")) is not None:
        bounds = {float(k): v for k, v in difference.get("bounds", {}).items() if _number(v)}
        if level not in bounds:
            return [(False, f"{name}: the report has no bound at confidence {level}; it has {', '.join(map(str, sorted(bounds)))}")]
        gain, basis = bounds[level], f"at least, with {100 * level:g} % confidence"
    improved = f"improves by {_text(gain)} {basis} (base {_text(report['base'][name])}, tuned {_text(tuned)}, {difference['rows']} rows)"
    results = []
    if entry.get("better_than_base"):
        results.append((gain > 0, f"{name}: {improved}; needed: above 0"))
    if (least := entry.get("min_difference")) is not None:
        results.append((gain >= least, f"{name}: {improved}; needed: at least {_text(least)}"))
    if (margin := entry.get("not_worse_by")) is not None:
        results.append((gain >= -margin, f"{name}: {improved}; needed: at least {_text(-margin)}"))
    if entry.get("not_clearly_worse"):
        ends: list[float] = [sign * v for v in (difference.get("low"), difference.get("high")) if v is not None and _number(v)]
        interval = " to ".join(_text(v) for v in sorted(ends))
        mean = _text(sign * difference["mean"])
        results.append((len(ends) == 2 and max(ends) >= 0, f"{name}: improves by {mean} on average (95 % interval {interval}, "
                        f"{difference['rows']} rows); needed: an interval that is not wholly below 0"))
    if (least := entry.get("min")) is not None:
        results.append((tuned >= least, f"{name}: tuned {_text(tuned)}; needed: at least {_text(least)}"))
    if (most := entry.get("max")) is not None:
        results.append((tuned <= most, f"{name}: tuned {_text(tuned)}; needed: at most {_text(most)}"))
    if (margin := entry.get("not_worse_than_served")) is not None:
        results.append(_against_served(name, margin, sign, tuned, report, served))
    return results


def _against_served(name: str, margin: float, sign: int, tuned: float, report: dict[str, Any],
                    served: dict[str, Any] | None) -> tuple[bool, str]:
    if served is None:
        return True, f"{name}: nothing is served yet to compare with"
    other = served.get("tuned", {}).get(name)
    if not _number(other):
        return False, f"{name}: the report of the served run has no such metric"
    rows, served_rows = (r.get("evaluation", {}).get("rows_sha256") for r in (report, served))
    if rows is None or rows != served_rows:
        return False, f"{name}: the served model was evaluated on other held-out rows, so the two cannot be compared"
    gain = sign * (tuned - other)
    return gain >= -margin, f"{name}: tuned {_text(tuned)}, served {_text(other)}; needed: at most {_text(margin)} worse"


def _contamination(allowed: Any, report: dict[str, Any]) -> tuple[bool, str]:
    found = report.get("contamination")
    if not isinstance(found, dict) or not _number(found.get("share")):
        return False, "contamination: the report does not say"
    limit = 0.0 if allowed == "none" else float(allowed)
    return found["share"] <= limit, (f"contamination: {found['flagged']} of {found['rows']} held-out rows also appear in training; "
                                     f"allowed: {'none' if limit == 0 else f'{limit:.2%}'}")


def judge(report: dict[str, Any], gate: dict[str, Any], served: dict[str, Any] | None = None) -> dict[str, Any]:
    """Judge a report (the document of report.json or evaluation.json).

    `served` is the report of the run that the target serves now, if any. Returns {"passed": bool, "reasons": [why it failed],
    "checks": [{"passed", "text"}]}. What the report doesn't say fails: absence of evidence is no evidence. UserError if the
    gate is malformed.
    """
    check_gate(gate)
    checks: list[tuple[bool, str]] = []
    for name, entry in gate.items():
        if name == "contamination":
            checks.append(_contamination(entry, report))
        elif name == "min_rows":
            rows = report.get("difference", {}).get("loss", {}).get("rows", 0)
            checks.append((rows >= entry, f"min_rows: {rows} held-out rows; needed: {entry}"))
        else:
            checks.extend(_metric(name, entry, report, served))
    return join({"checks": []}, [{"passed": ok, "text": text} for ok, text in checks])


def join(verdict: dict[str, Any], more: list[dict[str, Any]]) -> dict[str, Any]:
    """A verdict with further checks ({"passed", "text"}), which count as its own."""
    checks = [*verdict["checks"], *more]
    return {"passed": all(c["passed"] for c in checks), "reasons": [c["text"] for c in checks if not c["passed"]], "checks": checks}
