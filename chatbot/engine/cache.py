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


@dataclass(frozen=True)
class Part:
    """Consecutive tokens of one row: a prompt, or some of it."""

    row: int
    start: int
    """Position of the first token."""
    tokens: int
    mask: torch.Tensor | None
    """True where a query sees a key, [1, 1, tokens, start + tokens]; None at the beginning of a row, where it is causal."""

    @property
    def end(self) -> int:
        return self.start + self.tokens


@dataclass(frozen=True)
class View:
    """Where the tokens of one forward pass belong: first those of `parts`, then one for each of the decoding rows 0..n-1."""

    cache: Cache
    parts: tuple[Part, ...]
    length: int = 0
    """Decoding: positions that are read, 0..length-1."""
    rows: torch.Tensor | None = None
    """Decoding: 0..n-1, int64 [n]; None if no row decodes."""
    positions: torch.Tensor | None = None
    """Decoding: position of each row's token, int64 [n]."""
    mask: torch.Tensor | None = None
    """Decoding: true where a query sees a key, [n, 1, 1, length]."""


def part_of(row: int, start: int, tokens: int, device: torch.device) -> Part:
    """`tokens` consecutive tokens of a row, from position `start` on."""
    mask = None
    if start:
        queries = torch.arange(start, start + tokens, device=device)[:, None]
        mask = (torch.arange(start + tokens, device=device)[None] <= queries)[None, None]
    return Part(row, start, tokens, mask)


def view_of(cache: Cache, parts: tuple[Part, ...], rows: torch.Tensor, positions: torch.Tensor, length: int) -> View:
    """Parts of prompts and a token of each decoding row; `length` must exceed every position that counts."""
    mask = (torch.arange(length, device=positions.device)[None] <= positions[:, None])[:, None, None]
    return View(cache, parts, length, rows, positions, mask)


def _attend_part(view: View, part: Part, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
                 scaling: float) -> torch.Tensor:
    """A prompt's part. query: [heads, tokens, head_dim], key and value: [kv_heads, tokens, head_dim]; returns query's shape."""
    keys, values = view.cache.keys[layer][part.row, :, :part.end], view.cache.values[layer][part.row, :, :part.end]
    keys[:, part.start:], values[:, part.start:] = key, value
    if len(query) != len(keys):
        keys, values = (block.repeat_interleave(len(query) // len(keys), 0) for block in (keys, values))
    return functional.scaled_dot_product_attention(query[None], keys[None], values[None], attn_mask=part.mask,
                                                   is_causal=part.mask is None, scale=scaling)[0]


def _attend_rows(view: View, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> torch.Tensor:
    """The decoding rows. query: [heads, n, head_dim], key and value: [kv_heads, n, head_dim]; returns query's shape."""
    keys, values = view.cache.keys[layer], view.cache.values[layer]
    heads, n, size = query.shape
    keys[view.rows, :, view.positions] = key.transpose(0, 1)
    values[view.rows, :, view.positions] = value.transpose(0, 1)
    # The query heads that share a key head are laid along the query axis: no key is repeated in memory.
    grouped = query.transpose(0, 1).reshape(n, keys.shape[1], heads // keys.shape[1], size)
    out = functional.scaled_dot_product_attention(grouped, keys[:n, :, :view.length], values[:n, :, :view.length],
                                                  attn_mask=view.mask, scale=scaling)
    return out.reshape(n, heads, size).transpose(0, 1)


def attend(module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, *, scaling: float,
           view: View, **_: Any) -> tuple[torch.Tensor, None]:
    """Attention layer: writes key and value [1, kv_heads, tokens, head_dim] into the cache, reads what `view` says.

    query: [1, heads, tokens, head_dim]. Returns [1, tokens, heads, head_dim], as transformers expects.
    """
    outs, at = [], 0
    for part in view.parts:
        outs.append(_attend_part(view, part, module.layer_idx, *(x[0, :, at:at + part.tokens] for x in (query, key, value)), scaling))
        at += part.tokens
    if view.rows is not None:
        outs.append(_attend_rows(view, module.layer_idx, *(x[0, :, at:] for x in (query, key, value)), scaling))
    out = outs[0] if len(outs) == 1 else torch.cat(outs, 1)
    return out.transpose(0, 1)[None], None


AttentionInterface.register(IMPLEMENTATION, attend)
