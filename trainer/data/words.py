"""A tokenizer's ids of many texts, word by word: each word is tokenised once and then looked up.

Fast tokenizers spend most of their time on what is the same every time: splitting, merging and describing words that have come before.
A text may be cut at a space, and its pieces tokenised apart, where no token can reach across. That is known of two families, and read
from the tokenizer's own definition; every other tokenizer gets its texts whole.

byte-level  Llama 3, SmolLM, GPT-2 and their like: a pattern cuts the text before merges, and none of the known patterns goes on after a
            printable character over a space, or after a letter or digit over closing punctuation. A space belongs to the word behind it.
sentencepiece  Llama 2 and its like: spaces become "▁", no pattern cuts the text, but no token of the vocabulary has a "▁" behind another
            character, so no merge crosses one. A word alone gets the "▁" that it has in the text.

Only spaces between two printable ASCII characters are cut at: what white space and marks of other scripts do is left to the tokenizer.
The ids are exactly those of `encode(text, add_special_tokens=False)`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

WORDS = 1 << 16
"""Words that are remembered, before all are forgotten."""
LONGEST = 64
"""Characters of a word that is remembered."""

_SPACE = re.compile(r"(?<=[!-~]) (?=[!-~])")
_CLOSED = re.compile(r"(.*[A-Za-z0-9])([,.;:)]+)", re.DOTALL)

Span = tuple[int, int]
"""First character of a token in its text, and the one after its last."""

PATTERNS = frozenset({
    # Llama 3 (and cl100k of tiktoken).
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    # Qwen 2 and 3: numbers digit by digit.
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    # GPT-2's, which the step ByteLevel has built in.
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
})
"""Patterns in which no alternative has a space behind another character, and that look at nothing before the place where they begin."""


class _Known(dict[str, tuple[Any, ...]]):
    """What is known of words that stand behind the same characters."""

    def __init__(self, ask: Callable[[str], tuple[Any, ...]]) -> None:
        super().__init__()
        self.ask = ask

    def __missing__(self, word: str) -> tuple[Any, ...]:
        found = self.ask(word)
        if len(word) <= LONGEST:
            if len(self) >= WORDS:
                self.clear()
            self[word] = found
        return found


class WordEncoder:
    """Token ids of texts. Not for several threads at once."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.before = _before(json.loads(tokenizer.to_str()))
        self._first, self._later = _Known(partial(self._ids_of, "")), _Known(partial(self._ids_of, self.before or ""))
        self._spans = _Known(self._spans_of)
        # Next to an added token a space is a text of its own for sentencepiece, and gets a "▁" more.
        added = [re.escape(token.content) for token in tokenizer.get_added_tokens_decoder().values()] if self.before == "" else []
        self._beside = re.compile("|".join(f" {token}|{token} " for token in added)) if added else None

    def ids(self, text: str) -> NDArray[np.int32]:
        """What `encode(text, add_special_tokens=False)` gives; int32 [tokens]."""
        if self._whole(text):
            return np.array(self.tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int32)
        words = iter(_SPACE.split(text))
        first = self._first[next(words)]
        return np.array([*first, *chain.from_iterable(map(self._later.__getitem__, words))], dtype=np.int32)

    def spans(self, text: str) -> list[Span]:
        """Where the tokens of a text are in it (the offsets of `encode`)."""
        if self.before != " ":  # sentencepiece's marks are nowhere in the text
            return self.tokenizer.encode(text, add_special_tokens=False).offsets
        first, *words = _SPACE.split(text)
        found: list[Span] = self.tokenizer.encode(first, add_special_tokens=False).offsets
        place = len(first) + 1
        for word in words:
            found += [(begin + place, end + place) for begin, end in self._spans[word]]
            place += len(word) + 1
        return found

    def _whole(self, text: str) -> bool:
        return self.before is None or (self._beside is not None and self._beside.search(text) is not None)

    def _ids_of(self, before: str, word: str) -> tuple[int, ...]:
        if self.before == " " and (closed := _CLOSED.fullmatch(word)):
            return (*(self._later if before else self._first)[closed[1]], *self._first[closed[2]])
        return tuple(self.tokenizer.encode(before + word, add_special_tokens=False).ids)

    def _spans_of(self, word: str) -> tuple[Span, ...]:
        """Counted from the word's first character; the space before it is -1."""
        return tuple((begin - 1, end - 1) for begin, end in self.tokenizer.encode(f" {word}", add_special_tokens=False).offsets)


def _before(definition: dict[str, Any]) -> str | None:
    """What stands before a word so that it alone has the tokens that it has after a space in a text; None if that is not known."""
    model, added = definition["model"], definition["added_tokens"]
    if model["type"] != "BPE" or any(model.get(key) for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix")):
        return None
    # Tokens that take the space beside them, hold one, or ask what is beside them.
    if any(token["lstrip"] or token["rstrip"] or token["single_word"] or " " in token["content"] or "▁" in token["content"]
           for token in added):
        return None
    normalizer, steps = _steps(definition["normalizer"], "normalizers"), _steps(definition["pre_tokenizer"], "pretokenizers")
    if all(step["type"] == "NFC" for step in normalizer) and _cut_by_pattern(steps):
        return " "
    if _spaces_to_marks(normalizer, steps) and not any(re.search("[^▁]▁", token) for token in model["vocab"]):
        return ""
    return None


def _steps(definition: dict[str, Any] | None, inner: str) -> list[dict[str, Any]]:
    if definition is None:
        return []
    return list(definition[inner]) if definition["type"] == "Sequence" else [definition]


def _cut_by_pattern(steps: list[dict[str, Any]]) -> bool:
    """Steps of a byte-level tokenizer: a known pattern, digits on their own, the bytes at last."""
    if not steps or steps[-1]["type"] != "ByteLevel":
        return False
    cut = False
    for step in steps:
        match step:
            case {"type": "Digits"}:
                pass
            case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False} if pattern in PATTERNS:
                cut = True
            case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": by_pattern}:
                cut |= by_pattern
            case _:
                return False
    return cut


def _spaces_to_marks(normalizer: list[dict[str, Any]], steps: list[dict[str, Any]]) -> bool:
    """Every space becomes one mark, and one is put before a text."""
    match normalizer, steps:
        case [{"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}], []:
            return True
        case [], [{"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always" | "first"}]:
            return True
    return False
