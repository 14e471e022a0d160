"""A model in this process."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from pathlib import Path
from queue import Queue
from typing import Any

import torch

from chatbot.config import EngineConfig
from chatbot.engine.base import Decision, End, Load, Piece, Request
from chatbot.engine.batch import Answer, Batch
from chatbot.engine.loading import give_back, load_model, load_tokenizer, pick_device
from chatbot.engine.scheduler import Scheduler
from chatbot.engine.text import StopTexts, TextStream
from chatbot.errors import UserError

log = logging.getLogger(__name__)


class LocalModel:
    """Weights in this process, answering through a scheduler."""

    def __init__(self, model: Any, tokenizer: Any, scheduler: Scheduler, config: EngineConfig) -> None:
        self.tokenizer = tokenizer
        limit = getattr(model.config, "max_position_embeddings", config.context)
        self.context = min(config.context, limit)
        self.batch = Batch(model, config.streams, config.waiting, self.context, config.prefill, config.graphs)
        self.scheduler = scheduler
        ends = model.generation_config.eos_token_id if model.generation_config is not None else None
        self.ends = set([ends] if isinstance(ends, int) else ends or [])
        if tokenizer.eos_token_id is not None:
            self.ends.add(tokenizer.eos_token_id)
        scheduler.add(self.batch)

    @classmethod
    def load_directory(cls, directory: Path, scheduler: Scheduler, config: EngineConfig, gguf_file: str = "") -> LocalModel:
        """Load a model directory and answer once, so that the first user does not wait for what is only done once.

        Blocks; call it in a thread. Raises UserError.
        """
        began = time.monotonic()
        device = pick_device(config.device)
        model = load_model(directory, device, config.precision, gguf_file)
        tokenizer = load_tokenizer(directory, gguf_file)
        local = cls(model, tokenizer, scheduler, config)
        local._warm_up()
        give_back()
        log.info("loaded %s on %s in %.1f s; cache for %d answers of %d tokens: %.2f GiB", directory, device,
                 time.monotonic() - began, config.streams, local.context, local.batch.cache.nbytes / 2**30)
        return local

    def _warm_up(self) -> None:
        done: Queue[End | Exception] = Queue()
        self.scheduler.submit(self.batch, Answer(
            prompt=[min(self.ends, default=0)] * 8, max_tokens=4, temperature=0, top_p=1, generator=None, ends=frozenset(),
            on_token=lambda _: None, on_end=done.put))
        end = done.get()
        if isinstance(end, Exception):
            self.scheduler.remove(self.batch)
            raise UserError(f"The model was loaded but cannot answer: {end}") from end

    def load(self) -> Load:
        """Running and waiting answers."""
        return self.scheduler.load(self.batch)

    async def close(self) -> None:
        """Free the model; running answers end with NotReadyError."""
        await asyncio.to_thread(self.scheduler.remove, self.batch)

    def _encode(self, text: str, special_tokens: bool) -> list[int]:
        return self.tokenizer(text, add_special_tokens=special_tokens).input_ids

    def _score(self, decision: Decision, tokens: list[int]) -> tuple[int, list[list[int]]]:
        """For `Answer.score`: an answer that already has the decision is cut before it, so that its own words are scored."""
        text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        marker = decision.prefix.strip()
        place = text.rfind(marker) if marker else -1
        wanted = text[:place].rstrip() if place >= 0 else text.rstrip()
        kept = len(tokens)
        while kept and len(self.tokenizer.decode(tokens[:kept], skip_special_tokens=True)) > len(wanted):
            kept -= 1
        while kept and tokens[kept - 1] in self.ends:
            kept -= 1
        # A token may reach over the cut: what it held of the answer is written again before the decision.
        rest = wanted[len(self.tokenizer.decode(tokens[:kept], skip_special_tokens=True)):]
        return kept, [self._encode(rest + decision.prefix + word, False) for word in decision.words]

    async def stream(self, request: Request) -> AsyncIterator[Piece | End]:
        """Answer. See `base.Model`."""
        prompt = await asyncio.to_thread(self._encode, request.prompt, request.special_tokens)
        room = self.context - len(prompt)
        if room < 1:
            raise UserError(f"The question is too long: {len(prompt)} tokens, and {self.context - 1} fit. Shorten it or its context.")
        if not prompt:
            raise UserError("The question is empty.")
        loop, queue = asyncio.get_running_loop(), asyncio.Queue()  # type: ignore[var-annotated]

        def put(item: Any) -> None:
            try:
                loop.call_soon_threadsafe(queue.put_nowait, item)
            except RuntimeError:  # the loop is gone: nobody listens any more
                answer.cancelled = True

        generator = None
        if request.temperature > 0 and request.seed is not None:
            generator = torch.Generator(self.batch.device).manual_seed(request.seed)
        stops = {self.tokenizer.convert_tokens_to_ids(t) for t in request.stop_tokens} - {None, self.tokenizer.unk_token_id}
        answer = Answer(prompt, min(request.max_tokens, room), request.temperature, request.top_p, generator,
                        frozenset(self.ends | stops), put, put)
        if request.decision:
            decision = request.decision
            answer.words = decision.words
            answer.score = lambda tokens: self._score(decision, tokens)
        text, held = TextStream(self.tokenizer), StopTexts(request.stop)
        self.scheduler.submit(self.batch, answer)
        try:
            while True:
                item = await queue.get()
                if isinstance(item, Exception):
                    raise item if isinstance(item, UserError) else UserError(f"The model failed: {item}") from item
                if isinstance(item, End):
                    rest = held.push(text.finish()) + held.finish()
                    if rest:
                        yield Piece(rest, item.tokens)
                    yield item
                    return
                piece = held.push(text.push(item))
                if piece:
                    yield Piece(piece, len(text.tokens))
                if held.found:
                    now = time.monotonic()
                    yield End("stop", len(prompt), len(text.tokens), answer.started - answer.asked, answer.first - answer.asked,
                              now - answer.asked)
                    return
        finally:
            self.scheduler.cancel(answer)
