"""What is broken on the local cluster, and how: each fault with what becomes of the training processes.

A fault blocks until it is over: what was stopped runs again when it returns, whatever happened in between.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from kubernetes import client
from kubernetes.client.exceptions import ApiException
from urllib3.exceptions import HTTPError

from tools import environments
from tools.cluster import daemons, kubernetes, registry, status
from tools.cluster.settings import Settings
from tools.layout import Layout

FIRST = int(os.environ.get("FIRST", "0"))
ATTEMPTS = range(FIRST, FIRST + int(os.environ.get("TRIES", "1")))
"""Numbers of the tries of each fault: they are the seeds, so ten can be done in parts."""
CONTROL_PLANE_AWAY = 60
"""Seconds for which a part of the control plane is stopped."""
CGROUPS = Path("/sys/fs/cgroup")


@dataclass
class Cluster:
    """The local cluster and the environment whose objects are broken."""

    api: client.ApiClient
    layout: Layout
    settings: Settings
    change: Callable[[str], None]
    """Pushes a small change (one more namespace that may reach the chatbot) under a name."""
    namespace: str = environments.namespace("local")
    changes: int = 0
    core: Any = field(init=False)
    apps: Any = field(init=False)
    custom: Any = field(init=False)
    policies: Any = field(init=False)

    def __post_init__(self) -> None:
        self.core, self.apps = client.CoreV1Api(self.api), client.AppsV1Api(self.api)
        self.custom, self.policies = client.CustomObjectsApi(self.api), client.NetworkingV1Api(self.api)

    def every_pod(self, selector: str, namespace: str = "") -> list[Any]:
        """Pods in whatever state, those that are being deleted too."""
        return list(self.core.list_namespaced_pod(namespace or self.namespace, label_selector=selector).items)

    def pods(self, selector: str, namespace: str = "") -> list[Any]:
        """Running pods that are not being deleted, by name."""
        running = (p for p in self.every_pod(selector, namespace) if p.status.phase == "Running" and not p.metadata.deletion_timestamp)
        return sorted(running, key=lambda p: p.metadata.name)

    def kill_pod(self, selector: str, chosen: random.Random, grace: int = 0) -> str:
        """The pod of an earlier fault may not have a successor yet: a Job waits longer after each."""
        name = str(chosen.choice(until(lambda: self.pods(selector), 120, f"a running pod of {selector}")).metadata.name)
        self.core.delete_namespaced_pod(name, self.namespace, grace_period_seconds=grace)
        return name

    def push_change(self) -> str:
        """Returns the name of the namespace that the pushed policy lets in."""
        self.changes += 1
        name = f"from-push-{self.changes}-{time.time():.0f}"
        self.change(name)
        return name

    def applied(self, name: str) -> bool:
        """Whether a pushed change has reached the cluster."""
        policy = self.policies.read_namespaced_network_policy("llm-finetune-chatbot", self.namespace)
        return name in str(policy.spec.ingress)


def until(question: Callable[[], Any], seconds: float, what: str, every: float = 0.5) -> Any:
    """Poll until the answer is true. An API server that is not there (yet) has not answered."""
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(HTTPError, ApiException, OSError):
            if answer := question():
                return answer
        assert time.monotonic() < deadline, f"{what}: not within {seconds:.0f} s"
        time.sleep(every)


def record(**values: Any) -> None:
    """Show a try's result, and keep it for benchmarks/table.py."""
    print(json.dumps(values), flush=True)
    if out := os.environ.get("FAULTS_OUT"):
        with open(out, "a") as file:
            file.write(json.dumps(values) + "\n")


# Pods and processes ---------------------------------------------------------------------------------------------------------------

def kill_worker(cluster: Cluster, chosen: random.Random, run: str) -> str:
    return cluster.kill_pod("ray.io/node-type=worker", chosen)


def drain_worker(cluster: Cluster, chosen: random.Random, run: str) -> str:
    return cluster.kill_pod("ray.io/node-type=worker", chosen, grace=60)


def kill_head(cluster: Cluster, chosen: random.Random, run: str) -> str:
    return cluster.kill_pod("ray.io/node-type=head", chosen)


def kill_submitter(cluster: Cluster, chosen: random.Random, run: str) -> str:
    return cluster.kill_pod(f"job-name={run}", chosen)


def kill_operator(cluster: Cluster, chosen: random.Random, run: str) -> str:
    return cluster.kill_pod("app.kubernetes.io/name=kuberay-operator", chosen)


