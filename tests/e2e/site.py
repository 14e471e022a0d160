"""What the tests of whole sites share: servers that only claim to have GPUs, and releases of the chart in namespaces of their own."""

from __future__ import annotations

import contextlib
import subprocess
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from kubernetes import client
from kubernetes.client.exceptions import ApiException

from tools import charts, environments
from tools.cluster import status
from tools.remove import remove

GPU, PRODUCT = "nvidia.com/gpu", "nvidia.com/gpu.product"
PRETENDED = "llm-finetune/pretended"
"""Taint of the servers that are not there: no other pod of the cluster may land on them."""
TOLERATED = [{"key": PRETENDED, "operator": "Exists"}]


def node(name: str, gpus: int, product: str) -> dict[str, Any]:
    """A server as its kubelet and the device plugin would announce it."""
    return {"apiVersion": "v1", "kind": "Node", "metadata": {"name": name, "labels": {PRODUCT: product, "kubernetes.io/hostname": name}},
            "spec": {"taints": [{"key": PRETENDED, "effect": "NoSchedule"}]},
            "status": {kind: {"cpu": "128", "memory": "1Ti", "ephemeral-storage": "1Ti", "pods": "110", GPU: str(gpus)}
                       for kind in ("capacity", "allocatable")}}


def ready() -> dict[str, Any]:
    """The heartbeat of a kubelet."""
    now = datetime.now(UTC).isoformat()
    return {"status": {"conditions": [{"type": "Ready", "status": "True", "reason": "KubeletReady", "message": "pretended",
                                       "lastHeartbeatTime": now, "lastTransitionTime": now}]}}


@contextlib.contextmanager
def servers(api: client.ApiClient, nodes: list[dict[str, Any]]) -> Iterator[None]:
    """Nodes without kubelet: Kubernetes' scheduler places pods on them, and nothing starts there."""
    core, done = client.CoreV1Api(api), threading.Event()
    names = [n["metadata"]["name"] for n in nodes]

    def beat() -> None:
        while not done.wait(8):
            for name in names:
                core.patch_node_status(name, ready())

    thread = threading.Thread(target=beat, daemon=True)
    try:
        for one in nodes:
            with contextlib.suppress(ApiException):  # of a test that was killed
                core.delete_node(one["metadata"]["name"])
            core.create_node(one)
            core.patch_node_status(one["metadata"]["name"], {"status": one["status"]})
            core.patch_node_status(one["metadata"]["name"], ready())
        thread.start()
        yield
    finally:
        done.set()
        thread.join()
        forget_pods(core, names)
        for name in names:
            core.delete_node(name)
        forget_pods(core, names)


def forget_pods(core: client.CoreV1Api, nodes: list[str], namespace: str = "") -> None:
    """Pods of servers that are not there end without a kubelet's answer."""
    for name in nodes:
        found: list[Any] = core.list_pod_for_all_namespaces(field_selector=f"spec.nodeName={name}").items
        for pod in found:
            if namespace in ("", pod.metadata.namespace):
                with contextlib.suppress(ApiException):
                    core.delete_namespaced_pod(pod.metadata.name, pod.metadata.namespace, grace_period_seconds=0)


def images(api: client.ApiClient) -> dict[str, Any]:
    """global.images of what runs in the local environment, where digests are those of this machine's builds."""
    apps = client.AppsV1Api(api)
    namespace = environments.namespace("local")
    operator: Any = apps.read_namespaced_deployment("llm-finetune-kuberay-operator", namespace)
    chatbot: Any = apps.read_namespaced_deployment("llm-finetune-chatbot", namespace)
    cluster: Any = client.CustomObjectsApi(api).get_namespaced_custom_object(*status.RAY, namespace, "rayclusters", "llm-finetune")
    found = {"kuberayOperator": operator.spec.template.spec.containers[0].image, "chatbot": chatbot.spec.template.spec.containers[0].image,
             "trainer": cluster["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["image"]}
    return {name: dict(zip(("repository", "digest"), image.split("@"), strict=True)) for name, image in found.items()}


class Release:
    """The chart by helm in a namespace `llm-finetune-<name>` of its own."""

    def __init__(self, api: client.ApiClient, kubeconfig: str, name: str) -> None:
        self.name, self.namespace, self.kubeconfig = name, environments.namespace(name), kubeconfig
        self.core, self.custom = client.CoreV1Api(api), client.CustomObjectsApi(api)

    def helm(self, *words: str, values: dict[str, Any] | None = None) -> subprocess.CompletedProcess[str]:
        command = [charts.helm(), *words, "--kubeconfig", self.kubeconfig, "--namespace", self.namespace]
        return subprocess.run([*command, "--values", "-"] if values is not None else command, capture_output=True, text=True, check=False,
                              input=yaml.safe_dump(values) if values is not None else None)

    def install(self, values: dict[str, Any], chart: Path | str = charts.CHART, *words: str) -> None:
        """`helm upgrade --install` into a namespace that the API server holds to Pod Security restricted; fails with helm's message."""
        labels = {"pod-security.kubernetes.io/enforce": "restricted"}
        with contextlib.suppress(ApiException):  # it is there
            self.core.create_namespace({"metadata": {"name": self.namespace, "labels": labels}})
        done = self.helm("upgrade", "--install", environments.RELEASE_NAME, str(chart), *words, values=values)
        assert done.returncode == 0, done.stderr

    def pods(self, selector: str = "") -> list[Any]:
        return list(self.core.list_namespaced_pod(self.namespace, label_selector=selector).items)

    def workers(self, group: str) -> list[Any]:
        return self.pods(f"ray.io/node-type=worker,ray.io/group={group}")

    def runs(self) -> list[dict[str, Any]]:
        return list(self.custom.list_namespaced_custom_object(*status.RAY, self.namespace, "rayjobs")["items"])

    def gone(self, nodes: list[str] | None = None) -> None:
        """Everything of the release, with pods on servers that are not there."""
        stop = threading.Event()

        def forget() -> None:
            while not stop.wait(1):
                forget_pods(self.core, nodes or [], self.namespace)

        thread = threading.Thread(target=forget, daemon=True)
        thread.start()
        try:
            remove(self.core, self.custom, self.name)
        finally:
            stop.set()
            thread.join()


Wait = Callable[..., Any]
