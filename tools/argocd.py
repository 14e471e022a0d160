"""Argo CD: what a site applies (project, ApplicationSet, its own addresses), and the core install of the local cluster.

The install manifests are upstream's own, read from the pinned Go module when the cluster is made; nothing of them is kept in git.
"""

from __future__ import annotations

import argparse
import base64
import copy
import fnmatch
import hashlib
import json
import secrets
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tools.errors import OperatorError
from tools.layout import REPOSITORY

Manifest = dict[str, Any]

NAMESPACE = "argocd"
ARGOCD = REPOSITORY / "argocd"
LABEL_ENABLED = "llm-finetune/enabled"
ANNOTATION = "llm-finetune/"
USER = 999
"""Argo CD's user, as in upstream's image; `runAsNonRoot` alone would need the image to name one by number."""

REQUESTS = {"argocd-application-controller": ("200m", "256Mi", "1Gi"), "argocd-applicationset-controller": ("20m", "64Mi", "256Mi"),
            "argocd-repo-server": ("50m", "128Mi", "768Mi"), "argocd-redis": ("10m", "16Mi", "128Mi")}
"""CPU request, memory request and memory limit of each component on the local cluster."""

SECRET_KEYS = {"argocd-secret": "server.secretkey", "argocd-redis": "auth"}
"""The two secrets that Argo CD's API server and its command line would make; a core install without them has to be given both."""


@dataclass(frozen=True)
class Site:
    """What only the place knows; it reaches the ApplicationSet as annotations on the cluster's Secret."""

    git_url: str
    """This repository, as Argo CD reaches it."""
    chart_url: str
    """oci://<registry>/<path>/llm-finetune"""
    environments: Sequence[str]
    """Folders of environments/ that live on this cluster, or patterns of them (`team-*`)."""
    git_revision: str = "HEAD"
    """Branch that is deployed."""
    plain_http: bool = False
    """The registry speaks HTTP without TLS (a registry on the node)."""
    images: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """global.images of images built on the spot, for environments whose release.yaml names none: {trainer: {repository, digest}}."""
    privileged: Sequence[str] = ()
    """Environments whose namespace is not held to Pod Security `restricted` (global.podSecurity.level: privileged)."""
    server: str = "https://kubernetes.default.svc"
    """Address of the cluster's API, as Argo CD reaches it."""
    name: str = "in-cluster"
    """The cluster's name in Argo CD."""

    def __post_init__(self) -> None:
        if not self.chart_url.startswith("oci://") or not self.chart_url.endswith("/llm-finetune"):
            raise OperatorError(f"The chart's URL {self.chart_url!r} is not usable. Give oci://<registry>/<path>/llm-finetune.")
        if not self.environments or not all(e and "," not in e and e == e.strip() for e in self.environments):
            raise OperatorError(f"The environments {list(self.environments)} are not usable. Name at least one folder of environments/.")
        for one in self.environments:
            if twice := [o for o in self.environments if o is not one and fnmatch.fnmatchcase(one, o)]:
                raise OperatorError(f"The environments {list(self.environments)} are not usable: {one} is also one of {twice[0]}, and an "
                                    f"environment that is found twice stops the ApplicationSet. Leave one of the two out.")
        if unknown := [e for e in self.privileged if not deployed(",".join(self.environments), e)]:
            raise OperatorError(f"The privileged environments {unknown} are not usable: the cluster deploys {list(self.environments)}. "
                                f"Name folders of environments/ that are among them.")


def read_manifests(path: Path) -> list[Manifest]:
    """All documents of a YAML file."""
    with open(path, encoding="utf-8") as file:
        return [d for d in yaml.load_all(file, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)) if d]


def project(site: Site) -> Manifest:
    """The AppProject, with the site's two URLs as the only sources."""
    manifest = read_manifests(ARGOCD / "project.yaml")[0]
    manifest["spec"]["sourceRepos"] = [site.git_url, site.chart_url]
    manifest["spec"]["destinations"] = [{"server": site.server, "namespace": "llm-finetune-*"}]
    return manifest


def cluster_secret(site: Site) -> Manifest:
    """The cluster's Secret with the annotations that the ApplicationSet reads."""
    annotations = {"environments": ",".join(site.environments), "git-url": site.git_url, "git-revision": site.git_revision,
                   "chart-url": site.chart_url}
    if site.privileged:
        annotations["privileged"] = ",".join(site.privileged)
    if site.images:
        annotations["images"] = json.dumps(site.images, sort_keys=True)
    return {
        "apiVersion": "v1", "kind": "Secret", "type": "Opaque",
        "metadata": {"name": site.name, "namespace": NAMESPACE,
                     "labels": {"argocd.argoproj.io/secret-type": "cluster", LABEL_ENABLED: "true"},
                     "annotations": {ANNOTATION + key: value for key, value in annotations.items()}},
        "stringData": {"name": site.name, "server": site.server, "config": json.dumps({"tlsClientConfig": {"insecure": False}})},
    }


