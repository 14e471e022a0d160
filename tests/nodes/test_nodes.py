"""A cluster of two servers: pods reach each other, and what happens when a server is lost, cut off or has its services restarted."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import httpx
import pytest

from tests.nodes.conftest import NAMESPACE, TAINT, Cluster, http_server
from tests.waiting import wait_for
from tools.cluster import daemons, kubernetes, network
from tools.cluster.kubernetes import Server

pytestmark = pytest.mark.timeout(900)
GET = "import urllib.request as r; print(r.urlopen('http://{}/', timeout=20).read().decode())"


class Watch:
    """Asks a server of the first node again and again, and keeps when it did not answer."""

    def __init__(self, url: str) -> None:
        self.url, self.asked = url, 0
        self.failed: list[str] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._ask, daemon=True)

    def _ask(self) -> None:
        while not self._ended.wait(0.25):
            self.asked += 1
            try:
                httpx.get(self.url, timeout=5).raise_for_status()
            except httpx.HTTPError as error:
                self.failed.append(f"{time.strftime('%X')} {error}")

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()


@pytest.fixture(scope="module")
def url(cluster: Cluster, image: str) -> str:
    """A server on the first node that must answer whatever happens to the second."""
    cluster.apply(*http_server("steady", image, node=cluster.first))
    wait_for(lambda: cluster.ready_pods("steady", cluster.first), 60, "the steady server")
    service = cluster.core.read_namespaced_service("steady", NAMESPACE)
    return f"http://{service.spec.cluster_ip}/"


def test_joined(cluster: Cluster) -> None:
    """Two nodes of one version, each with its own share of pod addresses, and routes between them on both."""
    nodes = {node.metadata.name: node for node in cluster.core.list_node().items}
    assert set(nodes) == {cluster.first, cluster.guest.name}
    assert all(cluster.ready(name) for name in nodes)
    assert {n.status.node_info.kubelet_version for n in nodes.values()} == {cluster.settings.kubernetes_version}
    second = nodes[cluster.guest.name]
    assert second.status.node_info.kernel_version == cluster.guest.run("uname -r").strip()
    assert [t.key for t in second.spec.taints] == [TAINT]
    ranges = {name: node.spec.pod_cidr for name, node in nodes.items()}
    assert network.routes(cluster.layout, cluster.settings) == [
        {"dst": ranges[cluster.guest.name], "gateway": cluster.guest.address.partition("/")[0], "dev": cluster.settings.link, "flags": []}]
    assert f"{ranges[cluster.first]} via {cluster.settings.address}" in cluster.guest.run("ip route")


def test_joining_again_changes_nothing(cluster: Cluster) -> None:
    before = cluster.guest.run("pgrep -x kubelet")
    cluster.join()
    assert cluster.guest.run("pgrep -x kubelet") == before


def test_pods_reach_each_other(cluster: Cluster, image: str, record: Callable[..., None]) -> None:
    """By their addresses, by a Service's address and by its name, in both directions."""
    began = time.monotonic()
    cluster.apply(*http_server("far", image, node=cluster.guest.name))
    far = wait_for(lambda: cluster.ready_pods("far", cluster.guest.name), 300, "a pod on the second node")[0]
    record("first pod on the second node", took=round(time.monotonic() - began, 1))
    cluster.apply(*http_server("near", image, node=cluster.first))
    near = wait_for(lambda: cluster.ready_pods("near", cluster.first), 60, "a pod on the first node")[0]
    for here, there, name in ((near, far, "far"), (far, near, "near")):
        address = cluster.core.read_namespaced_service(name, NAMESPACE).spec.cluster_ip
        for target in (f"{there.status.pod_ip}:8000", address, name, f"{name}.{NAMESPACE}.svc.cluster.local"):
            assert cluster.python(here.metadata.name, GET.format(target)) == there.metadata.name, f"{here.metadata.name} to {target}"
    assert cluster.kubectl("logs", far.metadata.name) == ""


