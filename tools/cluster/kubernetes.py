"""A node: containerd, and Kubernetes as kubeadm's phases set it up, with the kubelet started by hand."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml
from kubernetes import client
from kubernetes import config as kubernetes_config

from tools import shell
from tools.cluster import host, network
from tools.cluster.daemons import Daemon
from tools.cluster.settings import Settings
from tools.errors import OperatorError
from tools.layout import Layout

Say = Callable[[str], None]
ETC = Path("/etc/kubernetes")
KUBELET = Path("/var/lib/kubelet")
MANAGER = "llm-finetune-up"
"""Field manager of what `make up` applies."""


@dataclass(frozen=True)
class Server:
    """This machine as a node of a cluster."""

    name: str
    address: str
    taints: tuple[str, ...] = ()
    """`key=value:effect`."""
    labels: tuple[str, ...] = ()
    """`key=value`."""
    lasting: bool = False
    """Of a site's cluster, which a power cut must not harm and which has more than one server; else the local one."""


def images(settings: Settings) -> str:
    """Where the images that kubeadm names are."""
    return f"{settings.registry}/node"


def pause(settings: Settings) -> str:
    """The image of every pod's sandbox."""
    return f"{images(settings)}/pause:1"


def containerd(layout: Layout, settings: Settings) -> Daemon:
    """containerd with its own root (in the cache: images survive `make down`), state and socket."""
    folder = layout.state / "containerd"
    certs = folder / "certs.d" / settings.registry
    certs.mkdir(parents=True, exist_ok=True)
    (certs / "hosts.toml").write_text(f'server = "http://{settings.registry}"\n[host."http://{settings.registry}"]\n'
                                      '  capabilities = ["pull", "resolve"]\n')
    network.forget_torn_results(settings)
    debian = layout.debian / "root"
    config = folder / "config.toml"
    runtimes = {"runc": f"{debian}/usr/sbin/runc"}
    if program := host.nvidia_runtime():
        runtimes["nvidia"] = program  # for pods whose RuntimeClass names it
    config.write_text(f"""version = 2
root = "{layout.cache}/containerd"
state = "{layout.runtime}/containerd"
disabled_plugins = ["io.containerd.internal.v1.opt", "io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.zfs"]
[grpc]
  address = "{socket(layout)}"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{pause(settings)}"
  restrict_oom_score_adj = {str(not host.may_lower_oom_score()).lower()}
  netns_mounts_under_state_dir = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{debian}/usr/lib/cni"
    conf_dir = "{network.pod_folder(layout)}"
  [plugins."io.containerd.grpc.v1.cri".registry]
    config_path = "{folder}/certs.d"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    discard_unpacked_layers = true
{"".join(_runtime(name, program) for name, program in runtimes.items())}""")
    return Daemon("containerd", [debian / "usr/bin/containerd", "--config", config],
                  ready=lambda: shell.succeeds([*ctr(layout), "version"], env=layout.environment()))


def _runtime(name: str, program: str) -> str:
    """One of containerd's runtimes."""
    return f"""    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.{name}]
      runtime_type = "io.containerd.runc.v2"
      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.{name}.options]
        BinaryName = "{program}"
        SystemdCgroup = {str(host.cgroup_driver() == "systemd").lower()}
"""


def socket(layout: Layout) -> Path:
    return layout.runtime / "containerd.sock"


def ctr(layout: Layout) -> list[str | Path]:
    """containerd's own client, in Kubernetes' namespace."""
    return [layout.debian / "root/usr/bin/ctr", "--address", socket(layout), "--namespace", "k8s.io"]


def pull(layout: Layout, reference: str, digest: str, log: Path) -> bool:
    """Bring an image from the node's registry into containerd before a pod asks for it. Returns False if it was there.

    `reference` is a tag or `name@digest`; a tag that stands for another image than `digest` is pulled anew.
    """
    env = layout.environment()
    rows = shell.output([*ctr(layout), "images", "list", f"name=={reference}"], env=env).splitlines()[1:]
    if any(digest in row for row in rows):
        return False
    shell.run([*ctr(layout), "images", "pull", "--plain-http", "--snapshotter", "overlayfs", reference], log, env=env)
    return True


