"""Yes, no or maybe as lm-evaluation-harness asks it. Run: python -m pytest tests/trainer/test_decisions.py"""

from __future__ import annotations

from typing import Any

import pytest

from tests.trainer.made_run import rows, tokenizer
from trainer.evaluate.decisions import chosen, encode_pair, harness_prompt, harness_questions, own_question
from trainer.evaluate.rows import Row


def row(**changes: Any) -> Row:
    made = rows(1)[0]
    return Row(**{"index": 0, **made, "reference": made["answer"], "prompt": [5, 6], "target": [7], **changes})


def test_prompt_is_the_harness_own() -> None:
    assert harness_prompt(row(context="One.\nTwo.", question="Why?")) == "Abstract: One.\nTwo.\nQuestion: Why?\nAnswer:"


@pytest.mark.parametrize("context", ["Answer:", "Answer: ", "Answer:\n"])
def test_pairs_are_cut_where_the_context_ends(context: str) -> None:
    made = tokenizer("instruction")
    before, after = encode_pair(made, context, " yes")
    assert before + after == made.encode(context + " yes") and before == made.encode(context.rstrip())


def test_long_contexts_lose_their_start() -> None:
    made = tokenizer("instruction")
    whole = made.encode(harness_prompt(row(context="word " * 500)))
    questions = harness_questions(row(context="word " * 500), made, 100)
    assert len(questions) == 3  # the choices have different lengths here
    for prompt, [choice] in questions:
        assert len(prompt) + len(choice) == 101  # the last token is only predicted
        assert prompt == whole[-len(prompt):]
    [(prompt, choices)] = harness_questions(row(), made, 512)
    assert prompt == made.encode(harness_prompt(row())) and len(choices) == 3


def test_own_prompt() -> None:
    made = tokenizer("instruction")
    prompt, choices = own_question(row(), made, True)
    assert prompt == [5, 6] and [made.decode(c) for c in choices] == ["Decision: yes", "Decision: no", "Decision: maybe"]
    assert [made.decode(c) for c in own_question(row(), made, False)[1]] == ["yes", "no", "maybe"]


def test_first_of_equals() -> None:
    assert chosen([-2.0, -1.0, -1.0]) == 1 and chosen([-1.0, -1.0, -1.0]) == 0
