"""The training loop with a tiny engine: resume is exact, whatever ends the run."""

import json
import math
import threading

import numpy as np
import pytest

from tests.trainer import tiny
from trainer.checkpoint import store
from trainer.errors import UserError
from trainer.paths import RunPaths
from trainer.train import metrics
from trainer.train.stop import Preempted


@pytest.fixture
def settings(tmp_path):
    def make(**parts):
        config = tiny.config(tmp_path, **parts)
        if not RunPaths.of(config).dataset.exists():
            tiny.write_rows(RunPaths.of(config).dataset)
        return config
    return make


def test_loss_falls_and_everything_is_written(settings):
    config = settings()
    result = tiny.run(config)
    paths = RunPaths.of(config)
    records = metrics.read(paths.metrics)
    assert [r["step"] for r in records] == list(range(1, result["step"] + 1))
    assert records[-1]["loss"] < 0.75 * records[0]["loss"]
    assert {"step", "epoch", "loss", "lr", "grad_norm", "tokens", "rows", "tokens_per_second", "samples_per_second", "mfu", "seconds",
            "time"} <= records[0].keys()
    assert {"data", "forward_backward", "optimizer", "checkpoint"} == records[0]["seconds"].keys()
    assert sum(r["rows"] for r in records) == 240 and records[-1]["epoch"] == 2
    evaluated = [r for r in records if "eval_loss" in r]
    assert len(evaluated) == 2 and evaluated[-1]["step"] == result["step"]
    assert evaluated[-1]["perplexity"] == pytest.approx(math.exp(evaluated[-1]["eval_loss"]))
    progress = json.loads(paths.progress.read_text())
    assert progress["stage"] == "train" and progress["percent"] == 100 and progress["message"] == "all epochs are done"
    newest = store.newest(paths.checkpoints)
    assert newest.step == result["step"] and newest.eval_loss == pytest.approx(evaluated[-1]["eval_loss"])


def test_a_finished_run_does_nothing_more(settings):
    config = settings()
    first = tiny.run(config)
    again = tiny.run(config)
    assert again["resumed"] == again["step"] == first["step"] and again["curve"] == first["curve"]
    for name, weight in first["weights"].items():
        assert np.array_equal(weight, again["weights"][name])


@pytest.mark.parametrize("at", [1, 4, 11])
def test_sigterm_saves_and_the_next_start_continues_exactly(settings, at):
    undisturbed = tiny.run(settings(name="tiny-whole"))
    config = settings()
    with pytest.raises(Preempted, match=f"step {at}; its state is saved"):
        tiny.run(config, terminate_at=at)
    result = tiny.run(config)
    assert result["resumed"] == at
    assert result["curve"] == undisturbed["curve"]
    for name, weight in undisturbed["weights"].items():
        assert np.array_equal(weight, result["weights"][name])
    assert result["state"]["tokens"] == undisturbed["state"]["tokens"]


def test_metrics_after_the_resumed_step_are_replaced(settings):
    config = settings()
    with pytest.raises(Preempted):
        tiny.run(config, terminate_at=7)
    paths = RunPaths.of(config)
    lines = paths.metrics.read_text()
    paths.metrics.write_text(lines + json.dumps({**metrics.read(paths.metrics)[-1], "step": 8, "loss": 99.0}) + '\n{"step": 9, "lo')
    result = tiny.run(config)
    assert sorted(result["curve"]) == list(range(1, result["step"] + 1)) and result["curve"][8] != 99.0


def test_max_steps_ends_the_run(settings):
    config = settings(train={"max_steps": 5, "epochs": 3})
    result = tiny.run(config)
    assert result["step"] == 5 and result["state"]["finished"] == "the configured steps are done"
    assert metrics.read(RunPaths.of(config).metrics)[-1]["lr"] == 0.0


def test_stop_perplexity(settings):
    result = tiny.run(settings(train={"eval_every": 2, "stop_perplexity": 45.0, "epochs": 30}))
    assert "perplexity" in result["state"]["finished"] and result["state"]["metrics"]["perplexity"] <= 45 and result["step"] % 2 == 0


def test_early_stopping(settings):
    config = settings(train={"eval_every": 1, "early_stopping": 3, "epochs": 200, "learning_rate": 0.9, "schedule": "constant"})
    result = tiny.run(config)
    losses = [r["eval_loss"] for r in metrics.read(RunPaths.of(config).metrics)]
    assert "has not improved for 3" in result["state"]["finished"]
    assert min(losses) == losses[-4] and all(loss > losses[-4] for loss in losses[-3:])


def test_loss_that_is_not_a_number_stops_the_run_and_is_not_saved(settings):
    config = settings(checkpoint={"every_steps": 1})
    engine = tiny.TinyEngine(config.run.seed, 0, 1)

    def poison(step):
        if step == 6:
            next(engine.model.parameters()).data[:] = math.nan

    with pytest.raises(UserError, match=r"loss of step 7 is not a number\. Lower run.train.learning_rate"):
        tiny.run(config, engine=engine, at_step=poison)
    assert store.newest(RunPaths.of(config).checkpoints).step <= 6


def test_changed_data_is_refused(settings):
    config = settings()
    with pytest.raises(Preempted):
        tiny.run(config, terminate_at=4)
    tiny.write_rows(RunPaths.of(config).dataset, train=130)
    with pytest.raises(UserError, match="other data"):
        tiny.run(config)


def test_retention_keeps_the_last_and_the_best(settings):
    config = settings(train={"eval_every": 2, "epochs": 4}, checkpoint={"every_steps": 1, "keep_last": 2, "keep_best": 1})
    result = tiny.run(config, stop=threading.Event())
    paths = RunPaths.of(config)
    saved = store.whole(paths.checkpoints)
    assert len(saved) in (2, 3) and saved[-1].step == result["step"]
    best = store.best(paths.checkpoints)
    evaluated = {r["step"]: r["eval_loss"] for r in metrics.read(paths.metrics) if "eval_loss" in r}
    assert best.eval_loss == min(evaluated[s.step] for s in saved if s.step in evaluated)
    assert sorted(p.name for p in paths.checkpoints.iterdir()) == sorted(s.path.name for s in saved)
