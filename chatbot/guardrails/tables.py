"""Test tables: what each check must find and what it must let pass (tables/<check>.yaml), and how well it does.

    hit:  texts that the check must find          pass: texts that it must let through
A case is a text, or {repeat: text, times: n}. The `pass` texts of all input tables are also put through the whole pipeline.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from chatbot.config import GuardrailsConfig
from chatbot.errors import UserError
from chatbot.guardrails.base import Check, Subject, Who
from chatbot.guardrails.pipeline import Pipeline

TABLES = Path(__file__).parent / "tables"
HELD_OUT = Path(__file__).parent / "held_out"
"""Wordings that no rule was made for, in the same form: the honest figure. Once rules are mended with them they belong into the tables."""


@dataclass
class Result:
    """How a check did on its table."""

    check: str
    hits: int = 0
    found: int = 0
    passes: int = 0
    wrong: int = 0
    missed: list[str] = field(default_factory=list)
    alarms: list[str] = field(default_factory=list)

    @property
    def recall(self) -> float:
        return self.found / self.hits if self.hits else 1.0

    @property
    def false_positives(self) -> float:
        return self.wrong / self.passes if self.passes else 0.0


def case(value: Any) -> str:
    """A case's text."""
    return value["repeat"] * value["times"] if isinstance(value, dict) else str(value)


def read_tables(directory: Path = TABLES) -> dict[str, dict[str, list[str]]]:
    """All tables of a directory by check."""
    tables = {}
    for path in sorted(directory.glob("*.yaml")):
        table = yaml.safe_load(path.read_text(encoding="utf-8"))
        tables[path.stem] = {side: [case(v) for v in table[side]] for side in ("hit", "pass")}
    return tables


async def run_check(check: Check, table: dict[str, list[str]]) -> Result:
    """One check on its table."""
    result = Result(check.name)
    stage: Any = "input" if "input" in check.stages else "output"
    part: Any = "question" if stage == "input" else "answer"
    for side in ("hit", "pass"):
        for text in table[side]:
            found = await check.look(Subject(text, stage, part, Who("", "table")))
            if side == "hit":
                result.hits, result.found = result.hits + 1, result.found + bool(found)
                if not found:
                    result.missed.append(text)
            else:
                result.passes, result.wrong = result.passes + 1, result.wrong + bool(found)
                if found:
                    result.alarms.append(f"{text} ({found.rule})")
    return result


async def run_fine(pipeline: Pipeline, questions: list[str]) -> list[str]:
    """Questions that the whole pipeline stops although they are fine, each with the check and rule."""
    stopped = []
    for question in questions:
        checked = await pipeline.question(question, "", [], Who("", "table"))
        if checked.stop:
            stopped.append(f"{question} ({checked.stop.check}: {checked.stop.rule})")
    return stopped


def read_questions(path: Path) -> list[str]:
    """Questions of a .jsonl file (`question` or `QUESTION`), of PubMedQA's published .json form, or of a .txt file (one a line)."""
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
        elif path.suffix == ".json":
            document = json.loads(text)
            rows = list(document.values()) if isinstance(document, dict) else document
        else:
            return [line for line in text.splitlines() if line.strip()]
        return [str(row.get("question") or row["QUESTION"]) for row in rows]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"--fine: {path} has no questions that can be read ({error!r}).") from error


def without_limits(config: GuardrailsConfig) -> GuardrailsConfig:
    """The same checks without the rate limit: a table is asked faster than people ask."""
    return GuardrailsConfig(checks={**config.checks, "rate": {"enabled": False}}, texts=config.texts)


def print_results(title: str, results: list[Result]) -> None:
    """One line for each check, and what it missed or took wrongly."""
    print(f"{title:20} {'hits':>6} {'recall':>8} {'fine':>6} {'false positives':>16}")
    for r in results:
        print(f"{r.check:20} {r.hits:6} {r.recall:8.1%} {r.passes:6} {r.false_positives:16.1%}")
        for text in r.missed:
            print(f"    missed: {text[:100]!r}")
        for text in r.alarms:
            print(f"    false alarm: {text[:140]!r}")


def report(config: GuardrailsConfig, fine: list[Path]) -> int:
    """Print recall and false-positive rate of each check, and what was missed; 1 if anything was."""
    pipeline = Pipeline(without_limits(config))
    tables = read_tables()
    results = [asyncio.run(run_check(c, tables[c.name])) for c in pipeline.checks if c.name in tables]
    print_results("tables", results)
    held = read_tables(HELD_OUT)
    print_results("held-out wordings", [asyncio.run(run_check(c, held[c.name])) for c in pipeline.checks if c.name in held])
    hits = [text for table in held.values() for text in table["hit"]]
    print(f"{len(hits)} held-out hits through all checks: {len(asyncio.run(run_fine(pipeline, hits))) / len(hits):.1%} stopped")
    questions = [q for path in fine for q in read_questions(path)]
    stopped = asyncio.run(run_fine(pipeline, questions))
    total = sum(r.hits + r.passes for r in results)
    print(f"{total} cases; recall {sum(r.found for r in results) / sum(r.hits for r in results):.1%}, "
          f"false positives {sum(r.wrong for r in results) / sum(r.passes for r in results):.1%}")
    if questions:
        print(f"{len(questions)} fine questions through all checks: {len(stopped)} stopped ({len(stopped) / len(questions):.2%})")
        for text in stopped:
            print(f"    stopped: {text[:160]!r}")
    return int(any(r.missed or r.alarms for r in results) or len(stopped) > 0.01 * len(questions))
