"""Where a secret is found on the local cluster."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from tools.cluster import kubernetes
from tools.layout import Layout


def _objects(layout: Layout) -> str:
    """Every object but Secrets, as kubectl shows it."""
    kinds = subprocess.check_output([layout.kubectl, "api-resources", "--verbs=list", "-o", "name"], text=True,
                                    env={**os.environ, **layout.environment()}).split()
    asked = ",".join(kind for kind in kinds if kind != "secrets")
    return subprocess.check_output([layout.kubectl, "get", asked, "--all-namespaces", "-o", "yaml", "--ignore-not-found"], text=True,
                                   env={**os.environ, **layout.environment()})


def leaks(secret: str, layout: Layout, runs: list[Path]) -> list[str]:
    """Where a secret is found: objects of the cluster, logs of all pods, Ray's session logs, run directories, arguments of processes."""
    found = ["the cluster's objects"] if secret in _objects(layout) else []
    volumes = list(kubernetes.KUBELET.glob("pods/*/volumes/kubernetes.io~empty-dir"))
    assert volumes, "the pods' own folders, where Ray's session logs lie"
    for folder in (layout.state / "pod-logs", *volumes, *runs):
        done = subprocess.run(["grep", "-rlaF", "--exclude=*.safetensors", "--devices=skip", "-e", secret, folder], capture_output=True,
                              text=True, check=False)
        found += done.stdout.split()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if secret.encode() in path.read_bytes():
                found.append(str(path))
        except OSError:
            continue
    return found
