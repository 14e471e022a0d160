"""The network between the servers: flannel keeps, on each, the routes to the pods of the others."""

from __future__ import annotations

import json
from typing import Any

from tools.cluster.settings import Settings

NAMESPACE = "kube-flannel"
BACKENDS = {"host-gw": 0, "vxlan": 50}
"""Flannel's backends, with the bytes that each takes of a packet: plain routes for servers on one link, a tunnel for others."""
NO_NAT = "llm-finetune/nat"
"""Label (`no`) of a server whose kernel cannot translate addresses: kube-proxy does not run there."""


def manifests(settings: Settings, image: str, backend: str) -> list[dict[str, Any]]:
    """Everything that flannel is in the cluster. It asks the API server by its address: kube-proxy may come later than flannel."""
    name = {"name": "flannel", "namespace": NAMESPACE}
    labels = {"app.kubernetes.io/name": "flannel"}
    configuration = {"Network": settings.pod_network, "Backend": {"Type": backend}}
    daemon = {
        "name": "flannel", "image": image, "args": ["-address=$(HOST_IP)"],
        "env": [{"name": "NODE_NAME", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}},
                {"name": "HOST_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.hostIP"}}},
                {"name": "KUBERNETES_SERVICE_HOST", "value": settings.address},
                {"name": "KUBERNETES_SERVICE_PORT", "value": str(settings.api_port)}],
        "resources": {"requests": {"cpu": "20m", "memory": "50Mi"}},
        "securityContext": {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True,
                            "capabilities": {"drop": ["ALL"], "add": ["NET_ADMIN", "NET_RAW"]}},
        "volumeMounts": [{"name": "network", "mountPath": "/etc/kube-flannel"}]}
    return [
        {"apiVersion": "v1", "kind": "Namespace",
         "metadata": {"name": NAMESPACE, "labels": {"pod-security.kubernetes.io/enforce": "privileged"}}},  # host network, NET_ADMIN
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": name},
        {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole", "metadata": {"name": "flannel"},
         "rules": [{"apiGroups": [""], "resources": ["nodes"], "verbs": ["get", "list", "watch"]},
                   {"apiGroups": [""], "resources": ["nodes/status"], "verbs": ["patch"]}]},
        {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRoleBinding", "metadata": {"name": "flannel"},
         "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "flannel"},
         "subjects": [{"kind": "ServiceAccount", **name}]},
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": name, "data": {"net-conf.json": json.dumps(configuration)}},
        {"apiVersion": "apps/v1", "kind": "DaemonSet", "metadata": {**name, "labels": labels},
         "spec": {"selector": {"matchLabels": labels}, "template": {
             "metadata": {"labels": labels, "annotations": {"llm-finetune/network": json.dumps(configuration, sort_keys=True)}},
             "spec": {"hostNetwork": True, "serviceAccountName": "flannel", "priorityClassName": "system-node-critical",
                      "tolerations": [{"operator": "Exists"}], "containers": [daemon],
                      "volumes": [{"name": "network", "configMap": {"name": "flannel"}}]}}}},
    ]


def proxy_affinity() -> dict[str, Any]:
    """Part of kube-proxy's DaemonSet that keeps it off servers which cannot translate addresses."""
    term = {"matchExpressions": [{"key": NO_NAT, "operator": "NotIn", "values": ["no"]}]}
    return {"apiVersion": "apps/v1", "kind": "DaemonSet", "metadata": {"name": "kube-proxy", "namespace": "kube-system"},
            "spec": {"template": {"spec": {"affinity": {"nodeAffinity": {
                "requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [term]}}}}}}}
