"""A run's plan: memory of each worker, bytes on the network, seconds of a step, hours of an epoch, and what to change if it does not fit.

Nothing here needs a GPU, a cluster or torch. Groups of unlike GPUs each get the tokens that their speed deserves, as the trainer deals
them after its calibration; `checkpointing: auto` takes the least that fits, per group.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from trainer.config import Config, ResourcesConfig
from trainer.errors import ConfigError
from trainer.files import read_manifest
from trainer.paths import RunPaths
from trainer.plan.architectures import Architecture, of_config
from trainer.plan.hardware import GIB
from trainer.plan.memory import Memory, host_bytes, memory_of
from trainer.plan.network import Traffic, traffic_of
from trainer.plan.speed import StepTime, step_time, token_seconds
from trainer.plan.workload import (
    DEFAULT_ANSWER_SHARE,
    DEFAULT_ROW_TOKENS,
    Group,
    Workload,
    groups_of,
    nodes_alike,
    with_shard_group,
    workload_of,
)

Mode = Literal["none", "selective", "full"]
BUDGETS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
"""Activation budgets that are tried, best first."""
WORTH = 1.03
"""A change is advised if it is this many times as fast."""
FILL = 0.997
"""Share of a micro-batch that packing fills (measured: 0.994 to 0.9997)."""


@dataclass(frozen=True)
class DatasetFacts:
    """What of the prepared dataset a plan needs."""

    rows: int
    """Rows of the training split."""
    tokens: int
    """Their tokens."""
    answer_tokens: int
    """Those that are trained on with `loss_on: answer`."""


@dataclass(frozen=True)
class GroupPlan:
    """One worker of a group, and the group's share."""

    group: Group
    """The group."""
    load: Workload
    """What one of its workers does in a step."""
    memory: Memory
    """What it needs."""
    fits: bool | None
    """Whether its GPU has that; None if the GPU's memory is not known."""
    step: StepTime | None
    """Seconds of its step; None without a known GPU type."""


@dataclass(frozen=True)
class Plan:
    """Prediction for one run on given resources."""

    run: str
    """The run's name."""
    model: str
    """The base model's name."""
    architecture: Architecture
    """Its shape."""
    trained: int
    """Trained parameters."""
    groups: list[GroupPlan]
    """By group; one group if all workers are alike."""
    automatic: bool
    """Checkpointing was chosen here."""
    traffic: Traffic
    """Bytes of a step."""
    wire_bytes: float
    """Bytes through a node's network card in one direction, a step."""
    network_gbps: float
    """The slowest node's bandwidth; 0: one node, or not known."""
    nodes: int
    """Nodes."""
    tokens_per_step: int
    """Tokens of a step over all workers."""
    step_seconds: float
    """Seconds of a step; 0 if a GPU type is not known."""
    network_seconds: float
    """Of them, waiting for communication."""
    tokens_per_second: float
    """Tokens of rows (without padding) a second, all workers; 0 if not known."""
    mfu: float
    """Share of the GPUs' bf16 peak, recomputation not counted."""
    scaling: float
    """Against the same GPUs without anything to wait for."""
    epoch_hours: float
    """Hours of one pass over the training rows; 0 before the dataset is prepared."""
    run_hours: float
    """Hours of the whole training; 0 if not known."""
    host_bytes: int
    """Memory of a node's host for checkpoints on their way, and offloaded state."""
    checkpoint_bytes: int
    """One checkpoint on the storage."""
    storage_bytes: int
    """All kept checkpoints (one more while saving) and the exported model."""
    advice: list[str]
    """What to change: if it does not fit, or to be faster."""
    notes: list[str]
    """What the prediction rests on."""

    @property
    def workers(self) -> int:
        """Training processes."""
        return sum(g.group.workers for g in self.groups)

    @property
    def fits(self) -> bool | None:
        """Whether every group's GPU has the memory; None if one is not known and none lacks it."""
        found = [g.fits for g in self.groups]
        return False if False in found else None if None in found else True

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        document = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ("groups", "architecture", "traffic")}
        return {**document, "fits": self.fits, "workers": self.workers, "parameters": self.architecture.parameters,
                "architecture": dataclasses.asdict(self.architecture), "groups": [
                    {"name": g.group.name, "gpu": g.group.gpu.name if g.group.gpu else "", "workers": g.group.workers, "fits": g.fits,
                     "gpu_memory_bytes": g.group.memory, "micro_batch_tokens": g.load.tokens, "micro_batches": g.load.micro_batches,
                     "checkpointing": g.load.checkpointing, "activation_budget": g.load.budget, "memory_bytes": g.memory.parts(),
                     "step_seconds": dataclasses.asdict(g.step) if g.step else {}} for g in self.groups]}


