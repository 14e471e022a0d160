"""The guardrails' word at a promotion."""

from __future__ import annotations

from types import SimpleNamespace

from chatbot.config import GuardrailsConfig
from tools import environments
from tools.sample_check import check_samples, guardrails_of

GOOD = {"id": "a", "question": "Does vitamin D reduce respiratory infections?", "context": "", "tuned": "It did in adults.\nDecision: yes"}


def texts(samples, config=None):
    return [(c["passed"], c["text"]) for c in check_samples({"samples": samples}, config or GuardrailsConfig())]


def test_a_plain_answer_passes():
    ((passed, text),) = texts([GOOD])
    assert passed
    assert "sample a" in text


def test_what_the_chatbot_would_redact_or_end_fails_and_names_check_and_sample():
    personal = {**GOOD, "id": "b", "tuned": "Write to john.doe@example.com for the dose."}
    loop = {**GOOD, "id": "c", "tuned": "the trial " * 60}
    results = texts([GOOD, personal, loop])
    assert [passed for passed, _ in results] == [True, False, False]
    assert "sample b" in results[1][1] and "personal-data" in results[1][1] and "email" in results[1][1]
    assert "sample c" in results[2][1] and "repetition" in results[2][1]


def test_a_question_that_the_target_would_stop_fails():
    ((passed, text),) = texts([{**GOOD, "question": "x" * 50}], GuardrailsConfig(checks={"length": {"max_question": 20}}))
    assert not passed
    assert "length" in text


def test_many_samples_do_not_meet_the_rate_limit():
    assert all(passed for passed, _ in texts([GOOD] * 40))


def test_environments_have_usable_guardrails():
    for name in environments.names():
        guardrails_of(environments.load(name))


def test_no_samples_are_no_evidence():
    ((passed, text),) = texts([])
    assert not passed
    assert "evaluation.samples" in text


def test_the_target_decides_which_checks_ask():
    checks = {"personal-data": {"enabled": False}, "safety-model": {"enabled": True, "url": "http://guard:8000/v1"}}
    config = guardrails_of(SimpleNamespace(values={"chatbot": {"config": {"guardrails": {"checks": checks}}}}))
    assert config.checks == {"personal-data": {"enabled": False}}
    assert texts([{**GOOD, "tuned": "Write to john.doe@example.com for it."}], config)[0][0]
