"""What a check is.

A check has a name, the stages at which it looks (input, output), and answers with a `Finding` or nothing. Actions:

    redact   go on with the finding's text instead
    answer   do not ask the model (or stop it); give the fixed text
    block    refuse; the fixed text says why

A check that raises is taken as a block (fail closed).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, Protocol

from chatbot.guardrails.views import View, views

Stage = Literal["input", "output"]
Action = Literal["redact", "answer", "block"]


@dataclass(frozen=True)
class Who:
    """Who asks: for limits, never for records in the clear."""

    user: str = ""
    address: str = ""


@dataclass(frozen=True)
class Subject:
    """What is looked at."""

    text: str
    """Input: the question, or its context. Output: the answer so far."""
    stage: Stage
    part: Literal["question", "context", "history", "answer"]
    who: Who = field(default_factory=Who)
    final: bool = True
    """Output: the answer is complete."""
    given: int = 0
    """Output, for checks that redact: characters of the text that have been shown. They redact what is behind them."""

    @cached_property
    def views(self) -> list[View]:
        """The text as it is meant: folded, despaced, decoded."""
        return views(self.text)


@dataclass(frozen=True)
class Finding:
    """What a check found."""

    action: Action
    text: str = ""
    """redact: the new text. Otherwise the name of a fixed text."""
    rule: str = ""
    """Which rule of the check, for metrics and tests."""
    status: int = 200
    """HTTP status of the API's answer for a block: 429 for limits, 413 for lengths; 200 gives the fixed text as the answer."""


@dataclass(frozen=True)
class Verdict:
    """A finding with its check; kept in the audit."""

    check: str
    stage: Stage
    action: Action
    rule: str
    text: str = ""
    """The fixed text to show (answer, block)."""
    status: int = 200


class Check(Protocol):
    """One check."""

    name: str
    stages: frozenset[Stage]

    async def look(self, subject: Subject) -> Finding | None:
        """Look at a text. Must be quick: it holds the answer up."""
        ...


Texts = Mapping[str, str]
"""Fixed texts by name."""