def dataset_facts(config: Config) -> DatasetFacts | None:
    """From the prepared dataset's manifest; None before it is prepared."""
    manifest = read_manifest(RunPaths.of(config).dataset)
    if manifest is None:
        return None
    train = manifest["splits"]["train"]
    return DatasetFacts(int(train["rows"]), int(train["tokens"]), int(train["answer_tokens"]))


def least_checkpointing(load: Workload, gpu_memory: int) -> Workload | None:
    """The work with the least recomputation that fits `gpu_memory` bytes; None if nothing does."""
    tried: list[tuple[Mode, float]] = [("none", 1.0), *(("selective", b) for b in BUDGETS), ("full", 0.0)]
    for mode, budget in tried:
        candidate = load.with_checkpointing(mode, budget)
        if memory_of(candidate, gpu_memory).total <= gpu_memory:
            return candidate
    return None


def choose_checkpointing(config: Config, gpu_memory_bytes: int, model_config: Architecture | Mapping[str, Any] | Any,
                         tokens: int = 0) -> tuple[Mode, float]:
    """(mode, activation budget) for this worker's GPU: as configured, and for `auto` the least that fits.

    `model_config` is transformers' LlamaConfig (with the vocabulary that is trained), its fields, or an Architecture; `tokens` the
    micro-batch of this worker (default: run.train.micro_batch_tokens). `full` if nothing fits: the step then says out of memory.
    """
    engine = config.run.engine
    if engine.checkpointing != "auto":
        return engine.checkpointing, engine.activation_budget
    if gpu_memory_bytes <= 0:
        return "none", 1.0
    chosen = least_checkpointing(_own_load(config, gpu_memory_bytes, model_config, tokens), gpu_memory_bytes)
    return (chosen.checkpointing, chosen.budget) if chosen else ("full", 0.0)


def fits_worker(config: Config, gpu_memory_bytes: int, model_config: Architecture | Mapping[str, Any] | Any, tokens: int = 0) -> bool:
    """Whether this worker's GPU holds its part, with the configured checkpointing or, for `auto`, any. Arguments as above."""
    load = _own_load(config, gpu_memory_bytes, model_config, tokens)
    if config.run.engine.checkpointing == "auto":
        return least_checkpointing(load, gpu_memory_bytes) is not None
    return memory_of(load, gpu_memory_bytes).total <= gpu_memory_bytes


def _own_load(config: Config, gpu_memory_bytes: int, model_config: Architecture | Mapping[str, Any] | Any, tokens: int) -> Workload:
    """What this worker does in a step."""
    train = config.run.train
    if not isinstance(model_config, Architecture):
        model_config = Architecture.of(model_config if isinstance(model_config, Mapping) else model_config.to_dict())
    workers = config.resources.workers
    group = Group("this worker", None, workers, max(1, min(workers, config.resources.node_workers or 8)), gpu_memory_bytes, 0)
    on_gpu = replace(config, resources=replace(config.resources, gpus_per_worker=1.0))
    share = 1.0 if config.run.data.loss_on == "all" else DEFAULT_ANSWER_SHARE
    return workload_of(on_gpu, model_config, group, tokens or train.micro_batch_tokens,
                       max(1, round(train.tokens_per_step / workers / (tokens or train.micro_batch_tokens))), share)


