"""The previous chart (tests/charts/previous) installed by helm, then this one over it, and back: pods come, the claim and its data stay."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest
from kubernetes import client
from pytest_helm_charts.k8s.deployment import wait_for_deployments_to_run

from tests.e2e import site
from tools import charts, environments
from tools.layout import REPOSITORY

(PREVIOUS,) = (REPOSITORY / "tests/charts/previous").glob("llm-finetune-*.tgz")
DEPLOYMENTS = ["llm-finetune-chatbot", "llm-finetune-kuberay-operator"]


@pytest.fixture
def release(api: client.ApiClient, kube_config: str) -> Iterator[site.Release]:
    made = site.Release(api, kube_config, "try-upgrade")
    yield made
    made.helm("uninstall", environments.RELEASE_NAME, "--wait")
    made.gone()


def values(api: client.ApiClient) -> dict[str, Any]:
    """The local environment without Ray: chatbot, operator, storage; its newest run is served."""
    return environments.merge(environments.load("local").values, {
        "global": {"images": site.images(api)}, "ray-cluster": {"enabled": False}, "finetune-job": {"enabled": False},
        "chatbot": {"service": {"type": "ClusterIP", "nodePort": None}, "resources": {"requests": {"cpu": "20m", "memory": "256Mi"}},
                    "config": {"serve": {"base": False}}}})


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_upgrade_and_back(release: site.Release, api: client.ApiClient, kube_cluster: Any, wait_for: site.Wait) -> None:
    given = values(api)

    def claim() -> Any:
        return release.core.read_namespaced_persistent_volume_claim("llm-finetune-storage", release.namespace)

    def operators() -> list[str]:
        return [p.metadata.name for p in release.pods("app.kubernetes.io/name=kuberay-operator") if not p.metadata.deletion_timestamp]

    release.install(given, PREVIOUS)
    wait_for_deployments_to_run(kube_cluster.kube_client, DEPLOYMENTS, release.namespace, 180)
    wait_for(lambda: claim().status.phase == "Bound", 60, "the claim")
    uid = claim().metadata.uid
    for step in ("upgrade", "rollback"):
        if step == "upgrade":
            release.install(given, charts.CHART)
        else:
            done = release.helm("rollback", environments.RELEASE_NAME, "1")
            assert done.returncode == 0, done.stderr
        wait_for(lambda: len(operators()) == 1, 180, "one operator")
        wait_for_deployments_to_run(kube_cluster.kube_client, DEPLOYMENTS, release.namespace, 180)
        assert claim().metadata.uid == uid and claim().status.phase == "Bound", step
        print(step, operators(), file=sys.stderr)


def test_new_defaults_reach_reused_values(release: site.Release, api: client.ApiClient) -> None:
    """What NOTES.txt says to type: values that were set stay, and what is new in this chart has its default."""
    release.install(values(api), PREVIOUS)
    done = release.helm("upgrade", environments.RELEASE_NAME, str(charts.CHART), "--reset-then-reuse-values")
    assert done.returncode == 0, done.stderr
