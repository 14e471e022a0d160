"""Gang admission by Kueue: a queued run gets all its pods or none.

Kueue's own manager (built from its Go module, not part of `make up`) runs beside the API server for this test, with the webhooks that it
needs for Ray's kinds, in one namespace. Nothing is started on a node: what counts is which pods exist at all.
"""

from __future__ import annotations

import base64
import contextlib
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from kubernetes import client

from tests.e2e import site
from tests.e2e.test_groups import values_of
from tools import shell
from tools.cluster.sources import Source, build, module_directory

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
MODULE = "sigs.k8s.io/kueue"
NAME, QUEUE = "try-kueue", "gpus"
WEBHOOK, HEALTH = 19443, 18081
CERTIFICATES = "metrics/certs"
ETC = Path("/etc/kueue")
"""The manager looks for its metrics' certificate here and nowhere else."""
KUEUE = ("kueue.x-k8s.io", "v1beta1")
CONFIGURATION = {
    "apiVersion": "config.kueue.x-k8s.io/v1beta1", "kind": "Configuration", "leaderElection": {"leaderElect": False},
    "health": {"healthProbeBindAddress": f"127.0.0.1:{HEALTH}"}, "metrics": {"bindAddress": "127.0.0.1:18080"},
    "webhook": {"host": "127.0.0.1", "port": WEBHOOK}, "internalCertManagement": {"enable": False},
    "integrations": {"frameworks": ["ray.io/rayjob", "ray.io/raycluster"]}}


@pytest.fixture(scope="module")
def module(layout: Any) -> Path:
    """Kueue's Go module, its manager built."""
    build(Source("kueue", ("kueue",), 240), layout, lambda text: print(f"Kueue: {text}", flush=True))
    return module_directory(layout, "kueue", MODULE)


def certificate(folder: Path) -> str:
    """A certificate for the webhooks' address; returns it in base64."""
    folder.mkdir(parents=True)
    shell.output(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=kueue", "-addext",
                  "subjectAltName=IP:127.0.0.1", "-keyout", folder / "tls.key", "-out", folder / "tls.crt"])
    return base64.b64encode((folder / "tls.crt").read_bytes()).decode()


def webhooks(module: Path, authority: str) -> list[dict[str, Any]]:
    """Kueue's webhooks for Ray's kinds and its own, asked at the manager's address, in the test's namespace alone."""
    found = []
    for document in yaml.safe_load_all((module / "config/components/webhook/manifests.yaml").read_text(encoding="utf-8")):
        kept = []
        for hook in document["webhooks"]:
            path = hook["clientConfig"]["service"]["path"]
            if "-ray-io-v1-" in path or "-kueue-x-k8s-io-" in path:
                hook["clientConfig"] = {"url": f"https://127.0.0.1:{WEBHOOK}{path}", "caBundle": authority}
                if "-ray-io-v1-" in path:
                    hook["namespaceSelector"] = {"matchLabels": {"kubernetes.io/metadata.name": f"llm-finetune-{NAME}"}}
                kept.append(hook)
        found.append({**document, "metadata": {"name": f"{NAME}-{document['metadata']['name']}"}, "webhooks": kept})
    return found


@pytest.fixture(scope="module")
def manager(module: Path, layout: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Kueue's CRDs, webhooks and manager; all gone afterwards."""
    folder = tmp_path_factory.mktemp("kueue")
    kubectl = [layout.kubectl, "--kubeconfig", layout.kubeconfig]
    crds = [yaml.safe_load(p.read_text(encoding="utf-8")) for p in sorted((module / "config/components/crd/bases").glob("*.yaml"))]
    configuration = {**CONFIGURATION, "webhook": {**CONFIGURATION["webhook"], "certDir": str(folder / CERTIFICATES)}}  # type: ignore[dict-item]
    (folder / "configuration.yaml").write_text(yaml.safe_dump(configuration), encoding="utf-8")
    hooks = yaml.safe_dump_all(webhooks(module, certificate(folder / CERTIFICATES)))
    process = None
    with open(folder / "log", "w", encoding="utf-8") as log:
        try:
            ETC.symlink_to(folder)
            shell.output([*kubectl, "apply", "--server-side", "-f", "-"], stdin=yaml.safe_dump_all(crds))
            shell.output([*kubectl, "wait", "--for=condition=Established", "crd", *[c["metadata"]["name"] for c in crds], "--timeout=60s"])
            process = subprocess.Popen(
                [layout.bin / "kueue", "--config", folder / "configuration.yaml", "--feature-gates=VisibilityOnDemand=false"],
                stdout=log, stderr=log, env={"KUBECONFIG": str(layout.kubeconfig), "PATH": "/usr/bin", "HOME": str(folder)})
            wait_until_ready(process, folder / "log")
            shell.output([*kubectl, "apply", "--server-side", "-f", "-"], stdin=hooks)
            yield
        finally:
            # The webhooks first: without the manager they would refuse everything.
            shell.output([*kubectl, "delete", "--ignore-not-found", "-f", "-"], stdin=hooks)
            if process is not None:
                process.terminate()
                process.wait(timeout=60)
            if ETC.is_symlink():
                ETC.unlink()
            for kind in ("workloads", "localqueues", "clusterqueues", "resourceflavors"):
                free(kubectl, kind)
            shell.output([*kubectl, "delete", "--ignore-not-found", "-f", "-"], stdin=yaml.safe_dump_all(crds))


def free(kubectl: list[Any], kind: str) -> None:
    """Take the finalizers off, which the manager is no longer there to take off."""
    kind = f"{kind}.{KUEUE[0]}"
    names = shell.output([*kubectl, "get", kind, "--all-namespaces", "--ignore-not-found", "-o",
                          r"jsonpath={range .items[*]}{.metadata.namespace}/{.metadata.name}{'\n'}{end}"]).split()
    for name in names:
        namespace, _, bare = name.rpartition("/")
        where = ["--namespace", namespace] if namespace else []
        shell.output([*kubectl, "patch", kind, bare, *where, "--type=merge", "--patch", '{"metadata": {"finalizers": null}}'])


def wait_until_ready(process: subprocess.Popen[Any], log: Path) -> None:
    deadline = time.monotonic() + 120
    while True:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"http://127.0.0.1:{HEALTH}/readyz", timeout=2).status_code == 200:
                return
        assert process.poll() is None and time.monotonic() < deadline, log.read_text(encoding="utf-8")[-3000:]
        time.sleep(1)


