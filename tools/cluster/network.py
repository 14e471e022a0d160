"""The node's address, forwarding and masquerading of pods, and the ports on localhost."""

from __future__ import annotations

import json
import socket
from pathlib import Path

from tools import shell
from tools.cluster.daemons import Daemon
from tools.cluster.settings import Settings
from tools.layout import Layout

FORWARDING = Path("/proc/sys/net/ipv4/ip_forward")
TABLE = "llm-finetune"


def listens(address: str, port: int) -> bool:
    """Whether something accepts connections there."""
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex((address, port)) == 0


def up(layout: Layout, settings: Settings) -> None:
    """Make the bridge device with the node's address, and let pods out. Safe to repeat."""
    env = layout.environment()
    if not Path(f"/sys/class/net/{settings.link}").exists():
        shell.output(["ip", "link", "add", settings.link, "type", "bridge"], env=env)
    shell.output(["ip", "address", "replace", f"{settings.address}/24", "dev", settings.link], env=env)
    shell.output(["ip", "link", "set", settings.link, "up"], env=env)
    FORWARDING.write_text("1\n")
    inside = f"{{ {settings.node_network}, {settings.pod_network}, {settings.service_network} }}"
    shell.output(["nft", "-f", "-"], env=env, stdin=f"""
table ip {TABLE}
delete table ip {TABLE}
table ip {TABLE} {{
  chain postrouting {{
    type nat hook postrouting priority srcnat; policy accept;
    ip saddr {settings.pod_network} ip daddr != {inside} masquerade
  }}
}}
""")


def down(layout: Layout, settings: Settings) -> None:
    """Remove what `up` and kube-proxy made. Safe to repeat."""
    env = layout.environment()
    tables = shell.output(["nft", "-j", "list", "tables"], env=env)
    for entry in json.loads(tables)["nftables"]:
        table = entry.get("table", {})
        if table.get("name") in (TABLE, "kube-proxy"):
            shell.output(["nft", "delete", "table", table["family"], table["name"]], env=env)
    if Path(f"/sys/class/net/{settings.link}").exists():
        shell.output(["ip", "link", "delete", settings.link], env=env)


def pod_network(layout: Layout, settings: Settings) -> Path:
    """Write the CNI configuration: each pod on a link of its own, routed by the host (a bridge would need br_netfilter for services).
    Returns its folder."""
    folder = layout.state / "cni/net.d"
    folder.mkdir(parents=True, exist_ok=True)
    network = settings.pod_network.replace(".0.0/16", ".0.0/24")
    (folder / "10-llm-finetune.conflist").write_text(json.dumps({
        "cniVersion": "0.4.0", "name": settings.name, "plugins": [
            {"type": "ptp", "ipMasq": False, "mtu": 1500,
             "ipam": {"type": "host-local", "dataDir": str(layout.state / "cni/addresses"), "ranges": [[{"subnet": network}]],
                      "routes": [{"dst": "0.0.0.0/0"}]}},
            {"type": "portmap", "capabilities": {"portMappings": True}, "snat": True},
        ]}, indent=1))
    return folder


def localhost_port(layout: Layout, settings: Settings, name: str, port: int, node_port: int) -> Daemon:
    """A port on localhost that leads to a node port (kube-proxy's nftables mode does not serve node ports on localhost)."""
    return Daemon(f"port-{name}", ["socat", f"TCP-LISTEN:{port},bind=127.0.0.1,fork,reuseaddr", f"TCP:{settings.address}:{node_port}"],
                  ready=lambda: listens("127.0.0.1", port), timeout=10)
