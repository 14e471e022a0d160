"""Yes, no or maybe by log-likelihood, with lm-evaluation-harness's prompt and with the run's own.

lm-evaluation-harness's task `pubmedqa` (lm_eval/tasks/pubmedqa) is a multiple choice without examples: the context is
"Abstract: {contexts, one a line}\\nQuestion: {question}\\nAnswer:", the continuations " yes", " no" and " maybe", and the answer the
one with the greatest sum of log-probabilities, the first of equals. Text is encoded with the tokenizer's own special tokens, context
and continuation together, and cut where the context alone ends; what is too long loses tokens on the left.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from trainer.evaluate.rows import CHOICES, Row


class Encoder(Protocol):
    """What is needed of a tokenizer of transformers."""

    def encode(self, text: str, add_special_tokens: bool = ..., **kwargs: Any) -> list[int]: ...


Question = tuple[list[int], list[list[int]]]
"""Tokens of a prompt, and of each choice after it."""


def harness_prompt(row: Row) -> str:
    """lm-evaluation-harness's text for a PubMedQA row."""
    return f"Abstract: {row.context}\nQuestion: {row.question}\nAnswer:"


def encode_pair(tokenizer: Encoder, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Tokens of the context and of the continuation, as lm-evaluation-harness splits them (`TemplateLM._encode_pair`)."""
    spaces = len(context) - len(context.rstrip())
    if spaces:
        context, continuation = context[:-spaces], context[-spaces:] + continuation
    whole, before = tokenizer.encode(context + continuation), tokenizer.encode(context)
    return before, whole[len(before):]


def harness_question(row: Row, tokenizer: Encoder, longest: int) -> Question:
    """The row as lm-evaluation-harness asks it; at most `longest` tokens are read by the model."""
    pairs = [encode_pair(tokenizer, harness_prompt(row), f" {choice}") for choice in CHOICES]
    prompt, most = pairs[0][0], max(len(c) for _, c in pairs)
    return prompt[-max(1, longest + 1 - most):], [c for _, c in pairs]


def decision_lead(row: Row) -> str:
    """The text that the run's format puts between prompt and decision where the answer is left out ("Decision: "), or "".

    Found in the row's completion, so that it holds for every format: what stands before the answer, then what stands between the
    answer and the last mention of the decision.
    """
    at = row.completion.find(row.answer)
    if at < 0 or not row.decision:
        return ""
    before, rest = row.completion[:at], row.completion[at + len(row.answer):]
    end = rest.lower().rfind(row.decision)
    return before + rest[:end].lstrip() if end >= 0 else before


def own_question(row: Row, tokenizer: Encoder) -> Question:
    """The row in the run's own prompt, asked for the decision at once."""
    lead = decision_lead(row)
    texts = [lead + choice if lead else f" {choice}" for choice in CHOICES]
    return row.prompt, [tokenizer.encode(text, add_special_tokens=False) for text in texts]


def chosen(scores: Sequence[float]) -> int:
    """Index of the greatest score, the first of equals."""
    return max(range(len(scores)), key=lambda i: (scores[i], -i))
