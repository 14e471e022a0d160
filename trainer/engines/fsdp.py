"""PyTorch FSDP2: float32 weights, gradients and optimizer state in row shards; bfloat16 weights are gathered layer by layer.

run.engine.zero_stage decides what a step of several micro-batches repeats. 3: weights are gathered for each forward and each backward
pass, gradients reduced after each micro-batch. 2: the gathered weights stay from the first forward to the last backward pass. 1:
gradients too, summed whole on each rank, are reduced once, in the last micro-batch's backward pass.

Hybrid sharding (run.engine.shard_group: node) shards inside a node and replicates across nodes: gathers stay inside, and the
gradients cross the slow network once a step, after the last micro-batch, already reduced inside.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from trainer.config import Config, ConfigError
from trainer.engines.layers import KEEP_ALL, Checkpointing, decoder_layers
from trainer.engines.optimizer import global_norm
from trainer.engines.torch_engine import TorchEngine, backward_all
from trainer.model.load import DTYPES, local_range

if TYPE_CHECKING:
    from trainer.data.loader import PackedBatch


def node_sizes(world: int) -> list[int]:
    """Numbers of consecutive ranks on the same node (LOCAL_WORLD_SIZE, as Ray Train and torchrun set it). Collective."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    sizes: list[int] = [0] * world
    dist.all_gather_object(sizes, local)
    out, rank = [], 0
    while rank < world:
        out.append(sizes[rank])
        rank += sizes[rank]
    return out


def make_mesh(config: Config, device: torch.device, world: int) -> DeviceMesh:
    """(world) or (nodes, ranks of a node); `auto` is decided before. ConfigError if nodes differ in size."""
    if config.run.engine.shard_group != "node":
        return init_device_mesh(device.type, (world,), mesh_dim_names=("shard",))
    sizes = node_sizes(world)
    if len(set(sizes)) != 1 or sum(sizes) != world:
        raise ConfigError("run.engine.shard_group", "node", f"The nodes hold {sizes} workers; shard groups must be of one size. "
                          "Give each node the same number of workers, or shard over the world.")
    return init_device_mesh(device.type, (len(sizes), sizes[0]), mesh_dim_names=("replicate", "shard"))


class FsdpEngine(TorchEngine):
    """See the module's text."""

    def __init__(self, config: Config, tokens: int | None, device: torch.device, rank: int, world: int,
                 checkpointing: Checkpointing = KEEP_ALL) -> None:
        super().__init__(config, tokens, device, rank, world)
        self._offload = config.run.engine.offload == "cpu" and device.type == "cuda"
        self.mesh = make_mesh(config, device, world)
        self._hybrid = self.mesh.ndim == 2
        self._stage = config.run.engine.zero_stage
        full = config.run.method.kind == "full"
        # Trained weights are float32 shards. Adapters come beside frozen weights of the computing type, which FSDP gathers as they are.
        self._build(torch.float32 if full else self.dtype, self._shard, checkpointing)
        self._start_optimizer()

    def _shard(self, model: Any) -> None:
        engine = self.config.run.engine
        low = self.dtype != torch.float32
        policy = MixedPrecisionPolicy(param_dtype=self.dtype if low else None,
                                      reduce_dtype=DTYPES[engine.reduce_dtype] if low else None)
        offload = CPUOffloadPolicy() if self._offload else OffloadPolicy()
        options: dict[str, Any] = {"mesh": self.mesh, "mp_policy": policy, "offload_policy": offload}
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.dtype != torch.float32:
                parameter.data = parameter.data.float()  # the masters of adapters
        for layer in decoder_layers(model):
            fully_shard(layer, reshard_after_forward=self._stage == 3, **options)
        if model.lm_head.weight is not model.model.embed_tokens.weight:
            fully_shard(model.model.embed_tokens, reshard_after_forward=self._stage == 3, **options)
            fully_shard([model.model.norm, model.lm_head], reshard_after_forward=False, **options)
        fully_shard(model, **options)  # a tied embedding stays with the root: one gather serves both of its uses

    def _weights_device(self) -> torch.device:
        return torch.device("cpu") if self._offload else self.device

    @property
    def lockstep_group(self) -> int:
        """All ranks, or with hybrid sharding those of a node: also with stage 1, where a rank of fewer micro-batches would wait in its last
        backward pass, which reduces layer by layer, for the last one of the others, and they for its."""
        return self.mesh.get_local_rank("replicate") if self._hybrid else 0

    def forward_backward(self, batches: Sequence[PackedBatch], loss_tokens: int) -> torch.Tensor:
        model: FSDPModule = self.model  # type: ignore[assignment]

        def before(last: bool) -> None:
            if self._stage < 3:
                model.set_reshard_after_backward(last)
            if self._stage == 1:
                model.set_requires_gradient_sync(last)
                return
            # FSDP then leaves the last reductions to run beside the next forward pass (and gathers one group in vain in the last
            # backward pass, which is worth it only where there are such reductions).
            model.set_is_last_backward(last)
            if self._hybrid:
                model.set_requires_all_reduce(last)

        # FSDP divides by the number of ranks.
        return backward_all(self, batches, self.world / loss_tokens, before)

    def step(self, learning_rate: float) -> torch.Tensor:
        parameters: list[Any] = [p for _, p in self._trained()]
        gradients = [p.grad.to_local().view(-1) if p.grad is not None else torch.zeros_like(m)
                     for p, (m, _) in zip(parameters, self._masters(), strict=True)]
        norm = global_norm(gradients, self.device, self.mesh.get_group("shard"), sharded=self.world > 1)
        self.optimizer.step([m for m, _ in self._masters()], gradients, learning_rate, norm.cpu() if self._offload else norm)
        for parameter in parameters:
            parameter.grad = None
        return norm

    def evaluate(self, batches: Iterable[PackedBatch]) -> tuple[float, int]:
        try:
            return super().evaluate(batches)
        finally:  # no backward follows that would do it, and `pieces` must be shards
            for module in self.model.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()

    def _masters(self) -> list[tuple[torch.Tensor, int]]:
        return [local_range(p) for _, p in self._trained()]

    @property
    def _writes(self) -> bool:
        return not self._hybrid or self.mesh.get_local_rank("replicate") == 0
