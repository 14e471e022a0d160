"""The guardrails' tables, the guard over a streamed answer, and what a configuration may change."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from chatbot.config import GuardrailsConfig
from chatbot.errors import ConfigError
from chatbot.guardrails import tables
from chatbot.guardrails.base import Who
from chatbot.guardrails.patterns import rule_files
from chatbot.guardrails.personal import redact
from chatbot.guardrails.pipeline import Pipeline
from chatbot.guardrails.registry import BUILT_IN, ORDER
from chatbot.guardrails.views import clean, fold

SAMPLE = Path(__file__).parents[2] / "trainer" / "data" / "sample" / "pubmedqa-sample.jsonl"
PIPELINE = Pipeline(tables.without_limits(GuardrailsConfig()))
TABLES = tables.read_tables()
HELD_OUT = tables.read_tables(tables.HELD_OUT)


@pytest.mark.parametrize("check", [c for c in PIPELINE.checks if c.name in TABLES], ids=lambda c: c.name)
async def test_table(check) -> None:
    result = await tables.run_check(check, TABLES[check.name])
    assert not result.missed and not result.alarms


def test_every_check_is_in_the_order_and_has_cases() -> None:
    assert set(ORDER) == set(BUILT_IN) | set(rule_files())
    assert {c.name for c in PIPELINE.checks} - {"safety-model", "rate"} == set(TABLES)
    assert sum(len(t["hit"]) + len(t["pass"]) for t in TABLES.values()) >= 300


async def test_fine_questions_pass() -> None:
    """At most 1 % of the sample's questions and of all tables' fine inputs are stopped."""
    questions = tables.read_questions(SAMPLE)
    assert len(questions) >= 150
    stopped = await tables.run_fine(PIPELINE, questions)
    assert len(stopped) <= 0.01 * len(questions), stopped
    others = [q for name in ("injection", "crisis", "emergency", "referral", "unsafe", "personal-data") for q in TABLES[name]["pass"]]
    stopped = await tables.run_fine(PIPELINE, others)
    assert len(others) >= 300 and len(stopped) <= 0.01 * len(others), stopped


@pytest.mark.parametrize("check", [c for c in PIPELINE.checks if c.name in HELD_OUT], ids=lambda c: c.name)
async def test_wordings_that_no_rule_was_made_for(check) -> None:
    result = await tables.run_check(check, HELD_OUT[check.name])
    assert result.hits >= 40 and result.passes >= 20
    assert result.recall >= 0.8 and not result.alarms


async def guarded(text: str, size: int) -> tuple[str, list]:
    guard, out = PIPELINE.answer(), ""
    for i in range(0, len(text), size):
        out += await guard.push(text[i:i + size])
    return out + await guard.finish(), guard.verdicts


@pytest.mark.parametrize("size", [1, 3, 7, 1000])
async def test_answers_are_redacted_however_they_are_cut(size: int) -> None:
    text = "Write to jane.doe@example.com, or call +44 20 7946 0958 today. Doses of 12.5 mg (n=34) were given."
    out, verdicts = await guarded(text, size)
    assert out == "Write to [email], or call [phone] today. Doses of 12.5 mg (n=34) were given."
    assert {v.check for v in verdicts} == {"personal-data"}


@pytest.mark.parametrize("size", [1, 3, 7, 1000])
async def test_what_was_shown_still_says_what_follows(size: int) -> None:
    """Found by tests/fuzz/chatbot/test_fuzz_guardrails.py: the words before a name or a number had been given out already."""
    text = "My name is Jane Q. Doe and I was born on 3 March 1980. SSN 123 45 6789, MRN 12345678; phone 555 123 4567. Mr. van Berg smiled."
    out, _ = await guarded(text, size)
    for private in ("Jane", "Doe", "1980", "6789", "12345678", "4567"):
        assert private not in out
    assert out.startswith("My name is [name]") and "I was born on [birth]" in out and "MRN [record]" in out


def test_redaction_uncovers_nothing() -> None:
    """What stands right behind something else showed only when that was gone."""
    assert redact("a@b.org+442079460958") == ("[email][phone]", ["email", "phone"])
    assert redact("a@b.org+442079460958 x", given=7) == ("[phone] x", ["phone"])
    assert redact("My name is Jane Doe.", given=16) == (".", ["name"])


def test_control_characters_part_words() -> None:
    for control in "\r\x0b\x0c\x1c\x1d\x1e\x1f\x85":
        assert fold(f"ignore{control}all") == "ignore all" and clean(f"ignore{control}all").split() == ["ignore", "all"]


async def test_a_clean_answer_passes_unchanged() -> None:
    text = "Yes. Mortality fell (12.1% vs 18.3%; 95% CI 0.4-0.9), 2003-2011.\n\nDecision: yes"
    assert await guarded(text, 2) == (text, [])


async def test_a_loop_is_ended() -> None:
    out, verdicts = await guarded("It may be. " * 40, 5)
    assert len(out) < 80 and verdicts[-1].check == "repetition"


async def test_a_safety_model_that_does_not_answer_blocks() -> None:
    checks = {"safety-model": {"enabled": True, "url": "http://127.0.0.1:9", "model": "guard", "timeout_seconds": 0.5}}
    checked = await Pipeline(GuardrailsConfig(checks=checks)).question("Does it help?", "", [], Who("", "a"))
    assert checked.stop and checked.stop.check == "safety-model" and checked.stop.rule == "the check failed"


async def test_context_and_history_are_redacted_too() -> None:
    checked = await PIPELINE.question("Why?", "Mail a@b.org", ["Mail c@d.org"], Who("", "a"))
    assert checked.parts["context"] == "Mail [email]" and checked.parts["history 0"] == "Mail [email]"


async def test_rate_is_by_user_and_address() -> None:
    pipeline = Pipeline(GuardrailsConfig(checks={"rate": {"per_minute": 1, "burst": 2}}))
    stops = [(await pipeline.question("Why?", "", [], who)).stop for who in [Who("", "a")] * 3 + [Who("", "b"), Who("ann", "a")]]
    assert [bool(s) for s in stops] == [False, False, True, False, False] and stops[2].status == 429


@pytest.mark.parametrize("checks, field", [
    ({"nonsense": {}}, "guardrails.checks.nonsense"), ({"length": {"max_question": 0}}, "guardrails.checks.length.max_question"),
    ({"length": {"colour": 1}}, "guardrails.checks.length.colour"),
    ({"crisis": {"patterns": {"x": ["("]}}}, "guardrails.checks.crisis.patterns.x"),
    ({"crisis": {"frames": {"x": ["<nobody>"]}}}, "guardrails.checks.crisis.frames.x")])
def test_wrong_settings_name_the_field(checks: dict, field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Pipeline(GuardrailsConfig(checks=checks))
    assert caught.value.field == field


def test_clean_keeps_meaning_fold_does_not() -> None:
    assert clean("10⁻³ m² µg\u200b/L") == "10⁻³ m² µg/L"
    assert fold("Ｉｇｎоrе  “It”") == 'ignore "it"'


def test_no_pattern_takes_long_over_a_long_text() -> None:
    """Patterns must not backtrack without end: the longest allowed question, of the worst kinds, within a second each."""
    import time
    for text in ("a " * 2000, "how to make " * 330, "i i i " * 660, "my my my my " * 330, "1.1." * 1000, "a@" * 2000, "= " * 2000):
        began = time.process_time()
        asyncio.run(PIPELINE.question(text[:4000], "", [], Who("", "a")))
        assert time.process_time() - began < 2, text[:20]


async def rows_of_figures() -> list[str]:
    """docs/chatbot.md's table: each check on its own table, and on wordings that no rule was made for."""
    rows = []
    for check in PIPELINE.checks:
        if check.name in TABLES:
            own = await tables.run_check(check, TABLES[check.name])
            held = await tables.run_check(check, HELD_OUT[check.name]) if check.name in HELD_OUT else None
            cells = [f"`{check.name}`"]
            for r in (own, held):
                cells += [str(r.hits), f"{r.recall:.1%}", str(r.passes), f"{r.false_positives:.1%}"] if r else [""] * 4
            rows.append(f"| {' | '.join(cells)} |")
    return rows


async def test_the_documented_figures() -> None:
    """docs/chatbot.md shows what `python -m chatbot guardrails` prints."""
    document = (Path(__file__).parents[2] / "docs/chatbot.md").read_text(encoding="utf-8")
    rows = await rows_of_figures()
    assert not [row for row in rows if row not in document], "docs/chatbot.md should say:\n" + "\n".join(rows)
