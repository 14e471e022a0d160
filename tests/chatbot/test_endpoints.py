"""What runs elsewhere, over real connections: the engine (engine.kind: openai), a Llama Guard endpoint, a NeMo Guardrails server.

A small server on loopback stands in for all three; the application reaches it through its configuration alone."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from conftest import Running, Storage, free_port, make_config
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

HARM, CHANGED = "marmalade", "[taken out]"
"""A word that the stand-ins take for harmful; what the rails put in the place of `quince`."""
SAID = {"jam": HARM, "pome": "quince"}
"""What the model says for words of a question, so that an answer is harmful where its question is not."""


class StandIn:
    """An endpoint whose behaviour the texts decide: `down`, `slow` and `odd` are ways to fail."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict[str, Any], str]] = []
        """(path, body, Authorization) of each request."""
        self.names = ["tuned-elsewhere"]
        paths = {"/v1/chat/completions": self.guard, "/v1/checks": self.rails, "/v1/completions": self.complete}
        self.app = Starlette(routes=[Route(path, answer, methods=["POST"]) for path, answer in paths.items()]
                             + [Route("/v1/models", self.models)])

    async def _read(self, request: Request) -> tuple[dict[str, Any], str]:
        body = await request.json()
        self.asked.append((request.url.path, body, request.headers.get("authorization", "")))
        text = body["messages"][0]["content"]
        await asyncio.sleep(5 if "slow" in text else 0)
        return body, text

    async def guard(self, request: Request) -> Response:
        """As Llama Guard answers through vLLM."""
        _, text = await self._read(request)
        said = "I think so" if "odd" in text else "unsafe\nS9" if HARM in text else "\n\nsafe"
        return JSONResponse({"choices": [{"message": {"role": "assistant", "content": said}}]}, 500 if "down" in text else 200)

    async def rails(self, request: Request) -> Response:
        """As `nemoguardrails server` answers on /v1/checks."""
        body, text = await self._read(request)
        status = "odd" if "odd" in text else "blocked" if HARM in text else "modified" if "quince" in text else "passed"
        rail = {"rail": f"self check {body['guardrails']['rail_types'][0]}"} if status == "blocked" else {}
        return JSONResponse({"status": status, "content": text.replace("quince", CHANGED), **rail}, 500 if "down" in text else 200)

    async def models(self, _: Request) -> Response:
        return JSONResponse({"data": [{"id": name} for name in self.names]})

    async def complete(self, request: Request) -> Response:
        """As vLLM streams: what stands behind `say:` in the question."""
        body = await request.json()
        self.asked.append((request.url.path, body, request.headers.get("authorization", "")))
        if not body["stream"]:
            return JSONResponse({"choices": [{"text": " yes", "logprobs": {"top_logprobs": [{" yes": -0.1, " no": -3.0}]}}]})
        words = [SAID.get(w, w) for w in body["prompt"].partition("say:")[2].partition("\n")[0].split()] or ["nothing"]

        async def events() -> AsyncIterator[str]:
            for word in words:
                yield f"data: {json.dumps({'choices': [{'text': f' {word}', 'finish_reason': None}]})}\n\n"
            yield f"data: {json.dumps({'choices': [{'text': '', 'finish_reason': 'stop'}]})}\n\n"
            yield f"data: {json.dumps({'choices': [], 'usage': {'prompt_tokens': 9, 'completion_tokens': len(words)}})}\n\n"
            yield "data: [DONE]\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")


@asynccontextmanager
async def served(stand_in: StandIn, port: int = 0) -> AsyncIterator[str]:
    """The stand-in on a loopback port; gives its base URL."""
    port = port or free_port()
    server = uvicorn.Server(uvicorn.Config(stand_in.app, host="127.0.0.1", port=port, log_level="warning", lifespan="off",
                                           timeout_graceful_shutdown=1))
    task = asyncio.create_task(server.serve())
    while not server.started:
        assert not task.done()
        await asyncio.sleep(0.02)
    try:
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.should_exit = True
        await task