def _loads(config: Config, model: Architecture, groups: list[Group], facts: DatasetFacts | None) -> list[Workload]:
    """One worker's step in each group: tokens in proportion to speed, equal numbers of micro-batches, checkpointing chosen."""
    run = config.run
    share = 1.0 if run.data.loss_on == "all" else facts.answer_tokens / facts.tokens if facts else DEFAULT_ANSWER_SHARE
    mean = facts.tokens / facts.rows if facts else min(DEFAULT_ROW_TOKENS, run.data.max_tokens * 0.8)

    def load(group: Group, tokens: int, micro_batches: int) -> Workload:
        work = workload_of(config, model, group, tokens, micro_batches, share, mean)
        if run.engine.checkpointing == "auto" and group.memory:
            work = least_checkpointing(work, group.memory) or work.with_checkpointing("full", 0.0)
        return work

    limit = run.train.micro_batch_tokens
    speeds = [1.0] * len(groups)
    loads: list[Workload] = []
    for _ in range(2):  # the second time with the checkpointing that the first chose
        whole = sum(s * g.workers for s, g in zip(speeds, groups, strict=True))
        tokens = [run.train.tokens_per_step * s / whole for s in speeds]
        micro_batches = max(1, math.ceil(max(tokens) / limit - 1e-6))
        loads = [load(g, min(limit, max(run.data.max_tokens, round(t / micro_batches))), micro_batches)
                 for g, t in zip(groups, tokens, strict=True)]
        if any(g.gpu is None for g in groups):
            break
        speeds = [1 / token_seconds(w, g.gpu) for w, g in zip(loads, groups, strict=True) if g.gpu]
    return loads


def _node_sizes(groups: list[Group]) -> list[int]:
    """Workers of each node."""
    return [min(g.node_workers, g.workers - i * g.node_workers) for g in groups for i in range(g.nodes)]


def _resolved(config: Config, groups: list[Group], facts: DatasetFacts | None) -> Config:
    """The configuration with `shard_group: auto` decided as the run decides it (trainer/engines/choose.py)."""
    if config.run.engine.shard_group != "auto":
        return config
    by_node = with_shard_group(config, "node") if config.run.engine.kind == "fsdp" and nodes_alike(_node_sizes(groups)) else None
    if by_node is not None and plan(by_node, facts, advise=False).fits:
        return by_node
    return with_shard_group(config, "world")


def _layout(config: Config, groups: list[Group]) -> None:
    """ConfigError for a layout that the engine refuses."""
    sizes = sorted(set(_node_sizes(groups)))
    if config.run.engine.shard_group == "node" and len(sizes) > 1:
        raise ConfigError("run.engine.shard_group", "node", f"Nodes hold {sizes} workers; shard groups must be of one size. Give each node "
                          "the same number of workers (resources.groups, node_workers), or shard over the world.")


def _speed(config: Config, groups: list[Group], loads: list[Workload], nodes: int) -> tuple[Traffic, float, list[StepTime | None]]:
    """(traffic, slowest node's Gbit/s, a step of each group)."""
    traffic = traffic_of(loads[0], nodes)
    known = [g.network_gbps for g in groups if g.network_gbps]
    gbps = min(known) if known and nodes > 1 else 0.0
    return traffic, gbps, [step_time(w, g.gpu, traffic, gbps, g.node_workers) if g.gpu else None
                           for w, g in zip(loads, groups, strict=True)]


