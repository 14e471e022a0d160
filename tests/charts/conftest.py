"""Renders the umbrella chart with helm; every rendering is kept, so that tests may ask for the same one."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import yaml

from tools import charts

Values = dict[str, Any]
Manifest = dict[str, Any]

LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
NAMESPACE, RELEASE = "train", "site"

RUN = {"name": "pubmedqa", "model": {"path": "models/base"}, "data": {"sample": True}}


def join(*parts: Values) -> Values:
    """Values laid over each other, mappings joined."""
    joined: Values = {}
    for part in parts:
        for key, value in part.items():
            joined[key] = join(joined[key], value) if isinstance(value, dict) and isinstance(joined.get(key), dict) else value
    return joined


@cache
def _helm(values: str, notes: bool) -> tuple[int, str, str]:
    command = [charts.helm(), *(["install", "--dry-run=client", "--hide-notes=false"] if notes else ["template"]), RELEASE,
               str(charts.CHART),
               "--namespace", NAMESPACE, "--values", "-"]
    done = subprocess.run(command, input=values, capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, done.stdout, done.stderr


def helm(values: Values | None = None, notes: bool = False) -> tuple[int, str, str]:
    """Exit status, output and errors of helm with these values."""
    return _helm(json.dumps(values or {}, sort_keys=True), notes)


def text(values: Values | None = None) -> str:
    """What helm renders; the test fails with helm's message if it refuses."""
    code, out, err = helm(values)
    assert code == 0, err
    return out


def render(values: Values | None = None) -> list[Manifest]:
    """Rendered objects."""
    return [document for document in yaml.load_all(text(values), LOADER) if document]


def refusal(values: Values) -> str:
    """Helm's message; the test fails if it renders."""
    code, _, err = helm(values)
    assert code != 0, "helm rendered values that it should have refused"
    return " ".join(err.split())


def one(manifests: list[Manifest], kind: str, name: str | None = None) -> Manifest:
    """The one object of a kind (and name)."""
    found = [m for m in manifests if m["kind"] == kind and name in (None, m["metadata"]["name"])]
    assert len(found) == 1, [(m["kind"], m["metadata"]["name"]) for m in manifests]
    return found[0]


