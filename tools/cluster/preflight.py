"""What must hold before anything on this host is touched."""

from __future__ import annotations

import os
import platform
import shutil
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path

import httpx

from tools.cluster import host
from tools.cluster.settings import Settings
from tools.errors import OperatorError
from tools.layout import Layout

MARK = "made-by-llm-finetune"
"""File of the state folder by which it is known as ours."""
PROGRAMS = {"git": "git", "apt-get": "apt", "dpkg-deb": "dpkg", "python3": "python3", "mount": "mount"}
NODE_PORTS = [("", 10250), ("127.0.0.1", 10248), ("", 10256)]
"""Fixed ports of the kubelet and kube-proxy, on all or local addresses."""
CONTROL_PORTS = [("127.0.0.1", 10257), ("127.0.0.1", 10259), ("127.0.0.1", 2379), ("127.0.0.1", 2381)]
"""Those of controller-manager, scheduler and etcd."""
CLOCK_SECONDS = 60.0
"""By which the clocks of two servers may differ: certificates are valid from the moment they are made."""


@dataclass(frozen=True)
class Needs:
    """What a machine must have."""

    cores: int
    memory_gib: float
    disk_gib: float
    """With an empty cache."""
    warm_disk_gib: float
    hint: str = ""
    """Of what to do without root."""


UP = Needs(2, 15.0, 45.0, 10.0, "Run `sudo make up`, or `make try` for a run without Kubernetes.")
FIRST_SERVER = Needs(2, 3.5, 25.0, 5.0, "Run it with sudo.")
FURTHER_SERVER = Needs(1, 1.5, 10.0, 3.0, "Run it with sudo.")


def problems(layout: Layout, settings: Settings) -> Iterator[str]:
    """Each thing that is in the way of `make up`, with what to do about it."""
    yield from _machine(layout, UP)
    if ours(layout):
        return  # what is found below is our own
    yield from _other_clusters()
    yield from _taken([("127.0.0.1", settings.dashboard_port), ("127.0.0.1", settings.chatbot_port), *CONTROL_PORTS, *NODE_PORTS])
    yield from _conflicts(settings)


def first_server_problems(layout: Layout, settings: Settings) -> Iterator[str]:
    """The same for `make site-up`."""
    yield from _machine(layout, FIRST_SERVER)
    yield from _gpu()
    if ours(layout):
        return
    yield from _other_clusters()
    yield from _taken([(settings.address, settings.registry_port), (settings.address, settings.api_port), *CONTROL_PORTS, *NODE_PORTS])
    yield from _conflicts(settings)


def further_server_problems(layout: Layout, settings: Settings) -> Iterator[str]:
    """The same for `make site-join`."""
    yield from _machine(layout, FURTHER_SERVER)
    yield from _gpu()
    try:
        answer = httpx.get(f"http://{settings.registry}/v2/", timeout=10)
    except httpx.HTTPError as error:
        yield (f"the first server's registry, {settings.registry}, does not answer ({error}). Is SERVER right, and does a firewall let "
               f"ports {settings.registry_port} and {settings.api_port} pass?")
    else:
        apart = time.time() - parsedate_to_datetime(answer.headers["Date"]).timestamp()
        if abs(apart) > CLOCK_SECONDS:
            yield f"this server's clock is {apart:+.0f} s from the first server's: start chrony or systemd-timesyncd on both."
    if ours(layout):
        return
    yield from _other_clusters()
    yield from _taken(NODE_PORTS)
    yield from _conflicts(settings)


def _machine(layout: Layout, needs: Needs) -> Iterator[str]:
    if os.geteuid() != 0:
        yield f"not root: containers, mounts and links need it. {needs.hint}"
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        yield f"{platform.system()} on {platform.machine()}: the local cluster is built for Linux on x86-64."
    for program, package in PROGRAMS.items():
        if not shutil.which(program):
            yield f"{program} is missing: apt-get install {package} (the local cluster is made from Debian's packages)."
    if (os.cpu_count() or 1) < needs.cores:
        yield f"{os.cpu_count()} core: at least {needs.cores} are needed."
    if host.memory_gib() < needs.memory_gib:
        yield f"{host.memory_gib():.1f} GiB of memory: at least {needs.memory_gib:g} are needed."
    folder = layout.cache
    while not folder.exists():
        folder = folder.parent
    space = shutil.disk_usage(folder).free / 2**30
    needed = needs.warm_disk_gib if (layout.cache / "containerd").exists() else needs.disk_gib
    if space < needed:
        yield f"{space:.0f} GiB free below {folder}: {needed:.0f} are needed. Set LLM_FINETUNE_CACHE to a folder on a larger disk."


def _gpu() -> Iterator[str]:
    if host.has_gpu() and not host.nvidia_runtime():
        yield "this server has a GPU, but no NVIDIA container toolkit: pods would not see it. Install nvidia-container-toolkit."


def _other_clusters() -> Iterator[str]:
    for path, what in ((Path("/var/lib/kubelet"), "a kubelet"), (Path("/etc/kubernetes"), "a Kubernetes configuration")):
        if path.exists() and any(path.iterdir()):
            yield (f"{path} exists: this host already has {what}. Use that cluster instead (docs/site-preparation.md), "
                   "or remove what is left of it.")
    for process in _processes("kubelet"):
        yield f"a kubelet runs here (pid {process}). Use that cluster instead: docs/site-preparation.md."


def _taken(ports: list[tuple[str, int]]) -> Iterator[str]:
    for address, port in ports:
        if not free(address, port):
            yield f"port {port} on {address or 'this host'} is taken. Stop what listens there (ss -ltnp 'sport = :{port}')."


def check(problems: Iterator[str]) -> None:
    """Raise OperatorError with all problems."""
    if found := list(problems):
        raise OperatorError("This machine is not ready; nothing was changed:\n" + "\n".join(f"  - {p}" for p in found))


def ours(layout: Layout) -> bool:
    """Whether the local cluster was (at least partly) brought up here before."""
    return (layout.state / MARK).exists()




def free(address: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError:
            return False
    return True


def _processes(name: str) -> Iterator[int]:
    """Processes of this name that have not ended: one whose parent has yet to ask for its exit status runs no more."""
    for path in Path("/proc").glob("[0-9]*/comm"):
        try:
            if path.read_text().strip() == name and "\nState:\tZ" not in path.with_name("status").read_text():
                yield int(path.parent.name)
        except OSError:
            continue


def _conflicts(settings: Settings) -> Iterator[str]:
    """Networks of ours that overlap a route of the host (the second octet tells: all three are /16 or smaller)."""
    octets = {settings.octet + 1: settings.pod_network, settings.octet + 2: settings.service_network}
    if not settings.server:
        octets[settings.octet] = settings.node_network
    for line in Path("/proc/net/route").read_text().splitlines()[1:]:
        link, destination, mask = (line.split()[i] for i in (0, 1, 7))
        address = int(destination, 16).to_bytes(4, "little")
        if link != settings.link and int(mask, 16) and address[0] == 10 and address[1] in octets:
            yield octets[address[1]]
