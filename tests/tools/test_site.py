"""`make site-up` and `make site-join` before they touch anything: what they are asked for, what they refuse, and what they write."""

from __future__ import annotations

import argparse
import dataclasses
import ipaddress
import json
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from tests.waiting import wait_for
from tools import images, oci
from tools.cluster import flannel, host, kubernetes, network, preflight, programs, registry, site, up
from tools.cluster.kubernetes import Server
from tools.cluster.settings import Settings
from tools.errors import OperatorError
from tools.layout import Layout

CARDS = {"lo": "127.0.0.1/8", "eth0": "10.20.0.5/24", "ens1": "192.168.7.4/16"}


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    made = Layout(cache=tmp_path / "cache", state=tmp_path / "state", runtime=tmp_path / "run")
    made.state.mkdir()
    return made


@pytest.fixture(autouse=True)
def cards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.if_nameindex", lambda: list(enumerate([*CARDS, "down0"])))
    monkeypatch.setattr(network, "card", lambda name: ipaddress.IPv4Interface(CARDS[name]) if name in CARDS else None)
    monkeypatch.setattr(network, "source_address", lambda destination: "10.20.0.5" if destination.startswith("10.20.") else "")
    monkeypatch.setattr("socket.gethostname", lambda: "GPU-1")


def asked(**given: str) -> argparse.Namespace:
    names = ("nic", "address", "name", "role", "backend", "server", "token", "ca_hash", "programs", "labels", "taints", "nat")
    return argparse.Namespace(**{name: given.get(name, "") for name in names})


INVITED = {"server": "10.20.0.4", "token": "abcdef.0123456789abcdef", "ca_hash": "sha256:" + "a" * 64, "programs": "sha256:" + "b" * 64}


@pytest.mark.parametrize("given", [{"nic": "eth0"}, {"address": "10.20.0.5"}, {"nic": "eth0", "address": "10.20.0.5"}])
def test_first_server_by_card_or_address(layout: Layout, given: dict[str, str]) -> None:
    plan = site.first_plan(layout, asked(**given))
    assert (plan.server, plan.network, plan.card, plan.address, plan.name) == ("10.20.0.5", "10.20.0.0/24", "eth0", "10.20.0.5", "gpu-1")
    assert plan.settings().registry == "10.20.0.5:5000"
    assert plan.settings().node_network == "10.20.0.0/24"
    assert plan.as_server().lasting


@pytest.mark.parametrize(("given", "message"), [
    ({}, r"Give NIC=.*eth0 \(10\.20\.0\.5/24\), ens1"), ({"nic": "down0"}, "No network card fits NIC=down0"),
    ({"nic": "ens1", "address": "10.20.0.5"}, "fits NIC=ens1 and ADDRESS=10.20.0.5"), ({"address": "127.0.0.1"}, "fits ADDRESS=127"),
])
def test_first_server_without_a_card(layout: Layout, given: dict[str, str], message: str) -> None:
    with pytest.raises(OperatorError, match=message):
        site.first_plan(layout, asked(**given))


def test_the_local_cluster_is_opened_on_its_bridge(layout: Layout) -> None:
    (layout.state / preflight.MARK).touch()
    (layout.state / "control-plane").touch()
    plan = site.first_plan(layout, asked())
    settings = Settings()
    assert (plan.server, plan.name, plan.address, plan.card) == ("", settings.name, settings.address, settings.link)
    assert plan.settings() == settings
    assert plan.as_server() == Server(settings.name, settings.address), "as `make up` made it"
    with pytest.raises(OperatorError, match="`make down` first"):
        site.first_plan(layout, asked(nic="eth0"))


def test_the_same_command_goes_on_with_what_was_asked_before(layout: Layout) -> None:
    plan = site.first_plan(layout, asked(nic="eth0", name="head", role="control-plane"))
    site._keep(layout, plan)
    assert site.first_plan(layout, asked()) == plan
    assert site.first_plan(layout, asked(nic="eth0", backend="vxlan")) == dataclasses.replace(plan, backend="vxlan")
    with pytest.raises(OperatorError, match="another NIC, NAME"):
        site.first_plan(layout, asked(nic="ens1", name="other"))
    with pytest.raises(OperatorError, match="a cluster of its own"):
        site.joining_plan(layout, asked(**INVITED))
    assert plan.as_server().taints == ("node-role.kubernetes.io/control-plane=:NoSchedule",)


def test_further_server(layout: Layout) -> None:
    """Its card is the one on the way to the first server, unless another is named."""
    plan = site.joining_plan(layout, asked(**INVITED, labels="a=b,c=d", taints="gpu=yes:NoSchedule", nat="no"))
    assert (plan.server, plan.card, plan.address, plan.first) == ("10.20.0.4", "eth0", "10.20.0.5", False)
    assert plan.as_server().labels == ("a=b", "c=d", "llm-finetune/nat=no")
    assert site.joining_plan(layout, asked(**INVITED, nic="ens1")).address == "192.168.7.4"
    site._keep(layout, plan)
    with pytest.raises(OperatorError, match="has joined the cluster"):
        site.joining_plan(layout, asked(**{**INVITED, "server": "10.20.0.9"}))
    with pytest.raises(OperatorError, match="has joined the cluster"):
        site.first_plan(layout, asked())


