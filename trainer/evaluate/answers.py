"""One model's results on held-out rows: losses, decisions and generated answers, row by row."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from transformers import PreTrainedModel

from trainer.evaluate.decisions import Question, harness_questions, own_question
from trainer.evaluate.inference import Reader, batches, halving, token_budget
from trainer.evaluate.rows import Row

Progress = Callable[[int, int, str], None]
"""Called with work done, work in all, and what is being done."""


@dataclass
class Result:
    """What a model made of one row."""

    index: int
    loss: float = 0.0
    """Sum of the negative log-likelihood over the target's tokens, in nats."""
    tokens: int = 0
    """Number of these tokens."""
    harness: list[float] = field(default_factory=list)
    """Log-likelihood of each choice after lm-evaluation-harness's prompt; empty if the row has no decision."""
    own: list[float] = field(default_factory=list)
    """The same after the run's own prompt."""
    answer: str | None = None
    """The greedy answer, if it was asked for."""
    answer_tokens: int = 0
    cut: bool = False
    """Whether the answer ran into the limit of new tokens."""


def evaluate_model(model: PreTrainedModel, tokenizer: Any, rows: Sequence[Row], generate: Collection[int], max_new_tokens: int,
                   stop: Collection[int], decision: bool,
                   progress: Progress = lambda done, total, text: None) -> list[dict[str, Any]]:
    """Results (as dicts) of one model on `rows`; those whose index is in `generate` are also answered in full.

    `stop`: tokens that end an answer; `decision`: the run's answers end with the decision. Deterministic for the same rows, device
    and type, up to rounding that depends on how many rows share a batch.
    """
    reader, budget = Reader(model), token_budget(model, model.device)
    results = {row.index: Result(row.index) for row in rows}
    longest = model.config.max_position_embeddings
    asked = [row for row in rows if row.decision]
    total, done = len(rows) + len(asked) + sum(row.index in generate for row in rows), 0

    def advance(rows: int, text: str) -> None:
        nonlocal done
        done += rows
        progress(done, total, text)

    def own(batch: list[Row]) -> None:
        prefix = reader.prefill([row.prompt for row in batch])
        questions = [own_question(row, tokenizer, decision)[1] if row.decision else [row.target[:1]] for row in batch]
        losses, decisions = reader.score(prefix, [[row.target] for row in batch]), reader.score(prefix, questions)
        for row, loss, scores in zip(batch, losses, decisions, strict=True):
            result = results[row.index]
            result.loss, result.tokens, result.own = -loss[0], len(row.target), scores if row.decision else []
        if answered := batch[0].index in generate:
            answers = reader.generate(prefix, max_new_tokens, stop)
            for row, tokens in zip(batch, answers, strict=True):
                result = results[row.index]
                result.answer = tokenizer.decode(tokens, skip_special_tokens=True).strip()
                result.answer_tokens, result.cut = len(tokens), len(tokens) == max_new_tokens
        advance(len(batch) * (2 if answered else 1), "loss and answers" if answered else "loss")

    for part in ([r for r in rows if r.index in generate], [r for r in rows if r.index not in generate]):
        room = [len(r.prompt) + max(len(r.target), max_new_tokens if r.index in generate else 0) for r in part]
        for indices in batches(room, budget):
            halving(indices, lambda chosen, part=part: own([part[i] for i in chosen]))  # type: ignore[misc]

    questions: list[tuple[Row, int, Question]] = [
        (row, place, question) for row in asked for place, question in enumerate(harness_questions(row, tokenizer, longest))]
    scored: dict[int, dict[int, list[float]]] = {row.index: {} for row in asked}

    def harness(chosen: list[int]) -> None:
        picked = [questions[i] for i in chosen]
        prefix = reader.prefill([prompt for _, _, (prompt, _) in picked])
        for (row, place, _), scores in zip(picked, reader.score(prefix, [choices for _, _, (_, choices) in picked]), strict=True):
            scored[row.index][place] = scores
        advance(sum(place == 0 for _, place, _ in picked), "decisions")

    for indices in batches([len(prompt) + max(map(len, choices)) for _, _, (prompt, choices) in questions], budget):
        halving(indices, harness)
    for index, parts in scored.items():
        results[index].harness = [score for place in sorted(parts) for score in parts[place]]
    return [asdict(results[row.index]) for row in rows]
