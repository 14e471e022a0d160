"""`make site-up` and `make site-join`: a cluster of several servers, from bare machines to nodes that are Ready.

The steps are those of `make up`, with flannel between the servers and without anything that trains. Without a network card (NIC, ADDRESS)
`make site-up` opens the local cluster of `make up`, on its own bridge, for further servers: that is how the tests join a second one.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from tools.cluster import daemons, flannel, host, kubernetes, network, preflight, programs, registry, sources, steps
from tools.cluster.kubernetes import Invitation, Server
from tools.cluster.settings import Settings
from tools.cluster.steps import Say, Steps
from tools.errors import OperatorError
from tools.layout import Layout
from tools.progress import Step, clock

ROLES = {"worker": (), "control-plane": ("node-role.kubernetes.io/control-plane=:NoSchedule",)}
"""What runs on the first server beside the control plane: everything, or nothing; with the taints that see to it."""
NAME = re.compile(r"[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?")


@dataclasses.dataclass(frozen=True)
class Plan:
    """What was asked for, kept in the state folder, so that the same command without variables goes on with it."""

    server: str = ""
    """Address of the first server; empty: our bridge's."""
    network: str = ""
    """Of the servers."""
    card: str = ""
    """This server's network card."""
    address: str = ""
    name: str = ""
    role: str = "worker"
    backend: str = "host-gw"
    first: bool = True
    nat: bool = True
    labels: tuple[str, ...] = ()
    taints: tuple[str, ...] = ()

    def settings(self) -> Settings:
        return dataclasses.replace(Settings(), server=self.server, server_network=self.network if self.server else "")

    def as_server(self) -> Server:
        labels = self.labels if self.nat else (*self.labels, f"{flannel.NO_NAT}=no")
        return Server(self.name, self.address, (*ROLES[self.role], *self.taints), labels, lasting=bool(self.server))

    def mtu(self) -> int:
        """Of the pods' links."""
        return int(Path(f"/sys/class/net/{self.card}/mtu").read_text()) - flannel.BACKENDS[self.backend]


def _path(layout: Layout) -> Path:
    return layout.state / "site.json"


def kept(layout: Layout) -> Plan | None:
    """The plan by which this server was brought up; None if it was not, or by `make up`."""
    if not _path(layout).exists():
        return None
    found = json.loads(_path(layout).read_text())
    return Plan(**{**found, "labels": tuple(found["labels"]), "taints": tuple(found["taints"])})


def _keep(layout: Layout, plan: Plan) -> None:
    temporary = _path(layout).with_suffix(".new")
    temporary.write_text(json.dumps(dataclasses.asdict(plan), indent=1))
    temporary.rename(_path(layout))


def _on_card(plan: Plan, card: str, address: str) -> Plan:
    """The plan with this server's card, found by its name or address. Raises OperatorError if it is not there."""
    known = {name: found for _, name in socket.if_nameindex() if (found := network.card(name)) and not found.ip.is_loopback}
    name = next((n for n, found in known.items() if card in ("", n) and address in ("", str(found.ip)) and (card or address)), "")
    if not name:
        wanted = " and ".join(f"{key}={value}" for key, value in (("NIC", card), ("ADDRESS", address)) if value)
        raise OperatorError((f"No network card fits {wanted}" if wanted else "Give NIC=..., the network card that the servers share") + ". "
                            "This server's: " + (", ".join(f"{n} ({found})" for n, found in known.items()) or "none with an address") + ".")
    return dataclasses.replace(plan, card=name, address=str(known[name].ip), network=str(known[name].network))


