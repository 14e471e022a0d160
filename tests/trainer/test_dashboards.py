"""Every metric that a dashboard asks for is one that the trainer, the chatbot or Ray exports, with the labels that it is asked by."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "charts/llm-finetune/files/dashboards"
DASHBOARDS = sorted(FOLDER.glob("*.json"))
FUNCTIONS = {"sum", "avg", "max", "min", "count", "rate", "increase", "histogram_quantile"}
TARGET_LABELS = {"namespace", "pod", "container", "job", "instance"}
"""Put on by Prometheus for a PodMonitor's target."""
TOKEN = re.compile(r'\s*(?:(?P<text>"(?:[^"\\]|\\.)*")|(?P<name>[a-zA-Z_:][a-zA-Z0-9_:]*)|(?P<range>\[[^\]]*\])|(?P<number>[0-9.]+)'
                   r"|(?P<sign>=~|!~|!=|[(){},=*/+-]))")


def tokens(expression: str) -> list[tuple[str, str]]:
    found, at = [], 0
    while at < len(expression.rstrip()):
        match = TOKEN.match(expression, at)
        assert match, f"not PromQL at {expression[at:]!r}"
        found.append((str(match.lastgroup), match[match.lastgroup]))
        at = match.end()
    return found


def asked(expression: str) -> dict[str, set[str]]:
    """Labels by metric of a query, those that it selects by and those that it groups by. Fails on functions that are not known."""
    parts = tokens(expression)
    assert sum(t == "(" for _, t in parts) == sum(t == ")" for _, t in parts)
    metrics: dict[str, set[str]] = {}
    grouped: set[str] = set()
    index, last = 0, ""
    while index < len(parts):
        kind, text = parts[index]
        following = parts[index + 1][1] if index + 1 < len(parts) else ""
        if kind == "name" and text in ("by", "without"):
            end = next(i for i in range(index, len(parts)) if parts[i][1] == ")")
            grouped |= {t for k, t in parts[index + 2:end] if k == "name"}
            index = end
        elif text == "{":
            end = next(i for i in range(index, len(parts)) if parts[i][1] == "}")
            metrics[last] |= {t for i in range(index, end) if parts[i][0] == "name" and parts[i + 1][1] in ("=", "=~", "!=", "!~")
                              for t in [parts[i][1]]}
            index = end
        elif kind == "name" and (following == "(" or following in ("by", "without")):
            assert text in FUNCTIONS, f"{text} is no function that is known here"
        elif kind == "name":
            last = text
            metrics.setdefault(text, set())
        index += 1
    return {name: labels | grouped for name, labels in metrics.items()}


def exported() -> dict[str, set[str]]:
    """Labels by metric, as the code registers them."""
    from ray.dashboard.modules.reporter.reporter_agent import METRICS_GAUGES

    from chatbot.metrics import Metrics
    from trainer.train.metrics import Gauges

    found = {f"ray_{name}": {str(key) for key in gauge.view.columns} for name, gauge in METRICS_GAUGES.items()}
    found |= {f"ray_llm_finetune_{name}": {"run"} for name in Gauges.NAMES}
    for value in vars(Metrics()).values():
        if hasattr(value, "_labelnames"):
            kind, labels = value._type, set(value._labelnames)
            names = {"counter": [f"{value._name}_total"], "histogram": [f"{value._name}_{s}" for s in ("sum", "count")]}
            for name in names.get(kind, [value._name]):
                found[name] = labels
            if kind == "histogram":
                found[f"{value._name}_bucket"] = labels | {"le"}
    return found


def queries(node: Any) -> Iterator[str]:
    """Expressions of panels, and the metrics of variables as queries."""
    if isinstance(node, dict):
        if "expr" in node:
            yield node["expr"]
        if node.get("type") == "query":
            match = re.fullmatch(r"label_values\((\w+), (\w+)\)", node["query"]["query"])
            assert match
            yield f"max by ({match[2]}) ({match[1]})"
        for value in node.values():
            yield from queries(value)
    elif isinstance(node, list):
        for value in node:
            yield from queries(value)


def read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8")))


def test_the_dashboards_are_there() -> None:
    assert [p.stem for p in DASHBOARDS] == ["chatbot", "gpus", "network", "training"]


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda p: p.stem)
def test_every_metric_is_exported(path: Path) -> None:
    known, found = exported(), list(queries(read(path)))
    assert len(found) > 6
    for expression in found:
        for metric, labels in asked(expression).items():
            assert metric in known, f"{path.stem}: {metric} is exported by nobody"
            assert labels <= known[metric] | TARGET_LABELS, f"{path.stem}: {metric} has no label {labels - known[metric] - TARGET_LABELS}"


def test_every_own_metric_is_shown() -> None:
    """What the trainer and the chatbot export for people is on a dashboard."""
    shown = {m for path in DASHBOARDS for q in queries(read(path)) for m in asked(q)}
    ours = {m for m in exported() if m.startswith(("ray_llm_finetune_", "chatbot_")) and not m.endswith(("_sum", "_count"))}
    assert ours <= shown


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda p: p.stem)
def test_a_dashboard_that_grafana_takes(path: Path) -> None:
    board = read(path)
    assert board["uid"] == f"llm-finetune-{path.stem}" and board["schemaVersion"] >= 36
    names = {v["name"] for v in board["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)\}?", json.dumps(board))) - {"__all"}
    assert used == names and "datasource" in names
    taken = set()
    for panel in board["panels"]:
        grid = panel["gridPos"]
        cells = {(x, y) for x in range(grid["x"], grid["x"] + grid["w"]) for y in range(grid["y"], grid["y"] + grid["h"])}
        assert not cells & taken and grid["x"] + grid["w"] <= 24, f"{panel['title']} lies on another panel"
        taken |= cells
        assert len({t["refId"] for t in panel["targets"]}) == len(panel["targets"])
        for target in panel["targets"]:  # a legend names labels that the query keeps
            kept = set().union(*(set(g.replace(" ", "").split(",")) for g in re.findall(r"by \(([^)]*)\)", target["expr"])))
            assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) <= kept


@pytest.mark.parametrize("expression", ["sum(ray_node_cpu_utilisation)", "max by (colour) (ray_node_mem_used)",
                                        'chatbot_ready{flavour="x"}'])
def test_a_wrong_query_is_found(expression: str) -> None:
    known = exported()
    assert not all(m in known and labels <= known[m] | TARGET_LABELS for m, labels in asked(expression).items())


@pytest.mark.parametrize("expression", ["topk(3, chatbot_ready)", "sum(chatbot_ready", "chatbot_ready ; 1"])
def test_what_is_not_understood_is_refused(expression: str) -> None:
    with pytest.raises(AssertionError):
        asked(expression)


def test_reading_a_query() -> None:
    text = 'histogram_quantile(0.95, sum by (le) (rate(a_bucket{namespace=~"$n|x{}", m!="1"}[5m]))) / avg(b) * 1024'
    assert asked(text) == {"a_bucket": {"le", "namespace", "m"}, "b": {"le"}}
