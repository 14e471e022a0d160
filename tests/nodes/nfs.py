"""The chart's own NFS server on the local cluster, and a guest that mounts it: for tests/nodes/test_nfs.py.

The server's disk is a small ext4 file system in a file, so that it can be filled, and its device changed.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from kubernetes import client

from tests.nodes.guest import Guest, GuestError
from tests.waiting import wait_for
from tools import charts, images, shell
from tools.cluster import kubernetes
from tools.cluster.settings import Settings
from tools.layout import REPOSITORY, Layout

NAMESPACE, RELEASE = "llm-finetune-nfs", "llm-finetune"
WORKLOAD = "llm-finetune-nfs-provisioner"
CLAIMS = "llm-finetune-nfs-claims"
"""Namespace of the release, where the claim is; the server has the other one, with Pod Security `privileged`."""
MOUNT = "/mnt/nfs"
UID = 1000
DISK_GIB = 3
"""Of the server's disk."""


class Disk:
    """An ext4 file system of the host in a file."""

    def __init__(self, folder: Path, gib: int) -> None:
        self.folder, self.image, self.gib = folder / "disk", folder / "disk.ext4", gib
        self.device = ""

    def make(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.image.unlink(missing_ok=True)
        with open(self.image, "wb") as file:
            file.truncate(self.gib << 30)
        shell.output(["mkfs.ext4", "-q", "-F", self.image])
        self.mount()
        (self.folder / "export").mkdir()

    def mount(self, other_than: str = "") -> None:
        """On a free loop device, `other_than` left out."""
        spare = shell.output(["losetup", "--find", "--show", self.image]).strip() if other_than else ""
        if spare and spare != other_than:
            self.device = spare
        else:
            self.device = shell.output(["losetup", "--find", "--show", self.image]).strip()
            if spare:
                shell.output(["losetup", "--detach", spare])
        shell.output(["mount", self.device, self.folder])

    def unmount(self) -> None:
        shell.output(["umount", self.folder])
        shell.output(["losetup", "--detach", self.device])

    def remove(self) -> None:
        for line in Path("/proc/mounts").read_text().splitlines():
            if line.split()[1] == str(self.folder):
                shell.output(["umount", self.folder])
        for line in shell.output(["losetup", "--associated", self.image]).splitlines():
            shell.output(["losetup", "--detach", line.partition(":")[0]])
        self.image.unlink(missing_ok=True)


@dataclass
class Server:
    """nfs-provisioner.mode: inCluster, as the chart makes it."""

    layout: Layout
    settings: Settings
    api: client.ApiClient
    disk: Disk
    image: dict[str, str] = field(default_factory=dict)
    objects: list[dict[str, Any]] = field(default_factory=list)
    """What `install` has applied."""

    @property
    def address(self) -> str:
        """Of its Service."""
        return f"10.{self.settings.octet + 2}.200.49"

    @property
    def storage(self) -> Path:
        """The exported directory, on the host."""
        return self.disk.folder / "export/storage"

    def manifests(self, clients: list[str]) -> list[dict[str, Any]]:
        values = {"global": {"images": {"nfsServer": self.image}},
                  "nfs-provisioner": {"mode": "inCluster", "capacity": "3Gi", "inCluster": {
                      "namespace": NAMESPACE, "nodeName": self.settings.name, "hostPath": str(self.disk.folder / "export"),
                      "clusterIP": self.address, "clients": clients}}}
        text = shell.output([charts.helm(), "template", RELEASE, charts.CHART, "--namespace", CLAIMS, "--values", "-",
                             *(f"--show-only=charts/nfs-provisioner/templates/{name}.yaml" for name in ("server", "volume"))],
                            stdin=json.dumps(values))
        return [document for document in yaml.safe_load_all(text) if document]

    def install(self, clients: list[str], without_proxy: list[str]) -> None:
        """Build the image, apply the chart's objects, wait until it serves.

        `without_proxy`: machines without a kube-proxy of their own. The first node's masquerades them behind the place where
        NetworkPolicies judge, so these see another address than the server.
        """
        builder = images.Builder(self.layout)
        (self.layout.runtime / "buildah").mkdir(parents=True, exist_ok=True)
        image, repository = images.IMAGES["nfs-server"], f"{self.settings.registry}/llm-finetune"
        builder.build(image, lambda _: None)
        digest = builder.push(image, repository, "test", lambda _: None, local=True)
        self.image = {"repository": f"{repository}/{image.name}", "digest": digest}
        kubernetes.pull(self.layout, f"{repository}/{image.name}@{digest}", digest, self.layout.logs / f"image-{image.name}.log")
        self.objects = self.manifests(clients)
        policy = next(o for o in self.objects if o["kind"] == "NetworkPolicy")
        policy["spec"]["ingress"][0]["from"] += [{"ipBlock": {"cidr": f"{address}/32"}} for address in without_proxy]
        kubernetes.apply(self.layout, [_namespace(NAMESPACE, "privileged"), _namespace(CLAIMS, "restricted"), *self.objects])
        self.wait()

    def wait(self, seconds: int = 120) -> None:
        kubernetes.wait_rollout(self.layout, NAMESPACE, f"statefulset/{WORKLOAD}", seconds)

    def remove(self) -> None:
        core = client.CoreV1Api(self.api)
        for namespace in (CLAIMS, NAMESPACE):
            with contextlib.suppress(client.ApiException):
                core.delete_namespace(namespace)
        with contextlib.suppress(client.ApiException):
            core.delete_persistent_volume(f"{CLAIMS}-llm-finetune-storage")
        names = {item.metadata.name for item in core.list_namespace().items}
        wait_for(lambda: not {CLAIMS, NAMESPACE} & {item.metadata.name for item in core.list_namespace().items}, 120, f"{names} removed")
        self.disk.remove()

    def pod(self) -> Any:
        pods = client.CoreV1Api(self.api).list_namespaced_pod(NAMESPACE).items
        return pods[0] if pods else None

    def log(self, previous: bool = False) -> str:
        return str(client.CoreV1Api(self.api).read_namespaced_pod_log(f"{WORKLOAD}-0", NAMESPACE, container="ganesha", previous=previous))

    def scale(self, replicas: int) -> None:
        client.AppsV1Api(self.api).patch_namespaced_stateful_set_scale(WORKLOAD, NAMESPACE, {"spec": {"replicas": replicas}})

    def stop(self) -> None:
        """The pod goes: an orderly end."""
        self.scale(0)
        wait_for(lambda: self.pod() is None, 60, "the server's pod is gone")

    def start(self) -> None:
        self.scale(1)
        self.wait()

    @contextlib.contextmanager
    def stopped(self, seconds: float) -> Iterator[None]:
        """Away for so long; what is done meanwhile counts to it."""
        self.stop()
        begin = time.monotonic()
        try:
            yield
            time.sleep(max(0.0, seconds - (time.monotonic() - begin)))
        finally:
            self.start()

    def kill(self) -> None:
        """As a crash: SIGKILL. The kubelet starts it again in the same pod."""
        uid = str(self.pod().metadata.uid)
        found = [path for path in Path("/proc").glob("[0-9]*") if _is_server(path, uid)]
        assert len(found) == 1, found
        os.kill(int(found[0].name), signal.SIGKILL)


def seen_from_the_network(settings: Settings) -> str:
    """How the server sees who comes through its Service from outside the pod network: kube-proxy masquerades as the node, and the packets
    leave by the link to the server's pod, whose address is the pod network's first."""
    return f"10.{settings.octet + 1}.0.1"


def _is_server(process: Path, pod: str) -> bool:
    try:
        return (process / "cmdline").read_bytes().startswith(b"/usr/bin/ganesha.nfsd\0") and pod in (process / "cgroup").read_text()
    except OSError:
        return False


def _namespace(name: str, level: str) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "Namespace",
            "metadata": {"name": name, "labels": {"pod-security.kubernetes.io/enforce": level}}}


