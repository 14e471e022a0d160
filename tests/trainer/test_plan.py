"""Plan: shapes, monotony, what fits, advice, groups, text."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from trainer import config
from trainer.errors import ConfigError
from trainer.plan import DatasetFacts, choose_checkpointing, plan, render
from trainer.plan.architectures import KNOWN, Architecture, by_name, of_config
from trainer.plan.hardware import GIB, GPUS, find
from trainer.plan.memory import memory_of, state_bytes
from trainer.plan.network import traffic_of
from trainer.plan.planner import smallest
from trainer.plan.workload import groups_of, workload_of

REVISION = "0" * 40
MIXED = {"workers": 16, "node_workers": 4, "network_gbps": 100,
         "groups": [{"name": "a100", "gpu": "A100-80GB", "workers": 12}, {"name": "h100", "gpu": "H100-80GB", "workers": 4}]}


def make(resources: dict[str, Any], model: str = "meta-llama/Llama-2-7b-hf", storage: str = "/storage", **run: Any) -> config.Config:
    run = {"name": "test", "model": {"name": model, "revision": REVISION}, "data": {"sample": True}, **run}
    return config.parse({"run": run, "resources": {"gpus_per_worker": 1, **resources}, "storage": storage})


H100X4 = {"workers": 4, "gpu": "H100-80GB"}


@pytest.mark.parametrize(("name", "billions"), [
    ("meta-llama/Llama-2-7b-chat-hf", 6.738), ("meta-llama/Llama-2-13b-hf", 13.016), ("meta-llama/Llama-2-70b-hf", 68.977),
    ("meta-llama/Llama-3.1-8B-Instruct", 8.030), ("meta-llama/Meta-Llama-3-8B", 8.030), ("meta-llama/Llama-3.3-70B-Instruct", 70.554),
    ("meta-llama/Llama-3.2-1B", 1.236), ("meta-llama/Llama-3.2-3B-Instruct", 3.213), ("HuggingFaceTB/SmolLM2-135M-Instruct", 0.1345)])
def test_published_sizes(name: str, billions: float) -> None:
    shape = by_name(name)
    assert shape is not None
    assert shape.parameters / 1e9 == pytest.approx(billions, abs=0.001)


def test_shape_from_the_storage(tmp_path: Path) -> None:
    """A model directory's config.json comes first; a missing one is known by its name, or refused with what to do."""
    directory = tmp_path / "models" / "mine"
    directory.mkdir(parents=True)
    made = make({}, storage=str(tmp_path), model="x/y")
    mine = replace(made, run=replace(made.run, model=config.ModelConfig(path="models/mine")))
    with pytest.raises(ConfigError, match="shape is not known"):
        of_config(mine)
    document = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128,
                "vocab_size": 512}
    (directory / "config.json").write_text(json.dumps(document))
    assert of_config(mine) == ("mine", Architecture(64, 2, 4, 4, 16, 128, 512))
    (directory / "config.json").write_text(json.dumps({**document, "model_type": "mistral"}))
    with pytest.raises(ConfigError, match="mistral"):
        of_config(mine)


def test_unknown_gpu_names_the_field_and_the_known() -> None:
    with pytest.raises(ConfigError, match=r"resources\.gpu: 'V100'.*H100-80GB"):
        plan(make({"gpu": "V100"}))
    assert find("nvidia-h100-80gb-hbm3") is GPUS["H100-80GB"]
    assert find("NVIDIA H100 80GB HBM3") is GPUS["H100-80GB"]
    with pytest.raises(ConfigError, match="has no FP8"):
        plan(make({"gpu": "A100-80GB", "workers": 8}, engine={"float8": "rowwise"}))


def test_groups_must_add_up() -> None:
    with pytest.raises(ConfigError, match=r"add up to resources\.workers"):
        make({**MIXED, "workers": 12})
    with pytest.raises(ConfigError, match="name of its own"):
        make({"workers": 2, "groups": [{"name": "a"}, {"name": "a"}]})
    with pytest.raises(ConfigError, match="same number of workers"):
        plan(make({**MIXED, "node_workers": 8}, engine={"shard_group": "node"}))


