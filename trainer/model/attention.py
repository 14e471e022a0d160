"""Attention within the rows of a packed micro-batch.

Registered with transformers as `packed`, so that the model's own code calls it: rows lie one after the other in one sequence of
fixed length, and `cu_seqlens` (reaching every layer as the keyword `cu_seq_lens_q`) says where each begins. On the GPU it is
PyTorch's varlen attention (FlashAttention's kernel, which skips everything outside the rows and takes grouped key/value heads as
they are); on the CPU each row is attended alone. Nothing of it reads a device value on the host, and on the GPU all shapes are fixed.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

PACKED = "packed"
"""Name of the attention in transformers' registry (`config._attn_implementation`)."""


def packed_attention(module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
                     attention_mask: torch.Tensor | None, scaling: float | None = None, dropout: float = 0.0,
                     cu_seq_lens_q: torch.Tensor | None = None, max_length_q: int | None = None,
                     **_: Any) -> tuple[torch.Tensor, None]:
    """Causal attention within rows.

    `query` [1, heads, T, d], `key` and `value` [1, key/value heads, T, d]; `cu_seq_lens_q` int32 [S+1] rises from 0 to T (equal
    neighbours are empty rows); `max_length_q` is at least the longest row. Returns [1, T, heads, d] and no weights.
    """
    if cu_seq_lens_q is None or max_length_q is None:
        raise ValueError("Packed attention needs cu_seq_lens_q and max_length_q: call the model through trainer.model.loss.")
    if query.is_cuda:
        from torch.nn.attention.varlen import varlen_attn

        q, k, v = (x.transpose(1, 2).squeeze(0) for x in (query, key, value))
        out: Any = varlen_attn(q, k, v, cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q, scale=scaling, window_size=(-1, 0))
        return out.unsqueeze(0), None
    return _row_by_row(query, key, value, cu_seq_lens_q, scaling), None


def _row_by_row(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seqlens: torch.Tensor,
                scaling: float | None) -> torch.Tensor:
    """The CPU's way: one causal attention a row (less work than a T x T block mask, and no mask in memory)."""
    borders = cu_seqlens.tolist()
    if borders[0] != 0 or borders[-1] != query.shape[2]:
        raise ValueError(f"cu_seqlens must rise from 0 to {query.shape[2]}, not from {borders[0]} to {borders[-1]}.")
    sizes = [b - a for a, b in itertools.pairwise(borders) if b > a]
    grouped = query.shape[1] != key.shape[1]
    rows = zip(*(x.split(sizes, dim=2) for x in (query, key, value)), strict=True)
    out = [F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=grouped) for q, k, v in rows]
    return torch.cat(out, dim=2).transpose(1, 2)


AttentionInterface.register(PACKED, packed_attention)