def delete_cluster(cluster: Cluster, chosen: random.Random, run: str) -> str:
    name = str(cluster.custom.list_namespaced_custom_object(*status.RAY, cluster.namespace, "rayclusters")["items"][0]["metadata"]["name"])
    cluster.custom.delete_namespaced_custom_object(*status.RAY, cluster.namespace, "rayclusters", name)
    return name


def training_processes() -> list[int]:
    """Of all workers on this node; not what one of them starts, which bears its name until it becomes another program (DeepSpeed on the
    CPU asks `numactl` now and then)."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if path.read_bytes().startswith(b"ray::RayTrainWorker"):
                parents[int(path.parent.name)] = int(path.with_name("stat").read_text().rpartition(")")[2].split()[1])
    return sorted(pid for pid, parent in parents.items() if parent not in parents)


def kill_training_process(cluster: Cluster, chosen: random.Random, run: str) -> str:
    pid = chosen.choice(training_processes())
    os.kill(pid, 9)
    return f"process {pid}"


@contextlib.contextmanager
def less_memory(pid: int, spare: int) -> Iterator[Callable[[float], None]]:
    """The container of a process may hold no more than now (what the kernel could drop not counted) and `spare` bytes. Yields what sets
    the limit to a share of what it held: once the process is gone the next one cannot come as far."""
    groups = dict(line.split(":", 2)[1:] for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines())
    path = next((p for names, p in groups.items() if "memory" in names.split(",")), None)
    folder = CGROUPS / "memory" / path.lstrip("/") if path else CGROUPS / groups[""].lstrip("/")
    limit = folder / ("memory.limit_in_bytes" if path else "memory.max")
    stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    held = sum(int(stat.get(key, 0)) for key in (("total_rss", "total_shmem") if path else ("anon", "shmem")))
    kept = limit.read_text()

    def lower(share: float) -> None:  # refused while what the process held is not all given back
        until(lambda: limit.write_text(str(int(held * share))), 10, f"{limit} lowered to {share:.0%}", every=0.1)

    try:
        for _ in range(64):
            with contextlib.suppress(OSError):  # cgroup 1 refuses a limit that it cannot reach by dropping caches
                limit.write_text(str(held + spare))
                break
            spare += 4 << 20
        else:
            raise AssertionError(f"{limit} could not be lowered")
        yield lower
    finally:
        with contextlib.suppress(FileNotFoundError):  # the container went with its process; the next one has a limit of its own
            limit.write_text(kept)


@contextlib.contextmanager
def out_of_memory(pid: int) -> Iterator[Callable[[float], None]]:
    """As less_memory; entered once the kernel, or Ray before it, has ended the process."""
    with less_memory(pid, 1 << 20) as lower:
        until(lambda: pid not in training_processes(), 60, "the end of the process that lacks memory", every=0.1)
        yield lower


def take_memory(cluster: Cluster, chosen: random.Random, run: str) -> str:
    """A worker's limit is lowered below what it needs, once."""
    pid = chosen.choice(training_processes())
    with out_of_memory(pid):
        return f"process {pid}"


# The node and the control plane ------------------------------------------------------------------------------------------------------

def restart_kubelet(cluster: Cluster, chosen: random.Random, run: str) -> str:
    daemon = kubernetes.kubelet(cluster.layout, kubernetes.Server(cluster.settings.name, cluster.settings.address))
    daemons.stop(daemon.pid_file(cluster.layout))
    time.sleep(chosen.uniform(0, 5))
    daemon.start(cluster.layout)
    return "kubelet"


def restart_containerd(cluster: Cluster, chosen: random.Random, run: str) -> str:
    daemon = kubernetes.containerd(cluster.layout, cluster.settings)
    daemons.stop(daemon.pid_file(cluster.layout))
    time.sleep(chosen.uniform(0, 5))
    daemon.start(cluster.layout)
    return "containerd"


def _stop_static_pod(cluster: Cluster, name: str) -> str:
    """The kubelet stops a static pod when its manifest goes, and starts it when it is there again."""
    manifest, aside = kubernetes.ETC / f"manifests/{name}.yaml", kubernetes.ETC / f"{name}.aside"
    manifest.rename(aside)
    try:
        until(lambda: not kubernetes.api_ready(cluster.settings), 60, f"the end of {name}")
        time.sleep(CONTROL_PLANE_AWAY)
    finally:
        aside.rename(manifest)
    until(lambda: kubernetes.api_ready(cluster.settings), 180, "the API server")
    return name


def stop_api_server(cluster: Cluster, chosen: random.Random, run: str) -> str:
    return _stop_static_pod(cluster, "kube-apiserver")


def stop_etcd(cluster: Cluster, chosen: random.Random, run: str) -> str:
    return _stop_static_pod(cluster, "etcd")


