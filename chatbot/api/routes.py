"""HTTP endpoints: the OpenAI-compatible API, /ask, feedback, the report, probes and figures."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any, TypeVar

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, ValidationError

from chatbot.access.gate import problem
from chatbot.api.bodies import AskRequest, ChatRequest, FeedbackRequest, explain
from chatbot.config import Config
from chatbot.conversation import Admitted, Conversation, Delta, Done, ModelName, Question
from chatbot.errors import BusyError, NotReadyError, UserError
from chatbot.guardrails.base import Who
from chatbot.serving.prompt import Turn

Body = TypeVar("Body", bound=BaseModel)


def who(request: Request) -> Who:
    """The user and address that the gate found."""
    return Who(request.state.user, request.state.address)


def failure(error: UserError) -> tuple[int, bytes, dict[str, str]]:
    """Status, body and headers for an error."""
    if isinstance(error, NotReadyError):
        return 503, problem(str(error), "not_ready"), {"retry-after": "5"}
    if isinstance(error, BusyError):
        return 503, problem(str(error), "busy"), {"retry-after": "2"}
    return 400, problem(str(error), "bad_request"), {}


def refused(error: UserError) -> Response:
    status, body, headers = failure(error)
    return Response(body, status, {**headers, "content-type": "application/json"})


async def read(request: Request, kind: type[Body]) -> Body:
    """The request's JSON as `kind`. Raises UserError that names the field."""
    try:
        return kind.model_validate_json(await request.body())
    except ValidationError as error:
        raise UserError(explain(error.errors(include_input=False, include_url=False))) from None


def pick(name: str) -> ModelName:
    """`tuned` or `base` from a request's model: `base`, `<run>:base`; anything else is the tuned model, whatever a client calls it."""
    return "base" if name == "base" or name.endswith(":base") else "tuned"


def usage(done: Done) -> dict[str, int]:
    prompt, tokens = (done.end.prompt_tokens, done.end.tokens) if done.end else (0, 0)
    return {"prompt_tokens": prompt, "completion_tokens": tokens, "total_tokens": prompt + tokens}


def attribution(done: Done, model: str) -> dict[str, Any]:
    """What every answer carries besides OpenAI's fields."""
    end = done.end
    return {"attribution": {**done.facts.to_dict(), "model": model}, "notice": done.notice, "decision": done.decision,
            "guardrails": [{"check": v.check, "stage": v.stage, "action": v.action, "rule": v.rule} for v in done.verdicts],
            "timing": {"waited_seconds": end.waited, "first_token_seconds": end.first, "seconds": end.total,
                       "tokens_per_second": end.tokens_per_second} if end else None}


