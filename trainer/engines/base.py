"""What the training loop and the checkpoints need of an engine."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from trainer.data.loader import PackedBatch


@dataclass(frozen=True)
class Piece:
    """A contiguous range of one flattened tensor of the training state, as this rank holds it.

    FSDP2's row shards, ZeRO-3's flat partitions and ZeRO-1/2's group partitions are all such ranges, so one checkpoint format
    serves every engine and every world size.
    """

    name: str
    """`weights/<parameter>`, `exp_avg/<parameter>` or `exp_avg_sq/<parameter>`, with the parameter's name in Hugging Face's model."""
    shape: tuple[int, ...]
    """Shape of the whole tensor."""
    start: int
    """Index of the first element in the flattened whole."""
    tensor: torch.Tensor
    """The elements, 1-D, a view of the live state (device of the engine)."""
    owned: bool = True
    """False on replicas that another rank writes."""


class Engine(abc.ABC):
    """A model under training on this rank; every method is collective unless it says otherwise."""

    model: nn.Module
    device: torch.device
    rank: int
    world: int

    @abc.abstractmethod
    def forward_backward(self, batches: Sequence[PackedBatch], loss_tokens: int) -> torch.Tensor:
        """Accumulate the gradient of (sum of the loss over `batches` of all ranks) / `loss_tokens`.

        `batches` are this rank's micro-batches of one step (CPU tensors), `loss_tokens` the number of trained tokens of the step
        over all ranks. Gradients are reduced once, after the last micro-batch, where the engine can. Ranks may hold different
        numbers of tokens; only ranks of one `lockstep_group` must hold the same number of micro-batches.
        Returns this rank's loss sum, detached, on the device (no synchronisation).
        """

    @property
    def lockstep_group(self) -> int:
        """Ranks with the same number here must hold the same number of micro-batches in a step. Not collective."""
        return 0

    @property
    def timed_parts(self) -> list[nn.Module]:
        """Modules whose passes are nearly all of a rank's work, and in which nothing waits for another rank (trainer/train/busy.py)."""
        from trainer.engines.layers import decoder_layers

        return [*decoder_layers(self.model), self.model.lm_head]  # type: ignore[list-item]

    @abc.abstractmethod
    def step(self, learning_rate: float) -> torch.Tensor:
        """Clip, update, clear the gradients. Returns the global gradient norm before clipping (on the device)."""

    @property
    def forward_model(self) -> nn.Module:
        """What is called for a forward pass: the model, or a library's wrapper around it. Not collective."""
        return self.model

    def evaluate(self, batches: Iterable[PackedBatch]) -> tuple[float, int]:
        """Loss sum and trained tokens over this rank's batches, without gradients. Ranks must hold the same number of batches."""
        from trainer.model.loss import token_loss_sum

        total, tokens = torch.zeros((), dtype=torch.float64, device=self.device), 0
        self.forward_model.eval()
        try:
            with torch.no_grad():
                for batch in batches:
                    total += token_loss_sum(self.forward_model, batch, self.device)
                    tokens += batch.loss_tokens
        finally:
            self.forward_model.train()
        return total.item(), tokens

    @abc.abstractmethod
    def pieces(self) -> list[Piece]:
        """This rank's ranges of the weights that are trained and of the optimizer state. Not collective. Order is stable."""

    @abc.abstractmethod
    def load_pieces(self, read: Callable[[str, int, torch.Tensor], None], step: int) -> None:
        """Fill the state from a checkpoint: `read(name, start, out)` fills the 1-D CPU tensor `out`. `step` is the number of
        optimizer steps already done (AdamW's bias correction)."""

    def close(self) -> None:  # noqa: B027  # most engines keep nothing
        """Free what the process keeps beyond this object (global state of a library). Not collective; the engine is unusable after."""
