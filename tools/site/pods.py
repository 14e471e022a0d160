"""The check's pods: one on every node that a worker group of the environment chooses, made like the group's own workers.

They come from the rendered chart (image, selectors, tolerations, runtime class, network, security context, storage), so what is measured
is what training gets. Each is a Job, which ends and goes by itself if this program is killed; everything else belongs to the Jobs.
"""

from __future__ import annotations

import copy
import json
import re
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kubernetes import client
from kubernetes.client.exceptions import ApiException
from kubernetes.stream import stream

from tools.cluster.status import trouble
from tools.diff import Objects
from tools.errors import OperatorError
from tools.layout import REPOSITORY

MODULE = REPOSITORY / "trainer/sitecheck"
MODULE_IN_IMAGE = "/opt/llm-finetune/trainer/sitecheck"
"""Where images/trainer/Dockerfile puts it."""
CONTAINER = "site-check"
NAME_LABEL = {"app.kubernetes.io/name": "site-check"}
KEPT = ("automountServiceAccountToken", "enableServiceLinks", "imagePullSecrets", "securityContext", "runtimeClassName", "tolerations",
        "hostNetwork", "dnsPolicy")
"""Of a worker's pod. Its priority is left out: a check pushes nobody aside."""
VOLUMES = ("storage", "tmp", "shm")
TTL = 60
"""Seconds after which an ended Job is removed by the cluster."""


@dataclass(frozen=True)
class Group:
    """A worker group as the chart renders it."""

    name: str
    replicas: int
    pod: Mapping[str, Any]
    """Specification of its workers."""
    gpu_resource: str

    @property
    def container(self) -> Mapping[str, Any]:
        return dict(self.pod["containers"][0])

    @property
    def gpus(self) -> int:
        """Of one worker."""
        return int(self.container["resources"].get("limits", {}).get(self.gpu_resource, 0))

    @property
    def selector(self) -> Mapping[str, str]:
        return dict(self.pod.get("nodeSelector", {}))

    @property
    def storage(self) -> str:
        """Where the shared storage is mounted."""
        return next(str(m["mountPath"]) for m in self.container["volumeMounts"] if m["name"] == "storage")


def groups(objects: Objects, gpu_resource: str) -> list[Group]:
    """The worker groups of an environment's rendered objects. Raises OperatorError if it has none."""
    specs = [m["spec"] for k, m in objects.items() if k[0] == "RayCluster"]
    specs += [m["spec"]["rayClusterSpec"] for k, m in objects.items() if k[0] == "RayJob" and "rayClusterSpec" in m["spec"]]
    if not specs:
        raise OperatorError("The environment has no Ray cluster: set ray-cluster.enabled: true, so that there are nodes to check.")
    return [Group(g["groupName"], int(g.get("replicas", g.get("maxReplicas", 1))), g["template"]["spec"], gpu_resource)
            for g in specs[0]["workerGroupSpecs"]]


def configuration(objects: Objects) -> str:
    """The run's configuration as the RayJob carries it; empty if the environment describes no run."""
    import yaml

    for key, manifest in objects.items():
        if key[0] == "RayJob":
            variables = (yaml.safe_load(manifest["spec"].get("runtimeEnvYAML", "")) or {}).get("env_vars", {})
            return str(variables.get("LLM_FINETUNE_CONFIG", ""))
    return ""