class Routes:
    """The endpoints of one application."""

    def __init__(self, config: Config, conversation: Conversation) -> None:
        self.config, self.conversation = config, conversation
        self.service, self.metrics = conversation.service, conversation.metrics
        self.router = APIRouter()
        add = self.router.add_api_route
        add("/v1/chat/completions", self.chat, methods=["POST"])
        add("/v1/models", self.models, methods=["GET"])
        add("/ask", self.ask, methods=["POST"])
        add("/feedback", self.feedback, methods=["POST"])
        add("/report", self.report, methods=["GET"])
        add("/healthz", self.healthz, methods=["GET"])
        add("/readyz", self.readyz, methods=["GET"])
        add("/metrics", self.figures, methods=["GET"])

    async def chat(self, request: Request) -> Response:
        """OpenAI's chat completion, streamed or whole. `model` is `tuned`, `base`, or the run's id (tuned)."""
        try:
            body = await read(request, ChatRequest)
            page = self.config.page
            admitted = await self.conversation.admit(Question(
                body.turns, body.context, page.temperature if body.temperature is None else body.temperature,
                page.top_p if body.top_p is None else body.top_p, body.max_completion_tokens or body.max_tokens or page.max_tokens,
                body.seed, body.stops, body.decision, who(request)))
            if admitted.checked.stop and admitted.checked.stop.status >= 400:
                return self._limited(admitted)
            parts = self.conversation.answer(admitted, pick(body.model))
            # The first part is fetched before the response begins, so that an error still has its status.
            first = await anext(parts)
        except UserError as error:
            return refused(error)
        if body.stream:
            options = body.stream_options or None
            return StreamingResponse(self._events(first, parts, pick(body.model), bool(options and options.include_usage)),
                                     media_type="text/event-stream", headers={"x-accel-buffering": "no"})
        try:
            text, done = await collect(first, parts)
        except UserError as error:
            return refused(error)
        return JSONResponse({
            "id": done.id, "object": "chat.completion", "created": int(time.time()), "model": done.facts.run,
            "choices": [{"index": 0, "message": {"role": "assistant", "content": text, "refusal": None}, "logprobs": None,
                         "finish_reason": done.reason}],
            "usage": usage(done), **attribution(done, pick(body.model))})

    async def _events(self, first: Delta | Done, parts: AsyncIterator[Delta | Done], model: str, with_usage: bool) -> AsyncIterator[bytes]:
        """Server-sent events in OpenAI's form; the last one before [DONE] carries the attribution."""
        created, identity, name = int(time.time()), first.id, first.run

        def event(delta: dict[str, Any], reason: str | None = None, **more: Any) -> bytes:
            value = {"id": identity, "object": "chat.completion.chunk", "created": created, "model": name,
                     "choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}], **more}
            return b"data: " + json.dumps(value, ensure_ascii=False).encode() + b"\n\n"

        async with aclosing(parts):  # type: ignore[type-var]
            yield event({"role": "assistant", "content": ""})
            part = first
            try:
                while True:
                    if isinstance(part, Delta):
                        yield event({"content": part.text})
                    else:
                        yield event({}, part.reason, **attribution(part, model))
                        if with_usage:
                            value = {"id": identity, "object": "chat.completion.chunk", "created": created, "model": name, "choices": [],
                                     "usage": usage(part)}
                            yield b"data: " + json.dumps(value).encode() + b"\n\n"
                        break
                    part = await anext(parts)
            except UserError as error:
                yield b"data: " + failure(error)[1] + b"\n\n"
            yield b"data: [DONE]\n\n"

    def _limited(self, admitted: Admitted) -> Response:
        stop = admitted.checked.stop
        assert stop
        headers = {"content-type": "application/json", **({"retry-after": "10"} if stop.status == 429 else {})}
        return Response(problem(stop.text, f"guardrail_{stop.check}"), stop.status, headers)

    async def ask(self, request: Request) -> Response:
        """One question, one answer, in simple JSON (`make ask`)."""
        try:
            body = await read(request, AskRequest)
            page = self.config.page
            admitted = await self.conversation.admit(Question(
                [Turn("user", body.question)], body.context, page.temperature if body.temperature is None else body.temperature,
                page.top_p, body.max_tokens or page.max_tokens, who=who(request)))
            if admitted.checked.stop and admitted.checked.stop.status >= 400:
                return self._limited(admitted)
            parts = self.conversation.answer(admitted, body.model)
            text, done = await collect(await anext(parts), parts)
        except UserError as error:
            return refused(error)
        return JSONResponse({"answer": text, "id": done.id, "reason": done.reason, "usage": usage(done), **attribution(done, body.model)})

    async def models(self) -> Response:
        """The models that can be named in a request."""
        served = self.service.current
        names = [] if served is None else [served.run.id, "tuned"] + ([f"{served.run.id}:base", "base"] if served.base else [])
        return JSONResponse({"object": "list", "data": [
            {"id": n, "object": "model", "created": 0, "owned_by": "llm-finetune",
             "attribution": served.facts.to_dict() if served else None} for n in names]})

    async def feedback(self, request: Request) -> Response:
        """Keep a thumb."""
        try:
            body = await read(request, FeedbackRequest)
        except UserError as error:
            return refused(error)
        run = self.service.current.run.id if self.service.current else ""
        kept = self.conversation.keeper.feedback({**body.model_dump(exclude_defaults=True), "run": run})
        return JSONResponse({"kept": kept}, 200 if kept else 503)

    async def report(self) -> Response:
        """The served run's report, read-only. Its own scripts don't run here (sandbox)."""
        served = self.service.current
        try:
            if served is None:
                raise OSError
            content = (served.run.root / "report.html").read_bytes()
        except OSError:
            return Response(problem("The served run has no report.", "no_report"), 404, {"content-type": "application/json"})
        return Response(content, headers={
            "content-type": "text/html; charset=utf-8",
            "content-security-policy": "sandbox allow-popups; default-src 'none'; "
                                       "style-src 'unsafe-inline'; img-src data: 'self'; font-src data:"})

    async def healthz(self) -> Response:
        """The process answers. Says nothing about the model: a restart would not bring it back."""
        return JSONResponse({"state": "alive"})

    async def readyz(self) -> Response:
        """200 if a question asked now gets an answer, else 503 and why not."""
        ok, reason = self.service.ready()
        return JSONResponse({"ready": ok, "state": reason}, 200 if ok else 503)

    async def figures(self) -> Response:
        """Prometheus figures."""
        served, metrics = self.service.current, self.metrics
        metrics.ready.set(self.service.ready()[0])
        metrics.info.clear()
        if served:
            metrics.info.labels(served.run.id, served.run.digest).set(1)
            for name, model in (("tuned", served.tuned), ("base", served.base)):
                if model:
                    load = model.load()
                    metrics.running.labels(name).set(load.running)
                    metrics.waiting.labels(name).set(load.waiting)
        return Response(metrics.text(), media_type="text/plain; version=0.0.4")


async def collect(first: Delta | Done, parts: AsyncIterator[Delta | Done]) -> tuple[str, Done]:
    """The whole answer."""
    texts = []
    async with aclosing(parts):  # type: ignore[type-var]
        part = first
        while not isinstance(part, Done):
            texts.append(part.text)
            part = await anext(parts)
    return "".join(texts), part
