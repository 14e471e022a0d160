"""Network and memory on paper: the tables of docs/network.md, models.md, large-models.md, mixed-gpus.md and examples.md, from trainer/plan.

    python -m benchmarks.network_model               # print the network tables
    python -m benchmarks.network_model --markdown    # print the model tables (docs/models.md)
    python -m benchmarks.network_model --write       # renew the documents' tables

Needs no GPU and no network. A test holds the documents to the output.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainer import config
from trainer.files import write_atomic
from trainer.plan import recipes, render
from trainer.plan.architectures import KNOWN
from trainer.plan.hardware import GIB, GPUS
from trainer.plan.network import traffic_of
from trainer.plan.planner import Plan, plan, smallest
from trainer.plan.text import data
from trainer.plan.workload import groups_of, workload_of

DOCS = Path(__file__).resolve().parent.parent / "docs"
MIXED = {"workers": 16, "node_workers": 4, "groups": [{"name": "a100", "gpu": "A100-80GB", "workers": 12},
                                                      {"name": "h100", "gpu": "H100-80GB", "workers": 4}]}
SHARDINGS: dict[str, dict[str, Any]] = {
    "FSDP, flat, stage 3": {"engine": {"shard_group": "world"}},
    "FSDP, flat, stage 2": {"engine": {"shard_group": "world", "zero_stage": 2}},
    "FSDP, flat, stage 1": {"engine": {"shard_group": "world", "zero_stage": 1}},
    "FSDP, flat, stage 1, bf16 reduction": {"engine": {"shard_group": "world", "zero_stage": 1, "reduce_dtype": "bfloat16"}},
    "DeepSpeed ZeRO-3, flat": {"engine": {"kind": "deepspeed"}},
    "DeepSpeed ZeRO-1": {"engine": {"kind": "deepspeed", "zero_stage": 1}},
    "FSDP, hybrid": {"engine": {"shard_group": "node"}},
    "FSDP, hybrid, bf16 reduction": {"engine": {"shard_group": "node", "reduce_dtype": "bfloat16"}},
    "LoRA, rank 16": {"method": {"kind": "lora"}},
}
HUB = {"Llama-2-7b": "meta-llama/Llama-2-7b-hf", "Llama-2-13b": "meta-llama/Llama-2-13b-hf", "Llama-2-70b": "meta-llama/Llama-2-70b-hf",
       "Llama-3.1-8B": "meta-llama/Llama-3.1-8B", "Llama-3.1-70B": "meta-llama/Llama-3.1-70B", "Llama-3.2-1B": "meta-llama/Llama-3.2-1B",
       "Llama-3.2-3B": "meta-llama/Llama-3.2-3B"}


def make(model: str, resources: dict[str, Any], tokens_per_step: int = 262144, micro: int = 16384, **run: Any) -> config.Config:
    """A configuration on paper."""
    return config.parse({
        "run": {"name": "paper", "model": {"name": HUB[model], "revision": "0" * 40}, "data": {"sample": True, "max_tokens": 1024},
                "train": {"tokens_per_step": tokens_per_step, "micro_batch_tokens": micro}, **run},
        "resources": {"gpus_per_worker": 1, **resources}})


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, numbers to the right."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] + ["---:"] * (len(head) - 1), *rows])


def bytes_a_step() -> str:
    """GB through each node's network card in one direction, a step; 16 GPUs, 4 a node."""
    rows = []
    for label, run in SHARDINGS.items():
        row = [label]
        for model, micro_batches in (("Llama-2-7b", 1), ("Llama-2-7b", 4), ("Llama-2-13b", 4), ("Llama-2-70b", 4)):
            made = make(model, {"workers": 16, "node_workers": 4, "gpu": "A100-80GB"}, **run)
            load = workload_of(made, KNOWN[model], groups_of(made)[0], 16384, micro_batches)
            moved = traffic_of(load, nodes=4).wire(micro_batches) / 1e9
            row.append(f"{moved:,.1f}" if moved >= 1 else f"{moved:.2f}")
        rows.append(row)
    return markdown(["sharding", "7B, 1 micro-batch", "7B, 4", "13B, 4", "70B, 4"], rows)


def cell(result: Plan) -> str:
    """Tokens a second and scaling; what does not fit says so."""
    return f"{result.tokens_per_second:,.0f} ({result.scaling:.0%})" if result.fits else "does not fit"


