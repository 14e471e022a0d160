"""What is left of an environment is removed in an order that KubeRay can follow."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tools.errors import OperatorError
from tools.remove import remove

NAMESPACE = "llm-finetune-staging"


class Cluster:
    """The few calls that are made, on sets of names. `stuck`: kinds that nobody lets go of."""

    def __init__(self, applications: tuple[str, ...] = (), stuck: tuple[str, ...] = ()) -> None:
        self.objects = {"applications": set(applications), "rayjobs": {"a", "b"}, "rayclusters": {"c"}}
        self.namespaces, self.stuck = {NAMESPACE, "default"}, stuck
        self.volumes = {"own": (NAMESPACE, "Retain"), "other": ("default", "Retain"), "gone by itself": (NAMESPACE, "Delete")}
        self.log: list[str] = []

    def list_namespaced_custom_object(self, group: str, version: str, namespace: str, plural: str) -> dict[str, Any]:
        return {"items": [{"metadata": {"name": n}} for n in sorted(self.objects[plural])]}

    def delete_namespaced_custom_object(self, group: str, version: str, namespace: str, plural: str, name: str) -> None:
        assert namespace == NAMESPACE
        self.log.append(f"{plural}/{name}")
        if plural not in self.stuck:
            self.objects[plural].discard(name)

    def list_namespace(self) -> Any:
        return SimpleNamespace(items=[SimpleNamespace(metadata=SimpleNamespace(name=n)) for n in self.namespaces])

    def delete_namespace(self, name: str) -> None:
        self.log.append(name)
        self.namespaces.discard(name)

    def list_persistent_volume(self) -> Any:
        return SimpleNamespace(items=[SimpleNamespace(metadata=SimpleNamespace(name=n), spec=SimpleNamespace(
            claim_ref=SimpleNamespace(namespace=claim), persistent_volume_reclaim_policy=policy))
            for n, (claim, policy) in self.volumes.items()])

    def delete_persistent_volume(self, name: str) -> None:
        self.log.append(name)
        del self.volumes[name]


def test_runs_then_namespace_then_volume() -> None:
    cluster = Cluster()
    remove(cluster, cluster, "staging")
    assert cluster.log == ["rayjobs/a", "rayjobs/b", "rayclusters/c", NAMESPACE, "own"]
    remove(cluster, cluster, "staging")
    assert len(cluster.log) == 5, "a second time there is nothing to do"


def test_a_deployed_environment_is_refused() -> None:
    cluster = Cluster(applications=("llm-finetune-staging",))
    with pytest.raises(OperatorError, match="still deploys staging"):
        remove(cluster, cluster, "staging")
    assert cluster.log == []


def test_an_object_that_nobody_lets_go_of_is_named() -> None:
    cluster = Cluster(stuck=("rayjobs",))
    with pytest.raises(OperatorError, match=r"A rayjob is still there.*watchNamespaces"):
        remove(cluster, cluster, "staging", patience=0)
    assert NAMESPACE in cluster.namespaces
