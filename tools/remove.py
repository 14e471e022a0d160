"""Remove what an environment left in its cluster, after git no longer has it.

    python -m tools remove staging

Order matters. KubeRay holds a RayJob until it has let go of it, and can do so only as long as it has its rights in the namespace; so runs
and clusters go first, then the namespace, then the volume, which would refuse the claim of an environment that is made again under the
same name. The data on the storage stay.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from typing import Any

from tools import argocd, environments
from tools.cluster.status import ARGO, RAY
from tools.errors import OperatorError
from tools.promote import cluster_api

PATIENCE = 300.0
"""Seconds that each step may take."""


def remove(core: Any, custom: Any, name: str, say: Callable[[str], None] = print, patience: float = PATIENCE) -> None:
    """Delete an environment's runs, Ray cluster, namespace and volume. Raises OperatorError while Argo CD still deploys it.

    `core`, `custom`: kubernetes.client.CoreV1Api and CustomObjectsApi of the cluster.
    """
    namespace = environments.namespace(name)
    if f"llm-finetune-{name}" in _names(custom, ARGO[:2], argocd.NAMESPACE, ARGO[3]):
        raise OperatorError(f"Argo CD still deploys {name} and would make everything again. Remove environments/{name} from git (or from "
                            f"the cluster's annotation {argocd.ANNOTATION}environments) and wait until its Application is gone.")

    def wait(gone: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + patience
        while not gone():
            if time.monotonic() > deadline:
                raise OperatorError(f"{what} is still there after {patience:.0f} s. Does the KubeRay operator run, and does it watch "
                                    f"{namespace} (kuberay-operator.watchNamespaces)? It has to let go of its objects.")
            time.sleep(1.0)

    def exists() -> bool:
        return namespace in {n.metadata.name for n in core.list_namespace().items}

    if exists():
        for plural in ("rayjobs", "rayclusters"):
            say(f"{namespace}: {plural}")
            for one in _names(custom, RAY, namespace, plural):
                custom.delete_namespaced_custom_object(*RAY, namespace, plural, one)
            wait(lambda: not _names(custom, RAY, namespace, plural), f"A {plural.removesuffix('s')}")  # noqa: B023
        say(f"{namespace}: namespace")
        core.delete_namespace(namespace)
        wait(lambda: not exists(), f"The namespace {namespace}")
    for volume in core.list_persistent_volume().items:
        claim = volume.spec.claim_ref
        if claim and claim.namespace == namespace and volume.spec.persistent_volume_reclaim_policy == "Retain":
            say(f"{namespace}: volume {volume.metadata.name} (its data stay)")
            core.delete_persistent_volume(volume.metadata.name)


def _names(custom: Any, group: tuple[str, ...], namespace: str, plural: str) -> list[str]:
    """Names of the objects of a kind; none if the cluster does not know the kind."""
    from kubernetes.client.exceptions import ApiException

    try:
        return [i["metadata"]["name"] for i in custom.list_namespaced_custom_object(*group, namespace, plural)["items"]]
    except ApiException as error:
        if error.status == 404:
            return []
        raise


def _main(arguments: argparse.Namespace) -> int:
    from kubernetes import client

    core = cluster_api(arguments.context)
    remove(core, client.CustomObjectsApi(core.api_client), arguments.environment)
    return 0


def add_parser(commands: Any) -> None:
    """`remove ENV`; CONTEXT also from the environment."""
    parser: argparse.ArgumentParser = commands.add_parser("remove", help="remove what an environment left in its cluster, once git has it "
                                                                    "no longer")
    parser.add_argument("environment")
    parser.add_argument("--context", default=os.environ.get("CONTEXT", ""), help="kubeconfig context")
    parser.set_defaults(run=_main)