def test_auto_takes_the_least_checkpointing_that_fits() -> None:
    result = plan(make(H100X4))
    load, memory = result.groups[0].load, result.groups[0].group.memory
    assert result.fits and load.checkpointing == "selective"
    assert memory_of(load.with_checkpointing("selective", load.budget + 0.1), memory).total > memory
    mode, budget = choose_checkpointing(make(H100X4), memory, KNOWN["Llama-2-7b"])
    assert (mode, budget) == (load.checkpointing, load.budget)
    assert choose_checkpointing(make(H100X4), 400 * GIB, KNOWN["Llama-2-7b"]) == ("none", 1.0)
    assert choose_checkpointing(make(H100X4), 10 * GIB, KNOWN["Llama-2-7b"]) == ("full", 0.0)
    assert choose_checkpointing(make(H100X4), 0, KNOWN["Llama-2-7b"]) == ("none", 1.0)
    assert choose_checkpointing(make(H100X4, engine={"checkpointing": "full"}), 400 * GIB, {}) == ("full", 0.6)
    fields = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 11008, "vocab_size": 32000}
    assert choose_checkpointing(make(H100X4), memory, fields) == (mode, budget)


def test_more_sharding_and_recomputation_need_less() -> None:
    made = make({"workers": 8, "gpu": "H100-80GB"})
    group, shape = groups_of(made)[0], KNOWN["Llama-2-13b"]
    base = workload_of(made, shape, group, 8192, 1)
    totals = [memory_of(base.with_checkpointing(m, b)).total for m, b in
              (("none", 1.0), ("selective", 0.8), ("selective", 0.4), ("selective", 0.1), ("full", 0.0))]
    assert totals == sorted(totals, reverse=True)
    assert all(memory_of(replace(base, shards=2 * s)).total < memory_of(replace(base, shards=s)).total for s in (1, 2, 4, 8))
    stages = [memory_of(replace(base, engine="deepspeed", stage=s)).total for s in (1, 2, 3)]
    assert stages == sorted(stages, reverse=True)
    methods = [memory_of(workload_of(make(H100X4, method={"kind": k}), shape, group, 8192, 1)).total for k in ("full", "lora", "qlora")]
    assert methods[1] > methods[2]
    assert memory_of(replace(base, tokens=4096)).total < memory_of(base).total
    assert memory_of(replace(base, offload="cpu", engine="deepspeed")).total < memory_of(replace(base, engine="deepspeed")).total


def test_weights_of_the_state() -> None:
    """State in bytes a parameter, as the engines hold it."""
    shape = KNOWN["Llama-2-7b"]
    for resources, run, expected in (
            (H100X4, {}, 16 / 4),                                                                   # float32 masters, gradients, moments
            ({"workers": 1}, {}, 18),                                                               # whole: bf16 copies besides
            ({"workers": 1}, {"engine": {"reduce_dtype": "bfloat16"}}, 16),
            (H100X4, {"engine": {"kind": "deepspeed"}}, 18 / 4),
            (H100X4, {"engine": {"kind": "deepspeed", "zero_stage": 1}}, 2 + 6 + 12 / 4),
            (H100X4, {"engine": {"kind": "deepspeed", "zero_stage": 2}}, 2 + 16 / 4),
            (H100X4, {"engine": {"kind": "deepspeed", "offload": "cpu"}}, 2 / 4),
            (H100X4, {"engine": {"offload": "cpu"}}, 0)):
        made = make(resources, **run)
        load = workload_of(made, shape, groups_of(made)[0], 8192, 1)
        assert sum(state_bytes(load)) == pytest.approx(expected * shape.parameters), run


