"""The gate in front of everything: who is it, is the request's body of a decent size and speed; headers that protect the page.

Plain ASGI, so that streams pass through untouched.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import ipaddress
import json
import logging
import time
from collections import OrderedDict
from http.cookies import CookieError, SimpleCookie
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote

from chatbot.access.sessions import COOKIE, Sessions
from chatbot.access.users import Users
from chatbot.config import AccessConfig, ServerConfig

log = logging.getLogger(__name__)

OPEN = frozenset({"/healthz", "/readyz", "/metrics", "/login"})
"""Paths without login: probes, figures (they hold no text), the login itself."""
CLOSED = ("/gradio_api/upload", "/gradio_api/proxy", "/gradio_api/deep_link", "/gradio_api/monitoring", "/monitoring",
          "/gradio_api/component_server")
"""What Gradio offers and this page does not use: taking files, fetching addresses, looking into the queue."""
POLICY = ("default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
          "img-src 'self' data: blob:; "
          "font-src 'self' data:; connect-src 'self'; frame-ancestors 'self'; base-uri 'self'; form-action 'self'; object-src 'none'")
"""Content security policy: the page may load from this server alone, whatever the page's libraries would like. (Gradio's own scripts
are inline and compile templates.)"""
HEADERS = [(b"content-security-policy", POLICY.encode()), (b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer"),
           (b"cache-control", b"no-store")]
TRIES, TRIES_SECONDS = 10, 60.0
"""Failed logins of an address or for a name before it has to wait, and how long they count."""
LOGIN_PAGE = Path(__file__).with_name("login.html")


class BodyTooLargeError(Exception):
    pass


class BodyTooSlowError(Exception):
    pass


class ClientGoneError(Exception):
    pass


def replay(body: bytes, receive: Any) -> Any:
    """A `receive` that gives a body that has been read already, then what comes after it (the client leaving)."""
    given = False

    async def again() -> Any:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


class Failures:
    """Counts failed logins, for a while."""

    def __init__(self) -> None:
        self._times: OrderedDict[str, list[float]] = OrderedDict()

    def many(self, *keys: str) -> bool:
        """Too many lately for one of the keys."""
        now = time.monotonic()
        return any(sum(now - t < TRIES_SECONDS for t in self._times.get(k, ())) >= TRIES for k in keys)

    def add(self, *keys: str) -> None:
        """Count one for each key."""
        now = time.monotonic()
        for key in keys:
            self._times[key] = [*[t for t in self._times.pop(key, []) if now - t < TRIES_SECONDS][-TRIES:], now]
        while len(self._times) > 10_000:
            self._times.popitem(last=False)


class Gate:
    """ASGI middleware. Sets `scope["state"]["user"]` and `scope["state"]["address"]`."""

    def __init__(self, app: Any, access: AccessConfig, server: ServerConfig, conversation: Any = None) -> None:
        self.app, self.access, self.server = app, access, server
        self.conversation = conversation
        """What the application answers with; for who starts and stops it."""
        self.users = Users(Path(access.users_file)) if access.mode == "users" else None
        self.sessions = Sessions(access.session_key_file, access.session_hours) if access.mode == "users" else None
        self.trusted = [ipaddress.ip_network(n, strict=False) for n in access.trusted]
        self.failures = Failures()

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})  # nothing here speaks it
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {k.decode("latin-1").lower(): v.decode("latin-1") for k, v in scope["headers"]}
        peer = (scope.get("client") or ("", 0))[0]
        trusted = self._trusts(peer)
        address = self._address(peer, headers) if trusted else peer
        path = scope["path"]
        send, state = self._protected(send), scope.setdefault("state", {})
        try:
            if int(headers.get("content-length") or 0) > self.server.max_body_bytes:
                raise BodyTooLargeError
            if path.startswith(CLOSED):
                await respond(send, 404, problem("Not here.", "not_found"), JSON)
                return
            if path == "/login" and self.users:
                await self._login(scope, headers, await self._body(receive), send, address)
                return
            if path == "/logout" and self.users:
                await respond(send, 303, b"", [(b"location", self._place("/login")), (b"set-cookie", self._cookie("", 0, headers))])
                return
            user = await self._user(headers, trusted, address)
            if user is None and path not in OPEN:
                await self._refuse(scope, headers, send, address)
                return
            state["user"], state["address"] = user or "", address
            # The body is read here, whole: what is behind the gate never waits for a slow client, nor holds an endless body.
            receive = replay(await self._body(receive), receive)
        except ClientGoneError:
            return
        except BodyTooLargeError:
            await respond(send, 413, problem(f"The request is larger than {self.server.max_body_bytes} bytes.", "too_large"), JSON)
            return
        except BodyTooSlowError:
            await respond(send, 408, problem(f"The request took longer than {self.server.body_seconds:g} s to arrive.", "too_slow"), JSON)
            return
        except ValueError:
            await respond(send, 400, problem("The request's headers are not valid.", "bad_request"), JSON)
            return
        await self.app(scope, receive, send)

    def _place(self, path: str) -> bytes:
        return (self.server.root_path + path).encode()

    def _trusts(self, peer: str) -> bool:
        try:
            value = ipaddress.ip_address(peer)
        except ValueError:
            return False
        return any(value in network for network in self.trusted)

    def _address(self, peer: str, headers: dict[str, str]) -> str:
        """The client behind trusted proxies: the last address in X-Forwarded-For that is not one of them."""
        for hop in reversed([h.strip() for h in headers.get("x-forwarded-for", "").split(",") if h.strip()]):
            if not self._trusts(hop):
                return hop[:64]
        return peer

    async def _user(self, headers: dict[str, str], trusted: bool, address: str) -> str | None:
        """The user's name; empty where nobody logs in; None if the request may not pass."""
        if self.access.mode == "none":
            return ""
        if self.access.mode == "proxy":
            return (headers.get(self.access.header.lower(), "").strip()[:256] or None) if trusted else None
        assert self.users and self.sessions
        try:
            cookie = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
        except CookieError:
            cookie = None
        if cookie and (name := self.sessions.user(cookie.value)) and self.users.exists(name):
            return name
        return await self._by_header(headers.get("authorization", ""), address)

    async def _by_header(self, value: str, address: str) -> str | None:
        """`Basic` with name and password, or `Bearer name:password` (what OpenAI's clients send as the key)."""
        assert self.users
        kind, _, token = value.partition(" ")
        if kind.lower() == "basic":
            try:
                token = base64.b64decode(token, validate=True).decode()
            except (binascii.Error, UnicodeDecodeError):
                return None
        elif kind.lower() != "bearer":
            return None
        name, _, password = token.strip().partition(":")
        if not name or not password or self.failures.many(address, f"user {name}"):
            return None
        if await asyncio.to_thread(self.users.verify, name, password):
            return name
        self.failures.add(address, f"user {name}")
        return None

    async def _refuse(self, scope: dict[str, Any], headers: dict[str, str], send: Any, address: str) -> None:
        if self.users and scope["method"] == "GET" and "text/html" in headers.get("accept", ""):
            await respond(send, 303, b"", [(b"location", self._place("/login"))])
        elif self.failures.many(address):
            await respond(send, 429, problem("Too many failed logins. Wait a minute.", "too_many_logins"), [*JSON, (b"retry-after", b"60")])
        else:
            await respond(send, 401, problem("Log in first.", "not_logged_in"), [*JSON, (b"www-authenticate", b'Basic realm="chatbot"')])

    async def _login(self, scope: dict[str, Any], headers: dict[str, str], body: bytes, send: Any, address: str) -> None:
        assert self.users and self.sessions
        if scope["method"] != "POST":
            await self._login_page(send, 200, "")
            return
        # A form of another site must not log a visitor in (as somebody else): browsers name the page's origin.
        origin = headers.get("origin", "")
        if origin not in ("", "null") and origin.partition("://")[2] != headers.get("host", ""):
            await self._login_page(send, 403, "The login came from another site.")
            return
        form = parse_qs(body.decode("utf-8", "replace"))
        name, password = (form.get("name") or [""])[0], (form.get("password") or [""])[0]
        if self.failures.many(address, f"user {name}"):
            await self._login_page(send, 429, "Too many failed logins. Wait a minute.")
            return
        good: bool = await asyncio.to_thread(self.users.verify, name, password) if name and password else False
        if good:
            cookie = self._cookie(self.sessions.make(name), self.sessions.seconds, headers)
            await respond(send, 303, b"", [(b"location", self._place("/")), (b"set-cookie", cookie)])
        else:
            self.failures.add(address, f"user {name}")
            log.warning("failed login")
            await self._login_page(send, 401, "Name or password is wrong.")

    def _cookie(self, value: str, seconds: int, headers: dict[str, str]) -> bytes:
        secure = "; Secure" if headers.get("x-forwarded-proto") == "https" else ""
        return f"{COOKIE}={quote(value)}; Path={self.server.root_path or '/'}; Max-Age={seconds}; HttpOnly; SameSite=Lax{secure}".encode()

    async def _login_page(self, send: Any, status: int, message: str) -> None:
        page = LOGIN_PAGE.read_text(encoding="utf-8").replace("{action}", f"{self.server.root_path}/login").replace("{message}", message)
        await respond(send, status, page.encode(), [(b"content-type", b"text/html; charset=utf-8")])

    async def _body(self, receive: Any) -> bytes:
        """The request's whole body. Raises BodyTooLargeError, BodyTooSlowError, ClientGoneError."""
        body, until = b"", time.monotonic() + self.server.body_seconds
        while True:
            try:
                message = await asyncio.wait_for(receive(), max(0.0, until - time.monotonic()))
            except TimeoutError:
                raise BodyTooSlowError from None
            if message["type"] != "http.request":
                raise ClientGoneError
            body += message.get("body", b"")
            if len(body) > self.server.max_body_bytes:
                raise BodyTooLargeError
            if not message.get("more_body"):
                return body

    def _protected(self, send: Any) -> Any:
        """`send` that adds the protecting headers where the application did not set them."""

        async def protected(message: Any) -> None:
            if message["type"] == "http.response.start":
                names = {k.lower() for k, _ in message.get("headers", [])}
                message = {**message, "headers": [*message.get("headers", []), *((k, v) for k, v in HEADERS if k not in names)]}
            await send(message)

        return protected


JSON = [(b"content-type", b"application/json")]


def problem(message: str, code: str) -> bytes:
    """An error in OpenAI's form."""
    return json.dumps({"error": {"message": message, "type": "invalid_request_error", "param": None, "code": code}}).encode()


async def respond(send: Any, status: int, body: bytes, headers: list[tuple[bytes, bytes]]) -> None:
    """A whole response."""
    await send({"type": "http.response.start", "status": status, "headers": [*headers, (b"content-length", str(len(body)).encode())]})
    await send({"type": "http.response.body", "body": body})
