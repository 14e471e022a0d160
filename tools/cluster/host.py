"""What this host is: init system, cgroups, capabilities."""

from __future__ import annotations

from pathlib import Path

CAP_SYS_RESOURCE = 24


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


def memory_gib() -> float:
    """Memory of the host."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemTotal:"):
            return int(line.split()[1]) / 2**20
    return 0.0
