"""Scores and greedy answers against transformers' own. Run: python -m pytest tests/trainer/test_evaluate_inference.py"""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from trainer.errors import UserError
from trainer.evaluate.inference import Reader, batches, halving


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(3)
    config = LlamaConfig(vocab_size=300, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=6,
                         num_key_value_heads=2, max_position_embeddings=256, eos_token_id=2, bos_token_id=1, initializer_range=0.3)
    return LlamaForCausalLM(config).eval()


def prompts(count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(count)
    return [torch.randint(3, 300, (int(n),), generator=generator).tolist()
            for n in torch.randint(1, 40, (count,), generator=generator)]


@torch.inference_mode()
def plain_score(model: LlamaForCausalLM, prompt: list[int], continuation: list[int]) -> float:
    logits = model(torch.tensor([prompt + continuation])).logits[0].log_softmax(-1)
    return sum(float(logits[len(prompt) - 1 + i, t]) for i, t in enumerate(continuation))


def test_scores_are_those_of_single_unpadded_rows(model: LlamaForCausalLM) -> None:
    reader, rows = Reader(model), prompts(7)
    several = [[[5], [6, 7], [8, 9, 10, 11]][:1 + i % 3] for i in range(7)]
    one = [[[*p[::-1][:9], 4]] for p in rows]
    prefix = reader.prefill(rows)
    first, second, third = (reader.score(prefix, c) for c in (several, one, several))
    assert first == third  # asking does not change the prefix
    for got, asked in ((first, several), (second, one)):
        for prompt, values, continuations in zip(rows, got, asked, strict=True):
            assert values == pytest.approx([plain_score(model, prompt, c) for c in continuations], abs=1e-4)


def test_generation_is_that_of_transformers(model: LlamaForCausalLM) -> None:
    reader, rows = Reader(model), prompts(9)
    stop = {2, *range(60, 90)}  # ends at different lengths, so that rows leave the batch
    expected = []
    for row in rows:
        out = model.generate(torch.tensor([row]), attention_mask=torch.ones(1, len(row)), max_new_tokens=24, do_sample=False,
                             eos_token_id=sorted(stop), pad_token_id=0)[0, len(row):].tolist()
        expected.append(out[:-1] if out[-1] in stop else out)
    made: list[int] = []
    prefix = reader.prefill(rows)
    reader.score(prefix, [[[5, 6, 7]]] * 9)
    answers = reader.generate(prefix, 24, stop, made.append)
    assert answers == expected
    assert len({len(a) for a in answers}) > 2 and sum(made) == sum(map(len, answers))


def test_a_row_does_not_depend_on_its_batch(model: LlamaForCausalLM) -> None:
    reader, rows = Reader(model), prompts(6)
    together = reader.generate(reader.prefill(rows), 12, {2})
    assert together == [reader.generate(reader.prefill([row]), 12, {2})[0] for row in rows]


def test_batches_hold_every_row_once_within_the_budget() -> None:
    lengths = [5, 100, 7, 7, 30, 1, 99, 64]
    made = list(batches(lengths, 128, most_rows=3))
    assert sorted(i for b in made for i in b) == list(range(8))
    assert made[0] == [1]
    for batch in made:
        assert len(batch) <= 3 and (len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= 128)


def test_halving() -> None:
    done: list[int] = []

    def work(rows: list[int]) -> None:
        if len(rows) > 2:
            raise torch.OutOfMemoryError("too much")
        done.extend(rows)

    halving([3, 1, 4, 1, 5], work)
    assert done == [3, 1, 4, 1, 5]

    def never(rows: list[int]) -> None:
        raise torch.OutOfMemoryError("too much")

    with pytest.raises(UserError, match="one held-out row"):
        halving([1, 2], never)
