"""Every rendered object: valid for Kubernetes 1.33 to 1.37 and the ray.io CRDs, labelled, and no more entitled than it must be."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from tests.charts.conftest import LOADER, NAMESPACE, RELEASE, SITES, Manifest, Values, join, one, pod_templates, render
from tools import charts, diff, environments

RECOMMENDED = ["name", "instance", "version", "component", "part-of", "managed-by"]
OTHER_KINDS = {"RayCluster", "RayJob", "PodMonitor"}
"""Kinds that Kubernetes itself does not have."""


@cache
def all_manifests() -> list[tuple[str, Manifest]]:
    """What SITES, the environments and the worked examples render."""
    sites = [(name, manifest) for name, values in SITES.items() for manifest in render(values)]
    described = [*environments.names(), *environments.examples()]
    return sites + [(name, manifest) for name in described for manifest in diff.render(name).values()]


@pytest.mark.parametrize("version", ["1.33", "1.34", "1.35", "1.36", "1.37"])
def test_kubernetes_knows_every_field(version: str) -> None:
    seen = set()
    for name, manifest in all_manifests():
        if manifest["kind"] not in OTHER_KINDS and (text := json.dumps(manifest, sort_keys=True)) not in seen:
            seen.add(text)
            try:
                kubernetes_validate.validate(manifest, version, strict=True)
            except kubernetes_validate.ValidationError as error:
                pytest.fail(f"{name}: {manifest['kind']} {manifest['metadata']['name']}: {list(error.path)}: {error.message}")
    assert len(seen) > 50


@cache
def kuberay() -> Path:
    return charts.kuberay_module()


@cache
def crd(kind: str) -> dict[str, Any]:
    """The CRD's schema of ray.io/v1, closed: a field that it does not name is refused instead of dropped."""
    file = {"RayCluster": "ray.io_rayclusters.yaml", "RayJob": "ray.io_rayjobs.yaml"}[kind]
    document = yaml.load((kuberay() / "config/crd/bases" / file).read_text(), LOADER)
    schema = next(v for v in document["spec"]["versions"] if v["name"] == "v1")["schema"]["openAPIV3Schema"]

    def close(node: Any) -> None:
        if isinstance(node, dict):
            if node.get("x-kubernetes-int-or-string"):
                node.pop("anyOf", None)
                node["type"] = ["integer", "string"]
            if "properties" in node and "additionalProperties" not in node and not node.get("x-kubernetes-preserve-unknown-fields"):
                node["additionalProperties"] = False
            node.pop("format", None)
            for value in node.values():
                close(value)
        elif isinstance(node, list):
            for value in node:
                close(value)

    close(schema)
    schema["properties"]["metadata"] = {"type": "object"}
    return schema


def test_ray_objects_fit_the_crds() -> None:
    kinds = []
    for name, manifest in all_manifests():
        if manifest["kind"] in ("RayCluster", "RayJob"):
            kinds.append(manifest["kind"])
            errors = list(jsonschema.Draft202012Validator(crd(manifest["kind"])).iter_errors(manifest))
            assert not errors, f"{name}: {[(list(e.path), e.message) for e in errors[:3]]}"
    others = 2 + len(environments.examples())
    assert (kinds.count("RayCluster"), kinds.count("RayJob")) == (5 + others, 4 + others)


def test_the_crd_check_finds_an_unknown_field() -> None:
    manifest = one(render(SITES["default"]), "RayCluster")
    manifest["spec"]["headGroupSpec"]["template"]["spec"]["contaners"] = []
    assert list(jsonschema.Draft202012Validator(crd("RayCluster")).iter_errors(manifest))


def test_labels(site: Values) -> None:
    for manifest in render(site):
        labels = manifest["metadata"]["labels"]
        for label in RECOMMENDED:
            assert labels[f"app.kubernetes.io/{label}"], (manifest["kind"], label)
        assert labels["app.kubernetes.io/part-of"] == "llm-finetune" and labels["app.kubernetes.io/instance"] == RELEASE
        for place, template in pod_templates(manifest):
            assert template["metadata"]["labels"]["app.kubernetes.io/instance"] == RELEASE, place


