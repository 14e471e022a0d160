"""Unequal ranks through the training loop: tokens are dealt anew when a rank slows down, and the run trains as one rank would.

All rows are of one length, which divides every budget, so that a step holds the same rows however they are dealt. Ranks are slowed by
sleeping in each decoder layer, in proportion to its tokens.
"""

from __future__ import annotations

import json
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.trainer.engine_cases import CPU, VOCABULARY, make_config
from tests.trainer.ranks import Ranks

ROW, ROWS_A_STEP, STEPS, SLOW_FROM, STOP_AT = 16, 64, 36, 6, 28
TOLERANCE = 5e-5
"""As in test_golden_curves.py: sums in another order."""
pytestmark = pytest.mark.timeout(600)


def write_rows(directory: Path) -> None:
    from trainer.data.shards import write_shard

    generator = np.random.default_rng(7)
    directory.mkdir(parents=True)
    for split, count in (("train", ROWS_A_STEP * STEPS), ("test", 8)):
        rows = []
        for _ in range(count):
            row = [int(generator.integers(VOCABULARY))]
            while len(row) < ROW:
                row.append((row[-1] * 5 + 7) % VOCABULARY if generator.random() < 0.9 else int(generator.integers(VOCABULARY)))
            rows.append(np.array(row, dtype=np.int32))
        write_shard(directory / f"{split}-00000.safetensors", rows, [int(generator.integers(1, ROW)) for _ in rows], 0, ROW)


def case(rank: int, world: int, storage: str, pace: list[float], stop_at: int = 0, **config: Any) -> dict[str, Any]:
    """Train on one rank of `world`. `pace`: microseconds a token and layer of each rank from step SLOW_FROM on, `pace[0]` before."""
    from dataclasses import replace

    from trainer.checkpoint.saver import Checkpointer, restore
    from trainer.data.loader import evaluation_batches
    from trainer.data.shards import TokenShards
    from trainer.engines import make_engine
    from trainer.engines.layers import decoder_layers
    from trainer.paths import RunPaths
    from trainer.train import balance
    from trainer.train.loop import Training
    from trainer.train.metrics import Recorder, read
    from trainer.train.ranks import Ranks as Agreements
    from trainer.train.stop import Preempted

    settings = replace(make_config(train={"tokens_per_step": ROW * ROWS_A_STEP, "micro_batch_tokens": ROW * ROWS_A_STEP,
                                          "learning_rate": 3e-3, "eval_every": 20}, data={"max_tokens": ROW}, **config), storage=storage)
    paths, agreements, stop = RunPaths.of(settings), Agreements(timeout_s=60), threading.Event()
    engine = make_engine(settings, CPU, rank, world, VOCABULARY)
    training: Training

    def slowed(forward: Any, hidden: Any, *args: Any, **keywords: Any) -> Any:
        time.sleep(pace[rank if training.step > SLOW_FROM else 0] * 1e-6 * hidden.shape[1])
        return forward(hidden, *args, **keywords)

    for layer in decoder_layers(engine.model):
        layer.forward = partial(slowed, layer.forward)  # type: ignore[method-assign]
    checkpointer = Checkpointer(paths.checkpoints, settings.run.checkpoint, "digest", engine)
    saved = restore(paths.checkpoints, "digest", engine, agreements)
    groups = [group for group, in agreements.gather([engine.lockstep_group])]
    deal = partial(balance.budgets_by_speed, settings, on_gpu=False, groups=groups)
    budgets = saved["budgets"] if saved else deal([1.0] * world)
    rebalance = balance.Rebalance(deal, budgets, balance.CPU) if world > 1 else None
    held_out = evaluation_batches(TokenShards(paths.dataset, "test"), range(8), [max(b) for b in budgets], rank)
    recorder = Recorder(paths, settings.run_id, saved["step"] if saved else 0, gauges=False, board=False) if rank == 0 else None
    training = Training(settings, engine, agreements, checkpointer, TokenShards(paths.dataset, "train"), held_out, budgets,
                        rebalance=rebalance, recorder=recorder, stop=stop)
    training.resume(saved)
    if stop_at:
        update = engine.step

        def step(rate: float) -> Any:
            if training.step == stop_at:
                stop.set()
            return update(rate)

        engine.step = step  # type: ignore[method-assign]
    try:
        training.run()
    except Preempted:
        pass
    finally:
        if recorder is not None:
            recorder.close()
        engine.close()
    return {"start": [list(b) for b in budgets], "end": [list(b) for b in training.budgets], "step": training.step,
            "lines": read(paths.metrics) if rank == 0 else []}


@pytest.mark.parametrize(("name", "config"), [("fsdp", {}), ("zero3", {"engine": "deepspeed"}), ("lora", {"method": "lora"})])
def test_a_rank_that_slows_down_gets_fewer_tokens_and_nothing_else_changes(ranks: Ranks, tmp_path: Path, name: str,
                                                                           config: dict[str, Any]) -> None:
    for world in (1, 2):
        write_rows(tmp_path / str(world) / "runs" / "golden" / "dataset")
    alone = ranks.run(1, f"{__name__}:case", {"storage": str(tmp_path / "1"), "pace": [0.0], **config})[0]
    both = {"storage": str(tmp_path / "2"), "pace": [30.0, 90.0], **config}
    first = ranks.run(2, f"{__name__}:case", {**both, "stop_at": STOP_AT})[0]
    then = ranks.run(2, f"{__name__}:case", both)[0]

    assert first["step"] == STOP_AT and first["start"] == [[512], [512]]
    (fast,), (slow,) = first["end"]
    # A third, less what else a step takes; a machine that is busy with other things slows both.
    assert fast + slow == ROW * ROWS_A_STEP and 0.1 < slow / fast < 0.8, "dealt by speed"
    assert then["start"] == first["end"], "a run that goes on keeps its budgets"
    assert then["step"] == alone["step"] == STEPS
    for mine, truth in zip(then["lines"], alone["lines"], strict=True):
        assert mine["rows"] == truth["rows"] == ROWS_A_STEP
        values = {key: truth[key] for key in ("loss", "grad_norm", "eval_loss") if key in truth}
        assert {key: mine.get(key) for key in values} == pytest.approx(values, rel=TOLERANCE), mine["step"]
    assert truth["loss"] < alone["lines"][0]["loss"] - 0.3

    told = [line["workers"] for line in then["lines"] if "workers" in line]
    assert sum(worker["tokens"] for each in told for worker in each["ranks"]) >= ROW * ROWS_A_STEP * (STEPS - 1), json.dumps(told)
    unequal = next(each for each in told if each["steps"] == 5 and each["ranks"][0]["wait"] > each["ranks"][1]["wait"])
    assert unequal["ranks"][0]["compute"] + unequal["ranks"][0]["wait"] == pytest.approx(
        unequal["ranks"][1]["compute"] + unequal["ranks"][1]["wait"], abs=1e-4)
    waited = [each["ranks"][0]["wait"] / each["seconds"] for each in told]
    assert min(waited[waited.index(max(waited)):]) < 0.6 * max(waited), "the fast rank waits until the tokens are dealt anew"
