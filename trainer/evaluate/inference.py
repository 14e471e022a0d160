"""Scoring and greedy generation: many continuations of prompts that are read once.

A batch of prompts is padded on the right and run through the model once (`prefill`). Its KV cache then serves everything that is
asked about these prompts: the log-likelihood of the reference answer (`score`), of each possible decision (`score`), and the greedy
answer (`generate`). Positions are given to the model explicitly and padding is masked, so a row's result does not depend on what
else is in its batch, up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from trainer.errors import UserError

LOGIT_BYTES = 256 << 20
"""Float32 logits that are held at once."""


@dataclass
class Prefix:
    """A batch of prompts that the model has read."""

    cache: DynamicCache
    """Keys and values, [rows, heads, width, head size] each layer."""
    mask: torch.Tensor
    """int64 [rows, width]: 1 where the cache holds a token."""
    lengths: torch.Tensor
    """int64 [rows]: tokens of each prompt."""
    last: torch.Tensor
    """[rows, hidden]: output at each prompt's last token."""


def _padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids padded with 0 on the right, and their lengths: int64 [rows, width], int64 [rows]."""
    lengths = torch.tensor([len(row) for row in rows])
    tokens = torch.zeros(len(rows), int(lengths.max()), dtype=torch.int64)
    for i, row in enumerate(rows):
        tokens[i, :len(row)] = torch.as_tensor(row)
    return tokens.to(device), lengths.to(device)


class Reader:
    """A model that is asked about prompts. `model` is a causal language model of transformers, on its device."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model.eval()
        self.device = model.get_input_embeddings().weight.device
        self.decoder: Any = model.get_decoder()
        self.head: Any = model.get_output_embeddings()

    @torch.inference_mode()
    def prefill(self, prompts: Sequence[Sequence[int]]) -> Prefix:
        """Read prompts of at least one token each."""
        tokens, lengths = _padded(prompts, self.device)
        width = torch.arange(tokens.shape[1], device=self.device)
        mask = (width < lengths[:, None]).long()
        cache = DynamicCache(config=self.model.config)
        hidden = self._forward(tokens, mask, width.expand_as(tokens), cache)
        return Prefix(cache, mask, lengths, hidden[torch.arange(len(lengths), device=self.device), lengths - 1])

    def _forward(self, tokens: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
        output = self.decoder(input_ids=tokens, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True)
        return output.last_hidden_state

    def _log_probability(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Log-probability of `targets` [n] after `hidden` [n, hidden size], float32 [n]; logits in blocks of LOGIT_BYTES."""
        block = max(1, LOGIT_BYTES // (4 * self.head.weight.shape[0]))
        parts = []
        for h, t in zip(hidden.split(block), targets.split(block), strict=True):
            logits = self.head(h.to(self.head.weight.device)).float()
            parts.append((logits.gather(1, t[:, None])[:, 0] - logits.logsumexp(1)).to(self.device))
        return torch.cat(parts)

    @torch.inference_mode()
    def score(self, prefix: Prefix, continuations: Sequence[Sequence[Sequence[int]]]) -> list[list[float]]:
        """Sum of the log-probabilities of each continuation's tokens: `continuations[i]` are those of prompt i, each of at least
        one token. The prefix is as before afterwards."""
        results: list[list[float]] = [[] for _ in continuations]
        for j in range(max(map(len, continuations))):  # one after the other: the cache is used in place, never copied
            values = self._score_one(prefix, [row[min(j, len(row) - 1)] for row in continuations])
            for i, value in enumerate(values):
                if j < len(continuations[i]):
                    results[i].append(value)
        return results

    def _score_one(self, prefix: Prefix, continuations: Sequence[Sequence[int]]) -> list[float]:
        """`score` for one continuation of each prompt."""
        tokens, lengths = _padded(continuations, self.device)
        total = self._log_probability(prefix.last, tokens[:, 0]).double()
        width = tokens.shape[1] - 1
        if width:
            inside = torch.arange(1, width + 1, device=self.device) < lengths[:, None]
            positions = prefix.lengths[:, None] + torch.arange(width, device=self.device)
            hidden = self._forward(tokens[:, :-1], torch.cat([prefix.mask, inside.long()], 1), positions, prefix.cache)
            prefix.cache.crop(-width)
            each = self._log_probability(hidden[inside], tokens[:, 1:][inside]).double()
            total.index_add_(0, inside.nonzero()[:, 0], each)
        return total.tolist()

    @torch.inference_mode()
    def generate(self, prefix: Prefix, max_new_tokens: int, stop: Collection[int],
                 on_tokens: Callable[[int], None] = lambda n: None) -> list[list[int]]:
        """The greedy continuation of each prompt, up to `max_new_tokens` or a token of `stop` (which is not returned).

        Uses up the prefix. Rows that have ended leave the batch. `on_tokens` hears how many tokens each step made.
        """
        rows = len(prefix.lengths)
        answers: list[list[int]] = [[] for _ in range(rows)]
        alive = list(range(rows))  # the row in each place of the batch
        ended: set[int] = set()
        hidden, positions, mask, cache = prefix.last, prefix.lengths, prefix.mask, prefix.cache
        for _ in range(max_new_tokens):
            chosen = self.head(hidden.to(self.head.weight.device)).argmax(-1).to(self.device)
            made = 0
            for row, token in zip(alive, chosen.tolist(), strict=True):
                if row in ended:
                    continue
                if token in stop:
                    ended.add(row)
                else:
                    answers[row].append(token)
                    made += 1
            on_tokens(made)
            if len(ended) == rows or not made:
                break
            left = [place for place, row in enumerate(alive) if row not in ended]
            if len(left) <= 0.75 * len(alive):  # shrinking copies the cache, so not for every row that ends
                keep = torch.tensor(left, device=self.device)
                cache.batch_select_indices(keep)
                alive = [alive[place] for place in left]
                chosen, positions, mask = chosen[keep], positions[keep], mask[keep]
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
            hidden = self._forward(chosen[:, None], mask, positions[:, None], cache)[:, 0]
            positions = positions + 1
        return answers


def token_budget(model: PreTrainedModel, device: torch.device) -> int:
    """Tokens (rows times width) of a batch: what a sixth of the free memory holds as KV cache, within sensible limits.

    On a CPU more than a few thousand tokens gain nothing in prefill, and generation is fast enough from a dozen rows on.
    """
    if device.type != "cuda":
        return 8192
    config = model.config
    heads = config.num_key_value_heads or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    free, _ = torch.cuda.mem_get_info(device)
    return max(1024, min(131072, int(free / 6 / (2 * config.num_hidden_layers * heads * size * model.dtype.itemsize))))


def batches(lengths: Sequence[int], budget: int, most_rows: int = 64) -> Iterator[list[int]]:
    """Indices of rows in batches of similar length, the longest first (so that memory is short at once or never).

    rows * longest <= budget, but at least one row.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    start = 0
    while start < len(order):
        rows = max(1, min(most_rows, budget // max(1, lengths[order[start]])))
        yield order[start:start + rows]
        start += rows


def halving(rows: list[int], work: Callable[[list[int]], None]) -> None:
    """`work(rows)`; where the device's memory does not hold the batch, its halves one after the other.

    `work` must keep nothing of a batch that failed. UserError if a single row does not fit.
    """
    try:
        work(rows)
        return
    except torch.OutOfMemoryError as error:
        if len(rows) == 1:
            raise UserError("The GPU's memory does not hold the model and one held-out row. Lower run.data.max_tokens or "
                            "run.evaluation.max_new_tokens, or evaluate on a larger GPU.") from error
    torch.cuda.empty_cache()  # outside the handler: the traceback would hold the failed batch's tensors
    halving(rows[:len(rows) // 2], work)
    halving(rows[len(rows) // 2:], work)
