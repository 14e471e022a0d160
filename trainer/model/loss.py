"""The forward pass of training: packed rows in, the summed cross-entropy of the trained tokens out.

The head is applied only where a token is trained on (`loss_index`), a chunk at a time, and each chunk's logits are made again in the
backward pass: the logits of a whole micro-batch (T x vocabulary) never exist. The sum is not divided here: the caller divides by
the step's number of trained tokens over all ranks, so that ranks may hold unequal amounts.
"""

from __future__ import annotations

import types
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from trainer.model.attention import PACKED

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

    from trainer.data.loader import PackedBatch

CHUNK = 2048
"""Positions whose logits exist at once: at a vocabulary of 128k in float32, 1 GiB."""
IGNORED = -100
"""A target that is not trained on (cross_entropy's ignore_index)."""


def _chunk_loss(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="sum", ignore_index=IGNORED)


def chunked_cross_entropy(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, chunk: int = CHUNK) -> torch.Tensor:
    """Sum of the cross-entropy of `targets` [N] under the logits `hidden` [N, H] x `weight` [V, H], in float32."""
    if not torch.is_grad_enabled():
        return sum((_chunk_loss(hidden[i:i + chunk], weight, targets[i:i + chunk]) for i in range(0, len(targets), chunk)),
                   start=hidden.new_zeros((), dtype=torch.float32))
    total = hidden.new_zeros((), dtype=torch.float32)
    for i in range(0, len(targets), chunk):
        total = total + checkpoint(_chunk_loss, hidden[i:i + chunk], weight, targets[i:i + chunk], use_reentrant=False)
    return total


def _head_forward(self: torch.nn.Linear, hidden: torch.Tensor, loss_index: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """lm_head's forward in training. A module's own, so that an engine's hooks gather its weight before."""
    weight, new_rows = self.weight, getattr(self, "new_rows", None)
    if new_rows is not None:  # adapters with new tokens (trainer/model/methods.py): the last rows are trained, the others frozen
        weight = torch.cat([weight[:-len(new_rows)], new_rows])
    return chunked_cross_entropy(hidden.index_select(0, loss_index), weight, targets)


def _packed_forward(self: LlamaForCausalLM, input_ids: torch.Tensor, position_ids: torch.Tensor, cu_seqlens: torch.Tensor,
                    loss_index: torch.Tensor, targets: torch.Tensor, max_seqlen: int) -> torch.Tensor:
    """The model's forward in training."""
    hidden = self.model(input_ids=input_ids[None], position_ids=position_ids[None], cu_seq_lens_q=cu_seqlens,
                        max_length_q=max_seqlen, use_cache=False).last_hidden_state[0]
    return self.lm_head(hidden, loss_index, targets)


def use_packed_forward(model: LlamaForCausalLM) -> None:
    """Give this instance the forward pass of training; its parameters keep Hugging Face's names."""
    model.config._attn_implementation_internal = PACKED
    model.lm_head.forward = types.MethodType(_head_forward, model.lm_head)
    model.forward = types.MethodType(_packed_forward, model)


def arguments(batch: PackedBatch, device: torch.device) -> dict[str, Any]:
    """The batch as the packed forward's arguments on `device` (asynchronous from pinned memory).

    A micro-batch without a trained token keeps one ignored position: its loss is 0, and its gradients are zeros instead of absent,
    so that all ranks take part in the same reductions.
    """
    loss_index, targets = batch.loss_index, batch.targets
    if len(targets) == 0:
        loss_index, targets = torch.zeros(1, dtype=torch.int64), torch.full((1,), IGNORED, dtype=torch.int64)
    tensors = {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "cu_seqlens": batch.cu_seqlens,
               "loss_index": loss_index, "targets": targets}
    return {**{k: v.to(device, non_blocking=True) for k, v in tensors.items()}, "max_seqlen": batch.max_seqlen}


def token_loss_sum(model: torch.nn.Module, batch: PackedBatch, device: torch.device) -> torch.Tensor:
    """Sum of the cross-entropy over the batch's trained tokens (float32 scalar on `device`), with a graph if gradients are on.

    `model` is what the engine calls: a model after `use_packed_forward`, or a wrapper around one.
    """
    return model(**arguments(batch, device))
