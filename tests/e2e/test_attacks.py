"""What stays shut on the local cluster: Ray without its token, the network from another namespace, pods with rights, tokens in the open."""

from __future__ import annotations

import base64
import os
import subprocess
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from kubernetes import client
from kubernetes.client.exceptions import ApiException
from kubernetes.stream import stream

from tests.e2e.faults import until
from tests.e2e.leaks import leaks
from tools.cluster import status
from tools.cluster.settings import Settings
from tools.layout import Layout

pytestmark = pytest.mark.timeout(600)
STRANGER = "stranger"
INFRASTRUCTURE = {"kube-system", "kube-public", "kube-node-lease", "default", "kube-flannel"}
"""Namespaces of Kubernetes itself, whose pods need the node."""
GCS, CLIENT, DASHBOARD, METRICS = 6379, 10001, 8265, 8080
WRONG = "0" * 64


@pytest.fixture(scope="module")
def head(api: client.ApiClient, namespace: str) -> Any:
    return client.CoreV1Api(api).list_namespaced_pod(namespace, label_selector="ray.io/node-type=head").items[0]


@pytest.fixture(scope="module")
def stranger(api: client.ApiClient, head: Any) -> Iterator[Any]:
    """A pod of somebody else, in a namespace of its own, with the trainer's image (it has Ray)."""
    core = client.CoreV1Api(api)
    core.create_namespace({"metadata": {"name": STRANGER, "labels": {"pod-security.kubernetes.io/enforce": "restricted"}}})
    shut = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    container = {"name": "stranger", "image": head.spec.containers[0].image, "command": ["sleep", "600"], "securityContext": shut,
                 "env": [{"name": "HOME", "value": "/tmp"}], "resources": {"requests": {"cpu": "10m"}}}
    core.create_namespaced_pod(STRANGER, {"metadata": {"name": STRANGER}, "spec": {
        "containers": [container], "automountServiceAccountToken": False, "terminationGracePeriodSeconds": 0,
        "securityContext": {"runAsNonRoot": True, "runAsUser": 1000, "seccompProfile": {"type": "RuntimeDefault"}}}})
    until(lambda: core.read_namespaced_pod(STRANGER, STRANGER).status.phase == "Running", 120, "the stranger's pod")
    yield core
    core.delete_namespace(STRANGER)


def connects(core: Any, address: str, port: int, pod: str = STRANGER, namespace: str = STRANGER) -> bool:
    """Whether a TCP connection from the pod comes about."""
    said = stream(core.connect_get_namespaced_pod_exec, pod, namespace, stderr=True, stdin=False, stdout=True, tty=False, command=[
        "bash", "-c", f"timeout 4 bash -c 'exec 3<>/dev/tcp/{address}/{port}' 2>/dev/null && echo OPEN || echo SHUT"])
    assert said.strip() in ("OPEN", "SHUT"), said
    return bool(said.strip() == "OPEN")


def test_another_namespace_reaches_only_what_is_meant_for_everybody(stranger: Any, head: Any, api: client.ApiClient, namespace: str,
                                                                  settings: Settings) -> None:
    """The policies are enforced here: of the head only the dashboard, which has a node port, can be reached, and asks for the token."""
    address = head.status.pod_ip
    workers = client.CoreV1Api(api).list_namespaced_pod(namespace, label_selector="ray.io/node-type=worker").items
    assert connects(stranger, address, DASHBOARD), "it has a node port: global.networkPolicy.clients lets everybody in"
    assert connects(stranger, settings.address, settings.chatbot_node_port), "what the probe can reach, it says"
    for port in (GCS, CLIENT, METRICS):
        assert not connects(stranger, address, port), port
    assert not connects(stranger, workers[0].status.pod_ip, METRICS)
    # The same port from where it may be reached: it was not shut to everybody.
    assert connects(client.CoreV1Api(api), address, GCS, workers[0].metadata.name, namespace)


