"""Takes the local cluster away: processes, mounts, links, nft tables, cgroups and files of its own. The cache stays."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from tools import shell
from tools.cluster import daemons, host, kubernetes, network, policies
from tools.cluster.preflight import MARK, ours
from tools.cluster.settings import Settings
from tools.layout import Layout

CGROUPS = Path("/sys/fs/cgroup")
PODS = "kubepods*"


def down(layout: Layout, settings: Settings) -> bool:
    """Stop and remove everything but the cache. Safe to repeat, also after an interrupted `up`. Returns False if there was nothing."""
    if not ours(layout):
        return False
    pids = layout.runtime / "pids"
    for path in sorted(pids.glob("*")) if pids.exists() else []:
        if path.name != "containerd":
            daemons.stop(path)
    _stop_pods(layout)
    daemons.stop(pids / "containerd", timeout=20)
    _unmount([layout.runtime, layout.state, kubernetes.KUBELET, layout.cache / "containerd", layout.cache / "images"])
    policies.remove(layout)
    network.down(layout, settings)
    for link in _pod_links():
        shell.output(["ip", "link", "delete", link], env=layout.environment())
    _remove_cgroups()
    host.restore(layout, settings.name)
    # What says how far the cluster was set up goes first, what says that it is ours last: `make up` after an interrupted `make down` begins
    # anew, and `make down` goes on.
    inside = [path for path in layout.state.iterdir() if path.name != MARK]
    for path in (*inside, kubernetes.ETC, kubernetes.KUBELET, Path("/var/log/containers"), layout.runtime, layout.state):
        _remove(path)
    return True


def _remove(path: Path) -> None:
    """Remove a file or folder; a folder that a disk is mounted on is only emptied."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.is_mount():
        for child in path.iterdir():
            _remove(child)
    elif path.exists():
        shutil.rmtree(path)


def _stop_pods(layout: Layout) -> None:
    """Kill every process of a pod, then drop the containers from containerd's records (they would come back as orphans)."""
    deadline = time.monotonic() + 30
    while processes := set(_pod_processes(layout)):
        for pid in processes:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        if time.monotonic() > deadline:
            raise OSError(f"processes of pods do not end: {sorted(processes)}")
        time.sleep(0.2)
    env = layout.environment()
    if shell.succeeds([*kubernetes.ctr(layout), "version"], env=env):
        for task in shell.output([*kubernetes.ctr(layout), "tasks", "list", "--quiet"], env=env).split():
            shell.succeeds([*kubernetes.ctr(layout), "tasks", "delete", "--force", task], env=env)
        for container in shell.output([*kubernetes.ctr(layout), "containers", "list", "--quiet"], env=env).split():
            shell.output([*kubernetes.ctr(layout), "containers", "delete", container], env=env)


def _pod_processes(layout: Layout) -> Iterator[int]:
    """Processes in a pod's cgroup, and the shims that belong to our containerd."""
    for top in _pod_cgroups():
        for folder, _, _ in os.walk(top):  # passes over folders that go while it looks: pods are ending
            try:
                yield from (int(line) for line in Path(folder, "cgroup.procs").read_text().split())
            except OSError:
                continue
    ours = str(kubernetes.socket(layout)).encode()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        # Shims outlive containerd; those whose pods have ended can go while it still runs, it only logs that.
        if words[0].endswith(b"containerd-shim-runc-v2") and ours in words:
            yield int(path.parent.name)


def _pod_cgroups() -> Iterator[Path]:
    """The top cgroups of pods: in each controller's hierarchy (v1) or in the one (v2)."""
    yield from CGROUPS.glob(PODS)
    yield from CGROUPS.glob(f"*/{PODS}")


def _remove_cgroups() -> None:
    for top in _pod_cgroups():
        for folder, _, _ in os.walk(top, topdown=False):
            os.rmdir(folder)


def _pod_links() -> Iterator[str]:
    """Host ends of pods' links whose pods' namespaces are gone (ptp names them veth...; a link with a route to our pod network)."""
    routes = Path("/proc/net/route").read_text().splitlines()[1:]
    octet = Settings().octet + 1
    for line in routes:
        link, destination = line.split()[:2]
        address = int(destination, 16).to_bytes(4, "little")
        if link.startswith("veth") and address[:2] == bytes((10, octet)):
            yield link


def _unmount(below: list[Path]) -> None:
    """Unmount everything below the given folders, the innermost first, and the folder of the kubelet that it has mounted on itself. A disk
    that is mounted on one of them stays."""
    targets = [Path(line.split()[4].replace("\\040", " ")) for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    for number, target in reversed(list(enumerate(targets))):
        # The kernel's list is in the order of mounting: what is above a disk, or on a folder without one, is a folder mounted on itself.
        on_itself = target in below and (target in targets[:number] or not target.is_mount())
        inside = any(folder in target.parents for folder in below)
        if (inside or on_itself) and not shell.succeeds(["umount", target]):
            shell.output(["umount", "--lazy", target])
