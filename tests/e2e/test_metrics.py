"""The dashboards' queries on the metrics that the cluster's pods really export, answered by Prometheus' own engine.

The trainer exports its gauges during a run alone. The GPUs' metrics exist only where GPUs are: those queries are
parsed here, and tests/trainer/test_dashboards.py holds their metrics and labels to Ray's code.
"""

from __future__ import annotations

import time
from typing import Any

import httpx
import pytest
from kubernetes import client

from tests.e2e import promql

IDLE = {"chatbot_errors_total", "chatbot_guardrail_total"}
"""Counters whose series begin with the first error or intervention."""


def pods(api: client.ApiClient, namespace: str, selector: str) -> list[Any]:
    found: list[Any] = client.CoreV1Api(api).list_namespaced_pod(namespace, label_selector=selector,
                                                                field_selector="status.phase=Running").items
    assert found, selector
    return found


def ask(pod: Any) -> None:
    """An answer more, so that there is a rate."""
    done = httpx.post(f"http://{pod.status.pod_ip}:7860/v1/chat/completions", timeout=120,
                      json={"messages": [{"role": "user", "content": "Does aspirin help against headache?"}], "max_tokens": 8})
    assert done.status_code == 200, done.text


@pytest.mark.parametrize(("dashboard", "selector", "port"), [
    ("network", "ray.io/is-ray-node=yes", 8080), ("chatbot", "app.kubernetes.io/name=chatbot", 7860)])
@pytest.mark.timeout(900)
def test_every_query_is_answered(api: client.ApiClient, namespace: str, dashboard: str, selector: str, port: int) -> None:
    scrapes = []
    for _ in range(3):  # a rate needs two; Ray renews its gauges every few seconds
        found = pods(api, namespace, selector)
        scrapes += [promql.scrape(pod, port) for pod in found]
        if dashboard == "chatbot":
            ask(found[0])
        time.sleep(6)
    asked = list(promql.queries(dashboard, {"namespace": namespace, "pod": ".+"}))
    answers = promql.evaluate(scrapes, [expression for _, expression in asked])
    silent = [(panel, e) for panel, e in asked if not answers[e] and not any(name in e for name in IDLE)]
    assert not silent
    by_pod = [a for answer in answers.values() for a in answer if "pod" in a["labels"]]
    assert {a["labels"]["pod"] for a in by_pod} <= {s["labels"]["pod"] for s in scrapes}


def test_the_gpu_queries_are_prometheus(api: client.ApiClient, namespace: str) -> None:
    """No GPU here, so no answer; but Prometheus takes the queries."""
    scrapes = [promql.scrape(pod, 8080) for pod in pods(api, namespace, "ray.io/is-ray-node=yes")]
    asked = [expression for _, expression in promql.queries("gpus", {"namespace": namespace, "pod": ".+"})]
    assert set(promql.evaluate(scrapes, asked)) == set(asked)