def background(guest: Guest, command: str) -> None:
    """Start a shell command in the guest that goes on."""
    guest.run(f"setsid bash -c {shlex.quote(command)} </dev/null >/dev/null 2>&1 & disown")


class Work:
    """tests/nodes/checkpoint_work.py or storage_work.py, which goes on in the guest while the test does something else."""

    def __init__(self, guest: Guest, words: str) -> None:
        self.guest, self.file = guest, f"/tmp/work-{time.monotonic_ns()}"
        background(guest, f"{{ {python(guest)} -m tests.nodes.{words}; echo ended $?; }} >{self.file} 2>&1")

    def text(self) -> str:
        return self.guest.run(f"cat {self.file}")

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.text().splitlines() if line.startswith("{")]

    def until(self, key: str, value: Any, seconds: float = 300) -> dict[str, Any]:
        """The line in which `key` is `value`."""
        def found() -> Any:
            text, lines = self.text(), self.lines()
            assert "\nended " not in text or any(line.get(key) == value for line in lines), text
            return [line for line in lines if line.get(key) == value]
        line: dict[str, Any] = wait_for(found, seconds, f"{key}: {value} of the work in the guest", every=0.1)[0]
        return line

    def end(self, seconds: float = 600) -> list[dict[str, Any]]:
        """Wait for its end; returns what it said. Fails if it failed."""
        wait_for(lambda: "\nended " in self.text(), seconds, "the work in the guest ends")
        assert self.text().endswith("ended 0\n"), self.text()
        return self.lines()


