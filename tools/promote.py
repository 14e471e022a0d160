"""Promotion: the run that one environment has tried goes to the next, by a commit that carries its evidence.

    make promote FROM=dev TO=staging [RUN=id] [STORAGE=dir] [FORCE=1 REASON="..."]

What is checked, in this order; the first that fails refuses with what to do:
  1. the checkout is committed, current and not diverged: what is promoted is what was reviewed;
  2. the run: the one that FROM serves, or the one named;
  3. its weights, file by file as they lie on FROM's storage, against manifest and report;
  4. the gate of TO (environments/<to>/gate.yaml, else the trainer's), against the base model and against what TO serves now, and the
     report's sample answers by the guardrails of TO's chatbot;
  5. the weights on TO's storage: shared with FROM, or copied there before (the message says how).
Only the gate can be overridden (FORCE=1 with a REASON); the commit then says so. The result is a commit on a branch of its own:
release.yaml of TO with FROM's chart version and image pins and the run; nothing is pushed.
"""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from chatbot.errors import ConfigError
from tools import environments
from tools.environments import Environment
from tools.errors import OperatorError
from tools.layout import REPOSITORY, Layout
from tools.repository import Repository
from tools.runs import FolderStore, PodStore, Run, RunStore, read_report, verify
from tools.sample_check import check_samples, guardrails_of
from trainer.errors import UserError
from trainer.evaluate import gate as gates

SHOWN = (("loss", "Loss"), ("perplexity", "Perplexity"), ("token_f1", "Token-F1"), ("rouge_l", "ROUGE-L"),
         ("decision_accuracy", "Decision accuracy"), ("macro_f1", "Macro-F1"))
"""Metrics in the commit message: key of the report, and name."""


@dataclass(frozen=True)
class Promotion:
    """What a promotion would commit."""

    source: str
    target: str
    run: Run
    verdict: dict[str, Any]
    """Of the gate: passed, reasons, checks."""
    forced: str
    """Reason for which a failed gate was overridden; empty if it passed."""
    release: str
    """New content of the target's release.yaml."""
    message: str
    """Commit message."""
    branch: str
    served: str = ""
    """Run that the target served before."""
    notes: list[str] = field(default_factory=list)


def serve_of(environment: Environment) -> dict[str, Any]:
    """`chatbot.config.serve` of an environment's release."""
    release = environment.documents["release.yaml"].value
    return dict(release.get("chatbot", {}).get("config", {}).get("serve", {}))


def load_checked(name: str, root: Path) -> Environment:
    """An environment whose release can be read. Raises OperatorError with the first finding."""
    environment = environments.load(name, root)
    release = environment.documents["release.yaml"]
    if release.findings or release.value is None:
        finding = release.findings[0].text(root) if release.findings else f"{release.path} is empty"
        raise OperatorError(f"{finding}\nMend it first; `make lint` lists everything that is wrong.")
    return environment


def chosen_run(environment: Environment, store: RunStore, run: str) -> str:
    """The run to promote: the one named, the one that the environment serves, or its newest finished one."""
    if run:
        return run
    serve = serve_of(environment)
    if serve.get("run"):
        return str(serve["run"])
    found = store.runs()
    if not found:
        raise OperatorError(f"No run of {environment.name} has a report in {store.describe()}. Wait until one is finished (make status).")
    return found[0]


def gate_of(name: str, root: Path) -> tuple[dict[str, Any], str]:
    """The gate of an environment and where it is written."""
    own = root / environments.FOLDER / name / "gate.yaml"
    path = own if own.is_file() else gates.DEFAULT
    return gates.load_gate(path), str(path.relative_to(root) if path.is_relative_to(root) else path)


def release_text(old: str, value: dict[str, Any]) -> str:
    """release.yaml: the comments at the head of the file before, then the values."""
    lines = old.splitlines(keepends=True)
    head = []
    for line in lines:
        if not line.startswith("#"):
            break
        head.append(line)
    return "".join(head) + yaml.safe_dump(value, sort_keys=False, width=140)