def plan(config: Config, facts: DatasetFacts | None = None, advise: bool = True) -> Plan:
    """The prediction for a configuration. `facts`: the dataset (default: the run directory's, if it is prepared).

    Raises ConfigError for a model, GPU type or layout that is not known or not possible.
    """
    name, model = of_config(config)
    facts = facts or dataset_facts(config)
    groups = groups_of(config)
    config = _resolved(config, groups, facts)
    _layout(config, groups)
    loads = _loads(config, model, groups, facts)
    nodes = sum(g.nodes for g in groups)
    traffic, gbps, steps = _speed(config, groups, loads, nodes)
    planned = []
    for group, load, step in zip(groups, loads, steps, strict=True):
        memory = memory_of(load, group.memory)
        planned.append(GroupPlan(group, load, memory, memory.total <= group.memory if group.memory else None, step))

    trained = loads[0].trained
    dealt = sum(w.tokens * w.micro_batches * g.workers for w, g in zip(loads, groups, strict=True))
    known = [s for s in steps if s]
    seconds = max(s.total for s in known) if len(known) == len(steps) else 0.0
    speed = dealt * FILL / seconds if seconds else 0.0
    alone = sum(g.workers * w.tokens * w.micro_batches / (s.total - s.network) for g, w, s in zip(groups, loads, steps, strict=True) if s)
    peak = sum(g.workers * g.gpu.bf16_tflops * 1e12 for g in groups if g.gpu)
    flops = (4 if loads[0].adapters else 6) * (model.layers * model.layer_linear + model.embedding)
    epoch = facts.tokens / speed / 3600 if facts and speed else 0.0
    hours = epoch * config.run.train.epochs
    if config.run.train.max_steps and seconds:
        hours = min(hours or math.inf, config.run.train.max_steps * seconds / 3600)
    checkpoint = 12 * trained
    kept = config.run.checkpoint.keep_last + config.run.checkpoint.keep_best + 1
    export = model.parameters * (4 if config.run.export.dtype == "float32" else 2)
    result = Plan(
        run=config.run.name, model=name, architecture=model, trained=trained, groups=planned,
        automatic=config.run.engine.checkpointing == "auto", traffic=traffic, wire_bytes=traffic.wire(loads[0].micro_batches),
        network_gbps=gbps, nodes=nodes, tokens_per_step=dealt, step_seconds=seconds,
        network_seconds=max((s.network for s in known), default=0.0), tokens_per_second=speed, mfu=flops * speed / peak if peak else 0.0,
        scaling=dealt / seconds / alone if seconds else 0.0, epoch_hours=epoch, run_hours=hours,
        host_bytes=max(host_bytes(w, g.node_workers) for w, g in zip(loads, groups, strict=True)), checkpoint_bytes=checkpoint,
        storage_bytes=checkpoint * kept + export, advice=[], notes=_notes(config, groups, loads, facts, nodes, gbps))
    return replace(result, advice=_advice(config, result, facts)) if advise else result


def _notes(config: Config, groups: list[Group], loads: list[Workload], facts: DatasetFacts | None, nodes: int, gbps: float) -> list[str]:
    notes = []
    for group in groups:
        if group.gpu is None:
            notes.append(f"{group.name}: no GPU type is given (resources.gpu), so time is not predicted"
                         + ("." if group.memory else ", nor whether it fits."))
        elif group.gpu.basis != "measured":
            notes.append(f"{group.gpu.name}: its efficiency is {group.gpu.basis}, not measured here.")
    if facts is None:
        notes.append(f"The dataset is not prepared: rows of {loads[0].row_tokens:.0f} tokens are assumed, "
                     f"{loads[0].answer_share:.0%} of the tokens trained on.")
    if nodes > 1 and not gbps:
        notes.append("The bandwidth between nodes is not given (resources.network_gbps): its time is not counted.")
    if loads[0].method == "qlora":
        notes.append("4-bit speed: one H200 was measured 2 % above the prediction for a 7B, 18 % below it for a 70B.")
    if config.run.engine.offload != "none":
        notes.append("Speed with offload is an estimate: it was not measured, and depends on the hosts' memory bandwidth.")
    return notes


