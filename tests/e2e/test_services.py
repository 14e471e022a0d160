"""Services of the local cluster when kube-proxy starts anew: its first sync meets the rules of the one before, as every full sync does
(once an hour, and after a failure)."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from kubernetes import client

pytestmark = pytest.mark.timeout(180)


def test_a_full_sync_keeps_the_rules(api: client.ApiClient, namespace: str, wait_for: Callable[..., Any]) -> None:
    core = client.CoreV1Api(api)
    service = core.read_namespaced_service("llm-finetune-chatbot", namespace).spec
    url = f"http://{service.cluster_ip}:{service.ports[0].port}/healthz"
    assert httpx.get(url, timeout=5).status_code == 200
    [before] = core.list_namespaced_pod("kube-system", label_selector="k8s-app=kube-proxy").items
    core.delete_namespaced_pod(before.metadata.name, "kube-system")

    def synced() -> str | None:
        """Name of the new pod once it has begun to sync."""
        for pod in core.list_namespaced_pod("kube-system", label_selector="k8s-app=kube-proxy").items:
            if pod.metadata.uid != before.metadata.uid and any(c.state.running for c in pod.status.container_statuses or []):
                log = core.read_namespaced_pod_log(pod.metadata.name, "kube-system")
                return pod.metadata.name if log.count("Caches are synced") >= 4 else None
        return None

    name = wait_for(synced, 60, "kube-proxy, started anew")
    end = time.monotonic() + 8
    while time.monotonic() < end:
        assert httpx.get(url, timeout=5).status_code == 200
        time.sleep(0.2)
    assert "sync failed" not in core.read_namespaced_pod_log(name, "kube-system")