def plan(source: Environment, target: Environment, source_store: RunStore, target_store: RunStore, *, run: str = "", force: str = "",
         root: Path = REPOSITORY, author: str = "") -> Promotion:
    """Check everything and describe the commit. Raises OperatorError with the reason of a refusal.

    `force`: reason for which a failed gate is overridden.
    """
    if source.name == target.name:
        raise OperatorError(f"FROM and TO are both {source.name}. Name two environments.")
    identifier = chosen_run(source, source_store, run)
    checked = verify(source_store, identifier)
    if checked.report.get("state") != "finished":
        raise OperatorError(f"The run {identifier} is {checked.report.get('state')}, not finished. Wait for it, or look at its log "
                            f"(make status).")
    served_id = str(serve_of(target).get("run", ""))
    if served_id == identifier and serve_of(target).get("sha256") == checked.sha256:
        raise OperatorError(f"{target.name} serves {identifier} already.")
    served = read_report(target_store, served_id) if served_id else None
    try:
        gate, gate_path = gate_of(target.name, root)
        verdict = gates.join(gates.judge(checked.report, gate, served), check_samples(checked.report, guardrails_of(target)))
    except (UserError, ConfigError) as error:
        raise OperatorError(str(error)) from None
    if not verdict["passed"] and not force:
        reasons = "\n".join(f"  - {r}" for r in verdict["reasons"])
        raise OperatorError(f"The gate of {target.name} ({gate_path}) refuses {identifier}:\n{reasons}\n"
                            f"Train a better run, or override with FORCE=1 REASON=\"...\" (the commit will say so).")
    if target_store.describe() != source_store.describe():
        _require_adopted(checked, target, target_store, source_store)
    value = _release(source, target, checked)
    message = _message(source, target, checked, verdict, gate_path, force if not verdict["passed"] else "", served_id, author)
    return Promotion(source=source.name, target=target.name, run=checked, verdict=verdict, forced="" if verdict["passed"] else force,
                     release=release_text(target.documents["release.yaml"].path.read_text(encoding="utf-8"), value), message=message,
                     branch=f"promote/{target.name}/{identifier}", served=served_id, notes=_notes(source, target))


def _require_adopted(run: Run, target: Environment, store: RunStore, source: RunStore) -> None:
    if store.read(f"{run.id}/model/manifest.json") is None:
        raise OperatorError(
            f"{target.name}'s storage ({store.describe()}) does not have the run {run.id}. It is not trained again; copy it:\n"
            f"  rsync -a --exclude checkpoints --exclude dataset {shlex.quote(source.describe())}/runs/{run.id} <{target.name}>:runs/\n"
            f"or mount the same export in both environments (docs/promotion.md).")
    there = verify(store, run.id)
    if there.sha256 != run.sha256:
        raise OperatorError(f"{run.id} on {target.name}'s storage has the digest {there.sha256}, on the source's {run.sha256}. "
                            f"Copy it again.")


def _release(source: Environment, target: Environment, run: Run) -> dict[str, Any]:
    """The target's release: the source's chart version and image pins, and the run."""
    ours, theirs = source.documents["release.yaml"].value, target.documents["release.yaml"].value
    images = ours["global"].get("images")
    wanted = theirs["global"].get("images")
    result: dict[str, Any] = {"global": {"release": {"chart": {"version": source.chart_version}}}}
    if images:
        # The target pins what it has charts for; an image that only the source uses (the operator's) stays with the source.
        result["global"]["images"] = {n: i for n, i in images.items() if wanted is None or n in wanted}
    elif wanted:
        raise OperatorError(f"{source.name} names no images, but {target.name} pins some. Pin them in "
                            f"{source.documents['release.yaml'].path} too (make images REGISTRY=... TAG=... prints the digests).")
    result["chatbot"] = {"enabled": True, "config": {"serve": {"follow": "none", "run": run.id, "sha256": run.sha256}}}
    return result


