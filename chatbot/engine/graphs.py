"""The decoding step as CUDA graphs: at small batches a step's time is otherwise that of launching its kernels one by one.

One graph for each pair of (rows rounded up to a power of two, length rounded up to LENGTH_STEP), recorded when first needed. Rows
beyond the running ones write to the cache's dump position and their logits are dropped.
"""

from __future__ import annotations

from typing import Any

import torch

from chatbot.engine.cache import Cache, view_of

LENGTH_STEP = 512
"""Granularity of the attention's length: it reads up to this many positions too many, and saves as many graphs."""


class DecodeGraphs:
    """Recorded decoding steps of one model."""

    def __init__(self, model: Any, cache: Cache) -> None:
        self.model, self.cache = model, cache
        device = cache.keys[0].device
        self.ids = torch.zeros(cache.rows, dtype=torch.int64, device=device)
        self.positions = torch.full((cache.rows,), cache.length, dtype=torch.int64, device=device)
        self.row_ids = torch.arange(cache.rows, device=device)
        self.recorded: dict[tuple[int, int], tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}
        self.pool: Any = None

    def _step(self, rows: int, length: int) -> torch.Tensor:
        view = view_of(self.cache, (), self.row_ids[:rows], self.positions[:rows], length)
        return self.model(input_ids=self.ids[None, :rows], position_ids=self.positions[None, :rows], use_cache=False, view=view).logits[0]

    def _record(self, rows: int, length: int) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # kernels are chosen and workspaces taken outside the recording
                self._step(rows, length)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            logits = self._step(rows, length)
        self.pool = self.pool or graph.pool()
        return graph, logits

    def run(self, tokens: list[int], positions: list[int]) -> torch.Tensor:
        """Logits [n, vocabulary] of the next tokens; valid until the next call."""
        n = len(tokens)
        rows = min(1 << (n - 1).bit_length(), self.cache.rows)
        length = min(-(-(max(positions) + 1) // LENGTH_STEP) * LENGTH_STEP, self.cache.length)
        padding = rows - n
        self.ids[:rows].copy_(torch.tensor(tokens + [0] * padding))
        self.positions[:rows].copy_(torch.tensor(positions + [self.cache.length] * padding))
        if (rows, length) not in self.recorded:
            self.recorded[rows, length] = self._record(rows, length)
        graph, logits = self.recorded[rows, length]
        graph.replay()
        return logits[:n]