# What to change

def _changed(config: Config, resources: dict[str, Any] | None = None, **parts: dict[str, Any]) -> Config | None:
    """The configuration with fields of `run` parts (and resources) replaced; None if that is not a valid one."""
    try:
        run = replace(config.run, **{name: replace(getattr(config.run, name), **values) for name, values in parts.items()})
        return replace(config, run=run, resources=replace(config.resources, **resources) if resources else config.resources)
    except ConfigError:
        return None


def _worst(result: Plan) -> GroupPlan:
    return max((g for g in result.groups if g.group.memory), key=lambda g: g.memory.total / g.group.memory)


def _need(result: Plan) -> str:
    worst = _worst(result)
    mode = {"none": "no checkpointing", "full": "full checkpointing",
            "selective": f"selective checkpointing (activation_budget: {worst.load.budget:g})"}[worst.load.checkpointing]
    text = f"needs {worst.memory.total / GIB:.0f} GiB of {worst.group.memory / GIB:.0f}"
    return f"{text} with {mode}"


def _candidates(config: Config) -> Iterator[tuple[str, Config | None]]:
    """Changes that save memory, the mildest first. Those after the first let checkpointing be chosen."""
    run, auto = config.run, {"checkpointing": "auto"}
    if run.engine.checkpointing not in ("auto", "full"):
        yield "run.engine.checkpointing: auto", _changed(config, engine=auto)
    tokens = run.train.micro_batch_tokens // 2
    while tokens >= max(run.data.max_tokens, 1024):
        yield f"run.train.micro_batch_tokens: {tokens}", _changed(config, engine=auto, train={"micro_batch_tokens": tokens})
        tokens //= 2
    if run.method.kind == "full" and run.engine.zero_stage != 3:
        yield "run.engine.zero_stage: 3", _changed(config, engine={**auto, "zero_stage": 3})
    if run.method.kind == "full" and run.engine.shard_group == "node":
        yield "run.engine.shard_group: world", _changed(config, engine={**auto, "shard_group": "world"})
    if run.method.kind == "full" and run.engine.reduce_dtype == "float32":
        yield "run.engine.reduce_dtype: bfloat16", _changed(config, engine={**auto, "reduce_dtype": "bfloat16"})
    if run.method.kind == "full" and not config.resources.groups:
        workers = config.resources.workers
        while workers < 1024:
            workers *= 2
            yield f"resources.workers: {workers}", _changed(config, engine=auto, resources={"workers": workers})
    if run.method.kind == "full" and run.engine.offload == "none":
        yield "run.engine.offload: cpu", _changed(config, engine={**auto, "offload": "cpu"})
    if run.method.kind == "full":
        yield "run.method.kind: lora", _changed(config, engine={**auto, "offload": "none", "kind": "fsdp", "zero_stage": 3},
                                               method={"kind": "lora"})
    if run.method.kind == "lora" and run.engine.float8 == "none":
        yield "run.engine.float8: tensorwise", _changed(config, engine={**auto, "float8": "tensorwise"})
    if run.method.kind != "qlora":
        plain = {**auto, "offload": "none", "kind": "fsdp", "zero_stage": 3, "float8": "none"}
        yield "run.method.kind: qlora", _changed(config, engine=plain, method={"kind": "qlora"})