def guards(**checks: Any) -> dict[str, Any]:
    """Guardrails of a test: only those that are asked elsewhere, beside the built-in ones that a random text would not trip."""
    return {"checks": {"rate": {"enabled": False}, "gibberish": {"enabled": False}, "repetition": {"enabled": False}, **checks}}


async def ask(app: Running, question: str) -> dict[str, Any]:
    reply = await app.client.post("/ask", json={"question": question, "max_tokens": 8})
    assert reply.status_code == 200, reply.text
    return dict(reply.json())


async def test_the_engine_elsewhere(storage: Storage, tmp_path: Path) -> None:
    """The run's own prompt goes to the endpoint with its key; text, usage, decision and attribution come back, whole and streamed."""
    storage.add("demo-0123456789")
    (tmp_path / "key").write_text("secret-key\n")
    stand_in = StandIn()
    async with served(stand_in) as url, Running(make_config(
            storage, tmp_path, engine={"kind": "openai", "url": url, "key_file": str(tmp_path / "key")})) as app:
        await app.ready()
        body = {"messages": [{"role": "user", "content": "Does it help? say: It helped most of them"}], "max_tokens": 9}
        whole = (await app.client.post("/v1/chat/completions", json=body)).json()
        assert whole["choices"][0]["message"]["content"] == " It helped most of them"
        assert whole["usage"] == {"prompt_tokens": 9, "completion_tokens": 5, "total_tokens": 14}
        assert whole["attribution"]["run"] == "demo-0123456789" and max(whole["decision"], key=whole["decision"].get) == "yes"
        streamed = await app.client.post("/v1/chat/completions", json={**body, "stream": True})
        assert "".join(json.loads(line[6:])["choices"][0]["delta"].get("content", "") for line in streamed.text.splitlines()
                       if line.startswith("data: {")) == " It helped most of them"
    path, asked, key = stand_in.asked[0]
    assert path == "/v1/completions" and asked["model"] == "tuned-elsewhere" and key == "Bearer secret-key"
    assert asked["prompt"] == "### Question:\nDoes it help? say: It helped most of them\n\n### Answer:\n"


async def test_ready_only_while_the_endpoint_answers(storage: Storage, tmp_path: Path) -> None:
    """Not ready before the endpoint is there or while it serves another model; no question is taken then."""
    storage.add("demo-0123456789")
    port = free_port()
    config = make_config(storage, tmp_path, engine={"kind": "openai", "url": f"http://127.0.0.1:{port}/v1", "model": "promoted"})

    async def state(app: Running, words: str) -> int:
        for _ in range(200):
            reply = await app.client.get("/readyz")
            if words in reply.json()["state"]:
                return reply.status_code
            await asyncio.sleep(0.05)
        raise AssertionError(f"{words!r} was not said: {reply.text}")

    stand_in = StandIn()
    async with Running(config) as app:
        assert await state(app, "does not answer") == 503
        assert (await app.client.post("/ask", json={"question": "Why?"})).status_code == 503
        async with served(stand_in, port):
            assert await state(app, "serves tuned-elsewhere, not promoted") == 503
            stand_in.names = ["promoted"]
            assert await state(app, "serving demo-0123456789") == 200
            assert (await ask(app, "Does it help? say: Yes"))["answer"] == " Yes"
        assert await state(app, "does not answer") == 503


@pytest.mark.parametrize("name, settings, path", [("safety-model", {"model": "llama-guard"}, "/v1/chat/completions"),
                                                  ("nemo", {"config_id": "clinic"}, "/v1/checks")])
