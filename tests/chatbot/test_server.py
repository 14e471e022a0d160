"""The chatbot as a process of its own, over real connections: 200 hostile clients leave it serving, and a stop lets streams finish."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from conftest import Storage, serving

PATH = "/v1/chat/completions"
ASK = {"messages": [{"role": "user", "content": "Does vitamin D reduce infections?"}], "max_tokens": 12}
LONG = {**ASK, "max_tokens": 400, "stream": True}
BODY_LIMIT = 20_000


def make(storage: Storage, **parts: Any) -> dict[str, Any]:
    """A configuration without the limits that tests would run into."""
    return {"storage": str(storage.root), "serve": {"follow": "latest"},
            "engine": {"streams": 4, "waiting": 8, "context": 512, "threads": 1, "device": "cpu"},
            "guardrails": {"checks": {name: {"enabled": False} for name in ("rate", "gibberish", "repetition")}}, **parts}


def head(path: str = PATH, length: int | str = 0, more: str = "") -> bytes:
    return (f"POST {path} HTTP/1.1\r\nhost: chatbot\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n{more}"
            "connection: close\r\n\r\n").encode()


def whole(body: bytes, path: str = PATH) -> bytes:
    return head(path, len(body)) + body


class Client:
    """A raw connection."""

    def __init__(self, port: int) -> None:
        self.port = port

    async def __aenter__(self) -> Client:
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port)
        return self

    async def __aexit__(self, *_: Any) -> None:
        self.writer.close()

    async def send(self, data: bytes) -> None:
        """Send; the server may have closed its side already."""
        try:
            self.writer.write(data)
            await self.writer.drain()
        except OSError:
            pass

    async def status(self) -> int:
        """Status of the answer; 0 if the connection ends without one."""
        try:
            line = await asyncio.wait_for(self.reader.readline(), 30)
        except OSError:
            return 0
        return int(line.split()[1]) if line.startswith(b"HTTP/") else 0


async def sends(port: int, data: bytes) -> int:
    """Sends bytes, waits for what comes."""
    async with Client(port) as client:
        await client.send(data)
        return await client.status()


async def endless(port: int) -> int:
    """A chunked body that does not end."""
    async with Client(port) as client:
        await client.send(f"POST {PATH} HTTP/1.1\r\nhost: c\r\ntransfer-encoding: chunked\r\n\r\n".encode())
        for _ in range(200):
            if client.reader.at_eof():
                break
            await client.send(b"1000\r\n" + b"x" * 0x1000 + b"\r\n")
        return await client.status()


async def slow(port: int) -> int:
    """Half a body, and then nothing."""
    return await sends(port, head(length=100) + b'{"messages"')


async def silent(port: int) -> int:
    """Half a head, nothing for a while, gone."""
    async with Client(port) as client:
        await client.send(b"POST /v1/chat/completions HTTP/1.1\r\nhost: chat")
        await asyncio.sleep(1)
    return 0


async def leaves(port: int) -> int:
    """Asks for a stream, reads its beginning, goes."""
    async with Client(port) as client:
        await client.send(whole(json.dumps(LONG).encode()))
        status = await client.status()
        await client.reader.read(300)
        client.writer.transport.abort()
        return status


async def deaf(port: int) -> int:
    """Asks for a stream and never reads it."""
    async with Client(port) as client:
        await client.send(whole(json.dumps(LONG).encode()))
        await asyncio.sleep(1)
        client.writer.transport.abort()
    return 0


BODIES = [b"", b"{", b"[]", b"null", b"\xff\xfe\x00", b'{"messages": "\xc3\x28"}', b'{"messages": []}', b"[" * 9000, b'{"a":' * 3000,
          b'{"messages": [{"role": "user", "content": "\xf0\x28\x8c"}]}', b'{"messages": [{"role": "user", "content": "\\ud800"}], "n": 3}',
          b"1e999999",
          json.dumps({**ASK, "temperature": 1e300}).encode(), json.dumps({**ASK, "max_tokens": 10**30}).encode(),
          json.dumps({**ASK, "messages": [{"role": "user", "content": {"a": 1}}]}).encode(), b"x" * (BODY_LIMIT + 1)]
GARBAGE = [b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x80" * 200, b"GET\r\n\r\n", b"POST / HTTP/9.9\r\n\r\n",
           b"\x00" * 5000 + b"\r\n\r\n", b"GET / HTTP/1.1\r\nhost: c\r\nx: " + b"y" * 200_000 + b"\r\n\r\n", head(length="-5"),
           head(length="abc"), head(length=10**15)]


def clients(port: int) -> list[tuple[str, Callable[[], Awaitable[int]]]]:
    """200 of them, each with its name, in an order in which the kinds are mixed."""
    kinds: list[tuple[str, int, Callable[[int], Awaitable[int]]]] = [
        ("body", 80, lambda i: sends(port, whole(BODIES[i % len(BODIES)], PATH if i % 3 else "/ask"))),
        ("garbage", 40, lambda i: sends(port, GARBAGE[i % len(GARBAGE)])),
        ("endless", 8, lambda _: endless(port)), ("slow", 20, lambda _: slow(port)), ("silent", 12, lambda _: silent(port)),
        ("leaves", 30, lambda _: leaves(port)), ("deaf", 10, lambda _: deaf(port))]
    made = [(i / count, name, lambda kind=kind, i=i: kind(i)) for name, count, kind in kinds for i in range(count)]
    return [(name, call) for _, name, call in sorted(made, key=lambda m: m[:2])]


def anonymous(pid: int) -> int:
    """Memory of its own, bytes."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Anonymous:"))


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