def test_traffic_by_hand() -> None:
    """Bytes between nodes for 7B on 16 workers of 4 nodes, two micro-batches: see the table in trainer/plan/network.py."""
    n = KNOWN["Llama-2-7b"].parameters
    train = {"train": {"tokens_per_step": 16 * 2 * 16384}}

    def wire(**run: Any) -> float:
        made = make({**MIXED, "groups": [], "gpu": "A100-80GB"}, **train, **run)
        load = workload_of(made, KNOWN["Llama-2-7b"], groups_of(made)[0], 16384, 2)
        return traffic_of(load, nodes=4).wire(2)

    assert wire() == pytest.approx(2 * (2 * 2 + 4) * n * 15 / 16)
    assert wire(engine={"zero_stage": 2}) == pytest.approx((2 + 2 * 4) * n * 15 / 16)
    assert wire(engine={"zero_stage": 1}) == pytest.approx((2 + 4) * n * 15 / 16)
    assert wire(engine={"zero_stage": 1, "shard_group": "node"}) == pytest.approx(2 * 4 * n * 3 / 4)
    assert wire(engine={"shard_group": "node"}) == pytest.approx(2 * 4 * n * 3 / 4)
    assert wire(engine={"shard_group": "node", "reduce_dtype": "bfloat16"}) == pytest.approx(2 * 2 * n * 3 / 4)
    assert wire(engine={"kind": "deepspeed"}) == pytest.approx(2 * (2 * 2 + 4) * n * 15 / 16)
    assert wire(engine={"kind": "deepspeed", "reduce_dtype": "bfloat16"}) == pytest.approx(2 * (2 * 2 + 2) * n * 15 / 16)
    assert wire(engine={"kind": "deepspeed", "zero_stage": 2}) == pytest.approx((2 * 4 + 2) * n * 15 / 16)
    assert wire(engine={"kind": "deepspeed", "zero_stage": 1}) == pytest.approx((4 + 2) * n * 15 / 16)
    adapters = KNOWN["Llama-2-7b"].adapters(16, ["all-linear"])
    assert wire(method={"kind": "lora"}) == pytest.approx(2 * 4 * adapters * 15 / 16)


def test_mixed_groups_get_tokens_by_speed() -> None:
    result = plan(make(MIXED, train={"tokens_per_step": 524288}, engine={"shard_group": "node", "reduce_dtype": "bfloat16"}))
    a100, h100 = result.groups
    assert 2.3 < h100.load.tokens / a100.load.tokens < 3.2
    assert a100.step is not None and h100.step is not None
    assert a100.step.compute == pytest.approx(h100.step.compute, rel=0.06)  # nobody waits
    assert a100.load.micro_batches == h100.load.micro_batches
    flat = plan(make(MIXED, train={"tokens_per_step": 524288}, engine={"shard_group": "world"}))
    assert flat.tokens_per_second < 0.7 * result.tokens_per_second
    assert any("run.engine.shard_group: node" in a for a in flat.advice)


def test_a_smaller_micro_batch_is_advised_where_it_saves_the_recomputation() -> None:
    """A 3.5B full on one H100: measured 26,872 tokens/s with 2 x 16,384 tokens a step and 28,297 with 4 x 8,192 (benchmarks/results/)."""
    shape = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 32,
             "vocab_size": 32000, "max_position_embeddings": 4096}
    made = make({"workers": 1, "gpu": "H100-80GB"}, train={"tokens_per_step": 32768, "micro_batch_tokens": 16384},
                engine={"reduce_dtype": "bfloat16"}, data={"sample": True, "max_tokens": 512})
    made = replace(made, run=replace(made.run, model=config.ModelConfig(path="models/none", architecture=shape)))
    result = plan(made)
    (advice,) = [a for a in result.advice if a.startswith("run.train.micro_batch_tokens: 8192")]
    assert "no checkpointing" in advice
    smaller = plan(replace(made, run=replace(made.run, train=replace(made.run.train, micro_batch_tokens=8192))))
    assert f"{smaller.tokens_per_second:,.0f} tokens/s" in advice
    assert not [a for a in smaller.advice if "micro_batch_tokens" in a]