def first_plan(layout: Layout, asked: argparse.Namespace) -> Plan:
    """For the first server. Raises OperatorError for what does not go together."""
    before = kept(layout)
    if before is not None:
        if not before.first:
            raise OperatorError(f"This server has joined the cluster of {before.server}. `make site-down` takes it out.")
        changed = [name for name, value in (("NIC", asked.nic), ("ADDRESS", asked.address), ("NAME", asked.name), ("ROLE", asked.role))
                   if value and value != getattr(before, {"NIC": "card"}.get(name, name.lower()))]
        if changed:
            raise OperatorError(f"This server was brought up with another {', '.join(changed)}. `make site-down` first.")
        return dataclasses.replace(before, backend=asked.backend or before.backend)
    plan = Plan(name=asked.name or socket.gethostname().lower(), role=asked.role or "worker", backend=asked.backend or "host-gw")
    if asked.nic or asked.address:
        if preflight.ours(layout):
            raise OperatorError("The local cluster of `make up` is here, on its own bridge: `make down` first, or give no NIC and ADDRESS.")
        plan = _on_card(plan, asked.nic, asked.address)
        return dataclasses.replace(plan, server=plan.address)
    settings = Settings()
    if not (layout.state / "control-plane").exists():
        _on_card(plan, "", "")  # raises, with the cards that there are
    return dataclasses.replace(plan, name=settings.name, address=settings.address, network=settings.node_network, card=settings.link)


def joining_plan(layout: Layout, asked: argparse.Namespace) -> Plan:
    """For a further server. Raises OperatorError for what does not go together."""
    before = kept(layout)
    if before is not None or preflight.ours(layout):
        if before is None or before.first:
            raise OperatorError("This server has a cluster of its own. `make site-down` takes it away.")
        if asked.server and asked.server != before.server:
            raise OperatorError(f"This server has joined the cluster of {before.server}. `make site-down` takes it out.")
        if (kubernetes.ETC / "kubelet.conf").exists():
            return before
    missing = [name for name in ("server", "token", "ca_hash", "programs") if not getattr(asked, name)]
    if missing:
        raise OperatorError(f"{', '.join(m.upper() for m in missing)} missing: take the command that `make site-up` prints on the first "
                            "server.")
    for name in ("ca_hash", "programs"):
        if not re.fullmatch(r"sha256:[0-9a-f]{64}", getattr(asked, name)):
            raise OperatorError(f"{name.upper()}={getattr(asked, name)}: sha256: and 64 hexadecimal digits, as `make site-up` prints them.")
    plan = Plan(server=asked.server, name=asked.name or socket.gethostname().lower(), first=False, nat=asked.nat != "no",
                backend=asked.backend or "host-gw", labels=_list(asked.labels), taints=_list(asked.taints))
    return _on_card(plan, asked.nic, asked.address or ("" if asked.nic else network.source_address(asked.server)))


def _list(text: str) -> tuple[str, ...]:
    return tuple(part for part in text.split(",") if part)


class FirstServer(Steps):
    """The control plane."""

    def __init__(self, layout: Layout, plan: Plan) -> None:
        super().__init__(layout, plan.settings(), plan.as_server())
        self.plan = plan
        self.programs = ""
        """Digest of what further servers run."""

    def steps(self) -> list[Step]:
        chain = self._sources([*sources.of_kubernetes(self.settings), sources.FLANNEL])
        return [
            Step("Debian packages", self.packages, 15),
            *chain,
            Step("node services", self.services, 3, after=("Debian packages",)),
            self._image("base", 60, "Debian packages"),
            Step("node images", self.node_images, 60, after=("base image", "node services", *(step.name for step in chain))),
            Step("programs for further servers", self.offer, 10, after=("node images",)),
            Step("Kubernetes", self.kubernetes, 60, after=("programs for further servers",)),
            Step("network between servers", self.connect, 30, after=("Kubernetes",)),
        ]

    def services(self, say: Say) -> bool:
        # It may serve only for reading (see `offer`), and is pushed to now.
        if self.plan.server:
            daemons.stop(registry.registry(self.layout, self.settings).pid_file(self.layout))
        return super().services(say)

    def named_images(self) -> list[tuple[str, str, str]]:
        return [*super().named_images(), ("flannel", "flannel", self.settings.flannel_version)]

    def offer(self, say: Say) -> bool:
        self.programs = programs.push(self.layout, self.settings)
        if self.plan.server:
            serving = registry.registry(self.layout, self.settings, read_only=True)
            daemons.stop(serving.pid_file(self.layout))
            serving.start(self.layout)
        return True

    def connect(self, say: Say) -> bool:
        """Flannel, and the pod network with this server's share of addresses."""
        kubeconfig = self.layout.kubeconfig
        addresses = kubernetes.pod_addresses(self.layout, self.server, kubeconfig)
        network.pod_network(self.layout, self.settings, addresses, mtu=self.plan.mtu())
        kubernetes.apply(self.layout, [flannel.proxy_affinity()])
        image = f"{self.repository}/flannel:{self.settings.flannel_version}"
        kubernetes.apply(self.layout, flannel.manifests(self.settings, image, self.plan.backend))
        if self.plan.server:
            kubernetes.apply(self.layout, [{"apiVersion": "node.k8s.io/v1", "kind": "RuntimeClass", "metadata": {"name": "nvidia"},
                                            "handler": "nvidia"}])
        say("flannel")
        kubernetes.wait_rollout(self.layout, flannel.NAMESPACE, "daemonset/flannel")
        return True