def pod_templates(manifest: Manifest) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, pod template) of every pod that an object makes."""
    kind, spec = manifest["kind"], manifest.get("spec", {})
    if kind in ("Deployment", "DaemonSet", "StatefulSet", "Job"):
        yield kind, spec["template"]
    elif kind == "CronJob":
        yield kind, spec["jobTemplate"]["spec"]["template"]
    elif kind == "Pod":
        yield kind, manifest
    elif kind == "RayCluster":
        yield "head", spec["headGroupSpec"]["template"]
        for group in spec["workerGroupSpecs"]:
            yield f"worker group {group['groupName']}", group["template"]
    elif kind == "RayJob":
        if "submitterPodTemplate" in spec:
            yield "submitter", spec["submitterPodTemplate"]
        if "rayClusterSpec" in spec:
            yield from pod_templates({"kind": "RayCluster", "spec": spec["rayClusterSpec"]})


MINIMAL: Values = {}
JOB: Values = {"finetune-job": {"enabled": True, "run": RUN}}
CHATBOT: Values = {"chatbot": {"enabled": True, "config": {"serve": {"run": "pubmedqa-0a1b2c3d4e"}}}}
GPU: Values = {"global": {"gpu": {"available": True}}}

SITES: dict[str, Values] = {
    "default": MINIMAL,
    "one node": join(JOB, CHATBOT, {
        "nfs-provisioner": {"mode": "nodePath", "nodePath": {"path": "/srv/storage"}},
        "ray-cluster": {"auth": {"secretName": "token"}, "head": {"dashboard": {"nodePort": 30265}}},
        "chatbot": {"service": {"type": "NodePort", "nodePort": 30786}, "strategy": "Recreate"},
        "finetune-job": {"submission": {"mode": "HTTPMode"}},
    }),
    "mixed GPUs": join(JOB, CHATBOT, GPU, {
        "global": {"podSecurity": {"level": "privileged"}, "monitoring": {"podMonitors": True, "dashboards": True},
                   "imagePullSecrets": ["registry"], "nodes": 5, "networkPolicy": {"monitoringNamespace": "monitoring"}},
        "nfs-provisioner": {"mode": "inCluster", "inCluster": {"nodeName": "disk-1", "hostPath": "/data", "clusterIP": "10.96.0.50",
                                                               "clients": ["10.0.0.0/24", "10.1.0.1"]}},
        "nvidia-device-plugin": {"enabled": True, "namespace": "gpu", "createRuntimeClass": True, "migStrategy": "single"},
        "kuberay-operator": {"replicas": 2, "rbac": {"autoscaler": True}, "batchScheduler": "volcano",
                             "featureGates": {"RayCronJob": True}},
        "ray-cluster": {
            "autoscaling": {"enabled": True},
            "secretEnv": [{"name": "HF_TOKEN", "secretName": "hugging-face", "key": "token"}],
            "workerGroups": [
                {"name": "h100", "replicas": 1, "minReplicas": 0, "maxReplicas": 2, "gpus": 4, "cpus": 48, "memory": "800Gi",
                 "shmSize": "64Gi",
                 "network": {"interface": "ens1", "hostNetwork": True,
                             "rdma": {"resourceName": "rdma/hca", "hca": "mlx5_0", "ipcLock": True,
                                                                               "gidIndex": 3}},
                 "scratch": {"kind": "hostPath", "hostPath": "/nvme"}, "onePerNode": True, "runtimeClassName": "nvidia",
                 "nodeSelector": {"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"}, "labels": {"gpu": "h100"},
                 "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}]},
                {"name": "a100", "replicas": 2, "gpus": 8, "cpus": 96, "memory": "900Gi", "shmSize": "64Gi",
                 "network": {"interface": "eth0"}},
            ]},
        "finetune-job": {"resources": {"workers": 12, "gpus_per_worker": 1}, "retention": {"enabled": True}, "env": {"NCCL_DEBUG": "INFO"},
                         "activeDeadlineSeconds": 86400},
        "chatbot": {"gpus": 1, "autoscaling": {"enabled": True}, "runtimeClassName": "nvidia",
                    "config": {"records": {"directory": "/storage/chatbot"},
                               "access": {"mode": "users", "users_file": "/secrets/users/users",
                                                                                       "session_key_file": "/secrets/users/key"}},
                    "secrets": [{"secretName": "users", "mountPath": "/secrets/users"}],
                    "ingress": {"enabled": True, "host": "chat.example.org", "className": "nginx", "tlsSecretName": "chat-tls",
                                "annotations": {"a": "b"}},
                    "networkPolicy": {"ingressNamespaces": ["ingress-nginx"]}},
    }),
    "vLLM": join(CHATBOT, GPU, {"global": {"images": {"vllm": {"tag": "v1"}}},
                                "chatbot": {"vllm": {"enabled": True, "gpus": 4},
                                            "config": {"engine": {"streams": 32, "context": 4096}}}}),
    "clusters of their own": join(JOB, GPU, {
        "global": {"rayCluster": {"standing": False}},
        "nfs-provisioner": {"mode": "external",
                            "external": {"server": "nfs.example.org", "path": "/export", "driverVersion": "4.13.4"}},
        "nvidia-device-plugin": {"enabled": True, "namespace": "gpu", "sharing": {"kind": "mps", "rename": False}},
        "ray-cluster": {"workerGroups": [{"name": "gpu", "gpus": 1, "volumes": [{"name": "extra", "emptyDir": {}}],
                                          "volumeMounts": [{"name": "extra", "mountPath": "/extra"}],
                                          "env": [{"name": "A", "value": "b"}]}]},
        "finetune-job": {"kueue": {"queue": "gpus", "priorityClass": "high"}, "preRunningDeadlineSeconds": 600},
    }),
    "dynamic volumes": join(JOB, {"nfs-provisioner": {"mode": "external", "external": {"server": "nfs", "provisioning": "dynamic",
                                                                                             "driverVersion": "4.13.4"}},
                                  "ray-cluster": {"auth": {"mode": "disabled"}, "kueue": {"queue": "standing"}},
                                  "kuberay-operator": {"watchNamespaces": ["train", "other"]}}),
}
"""Values that together use every branch of the templates."""


@pytest.fixture(params=list(SITES))
def site(request: pytest.FixtureRequest) -> Values:
    """Each of SITES."""
    return SITES[request.param]