def _notes(source: Environment, target: Environment) -> list[str]:
    images = source.documents["release.yaml"].value["global"].get("images") or {}
    return [f"The image {n} is pinned by tag ({i['tag']}), which can move. Pin its digest in {source.name}'s release.yaml."
            for n, i in images.items() if "digest" not in i]


def _number(value: Any) -> str:
    return "-" if not isinstance(value, int | float) else f"{value:.4g}"


def evidence(report: dict[str, Any]) -> list[str]:
    """The report's figures as a table of text."""
    lines = [f"{'':20}{'base':>10}{'tuned':>10}   difference"]
    for key, title in SHOWN:
        base, tuned = report.get("base", {}).get(key), report.get("tuned", {}).get(key)
        if base is None and tuned is None:
            continue
        difference = report.get("difference", {}).get(key) or {}
        shown = f"{_number(difference.get('mean'))} [{_number(difference.get('low'))}, {_number(difference.get('high'))}]"
        lines.append(f"{title:20}{_number(base):>10}{_number(tuned):>10}   {shown}")
    return lines


def report_link(source: Environment, run: Run) -> str:
    """Where a reviewer reads the whole report: its file on the storage, and the chatbot's page where that serves this run by name."""
    ingress = source.values.get("chatbot", {}).get("ingress", {})
    path = f"runs/{run.id}/report.html"
    if not ingress.get("enabled") or serve_of(source).get("run") != run.id:
        return path
    return f"{path}, {'https' if ingress.get('tlsSecretName') else 'http'}://{ingress['host']}/report"


def _message(source: Environment, target: Environment, run: Run, verdict: dict[str, Any], gate: str, forced: str, served: str,
             author: str) -> str:
    report = run.report
    train = report.get("train") or {}
    gate_line = "passed" if verdict["passed"] else f"FAILED, overridden by {author or 'the operator'}: {forced}"
    lines = [f"Promote {run.id} from {source.name} to {target.name}" + (" (gate overridden)" if forced else ""), "",
             f"Model    {report.get('base_model')}, data {report.get('dataset')}, method {report.get('method')}",
             f"Weights  sha256 {run.sha256} ({run.files} files, {run.size / 1e9:.2f} GB, each compared on the storage)",
             f"Chart    {source.chart_version}",
             f"Training {train.get('steps')} steps, {train.get('tokens')} tokens",
             f"Report   {report_link(source, run)}",
             f"Before   {served or 'nothing was served'}", "",
             *evidence(report), "",
             f"Gate     {gate}: {gate_line}",
             *[f"  {'ok  ' if c['passed'] else 'FAIL'} {c['text']}" for c in verdict["checks"]], "",
             f"Promoted-Run: {run.id}", f"Promoted-Sha256: {run.sha256}", f"Promoted-From: {source.name}"]
    if forced:
        lines += [f"Gate-Overridden: {forced}"]
    return "\n".join(lines) + "\n"


def store_for(environment: str, storage: str, api: Callable[[], Any]) -> RunStore:
    """The environment's storage: the mounted folder if one is given, else through a pod of it."""
    if storage:
        folder = Path(storage)
        if not (folder / "runs").is_dir():
            raise OperatorError(f"{folder} has no folder runs. Give the root of the shared storage.")
        return FolderStore(folder)
    return PodStore.find(api(), environments.namespace(environment))


def storage_of(environment: Environment, context: str = "") -> tuple[str, ...] | None:
    """What the storage of an environment is, equal for environments that share it; None if site.yaml does not say (a claim that exists,
    a directory for each claim)."""
    part = environment.values.get("nfs-provisioner", {})
    if not part.get("enabled", True):
        return None
    mode, own = part.get("mode"), part.get(part.get("mode"), {})
    if mode == "external" and own.get("provisioning", "static") == "static":
        return "export", own.get("server", ""), own.get("path", "/")
    if mode == "inCluster":
        return "in cluster", context, own.get("clusterIP", "")
    return ("directory", context, own.get("path", "")) if mode == "nodePath" else None


