"""`make site-check` on the local cluster: measured, judged, drawn, and nothing of it left, also when it is interrupted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from kubernetes import client

from tools.layout import REPOSITORY, Layout

COMMAND = [sys.executable, "-m", "tools", "site-check", "local", "--megabytes", "64", "--seconds", "1"]


def environment(layout: Layout) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(REPOSITORY), "PATH": f"{layout.bin}:{os.environ['PATH']}"}


def left(api: client.ApiClient, namespace: str) -> list[str]:
    """Objects of site checks in the namespace."""
    label = {"label_selector": "app.kubernetes.io/name=site-check"}
    core, batch, policies = client.CoreV1Api(api), client.BatchV1Api(api), client.NetworkingV1Api(api)
    found: list[Any] = [*batch.list_namespaced_job(namespace, **label).items, *core.list_namespaced_pod(namespace, **label).items,
                        *core.list_namespaced_config_map(namespace, **label).items,
                        *policies.list_namespaced_network_policy(namespace, **label).items]
    return [f"{type(o).__name__} {o.metadata.name}" for o in found]


@pytest.mark.timeout(300)
def test_the_local_site_is_checked(api: client.ApiClient, namespace: str, layout: Layout, tmp_path: Path) -> None:
    done = subprocess.run([*COMMAND, "--out", str(tmp_path)], cwd=REPOSITORY, env=environment(layout), capture_output=True, text=True,
                          check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "site-check.json").read_text())
    assert [p["running"] for p in found["pods"]] == [True, True] and found["one_node"]
    assert len(found["network"]) == 2 and all(p["gbps"] > 0.1 for p in found["network"])
    assert all(p["storage"]["read_whole"] and p["storage"]["write_mb_s"] > 1 for p in found["pods"])
    tried = found["storage"]["locks"][1]
    assert tried["lock_refused"] and tried["flock_refused"] and tried["released"]
    assert [c["backend"] for c in found["collectives"]] == ["gloo"] and found["collectives"][0]["gbps"] > 0
    assert found["plan"]["run"] == "smollm2-pubmedqa" and found["plan"]["workers"] == 2
    assert not [f for f in found["findings"] if f["level"] == "stop"]
    assert "<svg" in (tmp_path / "site-check.html").read_text()
    assert left(api, namespace) == [] and not (layout.storage / ".site-check").exists()


@pytest.mark.timeout(180)
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_check_leaves_nothing(api: client.ApiClient, namespace: str, layout: Layout, tmp_path: Path,
                                             signum: signal.Signals) -> None:
    process = subprocess.Popen([*COMMAND, "--out", str(tmp_path)], cwd=REPOSITORY, env=environment(layout), stdout=subprocess.PIPE,
                               text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if "storage from" in line:
            break
    assert len(left(api, namespace)) == 6, "two Jobs, their pods, a ConfigMap, a NetworkPolicy"
    process.send_signal(signum)
    process.communicate(timeout=120)
    assert process.returncode == 130
    until = time.monotonic() + 30
    while left(api, namespace) and time.monotonic() < until:
        time.sleep(1)
    assert left(api, namespace) == [] and not (layout.storage / ".site-check").exists()