def repository_secret(site: Site) -> Manifest:
    """The chart's registry. An OCI source on plain HTTP is refused without `insecureOCIForceHttp`; `insecure` is about certificates."""
    data = {"type": "oci", "name": "llm-finetune-charts", "url": site.chart_url, "project": "llm-finetune"}
    if site.plain_http:
        data["insecureOCIForceHttp"] = "true"
    return {"apiVersion": "v1", "kind": "Secret", "type": "Opaque",
            "metadata": {"name": "llm-finetune-charts", "namespace": NAMESPACE,
                         "labels": {"argocd.argoproj.io/secret-type": "repository"}},
            "stringData": data}


def site_manifests(site: Site) -> list[Manifest]:
    """What connects an installed Argo CD to this project, in the order of applying; for a real cluster and for the local one.

    The health checks (argocd/argocd-cm.yaml) are apart: they are keys of a ConfigMap that the installation owns. core_install() has them
    in it; elsewhere they must be applied with a field manager of their own, or the installation's keys would be taken away.
    """
    return [project(site), repository_secret(site), cluster_secret(site), *read_manifests(ARGOCD / "applicationset.yaml")]


def deployed(annotation: str, environment: str) -> bool:
    """Whether an environment is one of those that a cluster's annotation `environments` names, as the ApplicationSet reads it."""
    return any(fnmatch.fnmatchcase(environment, pattern.strip()) for pattern in annotation.split(","))


def new_secrets(existing: Mapping[str, str]) -> dict[str, str]:
    """Values of SECRET_KEYS by Secret name: what the cluster has already, else new random ones.

    A new `server.secretkey` would do no harm, but a new redis password locks out the components that run with the old one.
    """
    return {name: existing.get(name) or secrets.token_hex(32) for name in SECRET_KEYS}


def secret_values(api: Any) -> dict[str, str]:
    """SECRET_KEYS' values that the cluster has. `api`: kubernetes.client.CoreV1Api."""
    found = {}
    for secret in api.list_namespaced_secret(NAMESPACE).items:
        key = SECRET_KEYS.get(secret.metadata.name)
        if key and secret.data and secret.data.get(key):
            found[secret.metadata.name] = base64.b64decode(secret.data[key]).decode()
    return found


def core_install(go_module_dir: Path, image: str, redis_image: str, secret_values: Mapping[str, str]) -> list[Manifest]:
    """Upstream's core install (controllers and repo-server, no API server and no page) made fit for the local cluster.

    `go_module_dir`: root of the module github.com/argoproj/argo-cd/v3. `image`: our image with the binaries under /usr/local/bin, git,
    helm and tini. `redis_image`: an image with redis-server (may be the same). `secret_values`: from new_secrets().
    Returns the namespace, then the CRDs, then the rest.
    """
    source = go_module_dir / "manifests" / "core-install.yaml"
    if not source.is_file():
        raise OperatorError(f"{source} is missing: {go_module_dir} is not the module github.com/argoproj/argo-cd/v3.")
    settings = {m["metadata"]["name"]: m["data"] for m in read_manifests(ARGOCD / "local" / "settings.yaml")}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    settings["argocd-cm"] |= read_manifests(ARGOCD / "argocd-cm.yaml")[0]["data"]
    manifests: list[Manifest] = [{"apiVersion": "v1", "kind": "Namespace",
                                  "metadata": {"name": NAMESPACE, "labels": {"pod-security.kubernetes.io/enforce": "restricted"}}}]
    for manifest in read_manifests(source):
        name, kind = manifest["metadata"]["name"], manifest["kind"]
        if kind not in ("CustomResourceDefinition", "ClusterRole", "ClusterRoleBinding"):
            manifest["metadata"]["namespace"] = NAMESPACE
        if kind == "ConfigMap" and name in settings:
            manifest.setdefault("data", {}).update(settings.pop(name))
        if kind == "Secret" and name == "argocd-secret":
            manifest["stringData"] = {SECRET_KEYS[name]: secret_values[name]}
        if kind in ("Deployment", "StatefulSet"):
            _fit_workload(manifest, image, redis_image)
            # Most settings are read as environment variables when a process starts.
            manifest["spec"]["template"]["metadata"].setdefault("annotations", {})[ANNOTATION + "settings"] = digest
        manifests.append(manifest)
    assert not settings, f"argocd/local/settings.yaml names ConfigMaps that the install lacks: {sorted(settings)}"
    manifests.append({"apiVersion": "v1", "kind": "Secret", "type": "Opaque",
                      "metadata": {"name": "argocd-redis", "namespace": NAMESPACE},
                      "stringData": {SECRET_KEYS["argocd-redis"]: secret_values["argocd-redis"]}})
    return sorted(manifests, key=_order)