def _own_kubelet(layout: Layout) -> dict[str, Any]:
    """Fields of the kubelet's configuration that differ from server to server."""
    resolv = Path("/etc/resolv.conf")
    upstream = Path("/run/systemd/resolve/resolv.conf")
    if upstream.exists():
        resolv = upstream  # the stub on 127.0.0.53 cannot be reached from pods
    return {"cgroupDriver": host.cgroup_driver(), "resolvConf": str(resolv), "podLogsDir": str(layout.state / "pod-logs"),
            "containerRuntimeEndpoint": f"unix://{socket(layout)}"}


def _registration(layout: Layout, server: Server) -> dict[str, Any]:
    """kubeadm's nodeRegistration."""
    extra = [{"name": "node-ip", "value": server.address}]
    if server.labels:
        extra.append({"name": "node-labels", "value": ",".join(server.labels)})
    taints = []
    for taint in server.taints:
        key, _, effect = taint.rpartition(":")
        taints.append({"key": key.partition("=")[0], "value": key.partition("=")[2], "effect": effect})
    return {"name": server.name, "criSocket": f"unix://{socket(layout)}", "taints": taints, "kubeletExtraArgs": extra}


def _kubeadm_config(layout: Layout, settings: Settings, server: Server) -> str:
    """kubeadm's configuration of the first server, which is control plane and, without a taint, worker."""
    etcd = {"quota-backend-bytes": "1073741824"}
    kubelet: dict[str, Any] = {}
    api: dict[str, Any] = {"extraArgs": [{"name": "goaway-chance", "value": "0"}]}
    if not server.lasting:
        etcd["unsafe-no-fsync"] = "true"  # the cluster is thrown away by `make down`: a power cut may cost it its last second
        kubelet = {"evictionHard": {"nodefs.available": "1%", "imagefs.available": "1%", "memory.available": "100Mi"},
                   "imageGCHighThresholdPercent": 100}
        # Collected more often: 0.5 GB less for an API server that has little to do.
        api["extraEnvs"] = [{"name": "GOGC", "value": "40"}]
    documents: list[dict[str, Any]] = [
        {"apiVersion": "kubeadm.k8s.io/v1beta4", "kind": "InitConfiguration",
         "localAPIEndpoint": {"advertiseAddress": settings.address, "bindPort": settings.api_port},
         "nodeRegistration": _registration(layout, server)},
        {"apiVersion": "kubeadm.k8s.io/v1beta4", "kind": "ClusterConfiguration", "clusterName": settings.name,
         "kubernetesVersion": settings.kubernetes_version, "imageRepository": images(settings),
         "networking": {"podSubnet": settings.pod_network, "serviceSubnet": settings.service_network},
         "etcd": {"local": {"imageTag": settings.etcd_version, "dataDir": str(layout.state / "etcd"),
                            "extraArgs": [{"name": name, "value": value} for name, value in etcd.items()]}},
         "dns": {"imageTag": settings.coredns_version}, "apiServer": api},
        {"apiVersion": "kubelet.config.k8s.io/v1beta1", "kind": "KubeletConfiguration", **_own_kubelet(layout), **kubelet,
         "failCgroupV1": False, "failSwapOn": False, "maxPods": 110, "serializeImagePulls": False, "nodeStatusUpdateFrequency": "10s",
         "shutdownGracePeriod": "0s", "registryPullQPS": 0, "eventRecordQPS": 0},
        {"apiVersion": "kubeproxy.config.k8s.io/v1alpha1", "kind": "KubeProxyConfiguration", "mode": "nftables",
         "conntrack": {"maxPerCore": 0, "min": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s"}},
    ]
    return "---\n".join(yaml.safe_dump(d, sort_keys=False) for d in documents)


def kubelet(layout: Layout, server: Server) -> Daemon:
    """The kubelet, by the files that kubeadm has written."""
    flags = (KUBELET / "kubeadm-flags.env").read_text().partition("=")[2].strip().strip('"').split()
    return Daemon("kubelet", [layout.bin / "kubelet", "--kubeconfig", ETC / "kubelet.conf", "--bootstrap-kubeconfig",
                              ETC / "bootstrap-kubelet.conf", "--config", KUBELET / "config.yaml", "--hostname-override", server.name,
                              "--root-dir", KUBELET, *[f for f in flags if "hostname-override" not in f]],
                  ready=lambda: _healthy("http://127.0.0.1:10248/healthz"), timeout=90)


def _healthy(url: str) -> bool:
    try:
        return httpx.get(url, timeout=2, verify=False).status_code == 200
    except httpx.HTTPError:
        return False


def api_ready(settings: Settings) -> bool:
    """Whether the API server answers that it is ready."""
    return _healthy(f"https://{settings.address}:{settings.api_port}/readyz")


def up(layout: Layout, settings: Settings, server: Server, say: Say) -> bool:
    """Bring Kubernetes up on the first server (containerd must run). Safe to repeat at any point. Returns False if all of it ran."""
    log = layout.logs / "kubeadm.log"
    config = layout.state / "kubeadm.yaml"
    env = layout.environment()
    config.write_text(_kubeadm_config(layout, settings, server))
    fresh = not (layout.state / "control-plane").exists()

    def phase(*words: str) -> None:
        shell.run([layout.bin / "kubeadm", "init", "phase", *words, "--config", config], log, env=env)

    if fresh:
        say("certificates and manifests")
        phase("certs", "all")
        phase("kubeconfig", "all")
        phase("etcd", "local")
        phase("control-plane", "all")
        phase("kubelet-start")
        (layout.state / "control-plane").write_text("")
    shutil.copy(ETC / "admin.conf", layout.kubeconfig)
    os.chmod(layout.kubeconfig, 0o600)
    say("kubelet")
    started = kubelet(layout, server).start(layout)
    say("API server")
    deadline = time.monotonic() + 180
    while not api_ready(settings):
        if time.monotonic() > deadline:
            raise OperatorError(f"The API server was not ready within 3 minutes. Logs: {layout.state}/pod-logs, {layout.logs}/kubelet.log")
        time.sleep(0.5)
    if not (layout.state / "addons").exists():
        say("cluster settings, DNS and proxy")
        # admin.conf speaks for a group that gets its rights from a binding, which the super-admin makes first.
        apply(layout, [{"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRoleBinding",
                        "metadata": {"name": "kubeadm:cluster-admins"},
                        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "cluster-admin"},
                        "subjects": [{"apiGroup": "rbac.authorization.k8s.io", "kind": "Group", "name": "kubeadm:cluster-admins"}]}],
              kubeconfig=ETC / "super-admin.conf")
        phase("upload-config", "all")
        phase("bootstrap-token")
        phase("addon", "all")
        if not server.lasting:  # one replica of CoreDNS is enough for one server
            shell.run([layout.kubectl, "--namespace", "kube-system", "scale", "deployment", "coredns", "--replicas=1"], log,
                      env=env)
        (layout.state / "addons").write_text("")
    say("node")
    wait_ready(layout, server, layout.kubeconfig)
    wait_rollout(layout, "kube-system", "deployment/coredns")
    return fresh or started


@dataclass(frozen=True)
class Invitation:
    """What a further server needs to know to join."""

    token: str
    """kubeadm's bootstrap token."""
    ca_hash: str
    """`sha256:...` of the cluster's certificate authority."""


def invite(layout: Layout) -> Invitation:
    """Make a token for further servers, good for a day."""
    words = shell.output([layout.bin / "kubeadm", "token", "create", "--ttl", "24h", "--print-join-command", "--kubeconfig",
                          ETC / "admin.conf"], env=layout.environment()).split()
    return Invitation(words[words.index("--token") + 1], words[words.index("--discovery-token-ca-cert-hash") + 1])


def join(layout: Layout, settings: Settings, server: Server, invitation: Invitation, say: Say) -> bool:
    """Make this machine a worker of the cluster (containerd must run). Safe to repeat at any point. Returns False if it was one."""
    config, patches = layout.state / "kubeadm.yaml", layout.state / "kubeadm-patches"
    env, log = layout.environment(), layout.logs / "kubeadm.log"
    if not (ETC / "kubelet.conf").exists():
        say("asking the first server")
        (ETC / "manifests").mkdir(parents=True, exist_ok=True)  # the kubelet looks there for static pods, and says so each second
        patches.mkdir(exist_ok=True)
        (patches / "kubeletconfiguration+merge.yaml").write_text(yaml.safe_dump(_own_kubelet(layout)))
        config.write_text(yaml.safe_dump({
            "apiVersion": "kubeadm.k8s.io/v1beta4", "kind": "JoinConfiguration", "nodeRegistration": _registration(layout, server),
            "patches": {"directory": str(patches)},
            "discovery": {"bootstrapToken": {"apiServerEndpoint": f"{settings.address}:{settings.api_port}", "token": invitation.token,
                                             "caCertHashes": [invitation.ca_hash]}}}))
        shell.run([layout.bin / "kubeadm", "join", "phase", "kubelet-start", "--config", config], log, env=env)
    say("kubelet")
    started = kubelet(layout, server).start(layout)
    deadline = time.monotonic() + 120
    while not (ETC / "kubelet.conf").exists():
        if time.monotonic() > deadline:
            raise OperatorError(f"The first server gave no certificate within 2 minutes. The kubelet's log: {layout.logs}/kubelet.log")
        time.sleep(0.5)
    for path in (ETC / "bootstrap-kubelet.conf", config):  # they hold the token
        path.unlink(missing_ok=True)
    return started


def pod_addresses(layout: Layout, server: Server, kubeconfig: Path) -> str:
    """The range that the controller-manager has given to a server's pods."""
    deadline = time.monotonic() + 120
    while True:
        try:
            found = shell.output([layout.kubectl, "--kubeconfig", kubeconfig, "get", "node", server.name, "--output",
                                  "jsonpath={.spec.podCIDR}"], env=layout.environment()).strip()
        except OperatorError:
            found = ""  # the node is not registered yet
        if found:
            return found
        if time.monotonic() > deadline:
            raise OperatorError(f"Node {server.name} has no addresses for pods after 2 minutes. See {layout.logs}/kubelet.log")
        time.sleep(1.0)


def wait_ready(layout: Layout, server: Server, kubeconfig: Path, seconds: int = 180) -> None:
    """Wait until the node is Ready."""
    shell.output([layout.kubectl, "--kubeconfig", kubeconfig, "wait", "node", server.name, "--for=condition=Ready",
                  f"--timeout={seconds}s"], env=layout.environment(), timeout=seconds + 10)


def wait_rollout(layout: Layout, namespace: str, workload: str, seconds: int = 180) -> None:
    """Wait until a workload (`deployment/name`) runs as it was last applied."""
    shell.output([layout.kubectl, "--namespace", namespace, "rollout", "status", workload, f"--timeout={seconds}s"],
                 env=layout.environment(), timeout=seconds + 10)


def apply(layout: Layout, manifests: list[dict[str, Any]], *, kubeconfig: Path | None = None) -> None:
    """Server-side apply of manifests, in their order."""
    text = "---\n".join(yaml.safe_dump(m, sort_keys=False) for m in manifests)
    shell.output([layout.kubectl, "--kubeconfig", kubeconfig or layout.kubeconfig, "apply", "--server-side", "--force-conflicts",
                  "--field-manager", MANAGER, "--filename", "-"], env=layout.environment(), stdin=text, timeout=300)


def api_client(layout: Layout) -> client.ApiClient:
    """A Kubernetes client for the local cluster, or for KUBECONFIG where that is set."""
    path = os.environ.get("KUBECONFIG") or str(layout.kubeconfig)
    if not Path(path.split(":")[0]).exists():
        raise OperatorError(f"{path} does not exist. Bring the local cluster up with `make up`, or set KUBECONFIG to your cluster's.")
    return kubernetes_config.new_client_from_config(config_file=path)
