"""What must hold before anything on this host is touched."""

from __future__ import annotations

import os
import platform
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

from tools.cluster import host
from tools.cluster.settings import Settings
from tools.errors import OperatorError
from tools.layout import Layout

MEMORY_GIB = 15.0
DISK_GIB = 45.0
WARM_DISK_GIB = 10.0
PROGRAMS = {"git": "git", "apt-get": "apt", "dpkg-deb": "dpkg", "python3": "python3", "mount": "mount"}


def problems(layout: Layout, settings: Settings) -> Iterator[str]:
    """Each thing that is in the way, with what to do about it."""
    if os.geteuid() != 0:
        yield "not root: containers, mounts and links need it. Run `sudo make up`, or `make try` for a run without Kubernetes."
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        yield f"{platform.system()} on {platform.machine()}: the local cluster is built for Linux on x86-64."
    for program, package in PROGRAMS.items():
        if not shutil.which(program):
            yield f"{program} is missing: apt-get install {package} (the local cluster is made from Debian's packages)."
    if (os.cpu_count() or 1) < 2:
        yield f"{os.cpu_count()} core: at least 2 are needed."
    if host.memory_gib() < MEMORY_GIB:
        yield f"{host.memory_gib():.1f} GiB of memory: at least {MEMORY_GIB:.0f} are needed."
    folder = layout.cache
    while not folder.exists():
        folder = folder.parent
    space = shutil.disk_usage(folder).free / 2**30
    needed = WARM_DISK_GIB if (layout.cache / "containerd").exists() else DISK_GIB
    if space < needed:
        yield f"{space:.0f} GiB free below {folder}: {needed:.0f} are needed. Set LLM_FINETUNE_CACHE to a folder on a larger disk."
    if ours(layout):
        return  # what is found below is our own
    for path, what in ((Path("/var/lib/kubelet"), "a kubelet"), (Path("/etc/kubernetes"), "a Kubernetes configuration")):
        if path.exists() and any(path.iterdir()):
            yield (f"{path} exists: this host already has {what}. Use that cluster instead (docs/site-preparation.md), "
                   "or remove what is left of it.")
    for process in _processes("kubelet"):
        yield f"a kubelet runs here (pid {process}). Use that cluster instead: docs/site-preparation.md."
    ports = [("127.0.0.1", settings.dashboard_port), ("127.0.0.1", settings.chatbot_port), *_node_ports(settings)]
    for address, port in ports:
        if not free(address, port):
            yield f"port {port} on {address or 'this host'} is taken. Stop what listens there (ss -ltnp 'sport = :{port}')."
    for network in _conflicts(settings):
        yield f"{network} is already routed on this host. Set LLM_FINETUNE_OCTET to another number (now {settings.octet})."


def check(layout: Layout, settings: Settings) -> None:
    """Raise OperatorError with all problems."""
    found = list(problems(layout, settings))
    if found:
        raise OperatorError("This machine is not ready; nothing was changed:\n" + "\n".join(f"  - {p}" for p in found))


def ours(layout: Layout) -> bool:
    """Whether the local cluster was (at least partly) brought up here before."""
    return (layout.state / "made-by-llm-finetune").exists()


def _node_ports(settings: Settings) -> list[tuple[str, int]]:
    # kubelet, its health port, controller-manager, scheduler, etcd and kube-proxy listen on fixed ports of all or local addresses.
    return [("", 10250), ("127.0.0.1", 10248), ("127.0.0.1", 10257), ("127.0.0.1", 10259), ("127.0.0.1", 2379), ("127.0.0.1", 2381),
            ("", 10256)]


def free(address: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError:
            return False
    return True


def _processes(name: str) -> Iterator[int]:
    for path in Path("/proc").glob("[0-9]*/comm"):
        try:
            if path.read_text().strip() == name:
                yield int(path.parent.name)
        except OSError:
            continue


def _conflicts(settings: Settings) -> Iterator[str]:
    """Networks of ours that overlap a route of the host (the second octet tells: all three are /16 or smaller)."""
    octets = {settings.octet: settings.node_network, settings.octet + 1: settings.pod_network, settings.octet + 2: settings.service_network}
    for line in Path("/proc/net/route").read_text().splitlines()[1:]:
        link, destination, mask = (line.split()[i] for i in (0, 1, 7))
        address = int(destination, 16).to_bytes(4, "little")
        if link != settings.link and int(mask, 16) and address[0] == 10 and address[1] in octets:
            yield octets[address[1]]
