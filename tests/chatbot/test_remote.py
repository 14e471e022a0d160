"""The engine behind an OpenAI-compatible endpoint, against an endpoint made here (httpx's own mock transport)."""

from __future__ import annotations

import json

import httpx
import pytest

from chatbot.config import EngineConfig
from chatbot.engine.base import Decision, End, Piece, Request
from chatbot.engine.remote import RemoteModel
from chatbot.errors import BusyError, UserError

asked: list[dict] = []


def endpoint(request: httpx.Request) -> httpx.Response:
    """Streams two pieces; knows the logarithms of the next token's probabilities."""
    if request.url.path == "/v1/models":
        return httpx.Response(200, json={"data": [{"id": "tuned-llama"}]})
    body = json.loads(request.content)
    asked.append(body)
    if not body["stream"]:
        return httpx.Response(200, json={"choices": [{
            "text": " yes", "logprobs": {"top_logprobs": [{" yes": -0.5, " no": -1.5, " x": -3}]}}]})
    events = [{"choices": [{"text": "It helped", "finish_reason": None}]},
              {"choices": [{"text": ".\nDecision: yes", "finish_reason": "stop"}]},
              {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 6}}]
    return httpx.Response(200, text="".join(f"data: {json.dumps(e)}\n\n" for e in events) + "data: [DONE]\n\n")


def model(handler=endpoint) -> RemoteModel:
    config = EngineConfig(kind="openai", url="http://vllm:8000/v1")
    return RemoteModel(config, "", httpx.MockTransport(handler))


async def test_stream_and_decision() -> None:
    """The rendered prompt goes to /completions; the decision is asked for where the answer's own stands."""
    asked.clear()
    request = Request("### Question:\nWhy?", special_tokens=False, max_tokens=9, stop_tokens=("</s>",),
                      decision=Decision("\nDecision: ", ("yes", "no", "maybe")))
    parts = [p async for p in model().stream(request)]
    assert "".join(p.text for p in parts if isinstance(p, Piece)) == "It helped.\nDecision: yes"
    end = parts[-1]
    assert isinstance(end, End)
    assert (end.reason, end.prompt_tokens, end.tokens) == ("stop", 7, 6)
    assert end.decision == {"yes": pytest.approx(0.731, abs=1e-3), "no": pytest.approx(0.269, abs=1e-3), "maybe": 0.0}
    assert asked[0]["model"] == "tuned-llama" and asked[0]["prompt"] == request.prompt and asked[0]["stop"] == ["</s>"]
    assert asked[0]["add_special_tokens"] is False
    assert asked[1]["prompt"] == "### Question:\nWhy?It helped.\nDecision:"


@pytest.mark.parametrize("status, error", [(503, BusyError), (429, BusyError), (400, UserError), (500, UserError)])
async def test_refusals(status: int, error: type[Exception]) -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        return endpoint(request) if request.url.path == "/v1/models" else httpx.Response(status, text="no")

    with pytest.raises(error):
        await anext(model(handler).stream(Request("Why?")))


async def test_a_broken_connection_is_a_user_error() -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused")

    with pytest.raises(UserError, match="does not answer"):
        await anext(model(handler).stream(Request("Why?")))