def quantity(value: Any) -> float:
    """A Kubernetes quantity (500m, 16Gi) as a number."""
    text = str(value)
    units = {"m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
    match = re.fullmatch(r"([0-9.]+(?:e[0-9]+)?)(m|k|M|G|T|Ki|Mi|Gi|Ti)?", text)
    if not match:
        raise OperatorError(f"{text!r} is no quantity that is known here.")
    return float(match[1]) * units.get(match[2] or "", 1.0)


@dataclass
class Node:
    """A node of the cluster, and the group that would have its workers there."""

    name: str
    ready: bool
    why: str
    """Why it is not ready, or takes no pods."""
    allocatable: dict[str, float]
    labels: dict[str, str]
    group: str = ""
    fits: int = 0
    """Workers of the group that it could take if nothing else ran there."""
    gpus_used: int = 0


def _tolerated(taint: Any, tolerations: Sequence[Mapping[str, Any]]) -> bool:
    return any((not t.get("key") or t["key"] == taint.key) and (t.get("operator") == "Exists" or t.get("value", "") == (taint.value or ""))
               and t.get("effect", taint.effect) == taint.effect for t in tolerations)


def _fits(node: Node, group: Group) -> int:
    resources = group.container["resources"]
    wanted = {**resources.get("limits", {}), **resources.get("requests", {})}  # only limits of extended resources count as requests
    counted = {k: quantity(v) for k, v in wanted.items() if k in resources.get("requests", {}) or k not in ("cpu", "memory")}
    return min((int(node.allocatable.get(k, 0) // v) for k, v in counted.items() if v), default=0)


def choose(api_nodes: Sequence[Any], found: Sequence[Group]) -> list[Node]:
    """All nodes, each with the group that chooses it: the one that asks for most GPUs, then the one with the closest selector."""
    nodes = []
    ranked = sorted(found, key=lambda g: (-g.gpus, -len(g.selector)))
    for one in api_nodes:
        ready = next((c for c in one.status.conditions or [] if c.type == "Ready"), None)
        why = "" if ready and ready.status == "True" else (ready.message if ready and ready.message else "no state is reported")
        if one.spec.unschedulable:
            why = why or "cordoned (kubectl uncordon)"
        labels = one.metadata.labels or {}
        node = Node(one.metadata.name, not why, why, {k: quantity(v) for k, v in (one.status.allocatable or {}).items()}, labels)
        taints = [t for t in one.spec.taints or [] if t.effect in ("NoSchedule", "NoExecute")]
        for group in ranked:
            enough = bool(group.selector) or node.allocatable.get(group.gpu_resource, 0) >= group.gpus
            tolerated = all(_tolerated(t, group.pod.get("tolerations", [])) for t in taints) or bool(one.spec.unschedulable or why)
            if enough and tolerated and group.selector.items() <= labels.items():
                node.group, node.fits = group.name, _fits(node, group)
                break
        nodes.append(node)
    return nodes


@dataclass
class Pod:
    """One pod of the check."""

    job: str
    node: str
    group: str
    gpus: int
    storage: str
    name: str = ""
    address: str = ""
    running: bool = False
    why: str = ""
    """Why it does not run."""
    pull_seconds: float | None = None
    """Image pull; None if it was there."""
    image_bytes: int = 0
    start_seconds: float = 0.0
    """From the Job's making to the running container."""
    label: str = field(default="")
    """How it is called in tables: the node, with a number if the node has several."""


def job(pod: Pod, group: Group, identity: str, seconds: int, config: str) -> dict[str, Any]:
    """The Job of one pod. `seconds`: how long it lives at most."""
    labels = {**NAME_LABEL, "app.kubernetes.io/instance": identity, "app.kubernetes.io/managed-by": "site-check"}
    spec = {k: copy.deepcopy(group.pod[k]) for k in KEPT if k in group.pod}
    own = group.container
    limits = {k: v for k, v in own["resources"].get("limits", {}).items() if k == "memory" or (pod.gpus and k not in ("cpu", "memory"))}
    if pod.gpus:
        limits[group.gpu_resource] = pod.gpus
    environment = [e for e in own.get("env", []) if "value" in e]
    if not pod.gpus and not any(e["name"] == "NVIDIA_VISIBLE_DEVICES" for e in environment):
        environment.append({"name": "NVIDIA_VISIBLE_DEVICES", "value": "void"})
    environment += [{"name": "OMP_NUM_THREADS", "value": "1"}, {"name": "LLM_FINETUNE_CONFIG", "value": config}]
    spec.update({
        "restartPolicy": "Never", "terminationGracePeriodSeconds": 1,
        "affinity": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [
            {"matchFields": [{"key": "metadata.name", "operator": "In", "values": [pod.node]}]}]}}},
        "containers": [{
            "name": CONTAINER, "image": own["image"], "imagePullPolicy": own.get("imagePullPolicy", "IfNotPresent"),
            # `args`: the image's first process, which passes signals on, stays.
            "args": ["python", "-m", "trainer.sitecheck", "serve", "--seconds", str(seconds)], "env": environment,
            "resources": {"requests": {"cpu": "100m", "memory": "256Mi"}, "limits": limits}, "securityContext": own["securityContext"],
            "volumeMounts": [*(m for m in own["volumeMounts"] if m["name"] in VOLUMES),
                             {"name": "module", "mountPath": MODULE_IN_IMAGE, "readOnly": True}]}],
        "volumes": [*(v for v in group.pod["volumes"] if v["name"] in VOLUMES), {"name": "module", "configMap": {"name": identity}}]})
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": pod.job, "labels": labels},
            "spec": {"backoffLimit": 0, "activeDeadlineSeconds": seconds, "ttlSecondsAfterFinished": TTL,
                     "template": {"metadata": {"labels": labels}, "spec": spec}}}