def mixed(network_gbps: float) -> Callable[[], str]:
    """Tokens/s of 12 A100 and 4 H100 by sharding and tokens a step."""
    def table() -> str:
        sizes = (131072, 262144, 524288, 1048576)
        rows = [[label, *(cell(plan(make("Llama-2-7b", {**MIXED, "network_gbps": network_gbps}, size, **run), advise=False))
                          for size in sizes)] for label, run in SHARDINGS.items()]
        return markdown(["sharding", *(f"{size:,} tokens a step" for size in sizes)], rows)
    return table


def by_bandwidth() -> str:
    """Tokens/s of the mixed cluster by the network between its nodes."""
    speeds = (10, 25, 100, 200, 400)
    rows = [[label, *(cell(plan(make("Llama-2-7b", {**MIXED, "network_gbps": speed}, 524288, **run), advise=False)) for speed in speeds)]
            for label, run in SHARDINGS.items()]
    return markdown(["sharding", *(f"{speed} Gbit/s" for speed in speeds)], rows)


def large() -> str:
    """Tokens/s by the number of H100 in nodes of eight, 16k tokens a GPU and step."""
    counts = (8, 64, 256, 1024)
    rows = []
    for gbps in (100, 400):
        for label, run in SHARDINGS.items():
            if "ZeRO-1" in label:
                continue
            rows.append([f"{label}; {gbps} Gbit/s", *(cell(plan(make(
                "Llama-2-7b", {"workers": n, "node_workers": 8, "gpu": "H100-80GB", "network_gbps": gbps}, 16384 * n, **run), advise=False))
                for n in counts)])
    return markdown(["sharding", *(f"{n:,} GPUs" for n in counts)], rows)


def shapes() -> str:
    """Published shapes and what their weights weigh."""
    rows = [[name, f"{a.parameters:,}", str(a.layers), f"{a.hidden:,}", f"{a.heads}/{a.kv_heads}", f"{a.ffn:,}", f"{a.vocabulary:,}",
             f"{2 * a.parameters / 1e9:.1f}", f"{a.adapters(16, ['all-linear']) / 1e6:.1f}"] for name, a in KNOWN.items() if name in HUB]
    return markdown(["model", "parameters", "layers", "width", "heads/KV", "MLP", "vocabulary", "bf16 GB", "LoRA r=16, M"], rows)


def needs() -> str:
    """Fewest GPUs (a power of two, in nodes of eight on 100 Gbit/s) that hold a run, and tokens/s there."""
    cards = ("A10", "RTX-4090", "L40S", "A100-40GB", "A100-80GB", "H100-80GB", "H200")
    rows = []
    for model in HUB:
        for method in ("full", "lora", "qlora"):
            row = [f"{model}, {method}"]
            for card in cards:
                # Adapters are beside whole weights: more GPUs do not help them to fit.
                counts = (1, 2, 4, 8, 16, 32, 64) if method == "full" else (1,)
                made = make(model, {"gpu": card, "node_workers": 8, "network_gbps": 100}, 131072, 4096, method={"kind": method})
                found = smallest(made, counts)
                row.append(f"{found.workers} ({found.tokens_per_second:,.0f})" if found else "–")
            rows.append(row)
    return markdown(["", *cards], rows)


def cards() -> str:
    """The GPU types that plan knows."""
    rows = [[g.name, f"{g.memory_gib:g}", f"{g.bf16_tflops:g}", f"{g.fp8_tflops:g}" if g.fp8_tflops else "–", f"{g.bandwidth_gbs:,}",
             f"{g.link_gbs:g}", f"{g.efficiency:.0%} {g.basis}"] for g in GPUS.values()]
    return markdown(["GPU", "GiB", "bf16 TFLOP/s", "FP8", "GB/s", "GB/s in the node", "matrix products reach"], rows)


EXAMPLES = DOCS / "examples"
"""Worked examples: environments with the run in finetune.yaml."""


def example(name: str) -> config.Config:
    """An example's configuration."""
    return config.load(str(EXAMPLES / name / "finetune.yaml"))


def examples() -> str:
    """The worked examples: hardware, fullest GPU, speed, hosts' memory, storage."""
    return overview_of({f"[{p.name}](examples/{p.name}/site.yaml)": example(p.name) for p in sorted(EXAMPLES.iterdir())}, "example")


