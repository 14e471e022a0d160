"""Checks made of words: a lexicon of intents and the frames in which they stand (rules/<check>.yaml), looked for in every view of a text.

    action: answer | block
    text: <name of the fixed text>
    lexicon: {die: "die, dying, end it all, suicid*"}     words and phrases of one meaning
    frames: {wish: ["<me> & <want> ~4 <die> & !<research>"]}
    patterns: {forged: [regular expression, ...]}         for what is not made of words (markup, scripts without spaces)
    erase: [type i, phase i]                              read over: the `I` of type I is no person

A lexicon is a list with commas; its entry is a word or a phrase: `*` is any ending, `_` any word, `[a|b]` one of these, `[a|]` may be
missing, `<name>` another lexicon (its own or one of lexicon.yaml), `~4` lets up to four words stand between. A frame is made of terms, all
of which must stand in one or two neighbouring sentences, in any order; a term with `!` must not. In views that lost their spaces the same
words are looked for without boundaries.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from chatbot.config import check
from chatbot.guardrails.base import Action, Finding, Stage, Subject

RULES = Path(__file__).parent / "rules"
SHARED = Path(__file__).parent / "lexicon.yaml"
TOKEN = re.compile(r"\s*~\d+\s*|<[^<>]+>|\[|\]|\||\*|_|n't|\s+|.", re.DOTALL)
SENTENCE = re.compile(r"(?<=[.?!;])\s+")


@cache
def shared_lexicon() -> dict[str, str]:
    """Words that several checks use."""
    return dict(yaml.safe_load(SHARED.read_text(encoding="utf-8")))


class Lexicon:
    """Turns entries and terms into regular expressions, for text with spaces and for text without. Raises KeyError, RecursionError."""

    def __init__(self, own: dict[str, str]) -> None:
        self.entries = {name: re.split(r",\s+", text.strip()) for name, text in {**shared_lexicon(), **own}.items()}

    def _entry(self, entry: str, joined: bool) -> str:
        out = []
        for token in TOKEN.findall(entry):
            if gap := re.fullmatch(r"\s*~(\d+)\s*", token):
                out.append(rf"\w{{0,{8 * int(gap[1])}}}?" if joined else rf"(?:\W+[\w'-]+){{0,{gap[1]}}}?\W+")
            elif token[0] == "<" and len(token) > 1:
                out.append(self.slot(token[1:-1], joined))
            elif token in "[]|":
                out.append({"[": "(?:", "]": ")", "|": "|"}[token])
            elif token == "*":
                out.append("" if joined else r"\w*")
            elif token == "_":
                out.append(r"\w{1,12}" if joined else r"[\w'-]+")
            elif token == "n't":
                out.append("nt" if joined else "n'?t")
            elif token.isspace():
                out.append("" if joined else r"\W{1,2}")
            else:
                out.append("" if joined and not token.isalnum() else re.escape(token))
        pattern = "".join(out)
        if joined:
            return pattern
        # A part that may be missing takes its blank along.
        pattern = pattern.replace(r"|)\W{1,2}", r"|)\W{0,2}")
        return re.sub(r"\\W\{1,2\}(\(\?:[^()]*\|\))$", r"\\W{0,2}\1", pattern)

    def slot(self, name: str, joined: bool) -> str:
        """All entries of a lexicon."""
        return "(?:" + "|".join(self._entry(e, joined) for e in self.entries[name]) + ")"

    def term(self, term: str, joined: bool) -> re.Pattern[str]:
        """Entries in a row, with gaps."""
        return re.compile(self._entry(term, True) if joined else rf"(?<![\w-])(?:{self._entry(term, False)})(?![\w-])")


@dataclass(frozen=True)
class Settings:
    """What a rules file holds; a configuration may replace any of it."""

    action: str
    text: str
    frames: dict[str, list[str]]
    enabled: bool = True
    stages: list[str] = field(default_factory=lambda: ["input"])
    views: list[str] = field(default_factory=lambda: ["plain", "leet", "spaced", "decoded", "decoded twice", "rot13", "reversed"])
    parts: list[str] = field(default_factory=lambda: ["question", "history"])
    lexicon: dict[str, str] = field(default_factory=dict)
    patterns: dict[str, list[str]] = field(default_factory=dict)
    erase: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        check(self.action in ("answer", "block"), "action", self.action, "Give answer or block.")
        check(set(self.stages) <= {"input", "output"} and bool(self.stages), "stages", self.stages, "Give input, output or both.")


Term = tuple[bool, re.Pattern[str], re.Pattern[str]]
"""Whether it must be there; with spaces, without."""


class PatternCheck:
    """A check whose rules are words in frames."""

    def __init__(self, name: str, settings: Settings) -> None:
        self.name, self.settings = name, settings
        self.stages: frozenset[Stage] = frozenset(settings.stages)  # type: ignore[arg-type]
        self.action: Action = settings.action  # type: ignore[assignment]
        lexicon, where = Lexicon({**settings.lexicon, "erased": ", ".join(settings.erase)}), f"guardrails.checks.{name}"
        terms: dict[str, Term] = {}
        self._frames: list[tuple[str, list[Term]]] = []
        for rule, frames in settings.frames.items():
            for frame in frames:
                made = []
                for text in re.split(r"\s*&\s*", frame.strip()):
                    if text not in terms:
                        try:
                            wanted = text.lstrip("!")
                            terms[text] = (wanted == text, lexicon.term(wanted, False), lexicon.term(wanted, True))
                        except KeyError as error:
                            check(False, f"{where}.frames.{rule}", frame, f"There is no lexicon {error}.")
                        except (re.error, RecursionError) as error:
                            check(False, f"{where}.frames.{rule}", frame, f"It cannot be read: {error}.")
                    made.append(terms[text])
                self._frames.append((rule, made))
        self._patterns: list[tuple[str, re.Pattern[str]]] = []
        for rule, patterns in settings.patterns.items():
            for pattern in patterns:
                try:
                    self._patterns.append((rule, re.compile(pattern)))
                except re.error as error:
                    check(False, f"{where}.patterns.{rule}", pattern, f"It is not a regular expression: {error}.")
        self._erase = lexicon.term("<erased>", False) if settings.erase else None

    def find(self, subject: Subject) -> str:
        """The rule that matches, or nothing."""
        for view in subject.views:
            if view.kind in self.settings.views:
                for rule, pattern in self._patterns:
                    if pattern.search(view.text):
                        return rule
                text = self._erase.sub("-", view.text) if self._erase and not view.joined else view.text
                sentences = [text] if view.joined else SENTENCE.split(text)
                for i in range(len(sentences)):
                    if rule := self._frame(" ".join(sentences[max(0, i - 1):i + 1]), view.joined):
                        return rule
        return ""

    def _frame(self, text: str, joined: bool) -> str:
        known: dict[int, bool] = {}
        for rule, terms in self._frames:
            for term in terms:
                wanted, strict, loose = term
                if id(term) not in known:
                    known[id(term)] = bool((loose if joined else strict).search(text)) == wanted
                if not known[id(term)]:
                    break
            else:
                return rule
        return ""

    async def look(self, subject: Subject) -> Finding | None:
        if subject.part not in self.settings.parts and subject.stage == "input":
            return None
        rule = self.find(subject)
        return Finding(self.action, self.settings.text, rule) if rule else None


def rule_files() -> dict[str, dict[str, Any]]:
    """The built-in word checks: settings by name, in the order of the files' names."""
    return {path.stem: yaml.safe_load(path.read_text(encoding="utf-8")) for path in sorted(RULES.glob("*.yaml"))}
