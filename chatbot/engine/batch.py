"""Continuous batching of one model: answers join and leave between two steps.

One step of `Batch.advance` is one forward pass: it reads waiting prompts, up to a number of tokens (so that a long prompt holds running
answers up only briefly), and decodes one token of every running answer. The weights are fetched from memory once for all of them, which
is what a decoding step's time is spent on. Everything here runs in the scheduler's thread.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from chatbot.engine.base import End
from chatbot.engine.cache import Cache, Part, View, part_of, view_of
from chatbot.engine.graphs import DecodeGraphs
from chatbot.engine.sampling import draw_rows

CPU_PREFILL, GPU_PREFILL = 256, 2048
"""Prompt tokens read in one step, if the configuration does not say."""


@dataclass(eq=False)
class Answer:
    """One answer on its way through the scheduler."""

    prompt: list[int]
    max_tokens: int
    temperature: float
    top_p: float
    generator: torch.Generator | None
    ends: frozenset[int]
    """Tokens that end the answer."""
    on_token: Callable[[int], None]
    """Called in the scheduler's thread with each token that is part of the answer's text."""
    on_end: Callable[[End | Exception], None]
    """Called once, in the scheduler's thread."""
    score: Callable[[list[int]], tuple[int, list[list[int]]]] | None = None
    """Given the answer's tokens: how many of them to keep, and one continuation (tokens) for each word of the decision."""
    words: tuple[str, ...] = ()
    asked: float = field(default_factory=time.monotonic)
    started: float = 0.0
    first: float = 0.0
    last: float = 0.0
    read: int = 0
    """Prompt tokens in the cache."""
    tokens: list[int] = field(default_factory=list)
    cancelled: bool = False

    @property
    def position(self) -> int:
        """Where the next token to be fed belongs: all of the prompt and all but the newest token are in the cache."""
        return len(self.prompt) + len(self.tokens) - 1

    @property
    def ended(self) -> bool:
        return bool(self.tokens) and (self.tokens[-1] in self.ends or len(self.tokens) >= self.max_tokens)


