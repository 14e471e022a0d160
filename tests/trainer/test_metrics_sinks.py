"""What the loop records, read back from TensorBoard's event files and Ray's Prometheus gauges."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import ray.util.metrics
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from trainer.paths import RunPaths
from trainer.train.metrics import Gauges, Recorder


def line(step: int, **more: Any) -> dict[str, Any]:
    return {"step": step, "epoch": step / 10, "loss": 2.0 / step, "lr": 1e-4, "grad_norm": 0.5, "tokens": 64, "rows": 4,
            "tokens_per_second": 100.0 + step, "samples_per_second": 6.0, "mfu": None, "time": 1000.0 + step,
            "seconds": {"data": 0.1, "forward_backward": 0.5, "checkpoint": 0.0, "optimizer": 0.2}, **more}


def board(paths: RunPaths) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(paths.tensorboard))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_event_files_hold_every_value_and_a_resumed_run_replaces_what_it_does_again(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    recorder = Recorder(paths, "run", 0, gauges=False)
    for step in (1, 2, 3):
        recorder.record(line(step, **({"eval_loss": 1.5, "perplexity": math.exp(1.5)} if step == 2 else {})))
    recorder.close()
    found = board(paths)
    assert found["train/loss"] == [(1, 2.0), (2, 1.0), (3, pytest.approx(2 / 3))]
    assert found["train/eval_loss"] == [(2, 1.5)] and found["train/perplexity"] == [(2, pytest.approx(math.exp(1.5)))]
    assert {f"train/{name}" for name in ("lr", "grad_norm", "tokens_per_second", "samples_per_second", "epoch")} <= found.keys()
    assert [value for _, value in found["seconds/forward_backward"]] == [0.5] * 3 and "train/mfu" not in found

    again = Recorder(paths, "run", 2, gauges=False)
    again.record(line(3, loss=0.25))
    again.close()
    assert board(paths)["train/loss"] == [(1, 2.0), (2, 1.0), (3, 0.25)]


def test_gauges_hold_the_newest_values_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    held: dict[tuple[str, str], float] = {}

    class Gauge:
        """Ray's, without a cluster."""

        def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
            assert description and tag_keys == ("run",)
            self.name = name

        def set_default_tags(self, tags: dict[str, str]) -> None:
            self.run = tags["run"]

        def set(self, value: float) -> None:
            held[self.name, self.run] = value

    monkeypatch.setattr(ray.util.metrics, "Gauge", Gauge)
    gauges = Gauges("run-1")
    gauges.set(line(1, eval_loss=1.5, mfu=0.5))
    gauges.set(line(2, loss=float("nan")))
    assert {name.removeprefix("llm_finetune_"): value for (name, run), value in held.items() if run == "run-1"} == {
        "step": 2, "epoch": 0.2, "loss": 2.0, "eval_loss": 1.5, "learning_rate": 1e-4, "grad_norm": 0.5, "tokens_per_second": 102.0,
        "mfu": 0.5}
