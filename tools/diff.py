"""What a push would change in a cluster: rendered objects against the last release, and against what lives there.

    make diff ENV=local [BASE=commit]

Three answers, in this order: the runs that would start, the objects that would change by the push, and where the cluster differs from
what is rendered now (nothing, if Argo CD has synchronised it). The first two need only git and Helm, so CI shows them on pull requests;
the last needs a cluster and is left out without one.
"""

from __future__ import annotations

import argparse
import difflib
import io
import json
import os
import subprocess
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tools import argocd, environments
from tools.environments import CHART, FOLDER
from tools.errors import OperatorError
from tools.layout import REPOSITORY, Layout
from tools.repository import Repository
from tools.runid import HelmLoader

Key = tuple[str, str, str]
"""Kind, namespace, name."""
Objects = dict[Key, dict[str, Any]]

NOISE = {"managedFields", "resourceVersion", "uid", "generation", "creationTimestamp", "selfLink"}
"""Metadata that the API server writes."""


def render(name: str, root: Path = REPOSITORY, images: Mapping[str, Any] | None = None, chart: Path | None = None) -> Objects:
    """The environment's objects as Helm renders them (without CRDs and without tests, which Argo CD
    does not apply). Raises OperatorError with Helm's message.

    `images`: global.images for an environment whose release names none (what the cluster's annotation would give).
    """
    environment = environments.load(name, root)
    release = environment.documents["release.yaml"].value or {}
    with tempfile.TemporaryDirectory() as folder:
        place = ""
        if images and "images" not in release.get("global", {}):
            place = str(Path(folder) / "images.yaml")
            Path(place).write_text(yaml.safe_dump({"global": {"images": dict(images)}}), encoding="utf-8")
        command = environments.helm_command(name, chart=str(chart or root / CHART), images=place, root=root, action="template --skip-tests")
        done = subprocess.run([environments.helm_binary(), *command[1:]], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise OperatorError(f"The environment {name} does not render: {done.stderr.strip()}")
    objects: Objects = {}
    for manifest in yaml.load_all(done.stdout, Loader=HelmLoader):
        if manifest:
            objects[key_of(manifest)] = manifest
    return objects


def key_of(manifest: Mapping[str, Any]) -> Key:
    """Kind, namespace and name of a manifest."""
    metadata = manifest["metadata"]
    return manifest["kind"], metadata.get("namespace", ""), metadata["name"]


def checkout(repository: Repository, commit: str, folder: Path) -> Path:
    """The charts and environments of a commit, as files in a folder."""
    paths = [p for p in (str(CHART), FOLDER) if repository.try_git("cat-file", "-e", f"{commit}:{p}") is not None]
    data = subprocess.run(["git", "archive", "--format=tar", commit, "--", *paths], cwd=repository.root, capture_output=True, check=False)
    if data.returncode != 0:
        raise OperatorError(f"git archive {commit}: {data.stderr.decode().strip()}")
    with tarfile.open(fileobj=io.BytesIO(data.stdout)) as archive:
        archive.extractall(folder, filter="data")
    return folder


def shown(manifest: Mapping[str, Any] | None) -> list[str]:
    """A manifest as lines of YAML; a run's configuration is written out."""
    if manifest is None:
        return []
    text: str = yaml.safe_dump(dict(manifest), sort_keys=True, width=140)
    return text.splitlines(keepends=True)


@dataclass
class Change:
    """One object that differs."""

    key: Key
    what: str
    """new, gone or changed"""
    lines: list[str] = field(default_factory=list)
    """Unified diff."""

    def text(self) -> str:
        kind, namespace, name = self.key
        return f"{self.what:8}{kind} {namespace + '/' if namespace else ''}{name}"


def compare(before: Mapping[Key, dict[str, Any]], after: Mapping[Key, dict[str, Any]]) -> list[Change]:
    """Objects that differ, sorted by kind and name."""
    changes = []
    for key in sorted(before.keys() | after.keys()):
        old, new = before.get(key), after.get(key)
        if old == new:
            continue
        what = "new" if old is None else "gone" if new is None else "changed"
        lines = [] if what == "gone" else list(difflib.unified_diff(shown(old), shown(new), "before", "after", n=2))
        changes.append(Change(key, what, lines))
    return changes


def run_of(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The run that a RayJob carries (`run` of the trainer's configuration), with its image under `image`."""
    variables = (yaml.safe_load(manifest["spec"].get("runtimeEnvYAML", "")) or {}).get("env_vars", {})
    config = yaml.load(variables.get("LLM_FINETUNE_CONFIG", "{}"), Loader=HelmLoader) or {}
    containers = manifest["spec"].get("submitterPodTemplate", {}).get("spec", {}).get("containers", [])
    return {**config.get("run", {}), "image": containers[0]["image"] if containers else ""}


def started(before: Mapping[Key, dict[str, Any]], after: Mapping[Key, dict[str, Any]], known: Mapping[str, str]) -> list[str]:
    """What happens to runs: one line for each that would start or is found again, and why it is another one.

    `known`: state by name of the RayJobs in the cluster.
    """
    old = {k: m for k, m in before.items() if k[0] == "RayJob"}
    lines = []
    for key, manifest in sorted(after.items()):
        if key[0] != "RayJob" or key in old:
            continue
        name = key[2]
        if name in known:
            lines.append(f"{name} exists already ({known[name]}): " + ("delete its RayJob to go on from its last checkpoint"
                         if known[name] in ("FAILED", "STOPPED") else "nothing is trained again"))
            continue
        lines.append(f"{name} would START")
        if old:
            theirs = dict(environments.leaves(run_of(next(iter(old.values())))))
            ours = dict(environments.leaves(run_of(manifest)))
            for path in sorted(theirs.keys() | ours.keys(), key=environments.dotted):
                if theirs.get(path) != ours.get(path):
                    lines.append(f"    {environments.dotted(path)}: {theirs.get(path, '(not set)')} -> {ours.get(path, '(not set)')}")
    after_names = {k for k in after if k[0] == "RayJob"}
    lines += [f"{k[2]} is left as it is (its directory and its RayJob stay)" for k in sorted(old) if k not in after_names]
    return lines


def clean(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """A live object without what the API server and the controllers write."""
    result = {k: v for k, v in manifest.items() if k != "status"}
    metadata = {k: v for k, v in manifest["metadata"].items() if k not in NOISE}
    annotations = {k: v for k, v in (metadata.get("annotations") or {}).items() if not k.startswith(("argocd.argoproj.io/tracking-id",
                   "kubectl.kubernetes.io/last-applied", "deployment.kubernetes.io/", "pv.kubernetes.io/"))}
    metadata.pop("annotations", None)
    if annotations:
        metadata["annotations"] = annotations
    result["metadata"] = metadata
    return result


class Live:
    """The cluster that an environment is deployed to."""

    def __init__(self, context: str = "") -> None:
        from kubernetes import client, config, dynamic

        own = Layout().kubeconfig
        config.load_kube_config(config_file=None if context or not own.exists() else str(own), context=context or None)
        self.client = dynamic.DynamicClient(client.ApiClient())
        self.core = client.CoreV1Api()

    def images(self, environment: str) -> dict[str, Any]:
        """global.images of the cluster's annotation, if a cluster Secret of this Argo CD names the environment."""
        secrets = self.core.list_namespaced_secret(argocd.NAMESPACE, label_selector=f"{argocd.LABEL_ENABLED}=true").items
        for secret in secrets:
            annotations = (secret.metadata and secret.metadata.annotations) or {}
            if argocd.deployed(annotations.get(argocd.ANNOTATION + "environments", ""), environment):
                return dict(json.loads(annotations.get(argocd.ANNOTATION + "images", "{}")))
        return {}

    def runs(self, namespace: str) -> dict[str, str]:
        """State by name of the RayJobs of a namespace."""
        from kubernetes.dynamic.exceptions import NotFoundError, ResourceNotFoundError

        try:
            jobs = self.client.resources.get(api_version="ray.io/v1", kind="RayJob").get(namespace=namespace)
        except (ResourceNotFoundError, NotFoundError):
            return {}
        return {j.metadata.name: str((j.to_dict().get("status") or {}).get("jobStatus") or "not started") for j in jobs.items}

    def applied(self, manifest: Mapping[str, Any], namespace: str) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
        """The object as it lives, and as it would be after applying the manifest (a dry run on the server)."""
        from kubernetes.dynamic.exceptions import DynamicApiError, NotFoundError, ResourceNotFoundError

        try:
            resource = self.client.resources.get(api_version=manifest["apiVersion"], kind=manifest["kind"])
        except ResourceNotFoundError:
            return None, dict(manifest)
        place = {"namespace": manifest["metadata"].get("namespace", namespace)} if resource.namespaced else {}
        try:
            live = clean(resource.get(name=manifest["metadata"]["name"], **place).to_dict())
        except NotFoundError:
            return None, dict(manifest)
        try:
            wanted = self.client.server_side_apply(resource, body=dict(manifest), name=manifest["metadata"]["name"], dry_run="All",
                                                   field_manager="argocd-controller", force_conflicts=True, **place)
        except DynamicApiError as error:
            raise OperatorError(f"The cluster refuses {manifest['kind']} {manifest['metadata']['name']}: {error.summary()}") from None
        return live, clean(wanted.to_dict())


def connect(context: str = "") -> Live | None:
    """The cluster, or None if none is configured or it does not answer."""
    from kubernetes import config
    from urllib3.exceptions import HTTPError

    try:
        return Live(context)
    except (config.ConfigException, HTTPError, OSError):
        return None


def base_commit(repository: Repository, base: str) -> str:
    """The commit to compare with: the one named, else the branch's upstream, else HEAD."""
    name = base or repository.upstream() or "HEAD"
    commit = repository.try_git("rev-parse", "--verify", "--quiet", f"{name}^{{commit}}")
    if commit is None:
        raise OperatorError(f"There is no commit {name}. Give one with BASE=..., for example BASE=origin/main.")
    return commit


def report(name: str, *, base: str = "", context: str = "", live: bool = True, full: bool = True, root: Path = REPOSITORY) -> str:
    """The three answers as text."""
    repository = Repository(root)
    commit = base_commit(repository, base)
    cluster = connect(context) if live else None
    images = cluster.images(name) if cluster else {}
    after = render(name, root, images)
    before: Objects = {}
    note = ""
    with tempfile.TemporaryDirectory() as folder:
        old = checkout(repository, commit, Path(folder))
        if (old / FOLDER / name).is_dir() and (old / CHART / "Chart.yaml").is_file():
            try:
                before = render(name, old, images)
            except OperatorError as error:
                note = f"What is released now does not render, so everything is shown as new: {error}"
        else:
            note = f"{name} is new: {commit[:12]} does not have it."
    namespace = environments.namespace(name)
    known = cluster.runs(namespace) if cluster else {}
    lines = [f"Environment {name}, against {commit[:12]}", *([note] if note else []), "", "Runs"]
    lines += [f"  {line}" for line in started(before, after, known)] or ["  none would start"]
    changes = compare(before, after)
    lines += ["", f"Objects that the push changes: {len(changes)}", *_changes(changes, full)]
    if cluster:
        drift = []
        for key, manifest in sorted(after.items()):
            there, wanted = cluster.applied(manifest, namespace)
            drift += compare({key: there} if there else {}, {key: wanted} if wanted else {})
        lines += ["", f"Objects in the cluster that differ from what is rendered now: {len(drift)}", *_changes(drift, full)]
    elif live:
        lines += ["", "No cluster answers: what lives there is not compared."]
    return "\n".join(lines)


def _changes(changes: Sequence[Change], full: bool) -> list[str]:
    lines = []
    for change in changes:
        lines.append(f"  {change.text()}")
        if full and change.what == "changed":
            lines += [f"      {line.rstrip()}" for line in change.lines[2:]]
    return lines


def add_parser(commands: Any) -> None:
    """`diff ENV`; BASE and CONTEXT also from the environment, as make passes them."""
    parser: argparse.ArgumentParser = commands.add_parser("diff", help="what a push would change in an environment")
    parser.add_argument("environment")
    parser.add_argument("--base", default=os.environ.get("BASE", ""), help="commit to compare with (default: the upstream, else HEAD)")
    parser.add_argument("--context", default=os.environ.get("CONTEXT", ""), help="kubeconfig context")
    parser.add_argument("--no-live", action="store_true", help="git only, as in CI")
    parser.add_argument("--short", action="store_true", help="names of objects without their lines")
    parser.set_defaults(run=lambda a: print(report(a.environment, base=a.base, context=a.context, live=not a.no_live,
                                                   full=not a.short)) or 0)
