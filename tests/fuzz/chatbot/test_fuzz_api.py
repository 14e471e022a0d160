"""Whatever is sent to the API: an answer, or an error in its own form; never an unhandled exception, never a status of 500."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chatbot.errors import UserError
from chatbot.serving import manifest as manifests
from tests.chatbot.conftest import Running, Storage, make_config, make_model
from tests.fuzz.cases import JSON, NUMBERS, TEXTS, cases, changed, damaged, message

CHAT: dict[str, Any] = {"model": "tuned", "messages": [{"role": "user", "content": "Does it help?"}], "context": "In a trial.",
                        "max_tokens": 2, "temperature": 0.7, "top_p": 0.9, "seed": 1, "stop": ["."], "n": 1, "stream": False,
                        "decision": True}
TURNS: dict[str, Any] = {
    "messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": [{"type": "text", "text": "Why?"}]},
                 {"role": "assistant", "content": "So."}, {"role": "user", "content": "And?"}],
    "max_completion_tokens": 2, "stream": True, "stream_options": {"include_usage": True}}
ASK: dict[str, Any] = {"question": "Does it help?", "context": "", "model": "tuned", "max_tokens": 2, "temperature": 0.0}
FEEDBACK: dict[str, Any] = {"exchange": "chatcmpl-1", "vote": "up", "question": "Why?", "answer": "So.", "comment": "", "model": "tuned"}
PATHS = {"/v1/chat/completions": st.sampled_from([CHAT, TURNS]), "/ask": st.just(ASK), "/feedback": st.just(FEEDBACK)}


class Served:
    """The application with a tiny model, on an event loop of its own."""

    def __init__(self, root: Path) -> None:
        for seed in (0, 1):
            make_model(root / "models" / str(seed), seed)
        (root / "storage").mkdir()
        self.storage = Storage(root / "storage", root / "models")
        self.storage.add("demo-0123456789")
        # Short answers where a request does not bound them; the limits of rate would hide everything else.
        config = make_config(self.storage, root, page={"max_tokens": 2}, engine={"context": 128},
                             guardrails={"checks": {"rate": {"enabled": False}}})
        self.loop = asyncio.new_event_loop()
        self.app = Running(config)
        self.run(self.app.__aenter__())
        self.run(self.app.ready())

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.loop.run_until_complete(work)

    def send(self, method: str, path: str, **more: Any) -> httpx.Response:
        """A request; what the application raises comes out here."""
        reply: httpx.Response = self.run(self.app.client.request(method, path, **more))
        assert reply.status_code < 500, (reply.status_code, reply.text)
        if reply.status_code >= 400:
            assert reply.json()["error"]["message"]
        return reply


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    made = Served(tmp_path_factory.mktemp("served"))
    yield made
    made.run(made.app.__aexit__())
    made.loop.close()


def whole(reply: httpx.Response) -> None:
    """What an answer must be."""
    if reply.headers["content-type"].startswith("text/event-stream"):
        events = [line.removeprefix("data: ") for line in reply.text.split("\n") if line]
        assert events[-1] == "[DONE]" and all(json.loads(event) for event in events[:-1])
        assert "error" not in json.loads(events[-2]), events[-2]
    else:
        assert reply.json()


@cases(150)
@given(data=st.data(), path=st.sampled_from(list(PATHS)))
def test_changed_requests(served: Served, data: st.DataObject, path: str) -> None:
    body = data.draw(changed(PATHS[path]))
    reply = served.send("POST", path, content=json.dumps(body).encode())
    if reply.status_code == 200:
        whole(reply)


@cases(60)
@given(temperature=NUMBERS, top_p=NUMBERS, seed=NUMBERS, most=st.integers(-1, 40), stop=st.one_of(TEXTS, st.lists(TEXTS, max_size=5)))
def test_numbers(served: Served, temperature: Any, top_p: Any, seed: Any, most: int, stop: Any) -> None:
    body = {**CHAT, "temperature": temperature, "top_p": top_p, "seed": seed, "max_tokens": most, "stop": stop}
    reply = served.send("POST", "/v1/chat/completions", content=json.dumps(body).encode())
    if reply.status_code == 200:
        whole(reply)
        assert reply.json()["usage"]["completion_tokens"] <= most


@cases(60)
@given(question=st.text(max_size=200), context=st.text(max_size=100), stream=st.booleans())
def test_any_text(served: Served, question: str, context: str, stream: bool) -> None:
    body = {"messages": [{"role": "user", "content": question}], "context": context, "stream": stream}
    reply = served.send("POST", "/v1/chat/completions", content=json.dumps(body).encode())
    if reply.status_code == 200:
        whole(reply)


@cases(150)
@given(data=st.data(), path=st.sampled_from(list(PATHS)))
def test_damaged_bodies(served: Served, data: st.DataObject, path: str) -> None:
    content = data.draw(st.one_of(st.binary(max_size=80), JSON.map(lambda v: json.dumps(v).encode()),
                                  damaged(PATHS[path].map(lambda v: json.dumps(v).encode()))))
    served.send("POST", path, content=content)


HEADER_TEXT = st.text(st.characters(min_codepoint=32, max_codepoint=255), max_size=40).map(lambda t: t.encode("latin-1"))


NAMES = ("authorization", "cookie", "content-length", "content-type", "x-forwarded-for", "origin", "range", "accept", "host")
PLACES = ("/v1/models", "/report", "/healthz", "/readyz", "/metrics", "/ask", "/login", "/logout", "/%2e%2e/etc/passwd", "/report/..%2f",
          "/v1//")


@cases(100)
@given(method=st.sampled_from(("GET", "POST", "PUT", "HEAD", "OPTIONS")), path=st.sampled_from(PLACES),
       headers=st.dictionaries(st.sampled_from(NAMES), HEADER_TEXT, max_size=3), query=st.text(max_size=20))
def test_any_headers(served: Served, method: str, path: str, headers: dict[str, bytes], query: str) -> None:
    reply = served.run(served.app.client.request(method, path, headers=headers, params={"q": query}, content=b""))
    assert reply.status_code < 500 and "root:" not in reply.text


@cases(200)
@given(data=st.data())
def test_model_manifests(served: Served, data: st.DataObject) -> None:
    """A model directory's manifest, in the chatbot's own reader: as it was, or not whole, or a named error."""
    directory = served.storage.root / "models" / "base"
    path = directory / "manifest.json"
    content = {"files": {"config.json": {"size": (directory / "config.json").stat().st_size, "sha256": "0" * 64}}, "step": 3}
    path.write_bytes(data.draw(st.one_of(damaged(st.just(json.dumps(content).encode())), changed(st.just(content)).map(
        lambda d: json.dumps(d).encode()))))
    try:
        manifest = manifests.read(directory)
        if manifest is not None:
            assert len(manifests.directory_digest(manifest)) == 64
            manifests.verify(directory, manifest)
            assert not manifests.served_files(manifest), "a digest of zeros is no file's"
    except UserError as error:
        message(error)
    finally:
        path.unlink()
