"""Held-out rows whose question or answer also stands in a training row.

`prepare` removes duplicates across the split; this check shares no code with it and looks at the result: the text of the training
shards, decoded. Texts are compared as words in normal form (trainer/evaluate/text.py), so case, punctuation, spacing and Unicode
forms don't matter. A question or answer of fewer than MIN_WORDS words is no evidence of a copy and is not looked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from trainer.evaluate.rows import Row
from trainer.evaluate.text import plain_words

MIN_WORDS = 6
"""Fewest words of a question or answer that is looked for."""

LISTED = 50
"""Most ids that are listed in the report."""


class Passages:
    """Texts that are looked for in other texts, found by their first MIN_WORDS words."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._found_by: dict[tuple[str, ...], list[tuple[tuple[str, ...], int]]] = {}
        for row in rows:
            for text in (row.question, row.answer):
                words = tuple(plain_words(text))
                if len(words) >= MIN_WORDS:
                    self._found_by.setdefault(words[:MIN_WORDS], []).append((words, row.index))

    def inside(self, text: str) -> set[int]:
        """Indices of the rows whose question or answer stands in `text`."""
        words = plain_words(text)
        found = set()
        for at in range(len(words) - MIN_WORDS + 1):
            for passage, index in self._found_by.get(tuple(words[at:at + MIN_WORDS]), ()):
                if tuple(words[at:at + len(passage)]) == passage:
                    found.add(index)
        return found


def contaminated(rows: Sequence[Row], training: Iterable[str]) -> set[int]:
    """Indices of the rows that also stand in one of the training texts."""
    passages = Passages(rows)
    return set().union(*(passages.inside(text) for text in training))


def summary(rows: Sequence[Row], flagged: Iterable[int]) -> dict[str, Any]:
    """{rows, flagged, share, ids}: how many rows were checked and flagged, and the first flagged ids."""
    indices = set(flagged)
    ids = [row.id for row in sorted(rows, key=lambda r: r.index) if row.index in indices]
    return {"rows": len(rows), "flagged": len(ids), "share": len(ids) / len(rows) if rows else 0.0, "ids": ids[:LISTED]}