def test_further_server_without_the_printed_words(layout: Layout) -> None:
    with pytest.raises(OperatorError, match="CA_HASH, PROGRAMS missing"):
        site.joining_plan(layout, asked(server="10.20.0.4", token="x"))
    with pytest.raises(OperatorError, match="PROGRAMS=sha256:bb: sha256: and 64"):
        site.joining_plan(layout, asked(**{**INVITED, "programs": "sha256:bb"}))


@pytest.mark.parametrize(("change", "message"), [
    ({"name": "GPU_1"}, "no name for a node"), ({"labels": ("a",)}, "LABELS=a"), ({"taints": ("a=b",)}, "TAINTS=a=b")])
def test_names(change: dict[str, Any], message: str) -> None:
    with pytest.raises(OperatorError, match=message):
        site._check_names(dataclasses.replace(site.Plan(name="gpu-1"), **change))


def test_registration(layout: Layout) -> None:
    """kubeadm's part of the node: address, taints, labels."""
    server = Server("gpu-1", "10.20.0.5", taints=("a=b:NoSchedule", "c:NoExecute"), labels=("x=y",))
    assert kubernetes._registration(layout, server) == {
        "name": "gpu-1", "criSocket": f"unix://{layout.runtime}/containerd.sock",
        "taints": [{"key": "a", "value": "b", "effect": "NoSchedule"}, {"key": "c", "value": "", "effect": "NoExecute"}],
        "kubeletExtraArgs": [{"name": "node-ip", "value": "10.20.0.5"}, {"name": "node-labels", "value": "x=y"}]}


def test_a_lasting_cluster_syncs_its_disk(layout: Layout) -> None:
    """What saves time and memory in the local cluster is not what a site wants."""
    def configuration(lasting: bool) -> tuple[str, dict[str, Any]]:
        text = kubernetes._kubeadm_config(layout, Settings(server="10.20.0.5"), Server("a", "10.20.0.5", lasting=lasting))
        return text, {d["kind"]: d for d in yaml.safe_load_all(text)}
    local, _ = configuration(False)
    site_, documents = configuration(True)
    assert "unsafe-no-fsync" in local and "unsafe-no-fsync" not in site_
    assert "evictionHard" in local and "evictionHard" not in site_
    assert documents["ClusterConfiguration"]["imageRepository"] == "10.20.0.5:5000/node"
    assert documents["InitConfiguration"]["localAPIEndpoint"]["advertiseAddress"] == "10.20.0.5"


@pytest.mark.parametrize("toolkit", ["", "/usr/bin/nvidia-container-runtime"])
def test_container_runtimes(layout: Layout, monkeypatch: pytest.MonkeyPatch, toolkit: str) -> None:
    monkeypatch.setattr(host, "nvidia_runtime", lambda: toolkit)
    kubernetes.containerd(layout, Settings())
    configuration = tomllib.loads((layout.state / "containerd/config.toml").read_text())
    runtimes = configuration["plugins"]["io.containerd.grpc.v1.cri"]["containerd"]["runtimes"]
    assert {name: r["options"]["BinaryName"] for name, r in runtimes.items()} == {
        "runc": f"{layout.debian}/root/usr/sbin/runc", **({"nvidia": toolkit} if toolkit else {})}


def test_steps(layout: Layout) -> None:
    """Of `make up`, `make site-up` and `make site-join`: only the first builds Argo CD, only the second flannel, the third nothing."""
    settings = Settings()
    first = site.FirstServer(layout, site.Plan(name="a", address="10.20.0.5", server="10.20.0.5", network="10.20.0.0/24"))
    further = site.FurtherServer(layout, site.Plan(name="b", address="10.20.0.6", server="10.20.0.5", network="10.20.0.0/24", first=False),
                                 kubernetes.Invitation("", ""), "")
    local = up.Up(layout, settings)
    for one in (local, first, further):
        names = [step.name for step in one.steps()]
        assert len(set(names)) == len(names)
        assert all(set(step.after) <= set(names[:i]) for i, step in enumerate(one.steps()))
        assert {image for image, _, _ in one.named_images()} <= set(images.IMAGES)
    sources = {kind: {s.name.removesuffix(" from source") for s in one.steps() if s.name.endswith(" from source")}
               for kind, one in (("local", local), ("first", first), ("further", further))}
    assert sources == {"local": {"kubernetes", "helm", "argocd", "kuberay", "coredns", "etcd", "netpol"},
                       "first": {"kubernetes", "coredns", "etcd", "flannel"}, "further": set()}
    after = {step.name: step.after for step in local.steps()}
    assert "netpol from source" in after["Kubernetes"] and "netpol from source" not in after["node images"]
    named = {name for _, name, _ in first.named_images()} ^ {name for _, name, _ in local.named_images()}
    assert named == {"flannel", "argocd", "kuberay-operator"}