# The delivery: each is away while a change is pushed, which must be there soon after it is back ----------------------------------------

SYNCED = 180
"""Seconds within which a change that was pushed meanwhile reaches the cluster."""


def stop_argocd(cluster: Cluster, chosen: random.Random, run: str) -> str:
    space = status.ARGO[2]
    scales = [*((cluster.apps.patch_namespaced_deployment_scale, d.metadata.name, d.spec.replicas)
                for d in cluster.apps.list_namespaced_deployment(space).items),
              *((cluster.apps.patch_namespaced_stateful_set_scale, s.metadata.name, s.spec.replicas)
                for s in cluster.apps.list_namespaced_stateful_set(space).items)]
    try:
        for scale, name, _ in scales:
            scale(name, space, {"spec": {"replicas": 0}})
        until(lambda: not cluster.core.list_namespaced_pod(space).items, 90, "the end of Argo CD")
        change = cluster.push_change()
        time.sleep(20)
        assert not cluster.applied(change)
    finally:
        for scale, name, replicas in scales:
            scale(name, space, {"spec": {"replicas": replicas}})
    until(lambda: cluster.applied(change), SYNCED, "the change that was pushed without Argo CD")
    return "all of Argo CD"


def stop_git(cluster: Cluster, chosen: random.Random, run: str) -> str:
    daemon = registry.git_server(cluster.layout, cluster.settings)
    daemons.stop(daemon.pid_file(cluster.layout))
    try:
        change = cluster.push_change()
        time.sleep(20)
        assert not cluster.applied(change)
    finally:
        daemon.start(cluster.layout)
    until(lambda: cluster.applied(change), SYNCED, "the change that was pushed without a git server")
    return "git server"


def stop_registry(cluster: Cluster, chosen: random.Random, run: str) -> str:
    """Right after a push: Argo CD asks the registry for the chart in the middle of its sync."""
    daemon = registry.registry(cluster.layout, cluster.settings)
    change = cluster.push_change()
    time.sleep(chosen.uniform(0, 10))
    daemons.stop(daemon.pid_file(cluster.layout))
    try:
        time.sleep(30)
    finally:
        daemon.start(cluster.layout)
    until(lambda: cluster.applied(change), SYNCED, "the change that was pushed before the registry went")
    return "registry"


@dataclass(frozen=True)
class Fault:
    """One kind of fault."""

    name: str
    do: Callable[[Cluster, random.Random, str], str]
    """Returns what was hit."""
    restarts: bool
    """Whether training processes are lost with it; if not, training must not even notice."""


@dataclass(frozen=True)
class Part:
    """Faults that one run takes one after the other, in an order that each try draws anew."""

    name: str
    steps: int
    """Length of the run for one try: what is stopped for a minute must not outlast it."""
    faults: tuple[Fault, ...]
    together: int = 1
    """Tries that share a run. A lost head or submitter costs a retry, with twice the pause each time, so of those only few do."""


PARTS = (
    Part("workers", 60, (
        Fault("worker pod killed", kill_worker, True), Fault("worker pod drained (SIGTERM)", drain_worker, True),
        Fault("training process killed", kill_training_process, True), Fault("worker out of memory, once", take_memory, True)), together=5),
    Part("beside the run", 60, (
        Fault("submitter pod killed", kill_submitter, False), Fault("operator pod killed", kill_operator, False),
        Fault("kubelet restarted", restart_kubelet, False), Fault("containerd restarted", restart_containerd, False)), together=3),
    Part("control plane", 300, (  # after etcd's minute the kubelet holds the API server back for up to two more
        Fault("API server stopped for 60 s", stop_api_server, False), Fault("etcd stopped for 60 s", stop_etcd, False))),
    Part("delivery", 120, (
        Fault("Argo CD down", stop_argocd, False), Fault("git down", stop_git, False),
        Fault("registry down during a sync", stop_registry, False)), together=2),
    Part("cluster", 60, (Fault("head pod killed", kill_head, True), Fault("RayCluster deleted", delete_cluster, True))),
)


def let_in(checkout: Path, name: str) -> None:
    """Edit a clone's site.yaml so that the chatbot's NetworkPolicy lets one more namespace in: a change that restarts nothing."""
    path = checkout / "environments/local/site.yaml"
    document = yaml.safe_load(path.read_text())
    document.setdefault("chatbot", {}).setdefault("networkPolicy", {})["ingressNamespaces"] = [re.sub(r"[^a-z0-9-]", "-", name)]
    path.write_text(yaml.safe_dump(document, sort_keys=False))