def _order(manifest: Manifest) -> int:
    """Namespace and CRDs first, workloads last; the order within is upstream's (sorting is stable)."""
    return {"Namespace": 0, "CustomResourceDefinition": 1, "Deployment": 3, "StatefulSet": 3}.get(manifest["kind"], 2)


def _fit_workload(manifest: Manifest, image: str, redis_image: str) -> None:
    """Our images, explicit commands, small requests; init containers that need the `argocd` command line are left out."""
    name = manifest["metadata"]["name"]
    spec = manifest["spec"]["template"]["spec"]
    # `secret-init` writes the redis password (here: new_secrets); `copyutil` provides the plugin server (no plugins here).
    spec.pop("initContainers", None)
    spec["volumes"] = [v for v in spec.get("volumes", []) if v["name"] != "var-files"]
    if not spec["volumes"]:
        del spec["volumes"]
    spec.pop("affinity", None)
    spec["securityContext"] = {"runAsNonRoot": True, "runAsUser": USER, "runAsGroup": USER, "fsGroup": USER,
                               "seccompProfile": {"type": "RuntimeDefault"}}
    spec["priorityClassName"] = "system-cluster-critical"
    if manifest["kind"] == "Deployment":
        # One node: the old pod goes first, so that an update needs no second pod's memory.
        manifest["spec"]["strategy"] = {"type": "Recreate"}
    cpu, memory, limit = REQUESTS[name]
    for container in spec["containers"]:
        redis = name == "argocd-redis"
        container["image"] = redis_image if redis else image
        container["imagePullPolicy"] = "IfNotPresent"
        container["command"] = ["redis-server"] if redis else ["tini", "--"]
        container["resources"] = {"requests": {"cpu": cpu, "memory": memory}, "limits": {"memory": limit}}
        if redis:
            container["args"] = [*_split_redis(container["args"]), "--maxmemory", "64mb", "--maxmemory-policy", "allkeys-lru"]
            continue
        container.setdefault("env", []).extend([
            {"name": "ARGOCD_GPG_ENABLED", "value": "false"},  # the image has no gpg; without this the repo-server doesn't start
            {"name": "HOME", "value": "/tmp"},  # the root is read-only, and git and helm want to write
            {"name": "GOMEMLIMIT", "value": f"{int(limit[:-2]) * (1024 if limit.endswith('Gi') else 1) * 85 // 100}MiB"},
        ])


def _split_redis(arguments: list[str]) -> Iterator[str]:
    """Upstream passes `--requirepass $(PASSWORD)` as one argument, which upstream's entrypoint script takes apart and ours is none."""
    for argument in arguments:
        yield from argument.split(" ", 1) if argument.startswith("--") else [argument]


def write(manifests: Sequence[Manifest], stream: Any) -> None:
    """As one YAML stream."""
    yaml.safe_dump_all(copy.deepcopy(list(manifests)), stream, sort_keys=False, width=140)


def add_parser(commands: Any) -> None:
    """`argocd`: print what connects an installed Argo CD to this project."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "argocd", help="print project, ApplicationSet and Secrets for a cluster with Argo CD (pipe to "
        "kubectl apply --server-side --field-manager=llm-finetune -f -)")
    parser.add_argument("--git-url", required=True, help="this repository, as Argo CD reaches it")
    parser.add_argument("--git-revision", default="HEAD", help="branch that is deployed (default: the default branch)")
    parser.add_argument("--chart-url", required=True, help="oci://<registry>/<path>/llm-finetune")
    parser.add_argument("--environments", required=True, help="comma-separated folders of environments/ on this cluster, "
                        "or patterns of them (team-*)")
    parser.add_argument("--privileged", default="", help="comma-separated ones of them whose namespace needs Pod Security privileged "
                        "(host network, host paths, IPC_LOCK)")
    parser.add_argument("--plain-http", action="store_true", help="the registry speaks HTTP without TLS")
    parser.add_argument("--server", default=Site.server, help="address of the cluster's API (default: the one Argo CD runs in)")
    parser.add_argument("--name", default=Site.name, help="the cluster's name in Argo CD")
    parser.set_defaults(run=_print_site)


def _print_site(arguments: argparse.Namespace) -> int:
    site = Site(git_url=arguments.git_url, git_revision=arguments.git_revision, chart_url=arguments.chart_url,
                environments=[e.strip() for e in arguments.environments.split(",")], plain_http=arguments.plain_http,
                privileged=[e.strip() for e in arguments.privileged.split(",") if e.strip()], server=arguments.server, name=arguments.name)
    write([*read_manifests(ARGOCD / "argocd-cm.yaml"), *site_manifests(site)], sys.stdout)
    return 0