def stores(source: Environment, target: Environment, *, storage: str = "", target_storage: str = "", context: str = "",
           target_context: str = "") -> tuple[RunStore, RunStore]:
    """Where the runs of both are read. What they share is read once, through the source: before its first promotion a target has no pod
    that could be asked."""
    ours = store_for(source.name, storage, lambda: cluster_api(context))
    place = storage_of(source, context)
    if not target_storage and place is not None and place == storage_of(target, target_context or context):
        return ours, ours
    return ours, store_for(target.name, target_storage or storage, lambda: cluster_api(target_context or context))


def cluster_api(context: str = "") -> Any:
    """kubernetes.client.CoreV1Api of the local cluster if it is up, else of the user's kubeconfig. Raises OperatorError without one."""
    from kubernetes import client, config

    own = Layout().kubeconfig
    try:
        config.load_kube_config(config_file=None if context or not own.exists() else str(own), context=context or None)
    except (config.ConfigException, OSError) as error:
        raise OperatorError(f"No cluster is configured ({error}). Set KUBECONFIG, or give the mounted storage with STORAGE=dir.") from None
    return client.CoreV1Api()


def promote(source: str, target: str, *, run: str = "", storage: str = "", target_storage: str = "", force: bool = False, reason: str = "",
            context: str = "", target_context: str = "", root: Path = REPOSITORY) -> Promotion:
    """Check and commit. Prints the evidence and how to push."""
    if force and not reason.strip():
        raise OperatorError("FORCE=1 needs REASON=\"...\": why this run goes on although the gate refuses it.")
    repository = Repository(root)
    upstream = repository.require_current()
    ours, theirs = load_checked(source, root), load_checked(target, root)
    source_store, target_store = stores(ours, theirs, storage=storage, target_storage=target_storage, context=context,
                                        target_context=target_context)
    author = repository.try_git("config", "user.name") or ""
    planned = plan(ours, theirs, source_store, target_store, run=run, force=reason.strip() if force else "", root=root, author=author)
    path = theirs.documents["release.yaml"].path.relative_to(root).as_posix()
    commit = repository.commit_file(planned.branch, path, planned.release, planned.message)
    print(planned.message)
    for note in planned.notes:
        print(f"Note: {note}")
    print(f"Committed {commit[:12]} on {planned.branch}. Next:")
    for line in repository.push_commands(planned.branch, upstream):
        print(f"  {line}")
    return planned


def add_parser(commands: Any) -> None:
    """`promote --from A --to B`; FORCE, REASON, RUN and STORAGE also from the environment, as make passes them."""
    env = os.environ.get
    parser: argparse.ArgumentParser = commands.add_parser("promote", help="promote a run to another environment, by its evidence")
    parser.add_argument("--from", dest="source", required=True, help="environment that has tried the run")
    parser.add_argument("--to", dest="target", required=True, help="environment that shall serve it")
    parser.add_argument("--run-id", default=env("RUN", ""), help="run (default: the one served there, else the newest finished one)")
    parser.add_argument("--storage", default=env("STORAGE", ""), help="mounted shared storage (default: through a pod of the environment)")
    parser.add_argument("--target-storage", default=env("TARGET_STORAGE", ""), help="the target's, if it is another one")
    parser.add_argument("--context", default=env("CONTEXT", ""), help="kubeconfig context of the source's cluster")
    parser.add_argument("--target-context", default=env("TARGET_CONTEXT", ""), help="the target's, if it is another one")
    parser.add_argument("--force", action="store_true", default=env("FORCE", "") == "1", help="go on although the gate refuses")
    parser.add_argument("--reason", default=env("REASON", ""), help="why; required with --force, kept in the commit")
    parser.set_defaults(run=lambda a: promote(a.source, a.target, run=a.run_id, storage=a.storage, target_storage=a.target_storage,
                                              force=a.force, reason=a.reason, context=a.context,
                                              target_context=a.target_context) and 0)
