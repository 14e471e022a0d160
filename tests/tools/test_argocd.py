"""Argo CD: health scripts over statuses as KubeRay 1.6 writes them, the core install, the project against what the charts render."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import lupa
import pytest
import yaml

from tools import argocd, environments
from tools.diff import render
from tools.errors import OperatorError
from tools.layout import REPOSITORY

HEALTH = argocd.read_manifests(argocd.ARGOCD / "argocd-cm.yaml")[0]["data"]
SITE = argocd.Site(git_url="https://git.example.com/llm-finetune.git", chart_url="oci://registry.example.com/charts/llm-finetune",
                   environments=["dev", "staging"])


def health(kind: str, **fields: Any) -> tuple[str, str]:
    """(status, message) that the script of a kind gives for an object; run without any library, as Argo CD does."""
    runtime = lupa.LuaRuntime(unpack_returned_tuples=True)
    runtime.execute("os, io, package, require = nil, nil, nil, nil")
    runtime.globals().obj = runtime.table_from({"metadata": {"generation": 1}, "spec": {}, **fields}, recursive=True)
    result = runtime.execute(HEALTH[f"resource.customizations.health.ray.io_{kind}"])
    return result["status"], result["message"]


def conditions(**states: str) -> list[dict[str, str]]:
    return [{"type": kind, "status": state, "reason": f"{kind}Reason", "message": f"{kind} message"} for kind, state in states.items()]


UP = conditions(HeadPodReady="True", RayClusterProvisioned="True")
HEADLESS = conditions(HeadPodReady="False", RayClusterProvisioned="True")
CLUSTER = {"observedGeneration": 1, "desiredWorkerReplicas": 2, "minWorkerReplicas": 2}


@pytest.mark.parametrize(("status", "expected", "says"), [
    (None, "Progressing", "operator"),
    ({**CLUSTER, "observedGeneration": 0, "conditions": UP, "readyWorkerReplicas": 2}, "Healthy", "2 of 2"),
    ({**CLUSTER, "conditions": conditions(HeadPodReady="False")}, "Progressing", "head is not ready: HeadPodReady message"),
    ({**CLUSTER, "conditions": [{"type": "HeadPodReady", "status": "False", "message": ""}]}, "Progressing", "head is not ready"),
    ({**CLUSTER, "conditions": conditions(HeadPodReady="True"), "readyWorkerReplicas": 1}, "Progressing", "1 of 2"),
    ({**CLUSTER, "conditions": UP, "readyWorkerReplicas": 2, "state": "ready"}, "Healthy", "2 of 2"),
    ({**CLUSTER, "conditions": UP, "readyWorkerReplicas": 1}, "Progressing", "1 of 2"),
    ({**CLUSTER, "conditions": HEADLESS, "readyWorkerReplicas": 2}, "Degraded", "HeadPodReady message"),
    ({**CLUSTER, "conditions": conditions(ReplicaFailure="True", HeadPodReady="True")}, "Degraded", "ReplicaFailure message"),
    ({**CLUSTER, "state": "failed", "reason": "no quota"}, "Degraded", "no quota"),
    ({**CLUSTER, "conditions": conditions(RayClusterSuspended="True")}, "Suspended", ""),
    ({"observedGeneration": 1, "conditions": conditions(HeadPodReady="True")}, "Healthy", "0 of 0"),
])
def test_ray_cluster(status: Any, expected: str, says: str) -> None:
    found, message = health("RayCluster", **({} if status is None else {"status": status}))
    assert (found, says in message) == (expected, True), message


@pytest.mark.parametrize(("status", "expected", "says"), [
    (None, "Progressing", "operator"),
    ({"jobDeploymentStatus": "Initializing"}, "Progressing", "Initializing"),
    ({"jobDeploymentStatus": "Waiting"}, "Progressing", "Waiting"),
    ({"jobDeploymentStatus": "Running", "jobStatus": "RUNNING"}, "Healthy", "goes on"),
    ({"jobDeploymentStatus": "Retrying", "message": "head lost"}, "Progressing", "head lost"),
    ({"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}, "Healthy", "finished"),
    ({"jobDeploymentStatus": "Complete", "jobStatus": "STOPPED"}, "Degraded", "STOPPED"),
    ({"jobDeploymentStatus": "Failed", "jobStatus": "FAILED", "reason": "AppFailed", "message": "loss is NaN"}, "Degraded",
     "AppFailed: loss is NaN"),
    ({"jobDeploymentStatus": "ValidationFailed", "reason": "ValidationFailed"}, "Degraded", "ValidationFailed"),
    ({"jobDeploymentStatus": "Suspended"}, "Suspended", "Suspended"),
])
def test_ray_job(status: Any, expected: str, says: str) -> None:
    found, message = health("RayJob", **({} if status is None else {"status": status}))
    assert (found, says in message) == (expected, True), message


@pytest.mark.parametrize(("listed", "expected"), [
    ([], "Progressing"),
    ([{"type": "Ready", "status": "True", "reason": "NonZeroServeEndpoints"}], "Healthy"),
    ([{"type": "Ready", "status": "True"}, {"type": "UpgradeInProgress", "status": "True"}], "Progressing"),
    ([{"type": "Ready", "status": "False", "reason": "Initializing"}], "Progressing"),
    ([{"type": "Ready", "status": "False", "reason": "InitializingTimeout"}], "Degraded"),
    ([{"type": "Ready", "status": "False", "reason": "ValidationFailed"}], "Degraded"),
    ([{"type": "Ready", "status": "True"}, {"type": "RollbackInProgress", "status": "True"}], "Degraded"),
])
def test_ray_service(listed: list[dict[str, str]], expected: str) -> None:
    assert health("RayService", status={"conditions": listed})[0] == expected


def module_directory() -> Path | None:
    """Argo CD's Go module, if a cache of this machine has it."""
    roots = [os.environ.get("LLM_FINETUNE_CACHE", ""), str(Path.home() / ".cache" / "llm-finetune")]
    for cache in [*(Path(r) / "go" / "mod" for r in roots if r), Path.home() / "go" / "pkg" / "mod"]:
        found = sorted(cache.glob("github.com/argoproj/argo-cd/v3@*/manifests/core-install.yaml"))
        if found:
            return found[-1].parent.parent
    return None