def test_selectors_find_their_pods_and_no_others(site: Values) -> None:
    manifests = render(site)
    pods = [(m["metadata"]["name"], m["metadata"].get("namespace"), t["metadata"]["labels"])
            for m in manifests for _, t in pod_templates(m) if m["kind"] not in ("RayCluster", "RayJob")]
    for manifest in manifests:
        if manifest["kind"] == "Service" and "ray.io/cluster" not in manifest["spec"]["selector"]:
            selector = manifest["spec"]["selector"]
            hit = [name for name, namespace, labels in pods
                   if selector.items() <= labels.items() and namespace == manifest["metadata"]["namespace"]]
            assert len(hit) == 1, manifest["metadata"]["name"]
            assert manifest["metadata"]["name"].startswith(hit[0])


def test_ray_pods_keep_the_labels_that_kuberay_selects_by(site: Values) -> None:
    """KubeRay's head Service selects app.kubernetes.io/name: kuberay; a template's own label of that name would replace it."""
    for manifest in render(site):
        if manifest["kind"] in ("RayCluster", "RayJob"):
            for place, template in pod_templates(manifest):
                if place != "submitter":
                    kept = {"app.kubernetes.io/name", "app.kubernetes.io/created-by", "ray.io/cluster", "ray.io/node-type"}
                    assert not kept & set(template["metadata"]["labels"]), place


def test_names_are_short_enough_for_long_releases() -> None:
    for manifest in render(SITES["mixed GPUs"]):
        limit = 52 if manifest["kind"] == "CronJob" else 63
        assert len(manifest["metadata"]["name"]) <= limit


RESTRICTED_EXCEPTIONS = {"site-nvidia-device-plugin", "site-nvidia-device-plugin-mps", "site-nfs-provisioner"}
"""Reach into the node: own namespaces with the privileged label (docs: Pod Security)."""


def restricted(spec: dict[str, Any]) -> list[str]:
    """What Pod Security `restricted` would refuse, and what this project adds to it (read-only root, no token)."""
    found = [key for key in ("hostNetwork", "hostPID", "hostIPC") if spec.get(key)]
    found += [f"hostPath {v['name']}" for v in spec.get("volumes", []) if "hostPath" in v]
    pod = spec.get("securityContext", {})
    if pod.get("runAsNonRoot") is not True or not pod.get("runAsUser") or pod.get("seccompProfile", {}).get("type") != "RuntimeDefault":
        found.append("pod security context")
    for container in [*spec.get("initContainers", []), *spec["containers"]]:
        context = container.get("securityContext", {})
        if (context.get("allowPrivilegeEscalation") is not False or context.get("readOnlyRootFilesystem") is not True
                or context.get("capabilities") != {"drop": ["ALL"]} or context.get("privileged")):
            found.append(f"container {container['name']}")
    return found


def test_pod_security_restricted() -> None:
    for name, values in SITES.items():
        if values.get("global", {}).get("podSecurity", {}).get("level") != "privileged":
            for manifest in render(values):
                if manifest["metadata"]["name"] not in RESTRICTED_EXCEPTIONS:
                    for place, template in pod_templates(manifest):
                        assert restricted(template["spec"]) == [], (name, manifest["kind"], place)


def test_only_who_asks_the_api_server_has_a_token(site: Values) -> None:
    for manifest in render(site):
        for place, template in pod_templates(manifest):
            needs = manifest["metadata"]["name"] in ("site-kuberay-operator", "site-finetune-job-retention") or (
                place == "head" and manifest["spec"].get("enableInTreeAutoscaling"))
            assert template["spec"].get("automountServiceAccountToken", True) is bool(needs), (manifest["metadata"]["name"], place)


def test_every_container_says_what_it_needs(site: Values) -> None:
    for manifest in render(site):
        for place, template in pod_templates(manifest):
            for container in template["spec"]["containers"]:
                assert container["resources"]["requests"].keys() >= {"cpu", "memory"}, (place, container["name"])
                assert "memory" in container["resources"]["limits"], (place, container["name"])
                assert container["imagePullPolicy"] == "IfNotPresent"