@pytest.mark.parametrize("token", [None, WRONG], ids=["no token", "a wrong token"])
def test_the_dashboard_and_job_submission_refuse(token: str | None, head: Any) -> None:
    """From the node itself, which no policy keeps out."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    with httpx.Client(base_url=f"http://{head.status.pod_ip}:{DASHBOARD}", headers=headers, timeout=10) as dashboard:
        job = dashboard.post("/api/jobs/", json={"entrypoint": "touch /tmp/broken-in"})
        asked = [job, *(dashboard.get(path) for path in ("/api/jobs/", "/nodes?view=summary", "/api/v0/actors", "/api/cluster_status"))]
    assert {answer.status_code for answer in asked} <= {401, 403}, [(a.url, a.status_code) for a in asked]


def _ray(layout: Layout, code: str, token: str | None) -> subprocess.CompletedProcess[str]:
    """Python with Ray outside of the cluster, with a token or without."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {"RAY_USAGE_STATS_ENABLED": "0"}
    if token:
        env |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
    python = layout.cache / "venv/trainer/bin/python"
    return subprocess.run([python, "-c", code], env=env, capture_output=True, text=True, timeout=120, check=False)


GCS_CODE = """
from ray._raylet import GcsClient
print("ANSWER", GcsClient(address="{address}:6379").internal_kv_keys(b"", None, timeout=10))
"""


def _token(api: client.ApiClient, namespace: str) -> str:
    return base64.b64decode(client.CoreV1Api(api).read_namespaced_secret("llm-finetune", namespace).data["auth_token"]).decode()


@pytest.mark.parametrize("token", [None, WRONG], ids=["no token", "a wrong token"])
def test_ray_itself_refuses(token: str | None, head: Any, layout: Layout) -> None:
    done = _ray(layout, GCS_CODE.format(address=head.status.pod_ip), token)
    assert done.returncode != 0 and "ANSWER" not in done.stdout
    assert "auth" in (done.stdout + done.stderr).lower(), done.stderr[-500:]


def test_ray_answers_whoever_has_the_token(head: Any, layout: Layout, api: client.ApiClient, namespace: str) -> None:
    """What the tests before ask is otherwise answered."""
    token = _token(api, namespace)
    assert "ANSWER" in _ray(layout, GCS_CODE.format(address=head.status.pod_ip), token).stdout
    assert httpx.get(f"http://{head.status.pod_ip}:{DASHBOARD}/api/jobs/", headers={"Authorization": f"Bearer {token}"},
                     timeout=10).status_code == 200


def test_pods_with_rights_are_refused_by_the_namespaces_label(api: client.ApiClient) -> None:
    """Everywhere but in Kubernetes' own namespaces."""
    core = client.CoreV1Api(api)
    container = {"name": "x", "image": "x", "securityContext": {"privileged": True}}
    namespaces = {n.metadata.name for n in core.list_namespace().items} - INFRASTRUCTURE
    assert {"argocd", status.namespace("local")} <= namespaces
    for namespace in namespaces:
        with pytest.raises(ApiException) as refused:
            core.create_namespaced_pod(namespace, {"metadata": {"name": "x"}, "spec": {"containers": [container], "hostPID": True}},
                                       dry_run="All")
        assert refused.value.status == 403 and "PodSecurity" in refused.value.body, namespace


def test_only_the_operator_has_a_token_of_the_cluster(api: client.ApiClient, namespace: str) -> None:
    pods = client.CoreV1Api(api).list_namespaced_pod(namespace).items
    holders = {p.metadata.labels.get("app.kubernetes.io/name") for p in pods
               if any(source.service_account_token for v in p.spec.volumes if v.projected for source in v.projected.sources)}
    assert holders == {"kuberay-operator"}


def test_rays_token_is_found_nowhere(api: client.ApiClient, namespace: str, layout: Layout) -> None:
    """After real runs: only the Secret has it, and the environment of Ray's own pods."""
    token = _token(api, namespace)
    assert len(token) > 20
    assert leaks(token, layout, [p for p in (layout.storage / "runs").iterdir() if p.is_dir()]) == []
