"""Checks of what the model writes: loops and gibberish."""

from __future__ import annotations

import re
from dataclasses import dataclass

from chatbot.config import check
from chatbot.guardrails.base import Finding, Stage, Subject


@dataclass(frozen=True)
class RepetitionSettings:
    """An answer that repeats itself is ended."""

    enabled: bool = True
    times: int = 4
    """The same words this often one after another are a loop."""
    longest: int = 40
    """Words of the longest phrase looked for."""

    def __post_init__(self) -> None:
        check(self.times >= 2, "times", self.times, "Give at least 2.")
        check(self.longest >= 1, "longest", self.longest, "Give at least 1.")


def loops(words: list[str], times: int, longest: int) -> bool:
    """The text ends in one phrase `times` times; a single word needs twice as many."""
    for size in range(1, min(longest, len(words) // times) + 1):
        needed = times * 2 if size == 1 else times
        if len(words) >= size * needed and all(words[-size * (i + 1):len(words) - size * i] == words[-size:] for i in range(needed)):
            return True
    return False


class RepetitionCheck:
    """Ends an answer in which the model goes round in circles."""

    name = "repetition"
    stages: frozenset[Stage] = frozenset({"output"})

    def __init__(self, settings: RepetitionSettings) -> None:
        self.settings = settings

    async def look(self, subject: Subject) -> Finding | None:
        words = re.findall(r"\w+", subject.text[-4000:].lower())
        if loops(words, self.settings.times, self.settings.longest) or re.search(r"([^\s\w])\1{19,}|(\w)\2{24,}", subject.text[-200:]):
            return Finding("answer", "repetition", "loop")
        return None


@dataclass(frozen=True)
class GibberishSettings:
    """An answer that is no language is withheld."""

    enabled: bool = True
    shortest: int = 80
    """Characters from which an answer is judged."""
    most_odd: float = 0.35
    """Share of odd words (no vowel, mixed signs, very long) that is too much."""

    def __post_init__(self) -> None:
        check(0 < self.most_odd <= 1, "most_odd", self.most_odd, "Give a share above 0, at most 1.")


def odd(word: str) -> bool:
    """Not a word of a language written in letters: very long, or five or more consonants and no vowel, or signs within."""
    if len(word) > 40 or "\ufffd" in word:
        return True
    if re.fullmatch(r"[a-zA-Z]+", word):
        return len(word) >= 5 and not word.isupper() and not re.search(r"[aeiouyAEIOUY]", word)
    return bool(re.search(r"[^\w\s.,;:()'\"%/+=<>≤≥±°²³µαβγδκλω·×–—’“”-]", word)) and bool(re.search(r"\w", word)) and len(word) >= 3


class GibberishCheck:
    """Withholds an answer that is not language."""

    name = "gibberish"
    stages: frozenset[Stage] = frozenset({"output"})

    def __init__(self, settings: GibberishSettings) -> None:
        self.settings = settings

    async def look(self, subject: Subject) -> Finding | None:
        words = subject.text.split()
        if len(subject.text) < self.settings.shortest or not words:
            return None
        signs = sum(not re.search(r"\w", w) for w in words)
        if (sum(map(odd, words)) + max(0, signs - len(words) // 5)) / len(words) > self.settings.most_odd or \
                (len(words) < len(subject.text) / 40 and re.search(r"[\x00-\x7f]{200,}", subject.text)):
            return Finding("answer", "output", "gibberish")
        return None
