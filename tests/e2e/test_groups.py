"""Servers of different generations: the worked examples' pods on nodes that only claim GPUs, placed by Kubernetes' own scheduler.

The nodes have no kubelet, so that pods are placed there and never start; that says what the rendered groups, selectors, resources and
tolerations do, under Pod Security restricted. A real run over two groups is in test_unequal_groups.py.
"""

from __future__ import annotations

from typing import Any

import pytest
from kubernetes import client

from tests.e2e import site
from tools import environments
from trainer import config
from trainer.plan import plan
from trainer.plan.hardware import GPUS

NAMES = ["mixed-7b-full", "one-server-13b-full", "workstation-8b-lora"]
"""One example of each kind of site; the mixed ones are runs of one site (tests/tools/test_examples.py)."""
pytestmark = pytest.mark.timeout(300)


def values_of(name: str, api: client.ApiClient, **more: Any) -> dict[str, Any]:
    """An example's values with this machine's images, on nodes that stand in for its servers."""
    over = {"global": {"images": site.images(api), "imagePullSecrets": None},
            "nvidia-device-plugin": {"enabled": False},  # its image is not here, and the capacity is claimed
            "ray-cluster": {"head": {"tolerations": site.TOLERATED, "nodeSelector": {"kubernetes.io/hostname": "server-0-0"}},
                            "workerDefaults": {"tolerations": site.TOLERATED, "runtimeClassName": ""}},
            "finetune-job": {"enabled": False}}
    example = environments.load(f"{environments.EXAMPLES}/{name}").values
    for group in example["ray-cluster"]["workerGroups"]:
        group.pop("runtimeClassName", None)  # the node's containerd has no such runtime, and Kubernetes refuses a class that is not there
    return dict(environments.merge(environments.merge(example, over), more))


def servers_of(name: str) -> list[dict[str, Any]]:
    """The servers that the example's plan speaks of."""
    found = plan(config.load(f"docs/examples/{name}/finetune.yaml"), advise=False)
    nodes = []
    for i, each in enumerate(found.groups):
        assert each.group.gpu is not None
        for k in range(each.group.workers // each.group.node_workers):
            nodes.append(site.node(f"server-{i}-{k}", each.group.node_workers, GPUS[each.group.gpu.name].products[0]))
    return nodes


@pytest.mark.parametrize("name", NAMES)
def test_the_examples_groups_find_their_servers(name: str, api: client.ApiClient, kube_config: str, wait_for: site.Wait) -> None:
    release, nodes = site.Release(api, kube_config, "try-groups"), servers_of(name)
    names = [n["metadata"]["name"] for n in nodes]
    products = {n["metadata"]["name"]: n["metadata"]["labels"][site.PRODUCT] for n in nodes}
    with site.servers(api, nodes):
        try:
            values = values_of(name, api)
            release.install(values)
            groups = values["ray-cluster"]["workerGroups"]
            wanted = sum(g["replicas"] for g in groups)

            def placed() -> bool:
                return len([p for p in release.pods("ray.io/node-type=worker") if p.spec.node_name]) == wanted

            wait_for(placed, 90, f"{wanted} workers on their servers")
            used = dict.fromkeys(names, 0)
            for group in groups:
                pods = release.workers(group["name"])
                assert len(pods) == group["replicas"]
                for pod in pods:
                    product = group.get("nodeSelector", {}).get(site.PRODUCT)
                    assert product in (None, products[pod.spec.node_name]), f"{pod.metadata.name} is on {pod.spec.node_name}"
                    used[pod.spec.node_name] += int(pod.spec.containers[0].resources.limits[site.GPU])
            assert used == {n["metadata"]["name"]: int(n["status"]["capacity"][site.GPU]) for n in nodes}, "every GPU, none twice"
            one_too_many(release, values, wait_for)
        finally:
            release.gone(names)


def one_too_many(release: site.Release, values: dict[str, Any], wait_for: site.Wait) -> None:
    """A server more than there are: its pod waits, says for what, and takes no other's GPUs."""
    group = values["ray-cluster"]["workerGroups"][0]
    group["replicas"] += 1
    release.install(values)

    def waiting() -> str:
        pods = [p for p in release.workers(group["name"]) if not p.spec.node_name]
        messages = [c.message for p in pods for c in p.status.conditions or [] if c.type == "PodScheduled" and c.message]
        return messages[0] if messages else ""

    assert f"Insufficient {site.GPU}" in wait_for(waiting, 120, "a pod that waits for GPUs")


def test_a_run_that_waits_for_servers_that_never_come_is_reported(api: client.ApiClient, kube_config: str, wait_for: site.Wait) -> None:
    """No node claims a GPU: on a cluster of its own the run ends by finetune-job.preRunningDeadlineSeconds instead of waiting for ever."""
    release = site.Release(api, kube_config, "try-groups")
    head = {"memory": "1Gi", "memoryRequest": "64Mi", "cpuRequest": "20m", "nodeSelector": {"kubernetes.io/hostname": "nowhere"}}
    try:
        release.install(values_of("workstation-8b-lora", api, **{
            "global": {"rayCluster": {"standing": False}}, "ray-cluster": {"head": head, "secretEnv": []},
            "finetune-job": {"enabled": True, "preRunningDeadlineSeconds": 20, "backoffLimit": 0}}))
        run = wait_for(lambda: next((r for r in release.runs() if r.get("status", {}).get("jobDeploymentStatus") == "Failed"), None), 120,
                       "the run's failure")
        assert "preRunningDeadlineSeconds" in run["status"]["message"] or "deadline" in run["status"]["message"].lower(), run["status"]
    finally:
        release.gone()
