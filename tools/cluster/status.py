"""`make status`: every component, Application, run and URL on one screen."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import httpx
from kubernetes import client
from kubernetes.client.exceptions import ApiException

from tools.cluster import daemons
from tools.cluster.network import listens
from tools.cluster.settings import Settings
from tools.layout import Layout
from tools.progress import clock

RAY = ("ray.io", "v1")
ARGO = ("argoproj.io", "v1alpha1", "argocd", "applications")
PATIENCE = 90.0
"""Seconds for which an error of Argo CD may be one that passes (the registry's first answer, a CRD that is not there yet)."""


def namespace(environment: str) -> str:
    """Where an environment's objects live."""
    return f"llm-finetune-{environment}"


@dataclass(frozen=True)
class Run:
    """One RayJob with what its run directory says."""

    name: str
    status: str
    """KubeRay's deployment status: Initializing, Running, Complete, Failed, ..."""
    job: str
    """Ray's job status: PENDING, RUNNING, SUCCEEDED, FAILED."""
    created: float
    """Unix time."""
    message: str = ""
    progress: dict[str, Any] = field(default_factory=dict)

    def line(self) -> str:
        """Stage, percent, speed, time left."""
        p = self.progress
        if not p or self.job == "SUCCEEDED":
            return self.job or self.status or "waiting"
        parts = [str(p.get("stage", ""))]
        if p.get("percent") is not None:
            parts.append(f"{p['percent']:.0f}%")
        if p.get("tokens_per_second"):
            parts.append(f"{p['tokens_per_second']:.0f} tokens/s")
        if p.get("loss") is not None:
            parts.append(f"loss {p['loss']:.3f}")
        if p.get("eta_seconds") is not None:
            parts.append(f"{clock(p['eta_seconds'])} left")
        return ", ".join(parts) + (f" [{self.job or self.status}]" if self.job != "RUNNING" else "")


@dataclass(frozen=True)
class State:
    """An environment as the cluster has it."""

    environment: str
    sync: str = "unknown"
    health: str = "unknown"
    revision: str = ""
    message: str = ""
    error_since: float | None = None
    """Unix time of the oldest error that Argo CD reports."""
    syncing: str = ""
    """What Argo CD's sync is doing, while one runs."""
    chart: str = ""
    """Digest of the chart that it has read."""
    run: Run | None = None
    """The run that the environment's files ask for now."""
    others: tuple[Run, ...] = ()
    waiting: tuple[str, ...] = ()
    """Objects that are not healthy, with what they wait for or miss."""

    @property
    def run_ended(self) -> bool:
        return self.run is not None and self.run.job == "SUCCEEDED"

    @property
    def failure(self) -> str:
        """What will not mend itself; empty if nothing."""
        if self.run is not None and (self.run.status in ("Failed", "ValidationFailed") or self.run.job == "FAILED"):
            return f"Run {self.run.name} failed: {(self.run.message or self.run.status)[-600:]}"
        if self.error_since is not None and time.time() - self.error_since > PATIENCE:
            return f"Argo CD: {self.message}"
        return ""

    @property
    def log_command(self) -> str:
        name = self.run.name if self.run else "<run>"
        return f"kubectl -n {namespace(self.environment)} logs -f job/{name}"

    def line(self) -> str:
        """What is under way, in a few words."""
        if self.run is not None:
            return self.run.line()
        return self.message[:120] or f"Application {self.sync}, {self.health}"


def _progress(layout: Layout, run: str) -> dict[str, Any]:
    try:
        document = json.loads((layout.storage / "runs" / run / "progress.json").read_text())
    except (OSError, ValueError):
        return {}
    return document if isinstance(document, dict) else {}


def runs(api: client.ApiClient, environment: str, layout: Layout) -> list[Run]:
    """All runs of an environment, the newest first."""
    try:
        answer: Any = client.CustomObjectsApi(api).list_namespaced_custom_object(*RAY, namespace(environment), "rayjobs")
    except ApiException as error:
        if error.status == 404:
            return []
        raise
    found = answer["items"]
    found.sort(key=lambda job: job["metadata"]["creationTimestamp"], reverse=True)
    return [_run(job, layout) for job in found]


def _run(job: dict[str, Any], layout: Layout) -> Run:
    name, reported = job["metadata"]["name"], job.get("status", {})
    return Run(name, reported.get("jobDeploymentStatus", ""), reported.get("jobStatus", ""), _unix(job["metadata"]["creationTimestamp"]),
               reported.get("message", "") or reported.get("reason", ""), _progress(layout, name))


def environment(api: client.ApiClient, name: str, layout: Layout) -> State:
    """The Application of an environment, and its runs."""
    try:
        application: Any = client.CustomObjectsApi(api).get_namespaced_custom_object(*ARGO, f"llm-finetune-{name}")
    except ApiException as error:
        if error.status == 404:
            return State(name, message="waiting for the ApplicationSet")
        raise
    status = application.get("status", {})
    revisions = status.get("sync", {}).get("revisions") or ["", ""]
    wanted = {r["name"] for r in status.get("resources", []) if r["kind"] == "RayJob" and r.get("status") != "OutOfSync"}
    everything = runs(api, name, layout)
    current = next((r for r in everything if r.name in wanted), None)
    errors = [c for c in status.get("conditions", []) if c["type"].endswith("Error")]
    operation = status.get("operationState", {})
    if operation.get("phase") in ("Failed", "Error"):
        errors.append({"message": operation.get("message", ""), "lastTransitionTime": operation.get("finishedAt", "")})
    since = min((_unix(c.get("lastTransitionTime", "")) for c in errors), default=None)
    syncing = operation.get("message", "") or "starting" if operation.get("phase") == "Running" else ""
    return State(name, status.get("sync", {}).get("status", "unknown"), status.get("health", {}).get("status", "unknown"),
                 revisions[0][:10], "; ".join(c["message"] for c in errors), since, syncing, revisions[-1], current,
                 tuple(r for r in everything if r is not current), unhealthy(status.get("resources", [])))


def unhealthy(resources: list[dict[str, Any]]) -> tuple[str, ...]:
    """`<kind> <name>: <health>, <message>` of an Application's objects that are not healthy (argocd/local/settings.yaml has them kept)."""
    found = []
    for resource in resources:
        health = resource.get("health") or {}
        if health.get("status", "Healthy") != "Healthy":
            found.append(f"{resource['kind']} {resource['name']}: {health['status']}" + (f", {m}" if (m := health.get("message")) else ""))
    return tuple(found)


def trouble(api: client.CoreV1Api, pod: Any) -> str:
    """Why a pod that is not ready is not: what its container waits for, else the newest warning about it. Empty if nothing is said."""
    statuses = [*(pod.status.init_container_statuses or []), *(pod.status.container_statuses or [])]
    for one in statuses:
        if one.state and one.state.waiting and one.state.waiting.message:
            return str(one.state.waiting.message)
    about = f"involvedObject.uid={pod.metadata.uid},type=Warning"
    events: list[Any] = api.list_namespaced_event(pod.metadata.namespace, field_selector=about).items
    newest = max(events, key=lambda e: (e.last_timestamp or e.metadata.creation_timestamp), default=None)
    return str(newest.message) if newest else ""


def _unix(stamp: str) -> float:
    return datetime.fromisoformat(stamp.replace("Z", "+00:00")).timestamp() if stamp else time.time()


def served_run(settings: Settings) -> str:
    """Id of the run that the chatbot answers with; empty while it cannot answer."""
    try:
        answer = httpx.get(f"http://127.0.0.1:{settings.chatbot_port}/v1/models", timeout=5)
        return str(answer.json()["data"][0]["attribution"]["run"]) if answer.status_code == 200 else ""
    except (httpx.HTTPError, ValueError, LookupError, TypeError):
        return ""


def newest_run(layout: Layout) -> str:
    """Id of the newest finished run on the storage, which a chatbot with `follow: latest` moves to; empty if there is none."""
    reports = [(path.stat().st_mtime_ns, path.parent.name) for path in (layout.storage / "runs").glob("*/report.json")]
    return max(reports)[1] if reports else ""


def text(api: client.ApiClient, layout: Layout, settings: Settings) -> str:
    """The whole screen."""
    lines = ["Node services"]
    for name in ("registry", "containerd", "kubelet", "netpol", "git", "port-dashboard", "port-chatbot"):
        pid = daemons.running_pid(layout.runtime / "pids" / name)
        lines.append(f"  {name:22} {f'running (pid {pid})' if pid else 'NOT RUNNING'}")
    lines.append("Pods")
    core = client.CoreV1Api(api)
    pods: list[Any] = core.list_pod_for_all_namespaces().items  # the generated types call every field optional
    for pod in pods:
        statuses = pod.status.container_statuses or []
        ready = sum(1 for c in statuses if c.ready)
        restarts = sum(c.restart_count for c in statuses)
        waiting = next((c.state.waiting.reason for c in statuses if c.state and c.state.waiting), "")
        lines.append(f"  {pod.metadata.namespace + '/' + pod.metadata.name:66} {ready}/{len(pod.spec.containers)} "
                     f"{waiting or pod.status.phase}{f', {restarts} restarts' if restarts else ''}")
        if ready < len(pod.spec.containers) and pod.status.phase != "Succeeded" and (cause := trouble(core, pod)):
            lines.append(f"    {cause}")
    lines.append("Applications")
    applications: Any = client.CustomObjectsApi(api).list_namespaced_custom_object(*ARGO)
    states = [environment(api, a["metadata"]["name"].removeprefix("llm-finetune-"), layout) for a in applications["items"]]
    for state in states:
        lines.append(f"  {state.environment:22} {state.sync}, {state.health} at {state.revision or 'no commit'}"
                     + "".join(f"\n    {line}" for line in ([state.message] if state.message else []) + list(state.waiting)))
    lines.append("Runs")
    for state in states:
        for run in ([state.run] if state.run else []) + list(state.others):
            lines.append(f"  {run.name:48} {run.line()}{'  <- wanted now' if run is state.run else ''}")
            if run is state.run and run.job == "FAILED":
                lines += [f"    {line}" for line in run.message.strip()[-600:].splitlines()]
    lines.append("URLs")
    for name, port in (("chatbot", settings.chatbot_port), ("Ray dashboard", settings.dashboard_port)):
        lines.append(f"  {name:22} http://localhost:{port} {'' if listens('127.0.0.1', port) else '(nothing listens)'}")
    token = f"kubectl -n {namespace('local')} get secret llm-finetune -o jsonpath={{.data.auth_token}} | base64 -d"
    lines.append(f"  {'dashboard token':22} {token}")
    free = shutil.disk_usage(layout.cache).free / 2**30
    lines.append(f"Storage                  {layout.storage}, {free:.0f} GiB free; logs in {layout.logs}")
    return "\n".join(lines)