@pytest.fixture(scope="module")
def install() -> list[argocd.Manifest]:
    module = module_directory()
    if module is None:
        pytest.skip("Argo CD's Go module is not in the cache (make up fetches it)")
    return argocd.core_install(module, "registry/argocd@sha256:1", "registry/redis@sha256:2", {"argocd-secret": "k", "argocd-redis": "p"})


def by_kind(manifests: list[argocd.Manifest], *kinds: str) -> dict[str, argocd.Manifest]:
    return {m["metadata"]["name"]: m for m in manifests if m["kind"] in kinds}


def test_core_install_runs_only_our_images(install: list[argocd.Manifest]) -> None:
    workloads = by_kind(install, "Deployment", "StatefulSet")
    assert set(workloads) == set(argocd.REQUESTS)
    for name, workload in workloads.items():
        spec = workload["spec"]["template"]["spec"]
        assert "initContainers" not in spec
        (container,) = spec["containers"]
        assert container["image"] == ("registry/redis@sha256:2" if name == "argocd-redis" else "registry/argocd@sha256:1")
        assert container["imagePullPolicy"] == "IfNotPresent"
        assert container["command"] == (["redis-server"] if name == "argocd-redis" else ["tini", "--"])
        mounted = {m["name"] for m in container.get("volumeMounts", [])}
        assert mounted <= {v["name"] for v in spec.get("volumes", [])}
        if name != "argocd-redis":
            assert {"name": "ARGOCD_GPG_ENABLED", "value": "false"} in container["env"]
            assert container["args"] == [f"/usr/local/bin/{name}"]


def test_core_install_takes_redis_arguments_apart(install: list[argocd.Manifest]) -> None:
    arguments = by_kind(install, "Deployment")["argocd-redis"]["spec"]["template"]["spec"]["containers"][0]["args"]
    assert arguments[:4] == ["--save", "", "--appendonly", "no"]
    assert arguments[arguments.index("--requirepass") + 1] == "$(REDIS_PASSWORD)"


