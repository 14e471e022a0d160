"""Small agreements between the ranks, on the CPU, beside the engine's own collectives."""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist


class Ranks:
    """A gloo group of its own over all ranks; alone (no process group, or one rank) every method is the identity.

    Each instance must be used by one thread only, in the same order on every rank: the loop and the checkpoint writer have one each.
    Creating one is collective. A lost rank raises RuntimeError in the others.
    """

    def __init__(self, timeout_s: float = 1800.0) -> None:
        self.world = dist.get_world_size() if dist.is_initialized() else 1
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self._group = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=timeout_s)) if self.world > 1 else None

    def sum(self, values: Sequence[float]) -> list[float]:
        """Element-wise sum over the ranks. A sum of float64 in the same order on every rank: all get the same bits."""
        if self._group is None:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, group=self._group)
        return tensor.tolist()

    def gather(self, values: Sequence[int]) -> list[list[int]]:
        """Every rank's integers, by rank; all give the same number of them."""
        if self._group is None:
            return [list(values)]
        mine = torch.tensor(values, dtype=torch.int64)
        out = [torch.empty_like(mine) for _ in range(self.world)]
        dist.all_gather(out, mine, group=self._group)
        return [t.tolist() for t in out]

    def from_first(self, values: Sequence[int]) -> list[int]:
        """Rank 0's integers (any number of them) on every rank."""
        if self._group is None:
            return list(values)
        count = torch.tensor([len(values)], dtype=torch.int64)
        dist.broadcast(count, 0, group=self._group)
        out = torch.tensor(values, dtype=torch.int64) if self.rank == 0 else torch.empty(int(count), dtype=torch.int64)
        if int(count):
            dist.broadcast(out, 0, group=self._group)
        return out.tolist()

    def gather_objects(self, value: Any) -> list[Any]:
        """Every rank's JSON-able object, by rank."""
        data = json.dumps(value).encode()
        sizes = [size for (size,) in self.gather([len(data)])]
        if self._group is None:
            return [json.loads(data)]
        mine = torch.zeros(max(sizes), dtype=torch.uint8)
        mine[:len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        out = [torch.empty_like(mine) for _ in sizes]
        dist.all_gather(out, mine, group=self._group)
        return [json.loads(t[:size].numpy().tobytes()) for t, size in zip(out, sizes, strict=True)]

    def barrier(self) -> None:
        """Until every rank is here."""
        self.sum([0.0])
