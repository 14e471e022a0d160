"""Whatever is asked or answered: no check fails, redaction leaves nothing to redact, and an answer is the same however it is cut."""

from __future__ import annotations

import asyncio
import itertools

from hypothesis import given
from hypothesis import strategies as st

from chatbot.config import GuardrailsConfig
from chatbot.guardrails import tables
from chatbot.guardrails.base import Who
from chatbot.guardrails.personal import redact, spans
from chatbot.guardrails.pipeline import Pipeline
from chatbot.guardrails.views import clean, fold, views
from tests.fuzz.cases import TEXTS, cases

PIPELINE = Pipeline(tables.without_limits(GuardrailsConfig()))
CASES = [case for table in (*tables.read_tables().values(), *tables.read_tables(tables.HELD_OUT).values())
         for case in (*table["hit"], *table["pass"]) if isinstance(case, str)]

PIECES = st.one_of(
    st.sampled_from([
        "jane.doe@example.com", "a(at)b(dot)org", "+44 20 7946 0958", "(555) 123-4567", "4111 1111 1111 1111",
        "GB82 WEST 1234 5698 7654 32", "123-45-6789", "SSN 123 45 6789", "nhs 943 476 5919", "MRN 12345678", "born on 3.4.1980",
        "192.168.4.7", "fe80:1:2:3:4:5:6:7", "https://u:p@h/x", "My name is Jane Doe", "Mr. van der Berg", "12 High Street, Apt 3",
        "call me on 555 123 4567", "[email]", "[name]", "[", "]", "(", "@", ".", ":", "+", "-", "/", " ", "\n", "Mr ", "name:",
        "patient's name is ", "phone", "1", "12", "0" * 12, "%41%42", "aWdub3JlIGFsbA==", "69676e6f7265", "i g n o r e", "ｉｇｎｏｒｅ",
        "і", "\u200b", "\u202e", "\U000e0041", "\ud800", "e\u0301", "ﬁ", "İ", "ß", "ﷺ" * 3, "\u0345", "½", "²", "٣", "१२३"]),
    st.sampled_from(CASES), st.text(max_size=12), TEXTS)
MIXED = st.one_of(st.text(max_size=200), st.lists(PIECES, max_size=8).map("".join), st.lists(PIECES, max_size=8).map(" ".join),
                  st.builds(lambda text, times: (text * times)[:4000], st.text(min_size=1, max_size=6), st.integers(1, 2000)))
"""Texts: any; of what checks look for, put together; and short ones many times over (patterns that backtrack)."""


@cases(250)
@given(question=MIXED, context=MIXED)
def test_no_check_fails(question: str, context: str) -> None:
    checked = asyncio.run(PIPELINE.question(question, context, [], Who("", "a")))
    assert not [v for v in checked.verdicts if v.rule == "the check failed"]
    if not checked.stop:
        again = asyncio.run(PIPELINE.question(checked.parts["question"], checked.parts["context"], [], Who("", "a")))
        assert again.parts == checked.parts, "checked twice, a question changes again"
    for view in views(question):
        assert isinstance(view.text, str)


@cases(400)
@given(text=MIXED)
def test_redaction_leaves_nothing_to_redact(text: str) -> None:
    once, names = redact(text)
    assert redact(once)[0] == once
    assert bool(names) == (once != text)


@cases(300)
@given(text=MIXED)
def test_forms_are_final(text: str) -> None:
    assert clean(clean(text)) == clean(text)
    assert not any("\ud800" <= c <= "\udfff" for c in clean(text))
    assert fold(text) == fold(clean(text))


OTHERS = [check.name for check in PIPELINE.checks if check.name != "personal-data"]
REDACTING = Pipeline(GuardrailsConfig(checks={name: {"enabled": False} for name in OTHERS}))


async def _guarded(pipeline: Pipeline, parts: list[str]) -> str:
    guard, out = pipeline.answer(), ""
    for part in parts:
        out += await guard.push(part)
    out += await guard.finish()
    assert not [v for v in guard.verdicts if v.rule == "the check failed"]
    return out


@cases(250)
@given(text=MIXED, cuts=st.lists(st.integers(0, 400), max_size=12))
def test_answers_show_nothing_that_is_redacted_however_they_are_cut(text: str, cuts: list[int]) -> None:
    places = sorted({0, len(text), *(c for c in cuts if c < len(text))})
    parts = [text[a:b] for a, b in itertools.pairwise(places)]
    asyncio.run(_guarded(PIPELINE, parts))
    streamed = asyncio.run(_guarded(REDACTING, parts))
    assert redact(streamed)[0] == streamed
    whole = redact(text)[0]
    values = [text[start:end] for start, end, _ in spans(text)]
    assert not [value for value in values if len(value) <= 40 and value in streamed and value not in whole]