class FurtherServer(Steps):
    """A worker."""

    def __init__(self, layout: Layout, plan: Plan, invitation: Invitation, digest: str) -> None:
        super().__init__(layout, plan.settings(), plan.as_server())
        self.plan, self.invitation, self.digest = plan, invitation, digest

    def steps(self) -> list[Step]:
        return [
            Step("Debian packages", self.packages, 15),
            Step("programs from the first server", self.fetch, 10),
            Step("container runtime", self.services, 3, after=("Debian packages",)),
            Step("join", self.join, 20, after=("container runtime", "programs from the first server")),
            Step("network between servers", self.connect, 60, after=("join",)),
        ]

    def fetch(self, say: Say) -> bool:
        # Joined and repeated without the digest, it has its programs.
        return programs.fetch(self.layout, self.settings, self.digest, say) if self.digest else False

    def services(self, say: Say) -> bool:
        network.up(self.layout, self.settings, masquerade=self.plan.nat)
        return kubernetes.containerd(self.layout, self.settings).start(self.layout)

    def join(self, say: Say) -> bool:
        return kubernetes.join(self.layout, self.settings, self.server, self.invitation, say)

    def connect(self, say: Say) -> bool:
        """The pod network with this server's share of addresses, and flannel's routes to the other servers' pods."""
        kubeconfig = kubernetes.ETC / "kubelet.conf"
        addresses = kubernetes.pod_addresses(self.layout, self.server, kubeconfig)
        network.pod_network(self.layout, self.settings, addresses, mtu=self.plan.mtu(), port_mappings=self.plan.nat)
        say("waiting for Ready")
        kubernetes.wait_ready(self.layout, self.server, kubeconfig)
        say("waiting for flannel")
        deadline = time.monotonic() + 300
        while not network.routes(self.layout, self.settings):
            if time.monotonic() > deadline:
                raise OperatorError("Flannel has made no route to the other servers' pods within 5 minutes. On the first server: "
                                    f"kubectl -n {flannel.NAMESPACE} get pods -o wide")
            time.sleep(1.0)
        return True


def _run(layout: Layout, wanted: list[Step]) -> None:
    steps.run(layout, wanted)
    os.sync()  # containerd does not sync the images that it unpacks: after a power cut their programs would be empty


def notices(plan: Plan) -> list[str]:
    """What does not stand in the way of the cluster, and will in that of a run."""
    found = []
    if not host.mounts_nfs():
        found.append("this server cannot mount NFS: apt-get install nfs-common (on the servers that train).")
    if plan.card and plan.backend == "host-gw" and plan.mtu() < 9000:
        found.append(f"{plan.card} sends packets of {plan.mtu()} bytes; jumbo frames (9000) are faster where the switches take them.")
    return found


def _claim(layout: Layout, plan: Plan, problems: Iterator[str]) -> None:
    """Refuse what is in the way, before anything is touched; then note that this host is ours, and how it was asked to be."""
    _check_names(plan)
    preflight.check(problems)
    layout.state.mkdir(parents=True, exist_ok=True)
    (layout.state / preflight.MARK).touch()
    _keep(layout, plan)