@pytest.mark.timeout(300)
async def test_200_hostile_clients_leave_it_serving(storage: Storage, tmp_path: Path) -> None:
    """Huge and endless bodies, broken UTF-8, wrong JSON, no HTTP at all, slow, silent and deaf clients, closed streams; 20 at a time."""
    storage.add("demo-0123456789")
    config = make(storage, server={"max_body_bytes": BODY_LIMIT, "body_seconds": 1.0})
    with serving(tmp_path, config) as (url, server):
        port = urlsplit(url).port or 0
        statuses: Counter[tuple[str, int]] = Counter()
        gate = asyncio.Semaphore(20)

        async def one(name: str, call: Callable[[], Awaitable[int]]) -> None:
            async with gate:
                statuses[name, await call()] += 1

        async with httpx.AsyncClient(base_url=url, timeout=60) as good:
            async def answers() -> None:
                reply = await good.post(PATH, json=ASK)
                assert reply.status_code == 200 and reply.json()["usage"]["completion_tokens"] == 12, reply.text

            everybody = clients(port)
            assert len(everybody) == 200
            await answers()
            await asyncio.gather(*(one(*c) for c in everybody[::4]))  # what is made at first use is made
            before = anonymous(server.pid), descriptors(server.pid)
            statuses.clear()
            hostile = asyncio.gather(*(one(*c) for c in everybody))
            await answers()  # among them, too
            await hostile
            await answers()
            assert (await good.get("/readyz")).status_code == 200
            until = time.monotonic() + 20
            while "chatbot_running{model=\"tuned\"} 0.0" not in (await good.get("/metrics")).text:
                assert time.monotonic() < until, "an answer that nobody reads goes on"
                await asyncio.sleep(0.2)
            while descriptors(server.pid) > before[1]:
                assert time.monotonic() < until, "connections are left open"
                await asyncio.sleep(0.2)
            grown = anonymous(server.pid) - before[0]
            assert grown < 32 * 2**20, f"{grown / 2**20:.0f} MiB more"
    print(dict(statuses), f"{grown / 2**20:+.1f} MiB")
    assert sum(statuses.values()) == 200
    assert {s for (name, s) in statuses if name == "body"} <= {400, 413, 422}
    assert {s for (name, s) in statuses if name == "garbage"} <= {0, 400, 405, 413, 431}
    assert {s for (name, s) in statuses if name == "slow"} == {408} and {s for (name, s) in statuses if name == "endless"} <= {0, 413}
    assert {s for (name, s) in statuses if name == "leaves"} <= {200, 503}
    assert "Traceback" not in (tmp_path / "log").read_text()


async def test_a_stop_lets_streams_finish(storage: Storage, tmp_path: Path) -> None:
    """After SIGTERM running streams end whole, new connections are refused, and the process ends by itself."""
    storage.add("demo-0123456789")
    with serving(tmp_path, make(storage)) as (url, server):
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            async def stream(stopped: asyncio.Event) -> list[dict[str, Any]]:
                events = []
                async with client.stream("POST", PATH, json=LONG) as reply:
                    async for line in reply.aiter_lines():
                        if line.startswith("data: {"):
                            events.append(json.loads(line[6:]))
                            if len(events) == 5:
                                stopped.set()
                        elif line == "data: [DONE]":
                            events.append({})
                return events

            begun = [asyncio.Event() for _ in range(3)]
            streams = [asyncio.create_task(stream(b)) for b in begun]
            await asyncio.gather(*(b.wait() for b in begun))
            server.send_signal(signal.SIGTERM)
            for events in await asyncio.gather(*streams):
                assert events[-1] == {} and events[-2]["choices"][0]["finish_reason"] == "length"
                assert events[-2]["attribution"]["run"] == "demo-0123456789"
        assert server.wait(20) == -signal.SIGTERM
        with pytest.raises(OSError):
            socket.create_connection(("127.0.0.1", urlsplit(url).port or 0), timeout=2)
