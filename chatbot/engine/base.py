"""The interface of an engine: what a question to a model is, and what comes back.

A `Model` is one set of weights that answers. `stream` takes a `Request` and yields `Piece`s of text and one `End`. Closing the
iterator early (a user's stop, a closed connection) frees what it held.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Literal, Protocol


@dataclass(frozen=True)
class Decision:
    """After the answer: how likely is each of `words`, written after `prefix` (which follows the answer)?"""

    prefix: str
    words: tuple[str, ...]


@dataclass(frozen=True)
class Request:
    """A rendered prompt and how to go on from it."""

    prompt: str
    """The whole text before the answer, in the model's own form; special tokens in it are read as such."""
    special_tokens: bool = True
    """Let the tokenizer add its own (beginning of sequence) to the prompt."""
    temperature: float = 0.0
    """0: the most likely token each time."""
    top_p: float = 1.0
    """Share of the probability from which tokens are drawn, above 0."""
    max_tokens: int = 256
    """Longest answer in tokens."""
    seed: int | None = None
    """Makes draws repeatable on the same machine."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer; they are not part of it."""
    stop_tokens: tuple[str, ...] = ()
    """Special tokens of the run's format that end the answer, besides the tokenizer's end of sequence."""
    decision: Decision | None = None
    """Ask for the decision's probabilities as well."""


@dataclass(frozen=True)
class Piece:
    """The next part of an answer. `tokens` is the number of tokens so far (a piece may hold several, or part of one)."""

    text: str
    tokens: int


@dataclass(frozen=True)
class End:
    """How an answer ended, and its times in seconds."""

    reason: Literal["stop", "length"]
    prompt_tokens: int
    tokens: int
    """Tokens of the answer, the ending one included."""
    waited: float
    """From the request until a place was free."""
    first: float
    """From the request until the first token."""
    total: float
    """From the request until the last token."""
    decision: dict[str, float] = field(default_factory=dict)
    """Probability by word, together 1; empty if not asked for."""

    @property
    def tokens_per_second(self) -> float:
        """Speed of the answer after its first token."""
        return (self.tokens - 1) / (self.total - self.first) if self.tokens > 1 and self.total > self.first else 0.0


@dataclass(frozen=True)
class Load:
    """How busy a model is."""

    running: int
    waiting: int


class Model(Protocol):
    """Weights that answer."""

    context: int
    """Most tokens of prompt and answer together."""

    def stream(self, request: Request) -> AsyncIterator[Piece | End]:
        """Answer. Raises UserError (prompt too long, BusyError, NotReadyError) before the first piece, or later if the engine fails."""
        ...

    def load(self) -> Load:
        """How busy it is now."""
        ...

    async def close(self) -> None:
        """Free it. Running answers end with NotReadyError."""
        ...
