"""Engines: how the training state is spread over the workers, and how a step runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from trainer.config import Config
    from trainer.engines.base import Engine


def make_engine(config: Config, device: torch.device, rank: int, world: int, tokens: int | None = None,
                micro_batch: int = 0) -> Engine:
    """The engine that the configuration asks for. Collective; torch.distributed is initialised if `world` is above 1.

    `tokens`: entries of the tokenizer (default: of the run's dataset/tokenizer), to which the embedding is resized.
    `micro_batch`: most tokens of this rank's micro-batches (default: run.train.micro_batch_tokens); decides `checkpointing: auto`.
    """
    from trainer.engines.choose import choose
    from trainer.memory import release

    engine = choose(config, device, rank, world, tokens, micro_batch)
    release()
    return engine
