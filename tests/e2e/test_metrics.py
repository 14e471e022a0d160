"""The dashboards' metrics are those that the cluster's pods really export."""

from __future__ import annotations

import json
import re
from typing import Any

import httpx
import pytest
from kubernetes import client

from tools.layout import REPOSITORY


def scraped(api: client.ApiClient, namespace: str, selector: str, port: int) -> set[str]:
    """Names of the metrics of all running pods that a selector finds, asked as Prometheus would."""
    pods: list[Any] = client.CoreV1Api(api).list_namespaced_pod(namespace, label_selector=selector,
                                                                field_selector="status.phase=Running").items
    assert pods, selector
    found: set[str] = set()
    for pod in pods:
        text = httpx.get(f"http://{pod.status.pod_ip}:{port}/metrics", timeout=30).text
        found |= set(re.findall(r"^(?:# TYPE )?([a-zA-Z_:][\w:]*)", text, re.MULTILINE))
        found |= {f"{m}_bucket" for m in re.findall(r"^# TYPE (\S+) histogram", text, re.MULTILINE)}
    return found


@pytest.mark.parametrize(("dashboard", "selector", "port", "prefix"), [
    ("network", "ray.io/is-ray-node=yes", 8080, "ray_node_"), ("chatbot", "app.kubernetes.io/name=chatbot", 7860, "chatbot_")])
def test_the_pods_export_what_the_dashboards_ask_for(api: client.ApiClient, namespace: str, dashboard: str, selector: str, port: int,
                                                    prefix: str) -> None:
    text = (REPOSITORY / f"charts/llm-finetune/files/dashboards/{dashboard}.json").read_text(encoding="utf-8")
    asked = {m for p in json.loads(text)["panels"] for t in p["targets"] for m in re.findall(rf"\b{prefix}\w+", t["expr"])}
    assert len(asked) >= 5
    assert asked <= scraped(api, namespace, selector, port)
