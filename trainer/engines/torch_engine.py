"""What the engines without DeepSpeed share: building the model, the step, evaluation, state."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from trainer.config import Config
from trainer.engines.base import Engine, Piece
from trainer.engines.layers import Checkpointing, prepare_layers
from trainer.engines.optimizer import AdamW
from trainer.model.float8 import use_float8
from trainer.model.load import DTYPES, base_config, empty_model, fill, held, materialise, model_config, open_weights
from trainer.model.loss import token_loss_sum, use_packed_forward
from trainer.model.methods import MethodWeights, canonical, quantise, shape_for_method

if TYPE_CHECKING:
    from trainer.data.loader import PackedBatch


class TorchEngine(Engine):
    """A model whose trained parameters this rank updates itself, in float32."""

    optimizer: AdamW
    holds_whole_weights = False
    """Whether each rank holds all weights."""

    def __init__(self, config: Config, tokens: int | None, device: torch.device, rank: int, world: int) -> None:
        self.config, self.device, self.rank, self.world = config, device, rank, world
        self.target = model_config(config, tokens)
        self.dtype = DTYPES[config.run.model.dtype]
        """Type of the computation and of frozen weights."""

    def _build(self, dtype: torch.dtype, shard: Callable[[nn.Module], None], checkpointing: Checkpointing) -> None:
        """Make the model: empty, shaped by the method, sharded by `shard`, given memory, filled."""
        run = self.config.run
        model = empty_model(self.target, dtype)
        shape_for_method(model, run.method, base_config(self.config).vocab_size, self.dtype)
        use_float8(model, run.engine, self.device, self.holds_whole_weights)
        use_packed_forward(model)
        prepare_layers(model, run.engine, checkpointing, self.device)
        base = open_weights(self.config, self.target)
        weights = MethodWeights(base, model, run.seed)
        quantise(model, base, self.device, self.dtype)
        shard(model)
        materialise(model, self._weights_device(), self.device)
        fill(held(model, canonical), weights)
        model.train()
        self.model = model

    def _weights_device(self) -> torch.device:
        return self.device

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        """Parameters that are trained, a tied one once; stable order."""
        return [(canonical(n), p) for n, p in self.model.named_parameters() if p.requires_grad]

    @abc.abstractmethod
    def _masters(self) -> list[tuple[torch.Tensor, int]]:
        """Of each trained parameter, this rank's part of the float32 master (1-D view) and its place in the flattened whole."""

    @property
    def _writes(self) -> bool:
        """Whether this rank's pieces are those that a checkpoint stores (the others are replicas)."""
        return True

    def _start_optimizer(self) -> None:
        trained = self._trained()
        self.optimizer = AdamW([n for n, _ in trained], [p.shape for _, p in trained], [m for m, _ in self._masters()],
                               self.config.run.train)

    def pieces(self) -> list[Piece]:
        weights = [(f"weights/{n}", p, m, s) for (n, p), (m, s) in zip(self._trained(), self._masters(), strict=True)]
        state = [(f"{kind}/{n.removeprefix('weights/')}", p, moment, s) for kind in ("exp_avg", "exp_avg_sq")
                 for (n, p, _, s), moment in zip(weights, getattr(self.optimizer, kind), strict=True)]
        return [Piece(name=n, shape=tuple(p.shape), start=s, tensor=t, owned=self._writes) for n, p, t, s in [*weights, *state]
                if t.numel() or math.prod(p.shape) == 0]

    @torch.no_grad()
    def load_pieces(self, read: Callable[[str, int, torch.Tensor], None], step: int) -> None:
        for piece in self.pieces():
            host = torch.empty(piece.tensor.numel(), dtype=piece.tensor.dtype)
            read(piece.name, piece.start, host)
            piece.tensor.copy_(host)
        self.optimizer.set_step(step)
        self._after_load()

    def _after_load(self) -> None:
        """Bring the computing weights in line with the masters."""


def backward_all(engine: Engine, batches: Sequence[PackedBatch], factor: float, before: Callable[[bool], None]) -> torch.Tensor:
    """Forward and backward of each micro-batch, the loss multiplied by `factor`; `before(last)` is called before each."""
    total = torch.zeros((), device=engine.device)
    for index, batch in enumerate(batches):
        before(index == len(batches) - 1)
        loss = token_loss_sum(engine.model, batch, engine.device)
        (loss * factor).backward()
        total += loss.detach()
    return total
