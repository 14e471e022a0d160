"""Without Argo CD: the same chart by helm alone, into a namespace of its own beside the local environment; refused, upgraded, removed."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any

import httpx
import pyhelm3
import pytest
from kubernetes import client
from pyhelm3.errors import Error
from pytest_helm_charts.k8s.deployment import wait_for_deployments_to_run

from tools import charts, environments

NAMESPACE, RELEASE = "llm-finetune-by-helm", "llm-finetune"


def wait(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(work)


@pytest.fixture(scope="module")
def helm(kube_config: str) -> pyhelm3.Client:
    return pyhelm3.Client(executable=str(charts.helm()), kubeconfig=Path(kube_config), default_timeout="4m")


@pytest.fixture(scope="module")
def values(api: client.ApiClient) -> dict[str, Any]:
    """The local environment's files, the images that run there, the chatbot alone; it serves a run that is named."""
    deployment: Any = client.AppsV1Api(api).read_namespaced_deployment("llm-finetune-chatbot", environments.namespace("local"))
    repository, _, digest = deployment.spec.template.spec.containers[0].image.partition("@")
    over = {"global": {"images": {"chatbot": {"repository": repository, "digest": digest}}},
            "kuberay-operator": {"enabled": False}, "ray-cluster": {"enabled": False}, "finetune-job": {"enabled": False},
            "chatbot": {"service": {"type": "ClusterIP", "nodePort": None},
                        "resources": {"requests": {"cpu": "20m", "memory": "256Mi"}}, "config": {"serve": {"base": False}}}}
    return environments.merge(environments.load("local").values, over)


@pytest.fixture(scope="module")
def chart(helm: pyhelm3.Client) -> pyhelm3.Chart:
    return wait(helm.get_chart(charts.CHART))


@pytest.fixture(scope="module", autouse=True)
def gone(api: client.ApiClient, helm: pyhelm3.Client) -> Iterator[None]:
    yield
    wait(helm.uninstall_release(RELEASE, namespace=NAMESPACE, wait=True))
    core = client.CoreV1Api(api)
    core.delete_namespace(NAMESPACE)
    volumes: list[Any] = core.list_persistent_volume().items
    for volume in volumes:
        if volume.spec.claim_ref and volume.spec.claim_ref.namespace == NAMESPACE:
            core.delete_persistent_volume(volume.metadata.name)


def install(helm: pyhelm3.Client, chart: pyhelm3.Chart, *values: dict[str, Any]) -> Any:
    return wait(helm.install_or_upgrade_release(RELEASE, chart, *values, namespace=NAMESPACE, wait=True))


@pytest.mark.timeout(400)
def test_helm_installs_what_argo_cd_would(helm, chart, values, api, kube_cluster, layout):
    revision = install(helm, chart, values)
    assert revision.status == pyhelm3.ReleaseRevisionStatus.DEPLOYED and revision.revision == 1
    wait_for_deployments_to_run(kube_cluster.kube_client, ["llm-finetune-chatbot"], NAMESPACE, 180)
    service: Any = client.CoreV1Api(api).read_namespaced_service("llm-finetune-chatbot", NAMESPACE)
    answer = httpx.get(f"http://{service.spec.cluster_ip}:{service.spec.ports[0].port}/v1/models", timeout=10).json()
    assert (layout.storage / "runs" / answer["data"][0]["attribution"]["run"] / "report.json").is_file()


@pytest.mark.timeout(200)
def test_helm_test_asks_the_chatbot(kube_config):
    done = subprocess.run([charts.helm(), "test", RELEASE, "--namespace", NAMESPACE, "--kubeconfig", kube_config, "--timeout", "150s"],
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Succeeded" in done.stdout


def test_a_wrong_value_is_refused_and_changes_nothing(helm, chart, values):
    for wrong, words in (({"chatbot": {"replica": 2}}, "replica"), ({"nfs-provisioner": {"mode": "smb"}}, "mode")):
        with pytest.raises(Error, match=words):
            install(helm, chart, values, wrong)
    assert wait(helm.get_current_revision(RELEASE, namespace=NAMESPACE)).revision == 1


def test_an_upgrade_changes_what_it_says(helm, chart, values, kube_cluster):
    assert install(helm, chart, values, {"chatbot": {"resources": {"limits": {"memory": "2900Mi"}}}}).revision == 2
    pods = kube_cluster.kubectl("get pods -l app.kubernetes.io/name=chatbot", namespace=NAMESPACE)
    assert "2900Mi" in {p["spec"]["containers"][0]["resources"]["limits"]["memory"] for p in pods}


def test_removing_the_release_keeps_the_runs(helm, layout, api):
    before = sorted(path.name for path in (layout.storage / "runs").iterdir())
    wait(helm.uninstall_release(RELEASE, namespace=NAMESPACE, wait=True))
    assert sorted(path.name for path in (layout.storage / "runs").iterdir()) == before