def test_advice_is_tried_and_fits() -> None:
    """Each suggestion names a field; the smallest change comes first; what it says fits does fit."""
    made = make({"workers": 1, "gpu": "H100-80GB"})
    result = plan(made)
    assert result.fits is False
    assert [a.split(" needs")[0] for a in result.advice] == [
        "resources.workers: 2", "run.engine.offload: cpu", "run.method.kind: lora", "run.method.kind: qlora"]
    two = plan(make({"workers": 2, "gpu": "H100-80GB"}))
    assert two.fits and f"{two.tokens_per_second:,.0f} tokens/s" in result.advice[0]
    none = plan(make(H100X4, engine={"checkpointing": "none"}))
    assert none.fits is False and none.advice[0].startswith("run.engine.checkpointing: auto needs")
    nothing = plan(make({"workers": 1, "gpu": "A10"}, model="meta-llama/Llama-2-70b-hf", method={"kind": "qlora"}))
    assert nothing.fits is False and "Nothing that was tried fits" in nothing.advice[0]


def test_hours_of_the_dataset() -> None:
    facts = DatasetFacts(rows=200_000, tokens=86_000_000, answer_tokens=11_000_000)
    result = plan(make(H100X4, train={"epochs": 2.0}), facts)
    assert result.epoch_hours == pytest.approx(86e6 / result.tokens_per_second / 3600)
    assert result.run_hours == pytest.approx(2 * result.epoch_hours)
    assert not any("not prepared" in n for n in result.notes)
    assert f"{result.epoch_hours:.2f} h" in render(result)


def test_without_a_gpu_type() -> None:
    """The CPU environment, and GPUs of which only the memory is known."""
    cpu = plan(make({"workers": 2, "gpus_per_worker": 0}, model="HuggingFaceTB/SmolLM2-135M-Instruct"))
    assert cpu.fits is None and cpu.tokens_per_second == 0
    assert "not known" in render(cpu) and not cpu.groups[0].load.compiled
    known = plan(make({"workers": 4, "memory_gb": 79.1}))
    assert known.fits is True and known.step_seconds == 0
    less = plan(make({"workers": 4, "memory_gb": 24}))
    assert less.fits is False and less.advice


def test_smallest() -> None:
    found = smallest(make({"gpu": "H100-80GB"}))
    assert found is not None and found.workers == 2
    assert smallest(make({"gpu": "A10"}, model="meta-llama/Llama-2-70b-hf"), (1, 2, 4)) is None


def test_text_and_json() -> None:
    result = plan(make(MIXED, train={"tokens_per_step": 262144}))
    text = render(result)
    for part in ("a100: A100-80GB", "h100: H100-80GB", "optimizer (AdamW)", "tokens/s", "Network", "100 Gbit/s", "What would help"):
        assert part in text, part
    assert max(map(len, text.splitlines())) < 240
    document = json.loads(json.dumps(result.to_dict()))
    assert document["fits"] is True and len(document["groups"]) == 2
    assert sum(document["groups"][0]["memory_bytes"].values()) == result.groups[0].memory.total


def test_import_is_light() -> None:
    """No torch: plan runs on an operator's machine."""
    code = "import sys, trainer.plan, trainer.schema; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_shards_stay_inside_nodes_by_themselves_where_nodes_are_alike_and_hold_the_state() -> None:
    def layout(resources: dict[str, Any], **run: Any) -> tuple[int, int]:
        load = plan(make(resources, **run), advise=False).groups[0].load
        return load.shards, load.replicas

    assert layout(MIXED) == (4, 4)
    assert layout({**MIXED, "node_workers": 8}) == (16, 1), "nodes of 8, 4 and 4"
    assert layout({"workers": 4, "gpu": "H100-80GB"}) == (4, 1), "one node"
    assert layout({"workers": 4, "node_workers": 1, "gpu": "H200"}) == (4, 1), "a group of one would hold the whole state"
    assert layout(MIXED, model="meta-llama/Llama-2-70b-hf")[0] == 16, "1.1 TB do not fit four GPUs of 80"
    assert layout(MIXED, engine={"kind": "deepspeed"}) == (16, 1)
    assert layout(MIXED, engine={"shard_group": "world"}) == (16, 1)
