"""A second server, which is a guest on this machine (tests/nodes/guest.py), and the local cluster that it joins by `make site-join`."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from kubernetes import client

from tests.nodes.guest import Guest
from tests.nodes.nfs import DISK_GIB, Disk, Server, seen_from_the_network
from tests.waiting import wait_for
from tools.cluster import kubernetes
from tools.cluster.settings import Settings
from tools.layout import REPOSITORY, Layout

NAMESPACE = "llm-finetune-nodes"
TAINT = "llm-finetune/guest"
"""Keeps the local cluster's own pods off the guest, which is slow and short-lived."""


@pytest.fixture(scope="session")
def layout() -> Layout:
    return Layout()


@pytest.fixture(scope="session")
def settings() -> Settings:
    return Settings()


@pytest.fixture(scope="session")
def guest() -> Iterator[Guest]:
    """Booted from an empty disk; taken away at the end."""
    guest = Guest()
    guest.remove()
    guest.build()
    guest.boot()
    yield guest
    guest.remove()


@pytest.fixture(scope="session")
def record() -> Callable[..., None]:
    """Print a measured figure, and add it to the file NODES_OUT if that is set."""
    def write(what: str, **figures: Any) -> None:
        line = json.dumps({"what": what, **figures})
        print(line, flush=True)
        if out := os.environ.get("NODES_OUT"):
            with open(out, "a") as file:
                file.write(line + "\n")
    return write


@pytest.fixture(scope="module")
def server(layout: Layout, settings: Settings) -> Iterator[Server]:
    """The chart's own NFS server."""
    found = Server(layout, settings, kubernetes.api_client(layout), Disk(layout.cache / "tests/nfs", DISK_GIB))
    found.remove()
    found.disk.make()
    found.install([seen_from_the_network(settings)], [f"10.{settings.octet}.{host}" for host in ("0.2", "0.3", "201.2")])  # the guests
    yield found
    found.remove()


@dataclass
class Cluster:
    """The local cluster with its second node."""

    layout: Layout
    settings: Settings
    guest: Guest
    invitation: str = ""
    """What `make site-up` prints for further servers, from `make` on."""
    core: client.CoreV1Api = field(init=False)
    apps: client.AppsV1Api = field(init=False)

    def __post_init__(self) -> None:
        api = kubernetes.api_client(self.layout)
        self.core, self.apps = client.CoreV1Api(api), client.AppsV1Api(api)

    @property
    def first(self) -> str:
        return self.settings.name

    def open(self) -> None:
        """`make site-up` on the local cluster."""
        done = subprocess.run([sys.executable, "-m", "tools", "site-up"], cwd=REPOSITORY, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        found = re.search(r"make site-join (.*?)\n\n", done.stdout, re.S)
        assert found, done.stdout
        self.invitation = f"make site-join {found[1].replace(chr(92), ' ')}"

    def join(self, timeout: float = 600) -> float:
        """Run the printed command in the guest; returns how long it took."""
        began = time.monotonic()
        command = " ".join(self.invitation.split())
        self.guest.run(f"cd {REPOSITORY} && export HOME={Path.home()} LLM_FINETUNE_CACHE={self.layout.cache} && "
                       f"{command} TAINTS={TAINT}=yes:NoSchedule NAT=no", timeout=timeout)
        return time.monotonic() - began

    def ready(self, node: str) -> bool:
        """Whether the API server holds the node for Ready."""
        found: Any = self.core.read_node(node).status.conditions
        return any(c.type == "Ready" and c.status == "True" for c in found)

    def kubectl(self, *words: str, stdin: str | None = None, timeout: float = 120) -> str:
        done = subprocess.run([str(self.layout.kubectl), "--namespace", NAMESPACE, *words], capture_output=True, text=True, input=stdin,
                              env={**os.environ, **self.layout.environment()}, timeout=timeout, check=False)
        assert done.returncode == 0, f"kubectl {' '.join(words)}: {done.stderr}"
        return done.stdout

    def apply(self, *manifests: dict[str, Any]) -> None:
        kubernetes.apply(self.layout, list(manifests))

    def python(self, pod: str, program: str) -> str:
        """Run Python in a pod."""
        return self.kubectl("exec", pod, "--", "python3", "-c", program).strip()

    def pods(self, app: str) -> list[Any]:
        """Pods of an app that are not being deleted."""
        found: list[Any] = self.core.list_namespaced_pod(NAMESPACE, label_selector=f"app={app}").items
        return [pod for pod in found if not pod.metadata.deletion_timestamp]

    def ready_pods(self, app: str, node: str) -> list[Any]:
        return [p for p in self.pods(app) if p.spec.node_name == node
                and any(c.type == "Ready" and c.status == "True" for c in p.status.conditions or [])]


@pytest.fixture(scope="session")
def cluster(layout: Layout, settings: Settings, guest: Guest, record: Callable[..., None]) -> Iterator[Cluster]:
    """The local cluster, opened by `make site-up` and joined by the guest; the second node is deleted at the end."""
    made = Cluster(layout, settings, guest)
    made.open()
    record("second node joined", took=round(made.join(), 1))
    made.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}})
    yield made
    made.core.delete_namespace(NAMESPACE, grace_period_seconds=0)
    guest.kill()
    made.core.delete_node(guest.name)
    wait_for(lambda: not any(n.metadata.name == NAMESPACE for n in made.core.list_namespace().items), 120, f"the end of {NAMESPACE}")


