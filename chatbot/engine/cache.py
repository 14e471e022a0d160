"""Keys and values of all running answers in one block of memory, and the attention that reads and writes it.

Row i of the block belongs to the i-th running answer; running answers are always rows 0..n-1 (when one ends, the last takes its
row), so a decoding step reads one contiguous slice and copies nothing. The transformers model runs unchanged: its attention layers
call `attend` (registered as the attention implementation `rows`), which is told by `View` where the step's tokens belong.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as functional
from transformers import AttentionInterface

IMPLEMENTATION = "rows"
"""Name of the attention implementation in transformers' registry."""


def zeros(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Zeros, not empty memory: masked positions enter the attention's product with weight 0, and 0 * NaN is NaN.

    On a CPU the memory is the operating system's zero pages (numpy's calloc; torch.zeros writes): rows never used cost nothing.
    """
    if device.type != "cpu":
        return torch.zeros(shape, device=device, dtype=dtype)
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)


class Cache:
    """Keys and values [rows, kv_heads, length, head_dim] of every layer. The last position of a row is a dump for padded rows."""

    def __init__(self, config: Any, rows: int, length: int, device: torch.device, dtype: torch.dtype) -> None:
        heads = config.num_key_value_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.rows, self.length = rows, length
        shape = (rows, heads, length + 1, size)
        self.keys = [zeros(shape, device, dtype) for _ in range(config.num_hidden_layers)]
        self.values = [zeros(shape, device, dtype) for _ in range(config.num_hidden_layers)]

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of a row onto another row."""
        for block in (*self.keys, *self.values):
            block[target, :, :length] = block[source, :, :length]

    @property
    def nbytes(self) -> int:
        return sum(block.nbytes for block in (*self.keys, *self.values))


@dataclass
class View:
    """Where the tokens of one forward pass belong."""

    cache: Cache
    row: int | None
    """Reading a prompt: the row; its tokens are consecutive. Decoding: None; token i belongs to row i."""
    start: int
    """Reading a prompt: position of the first token."""
    length: int
    """Positions that are read: 0..length-1."""
    rows: torch.Tensor | None = None
    """Decoding: 0..n-1, int64 [n]."""
    positions: torch.Tensor | None = None
    """Decoding: position of each row's token, int64 [n]."""
    mask: torch.Tensor | None = None
    """True where a query sees a key. Decoding: [n, 1, 1, length]; a prompt's later part: [1, 1, tokens, length]."""


def decoding_view(cache: Cache, rows: torch.Tensor, positions: torch.Tensor, length: int) -> View:
    """One token for each of rows 0..n-1; `length` must exceed every position that counts."""
    mask = (torch.arange(length, device=positions.device)[None] <= positions[:, None])[:, None, None]
    return View(cache, None, 0, length, rows, positions, mask)


def prompt_view(cache: Cache, row: int, start: int, tokens: int, device: torch.device) -> View:
    """`tokens` consecutive tokens of one row, from position `start` on."""
    mask = None
    if start:
        queries = torch.arange(start, start + tokens, device=device)[:, None]
        mask = (torch.arange(start + tokens, device=device)[None] <= queries)[None, None]
    return View(cache, row, start, start + tokens, mask=mask)


def attend(module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, *, scaling: float,
           view: View, **_: Any) -> tuple[torch.Tensor, None]:
    """Attention layer: writes key and value [n, kv_heads, tokens, head_dim] into the cache, reads what `view` says.

    query: [n, heads, tokens, head_dim]. Returns [n, tokens, heads, head_dim], as transformers expects.
    """
    keys, values = view.cache.keys[module.layer_idx], view.cache.values[module.layer_idx]
    n, heads, _, size = query.shape
    kv_heads = keys.shape[1]
    if view.row is None:
        keys[view.rows, :, view.positions] = key[:, :, 0]
        values[view.rows, :, view.positions] = value[:, :, 0]
        # The query heads that share a key head are laid along the query axis: no key is repeated in memory.
        grouped = query.reshape(n, kv_heads, heads // kv_heads, size)
        out = functional.scaled_dot_product_attention(grouped, keys[:n, :, :view.length], values[:n, :, :view.length],
                                                      attn_mask=view.mask, scale=scaling)
        return out.reshape(n, 1, heads, size), None
    keys[view.row, :, view.start:view.length] = key[0]
    values[view.row, :, view.start:view.length] = value[0]
    past_keys, past_values = keys[None, view.row, :, :view.length], values[None, view.row, :, :view.length]
    if heads != kv_heads:
        past_keys = past_keys.repeat_interleave(heads // kv_heads, 1)
        past_values = past_values.repeat_interleave(heads // kv_heads, 1)
    out = functional.scaled_dot_product_attention(query, past_keys, past_values, attn_mask=view.mask, is_causal=view.mask is None,
                                                  scale=scaling)
    return out.transpose(1, 2), None


AttentionInterface.register(IMPLEMENTATION, attend)
