"""How the decoder's layers run: compiled, checkpointed. The same for every engine."""

from __future__ import annotations

import functools
from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from trainer.config import EngineConfig


class Checkpointing(NamedTuple):
    """Activation checkpointing of this rank."""

    mode: Literal["none", "selective", "full"] = "none"
    budget: float = 1.0
    """With `selective`: share of the activations that is kept."""


KEEP_ALL = Checkpointing()


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The decoder's layers, in order."""
    return list(model.model.layers)  # type: ignore[union-attr, arg-type]


def prepare_layers(model: nn.Module, engine: EngineConfig, checkpointing: Checkpointing, device: torch.device) -> None:
    """Compile each layer's forward (GPU) and apply activation checkpointing, on the instances: names stay Hugging Face's.

    Shapes are fixed, so each layer is compiled once; `selective` is the compiler's own choice of what to keep within a budget (it
    recomputes the cheapest first), and needs compilation: without it, every second layer is recomputed whole.
    """
    compiled = engine.compile and device.type == "cuda"
    if compiled:
        import torch._dynamo
        import torch._functorch.config
        import torch._inductor.config

        torch._dynamo.config.automatic_dynamic_shapes = False
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
        torch._functorch.config.activation_memory_budget = checkpointing.budget if checkpointing.mode == "selective" else 1.0
        if engine.float8 != "none":  # else a norm's backward writes q, k, v transposed in FP8 (docs/decisions/engines.md)
            torch._inductor.config.triton.mix_order_reduction = False
        norm = model.model.norm  # type: ignore[union-attr]
        norm.forward = torch.compile(norm.forward, fullgraph=True, dynamic=False)  # type: ignore[union-attr, method-assign, assignment]
    for index, layer in enumerate(decoder_layers(model)):
        forward = layer.forward
        if compiled:
            forward = torch.compile(forward, fullgraph=True, dynamic=False)
        if checkpointing.mode == "full" or (checkpointing.mode == "selective" and not compiled and index % 2):
            forward = functools.partial(_recomputed, forward)
        if forward is not layer.forward:
            layer.forward = forward


def _recomputed(forward: Any, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=True, **kwargs)
