"""Engines: how the training state is spread over the workers, and how a step runs."""

from __future__ import annotations

import ctypes
import gc
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

    engine = choose(config, device, rank, world, tokens, micro_batch)
    if device.type == "cpu":
        _return_memory()
    return engine


def _return_memory() -> None:
    """Give what loading has freed back to the system: glibc would keep it (0.6 GiB for a model of 0.5), and the worker's memory
    limit counts it while it trains."""
    gc.collect()
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):  # glibc alone has it
        library.malloc_trim(0)
