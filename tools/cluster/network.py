"""The server's address, forwarding and masquerading of pods, and the ports on localhost."""

from __future__ import annotations

import fcntl
import ipaddress
import json
import socket
import struct
from pathlib import Path

from tools import shell
from tools.cluster import host
from tools.cluster.daemons import Daemon
from tools.cluster.settings import Settings
from tools.layout import Layout

FORWARDING = Path("/proc/sys/net/ipv4/ip_forward")
TABLE = "llm-finetune"
VXLAN = "flannel.1"
"""Device of flannel's vxlan backend."""


def listens(address: str, port: int) -> bool:
    """Whether something accepts connections there."""
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex((address, port)) == 0


def card(name: str) -> ipaddress.IPv4Interface | None:
    """First IPv4 address of a network card, with its network; None if it has none."""
    def ask(request: int) -> str:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            return socket.inet_ntoa(fcntl.ioctl(probe, request, struct.pack("256s", name.encode()[:15]))[20:24])
    try:
        return ipaddress.IPv4Interface(f"{ask(0x8915)}/{ask(0x891B)}")  # SIOCGIFADDR, SIOCGIFNETMASK
    except OSError:
        return None


def card_with(address: str) -> str:
    """Name of the network card that has an address; empty if none has."""
    return next((name for _, name in socket.if_nameindex() if (found := card(name)) and str(found.ip) == address), "")


def source_address(destination: str) -> str:
    """Our own address on the way to another; empty if there is no way."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((destination, 9))
        except OSError:
            return ""
        return str(probe.getsockname()[0])


def up(layout: Layout, settings: Settings, *, masquerade: bool = True) -> None:
    """Make the bridge device with the node's address if no network card has it, and let pods out. Safe to repeat."""
    env = layout.environment()
    if not settings.server:
        if not Path(f"/sys/class/net/{settings.link}").exists():
            shell.output(["ip", "link", "add", settings.link, "type", "bridge"], env=env)
        shell.output(["ip", "address", "replace", f"{settings.address}/24", "dev", settings.link], env=env)
        shell.output(["ip", "link", "set", settings.link, "up"], env=env)
    FORWARDING.write_text("1\n")
    if not masquerade:
        return
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
    """Remove what `up`, kube-proxy and flannel made. Safe to repeat."""
    env = layout.environment()
    tables = shell.output(["nft", "-j", "list", "tables"], env=env)
    for entry in json.loads(tables)["nftables"]:
        table = entry.get("table", {})
        if table.get("name") in (TABLE, "kube-proxy"):
            shell.output(["nft", "delete", "table", table["family"], table["name"]], env=env)
    for link in (settings.link, VXLAN):
        if Path(f"/sys/class/net/{link}").exists():
            shell.output(["ip", "link", "delete", link], env=env)
    for route in routes(layout, settings):
        shell.output(["ip", "route", "delete", route["dst"], "via", route["gateway"]], env=env)


def routes(layout: Layout, settings: Settings) -> list[dict[str, str]]:
    """Routes to the pods of other servers, which flannel makes."""
    found = json.loads(shell.output(["ip", "-json", "-4", "route", "show", "root", settings.pod_network], env=layout.environment()))
    return [route for route in found if "gateway" in route]


def pod_folder(layout: Layout) -> Path:
    """Where the container runtime looks for the pod network's configuration."""
    folder = layout.state / "cni/net.d"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def first_pods(settings: Settings) -> str:
    """Addresses of the pods on the first server, as the controller-manager deals them."""
    return settings.pod_network.replace(".0.0/16", ".0.0/24")


def pod_network(layout: Layout, settings: Settings, addresses: str, *, mtu: int = 1500, port_mappings: bool = True) -> None:
    """Write the CNI configuration: each pod on a link of its own, routed by the host (a bridge would need br_netfilter for services).

    `addresses`: of this server's pods.
    """
    plugins: list[dict[str, object]] = [
        {"type": "ptp", "ipMasq": False, "mtu": mtu,
         "ipam": {"type": "host-local", "dataDir": str(layout.state / "cni/addresses"), "ranges": [[{"subnet": addresses}]],
                  "routes": [{"dst": "0.0.0.0/0"}]}}]
    if port_mappings:
        plugins.append({"type": "portmap", "capabilities": {"portMappings": True}, "snat": True})
    text = json.dumps({"cniVersion": "0.4.0", "name": settings.name, "plugins": plugins}, indent=1)
    path = pod_folder(layout) / "10-llm-finetune.conflist"
    if not path.exists() or path.read_text() != text:
        temporary = path.with_suffix(".new")
        temporary.write_text(text)
        temporary.rename(path)


def forget_torn_results(settings: Settings) -> None:
    """Remove what the CNI plugins noted about pods in files that a power cut left empty: with them no such pod could be taken down."""
    for path in Path(host.OWN_RESULTS).glob(f"{settings.name}-*"):
        try:
            json.loads(path.read_text())
        except ValueError:
            path.unlink()


def localhost_port(layout: Layout, settings: Settings, name: str, port: int, node_port: int) -> Daemon:
    """A port on localhost that leads to a node port (kube-proxy's nftables mode does not serve node ports on localhost)."""
    return Daemon(f"port-{name}", ["socat", f"TCP-LISTEN:{port},bind=127.0.0.1,fork,reuseaddr", f"TCP:{settings.address}:{node_port}"],
                  ready=lambda: listens("127.0.0.1", port), timeout=10)
