"""Which engine runs a configuration."""

from __future__ import annotations

import torch
import torch.distributed as dist

from trainer.config import Config
from trainer.engines.base import Engine
from trainer.engines.layers import Checkpointing
from trainer.errors import UserError
from trainer.model.load import DTYPES, empty_model, model_config, tokenizer_size


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
                                         or (run.method.kind == "lora" and _frozen_weights_fit(config, device, world, tokens))):
        from trainer.engines.replicated import ReplicatedEngine

        return ReplicatedEngine(config, tokens, device, rank, world, checkpointing)
    from trainer.engines.fsdp import FsdpEngine

    if not dist.is_initialized():
        raise UserError("FSDP needs torch.distributed to be initialised, also for one worker with offload.")
    return FsdpEngine(config, tokens, device, rank, world, checkpointing)


def _checkpointing(config: Config, device: torch.device, tokens: int | None, micro_batch: int) -> Checkpointing:
    """As configured; `auto` is what the plan finds to fit this rank's device (ranks may differ)."""
    from trainer.plan.planner import choose_checkpointing

    memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0
    return Checkpointing(*choose_checkpointing(config, memory, model_config(config, tokens), micro_batch))


def _frozen_weights_fit(config: Config, device: torch.device, world: int, tokens: int | None) -> bool:
    """Whether every rank can hold the frozen weights whole, with a quarter of its memory left for the rest; all ranks answer alike."""
    if device.type != "cuda":
        return True
    weights = empty_model(model_config(config, tokens), DTYPES[config.run.model.dtype])
    need = sum(p.numel() * p.element_size() for p in weights.parameters())
    lacking = torch.tensor(float(need > 0.75 * torch.cuda.get_device_properties(device).total_memory), device=device)
    dist.all_reduce(lacking, op=dist.ReduceOp.MAX)
    return not lacking.item()
