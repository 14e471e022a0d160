"""Reading runs from the shared storage of an environment: a mounted folder, or a pod of the environment that has it mounted.

The pod way needs nothing but the right to exec into a pod of that namespace. The chatbot's own API would not do: it knows only the run
that it serves, and a checksum that the serving side computes is no evidence for what lies on the storage.
"""

from __future__ import annotations

import json
import posixpath
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tools.errors import OperatorError
from trainer.files import directory_digest, sha256

RUN_ID = re.compile(r"^[a-z]([a-z0-9-]{0,34}[a-z0-9])?-[0-9a-f]{10}$")


class RunStore(Protocol):
    """The folder `runs` of a shared storage."""

    def describe(self) -> str:
        """For messages: where this is."""

    def runs(self) -> list[str]:
        """Ids of the runs that have a report, the newest report first."""

    def read(self, path: str) -> str | None:
        """A text file below runs/, or None if it is missing."""

    def checksums(self, folder: str, names: Sequence[str]) -> dict[str, str]:
        """sha256 of files of a folder below runs/, computed where they lie; missing files are left out."""


@dataclass(frozen=True)
class FolderStore:
    """The storage, mounted on this machine."""

    storage: Path

    def describe(self) -> str:
        return str(self.storage)

    def runs(self) -> list[str]:
        reports = [p for p in (self.storage / "runs").glob("*/report.json") if RUN_ID.fullmatch(p.parent.name)]
        return [p.parent.name for p in sorted(reports, key=lambda p: p.stat().st_mtime, reverse=True)]

    def read(self, path: str) -> str | None:
        file = self.storage / "runs" / path
        return file.read_text(encoding="utf-8") if file.is_file() else None

    def checksums(self, folder: str, names: Sequence[str]) -> dict[str, str]:
        directory = self.storage / "runs" / folder
        return {n: sha256(directory / n) for n in names if (directory / n).is_file()}


@dataclass(frozen=True)
class PodStore:
    """The storage as a running pod of the environment sees it (Ray head or chatbot)."""

    api: Any
    """kubernetes.client.CoreV1Api"""
    namespace: str
    pod: str
    container: str
    mount: str
    """Where the pod has the storage mounted."""
    timeout: float = 3600.0
    """Seconds that reading all weights may take."""

    @classmethod
    def find(cls, api: Any, namespace: str) -> PodStore:
        """A running container of the namespace that mounts the shared claim."""
        for pod in api.list_namespaced_pod(namespace, label_selector="app.kubernetes.io/part-of=llm-finetune").items:
            claims = {v.name for v in pod.spec.volumes or [] if v.persistent_volume_claim}
            running = {s.name for s in (pod.status.container_statuses or []) if s.state and s.state.running}
            for container in pod.spec.containers:
                for mount in container.volume_mounts or []:
                    if mount.name in claims and container.name in running:
                        return cls(api, namespace, pod.metadata.name, container.name, mount.mount_path)
        raise OperatorError(f"No running pod of namespace {namespace} has the shared storage mounted. Start the Ray cluster or the chatbot "
                            f"there, or give the mounted storage with --storage DIR.")

    def describe(self) -> str:
        return f"{self.mount} of pod {self.namespace}/{self.pod}"

    def _exec(self, script: str) -> str:
        from kubernetes.stream import stream

        client = stream(self.api.connect_get_namespaced_pod_exec, self.pod, self.namespace, container=self.container,
                        command=["/bin/sh", "-c", script], stderr=True, stdin=False, stdout=True, tty=False, _preload_content=False)
        client.run_forever(timeout=self.timeout)
        output, errors = client.read_stdout() or "", client.read_stderr() or ""
        if client.is_open():
            client.close()
            raise OperatorError(f"{self.describe()} did not answer within {self.timeout:.0f} s.")
        if client.returncode != 0:
            raise OperatorError(f"{self.describe()}: {errors.strip()[-500:] or f'exit code {client.returncode}'}")
        return str(output)

    def runs(self) -> list[str]:
        lines = self._exec(f"cd {shlex.quote(self.mount)}/runs 2>/dev/null && ls -1t -- */report.json 2>/dev/null; true").split()
        return [n for n in (posixpath.dirname(line) for line in lines) if RUN_ID.fullmatch(n)]

    def read(self, path: str) -> str | None:
        file = shlex.quote(f"{self.mount}/runs/{path}")
        text = self._exec(f"if [ -f {file} ]; then echo found; cat -- {file}; else echo missing; fi")
        head, _, rest = text.partition("\n")
        return rest if head == "found" else None

    def checksums(self, folder: str, names: Sequence[str]) -> dict[str, str]:
        files = " ".join(shlex.quote(f"./{n}") for n in names)
        text = self._exec(f"cd {shlex.quote(f'{self.mount}/runs/{folder}')} && for f in {files}; do "
                          f"if [ -f \"$f\" ]; then sha256sum -- \"$f\"; fi; done")
        found = {}
        for line in text.splitlines():
            digest, _, name = line.partition("  ")
            found[name.removeprefix("./")] = digest
        return found


@dataclass(frozen=True)
class Run:
    """A finished run, its weights compared with its report."""

    id: str
    report: dict[str, Any]
    sha256: str
    """`checkpoint_sha256`: digest of the exported model."""
    files: int
    size: int
    """Bytes of the exported model."""


def read_report(store: RunStore, run: str) -> dict[str, Any]:
    """report.json of a run. Raises OperatorError if it is missing or not that run's."""
    text = store.read(f"{run}/report.json")
    if text is None:
        raise OperatorError(f"{store.describe()} has no report of the run {run}. Finished runs there: {', '.join(store.runs()) or 'none'}.")
    try:
        report = json.loads(text)
    except ValueError as error:
        raise OperatorError(f"report.json of {run} in {store.describe()} is not valid JSON: {error}") from None
    if not isinstance(report, dict) or report.get("run") != run:
        named = report.get("run") if isinstance(report, dict) else None
        raise OperatorError(f"report.json of {run} in {store.describe()} is of the run {named!r}. Was the folder copied or renamed?")
    return report


def verify(store: RunStore, run: str) -> Run:
    """Read a run's report and compare its model, file by file as it lies there, with manifest and report.

    Raises OperatorError naming the first file that is missing or differs.
    """
    report = read_report(store, run)
    text = store.read(f"{run}/model/manifest.json")
    if text is None:
        raise OperatorError(f"The run {run} has no exported model in {store.describe()} (model/manifest.json is missing).")
    manifest = json.loads(text)
    files = {n: e for n, e in manifest["files"].items() if n != "README.md"}  # the model card changes nothing that is served
    found = store.checksums(f"{run}/model", sorted(files))
    for name, entry in sorted(files.items()):
        if name not in found:
            raise OperatorError(f"{run}/model/{name} is missing in {store.describe()}.")
        if found[name] != entry["sha256"]:
            raise OperatorError(f"{run}/model/{name} has the sha256 {found[name]}, but its manifest says {entry['sha256']}: the file is "
                                f"damaged or was replaced. Remove {run}/model and run the same configuration again; it is exported anew.")
    digest = directory_digest(manifest)
    if digest != report.get("checkpoint_sha256"):
        raise OperatorError(f"The model of {run} has the digest {digest}, but its report is about {report.get('checkpoint_sha256')}.")
    return Run(run, report, digest, len(files), sum(int(e["size"]) for e in files.values()))
