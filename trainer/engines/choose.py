"""Which engine runs a configuration."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist

from trainer.config import Config
from trainer.engines.base import Engine
from trainer.engines.layers import Checkpointing
from trainer.errors import UserError
from trainer.model.load import DTYPES, empty_model, model_config, tokenizer_size
from trainer.plan.planner import choose_checkpointing, fits_worker
from trainer.plan.workload import nodes_alike, with_shard_group


def choose(config: Config, device: torch.device, rank: int, world: int, tokens: int | None, micro_batch: int) -> Engine:
    """See trainer.engines.make_engine."""
    run = config.run
    tokens = tokenizer_size(config) if tokens is None else tokens
    checkpointing = _checkpointing(config, device, tokens, micro_batch)
    if run.method.kind == "qlora" and device.type != "cuda":
        raise UserError("run.method.kind: 'qlora' needs GPUs (4-bit matrix products). Use lora on the CPU.")
    if run.engine.kind == "deepspeed":
        from trainer.engines.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(config, tokens, device, rank, world, checkpointing)
    if run.engine.offload == "none" and (world == 1 or run.method.kind == "qlora"
                                         or (run.method.kind == "lora" and _frozen_weights_fit(config, device, 1, tokens))):
        from trainer.engines.replicated import ReplicatedEngine

        return ReplicatedEngine(config, tokens, device, rank, world, checkpointing)
    from trainer.engines.fsdp import FsdpEngine

    if not dist.is_initialized():
        raise UserError("FSDP needs torch.distributed to be initialised, also for one worker with offload.")
    config = _with_shard_group(config, device, world, tokens, micro_batch)
    return FsdpEngine(config, tokens, device, rank, world, _checkpointing(config, device, tokens, micro_batch))


def _checkpointing(config: Config, device: torch.device, tokens: int | None, micro_batch: int) -> Checkpointing:
    """As configured; `auto` is what the plan finds to fit this rank's device (ranks may differ)."""
    return Checkpointing(*choose_checkpointing(config, _memory(device), model_config(config, tokens), micro_batch))


def _memory(device: torch.device) -> int:
    """Bytes of this rank's GPU; 0 on the CPU."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0


def _with_shard_group(config: Config, device: torch.device, world: int, tokens: int | None, micro_batch: int) -> Config:
    """The configuration with `shard_group: auto` decided: `node` where the nodes are alike and one holds the state, else `world`.
    Without a GPU memory is not known, and all workers share the state. All ranks decide alike; collective."""
    if config.run.engine.shard_group != "auto":
        return config
    from trainer.engines.fsdp import node_sizes

    sizes = node_sizes(world)
    if not _memory(device) or not nodes_alike(sizes):
        return with_shard_group(config, "world")
    by_node = with_shard_group(replace(config, resources=replace(config.resources, workers=world, min_workers=0, groups=[],
                                                                 node_workers=sizes[0])), "node")
    if config.run.method.kind == "full":
        fits = _on_all(fits_worker(by_node, _memory(device), model_config(config, tokens), micro_batch), device)
    else:  # frozen weights never cross the network between nodes if that can be
        fits = _frozen_weights_fit(config, device, sizes[0], tokens)
    return by_node if fits else with_shard_group(config, "world")


def _frozen_weights_fit(config: Config, device: torch.device, shards: int, tokens: int | None) -> bool:
    """Whether every rank can hold the frozen weights, shared by `shards` ranks, with a quarter of its memory left for the rest; all ranks
    answer alike. Weights that are not shared are kept in 8 bits with run.engine.float8."""
    if not _memory(device):
        return True
    weights = empty_model(model_config(config, tokens), DTYPES[config.run.model.dtype])
    eight_bits = config.run.engine.float8 != "none" and shards == 1
    need = sum(p.numel() * (1 if eight_bits and n.startswith("model.layers.") else p.element_size())
               for n, p in weights.named_parameters()) / shards
    return _on_all(need <= 0.75 * _memory(device), device)


def _on_all(fits: bool, device: torch.device) -> bool:
    """Whether it is so on every rank."""
    lacking = torch.tensor(float(not fits), device=device)
    dist.all_reduce(lacking, op=dist.ReduceOp.MAX)
    return not lacking.item()
