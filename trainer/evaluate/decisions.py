"""Yes, no or maybe by log-likelihood, with lm-evaluation-harness's prompt and with the run's own.

lm-evaluation-harness's task `pubmedqa` (lm_eval/tasks/pubmedqa) is a multiple choice without examples: the context is
"Abstract: {contexts, one a line}\\nQuestion: {question}\\nAnswer:", the continuations " yes", " no" and " maybe", and the answer the
one with the greatest sum of log-probabilities, the first of equals. Text is encoded with the tokenizer's own special tokens, context
and continuation together, and cut where the context alone ends; what is too long loses tokens on the left.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from trainer.data.formats import DECISION, encode
from trainer.evaluate.rows import CHOICES, Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Question = tuple[list[int], list[list[int]]]
"""Tokens of a prompt, and of each choice after it."""


def harness_prompt(row: Row) -> str:
    """lm-evaluation-harness's text for a PubMedQA row. A run without contexts is asked as the harness asks a row that has none."""
    return f"Abstract: {row.context}\nQuestion: {row.question}\nAnswer:"


def encode_pair(tokenizer: PreTrainedTokenizerBase, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Tokens of the context and of the continuation, as lm-evaluation-harness splits them (`TemplateLM._encode_pair`)."""
    spaces = len(context) - len(context.rstrip())
    if spaces:
        context, continuation = context[:-spaces], context[-spaces:] + continuation
    whole, before = tokenizer.encode(context + continuation), tokenizer.encode(context)
    return before, whole[len(before):]


def harness_questions(row: Row, tokenizer: PreTrainedTokenizerBase, longest: int) -> list[Question]:
    """The row as lm-evaluation-harness asks it, for a model that reads at most `longest` tokens.

    One question with all choices; where the context must be cut, how much depends on the choice's length, and there is one question
    for each choice.
    """
    pairs = [encode_pair(tokenizer, harness_prompt(row), f" {choice}") for choice in CHOICES]
    cut = [(prompt[-max(1, longest + 1 - len(choice)):], choice) for prompt, choice in pairs]  # the last token is only predicted
    if all(prompt == cut[0][0] for prompt, _ in cut):
        return [(cut[0][0], [choice for _, choice in cut])]
    return [(prompt, [choice]) for prompt, choice in cut]


def own_question(row: Row, tokenizer: PreTrainedTokenizerBase, decision: bool) -> Question:
    """The row in the run's own prompt, asked for the decision at once: after the words that announce it if the run's answers end
    with a decision (`decision`), else as the answer itself."""
    lead = DECISION.lstrip() if decision else ""
    return row.prompt, [encode(tokenizer, lead + choice) for choice in CHOICES]


def chosen(scores: Sequence[float]) -> int:
    """Index of the greatest score, the first of equals."""
    return max(range(len(scores)), key=lambda i: (scores[i], -i))
