"""The chart's PersistentVolume on the second node: its kubelet mounts it, by the kernel's NFS client, from the chart's own server."""

from __future__ import annotations

import json
from typing import Any

import pytest
from kubernetes import client

from tests.nodes.conftest import TAINT, Cluster
from tests.nodes.nfs import CLAIMS, UID, Server
from tests.waiting import wait_for

pytestmark = pytest.mark.timeout(900)
CLAIM = "llm-finetune-storage"
WRITE = """
import os
from pathlib import Path
folder = Path("/storage/run")
folder.mkdir()
with open(folder / "part", "wb") as file:
    file.write(bytes(range(256)) * 4096)
    os.fsync(file.fileno())
os.rename(folder / "part", folder / "whole")
"""
READ = """
import json, os
from pathlib import Path
path = Path("/storage/run/whole")
names = sorted(p.name for p in path.parent.iterdir())
mount = next(line.split() for line in open("/proc/mounts") if line.split()[1] == "/storage")
print(json.dumps({"right": path.read_bytes() == bytes(range(256)) * 4096, "names": names, "owner": path.stat().st_uid, "type": mount[2],
                  "options": mount[3]}))
"""


def pod(name: str, node: str, image: str, program: str) -> dict[str, Any]:
    """A pod as the chart's own: the restricted level, the trainer's user."""
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": CLAIMS}, "spec": {
        "nodeSelector": {"kubernetes.io/hostname": node}, "tolerations": [{"key": TAINT, "operator": "Exists"}], "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "securityContext": {"runAsNonRoot": True, "runAsUser": UID, "runAsGroup": UID, "seccompProfile": {"type": "RuntimeDefault"}},
        "containers": [{"name": "work", "image": image, "command": ["python3", "-c", program],
                        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
                        "volumeMounts": [{"name": "storage", "mountPath": "/storage"}]}],
        "volumes": [{"name": "storage", "persistentVolumeClaim": {"claimName": CLAIM}}]}}


def test_the_second_nodes_kubelet_mounts_the_volume(cluster: Cluster, server: Server, image: str) -> None:
    """Written by one pod there, read by another, and on the server's disk what was written; the mount is the chart's: hard, version 4.1."""
    core: client.CoreV1Api = cluster.core

    def said(name: str, node: str, program: str) -> str:
        cluster.apply(pod(name, node, image, program))

        def ended() -> Any:
            found = core.read_namespaced_pod(name, CLAIMS)
            assert found.status.phase != "Failed", core.read_namespaced_pod_log(name, CLAIMS)
            return found.status.phase == "Succeeded"
        wait_for(ended, 240, f"{name} ends")
        return str(core.read_namespaced_pod_log(name, CLAIMS))

    assert said("writer", cluster.guest.name, WRITE) == ""
    found = json.loads(said("reader", cluster.guest.name, READ))
    assert found["right"] and found["names"] == ["whole"] and found["owner"] == UID
    assert found["type"] == "nfs4" and {"hard", "vers=4.1", f"addr={server.address}"} <= set(found["options"].split(","))
    assert (server.storage / "run/whole").read_bytes() == bytes(range(256)) * 4096


def test_pods_of_the_second_node_wait_for_the_server(cluster: Cluster, server: Server, image: str) -> None:
    """A pod that starts while the server is away is not failed: it begins when the server is there again."""
    server.stop()
    cluster.apply(pod("late", cluster.guest.name, image, "print(len(__import__('os').listdir('/storage')))"))
    try:
        with pytest.raises(AssertionError, match="late runs: not within"):
            wait_for(lambda: cluster.core.read_namespaced_pod("late", CLAIMS).status.phase != "Pending", 20, "late runs")
    finally:
        server.start()
    wait_for(lambda: cluster.core.read_namespaced_pod("late", CLAIMS).status.phase == "Succeeded", 300, "late ends")
