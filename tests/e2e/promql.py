"""The dashboards' queries, answered by Prometheus' own engine from what the cluster's pods export (tools/cluster/sources/promql)."""

from __future__ import annotations

import functools
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from tools import shell
from tools.cluster.sources import Source, build
from tools.layout import REPOSITORY, Layout

DASHBOARDS = REPOSITORY / "charts/llm-finetune/files/dashboards"


def scrape(pod: Any, port: int) -> dict[str, Any]:
    """A pod's metrics, with the labels that a PodMonitor's target gets."""
    text = httpx.get(f"http://{pod.status.pod_ip}:{port}/metrics", timeout=30).text
    return {"time": time.time(), "text": text, "labels": {
        "namespace": pod.metadata.namespace, "pod": pod.metadata.name, "container": pod.spec.containers[0].name,
        "job": f"{pod.metadata.namespace}/llm-finetune", "instance": f"{pod.status.pod_ip}:{port}"}}


def queries(dashboard: str, variables: dict[str, str]) -> Iterator[tuple[str, str]]:
    """(panel, query) of a dashboard, Grafana's variables replaced."""
    board = json.loads((DASHBOARDS / f"{dashboard}.json").read_text(encoding="utf-8"))
    for panel in board["panels"]:
        for target in panel["targets"]:
            yield panel["title"], re.sub(r"\$\{?(\w+)\}?", lambda m: variables[m[1]], target["expr"])


@functools.cache
def program() -> Path:
    layout = Layout()
    build(Source("promql", ("promql",), 120), layout, lambda text: print(f"Prometheus' engine: {text}", flush=True))
    return layout.bin / "promql"


def evaluate(scrapes: list[dict[str, Any]], expressions: list[str]) -> dict[str, list[dict[str, Any]]]:
    """Samples that each query answers with at the last scrape's time. Raises OperatorError for a query that Prometheus does not take."""
    ordered = sorted(scrapes, key=lambda s: s["time"])
    return dict(json.loads(shell.output([program()], stdin=json.dumps({"scrapes": ordered, "queries": expressions}))))
