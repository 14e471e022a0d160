"""Runs the checks: over a question before the model, and over an answer while it streams. Fails closed."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from chatbot.config import GuardrailsConfig
from chatbot.guardrails.base import Check, Finding, Stage, Subject, Verdict, Who
from chatbot.guardrails.registry import fixed_texts, make_checks

log = logging.getLogger(__name__)

Part = Literal["question", "context", "history"]


@dataclass
class Checked:
    """A question after the checks."""

    parts: dict[str, str]
    verdicts: list[Verdict] = field(default_factory=list)
    stop: Verdict | None = None
    """Set: the model is not asked; this is the answer."""


class Pipeline:
    """The enabled checks in order."""

    def __init__(self, config: GuardrailsConfig, count: Callable[[Verdict], None] = lambda _: None) -> None:
        self.texts = fixed_texts(config.texts)
        self.checks = make_checks(config)
        self._count = count

    async def _look(self, check: Check, subject: Subject) -> Finding | None:
        """A check's finding; a check that fails blocks."""
        try:
            return await check.look(subject)
        except Exception as error:
            # The error may quote the text: its type alone is logged.
            log.error("check %s failed (%s); blocked", check.name, type(error).__name__)
            return Finding("block", "error", "the check failed")

    def _verdict(self, check: Check, stage: Stage, finding: Finding) -> Verdict:
        text = "" if finding.action == "redact" else self.texts[finding.text]
        verdict = Verdict(check.name, stage, finding.action, finding.rule, text, finding.status)
        self._count(verdict)
        return verdict

    async def question(self, question: str, context: str, history: list[str], who: Who) -> Checked:
        """Check a question with its context and earlier turns. Each part is redacted for itself."""
        parts: dict[str, str] = {"question": question, "context": context, **{f"history {i}": t for i, t in enumerate(history)}}
        checked = Checked(parts)
        for check in self.checks:
            if "input" not in check.stages:
                continue
            for name, text in list(parts.items()):
                if not text and name != "question":
                    continue
                kind: Any = name.split()[0]
                finding = await self._look(check, Subject(text, "input", kind, who))
                if finding is None:
                    continue
                checked.verdicts.append(self._verdict(check, "input", finding))
                if finding.action == "redact":
                    parts[name] = finding.text
                else:
                    checked.stop = checked.verdicts[-1]
                    return checked
        return checked

    def answer(self) -> AnswerGuard:
        """A guard for one answer."""
        return AnswerGuard(self)


class AnswerGuard:
    """Stands between the model and the reader: gives out whole words that have passed every check."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline
        self._checks = [c for c in pipeline.checks if "output" in c.stages]
        self._raw = ""
        self._given = 0
        """Characters of the raw text that have been given out or replaced."""
        self.verdicts: list[Verdict] = []
        self.stop: Verdict | None = None
        """Set: the answer ends here. If nothing was given out yet, the verdict's text stands in its place."""

    def _boundary(self, final: bool) -> int:
        """Up to where the text can be given out: no word, and nothing that may become personal data, is cut."""
        if final:
            return len(self._raw)
        end = max(self._raw.rfind(" "), self._raw.rfind("\n")) + 1
        for check in self._checks:
            if holds_back := getattr(check, "holds_back", None):
                end = min(end, len(self._raw) - holds_back(self._raw))
        return max(end, self._given)

    async def push(self, text: str) -> str:
        """Take what the model wrote, give out what may be shown."""
        self._raw += text
        return await self._release(final=False)

    async def finish(self) -> str:
        """The answer is complete: give out the rest."""
        return await self._release(final=True)

    async def _release(self, final: bool) -> str:
        if self.stop:
            return ""
        end = self._boundary(final)
        if end <= self._given and not final:
            return ""
        shown = self._raw[self._given:end]
        for check in self._checks:
            given = self._given if hasattr(check, "holds_back") else 0
            subject = Subject(self._raw[:end], "output", "answer", final=final, given=given)
            finding = await self._pipeline._look(check, subject)
            if finding is None:
                continue
            self.verdicts.append(self._pipeline._verdict(check, "output", finding))
            if finding.action != "redact":
                self.stop = self.verdicts[-1]
                return ""
            shown = finding.text
        self._given = end
        return shown
