"""What can be left behind on a host, written down before and compared after."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tools.layout import Layout

FOLDERS = ("/etc/kubernetes", "/etc/cni", "/opt/cni", "/var/lib/kubelet", "/var/lib/cni", "/var/lib/containerd", "/var/lib/etcd",
           "/var/lib/llm-finetune", "/run/llm-finetune", "/run/containerd", "/run/netns", "/var/log/containers", "/var/log/pods")
SYSCTLS = ("net/ipv4/ip_forward", "net/ipv4/conf/all/route_localnet", "net/bridge/bridge-nf-call-iptables", "vm/overcommit_memory",
           "vm/panic_on_oom", "kernel/panic", "kernel/panic_on_oops", "kernel/keys/root_maxkeys", "kernel/keys/root_maxbytes",
           "fs/inotify/max_user_instances", "fs/inotify/max_user_watches")


def take(layout: Layout) -> dict[str, list[str]]:
    """Processes (command lines), mounts, links, routes, nft tables, ipsets, cgroups, folders, kernel settings."""
    links = sorted(path.name for path in Path("/sys/class/net").iterdir())
    return {"processes": sorted(_processes(layout)), "mounts": sorted(_mounts()), "links": links,
            "routes": sorted(" ".join(line.split()[:3]) for line in Path("/proc/net/route").read_text().splitlines()[1:]),
            "nft tables": _lines(layout, "nft", "list", "tables"), "ipsets": _lines(layout, "ipset", "list", "-name"),
            "cgroups": sorted(_cgroups()), "folders": [f for f in FOLDERS if Path(f).exists()],
            "kernel settings": [f"{name}={Path('/proc/sys', name).read_text().strip()}" for name in SYSCTLS
                                if Path("/proc/sys", name).exists()]}


def new(before: dict[str, list[str]], after: dict[str, list[str]]) -> dict[str, list[str]]:
    """What is there after and was not before, by kind; empty kinds left out."""
    added = {kind: sorted(set(after[kind]) - set(before[kind])) for kind in before}
    return {kind: names for kind, names in added.items() if names}


def _processes(layout: Layout) -> Iterator[str]:
    """Those that the cluster could have left: in a container (a mount namespace that is not ours), run from the cache, or told of the
    cluster's folders. What else runs on a host comes and goes."""
    own, here = _ancestors(os.getpid()), os.readlink("/proc/self/ns/mnt")
    folders = tuple(str(f) for f in (layout.cache, layout.state, layout.runtime))
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if int(path.name) in own or os.getpid() in _ancestors(int(path.name)):
                continue
            words = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            program, namespace = os.readlink(path / "exe"), os.readlink(path / "ns/mnt")
        except (OSError, ValueError):
            continue  # it has ended, or is a thread of the kernel
        if namespace != here or program.startswith(folders) or any(f"{folder}/" in words for folder in folders[1:]):
            yield words[:200]


def _ancestors(pid: int) -> set[int]:
    found: set[int] = set()
    while pid > 1 and pid not in found:
        found.add(pid)
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            break
    return found


def _mounts() -> Iterator[str]:
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        yield line.split()[4]


def _lines(layout: Layout, *command: str) -> list[str]:
    env = {**os.environ, **layout.environment()}
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=env, check=True)
    except FileNotFoundError:
        return []  # nothing was ever unpacked here, and the host has no such program of its own
    return sorted(done.stdout.split("\n"))


def _cgroups() -> Iterator[str]:
    top = Path("/sys/fs/cgroup")
    for pattern in ("*", "*/*"):
        yield from (str(p.relative_to(top)) for p in top.glob(pattern) if p.is_dir() and "kube" in p.name)
