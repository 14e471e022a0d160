"""The learning rate of a step."""

from __future__ import annotations

import math

from trainer.config import TrainConfig


def learning_rate(step: int, total: int, config: TrainConfig) -> float:
    """Learning rate of the update number `step` (1 is the first) of `total`.

    Rises linearly over the warm-up and reaches the peak with its last update (no update is spent on a rate of 0), then falls to
    `min_learning_rate`, which the last update has. Steps beyond `total` (packing came out a little different) stay there.
    """
    warmup = math.ceil(config.warmup_share * total)
    if step <= warmup:
        return config.learning_rate * step / warmup
    if config.schedule == "constant":
        return config.learning_rate
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    share = 1.0 - done if config.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    return config.min_learning_rate + (config.learning_rate - config.min_learning_rate) * share
