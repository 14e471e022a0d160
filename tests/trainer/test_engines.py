"""What engines promise beyond the loss curve: evaluation, uneven ranks, hybrid sharding, checkpointing, no damage by a bad step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainer.engine_cases import CPU, make_config
from tests.trainer.ranks import Ranks
from tests.trainer.test_golden_curves import ENGINES, TOLERANCE, flat, golden
from trainer.engines import make_engine
from trainer.engines.optimizer import decays
from trainer.errors import UserError

pytestmark = pytest.mark.timeout(900)  # many runs in one world: the first test of a module waits for all
CASES = "tests.trainer.engine_cases"


@pytest.fixture(scope="module")
def two(ranks: Ranks, toy_rows: Path) -> list[dict[str, Any]]:
    """Everything that two ranks show, in one world."""
    data = {"data": str(toy_rows)}
    calls: dict[str, Any] = {f"evaluate-{name}": ("evaluations", {**data, **engine}) for name, engine in ENGINES.items()}
    calls["evaluate-lora"] = ("evaluations", {**data, "method": "lora"})
    calls["uneven"] = ("uneven", {**data, "method": "lora", "micro": [1, 3]})
    for stage in (1, 2, 3):
        calls |= {f"collectives-{stage}-{micro}": ("collectives", {**data, "stage": stage, "micro": micro}) for micro in (1, 3)}
    calls["sharded-adapters"] = ("sharded_adapters", {**data, "method": "lora"})
    calls["hybrid"] = ("hybrid", {**data, "node": 1})
    calls["hybrid-uneven"] = ("hybrid", {**data, "node": 1, "micro": [1, 3]})
    for mode in ("selective", "full"):
        for name in ("fsdp3", "zero3"):
            engine = {"kind": ENGINES[name]["engine"], "zero_stage": ENGINES[name]["stage"], "checkpointing": mode}
            calls[f"{mode}-{name}"] = ("curve", {**data, "engine": engine})
    calls["nan-fsdp"] = ("not_a_number", data)
    calls["nan-lora"] = ("not_a_number", {**data, "method": "lora"})
    calls["offload-zero3"] = ("curve", {**data, "engine": {"kind": "deepspeed", "zero_stage": 3, "offload": "cpu"}})
    calls["offload-zero2"] = ("curve", {**data, "engine": {"kind": "deepspeed", "zero_stage": 2, "offload": "cpu"}})
    return ranks.run(2, f"{CASES}:many", {"calls": calls})


@pytest.mark.parametrize("engine", [*ENGINES, "lora"])
def test_evaluation_is_the_training_loss_and_changes_nothing(engine: str, two: list[dict[str, Any]]) -> None:
    results = [of_rank[f"evaluate-{engine}"] for of_rank in two]
    for result in results:
        assert result["first"] == result["again"]
        assert result["after"][0] < result["first"][0] and result["after"][1] == result["first"][1]
    loss = sum(r["first"][0] for r in results) / sum(r["first"][1] for r in results)
    assert loss == pytest.approx(results[0]["trained"][0][0], rel=1e-5)
    assert flat(results[0]["trained"]) == pytest.approx(flat(golden("lora" if engine == "lora" else "full")[:1]), rel=TOLERANCE)


@pytest.mark.parametrize("name", ["uneven", "sharded-adapters"])
def test_adapters(name: str, two: list[dict[str, Any]]) -> None:
    """Ranks may hold other numbers of micro-batches; frozen weights may be sharded."""
    assert flat(two[0][name]) == pytest.approx(flat(golden("lora")), rel=TOLERANCE)


def test_what_a_step_of_several_micro_batches_repeats(two: list[dict[str, Any]]) -> None:
    """Stage 3 gathers and reduces for each, stage 2 gathers once, stage 1 does both once."""
    def counts(stage: int, micro: int) -> tuple[int, int]:
        seen = two[0][f"collectives-{stage}-{micro}"]
        return seen["all_gather_into_tensor"], seen["reduce_scatter_tensor"]

    gathers, groups = counts(3, 1)
    assert groups >= 4 and gathers > groups  # two layers, embedding and head; the layers are gathered twice
    assert counts(3, 3) == (3 * gathers + 1, 3 * groups)  # and one in vain (trainer/engines/fsdp.py)
    assert counts(2, 1) == (groups, groups) and counts(2, 3) == (groups + 1, 3 * groups)
    assert counts(1, 1) == counts(1, 3) == (groups, groups)


@pytest.mark.parametrize("name", ["hybrid", "hybrid-uneven"])
def test_hybrid_sharding(name: str, two: list[dict[str, Any]]) -> None:
    """Two nodes of one rank: each holds all, the first writes all; nodes may hold other numbers of micro-batches."""
    assert flat(two[0][name]["curve"]) == pytest.approx(flat(golden("full")), rel=TOLERANCE)
    held = [of_rank[name]["held"] for of_rank in two]
    assert held[0] == held[1] == two[0][name]["written"] and two[1][name]["written"] == 0


@pytest.mark.parametrize("name", ["selective-fsdp3", "selective-zero3", "full-fsdp3", "full-zero3", "offload-zero3", "offload-zero2"])
def test_checkpointing_and_offload_do_not_change_the_curve(name: str, two: list[dict[str, Any]]) -> None:
    assert flat(two[0][name]) == pytest.approx(flat(golden("full")), rel=TOLERANCE)


@pytest.mark.parametrize("name", ["nan-fsdp", "nan-lora"])
def test_a_gradient_that_is_not_a_number_changes_nothing(name: str, two: list[dict[str, Any]]) -> None:
    for of_rank in two:
        assert of_rank[name]["norm"] != of_rank[name]["norm"], "the norm says so"
        assert of_rank[name]["kept"] and of_rank[name]["trains"]


def test_qlora_needs_a_gpu() -> None:
    with pytest.raises(UserError, match="'qlora' needs GPUs"):
        make_engine(make_config(method="qlora"), CPU, 0, 1)


def test_decay_is_for_matrices() -> None:
    assert decays("model.layers.0.mlp.up_proj.weight", (4, 4)) and decays("lm_head.weight", (4, 4))
    assert not decays("model.norm.weight", (4,)) and not decays("model.embed_tokens.weight", (4, 4))


def test_bfloat16_keeps_float32_masters(toy_rows: Path) -> None:
    """Many small updates add up, though one is less than bfloat16 resolves."""
    from tests.trainer.engine_cases import batches_of
    from trainer.data.shards import TokenShards

    engine = make_engine(make_config(model={"dtype": "bfloat16"}), CPU, 0, 1)
    start = {p.name: p.tensor.clone() for p in engine.pieces()}
    name, weight = "weights/model.norm.weight", engine.model.model.norm.weight  # type: ignore[union-attr]
    assert weight.dtype == torch.bfloat16 and start[name].dtype == torch.float32
    batches, loss_tokens = batches_of(TokenShards(toy_rows, "train"), 0, 0, 1)
    for _ in range(4):
        engine.forward_backward(batches, loss_tokens)
        engine.step(1e-3)
    now = {p.name: p.tensor for p in engine.pieces()}
    assert torch.equal(weight, now[name].bfloat16()), "the computing weights follow the masters"
    assert (now[name] - start[name]).abs().max() < 2**-7 and not torch.equal(now[name], start[name])
