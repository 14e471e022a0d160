"""What a run survives: each fault at a seeded random moment of a real run on the local cluster (`make chaos`, TRIES=10).

Every try is a run of its own: only the licence's text differs between them, which changes the run's hash and nothing of its result. So each
must end with the loss of the undisturbed run, bit for bit, with at most one checkpoint interval done again.
"""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes import client

from tools.cluster import status

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
TRIES = int(os.environ.get("TRIES", "1"))
STEPS, EVERY = 6, 2
"""Optimizer steps of a run, and between two checkpoints."""
SMALL = {"train": {"max_steps": STEPS, "eval_rows": 4}, "checkpoint": {"every_steps": EVERY, "keep_last": 2},
         "evaluation": {"generate_rows": 1, "max_new_tokens": 4, "samples": 1}}


class Cluster:
    """The objects of the local environment that faults are done to."""

    def __init__(self, api: client.ApiClient, namespace: str) -> None:
        self.core, self.custom, self.namespace = client.CoreV1Api(api), client.CustomObjectsApi(api), namespace

    def pods(self, selector: str) -> list[str]:
        found: list[Any] = self.core.list_namespaced_pod(self.namespace, label_selector=selector).items
        return sorted(p.metadata.name for p in found if p.status.phase == "Running" and not p.metadata.deletion_timestamp)

    def kill_pod(self, selector: str, chosen: random.Random, grace: int) -> str:
        name = chosen.choice(self.pods(selector))
        self.core.delete_namespaced_pod(name, self.namespace, grace_period_seconds=grace)
        return name


def kill_worker(cluster: Cluster, chosen: random.Random, run: str) -> str:
    return cluster.kill_pod("ray.io/node-type=worker", chosen, 0)


def drain_worker(cluster: Cluster, chosen: random.Random, run: str) -> str:
    return cluster.kill_pod("ray.io/node-type=worker", chosen, 60)


def kill_head(cluster: Cluster, chosen: random.Random, run: str) -> str:
    return cluster.kill_pod("ray.io/node-type=head", chosen, 0)


def kill_submitter(cluster: Cluster, chosen: random.Random, run: str) -> str:
    return cluster.kill_pod(f"job-name={run}", chosen, 0)


def kill_operator(cluster: Cluster, chosen: random.Random, run: str) -> str:
    return cluster.kill_pod("app.kubernetes.io/name=kuberay-operator", chosen, 0)


def delete_cluster(cluster: Cluster, chosen: random.Random, run: str) -> str:
    items: Any = cluster.custom.list_namespaced_custom_object(*status.RAY, cluster.namespace, "rayclusters")["items"]
    name = items[0]["metadata"]["name"]
    cluster.custom.delete_namespaced_custom_object(*status.RAY, cluster.namespace, "rayclusters", name)
    return str(name)


def kill_training_process(cluster: Cluster, chosen: random.Random, run: str) -> str:
    """As the kernel does when memory is short: one process of a worker, the pod stays."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if path.read_bytes().startswith(b"ray::RayTrainWorker"):
                found.append(int(path.parent.name))
        except OSError:
            continue
    pid = chosen.choice(sorted(found))
    os.kill(pid, 9)
    return f"process {pid}"


FAULTS: dict[str, Callable[[Cluster, random.Random, str], str]] = {
    "worker pod killed": kill_worker, "worker pod drained (SIGTERM)": drain_worker, "training process killed": kill_training_process,
    "submitter pod killed": kill_submitter, "operator pod killed": kill_operator, "head pod killed": kill_head,
    "RayCluster deleted": delete_cluster}


@pytest.fixture
def start(checkout: Path, push: Callable[[Path, str], None], environment: Any, wait_for: Any) -> Callable[[str], str]:
    """Push the small run under a name of its own kind; returns its id when its RayJob is there."""
    def begin(label: str) -> str:
        path = checkout / "environments/local/finetune.yaml"
        document = yaml.safe_load(path.read_text())
        run = document["finetune-job"]["run"]
        for part, values in SMALL.items():
            run.setdefault(part, {}).update(values)
        run["model"]["licence"] = label
        path.write_text(yaml.safe_dump(document, sort_keys=False))
        before = environment().run.name
        push(checkout, label)
        return str(wait_for(lambda: (r := environment().run) and r.name != before and r.name, 180, "the new RayJob"))
    return begin


def steps(folder: Path) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []


def ended(environment: Any) -> bool:
    state = environment()
    if state.failure:
        pytest.fail(state.failure)
    return bool(state.run_ended)


@pytest.fixture(scope="module")
def undisturbed() -> list[dict[str, Any]]:
    """Metrics of the undisturbed run, which the first test fills in for the others."""
    return []


def test_undisturbed(start, environment, wait_for, layout, undisturbed):
    run = start(f"undisturbed {time.time():.0f}")
    wait_for(lambda: ended(environment), 900, "the undisturbed run")
    undisturbed.extend(steps(layout.storage / "runs" / run))
    assert [line["step"] for line in undisturbed] == list(range(1, STEPS + 1))


@pytest.mark.parametrize("attempt", range(TRIES))
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_changes_nothing(fault, attempt, start, environment, wait_for, layout, api, namespace, undisturbed):
    assert undisturbed, "the undisturbed run must be there to compare with"
    chosen = random.Random(f"{fault} {attempt}")
    cluster = Cluster(api, namespace)
    run = start(f"{fault} {attempt} {time.time():.0f}")
    folder = layout.storage / "runs" / run
    moment = chosen.randrange(1, STEPS)
    wait_for(lambda: len(steps(folder)) >= moment, 600, f"step {moment}")
    time.sleep(chosen.uniform(0, 8))
    hit, began = len(steps(folder)), time.monotonic()
    whole = max((int(p.name.split("-")[1]) for p in (folder / "checkpoints").glob("step-*")), default=0)
    what = FAULTS[fault](cluster, chosen, run)
    print(f"{fault}: {what} after step {hit}, checkpoint of step {whole}", flush=True)
    recovered = 0.0

    def done() -> bool:
        nonlocal recovered
        if not recovered and len(steps(folder)) > hit:
            recovered = time.monotonic() - began
        return ended(environment)

    wait_for(done, 1000, "the end of the run")
    lines = steps(folder)
    jobs: Any = client.CustomObjectsApi(api).list_namespaced_custom_object(*status.RAY, namespace, "rayjobs")["items"]
    record = {"fault": fault, "attempt": attempt, "after_step": hit, "checkpoint": whole, "recovery_seconds": round(recovered, 1),
              "seconds": round(time.monotonic() - began, 1), "repeated_steps": hit - whole,
              "loss_equal": lines[-1]["loss"] == undisturbed[-1]["loss"]}
    print(json.dumps(record), flush=True)
    if out := os.environ.get("FAULTS_OUT"):
        with open(out, "a") as file:
            file.write(json.dumps(record) + "\n")
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert [line["loss"] for line in lines] == [line["loss"] for line in undisturbed], "the same losses as undisturbed"
    assert hit - whole <= EVERY + 1, "at most one checkpoint interval (and the step under way) is repeated"
    assert sum(job["metadata"]["name"] == run for job in jobs) == 1

