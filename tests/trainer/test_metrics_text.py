"""Text metrics against known values. Run: python -m pytest tests/trainer/test_metrics_text.py"""

from __future__ import annotations

import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trainer.evaluate.text import lcs_length, plain_words, repetition, rouge_l, squad_words, token_f1


@pytest.mark.parametrize(("prediction", "reference", "expected"), [
    ("The cat sat.", "a cat sat", 1.0),  # articles and punctuation do not count
    ("", "", 1.0),
    ("The", "a", 1.0),  # nothing is left of either
    ("", "cat", 0.0),
    ("cat", "", 0.0),
    ("cat dog", "cat", 2 * (1 / 2) * 1 / (1 / 2 + 1)),
    ("cat cat cat", "cat cat dog", 2 / 3),  # bags: two of three
    ("state-of-the-art", "stateoftheart", 1.0),  # punctuation goes before articles, so "the" is not a word here
    ("yes", "no", 0.0),
])
def test_token_f1(prediction: str, reference: str, expected: float) -> None:
    assert token_f1(prediction, reference) == pytest.approx(expected)


def test_squad_words() -> None:
    assert squad_words("  An apple,  a pear; THE plum!") == ["apple", "pear", "plum"]


@pytest.mark.parametrize(("prediction", "reference", "expected"), [
    # Lin (2004), section 3: reference "police killed the gunman"
    ("police kill the gunman", "police killed the gunman", 3 / 4),
    ("the gunman kill police", "police killed the gunman", 2 / 4),
    ("the gunman police killed", "police killed the gunman", 2 / 4),
    ("testing one two", "testing", 0.5),  # rouge-score's own test: precision 1/3, recall 1
    ("", "testing", 0.0),
    ("", "", 0.0),
    ("Aspirin, 100 mg!", "aspirin 100 mg", 1.0),
    ("état", "etat", 0.0),  # rouge-score's words are ASCII: "tat"
])
def test_rouge_l(prediction: str, reference: str, expected: float) -> None:
    assert rouge_l(prediction, reference) == pytest.approx(expected)


def _lcs_table(a: list[str], b: list[str]) -> int:
    row = [0] * (len(b) + 1)
    for x in a:
        previous = 0
        for j, y in enumerate(b, 1):
            previous, row[j] = row[j], previous + 1 if x == y else max(row[j], row[j - 1])
    return row[-1]


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # on a busy machine
@given(st.lists(st.sampled_from("abcd"), max_size=150), st.lists(st.sampled_from("abcd"), max_size=150))
def test_lcs_agrees_with_the_table(a: list[str], b: list[str]) -> None:
    assert lcs_length(a, b) == _lcs_table(a, b) == lcs_length(b, a)


def test_rouge_l_agrees_with_rouge_score() -> None:
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    rng = random.Random(5)
    words = ["aspirin", "Placebo", "p<0.05", "naïve", "the", "trial's", "β-blocker", "12.5", "no", "_", "up-to-date"]
    for _ in range(300):
        prediction, reference = (" ".join(rng.choices(words, k=rng.randrange(0, 40))) for _ in range(2))
        assert rouge_l(prediction, reference) == pytest.approx(scorer.score(reference, prediction)["rougeL"].fmeasure, abs=1e-12)


def test_plain_words_and_repetition() -> None:
    assert plain_words("Ｄoes ASPIRIN—(100 mg) hélp?_ß") == ["does", "aspirin", "100", "mg", "hélp", "ss"]
    assert repetition("yes") == 0.0
    assert repetition("one two three four five six") == 0.0
    assert repetition("this is a loop " * 20) > 0.9
