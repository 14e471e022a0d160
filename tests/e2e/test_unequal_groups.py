"""A real run over two worker groups of unequal size: CPUs, on a cluster of its own that ends with it, pods of two workers and of one.

The pods ask for GPUs that the node only claims to have; training uses none. The training dashboard's queries are answered during the run.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from kubernetes import client

from tests.e2e import promql, site
from tests.e2e.test_promotion import make_storage
from tools import environments

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
FOLDER = "groups"
"""Folder of the node's storage."""
STEPS = 4


@pytest.fixture
def storage(layout: Any) -> Iterator[Path]:
    folder = layout.storage / FOLDER
    make_storage(folder, layout.storage / "models")
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def claimed(api: client.ApiClient, settings: Any) -> Iterator[None]:
    """Three GPUs on the real node's status, as `kubectl patch --subresource=status` sets them; its kubelet takes pods that ask for them."""
    core = client.CoreV1Api(api)

    def claim(amount: str | None) -> None:
        core.patch_node_status(settings.name, {"status": {"capacity": {site.GPU: amount}, "allocatable": {site.GPU: amount}}})

    claim("3")
    yield
    claim(None)


def test_a_run_over_two_groups_of_unequal_size(api: client.ApiClient, kube_config: str, layout: Any, wait_for: site.Wait, storage: Path,
                                               claimed: None) -> None:
    """Three workers, two in a pod of the one group and one in a pod of the other, on a cluster of the run's own that ends with it."""
    release = site.Release(api, kube_config, "try-run")
    base = environments.load("local").values
    pod = {"memoryRequest": "512Mi", "cpuRequest": "20m", "shmSize": "512Mi", "objectStoreMemory": "128Mi", "scratch": {"kind": "none"}}
    over = {
        "global": {"images": site.images(api), "rayCluster": {"standing": False}, "gpu": {"available": True}},
        "nfs-provisioner": {"nodePath": {"path": f"{base['nfs-provisioner']['nodePath']['path']}/{FOLDER}"}},
        "ray-cluster": {"head": {"dashboard": None, "cpuRequest": "20m"}, "workerGroups": [
            {**pod, "name": "two", "cpus": 2, "gpus": 2, "memory": "9Gi"}, {**pod, "name": "one", "cpus": 1, "gpus": 1, "memory": "5Gi"}]},
        "finetune-job": {"resources": {"workers": 3}, "ttlSecondsAfterFinished": 5, "run": {
            "name": "groups", "train": {"max_steps": STEPS, "tokens_per_step": 768, "eval_every": 2, "eval_rows": 4},
            "evaluation": {"rows": 12, "generate_rows": 1, "max_new_tokens": 4, "samples": 1}}},
        "chatbot": None}
    scrapes: list[dict[str, Any]] = []
    try:
        release.install(environments.merge(base, over))

        def ended() -> dict[str, Any] | None:
            if not scrapes or time.time() - scrapes[-1]["time"] > 5:
                scrapes.extend(training_metrics(release))
            run = release.runs()[0].get("status", {})
            assert run.get("jobStatus") != "FAILED", run
            return run if run.get("jobStatus") == "SUCCEEDED" else None

        placed = wait_for(lambda: (w := release.workers("two") + release.workers("one")) and all(p.spec.node_name for p in w) and w, 120,
                          "both groups' pods")
        assert [int(p.spec.containers[0].resources.limits[site.GPU]) for p in placed] == [2, 1]
        wait_for(ended, 900, "the run")
        (run,) = (storage / "runs").iterdir()
        report = json.loads((run / "report.json").read_text())
        assert len(report["workers"]["ranks"]) == 3 and all(rank["tokens"] > 0 for rank in report["workers"]["ranks"])
        assert len(report["network"]) == 2, "two pods, which are nodes to Ray"
        assert report["train"]["steps"] == STEPS and report["tuned"]["loss"] < report["base"]["loss"]
        wait_for(lambda: not release.pods("ray.io/is-ray-node=yes"), 120, "the end of the run's own cluster")
        the_training_dashboard_shows_it(scrapes, run.name)
    finally:
        release.gone()


def training_metrics(release: site.Release) -> list[dict[str, Any]]:
    """What Prometheus would read from the Ray pods now, the trainer's gauges alone; nothing while there are none."""
    found = []
    for pod in release.pods("ray.io/is-ray-node=yes"):
        if pod.status.phase == "Running" and pod.status.pod_ip:
            try:
                scraped = promql.scrape(pod, 8080)
            except httpx.HTTPError:
                continue  # it starts or ends
            scraped["text"] = "".join(f"{line}\n" for line in scraped["text"].splitlines() if "ray_llm_finetune_" in line)
            if "ray_llm_finetune_step" in scraped["text"]:
                found.append(scraped)
    return found


def the_training_dashboard_shows_it(scrapes: list[dict[str, Any]], run: str) -> None:
    """The trainer's gauges live as long as training does, so they are read during the run; every query then has an answer of that run."""
    assert scrapes, "no scrape saw the training"
    answers = promql.evaluate(scrapes, [expression for _, expression in promql.queries("training", {"run": run})])
    told = {expression: {sample["labels"].get("run") for sample in samples} for expression, samples in answers.items()}
    print(f"{len(scrapes)} scrapes: {told}")
    assert not [expression for expression, runs in told.items() if runs != {run} and "mfu" not in expression]  # no peak is known of a CPU
