"""Weights whole on every rank: one rank alone, and adapters beside frozen weights on any number of ranks.

No sharding machinery runs. With bfloat16 weights, float32 masters are kept beside them and gradients are summed in float32 over the
micro-batches (or in bfloat16: run.engine.reduce_dtype). Only adapters' gradients cross the network, in one all-reduce a step, so that
ranks may hold different numbers of micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import nn

from trainer.config import Config
from trainer.engines.layers import KEEP_ALL, Checkpointing
from trainer.engines.optimizer import global_norm
from trainer.engines.torch_engine import TorchEngine, backward_all

if TYPE_CHECKING:
    from trainer.data.loader import PackedBatch


class ReplicatedEngine(TorchEngine):
    """See the module's text."""

    holds_whole_weights = True

    def __init__(self, config: Config, tokens: int | None, device: torch.device, rank: int, world: int,
                 checkpointing: Checkpointing = KEEP_ALL) -> None:
        super().__init__(config, tokens, device, rank, world)
        self._build(self.dtype, lambda model: None, checkpointing)
        parameters = [p for _, p in self._trained()]
        separate = self.dtype != torch.float32
        self._copies = [p.detach().view(-1) for p in parameters] if separate else None
        self._master_tensors = [p.detach().view(-1).float() if separate else p.detach().view(-1) for p in parameters]
        self._allocate_gradients(parameters, torch.bfloat16 if separate and config.run.engine.reduce_dtype == "bfloat16" else torch.float32)
        self._start_optimizer()

    def _allocate_gradients(self, parameters: list[nn.Parameter], dtype: torch.dtype) -> None:
        """One flat buffer for all gradients. Of the parameters' type: they accumulate there in place; else each micro-batch's
        gradient is added as soon as it is whole, and freed."""
        self._gradient = torch.zeros(sum(p.numel() for p in parameters), dtype=dtype, device=self.device)
        self._parts = list(self._gradient.split([p.numel() for p in parameters]))
        self._fresh = True
        for parameter, part in zip(parameters, self._parts, strict=True):
            if parameter.dtype == dtype:
                parameter.grad = part.view_as(parameter)
            else:
                parameter.register_post_accumulate_grad_hook(self._adder(part))
        self._in_place = all(p.dtype == dtype for p in parameters)

    def _adder(self, part: torch.Tensor) -> Callable[[torch.Tensor], None]:
        def add(parameter: torch.Tensor) -> None:
            if parameter.grad is None:
                return
            (part.copy_ if self._fresh else part.add_)(parameter.grad.view(-1))
            parameter.grad = None
        return add

    @property
    def lockstep_group(self) -> int:
        return self.rank

    def forward_backward(self, batches: Sequence[PackedBatch], loss_tokens: int) -> torch.Tensor:
        total = torch.zeros((), device=self.device)
        for batch in batches:
            total += backward_all(self, [batch], 1.0 / loss_tokens, lambda last: None)
            self._fresh = False
        return total

    def step(self, learning_rate: float) -> torch.Tensor:
        if self._fresh and not self._in_place:
            self._gradient.zero_()  # this rank held no micro-batch
        if self.world > 1:
            dist.all_reduce(self._gradient)
        norm = global_norm([self._gradient], self.device, None, sharded=False)
        self.optimizer.step(self._master_tensors, self._parts, learning_rate, norm, self._copies)
        if self._in_place:
            self._gradient.zero_()
        self._fresh = True
        return norm

    def _masters(self) -> list[tuple[torch.Tensor, int]]:
        return [(m, 0) for m in self._master_tensors]

    @property
    def _writes(self) -> bool:
        return self.rank == 0

    def _after_load(self) -> None:
        if self._copies is not None:
            torch._foreach_copy_(self._copies, self._master_tensors)
