"""Enforcement of NetworkPolicies on the node: kube-router's policy controller as a service of the node (tools/cluster/sources/netpol).

The pod network (ptp) enforces none by itself. The rules outlive the service, as they outlive a restart of a real CNI's agent.
"""

from __future__ import annotations

import json
from pathlib import Path

from tools import shell
from tools.cluster.daemons import Daemon
from tools.cluster.settings import Settings
from tools.layout import Layout

CHAINS = {"INPUT": "KUBE-ROUTER-INPUT", "FORWARD": "KUBE-ROUTER-FORWARD", "OUTPUT": "KUBE-ROUTER-OUTPUT"}
"""Chains of the filter table, and those of the controller that they call."""
OWN_CHAINS = ("KUBE-ROUTER-", "KUBE-POD-FW-", "KUBE-NWPLCY-")
OWN_SETS = ("KUBE-SRC-", "KUBE-DST-")


def _environment(layout: Layout) -> dict[str, str]:
    """With iptables under the names that programs call (Debian makes them when a package is installed, here they are only unpacked)."""
    root, folder = layout.debian / "root", layout.state / "netpol"
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("iptables", "iptables-save", "iptables-restore"):
        if not (folder / name).is_symlink():
            (folder / name).symlink_to(root / "usr/sbin/xtables-nft-multi")
    env = layout.environment()
    return {**env, "PATH": f"{folder}:{env['PATH']}", "XTABLES_LIBDIR": str(root / "usr/lib/x86_64-linux-gnu/xtables")}


def engine(layout: Layout, settings: Settings) -> Daemon:
    """The controller; ready when the node's filter calls its chains."""
    env = _environment(layout)
    return Daemon("netpol", [layout.bin / "netpol", "-kubeconfig", layout.kubeconfig, "-node", settings.name,
                             "-services", settings.service_network], env=env,
                  ready=lambda: shell.succeeds(["iptables", "-S", CHAINS["FORWARD"]], env=env))


def remove(layout: Layout) -> None:
    """Take its rules and sets away, and the filter table if nothing else is in it. Safe to repeat."""
    if not (layout.debian / "root/usr/sbin/xtables-nft-multi").exists():
        return
    env = _environment(layout)
    if script := removal(shell.output(["iptables-save", "-t", "filter"], env=env)):
        shell.output(["iptables-restore", "--noflush"], env=env, stdin=script)
    _drop_empty_table(env)
    if Path(layout.debian / "root/usr/sbin/ipset").exists():
        for name in shell.output(["ipset", "list", "-name"], env=env).split():
            if name.startswith(OWN_SETS):
                shell.output(["ipset", "destroy", name], env=env)


def removal(saved: str) -> str:
    """What iptables-restore must be given to take the controller's chains out of the filter table that iptables-save shows; empty if it
    has none there."""
    rules = saved.splitlines()
    own = [line.split()[0][1:] for line in rules if line.startswith(tuple(f":{prefix}" for prefix in OWN_CHAINS))]
    calls = [line.replace("-A ", "-D ", 1) for line in rules if any(line.startswith(f"-A {top} ") and line.endswith(f"-j {chain}")
                                                                    for top, chain in CHAINS.items())]
    return "\n".join(["*filter", *calls, *(f"-F {c}" for c in own), *(f"-X {c}" for c in own), "COMMIT", ""]) if own else ""


def _drop_empty_table(env: dict[str, str]) -> None:
    """iptables makes the filter table with three chains that accept everything when it is first asked."""
    tables = [entry.get("table", {}) for entry in json.loads(shell.output(["nft", "-j", "list", "tables"], env=env))["nftables"]]
    if not any((t.get("family"), t.get("name")) == ("ip", "filter") for t in tables):
        return
    entries = json.loads(shell.output(["nft", "-j", "list", "table", "ip", "filter"], env=env))["nftables"]
    chains = [entry["chain"] for entry in entries if "chain" in entry]
    if not any("rule" in entry for entry in entries) and all(c["name"] in CHAINS and c.get("policy") == "accept" for c in chains):
        shell.output(["nft", "delete", "table", "ip", "filter"], env=env)
