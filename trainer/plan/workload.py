"""What one worker of one group does in a step: the facts that memory and time are computed from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from trainer.config import Config
from trainer.errors import ConfigError
from trainer.plan.architectures import Architecture
from trainer.plan.hardware import Gpu, find

DEFAULT_NODE = 8
"""Workers of a node if nothing is said: GPU servers have at most eight."""
DEFAULT_ANSWER_SHARE = 0.3
"""Share of the tokens that is trained on before the dataset is prepared (PubMedQA: 0.13 with context, 0.5 without)."""
DEFAULT_ROW_TOKENS = 430
"""Mean row before the dataset is prepared (PubMedQA with its context)."""


@dataclass(frozen=True)
class Group:
    """Workers on nodes of one kind."""

    name: str
    """As in `resources.groups`; `all` if there are none."""
    gpu: Gpu | None
    """None: the group computes on the CPU, or its type is not known (then `memory` may still be)."""
    workers: int
    """Training processes of the group."""
    node_workers: int
    """Workers on one node."""
    memory: int
    """Memory of one GPU in bytes; 0: not known."""
    network_gbps: float
    """Bandwidth of a node to the others, Gbit/s; 0: not known."""

    @property
    def nodes(self) -> int:
        """Nodes of the group."""
        return math.ceil(self.workers / self.node_workers)


def groups_of(config: Config) -> list[Group]:
    """The groups that `resources` describes; one if it names none. Raises ConfigError for an unknown GPU type."""
    r = config.resources

    def group(name: str, field: str, workers: int, gpu: str, memory_gb: float, network: float, node_workers: int) -> Group:
        kind = find(gpu, field) if gpu else None
        memory = int(memory_gb * 2**30) or (kind.memory if kind else 0)
        node_workers = min(node_workers or r.node_workers or DEFAULT_NODE, workers)
        return Group(name, kind, workers, node_workers, memory, network or r.network_gbps)

    if not r.groups:
        return [group("all", "resources.gpu", r.workers, r.gpu, r.memory_gb, 0, 0)]
    return [group(g.name, "resources.groups.gpu", g.workers, g.gpu or r.gpu, g.memory_gb or r.memory_gb, g.network_gbps, g.node_workers)
            for g in r.groups]


def nodes_alike(sizes: Sequence[int]) -> bool:
    """Whether nodes with these numbers of workers can be shard groups that spare the network between them: several, alike, of more than
    one worker. (Groups of one would hold the whole state on every GPU.)"""
    return len(sizes) > 1 and len(set(sizes)) == 1 and sizes[0] > 1


def with_shard_group(config: Config, group: Literal["world", "node"]) -> Config:
    """The configuration with another run.engine.shard_group."""
    return replace(config, run=replace(config.run, engine=replace(config.run.engine, shard_group=group)))


@dataclass(frozen=True)
class Workload:
    """One worker's step."""

    model: Architecture
    """The base model, with the vocabulary that is trained."""
    method: Literal["full", "lora", "qlora"]
    """What is trained."""
    trained: int
    """Trained parameters."""
    engine: Literal["fsdp", "replicated", "deepspeed"]
    """The engine; `replicated`: weights whole on each worker (trainer/engines/choose.py)."""
    stage: int
    """ZeRO stage: 3 gathers weights twice a micro-batch, 2 once a step, 1 reduces gradients once a step too."""
    offload: Literal["none", "cpu", "nvme"]
    """Where optimizer state and master weights live."""
    shards: int
    """Workers over which state is sharded."""
    replicas: int
    """Groups of `shards` workers that hold the same state."""
    tokens: int
    """Tokens of a micro-batch on this worker."""
    micro_batches: int
    """Micro-batches of a step."""
    checkpointing: Literal["none", "selective", "full"]
    """Activation checkpointing."""
    budget: float
    """With `selective`: share of the activations that is kept."""
    compiled: bool
    """Decoder layers are compiled."""
    float8: Literal["none", "tensorwise", "rowwise"]
    """FP8 matrix products."""
    compute_bytes: int
    """Bytes of a number in the forward pass."""
    reduce_bytes: int
    """Bytes of a gradient number on its way between workers."""
    gradient_bytes: int
    """Bytes of a gradient number while it is accumulated over micro-batches."""
    dropout: float
    """Dropout before the adapters."""
    answer_share: float
    """Share of the tokens that is trained on."""
    row_tokens: float
    """Mean tokens of a row."""
    loss_chunk: int = 2048
    """Positions whose logits exist at once (trainer/model/loss.py)."""

    @property
    def adapters(self) -> bool:
        """Only adapters are trained."""
        return self.method != "full"

    @property
    def kept(self) -> float:
        """Share of the activations kept for the backward pass: 1 all, 0 the layers' inputs only. Without compilation `selective`
        recomputes every second layer, whatever the budget (trainer/engines/layers.py)."""
        return {"none": 1.0, "selective": self.budget if self.compiled else 0.5, "full": 0.0}[self.checkpointing]

    def with_checkpointing(self, mode: Literal["none", "selective", "full"], budget: float) -> Workload:
        """The same with another checkpointing."""
        return replace(self, checkpointing=mode, budget=budget)


def workload_of(config: Config, model: Architecture, group: Group, tokens: int, micro_batches: int,
                answer_share: float = DEFAULT_ANSWER_SHARE, row_tokens: float = DEFAULT_ROW_TOKENS) -> Workload:
    """What a worker of `group` does, with `tokens` a micro-batch. `checkpointing: auto` is read as `none` (trainer/plan chooses)."""
    run, engine = config.run, config.run.engine
    world = config.resources.workers
    full = run.method.kind == "full"
    if engine.float8 != "none" and group.gpu is not None and not group.gpu.fp8_tflops:
        raise ConfigError("run.engine.float8", engine.float8, f"{group.gpu.name} has no FP8: use none.")
    kind: Literal["fsdp", "replicated", "deepspeed"] = engine.kind
    if kind == "fsdp" and engine.offload == "none" and (world == 1 or not full):
        kind = "replicated"
    shards = 1 if kind == "replicated" else min(group.node_workers, world) if engine.shard_group == "node" else world
    compute = 4 if run.model.dtype == "float32" else 2
    reduce = 4 if engine.reduce_dtype == "float32" or compute == 4 else 2
    on_gpu = config.resources.gpus_per_worker > 0 or group.gpu is not None
    return Workload(
        model=model, method=run.method.kind, trained=model.parameters if full else model.adapters(run.method.rank, run.method.targets),
        engine=kind, stage=engine.zero_stage, offload=engine.offload, shards=shards, replicas=max(1, world // shards), tokens=tokens,
        micro_batches=micro_batches, checkpointing="none" if engine.checkpointing == "auto" else engine.checkpointing,
        budget=engine.activation_budget, compiled=engine.compile and on_gpu, float8=engine.float8,
        compute_bytes=compute, reduce_bytes=reduce, gradient_bytes=reduce if kind == "replicated" else 4, dropout=run.method.dropout,
        answer_share=answer_share, row_tokens=row_tokens)