LARGE = [name for name in recipes.names() if "-13b-" in name or "-70b-" in name]
SHOWN = ("llama-2-13b-full", "llama-2-13b-full-mixed", "llama-2-13b-lora", "llama-2-13b-qlora", "llama-2-70b-full",
         "llama-2-70b-full-mixed-offload", "llama-2-70b-qlora-mixed", "llama-2-70b-lora", "llama-3.1-70b-qlora")
"""Recipes whose whole plan is in docs/large-models.md."""


def cuts() -> str:
    """Ways to cut the pods of servers with 6 A100, 6 A100 and 2 H100 for a full fine-tune of an 8B."""
    both = [{"name": "a100", "gpu": "A100-80GB", "workers": 12}, {"name": "h100", "gpu": "H100-80GB", "workers": 2}]
    rows = []
    for label, size, groups, sharding in (
            ("one GPU a pod, hybrid", 1, both, "node"), ("two GPUs a pod, hybrid", 2, both, "node"),
            ("six GPUs a pod, A100 alone, hybrid", 6, both[:1], "node"), ("two GPUs a pod, flat", 2, both, "world")):
        workers = sum(int(str(g["workers"])) for g in groups)
        made = make("Llama-3.1-8B", {"workers": workers, "node_workers": size, "network_gbps": 100, "groups": groups}, 458752,
                    engine={"shard_group": sharding})
        found = plan(made, advise=False)
        fullest = max(g.memory.total for g in found.groups) / GIB
        rows.append([label, str(workers), f"{fullest:.0f} of 79", f"{found.tokens_per_second:,.0f}" if found.fits else "does not fit"])
    return markdown(["pods", "GPUs", "GiB a GPU", "tokens/s"], rows)


def overview() -> str:
    """The recipes for large models: hardware, fullest GPU, speed, storage."""
    return overview_of({f"`{name}`": recipes.load(name) for name in LARGE}, "recipe")


def overview_of(runs: dict[str, config.Config], what: str) -> str:
    """One row a run."""
    rows = []
    for name, run in runs.items():
        found = plan(run, advise=False)
        fullest = max(found.groups, key=lambda g: g.memory.total / g.group.memory)
        rows.append([name, recipes.hardware(found), f"{fullest.memory.total / GIB:.0f} of {fullest.group.memory / GIB:.0f}",
                     f"{found.tokens_per_second:,.0f}", f"{1e8 / found.tokens_per_second / 3600:.1f}", f"{found.host_bytes / GIB:,.0f}",
                     data(found.storage_bytes)])
    return markdown([what, "for", "GiB a GPU", "tokens/s", "h for 100 M tokens", "GiB a host", "storage"], rows)


def whole_plan(read: Callable[[str], config.Config], name: str) -> Callable[[], str]:
    """What `python -m trainer plan` prints for a run."""
    return lambda: f"```\n{render(plan(read(name)))}```"


TABLES: dict[str, dict[str, Callable[[], str]]] = {
    "network.md": {"bytes": bytes_a_step, "mixed-100": mixed(100), "bandwidth": by_bandwidth, "large": large},
    "models.md": {"shapes": shapes, "needs": needs, "cards": cards},
    "mixed-gpus.md": {"cuts": cuts},
    "large-models.md": {"overview": overview, **{name: whole_plan(recipes.load, name) for name in SHOWN}},
    "examples.md": {"examples": examples, **{path.name: whole_plan(example, path.name) for path in sorted(EXAMPLES.iterdir())}},
}


def filled(document: str, text: str) -> str:
    """The document with its tables renewed: what is between `<!-- table: NAME -->` and `<!-- end -->`."""
    for name, table in TABLES[document].items():
        pattern = re.compile(rf"(<!-- table: {name} -->\n).*?(<!-- end -->)", re.S)
        if not pattern.search(text):
            raise ValueError(f"{document} has no place for the table {name}")
        made = table()
        text = pattern.sub(lambda m: f"{m[1]}{made}\n{m[2]}", text)  # noqa: B023 (called at once)
    return text


if __name__ == "__main__":
    if "--write" in sys.argv[1:]:
        for name in TABLES:
            write_atomic(DOCS / name, filled(name, (DOCS / name).read_text(encoding="utf-8")))
    else:
        for name, made in TABLES["models.md" if "--markdown" in sys.argv[1:] else "network.md"].items():
            print(f"{name}\n\n{made()}\n")
