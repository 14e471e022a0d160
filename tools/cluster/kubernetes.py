"""The node: containerd, and Kubernetes as kubeadm's phases set it up, with the kubelet started by hand."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
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


def containerd(layout: Layout, settings: Settings, pause: str) -> Daemon:
    """containerd with its own root (in the cache: images survive `make down`), state and socket. `pause`: the sandbox image."""
    folder = layout.state / "containerd"
    certs = folder / "certs.d" / settings.registry
    certs.mkdir(parents=True, exist_ok=True)
    (certs / "hosts.toml").write_text(f'server = "http://{settings.registry}"\n[host."http://{settings.registry}"]\n'
                                      '  capabilities = ["pull", "resolve"]\n')
    debian = layout.debian / "root"
    config = folder / "config.toml"
    config.write_text(f"""version = 2
root = "{layout.cache}/containerd"
state = "{layout.runtime}/containerd"
disabled_plugins = ["io.containerd.internal.v1.opt", "io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.zfs"]
[grpc]
  address = "{socket(layout)}"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{pause}"
  restrict_oom_score_adj = {str(not host.may_lower_oom_score()).lower()}
  netns_mounts_under_state_dir = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{debian}/usr/lib/cni"
    conf_dir = "{network.pod_network(layout, settings)}"
  [plugins."io.containerd.grpc.v1.cri".registry]
    config_path = "{folder}/certs.d"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    discard_unpacked_layers = true
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
        BinaryName = "{debian}/usr/sbin/runc"
        SystemdCgroup = {str(host.cgroup_driver() == "systemd").lower()}
""")
    return Daemon("containerd", [debian / "usr/bin/containerd", "--config", config],
                  ready=lambda: shell.succeeds([*ctr(layout), "version"], env=layout.environment()))


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


def _kubeadm_config(layout: Layout, settings: Settings, repository: str) -> str:
    """kubeadm's configuration: one node that is control plane and worker, on the node's own address."""
    resolv = Path("/etc/resolv.conf")
    upstream = Path("/run/systemd/resolve/resolv.conf")
    if upstream.exists():
        resolv = upstream  # the stub on 127.0.0.53 cannot be reached from pods
    loose = {"nodefs.available": "1%", "imagefs.available": "1%", "memory.available": "100Mi"}
    documents: list[dict[str, Any]] = [
        {"apiVersion": "kubeadm.k8s.io/v1beta4", "kind": "InitConfiguration",
         "localAPIEndpoint": {"advertiseAddress": settings.address, "bindPort": settings.api_port},
         "nodeRegistration": {"name": settings.name, "criSocket": f"unix://{socket(layout)}", "taints": [],
                              "kubeletExtraArgs": [{"name": "node-ip", "value": settings.address}]}},
        {"apiVersion": "kubeadm.k8s.io/v1beta4", "kind": "ClusterConfiguration", "clusterName": settings.name,
         "kubernetesVersion": settings.kubernetes_version, "imageRepository": repository,
         "networking": {"podSubnet": settings.pod_network, "serviceSubnet": settings.service_network},
         "etcd": {"local": {"imageTag": settings.etcd_version, "dataDir": str(layout.state / "etcd"),
                            # The cluster is thrown away by `make down`: a power cut may cost it its last second.
                            "extraArgs": [{"name": "unsafe-no-fsync", "value": "true"},
                                          {"name": "quota-backend-bytes", "value": "1073741824"}]}},
         "dns": {"imageTag": settings.coredns_version},
         # Collected more often: 0.5 GB less for an API server that has little to do.
         "apiServer": {"extraArgs": [{"name": "goaway-chance", "value": "0"}], "extraEnvs": [{"name": "GOGC", "value": "40"}]}},
        {"apiVersion": "kubelet.config.k8s.io/v1beta1", "kind": "KubeletConfiguration", "cgroupDriver": host.cgroup_driver(),
         "failCgroupV1": False, "failSwapOn": False, "resolvConf": str(resolv), "podLogsDir": str(layout.state / "pod-logs"),
         "evictionHard": loose, "imageGCHighThresholdPercent": 100, "maxPods": 110, "serializeImagePulls": False,
         "containerRuntimeEndpoint": f"unix://{socket(layout)}", "nodeStatusUpdateFrequency": "10s",
         "shutdownGracePeriod": "0s", "registryPullQPS": 0, "eventRecordQPS": 0},
        {"apiVersion": "kubeproxy.config.k8s.io/v1alpha1", "kind": "KubeProxyConfiguration", "mode": "nftables",
         "conntrack": {"maxPerCore": 0, "min": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s"}},
    ]
    return "---\n".join(yaml.safe_dump(d, sort_keys=False) for d in documents)


def _kubelet(layout: Layout, settings: Settings) -> Daemon:
    flags = (KUBELET / "kubeadm-flags.env").read_text().partition("=")[2].strip().strip('"').split()
    return Daemon("kubelet", [layout.bin / "kubelet", "--kubeconfig", ETC / "kubelet.conf", "--bootstrap-kubeconfig",
                              ETC / "bootstrap-kubelet.conf", "--config", KUBELET / "config.yaml", "--hostname-override", settings.name,
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


def up(layout: Layout, settings: Settings, repository: str, say: Say) -> bool:
    """Bring Kubernetes up on the node (containerd must run). Safe to repeat at any point. Returns False if all of it ran."""
    log = layout.logs / "kubeadm.log"
    config = layout.state / "kubeadm.yaml"
    env = layout.environment()
    config.write_text(_kubeadm_config(layout, settings, repository))
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
    started = _kubelet(layout, settings).start(layout)
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
        # One replica of CoreDNS is enough for one node.
        shell.run([layout.kubectl, "--namespace", "kube-system", "scale", "deployment", "coredns", "--replicas=1"], log, env=env)
        (layout.state / "addons").write_text("")
    say("node")
    shell.run([layout.kubectl, "wait", "node", settings.name, "--for=condition=Ready", "--timeout=120s"], log, env=env)
    wait_rollout(layout, "kube-system", "deployment/coredns")
    return fresh or started


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