class Batch:
    """The running and waiting answers of one model."""

    def __init__(self, model: Any, streams: int, waiting: int, context: int, prefill: int, graphs: bool) -> None:
        self.model = model
        self.device = next(model.parameters()).device
        dtype = model.config.dtype if model.config.dtype in (torch.float32, torch.bfloat16, torch.float16) else torch.float32
        self.cache = Cache(model.config, streams, context, self.device, dtype)
        self.limit = waiting
        self.prefill = prefill or (GPU_PREFILL if self.device.type == "cuda" else CPU_PREFILL)
        self.rows: list[Answer] = []
        """Row i of the cache belongs to rows[i]; only the last may still be reading its prompt."""
        self.waiting: deque[Answer] = deque()
        self.graphs = DecodeGraphs(model, self.cache) if graphs and self.device.type == "cuda" else None
        self._row_ids = torch.arange(streams, device=self.device)

    @property
    def idle(self) -> bool:
        return not self.rows and not self.waiting

    @property
    def reading(self) -> Answer | None:
        """The answer whose prompt is being read."""
        return self.rows[-1] if self.rows and self.rows[-1].read < len(self.rows[-1].prompt) else None

    @torch.inference_mode()
    def advance(self) -> None:
        """One step. An error of the model ends every answer with it and leaves the batch empty and usable."""
        try:
            self._drop_cancelled()
            self._step()
        except Exception as error:
            self.fail(error)
            if not isinstance(error, torch.OutOfMemoryError):
                raise

    def fail(self, error: Exception) -> None:
        """End every answer with `error`."""
        answers = [*self.rows, *self.waiting]
        self.rows.clear()
        self.waiting.clear()
        for answer in answers:
            answer.on_end(error)

    def _drop_cancelled(self) -> None:
        if any(a.cancelled for a in self.waiting):
            self.waiting = deque(a for a in self.waiting if not a.cancelled)
        for answer in [a for a in self.rows if a.cancelled]:
            self._remove(answer)

    def _remove(self, answer: Answer) -> None:
        """Free an answer's row: the last decoding answer takes it, and the one reading its prompt moves down behind it."""
        row = self.rows.index(answer)
        reading = self.reading
        if reading is not answer:
            last = len(self.rows) - (2 if reading else 1)
            if row != last:
                # One more than its position: within a decoding step the token just fed is in the cache, but not yet answered to.
                self.cache.move(last, row, self.rows[last].position + 1)
                self.rows[row] = self.rows[last]
            if reading:
                self.cache.move(last + 1, last, reading.read)
                self.rows[last] = reading
        self.rows.pop()

    def _next_parts(self) -> list[tuple[Answer, list[int]]]:
        """What is read of prompts in this step: the one begun before, then those that wait while there is room."""
        parts: list[tuple[Answer, list[int]]] = []
        room, answer = self.prefill, self.reading
        while room:
            if answer is None:
                if not self.waiting or len(self.rows) == self.cache.rows:
                    break
                answer = self.waiting.popleft()
                answer.started = time.monotonic()
                self.rows.append(answer)
            part = answer.prompt[answer.read:answer.read + room]
            parts.append((answer, part))
            room -= len(part)
            answer = None
        return parts

    def _forward(self, parts: tuple[Part, ...], part_tokens: list[int], tokens: list[int], positions: list[int],
                 keep: list[int]) -> torch.Tensor:
        """Feed the tokens of `parts`, and one token of each of the first rows; logits [len(keep), vocabulary] of the fed tokens `keep`."""
        at = torch.tensor(positions, dtype=torch.int64, device=self.device)
        before = [torch.arange(p.start, p.end, device=self.device) for p in parts]
        view = view_of(self.cache, parts, self._row_ids[:len(tokens)], at, max(positions) + 1) if tokens else View(self.cache, parts)
        out = self.model(input_ids=torch.tensor([part_tokens + tokens], device=self.device), position_ids=torch.cat([*before, at])[None],
                         use_cache=False, view=view, logits_to_keep=torch.tensor(keep, dtype=torch.int64, device=self.device))
        return out.logits[0]

    def _step(self) -> None:
        decoding = self.rows[:-1] if self.reading else self.rows[:]
        reading = self._next_parts()
        tokens, positions = [a.tokens[-1] for a in decoding], [a.position for a in decoding]
        if self.graphs and decoding and not reading:
            self._draw(decoding, self.graphs.run(tokens, positions))
            return
        if not decoding and not reading:
            return
        parts, part_tokens, keep, read = [], [], [], []
        for row, (answer, part) in enumerate(reading, len(self.rows) - len(reading)):
            parts.append(part_of(row, answer.read, len(part), self.device))
            part_tokens += part
            if answer.read + len(part) == len(answer.prompt):
                read.append(answer)
                keep.append(len(part_tokens) - 1)
        keep += range(len(part_tokens), len(part_tokens) + len(tokens))
        logits = self._forward(tuple(parts), part_tokens, tokens, positions, keep)
        for answer, part in reading:
            answer.read += len(part)
        self._draw(read + decoding, logits)

    def _draw(self, answers: list[Answer], logits: torch.Tensor) -> None:
        """The next token of each answer from its row of logits."""
        drawn = draw_rows(logits, [(a.temperature, a.top_p, a.generator) for a in answers])
        for answer, token in zip(answers, drawn, strict=True):
            self._take(answer, token)

    def _take(self, answer: Answer, token: int) -> None:
        """Add a drawn token; an answer that ends leaves its row."""
        answer.tokens.append(token)
        answer.last = time.monotonic()
        answer.first = answer.first or answer.last
        if token not in answer.ends:
            answer.on_token(token)
        if answer.ended:
            decision = self._decide(answer)
            self._remove(answer)
            answer.on_end(End("stop" if token in answer.ends else "length", len(answer.prompt), len(answer.tokens),
                              answer.started - answer.asked, answer.first - answer.asked, answer.last - answer.asked, decision))

    def _feed(self, tokens: list[int], row: int, start: int, keep: int) -> torch.Tensor:
        """Feed consecutive tokens of one row; logits [keep, vocabulary] of the last `keep`."""
        part = part_of(row, start, len(tokens), self.device)
        return self._forward((part,), tokens, [], [], list(range(len(tokens) - keep, len(tokens))))

    def _decide(self, answer: Answer) -> dict[str, float]:
        """Probability of each decision word after the answer, from the same cache: only the decision's own tokens are fed."""
        if answer.score is None:
            return {}
        kept, continuations = answer.score(answer.tokens)
        room = self.cache.length - len(answer.prompt) - kept
        if max(map(len, continuations)) > room:
            return {}
        common = 0
        while len({tuple(c[:common + 1]) for c in continuations}) == 1 and all(len(c) > common + 1 for c in continuations):
            common += 1
        row, start = self.rows.index(answer), len(answer.prompt) + kept
        # The last token before the continuation is fed again: its logits are those of the first continuation token.
        before = (answer.prompt + answer.tokens[:kept])[-1]
        head = self._feed([before, *continuations[0][:common]], row, start - 1, 1)[-1].log_softmax(-1)
        scores = []
        for continuation in continuations:
            tail = continuation[common:]
            score = head[tail[0]]
            if len(tail) > 1:
                logits = self._feed(tail[:-1], row, start + common, len(tail) - 1).log_softmax(-1)
                score = score + logits[torch.arange(len(tail) - 1), tail[1:]].sum()
            scores.append(score)
        return dict(zip(answer.words, torch.stack(scores).softmax(0).tolist(), strict=True))