def test_no_right_reaches_beyond_the_watched_namespaces(site: Values) -> None:
    watched = set(site.get("kuberay-operator", {}).get("watchNamespaces") or [NAMESPACE]) | {NAMESPACE}
    for manifest in render(site):
        assert manifest["kind"] not in ("ClusterRole", "ClusterRoleBinding")
        if manifest["kind"] == "Role":
            assert manifest["metadata"]["namespace"] in watched
            for rule in manifest["rules"]:
                assert "*" not in rule["verbs"] + rule["resources"] + rule["apiGroups"]


def test_deployments_can_be_upgraded(site: Values) -> None:
    """A Deployment that once was RollingUpdate keeps the API server's defaults for it, which are refused beside Recreate: only what never
    was anything else may have that type."""
    for manifest in render(site):
        if manifest["kind"] == "Deployment" and manifest["spec"].get("strategy", {}).get("type") == "Recreate":
            assert "vllm" in manifest["metadata"]["name"]


@pytest.mark.parametrize(("replicas", "asked", "elects"), [(1, False, False), (2, False, True), (1, True, True)])
def test_a_single_operator_elects_no_leader_unasked(replicas: int, asked: bool, elects: bool) -> None:
    """A single one must outlive an API server that is away; one that elects ends itself after 10 s without."""
    manifests = render({"kuberay-operator": {"replicas": replicas, "leaderElection": asked}})
    operator = next(m for m in manifests if m["kind"] == "Deployment" and m["metadata"]["name"].endswith("kuberay-operator"))
    assert f"--enable-leader-election={str(elects).lower()}" in operator["spec"]["template"]["spec"]["containers"][0]["args"]
    assert operator["spec"]["strategy"]["rollingUpdate"] == {"maxUnavailable": 1, "maxSurge": 0}
    assert any(m["kind"] == "Role" and m["metadata"]["name"].endswith("leader") for m in manifests) == elects


def test_rights_are_part_of_upstreams() -> None:
    """The operator's Role asks for nothing that KubeRay's own ClusterRole lacks."""
    documents = [d for file in ("role.yaml", "leader_election_role.yaml")
                 for d in yaml.load_all((kuberay() / "config/rbac" / file).read_text(), LOADER) if d]
    upstream = {(g, r, v) for d in documents for rule in d["rules"]
                for g in rule["apiGroups"] for r in rule["resources"] for v in rule["verbs"]}
    ours = {(g, r, v) for m in render(SITES["default"]) if m["kind"] == "Role"
            for rule in m["rules"] for g in rule["apiGroups"] for r in rule["resources"] for v in rule["verbs"]}
    assert ours and ours <= upstream
    assert not any(verb in ("update", "delete", "patch") for _, resource, verb in ours if resource == "secrets")


def test_network_policies_cover_every_pod(site: Values) -> None:
    """A pod that no policy selects is open to everybody."""
    manifests = render(site)
    policies = [m for m in manifests if m["kind"] == "NetworkPolicy"]
    for manifest in manifests:
        for place, template in pod_templates(manifest):
            labels = dict(template["metadata"]["labels"])
            if manifest["kind"] == "RayCluster" or place not in ("submitter", manifest["kind"]):
                labels["ray.io/is-ray-node"] = "yes"  # set by KubeRay
            covering = [p for p in policies if p["metadata"]["namespace"] == manifest["metadata"]["namespace"]
                        and p["spec"]["podSelector"]["matchLabels"].items() <= labels.items()]
            assert covering, (manifest["metadata"]["name"], place)
            assert all(sorted(p["spec"]["policyTypes"]) == ["Egress", "Ingress"] for p in covering)


def test_network_policies_can_be_left_out() -> None:
    assert not [m for m in render({"global": {"networkPolicy": {"enabled": False}}}) if m["kind"] == "NetworkPolicy"]