def test_partition(cluster: Cluster, url: str, record: Callable[..., None]) -> None:
    """60 s without the link: the node is given up and taken back, and its pod, which may stay 300 s, is the same one as before."""
    [pod] = cluster.ready_pods("far", cluster.guest.name)
    with Watch(url) as watch:
        began = time.monotonic()
        cluster.guest.link(False)
        wait_for(lambda: not cluster.ready(cluster.guest.name), 75, "NotReady")
        noticed = time.monotonic() - began
        time.sleep(max(0.0, 60 - noticed))
        cluster.guest.link(True)
        healed = time.monotonic()
        wait_for(lambda: cluster.ready(cluster.guest.name), 60, "Ready again")
        wait_for(lambda: cluster.ready_pods("far", cluster.guest.name), 60, "its pod ready again")
        record("second node cut off for 60 s", not_ready_after=round(noticed, 1), ready_again=round(time.monotonic() - healed, 1))
    [after] = cluster.pods("far")
    assert (after.metadata.uid, after.status.container_statuses[0].restart_count) == (pod.metadata.uid, 0)
    assert cluster.python(cluster.ready_pods("near", cluster.first)[0].metadata.name, GET.format("far")) == pod.metadata.name
    assert watch.asked > 100 and not watch.failed


def test_node_lost(cluster: Cluster, image: str, url: str, record: Callable[..., None]) -> None:
    """A power cut: what ran there runs on the first node, what ran on the first never stopped, and the node comes back."""
    cluster.apply(*http_server("moving", image, prefer=cluster.guest.name, stay=5))
    [pod] = wait_for(lambda: cluster.ready_pods("moving", cluster.guest.name), 120, "a pod on the second node")
    with Watch(url) as watch:
        began = time.monotonic()
        cluster.guest.kill()
        wait_for(lambda: not cluster.ready(cluster.guest.name), 90, "NotReady")
        noticed = time.monotonic() - began
        [new] = wait_for(lambda: cluster.ready_pods("moving", cluster.first), 120, "the pod's replacement on the first node")
        replaced = time.monotonic() - began
        assert new.metadata.uid != pod.metadata.uid
        back = time.monotonic()
        cluster.guest.boot()
        booted = time.monotonic() - back
        cluster.join()
        wait_for(lambda: cluster.ready(cluster.guest.name), 60, "Ready again")
        record("second node killed", not_ready_after=round(noticed, 1), replaced_after=round(replaced, 1), booted_after=round(booted, 1),
               ready_again=round(time.monotonic() - back, 1))
        wait_for(lambda: cluster.ready_pods("far", cluster.guest.name), 240, "a pod that belongs to the second node, there again")
        gone = f"{pod.metadata.name} is gone"
        wait_for(lambda: pod.metadata.name not in cluster.kubectl("get", "pods", "--output", "name"), 120, gone)
    near = cluster.ready_pods("near", cluster.first)[0].metadata.name
    [far] = cluster.ready_pods("far", cluster.guest.name)
    assert cluster.python(near, GET.format("far")) == far.metadata.name
    assert watch.asked > 100 and not watch.failed


@pytest.mark.parametrize("service", ["kubelet", "containerd"])
def test_services_restarted(cluster: Cluster, url: str, service: str, record: Callable[..., None]) -> None:
    """The first node's kubelet or containerd ends and starts again: no container is restarted, the server answers all the time."""
    layout, settings = cluster.layout, cluster.settings
    wanted = {"kubelet": kubernetes.kubelet(layout, Server(settings.name, settings.address)),
              "containerd": kubernetes.containerd(layout, settings)}[service]

    def containers() -> dict[str, tuple[str, int]]:
        return {f"{pod.metadata.namespace}/{pod.metadata.name}/{c.name}": (c.container_id, c.restart_count)
                for pod in cluster.core.list_pod_for_all_namespaces(field_selector=f"spec.nodeName={cluster.first}").items
                for c in pod.status.container_statuses or [] if c.state.running}

    before = containers()
    with Watch(url) as watch:
        began = time.monotonic()
        daemons.stop(wanted.pid_file(layout), timeout=20)
        time.sleep(10)
        assert wanted.start(layout)
        wait_for(lambda: cluster.ready(cluster.first), 60, "Ready")
        record(f"{service} of the first node restarted after 10 s", ready_again=round(time.monotonic() - began, 1))
        time.sleep(15)  # what it does to pods, it does in its first round
    after = containers()
    assert {name: after.get(name) for name in before} == before
    assert watch.asked > 50 and not watch.failed
