"""From a question to a streamed answer: checks, prompt, model, checks, records. Page and API both go through here."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from chatbot.engine.base import End, Piece, Request
from chatbot.errors import BusyError, NotReadyError, UserError
from chatbot.guardrails.base import Verdict, Who
from chatbot.guardrails.pipeline import Checked, Pipeline
from chatbot.metrics import Metrics
from chatbot.records.keeper import Keeper
from chatbot.serving.facts import Facts
from chatbot.serving.prompt import Turn
from chatbot.serving.service import Served, Service

log = logging.getLogger(__name__)

ModelName = Literal["tuned", "base"]


@dataclass(frozen=True)
class Question:
    """What somebody asks."""

    turns: list[Turn]
    """The conversation; the last turn is the user's."""
    context: str = ""
    """The text that the question is about (an abstract)."""
    temperature: float = 0.0
    top_p: float = 1.0
    max_tokens: int = 256
    seed: int | None = None
    stop: tuple[str, ...] = ()
    decision: bool = True
    """Also ask for the decision's probabilities, if the run's format has decisions."""
    who: Who = field(default_factory=Who)


@dataclass(frozen=True)
class Delta:
    """The next part of the answer."""

    id: str
    run: str
    text: str
    tokens: int


@dataclass(frozen=True)
class Done:
    """The answer is complete."""

    id: str
    reason: Literal["stop", "length", "content_filter", "left"]
    """`left`: the reader stopped it (in the audit alone)."""
    facts: Facts
    end: End | None
    """None if the model was not asked."""
    verdicts: list[Verdict]
    notice: str
    status: int = 200
    """HTTP status for an answer that was refused before the model."""

    @property
    def run(self) -> str:
        return self.facts.run

    @property
    def decision(self) -> dict[str, float]:
        return self.end.decision if self.end and self.reason != "content_filter" else {}


@dataclass(frozen=True)
class Admitted:
    """A question that has been checked; it may be put to several models."""

    question: Question
    checked: Checked


class Conversation:
    """Answers questions."""

    def __init__(self, service: Service, pipeline: Pipeline, keeper: Keeper, metrics: Metrics) -> None:
        self.service, self.pipeline, self.keeper, self.metrics = service, pipeline, keeper, metrics

    async def admit(self, question: Question) -> Admitted:
        """Check a question once; its personal data is redacted in what is returned."""
        earlier = [t.content for t in question.turns[:-1]]
        checked = await self.pipeline.question(question.turns[-1].content, question.context, earlier, question.who)
        parts = checked.parts
        turns = [replace(t, content=parts[f"history {i}"]) for i, t in enumerate(question.turns[:-1])]
        turns.append(replace(question.turns[-1], content=parts["question"]))
        return Admitted(replace(question, turns=turns, context=parts["context"]), checked)

    async def answer(self, admitted: Admitted, model: ModelName = "tuned") -> AsyncGenerator[Delta | Done, None]:
        """Stream an answer. Raises UserError (NotReadyError, BusyError, a question that does not fit) before the first part, or later."""
        exchange, began = f"chatcmpl-{secrets.token_hex(12)}", time.monotonic()
        try:
            async with self.service.use() as served:
                async with aclosing(self._answer(exchange, served, admitted, model)) as parts:
                    tokens, kept = 0, False
                    try:
                        async for part in parts:
                            if isinstance(part, Done):
                                # Before it is given out: a reader may leave with the last part in hand.
                                kept = True
                                self._count(part, model)
                                await asyncio.to_thread(self.keeper.audit, self._line(part, admitted, model, time.monotonic() - began))
                            else:
                                tokens = part.tokens
                            yield part
                    except (GeneratorExit, asyncio.CancelledError):
                        if not kept:
                            self.metrics.answers.labels(model, "left").inc()
                            line = self._line(Done(exchange, "left", served.facts, None, admitted.checked.verdicts, ""), admitted, model,
                                              time.monotonic() - began)
                            # Not awaited: who closes the stream is not held up.
                            asyncio.get_running_loop().run_in_executor(None, self.keeper.audit, {**line, "tokens": tokens})
                        raise
        except (NotReadyError, BusyError) as error:
            self.metrics.errors.labels(type(error).__name__.lower()).inc()
            raise
        except UserError:
            self.metrics.errors.labels("request").inc()
            raise

    async def _answer(self, exchange: str, served: Served, admitted: Admitted, model: ModelName) -> AsyncGenerator[Delta | Done, None]:
        question, checked = admitted.question, admitted.checked
        notice = self.pipeline.texts["notice"]
        weights = served.model(model)
        if checked.stop:
            yield Delta(exchange, served.run.id, checked.stop.text, 0)
            yield Done(exchange, "content_filter", served.facts, None, checked.verdicts, notice, checked.stop.status)
            return
        turns = question.turns if served.prompt.remembers else question.turns[-1:]
        request = Request(
            prompt=served.prompt.render(turns, question.context, served.tokenizer),
            special_tokens=served.prompt.add_special_tokens and not (served.prompt.chat and served.tokenizer.chat_template),
            temperature=question.temperature, top_p=question.top_p, max_tokens=question.max_tokens, seed=question.seed,
            stop=question.stop, stop_tokens=served.prompt.stop, decision=served.prompt.decision if question.decision else None)
        guard = self.pipeline.answer()
        given, tokens = 0, 0
        async with aclosing(weights.stream(request)) as parts:  # type: ignore[type-var]
            async for part in parts:
                text = await guard.push(part.text) if isinstance(part, Piece) else await guard.finish()
                end = part if isinstance(part, End) else None
                if isinstance(part, Piece):
                    tokens = part.tokens
                if text:
                    given += len(text)
                    yield Delta(exchange, served.run.id, text, tokens)
                if guard.stop:
                    yield Delta(exchange, served.run.id, guard.stop.text if not given else f"\n\n*{guard.stop.text}*", tokens)
                    yield Done(exchange, "content_filter", served.facts, end, checked.verdicts + guard.verdicts, notice)
                    return
                if end:
                    yield Done(exchange, end.reason, served.facts, end, checked.verdicts + guard.verdicts, notice)

    def _count(self, done: Done, model: ModelName) -> None:
        """Figures of a finished exchange."""
        self.metrics.answers.labels(model, done.reason).inc()
        if end := done.end:
            self.metrics.tokens.labels(model, "prompt").inc(end.prompt_tokens)
            self.metrics.tokens.labels(model, "answer").inc(end.tokens)
            self.metrics.first.labels(model).observe(end.first)
            self.metrics.wait.labels(model).observe(end.waited)
            if end.tokens_per_second:
                self.metrics.speed.labels(model).observe(end.tokens_per_second)

    def _line(self, done: Done, admitted: Admitted, model: ModelName, seconds: float) -> dict[str, Any]:
        """The audit line of an exchange: hashes, lengths, latencies, verdicts."""
        end, question = done.end, admitted.question
        return {
            "exchange": done.id, "run": done.facts.run, "checkpoint_sha256": done.facts.checkpoint_sha256, "model": model,
            "user": self.keeper.hashed(question.who.user), "address": self.keeper.hashed(question.who.address),
            "question": self.keeper.hashed(question.turns[-1].content), "question_characters": len(question.turns[-1].content),
            "context_characters": len(question.context), "turns": len(question.turns), "reason": done.reason,
            "prompt_tokens": end.prompt_tokens if end else 0, "tokens": end.tokens if end else 0,
            "first_seconds": round(end.first, 4) if end else None, "seconds": round(seconds, 4),
            "verdicts": [{"check": v.check, "stage": v.stage, "action": v.action, "rule": v.rule} for v in done.verdicts]}