def up(layout: Layout, asked: argparse.Namespace) -> None:
    """`make site-up`."""
    begin = time.monotonic()
    plan = first_plan(layout, asked)
    _claim(layout, plan, preflight.first_server_problems(layout, plan.settings()))
    work = FirstServer(layout, plan)
    _run(layout, work.steps())
    invitation = kubernetes.invite(layout)
    octet = f"LLM_FINETUNE_OCTET={plan.settings().octet} " if plan.settings().octet != 77 else ""
    backend = f" BACKEND={plan.backend}" if plan.backend != "host-gw" else ""
    took = clock(time.monotonic() - begin)
    print("\n".join(["", *(f"Note: {n}" for n in notices(plan)), f"""First server up in {took}: {plan.name}, {plan.address}.
On each further server, as root, in a checkout of the same commit (the token is good for a day, `make site-up` prints another):

  {octet}make site-join SERVER={plan.address} TOKEN={invitation.token} \\
    CA_HASH={invitation.ca_hash} \\
    PROGRAMS={work.programs}{backend}

Here:
  export KUBECONFIG={layout.kubeconfig} PATH={layout.bin}:$PATH
  kubectl get nodes -o wide"""]))


def join(layout: Layout, asked: argparse.Namespace) -> None:
    """`make site-join`."""
    begin = time.monotonic()
    plan = joining_plan(layout, asked)
    _claim(layout, plan, preflight.further_server_problems(layout, plan.settings()))
    _run(layout, FurtherServer(layout, plan, Invitation(asked.token, asked.ca_hash), asked.programs).steps())
    print("\n".join(["", *(f"Note: {n}" for n in notices(plan)),
                     f"{plan.name}, {plan.address}, has joined the cluster of {plan.server} in {clock(time.monotonic() - begin)}."]))


def _check_names(plan: Plan) -> None:
    if not NAME.fullmatch(plan.name):
        raise OperatorError(f"{plan.name!r} is no name for a node: lower-case letters, digits, '-' and '.'. Give NAME=...")
    for label in plan.labels:
        if not re.fullmatch(r"[\w./-]+=[\w.-]*", label):
            raise OperatorError(f"LABELS={label}: write key=value, several with commas between them.")
    for taint in plan.taints:
        if not re.fullmatch(r"[\w./-]+(=[\w.-]*)?:(NoSchedule|PreferNoSchedule|NoExecute)", taint):
            raise OperatorError(f"TAINTS={taint}: write key=value:NoSchedule, several with commas between them.")


def _down(arguments: argparse.Namespace) -> int:
    from tools.cluster.down import down
    layout = Layout()
    plan = kept(layout)
    settings = plan.settings() if plan else Settings()
    print("This server is no longer a node; caches are kept." if down(layout, settings) else "This server is no node of ours.")
    if plan is not None and not plan.first:
        print(f"On the first server: kubectl delete node {plan.name}")
    return 0


def _up(arguments: argparse.Namespace) -> int:
    up(Layout(), arguments)
    return 0


def _join(arguments: argparse.Namespace) -> int:
    join(Layout(), arguments)
    return 0


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """site-up, site-join and site-down."""
    def option(command: argparse.ArgumentParser, name: str, text: str, choices: list[str] | None = None) -> None:
        command.add_argument(f"--{name}", default="", help=text, choices=choices)

    command = commands.add_parser("site-up", help="bring the first server of a cluster up; prints the command for further ones")
    option(command, "role", "what the first server is beside control plane", list(ROLES))
    command.set_defaults(run=_up)
    further = commands.add_parser("site-join", help="make this server a node of the first server's cluster")
    for name, text in (("server", "address of the first server"), ("token", "bootstrap token"), ("ca-hash", "sha256:... of its authority"),
                       ("programs", "sha256:... of the programs that its registry offers"),
                       ("labels", "key=value,... of the node"), ("taints", "key=value:effect,... of the node")):
        option(further, name, text)
    option(further, "nat", "no: this kernel cannot translate addresses; the first server's does, being the gateway", ["yes", "no"])
    further.set_defaults(run=_join)
    for one in (command, further):
        option(one, "nic", "network card that the servers reach each other on")
        option(one, "address", "this server's address on it (instead of its name)")
        option(one, "name", "of the node; the host's name if not given")
        option(one, "backend", "host-gw: routes, for servers on one link; vxlan: a tunnel, for others", list(flannel.BACKENDS))
    commands.add_parser("site-down", help="take this server's node away; the cache stays").set_defaults(run=_down)
