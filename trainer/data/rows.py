"""From a raw row to question, context, answer and decision, or to the reason why it is rejected."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trainer.data.readers import ALIASES, Bad, RawRow, snippet

DECISIONS = ("yes", "no", "maybe")

# Tabulator, line feed, form feed and carriage return are white space; the rest of the C0 range and DEL have no place in text.
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0e-\x1f\x7f]")
_SURROGATE = re.compile(r"[\ud800-\udfff]")
# Private marks of trainer/data/formats.py are harmless in rows, since templates are split before rows come in.


@dataclass(frozen=True)
class Row:
    """A usable row; all text is stripped of surrounding white space."""

    id: str
    """Empty if the file has none: its content then names it."""
    question: str
    context: str
    answer: str
    decision: str
    """`yes`, `no`, `maybe` or empty."""


@dataclass(frozen=True)
class Reject:
    """A row that is not used, and why."""

    reason: str
    where: str
    snippet: str


class _UnusableError(Exception):
    pass


def normalise(raw: RawRow, columns: Mapping[str, str]) -> Row | Reject:
    """Check a raw row. `columns` is run.data.columns; other fields are found by their usual names."""
    value = raw.value
    if isinstance(value, Bad):
        return Reject(value.reason, raw.where, value.snippet)
    try:
        return Row(id=_id(_find(value, "id", columns)),
                   question=_text(_find(value, "question", columns, required=True), "question", required=True),
                   context=_context(_find(value, "context", columns)),
                   answer=_text(_find(value, "answer", columns, required=True), "answer", required=True),
                   decision=_decision(_find(value, "decision", columns)))
    except _UnusableError as error:
        return Reject(str(error), raw.where, snippet({k: snippet(v, 60) for k, v in list(value.items())[:8]}, 300))


def _find(row: Mapping[str, Any], name: str, columns: Mapping[str, str], required: bool = False) -> Any:
    if name in columns:
        if columns[name] in row:
            return row[columns[name]]
    else:
        for alias in ALIASES[name]:
            if alias in row:
                return row[alias]
    if required:
        raise _UnusableError(f"missing column: {name}")
    return None


def _text(value: Any, name: str, required: bool = False) -> str:
    if value is None:
        if required:
            raise _UnusableError(f"null {name}")
        return ""
    if not isinstance(value, str):
        raise _UnusableError(f"wrong type: {name}")
    if not value.isascii() and _SURROGATE.search(value):
        raise _UnusableError("not UTF-8")
    if not value.isprintable() and _CONTROL.search(value):
        raise _UnusableError("control characters")
    value = value.strip()
    if required and not value:
        raise _UnusableError(f"empty {name}")
    return value


def _id(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 64:
        return str(value)
    if isinstance(value, float) and value.is_integer():  # a Parquet column of ids with gaps, written by pandas
        return str(int(value))
    text = _text(value, "id")
    if len(text) > 1000:
        raise _UnusableError("id too long")
    return text


def _context(value: Any) -> str:
    """Text, a list of paragraphs, or the hub's {contexts: [...], labels: [...], meshes: [...]}."""
    if isinstance(value, Mapping):
        if "contexts" not in value:
            raise _UnusableError("wrong type: context")
        value = value["contexts"]
    if isinstance(value, list | tuple):
        return "\n".join(text for part in value if (text := _text(part, "context")))
    return _text(value, "context")


def _decision(value: Any) -> str:
    text = _text(value, "decision").lower().rstrip(".")
    if text and text not in DECISIONS:
        raise _UnusableError("decision is not yes, no or maybe")
    return text