def test_storage_outlives_the_release(site: Values) -> None:
    for manifest in render(site):
        if manifest["kind"] in ("PersistentVolume", "PersistentVolumeClaim"):
            annotations = manifest["metadata"]["annotations"]
            assert annotations["helm.sh/resource-policy"] == "keep"
            assert "Prune=false" in annotations["argocd.argoproj.io/sync-options"]
        if manifest["kind"] == "PersistentVolume":
            assert manifest["spec"]["persistentVolumeReclaimPolicy"] == "Retain"
            assert manifest["spec"]["claimRef"]["namespace"] == NAMESPACE
            assert manifest["spec"]["accessModes"] == ["ReadWriteMany"]


UNSETTLED = ("lookup", "randAlphaNum", "randAlpha", "randNumeric", "randAscii", "randBytes", "randInt", "uuidv4", "genCA", "genPrivateKey",
             "genSelfSignedCert", "genSignedCert", "now", "date", "htpasswd", "derivePassword", "getHostByName", "bcrypt", "env", "shuffle")


def test_templates_give_the_same_twice() -> None:
    """Under GitOps what is read from the cluster or drawn at random never settles."""
    for path in sorted(charts.CHART.rglob("templates/*")):
        text = re.sub(r"\{\{-? */\*.*?\*/ *-?\}\}", "", path.read_text(), flags=re.S)
        for function in UNSETTLED:
            assert not re.search(rf"\{{\{{[^}}]*[( |-]{function}[ )}}]", text), f"{path.name} calls {function}"


def test_images_by_digest() -> None:
    digest = "sha256:" + "a" * 64
    names = ("trainer", "chatbot", "kuberayOperator", "nfsServer", "nvidiaDevicePlugin")
    values = {**SITES["mixed GPUs"]}
    values["global"] = {**values["global"], "images": {name: {"repository": f"r.example.org/{name}", "digest": digest} for name in names}}
    images = {c["image"] for m in render(values) for _, t in pod_templates(m)
              for c in [*t["spec"].get("initContainers", []), *t["spec"]["containers"]]}
    assert images == {f"r.example.org/{name}@{digest}" for name in names}


def test_vllm_serves_the_run_that_the_chatbot_names() -> None:
    """The chatbot's engine is the server's Service; nobody else reaches it; another run is another server beside the first."""
    manifests = render(SITES["vLLM"])
    name, run = "site-chatbot-vllm-0a1b2c3d4e", "pubmedqa-0a1b2c3d4e"
    config = yaml.safe_load(one(manifests, "ConfigMap", "site-chatbot")["data"]["chatbot.yaml"])
    assert config["engine"] == {"kind": "openai", "url": f"http://{name}:8000/v1", "model": run, "streams": 32, "context": 4096}
    (container,) = one(manifests, "Deployment", name)["spec"]["template"]["spec"]["containers"]
    assert container["command"] == ["vllm", "serve", f"/storage/runs/{run}/model"]
    assert {f"--served-model-name={run}", "--tensor-parallel-size=4", "--max-model-len=4096", "--max-num-seqs=32"} <= set(container["args"])
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 4
    (chatbot,) = one(manifests, "Deployment", "site-chatbot")["spec"]["template"]["spec"]["containers"]
    assert "nvidia.com/gpu" not in chatbot["resources"]["limits"]
    policy = one(manifests, "NetworkPolicy", name)["spec"]
    (rule,) = policy["ingress"]
    assert rule["from"] == [{"podSelector": {"matchLabels": one(manifests, "Service", "site-chatbot")["spec"]["selector"]}}]
    assert policy["egress"] == []
    selector = one(manifests, "Service", name)["spec"]["selector"]
    assert any(rule.get("to") == [{"podSelector": {"matchLabels": selector}}]
               for rule in one(manifests, "NetworkPolicy", "site-chatbot")["spec"]["egress"])
    other = render(join(SITES["vLLM"], {"chatbot": {"config": {"serve": {"run": "pubmedqa-ffffffffff"}}}}))
    assert one(other, "Service", "site-chatbot-vllm-ffffffffff")["spec"]["selector"] != selector