def companions(identity: str, owners: list[dict[str, Any]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """ConfigMap with the module, and the NetworkPolicy that lets the pods reach each other and nothing else; both go with the Jobs."""
    labels = {**NAME_LABEL, "app.kubernetes.io/instance": identity, "app.kubernetes.io/managed-by": "site-check"}
    metadata = {"name": identity, "labels": labels, "ownerReferences": owners}
    among = [{"podSelector": {"matchLabels": NAME_LABEL}}]
    return ({"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata,
             "data": {p.name: p.read_text(encoding="utf-8") for p in sorted(MODULE.glob("*.py"))}},
            {"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": metadata,
             "spec": {"podSelector": {"matchLabels": NAME_LABEL}, "policyTypes": ["Ingress", "Egress"], "ingress": [{"from": among}],
                      "egress": [{"to": among}, {"ports": [{"port": 53, "protocol": "UDP"}, {"port": 53, "protocol": "TCP"}]}]}})


def pulled(messages: Sequence[str]) -> tuple[float | None, int]:
    """(seconds, bytes) of the kubelet's events about an image; None if it was on the node."""
    for message in messages:
        if match := re.search(r"Successfully pulled image .* in ([0-9.hms]+)", message):
            parts = re.findall(r"([0-9.]+)(ms|h|m|s)", match[1])
            seconds = sum(float(n) * {"h": 3600, "m": 60, "s": 1, "ms": 1e-3}[u] for n, u in parts)
            size = re.search(r"Image size: (\d+)", message)
            return seconds, int(size[1]) if size else 0
    return None, 0


class Pods:
    """The pods of one check in a namespace; a context manager that leaves nothing behind."""

    def __init__(self, api: client.ApiClient, namespace: str, say: Callable[[str], None]) -> None:
        self.api, self.namespace, self.say = api, namespace, say
        # The generated types know no plain manifests.
        self.core: Any = client.CoreV1Api(api)
        self.batch: Any = client.BatchV1Api(api)
        self.policies: Any = client.NetworkingV1Api(api)
        self.identity = f"site-check-{secrets.token_hex(3)}"
        self.pods: list[Pod] = []

    def used_gpus(self, node: str, resource: str) -> int:
        """GPUs of a node that other pods hold; 0 if this user may not see them."""
        try:
            pods: list[Any] = self.core.list_pod_for_all_namespaces(
                field_selector=f"spec.nodeName={node},status.phase!=Succeeded,status.phase!=Failed").items
        except ApiException as error:
            if error.status == 403:
                return 0
            raise
        return sum(int((c.resources.limits or {}).get(resource, 0)) for p in pods for c in p.spec.containers if c.resources)

    def start(self, pods: list[Pod], found: Mapping[str, Group], config: str, seconds: int) -> None:
        """Make everything. Raises OperatorError if a check is under way in the namespace, or the cluster refuses."""
        there: list[Any] = self.batch.list_namespaced_job(
            self.namespace, label_selector=",".join(f"{k}={v}" for k, v in NAME_LABEL.items())).items
        if there:
            raise OperatorError(f"A site check is at work in {self.namespace} ({there[0].metadata.name}), or was killed. Its pods end by "
                                f"themselves; or: kubectl -n {self.namespace} delete job -l app.kubernetes.io/name=site-check")
        self.pods = pods
        try:
            owners = []
            for number, pod in enumerate(pods):
                pod.job = f"{self.identity}-{number}"
                made: Any = self.batch.create_namespaced_job(self.namespace, job(pod, found[pod.group], self.identity, seconds, config))
                owners.append({"apiVersion": "batch/v1", "kind": "Job", "name": pod.job, "uid": made.metadata.uid})
            module, policy = companions(self.identity, owners)
            self.core.create_namespaced_config_map(self.namespace, module)
            self.policies.create_namespaced_network_policy(self.namespace, policy)
        except ApiException as error:
            raise OperatorError(f"The cluster refuses the check's objects in {self.namespace}: {_message(error)}") from None

    def wait(self, patience: float) -> None:
        """Until every pod runs, or cannot, or `patience` seconds have passed."""
        begin, last = time.monotonic(), 0.0
        while True:
            left = [p for p in self.pods if not p.running and not p.why.startswith("ended")]
            by_job = {p.metadata.labels.get("job-name", ""): p for p in self._list()}
            for pod in left:
                self._look(pod, by_job.get(pod.job), time.monotonic() - begin)
            left = [p for p in self.pods if not p.running and not p.why.startswith("ended")]
            if not left or time.monotonic() - begin > patience:
                return
            if time.monotonic() - last > 15:
                last = time.monotonic()
                self.say(f"waiting for {len(left)} of {len(self.pods)} pods" + (f": {left[0].why}" if left[0].why else ""))
            time.sleep(0.5)

    def _list(self) -> list[Any]:
        return list(self.core.list_namespaced_pod(self.namespace, label_selector=f"app.kubernetes.io/instance={self.identity}").items)

    def _look(self, pod: Pod, there: Any, seconds: float) -> None:
        if there is None:
            found: list[Any] = self.core.list_namespaced_event(
                self.namespace, field_selector=f"involvedObject.name={pod.job},type=Warning").items
            pod.why = found[-1].message if found else "the Job has not made its pod yet"
            return
        pod.name, state = there.metadata.name, (there.status.container_statuses or [None])[0]
        if there.status.phase in ("Failed", "Succeeded"):
            ended = state.state.terminated if state and state.state else None
            pod.why = f"ended: {(ended.message or ended.reason) if ended else there.status.message or there.status.reason}"
        elif state and state.state.running and there.status.pod_ip:
            pod.running, pod.why, pod.address, pod.start_seconds = True, "", there.status.pod_ip, seconds
            events: list[Any] = self.core.list_namespaced_event(
                self.namespace, field_selector=f"involvedObject.uid={there.metadata.uid},reason=Pulled").items
            pod.pull_seconds, pod.image_bytes = pulled([e.message or "" for e in events])
        else:
            pod.why = trouble(self.core, there)

    def call(self, pod: Pod, *words: str, timeout: float = 180.0) -> dict[str, Any]:
        """Run a measurement in a pod; its JSON, or {"error": why}. Several at once are fine."""
        api = client.CoreV1Api(client.ApiClient(self.api.configuration))  # `stream` changes its client while it is at work
        try:
            answer = stream(api.connect_get_namespaced_pod_exec, pod.name, self.namespace, container=CONTAINER,
                            command=["python", "-m", "trainer.sitecheck", *words], stderr=True, stdin=False, stdout=True, tty=False,
                            _preload_content=False)
            answer.run_forever(timeout=timeout)
            output, errors = answer.read_stdout() or "", answer.read_stderr() or ""
            if answer.is_open():
                answer.close()
                return {"error": f"no answer within {timeout:.0f} s"}
        except (ApiException, OSError) as error:
            if isinstance(error.__context__, KeyboardInterrupt):  # `stream` turns it into an ApiException
                raise error.__context__ from None
            return {"error": f"exec in {pod.name}: {_message(error)}"}
        try:
            return dict(json.loads(output.strip().splitlines()[-1]))
        except (IndexError, ValueError):
            return {"error": (errors or output).strip()[-300:] or "it ended without an answer"}

    def remove(self, patience: float = 60.0) -> None:
        """Delete everything with this check's label, and wait until the pods are gone."""
        selector = f"app.kubernetes.io/instance={self.identity}"
        self.batch.delete_collection_namespaced_job(self.namespace, label_selector=selector, propagation_policy="Background")
        self.core.delete_collection_namespaced_config_map(self.namespace, label_selector=selector)
        self.policies.delete_collection_namespaced_network_policy(self.namespace, label_selector=selector)
        until = time.monotonic() + patience
        while self._list() and time.monotonic() < until:
            time.sleep(0.5)

    def __enter__(self) -> Pods:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def _message(error: Exception) -> str:
    """The API server's words."""
    if isinstance(error, ApiException):
        try:
            return str(json.loads(error.body or "")["message"])
        except (ValueError, KeyError, TypeError):
            return f"{error.status} {error.reason}"
    return f"{type(error).__name__}: {error}"


def rounds(count: int) -> list[list[tuple[int, int]]]:
    """All pairs of `count` pods in rounds in which nobody is in two pairs (a round-robin tournament)."""
    seats: list[int | None] = [*range(count), *([None] if count % 2 else [])]
    found = []
    for _ in range(len(seats) - 1):
        half = len(seats) // 2
        found.append([(a, b) for a, b in zip(seats[:half], reversed(seats[half:])) if a is not None and b is not None])
        seats = [seats[0], seats[-1], *seats[1:-1]]
    return found


def module_files(folder: Path = MODULE) -> list[str]:
    """Names of the files that travel into the pods."""
    return sorted(p.name for p in folder.glob("*.py"))