def test_a_gpu_without_its_runtime_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "has_gpu", lambda: True)
    monkeypatch.setattr(host, "nvidia_runtime", lambda: "")
    assert "nvidia-container-toolkit" in "".join(preflight._gpu())
    monkeypatch.setattr(host, "nvidia_runtime", lambda: "/usr/bin/nvidia-container-runtime")
    assert not list(preflight._gpu())


def test_ended_process_is_not_another_cluster() -> None:
    """A kubelet that has ended, but whose parent has not asked for its exit status yet, is none."""
    with subprocess.Popen(["sleep", "60"]) as process:
        wait_for(lambda: process.pid in preflight._processes("sleep"), 10, "the process's name")
        process.kill()
        wait_for(lambda: process.pid not in preflight._processes("sleep"), 10, "the end of the process")
        assert Path(f"/proc/{process.pid}").exists()


def test_a_first_server_that_does_not_answer_is_refused(layout: Layout) -> None:
    settings = Settings(server="127.0.0.1", server_network="127.0.0.0/8", registry_port=1)
    with pytest.raises(OperatorError, match=r"registry, 127\.0\.0\.1:1, does not answer"):
        preflight.check(preflight.further_server_problems(layout, settings))


@pytest.mark.parametrize("backend", flannel.BACKENDS)
def test_flannel(backend: str) -> None:
    """Objects that Kubernetes takes; a changed configuration starts the pods anew."""
    manifests = flannel.manifests(Settings(), "registry/flannel:1", backend)
    for manifest in manifests:
        kubernetes_validate.validate(manifest, "1.36", strict=True)
    configuration = json.loads(next(m for m in manifests if m["kind"] == "ConfigMap")["data"]["net-conf.json"])
    assert configuration == {"Network": Settings().pod_network, "Backend": {"Type": backend}}
    template = next(m for m in manifests if m["kind"] == "DaemonSet")["spec"]["template"]
    assert json.loads(template["metadata"]["annotations"]["llm-finetune/network"]) == configuration


def test_pod_network(layout: Layout) -> None:
    path = network.pod_folder(layout) / "10-llm-finetune.conflist"
    network.pod_network(layout, Settings(), "10.78.3.0/24", mtu=8950)
    ptp, portmap = json.loads(path.read_text())["plugins"]
    assert (ptp["mtu"], ptp["ipam"]["ranges"], portmap["type"]) == (8950, [[{"subnet": "10.78.3.0/24"}]], "portmap")
    network.pod_network(layout, Settings(), "10.78.3.0/24", port_mappings=False)
    assert [p["type"] for p in json.loads(path.read_text())["plugins"]] == ["ptp"]


def test_results_that_a_power_cut_tore(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "OWN_RESULTS", str(tmp_path))
    files = {"llm-finetune-a-eth0": "", "llm-finetune-b-eth0": '{"kind": "cni', "llm-finetune-c-eth0": '{"kind": "cniCacheV1"}',
             "others-d-eth0": ""}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    network.forget_torn_results(Settings())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["llm-finetune-c-eth0", "others-d-eth0"]


def test_a_registry_for_other_servers_is_read_only(layout: Layout) -> None:
    for read_only in (False, True):
        registry.registry(layout, Settings(), read_only=read_only)
        storage = yaml.safe_load((layout.state / "registry.yaml").read_text())["storage"]
        assert storage["maintenance"] == {"readonly": {"enabled": read_only}}


def test_programs(layout: Layout, node: str, tmp_path: Path) -> None:
    """They come as they were pushed, only by their digest, and only once."""
    address, _, port = node.partition(":")
    settings = Settings(server=address, server_network="127.0.0.0/8", registry_port=int(port))
    layout.bin.mkdir(parents=True)
    for name in programs.NAMES:
        (layout.bin / name).write_bytes(name.encode() * 700_000)
    digest = programs.push(layout, settings)
    assert programs.push(layout, settings) == digest
    other = Layout(cache=tmp_path / "other", state=tmp_path / "other-state", runtime=tmp_path / "other-run")
    assert programs.fetch(other, settings, digest, print)
    assert {n: (other.bin / n).read_bytes() for n in programs.NAMES} == {n: (layout.bin / n).read_bytes() for n in programs.NAMES}
    assert all((other.bin / name).stat().st_mode & 0o111 for name in programs.NAMES)
    assert not programs.fetch(other, settings, digest, print)
    (other.bin / "kubelet").unlink()
    assert programs.fetch(other, settings, digest, print)
    with pytest.raises(OperatorError, match="answered 404"):
        programs.fetch(other, settings, oci.digest_of(b"another"), print)
