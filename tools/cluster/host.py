"""What this host is (init system, cgroups, capabilities), and what programs of the cluster change of it without being asked."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from tools.layout import Layout

CAP_SYS_RESOURCE = 24
KERNEL = Path("/proc/sys")
SETTINGS = ("net/ipv4/ip_forward", "vm/overcommit_memory", "vm/panic_on_oom", "kernel/panic", "kernel/panic_on_oops",
            "kernel/keys/root_maxkeys", "kernel/keys/root_maxbytes")
"""What the kubelet sets as it starts (its ContainerManager), and forwarding."""
FOLDERS = ("/etc/cni", "/var/lib/cni", "/run/containerd")
"""Where the CNI plugins and the container runtime's shims write whatever folders they are given."""
OWN_RESULTS = "/var/lib/cni/results"


def record(layout: Layout) -> None:
    """Write down, before the first change, what `restore` sets back. Does nothing if it is written."""
    path = layout.state / "host.json"
    if not path.exists():
        settings = {name: (KERNEL / name).read_text() for name in SETTINGS if (KERNEL / name).exists()}
        temporary = path.with_suffix(".new")
        temporary.write_text(json.dumps({"settings": settings, "folders": [f for f in FOLDERS if Path(f).exists()]}))
        temporary.rename(path)


def restore(layout: Layout, network: str) -> None:
    """Set the kernel's settings back and remove what was written into folders of others. Safe to repeat.

    `network`: name of our CNI network; where the host had such a folder before, only that network's files go.
    """
    path = layout.state / "host.json"
    if not path.exists():
        return
    before = json.loads(path.read_text())
    for name, value in before["settings"].items():
        if (KERNEL / name).read_text() != value:
            (KERNEL / name).write_text(value)
    for folder in FOLDERS:
        if folder not in before["folders"] and Path(folder).exists():
            shutil.rmtree(folder)
    for result in Path(OWN_RESULTS).glob(f"{network}-*"):
        result.unlink()


def systemd() -> bool:
    """Whether systemd is the init process."""
    return Path("/run/systemd/system").is_dir()


def cgroup_v2() -> bool:
    """Whether all controllers are in the unified hierarchy."""
    return Path("/sys/fs/cgroup/cgroup.controllers").is_file()


def cgroup_driver() -> str:
    """kubelet's and containerd's driver. systemd's needs cgroup v2 here: on v1 the two managers' views drift apart."""
    return "systemd" if systemd() and cgroup_v2() else "cgroupfs"


def may_lower_oom_score() -> bool:
    """Whether a process may lower oom_score_adj (in a container, often not)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) >> CAP_SYS_RESOURCE & 1)
    return False


def nvidia_runtime() -> str:
    """Path of the NVIDIA container toolkit's runtime; empty if it is not installed."""
    return shutil.which("nvidia-container-runtime") or ""


def has_gpu() -> bool:
    """Whether NVIDIA's driver has found a GPU."""
    return any(Path("/proc/driver/nvidia/gpus").glob("*"))


def mounts_nfs() -> bool:
    """Whether the kernel and the helper program for NFS mounts are there, as far as can be seen without loading a module."""
    modules = Path("/lib/modules", os.uname().release)
    kernel = "nfs4" in Path("/proc/filesystems").read_text() or any(modules.glob("kernel/fs/nfs/nfsv4.ko*"))
    return kernel and bool(shutil.which("mount.nfs", path="/usr/sbin:/sbin:/usr/bin:/bin"))


def memory_gib() -> float:
    """Memory of the host."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemTotal:"):
            return int(line.split()[1]) / 2**20
    return 0.0
