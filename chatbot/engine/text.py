"""Tokens to text while they come."""

from __future__ import annotations

from typing import Any


class TextStream:
    """Turns tokens into text piece by piece; a piece never ends inside a character.

    Only the tail is decoded again for each token, with enough tokens before it for tokenizers that treat a text's beginning
    differently (leading spaces).
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.tokens: list[int] = []
        self._from = 0
        self._done = 0

    def _decode(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def push(self, token: int) -> str:
        """The text that this token completes; empty while a character is unfinished."""
        self.tokens.append(token)
        before = self._decode(self.tokens[self._from:self._done])
        after = self._decode(self.tokens[self._from:])
        if after.endswith("\ufffd") or len(after) <= len(before):
            return ""
        self._from, self._done = self._done, len(self.tokens)
        return after[len(before):]

    def finish(self) -> str:
        """What is left at the end: an unfinished character shows as its replacement."""
        before = self._decode(self.tokens[self._from:self._done])
        return self._decode(self.tokens[self._from:])[len(before):]


class StopTexts:
    """Holds back text that may be the beginning of a stop text."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self.stops = tuple(s for s in stops if s)
        self.held = ""
        self.found = False

    def push(self, text: str) -> str:
        """The text that is safe to show; after `found`, nothing more."""
        if self.found:
            return ""
        self.held += text
        places = [i for i in (self.held.find(s) for s in self.stops) if i >= 0]
        if places:
            self.found = True
            shown, self.held = self.held[:min(places)], ""
            return shown
        keep = max((n for s in self.stops for n in range(1, len(s)) if self.held.endswith(s[:n])), default=0)
        cut = len(self.held) - keep
        shown, self.held = self.held[:cut], self.held[cut:]
        return shown

    def finish(self) -> str:
        """What was held back and turned out not to be a stop text."""
        shown, self.held = self.held, ""
        return "" if self.found else shown
