"""progress.json: how far a run is. Written by the stages, read by people, by `make status` and by the driver that prints it."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from pathlib import Path
from typing import Any

from trainer.files import write_json

log = logging.getLogger(__name__)

STAGES = ("prepare", "train", "export", "evaluate", "report", "done")

ANNOTATION = "llm-finetune.io/progress"
"""Annotation of the RayJob that holds the progress as one line of text."""

SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")


class Progress:
    """The writer of progress.json; one process at a time. Never fails: a full or slow storage costs progress, not the run."""

    def __init__(self, path: Path, every_s: float = 1.0) -> None:
        self._path, self._every = path, every_s
        self._written = 0.0
        self._fields: dict[str, Any] = {}

    def update(self, stage: str, percent: float, message: str = "", *, now: bool = False, **fields: Any) -> None:
        """Set stage and percent (of the stage) and any of step, steps, tokens_per_second, eta_seconds, loss; written at most once in
        `every_s` seconds unless the stage changes or `now` is set."""
        changed = stage != self._fields.get("stage") or message != self._fields.get("message") or now
        self._fields = {"stage": stage, "percent": round(min(100.0, max(0.0, percent)), 1), "step": None, "steps": None,
                        "tokens_per_second": None, "eta_seconds": None, "loss": None, **fields, "message": message, "updated": time.time()}
        if changed or time.monotonic() - self._written >= self._every:
            self._written = time.monotonic()
            try:
                write_json(self._path, self._fields)
            except (OSError, ValueError) as error:
                log.warning("progress.json was not written: %s", error)


def read(path: Path) -> dict[str, Any] | None:
    """The progress, or None if there is none yet."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        return value if isinstance(value, dict) else None
    except (OSError, ValueError):
        return None


def duration(seconds: float) -> str:
    """`1h02m`, `3m20s` or `12s`."""
    s = max(0, round(seconds))
    if s >= 3600:
        return f"{s // 3600}h{s % 3600 // 60:02d}m"
    return f"{s // 60}m{s % 60:02d}s" if s >= 60 else f"{s}s"


def line(progress: dict[str, Any]) -> str:
    """One line for people: `train 37%, step 12/40, loss 2.103, 1234 tokens/s, 1m20s left`."""
    parts = [f"{progress.get('stage')} {progress.get('percent', 0):.0f}%"]
    if progress.get("steps"):
        parts.append(f"step {progress.get('step')}/{progress['steps']}")
    if progress.get("loss") is not None:
        parts.append(f"loss {progress['loss']:.4f}")
    if progress.get("tokens_per_second"):
        parts.append(f"{progress['tokens_per_second']:.0f} tokens/s")
    if progress.get("eta_seconds") is not None:
        parts.append(f"{duration(progress['eta_seconds'])} left")
    if progress.get("message"):
        parts.append(str(progress["message"]))
    return ", ".join(parts)


class Follower:
    """Prints the progress of a run while the driver waits, and mirrors it to the RayJob's annotation.

    The mirror needs RAYJOB_NAME in the environment (RAYJOB_NAMESPACE, else the pod's namespace) and a service account that may patch
    the RayJob; without them, or if the API refuses, one line says so and the run goes on.
    """

    def __init__(self, path: Path, every_s: float = 10.0, mirror_s: float = 15.0) -> None:
        self._path, self._every = path, every_s
        self._annotate = Annotations.from_environment(mirror_s)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)

    def __enter__(self) -> Follower:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(timeout=10)

    def _run(self) -> None:
        seen: tuple[Any, ...] = ()
        printed = float("-inf")
        while True:
            stopping = self._stop.wait(1.0)
            progress = read(self._path)
            if progress is not None:
                mark = (progress.get("stage"), progress.get("message"))
                news = progress.get("updated") not in seen[2:]
                if news and (mark != seen[:2] or time.monotonic() - printed >= self._every or stopping):
                    print(f"[{time.strftime('%H:%M:%S')}] {line(progress)}", flush=True)
                    seen, printed = (*mark, progress.get("updated")), time.monotonic()
                if self._annotate is not None and not self._annotate.put(line(progress), force=stopping):
                    self._annotate = None
            if stopping:
                return


class Annotations:
    """Writes one annotation of the RayJob through the Kubernetes API."""

    def __init__(self, name: str, namespace: str, every_s: float) -> None:
        self._name, self._namespace, self._every = name, namespace, every_s
        self._put, self._text = float("-inf"), ""
        self._failures = 0
        self._api: Any = None

    @classmethod
    def from_environment(cls, every_s: float) -> Annotations | None:
        name = os.environ.get("RAYJOB_NAME", "")
        if not name:
            return None
        if not (SERVICE_ACCOUNT / "token").exists():
            print(f"RayJob {name}: the progress is not mirrored to it, because this pod has no service account token.", flush=True)
            return None
        namespace = os.environ.get("RAYJOB_NAMESPACE") or (SERVICE_ACCOUNT / "namespace").read_text(encoding="utf-8").strip()
        return cls(name, namespace, every_s)

    def put(self, text: str, force: bool = False) -> bool:
        """Set the annotation if it changed and the interval has passed. False: give up (refused, or three failures in a row)."""
        if text == self._text or (not force and time.monotonic() - self._put < self._every):
            return True
        self._put = time.monotonic()
        try:
            from kubernetes import client, config
            from kubernetes.client.exceptions import ApiException
        except ImportError as error:
            print(f"The progress is not mirrored to the RayJob: {error}", flush=True)
            return False
        try:
            if self._api is None:
                config.load_incluster_config()
                self._api = client.CustomObjectsApi()
            self._api.patch_namespaced_custom_object("ray.io", "v1", self._namespace, "rayjobs", self._name,
                                                     {"metadata": {"annotations": {ANNOTATION: text}}}, _request_timeout=5)
            self._text, self._failures = text, 0
            return True
        except ApiException as error:
            refused = error.status in (401, 403, 404)
            why = f"{error.status} {error.reason}"
        except Exception as error:  # the network, TLS, the configuration: never the run's problem
            refused, why = False, f"{type(error).__name__}: {error}"
        self._failures += 1
        if refused or self._failures == 3:
            print(f"The progress is not mirrored to RayJob {self._namespace}/{self._name}: {why}", flush=True)
            return False
        return True
