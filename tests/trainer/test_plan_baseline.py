"""Plan's memory and speed against measured runs: peaks of the allocator within 15%, steps within 10%.

The runs: Llama 2 7B's shape (32 layers, and 16 where said), random weights, AdamW, packed PubMedQA-like rows of at most 512 tokens,
12 steps after 3 to warm up, slowest rank; torch 2.11, deepspeed 0.19.8, transformers 5.17. `gpus` H100 are linked by NVLink.
Those are bare loops, and the constants were fitted to them. The runs of the product itself (benchmarks/results/) were not fitted to.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import table
import train
import yaml

from trainer import config
from trainer.plan import plan
from trainer.plan.architectures import KNOWN
from trainer.plan.hardware import GIB, GPUS
from trainer.plan.memory import memory_of
from trainer.plan.network import traffic_of
from trainer.plan.speed import step_time
from trainer.plan.workload import Workload

LLAMA = KNOWN["Llama-2-7b"]
BASE = Workload(model=LLAMA, method="full", trained=LLAMA.parameters, engine="fsdp", stage=3, offload="none", shards=4, replicas=1,
                tokens=16384, micro_batches=1, checkpointing="none", budget=0.6, compiled=True, float8="none", compute_bytes=2,
                reduce_bytes=4, gradient_bytes=4, dropout=0.0, answer_share=0.132, row_tokens=410)


@dataclass(frozen=True)
class Run:
    name: str
    gpu: str
    gpus: int
    step_s: float
    peak_gib: float
    layers: int = 32
    tokens: int = 16384
    micro: int = 1
    checkpointing: str = "none"
    reduce: int = 4
    engine: str = "fsdp"
    stage: int = 3
    compiled: bool = True
    float8: str = "none"
    lora: int = 0
    share: float = 0.132
    chunk: int = 2048

    def workload(self) -> Workload:
        model = replace(LLAMA, layers=self.layers)
        trained = model.adapters(self.lora, ["all-linear"]) if self.lora else model.parameters
        return replace(BASE, model=model, method="lora" if self.lora else "full", trained=trained, shards=self.gpus, tokens=self.tokens,
                       micro_batches=self.micro, checkpointing=self.checkpointing, reduce_bytes=self.reduce,
                       gradient_bytes=2 if self.engine == "deepspeed" else 4, engine=self.engine,
                       stage=self.stage, compiled=self.compiled, float8=self.float8, answer_share=self.share, loss_chunk=self.chunk)


RUNS = [
    Run("FSDP2, 8k tokens", "H100-80GB", 4, 0.6656, 56.98, tokens=8192),
    Run("FSDP2, 8k tokens, two micro-batches", "H100-80GB", 4, 1.3205, 63.14, tokens=8192, micro=2),
    Run("FSDP2, budget 0.6", "H100-80GB", 4, 1.2759, 67.29, checkpointing="selective"),
    Run("FSDP2, budget 0.6, rows without context", "H100-80GB", 4, 1.2757, 67.30, checkpointing="selective", share=0.5175),
    Run("FSDP2, full checkpointing", "H100-80GB", 4, 1.5896, 29.45, checkpointing="full", share=0.5175),
    Run("DeepSpeed ZeRO-3, padded rows, eager, logits whole", "H100-80GB", 4, 2.1793, 37.21, engine="deepspeed", compiled=False,
        checkpointing="full", reduce=2, share=1.0, chunk=16384),
    Run("DeepSpeed ZeRO-3, packed rows, eager, logits whole", "H100-80GB", 4, 2.1529, 37.21, engine="deepspeed", compiled=False,
        checkpointing="full", reduce=2, share=1.0, chunk=16384),
    Run("FSDP2, no checkpointing", "H200", 2, 1.2129, 112.42, share=0.5171),
    Run("FSDP2, full checkpointing", "H200", 2, 1.5731, 54.18, checkpointing="full", share=0.5171),
    Run("FSDP2, no checkpointing, bf16 reduction", "H200", 2, 1.1969, 112.17, reduce=2),
    Run("FSDP2, 8k, bf16 reduction", "H200", 2, 0.6472, 75.69, tokens=8192, reduce=2),
    Run("FSDP2, 8k, bf16 reduction, weights kept gathered", "H200", 2, 0.6231, 87.00, tokens=8192, reduce=2, stage=2),
    Run("FSDP2, 8k, two micro-batches", "H200", 2, 1.2956, 88.24, tokens=8192, micro=2),
    Run("FSDP2, 8k, FP8", "H200", 2, 0.5078, 66.85, tokens=8192, float8="tensorwise"),
    Run("FSDP2, 16k, FP8, weights kept gathered", "H200", 2, 0.8537, 105.25, float8="tensorwise", reduce=2, stage=2),
    Run("Hugging Face, 16 layers, budget 0.6", "H100-80GB", 2, 0.6488, 41.52, layers=16, checkpointing="selective"),
    Run("Hugging Face, 16 layers, bf16 reduction", "H100-80GB", 2, 0.6194, 60.49, layers=16, reduce=2),
    Run("DeepSpeed ZeRO-3, 16 layers, 8k", "H100-80GB", 2, 0.3749, 48.09, layers=16, tokens=8192, engine="deepspeed", reduce=2),
    Run("DeepSpeed ZeRO-3, 16 layers, budget 0.6", "H100-80GB", 2, 0.6738, 51.75, layers=16, checkpointing="selective",
        engine="deepspeed", reduce=2),
    Run("Hugging Face, 16 layers, budget 0.6", "H200", 1, 0.6222, 60.95, layers=16, checkpointing="selective"),
    Run("Hugging Face, 16 layers, bf16 reduction", "H200", 1, 0.5960, 86.44, layers=16, reduce=2),
    Run("Hugging Face, 16 layers, 8k, bf16 reduction", "H200", 1, 0.3272, 57.00, layers=16, tokens=8192, reduce=2),
    Run("Hugging Face, 16 layers, 8k, eager", "H200", 1, 0.3958, 63.55, layers=16, tokens=8192, reduce=2, compiled=False),
    Run("DeepSpeed ZeRO-3, 16 layers, 8k, eager", "H200", 1, 0.4373, 76.75, layers=16, tokens=8192, engine="deepspeed", reduce=2,
        compiled=False),
    Run("DeepSpeed ZeRO-3, 16 layers, 8k", "H200", 1, 0.3671, 70.06, layers=16, tokens=8192, engine="deepspeed", reduce=2),
    Run("DeepSpeed ZeRO-3, 16 layers, budget 0.6", "H200", 1, 0.6578, 73.71, layers=16, checkpointing="selective", engine="deepspeed",
        reduce=2),
    Run("LoRA rank 16", "H200", 1, 0.8566, 79.40, lora=16, engine="replicated"),
    Run("LoRA rank 16, budget 0.6", "H200", 1, 0.9123, 53.93, lora=16, engine="replicated", checkpointing="selective"),
]


@pytest.mark.parametrize("run", RUNS, ids=lambda r: f"{r.gpus}x {r.gpu}: {r.name}")
def test_measured(run: Run) -> None:
    load = run.workload()
    seconds = step_time(load, GPUS[run.gpu], traffic_of(load, nodes=1), 0, run.gpus).total
    peak = memory_of(load).peak / GIB
    assert abs(seconds / run.step_s - 1) < 0.10, f"predicted {seconds:.3f} s, measured {run.step_s:.3f} s"
    assert abs(peak / run.peak_gib - 1) < 0.15, f"predicted {peak:.1f} GiB, measured {run.peak_gib:.1f} GiB"


def test_no_bias() -> None:
    """Errors are not all on one side."""
    speed, memory = [], []
    for run in RUNS:
        load = run.workload()
        speed.append(step_time(load, GPUS[run.gpu], traffic_of(load, nodes=1), 0, run.gpus).total / run.step_s - 1)
        memory.append(memory_of(load).peak / GIB / run.peak_gib - 1)
    assert abs(sum(speed) / len(speed)) < 0.03
    assert abs(sum(memory) / len(memory)) < 0.05


PRODUCT = [(machine, result) for machine, result in table.on_gpus() if "before" not in result]
FURTHER = {("70b", "qlora"): 0.25}
"""Cases that the plan is further from than 8%; docs/large-models.md tells of them."""


@pytest.mark.parametrize(("machine", "result"), PRODUCT, ids=[
    f"{machine}: {r['case']['model']} {r['case']['method']} {r['case']['micro']}x{r['case']['accumulate']}" for machine, r in PRODUCT])
def test_runs_of_the_product(machine: str, result: dict[str, Any], tmp_path: Path) -> None:
    """The plan of a kept benchmark's own configuration, written as the benchmark writes it, against the speed that was measured."""
    case = result["case"]
    document = train.configuration(argparse.Namespace(**case), tmp_path)
    document["resources"]["gpu"] = {"H100": "H100-80GB", "H200": "H200"}[machine.split(" x ")[1]]
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(document))
    found = plan(config.load(str(tmp_path / "run.yaml")), advise=False)
    measured = result["tokens_per_second"]
    assert abs(found.tokens_per_second / measured - 1) < FURTHER.get((case["model"], case["method"]), 0.08), (
        f"predicted {found.tokens_per_second:,.0f} tokens/s, measured {measured:,.0f}")