def http_server(app: str, image: str, *, replicas: int = 1, node: str = "", prefer: str = "", stay: int = 300) -> list[dict[str, Any]]:
    """A Deployment of a small HTTP server that answers with its pod's name, and its Service.

    `node`: must run there; `prefer`: starts there; `stay`: seconds on a node that is lost.
    """
    program = ("import http.server, os\n"
               "class Handler(http.server.BaseHTTPRequestHandler):\n"
               "    def do_GET(self):\n"
               "        self.send_response(200); self.end_headers(); self.wfile.write(os.environ['HOSTNAME'].encode())\n"
               "    def log_message(self, *words): pass\n"
               "http.server.ThreadingHTTPServer(('', 8000), Handler).serve_forever()\n")
    lost = [{"key": f"node.kubernetes.io/{state}", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": stay}
            for state in ("unreachable", "not-ready")]
    here = {"matchExpressions": [{"key": "kubernetes.io/hostname", "operator": "In", "values": [node or prefer]}]}
    affinity: dict[str, Any] = {}
    if node:
        affinity = {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [here]}}
    elif prefer:
        affinity = {"preferredDuringSchedulingIgnoredDuringExecution": [{"weight": 100, "preference": here}]}
    pod = {"affinity": {"nodeAffinity": affinity}, "tolerations": [{"key": TAINT, "operator": "Exists"}, *lost],
           "terminationGracePeriodSeconds": 1,
           "containers": [{"name": "server", "image": image, "command": ["python3", "-c", program],
                           "readinessProbe": {"httpGet": {"port": 8000}, "periodSeconds": 2, "timeoutSeconds": 5}}]}
    labels = {"app": app}
    template = {"metadata": {"labels": labels}, "spec": pod}
    return [{"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": app, "namespace": NAMESPACE},
             "spec": {"replicas": replicas, "selector": {"matchLabels": labels}, "template": template}},
            {"apiVersion": "v1", "kind": "Service", "metadata": {"name": app, "namespace": NAMESPACE},
             "spec": {"selector": labels, "ports": [{"port": 80, "targetPort": 8000}]}}]


@pytest.fixture(scope="session")
def image(cluster: Cluster) -> str:
    """An image with Python that both nodes have: flannel's own."""
    return f"{kubernetes.images(cluster.settings)}/flannel:{cluster.settings.flannel_version}"