def test_core_install_settings_and_secrets(install: list[argocd.Manifest]) -> None:
    settings = by_kind(install, "ConfigMap")["argocd-cm"]["data"]
    assert settings["timeout.reconciliation"] == "15s"
    assert "resource.exclusions" in settings, "upstream's own settings are kept"
    assert set(HEALTH) <= set(settings)
    secrets = by_kind(install, "Secret")
    assert secrets["argocd-secret"]["stringData"] == {"server.secretkey": "k"}
    assert secrets["argocd-redis"]["stringData"] == {"auth": "p"}


def test_core_install_order_and_namespace(install: list[argocd.Manifest]) -> None:
    kinds = [m["kind"] for m in install]
    assert kinds[:4] == ["Namespace"] + ["CustomResourceDefinition"] * 3
    assert all(k in ("Deployment", "StatefulSet") for k in kinds[-4:])
    cluster_wide = {"Namespace", "CustomResourceDefinition", "ClusterRole", "ClusterRoleBinding"}
    assert all(m["metadata"].get("namespace") == "argocd" for m in install if m["kind"] not in cluster_wide)
    assert not [m for m in install if m["kind"] == "Service" and m["spec"].get("type", "ClusterIP") != "ClusterIP"]


def test_secrets_of_the_cluster_are_kept() -> None:
    first = argocd.new_secrets({})
    assert set(first) == set(argocd.SECRET_KEYS) and len(set(first.values())) == 2
    assert argocd.new_secrets(first) == first


def test_site_of_the_example() -> None:
    assert argocd.repository_secret(SITE)["stringData"].get("insecureOCIForceHttp") is None
    plain = argocd.Site(**{**SITE.__dict__, "plain_http": True})
    assert argocd.repository_secret(plain)["stringData"]["insecureOCIForceHttp"] == "true"
    example = argocd.read_manifests(argocd.ARGOCD / "cluster.example.yaml")[0]
    assert set(example["metadata"]["labels"]) == set(argocd.cluster_secret(SITE)["metadata"]["labels"])
    assert set(example["metadata"]["annotations"]) == set(argocd.cluster_secret(SITE)["metadata"]["annotations"])


@pytest.mark.parametrize(("field", "value"), [("chart_url", "registry.example.com/charts/llm-finetune"), ("chart_url", "oci://r/charts"),
                                              ("environments", []), ("environments", ["dev,staging"]),
                                              ("environments", ["local", "local*"]), ("privileged", ["elsewhere"])])
def test_site_is_checked(field: str, value: Any) -> None:
    with pytest.raises(OperatorError, match="not usable"):
        argocd.Site(**{**SITE.__dict__, field: value})


@pytest.mark.parametrize(("environment", "expected"), [("local", True), ("local-dev", True), ("localhost", False), ("dev", False)])
def test_environments_of_a_cluster(environment: str, expected: bool) -> None:
    annotation = argocd.cluster_secret(argocd.Site(**{**SITE.__dict__, "environments": ["local", "local-*"]}))["metadata"]["annotations"]
    assert argocd.deployed(annotation["llm-finetune/environments"], environment) is expected


def test_application_set_reads_what_the_site_writes() -> None:
    text = (argocd.ARGOCD / "applicationset.yaml").read_text(encoding="utf-8")
    whole = argocd.Site(**{**SITE.__dict__, "images": {"trainer": {"repository": "r/trainer", "digest": "sha256:" + "0" * 64}},
                           "privileged": SITE.environments[:1]})
    written = set(argocd.cluster_secret(whole)["metadata"]["annotations"])
    assert set(re.findall(r'annotations "(llm-finetune/[a-z-]+)"', text)) == written
    template = yaml.safe_load(text)["spec"]["template"]["spec"]
    assert template["destination"]["namespace"] == environments.namespace("{{ .path.basename }}")
    values, chart = template["sources"]
    assert values["ref"] == "values", "git first, or a push between the sources' revisions is lost (docs/decisions/gitops.md)"
    files = [f.removeprefix("$values/environments/{{ .path.basename }}/") for f in chart["helm"]["valueFiles"]]
    assert tuple(files) == environments.ORDER
    assert chart["helm"]["releaseName"] == environments.RELEASE_NAME


