"""Runs whose number of workers changes: with fewer after a loss that lasts, with all again when there is room. Rows stay the same."""

from __future__ import annotations

import contextlib
import functools
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.train.v2._internal.execution.scaling_policy import NoopDecision, ResizeDecision
from ray.train.v2.api.config import ScalingConfig

from tests.trainer.test_launch import storage
from trainer import config as configuration
from trainer import launch, scaling, stages
from trainer.paths import RunPaths


class World:
    """A cluster and a clock on paper."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, least: int, most: int) -> None:
        self.now, self.nodes, self.free, self.asked = 1000.0, most, 0, 0
        monkeypatch.setattr(scaling, "living_nodes", lambda: [{"CPU": 1.0}] * self.nodes)
        monkeypatch.setattr(scaling, "free_nodes", lambda: [{"CPU": 1.0}] * self.free + [{"CPU": 0.5}])
        monkeypatch.setattr(scaling, "time", SimpleNamespace(monotonic=lambda: self.now))
        self.policy = scaling.Elastic(ScalingConfig(num_workers=(least, most), resources_per_worker={"CPU": 1}))

    def start(self) -> int:
        """Workers that the policy starts with now (0: it waits)."""
        decision = self.policy.make_decision_for_non_running_worker_group()
        return decision.num_workers if isinstance(decision, ResizeDecision) else 0

    def watch(self, workers: int, seconds: int) -> int:
        """How often running workers are asked to end within some seconds."""
        before, began = self.asked, self.now

        def execute_async(function: Callable[[], None]) -> None:
            assert function is scaling._ask_to_end
            self.asked += 1

        group = SimpleNamespace(num_workers=workers, start_time=began, workers=[SimpleNamespace(execute_async=execute_async)])
        for _ in range(seconds):
            self.now += 1
            assert isinstance(self.policy.make_decision_for_running_worker_group(group, None), NoopDecision)
        return self.asked - before


def test_starts_with_all_and_waits_a_while_for_those_that_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch, least=2, most=4)
    assert world.start() == 4
    world.nodes = 3
    assert world.start() == 0
    world.now += 59
    assert world.start() == 0
    world.now += 2
    assert world.start() == 3
    world.nodes = 2
    assert world.start() == 0, "the wait begins anew with each loss"
    world.nodes = 4
    assert world.start() == 4


def test_never_starts_with_fewer_than_the_least(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch, least=2, most=4)
    world.nodes = 1
    for _ in range(5):
        assert world.start() == 0
        world.now += 100


def test_running_workers_save_and_end_when_others_have_found_room(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch, least=1, most=3)
    assert world.watch(2, 300) == 0
    world.free = 1
    assert world.watch(2, 59) == 0
    assert world.watch(2, 61) == 1
    assert world.watch(3, 300) == 0, "there are as many as wanted"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_goes_on_with_one_worker_and_with_two_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray._private.state import actors
    from ray.cluster_utils import Cluster

    document = json.loads(storage(tmp_path).read_text())
    document["run"]["train"] |= {"epochs": 300, "eval_every": 10**6}
    document["resources"] = {"workers": 2, "min_workers": 1, "cpus_per_worker": 1}
    config = configuration.parse({**document, "id": "faults-elastic"})
    stages.prepare(config)
    paths = RunPaths.of(config)
    monkeypatch.setattr(launch, "ScalingConfig", functools.partial(ScalingConfig, elastic_resize_monitor_interval_s=10.0))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(stages.root()))
    cluster = Cluster(initialize_head=True,
                      head_node_args={"num_cpus": 0, "include_dashboard": False, "object_store_memory": 80 << 20})
    ray.init(address=cluster.address, log_to_driver=True)  # on the head, which stays
    nodes = [cluster.add_node(num_cpus=1, object_store_memory=80 << 20) for _ in range(2)]
    def lines() -> list[dict[str, Any]]:
        text = paths.metrics.read_text() if paths.metrics.exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def steps_by(count: int) -> int:
        """Steps at the end of the run so far that this number of workers did."""
        told = [each["workers"] for each in lines() if "workers" in each]
        done = 0
        while told and len(told[-1]["ranks"]) == count:
            done += told.pop()["steps"]
        return done

    def wait(count: int) -> None:
        deadline = time.monotonic() + 240
        while steps_by(count) < 25:
            if time.monotonic() > deadline:
                raise AssertionError(f"{count} workers did not train: {lines()[-1:]}")
            time.sleep(0.5)

    def train() -> None:
        with contextlib.suppress(Exception):  # the cluster is taken away in the end: the run has no end of its own
            launch.single(config, "train")

    hand = threading.Thread(target=train, daemon=True)  # nodes are added by the main thread: they take over signals
    hand.start()
    try:
        wait(2)
        controllers = {a["Address"]["NodeID"] for a in actors().values() if "TrainController" in a["ActorClassName"]}
        cluster.remove_node(next(n for n in nodes if n.node_id not in controllers), allow_graceful=False)
        wait(1)
        cluster.add_node(num_cpus=1, object_store_memory=80 << 20)
        wait(2)
    finally:
        ray.shutdown()
        cluster.shutdown()
        hand.join(60)
    found = lines()
    assert [line["step"] for line in found] == list(range(1, len(found) + 1))
    worlds = [len(line["workers"]["ranks"]) for line in found if "workers" in line]
    assert [a for a, b in zip(worlds, [0, *worlds], strict=False) if a != b] == [2, 1, 2]
    rows = json.loads((paths.dataset / "manifest.json").read_text())["splits"]["train"]["rows"]
    dealt = 0
    for line in found:
        dealt += line["rows"]
        assert line["epoch"] * rows == pytest.approx(dealt, abs=0.01), f"step {line['step']}: a row was left out or trained on twice"