def best_micro_batch(config: Config, facts: DatasetFacts | None, result: Plan) -> tuple[Plan, int]:
    """The fastest plan that fits over halves and doubles of `run.train.micro_batch_tokens`, and its tokens; `result` is the present one.

    A smaller micro-batch may need no recomputation, a larger one gathers weights less often; what is reduced and updated a step stays the
    same. Of plans within 1% of each other the one with the larger micro-batch is taken: its matrix products are larger. At least two of
    the longest rows have to fit, or packing leaves room.
    """
    train, now = config.run.train, config.run.train.micro_batch_tokens
    # On unlike GPUs the limit is the fastest one's; a slower one would recompute for it though it is dealt less (docs/mixed-gpus.md).
    most = train.tokens_per_step / result.workers if len(result.groups) == 1 else 0
    halves = (now >> k for k in range(1, 16) if now >> k >= 2 * config.run.data.max_tokens)
    doubles = (now << k for k in range(1, 16) if now << k <= most)
    found = [(result, now)]
    for tokens in (*halves, *doubles):
        changed = _changed(config, train={"micro_batch_tokens": tokens})
        if changed is not None and (other := plan(changed, facts, advise=False)).fits:
            found.append((other, tokens))
    fastest = max(other.tokens_per_second for other, _ in found)
    return max((one for one in found if one[0].tokens_per_second >= 0.99 * fastest), key=lambda one: one[1])


def _faster(label: str, other: Plan, result: Plan) -> str:
    return (f"{label} {_need(other)}, and is {other.tokens_per_second / result.tokens_per_second:.2f} times as fast "
            f"({other.tokens_per_second:,.0f} tokens/s).")


def _advice(config: Config, result: Plan, facts: DatasetFacts | None) -> list[str]:
    if result.fits is False:
        advice, seen = [], set()
        for label, changed in _candidates(config):
            field = label.split(":")[0] if not label.startswith("run.method") else label
            if changed is None or field in seen:
                continue
            try:
                other = plan(changed, facts, advise=False)
            except ConfigError:
                continue
            if other.fits:
                seen.add(field)
                rate = f", {other.tokens_per_second:,.0f} tokens/s" if other.tokens_per_second else ""
                host = f", {other.host_bytes / GIB:.0f} GiB of each host" if "offload" in label else ""
                advice.append(f"{label} {_need(other)}{host}{rate}: fits.")
        return advice or ["Nothing that was tried fits: use a GPU with more memory, or a smaller model."]
    advice = []
    if result.tokens_per_second and result.fits:
        options: list[tuple[str, dict[str, dict[str, Any]]]] = [
            ("run.engine.shard_group: node", {"engine": {"shard_group": "node"}}),
            *((f"run.engine.zero_stage: {stage}", {"engine": {"zero_stage": stage}}) for stage in (2, 1)),
            ("run.engine.checkpointing: auto", {"engine": {"checkpointing": "auto"}})]
        sharding = ("run.engine.shard_group", "run.engine.zero_stage")
        for label, parts in options:
            changed = _changed(config, **parts)
            if changed is None or changed == config or (config.run.method.kind != "full" and label.startswith(sharding)):
                continue
            try:
                other = plan(changed, facts, advise=False)
            except ConfigError:
                continue
            if other.fits and other.tokens_per_second > WORTH * result.tokens_per_second:
                advice.append(_faster(label, other, result))
        best, tokens = best_micro_batch(config, facts, result)
        if best.tokens_per_second > WORTH * result.tokens_per_second:
            advice.append(_faster(f"run.train.micro_batch_tokens: {tokens}", best, result))
        waiting = result.network_seconds / result.step_seconds
        larger = _changed(config, train={"tokens_per_step": config.run.train.tokens_per_step * 4})
        if waiting > 0.2 and result.traffic.wire_step and larger is not None:
            other = plan(larger, facts, advise=False)
            advice.append(f"{waiting:.0%} of a step waits for the network: run.train.tokens_per_step: {larger.run.train.tokens_per_step} "
                          f"would reach {other.tokens_per_second:,.0f} tokens/s (and change the optimisation).")
    return advice


def smallest(config: Config, workers: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)) -> Plan | None:
    """The plan on the fewest GPUs of `resources.gpu` that hold the run; None if none of `workers` does."""
    for count in workers:
        resources: ResourcesConfig = replace(config.resources, workers=count, min_workers=0, groups=[])
        result = plan(replace(config, resources=resources), advise=False)
        if result.fits:
            return result
    return None
