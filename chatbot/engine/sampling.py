"""Drawing the next token of every running answer."""

from __future__ import annotations

import torch

CANDIDATES = 1024
"""Most likely tokens that are looked at for top-p first; only if they don't hold its share is the whole vocabulary sorted."""


def nucleus(probabilities: torch.Tensor, top_p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The fewest most likely tokens that together reach `top_p`: (their probabilities, their ids), both [k], falling.

    probabilities: [vocabulary], together 1.
    """
    values, ids = torch.topk(probabilities, min(CANDIDATES, len(probabilities)))
    if values.sum() < top_p:
        values, ids = torch.sort(probabilities, descending=True)
    before = values.cumsum(0) - values
    kept = int((before < top_p).sum())
    return values[:kept], ids[:kept]


def draw(logits: torch.Tensor, temperature: float, top_p: float, generator: torch.Generator | None) -> int:
    """One token from logits [vocabulary]."""
    if temperature <= 0:
        return int(logits.argmax())
    probabilities = torch.softmax(logits.float() / temperature, -1)
    ids = None
    if top_p < 1:
        probabilities, ids = nucleus(probabilities, top_p)
    chosen = int(torch.multinomial(probabilities, 1, generator=generator))
    return chosen if ids is None else int(ids[chosen])


def draw_rows(logits: torch.Tensor, settings: list[tuple[float, float, torch.Generator | None]]) -> list[int]:
    """One token for each row of logits [n, vocabulary]; settings: (temperature, top_p, generator) of each row."""
    greedy = logits.argmax(-1).tolist()
    return [token if s[0] <= 0 else draw(row, *s) for token, row, s in zip(greedy, logits, settings, strict=True)]
