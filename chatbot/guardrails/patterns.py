"""Checks made of patterns: rules in rules/<check>.yaml, matched against every view of a text.

    action: answer | block
    text: <name of the fixed text>
    stages: [input]
    views: [plain, leet, spaced, decoded, decoded twice, rot13, reversed]
    parts: [question, history]
    words: {drug: "aspirin|ibuprofen|..."}         used in patterns as <drug>
    rules: {name: [pattern, ...]}
    except: [pattern, ...]                          a text that matches one of these is fine, unless a rule in `always` matches
    always: [rule, ...]

Patterns are regular expressions over folded text (lower case, single spaces). In views that lost their spaces, `\\s` and blanks may
match nothing and `\\b` matches anywhere.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from chatbot.config import check
from chatbot.guardrails.base import Action, Finding, Stage, Subject

RULES = Path(__file__).parent / "rules"


def _loose(pattern: str) -> str:
    """A pattern for text without spaces.

    `some words` becomes a bounded run of letters: `(\\w+){0,5}` over a long word would be tried in every division of it.
    """
    pattern = re.sub(r"\(\?:\\w\+ \)(?:\{0,(\d+)\}|\?)", lambda m: rf"\w{{0,{8 * int(m[1] or 1)}}}", pattern)
    pattern = re.sub(r"\(\?: \\w\+\)(?:\{0,(\d+)\}|\?)", lambda m: rf"\w{{0,{8 * int(m[1] or 1)}}}", pattern)
    pattern = pattern.replace(r"\w+", r"\w{1,8}").replace(r"\w*", r"\w{0,8}")
    pattern = re.sub(r"\\b", "", pattern)
    pattern = re.sub(r"(?:\\s|(?<!\[)\\W| )[+*?]?(?:\{[\d,]+\})?", r"", pattern)
    return pattern


@dataclass(frozen=True)
class Settings:
    """What a rules file holds; a configuration may replace any of it."""

    action: str
    text: str
    rules: dict[str, Any]
    enabled: bool = True
    stages: list[str] = field(default_factory=lambda: ["input"])
    views: list[str] = field(default_factory=lambda: ["plain", "leet", "spaced", "decoded", "decoded twice", "rot13", "reversed"])
    parts: list[str] = field(default_factory=lambda: ["question", "history"])
    words: dict[str, str] = field(default_factory=dict)
    exceptions: list[str] = field(default_factory=list)
    """Texts that match one of these are fine, but for the rules in `always`."""
    always: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        check(self.action in ("answer", "block"), "action", self.action, "Give answer or block.")
        check(set(self.stages) <= {"input", "output"} and bool(self.stages), "stages", self.stages, "Give input, output or both.")
        check(set(self.always) <= set(self.rules), "always", self.always, "Name rules of this check.")


class PatternCheck:
    """A check whose rules are patterns."""

    def __init__(self, name: str, settings: Settings) -> None:
        self.name, self.settings = name, settings
        self.stages: frozenset[Stage] = frozenset(settings.stages)  # type: ignore[arg-type]
        self.action: Action = settings.action  # type: ignore[assignment]

        def expand(pattern: str) -> str:
            for word, meaning in settings.words.items():
                pattern = pattern.replace(f"<{word}>", f"(?:{meaning})")
            return pattern

        self._rules: list[tuple[str, re.Pattern[str], re.Pattern[str]]] = []
        for rule, patterns in settings.rules.items():
            for pattern in patterns:
                full = expand(pattern)
                try:
                    self._rules.append((rule, re.compile(full), re.compile(_loose(full))))
                except re.error as error:
                    check(False, f"guardrails.checks.{name}.rules.{rule}", pattern, f"It is not a regular expression: {error}.")
        self._exceptions = [re.compile(expand(p)) for p in settings.exceptions]

    def find(self, subject: Subject) -> str:
        """The rule that matches, or nothing."""
        for view in subject.views:
            if view.kind not in self.settings.views:
                continue
            excepted = not view.joined and any(p.search(view.text) for p in self._exceptions)
            for rule, strict, loose in self._rules:
                if (not excepted or rule in self.settings.always) and (loose if view.joined else strict).search(view.text):
                    return rule
        return ""

    async def look(self, subject: Subject) -> Finding | None:
        if subject.part not in self.settings.parts and subject.stage == "input":
            return None
        rule = self.find(subject)
        return Finding(self.action, self.settings.text, rule) if rule else None


def rule_files() -> dict[str, dict[str, Any]]:
    """The built-in pattern checks: settings by name, in the order of the files' names."""
    return {path.stem: yaml.safe_load(path.read_text(encoding="utf-8")) for path in sorted(RULES.glob("*.yaml"))}