async def test_guardrails_elsewhere(storage: Storage, tmp_path: Path, name: str, settings: dict[str, str], path: str) -> None:
    """What is fine passes; what is harmful is stopped, asked or answered; and every way to fail is a block."""
    storage.add("demo-0123456789")
    stand_in = StandIn()
    (tmp_path / "key").write_text("guard-key")
    async with served(stand_in) as url, Running(make_config(
            storage, tmp_path, engine={"kind": "openai", "url": url},
            guardrails=guards(**{name: {"enabled": True, "url": url, "timeout_seconds": 0.5, "key_file": str(tmp_path / "key"),
                                        **settings}}))) as app:
        await app.ready()
        fine = await ask(app, "Does it help? say: It helped")
        assert fine["answer"] == " It helped" and fine["reason"] == "stop" and fine["guardrails"] == []
        mine = [(body, key) for where, body, key in stand_in.asked if where == path]
        assert [body["messages"][0]["role"] for body, _ in mine] == ["user", "assistant"]
        assert {key for _, key in mine} == {"Bearer guard-key"}
        for key, value in settings.items():
            assert (mine[0][0].get(key) or mine[0][0]["guardrails"].get(key)) == value

        before = len([1 for where, _, _ in stand_in.asked if where == "/v1/completions"])
        harmful = await ask(app, f"Does {HARM} help?")
        assert harmful["reason"] == "content_filter" and "can't help" in harmful["answer"]
        assert harmful["guardrails"][-1] == {"check": name, "stage": "input", "action": "block",
                                             "rule": {"safety-model": "S9", "nemo": "self check input"}[name]}
        for failing in ("down", "slow", "odd"):
            failed = await ask(app, f"Does it help when {failing}?")
            assert failed["reason"] == "content_filter" and "could not be checked" in failed["answer"], failing
        assert len([1 for where, _, _ in stand_in.asked if where == "/v1/completions"]) == before, "a stopped question reached the model"

        answered = await ask(app, "Does it help? say: It helped with jam")
        assert answered["reason"] == "content_filter" and "withheld" in answered["answer"] and "It helped" not in answered["answer"]
        assert answered["guardrails"][-1]["check"] == name and answered["guardrails"][-1]["stage"] == "output"


async def test_rails_may_change_a_question_but_not_an_answer(storage: Storage, tmp_path: Path) -> None:
    """What the rails make of a question is what the model is asked; an answer that they would change is withheld."""
    storage.add("demo-0123456789")
    stand_in = StandIn()
    async with served(stand_in) as url, Running(make_config(
            storage, tmp_path, engine={"kind": "openai", "url": url}, guardrails=guards(nemo={"enabled": True, "url": url}))) as app:
        await app.ready()
        reply = await ask(app, "Does quince help? say: Yes")
        assert {"check": "nemo", "stage": "input", "action": "redact", "rule": ""} in reply["guardrails"] and reply["answer"] == " Yes"
        prompt = next(body["prompt"] for path, body, _ in stand_in.asked if path == "/v1/completions")
        assert "quince" not in prompt and CHANGED in prompt
        withheld = await ask(app, "Does it help? say: Take a pome")
        assert withheld["reason"] == "content_filter" and "withheld" in withheld["answer"]


@pytest.mark.parametrize("hold", [True, False])
async def test_answers_are_held_until_checked(storage: Storage, tmp_path: Path, hold: bool) -> None:
    """By default nothing of an answer is shown before the endpoint has seen all of it; else it streams and is ended with the text."""
    storage.add("demo-0123456789")
    stand_in = StandIn()
    async with served(stand_in) as url, Running(make_config(
            storage, tmp_path, engine={"kind": "openai", "url": url},
            guardrails=guards(**{"safety-model": {"enabled": True, "url": url, "model": "guard", "hold_answers": hold}}))) as app:
        await app.ready()
        body = {"messages": [{"role": "user", "content": "Does it help? say: It helped with jam"}], "stream": True}
        reply = await app.client.post("/v1/chat/completions", json=body)
        events = [json.loads(line[6:]) for line in reply.text.splitlines() if line.startswith("data: {")]
        text = "".join(e["choices"][0]["delta"].get("content", "") for e in events)
        assert text.startswith(" It helped with") is not hold and "withheld" in text and HARM not in text
        assert events[-1]["choices"][0]["finish_reason"] == "content_filter"