def python(guest: Guest) -> str:
    """The trainer's Python in the guest, with this checkout."""
    return (f"cd {REPOSITORY} && PYTHONPATH={REPOSITORY} PYTHONDONTWRITEBYTECODE=1 OMP_NUM_THREADS=1 "
            f"{guest.layout.cache}/venv/trainer/bin/python")


def work(guest: Guest, words: str, seconds: float = 600) -> list[dict[str, Any]]:
    """Run checkpoint_work.py or storage_work.py to its end."""
    return Work(guest, words).end(seconds)


def refused(guest: Guest, options: str, source: str) -> str:
    """What mount says when it does not mount."""
    try:
        guest.run(f"mkdir -p /mnt/refused; timeout 20 mount -t nfs -o {options} {source} /mnt/refused && umount /mnt/refused", timeout=40)
    except GuestError as error:
        return str(error)
    raise AssertionError(f"{source} was mounted with {options}")


def as_user(uid: int, command: str) -> str:
    """A shell command line as another user."""
    return f"setpriv --reuid={uid} --regid={uid} --clear-groups bash -c {shlex.quote(f'umask 022; {command}')}"


class SecondClient:
    """Another NFS client in the guest: a network namespace with a host name of its own, for which the kernel keeps separate NFS state."""

    def __init__(self, guest: Guest, settings: Settings, server: str, options: str) -> None:
        self.guest = guest
        self.network = f"10.{settings.octet}.201"
        here = guest.address.partition("/")[0]
        guest.run(f"""set -e
            ip netns add second; ip link add second0 type veth peer name eth0 netns second
            ip address add {self.network}.1/24 dev second0; ip link set second0 up
            ip -n second link set lo up; ip -n second address add {self.network}.2/24 dev eth0; ip -n second link set eth0 up
            ip -n second route add default via {self.network}.1""")
        subprocess.run(["ip", "route", "replace", f"{self.network}.0/24", "via", here], check=True, env=env(guest.layout))
        self.pid = guest.run("setsid ip netns exec second unshare --uts --mount sleep infinity </dev/null >/dev/null 2>&1 & "
                             "sleep 1; pgrep -n -x sleep").strip()
        self.run(f"hostname second; mkdir -p {MOUNT}-second; mount -t nfs -o {options} {server}:/storage {MOUNT}-second")

    def inside(self, command: str) -> str:
        return f"nsenter --target {self.pid} --net --uts --mount bash -c {shlex.quote(command)}"

    def run(self, command: str, timeout: float = 120) -> str:
        return self.guest.run(self.inside(command), timeout=timeout)

    def remove(self) -> None:
        self.guest.run(f"{self.inside(f'umount -fl {MOUNT}-second')}; kill -9 {self.pid}; ip link delete second0; ip netns delete second")
        subprocess.run(["ip", "route", "delete", f"{self.network}.0/24"], check=True, env=env(self.guest.layout))


def env(layout: Layout) -> dict[str, str]:
    return {**os.environ, **layout.environment()}