def queues(api: client.ApiClient, namespace: str, gpus: int) -> None:
    """A queue with this many GPUs, and more of everything else than is asked for."""
    custom = client.CustomObjectsApi(api)
    made = {
        "resourceflavors": {"kind": "ResourceFlavor", "metadata": {"name": NAME}},
        "clusterqueues": {"kind": "ClusterQueue", "metadata": {"name": NAME}, "spec": {"namespaceSelector": {}, "resourceGroups": [
            {"coveredResources": ["cpu", "memory", site.GPU], "flavors": [{"name": NAME, "resources": [
                {"name": "cpu", "nominalQuota": "10000"}, {"name": "memory", "nominalQuota": "100Ti"},
                {"name": site.GPU, "nominalQuota": gpus}]}]}]}}}
    for plural, body in made.items():
        custom.create_cluster_custom_object(*KUEUE, plural, {"apiVersion": "/".join(KUEUE), **body})
    custom.create_namespaced_custom_object(*KUEUE, namespace, "localqueues", {
        "apiVersion": "/".join(KUEUE), "kind": "LocalQueue", "metadata": {"name": QUEUE}, "spec": {"clusterQueue": NAME}})


def test_all_pods_of_a_run_or_none(api: client.ApiClient, kube_config: str, wait_for: site.Wait, manager: None) -> None:
    """The 16 GPUs of the mixed example, with quota for 12: no pod. With 16: all. A second run waits until the first one is gone."""
    release, custom = site.Release(api, kube_config, NAME), client.CustomObjectsApi(api)

    def run(name: str) -> dict[str, Any]:
        return values_of("mixed-7b-full", api, **{
            "global": {"rayCluster": {"standing": False}},
            "ray-cluster": {"secretEnv": [], "head": {"nodeSelector": {"kubernetes.io/hostname": "nowhere"}}},
            "finetune-job": {"enabled": True, "kueue": {"queue": QUEUE}, "run": {"name": name}}})

    def state(name: str) -> dict[str, Any]:
        return next(r for r in release.runs() if r["metadata"]["name"].startswith(f"{name}-"))

    def ray_pods(name: str) -> int:
        cluster = state(name).get("status", {}).get("rayClusterName", "")
        return len(release.pods(f"ray.io/cluster={cluster}")) if cluster else 0

    def workload(name: str) -> dict[str, str]:
        items = custom.list_namespaced_custom_object(*KUEUE, release.namespace, "workloads")["items"]
        mine = [i for i in items if i["metadata"]["ownerReferences"][0]["name"].startswith(f"{name}-")]
        conditions = [c for i in mine for c in i.get("status", {}).get("conditions", [])]
        return {c["type"]: c["message"] if c["status"] == "False" else c["status"] for c in conditions}

    def quota(gpus: int) -> None:
        queue = custom.get_cluster_custom_object(*KUEUE, "clusterqueues", NAME)
        queue["spec"]["resourceGroups"][0]["flavors"][0]["resources"][2]["nominalQuota"] = gpus
        custom.replace_cluster_custom_object(*KUEUE, "clusterqueues", NAME, queue)

    try:
        release.core.create_namespace({"metadata": {"name": release.namespace}})
        queues(api, release.namespace, 12)
        release.install(run("first"))
        told = wait_for(lambda: workload("first").get("QuotaReserved"), 60, "Kueue's answer")
        assert "insufficient" in told and site.GPU in told, told
        time.sleep(10)
        assert state("first")["spec"]["suspend"] is True and ray_pods("first") == 0, "12 of 16 GPUs: not one pod"
        quota(16)
        wait_for(lambda: ray_pods("first") == 5, 90, "the head and four workers at once")
        assert workload("first")["Admitted"] == "True" and not state("first")["spec"].get("suspend")
        release.install(run("second"))  # the first RayJob stays: helm.sh/resource-policy: keep
        told = wait_for(lambda: workload("second").get("QuotaReserved"), 60, "Kueue's answer")
        time.sleep(10)
        assert ray_pods("second") == 0 and ray_pods("first") == 5, told
        custom.delete_namespaced_custom_object("ray.io", "v1", release.namespace, "rayjobs", state("first")["metadata"]["name"])
        wait_for(lambda: ray_pods("second") == 5, 120, "the second run's pods, when the first has gone")
    finally:
        release.gone()