def test_namespaces_are_restricted_unless_the_cluster_says_otherwise() -> None:
    """A values file alone gets no host network: the label comes from whoever owns the cluster."""
    labels = argocd.read_manifests(argocd.ARGOCD / "applicationset.yaml")[0]["spec"]["template"]["spec"]["syncPolicy"][
        "managedNamespaceMetadata"]["labels"]
    (text,) = labels.values()
    assert list(labels) == ["pod-security.kubernetes.io/enforce"] and "site.yaml" not in text
    chart = {"apiVersion": "v2", "name": "label", "version": "0.1.0"}
    template = text.replace("{{ ", "{{ with .Values }}{{ ", 1) + "{{ end }}"
    for of_cluster, expected in (({}, "restricted"), ({"llm-finetune/privileged": "dev,lab"}, "privileged"),
                                 ({"llm-finetune/privileged": "devel,lab"}, "restricted")):
        assert rendered(chart, template, {"path": {"basename": "dev"}, "metadata": {"annotations": of_cluster}}) == expected


def rendered(chart: dict[str, Any], template: str, values: dict[str, Any]) -> str:
    """A Go template with sprig, as the ApplicationSet controller has them, through helm."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "templates").mkdir()
        (Path(folder) / "Chart.yaml").write_text(yaml.safe_dump(chart))
        (Path(folder) / "templates/label.yaml").write_text(f"answer: {template}")
        done = subprocess.run([environments.helm_binary(), "template", folder, "--values", "-"], input=yaml.safe_dump(values),
                              capture_output=True, text=True, check=True)
    return str(yaml.safe_load(done.stdout)["answer"])


def rendered_kinds() -> set[tuple[str, str]]:
    kinds = set()
    for name in environments.names():
        for manifest in render(name).values():
            kinds.add((manifest["apiVersion"].rpartition("/")[0], manifest["kind"]))
    return kinds


def test_project_allows_what_the_environments_need() -> None:
    project = argocd.read_manifests(argocd.ARGOCD / "project.yaml")[0]["spec"]
    allowed = {(e["group"], e["kind"]) for key in ("clusterResourceWhitelist", "namespaceResourceWhitelist") for e in project[key]}
    assert rendered_kinds() <= allowed
    assert not {("", "Secret"), ("", "Pod"), ("argoproj.io", "Application")} & allowed


def test_project_allows_exactly_the_kinds_of_the_charts() -> None:
    project = argocd.read_manifests(argocd.ARGOCD / "project.yaml")[0]["spec"]
    files = [p for pattern in ("templates/*.yaml", "templates/*.tpl") for p in (REPOSITORY / "charts").rglob(pattern)
             if "helm.sh/hook: test" not in p.read_text(encoding="utf-8")]  # `helm test` is no business of Argo CD's
    written = set()
    for path in files:
        # A template's objects start at the margin; what is indented belongs to an object (a reference, a pod template).
        written |= set(re.findall(r"^kind: (\w+)$", path.read_text(encoding="utf-8"), re.MULTILINE))
    own = {"Namespace", "CustomResourceDefinition"}  # made by Argo CD for the environment; and the operator's CRDs
    allowed = {e["kind"] for key in ("clusterResourceWhitelist", "namespaceResourceWhitelist") for e in project[key]}
    assert allowed == written | own


def test_no_second_synchronisation_step() -> None:
    """With waves, hooks or PruneLast, Argo CD waits for health between the steps and takes no commit meanwhile."""
    options = argocd.read_manifests(argocd.ARGOCD / "applicationset.yaml")[0]["spec"]["template"]["spec"]["syncPolicy"]["syncOptions"]
    assert "PruneLast=true" not in options
    for name in environments.names():
        for manifest in render(name).values():
            annotations = manifest["metadata"].get("annotations") or {}
            stepped = {"argocd.argoproj.io/sync-wave", "argocd.argoproj.io/hook", "helm.sh/hook"} & set(annotations)
            assert not stepped, manifest["metadata"]["name"]


def test_printed_manifests_are_yaml(capsys: pytest.CaptureFixture[str]) -> None:
    done = subprocess.run([os.sys.executable, "-m", "tools", "argocd", "--git-url", SITE.git_url, "--chart-url", SITE.chart_url,
                           "--environments", "dev, staging"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    kinds = [m["kind"] for m in yaml.safe_load_all(done.stdout)]
    assert kinds == ["ConfigMap", "AppProject", "Secret", "Secret", "ApplicationSet"]
