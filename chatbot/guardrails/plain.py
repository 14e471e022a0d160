"""Checks of form: invisible characters, length, rate."""

from __future__ import annotations

import time
from collections import OrderedDict
from dataclasses import dataclass

from chatbot.config import check
from chatbot.guardrails.base import Finding, Stage, Subject
from chatbot.guardrails.views import clean, invisible


@dataclass(frozen=True)
class UnicodeSettings:
    """Invisible characters are taken out; a text that is mostly invisible is refused."""

    enabled: bool = True
    most_invisible: float = 0.2
    """Share of invisible characters from which a text is refused: it hides something."""

    def __post_init__(self) -> None:
        check(0 < self.most_invisible <= 1, "most_invisible", self.most_invisible, "Give a share above 0, at most 1.")


class UnicodeCheck:
    """Takes invisible characters out of what goes to the model."""

    name = "unicode"
    stages: frozenset[Stage] = frozenset({"input"})

    def __init__(self, settings: UnicodeSettings) -> None:
        self.settings = settings

    async def look(self, subject: Subject) -> Finding | None:
        hidden = sum(map(invisible, subject.text)) - subject.text.count("\r")
        if hidden > 4 and hidden > self.settings.most_invisible * len(subject.text):
            return Finding("block", "unreadable", "mostly invisible")
        visible = clean(subject.text)
        return Finding("redact", visible, "invisible characters" if hidden else "form") if visible != subject.text else None


@dataclass(frozen=True)
class LengthSettings:
    """Characters of each part; the engine bounds tokens besides."""

    enabled: bool = True
    max_question: int = 4000
    max_context: int = 20000

    def __post_init__(self) -> None:
        check(self.max_question >= 1, "max_question", self.max_question, "Give a positive number of characters.")
        check(self.max_context >= 1, "max_context", self.max_context, "Give a positive number of characters.")


class LengthCheck:
    """Refuses empty and overlong texts."""

    name = "length"
    stages: frozenset[Stage] = frozenset({"input"})

    def __init__(self, settings: LengthSettings) -> None:
        self.settings = settings

    async def look(self, subject: Subject) -> Finding | None:
        longest = self.settings.max_question if subject.part == "question" else self.settings.max_context
        if len(subject.text) > longest:
            return Finding("block", "too_long", f"{subject.part} longer than {longest}", status=413)
        if subject.part == "question" and not clean(subject.text).strip():
            return Finding("block", "empty", "empty", status=400)
        return None


@dataclass(frozen=True)
class RateSettings:
    """A bucket for each user and each address."""

    enabled: bool = True
    per_minute: float = 20.0
    """Questions a minute in the long run."""
    burst: int = 10
    """Questions at once."""

    def __post_init__(self) -> None:
        check(self.per_minute > 0, "per_minute", self.per_minute, "Give a positive number.")
        check(self.burst >= 1, "burst", self.burst, "Give at least 1.")


class RateCheck:
    """Limits questions by user, and by address for who is not logged in. Counted in this process: replicas count each for itself."""

    name = "rate"
    stages: frozenset[Stage] = frozenset({"input"})
    REMEMBERED = 10_000

    def __init__(self, settings: RateSettings) -> None:
        self.settings = settings
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    async def look(self, subject: Subject) -> Finding | None:
        if subject.part != "question":
            return None
        key = f"user {subject.who.user}" if subject.who.user else f"address {subject.who.address}"
        now = time.monotonic()
        level, then = self._buckets.pop(key, (float(self.settings.burst), now))
        level = min(self.settings.burst, level + (now - then) * self.settings.per_minute / 60)
        allowed = level >= 1
        self._buckets[key] = (level - 1 if allowed else level, now)
        while len(self._buckets) > self.REMEMBERED:
            self._buckets.popitem(last=False)
        return None if allowed else Finding("block", "too_fast", key.split()[0], status=429)
