"""Signed session cookies: user and expiry, nothing kept on the server."""

from __future__ import annotations

import base64
import hashlib
import hmac
import secrets
import time
from pathlib import Path

from chatbot.errors import UserError

COOKIE = "chatbot_session"


class Sessions:
    """Makes and reads session tokens."""

    def __init__(self, key_file: str, hours: float) -> None:
        if key_file:
            try:
                self._key = Path(key_file).read_bytes().strip()
            except OSError as error:
                raise UserError(f"access.session_key_file: {key_file} cannot be read ({error}).") from error
            if len(self._key) < 32:
                raise UserError(f"access.session_key_file: {key_file} has {len(self._key)} bytes; put at least 32 random ones there.")
        else:
            self._key = secrets.token_bytes(32)
        self.seconds = int(hours * 3600)

    def _sign(self, body: str) -> str:
        return hmac.new(self._key, body.encode(), hashlib.sha256).hexdigest()

    def make(self, user: str) -> str:
        """A token for a user."""
        body = f"{base64.urlsafe_b64encode(user.encode()).decode()}.{int(time.time()) + self.seconds}"
        return f"{body}.{self._sign(body)}"

    def user(self, token: str) -> str:
        """The user of a token; empty if it is forged or has expired."""
        body, _, signature = token.rpartition(".")
        if not hmac.compare_digest(signature.encode(), self._sign(body).encode()):
            return ""
        name, _, until = body.partition(".")
        return base64.urlsafe_b64decode(name).decode() if int(until) > time.time() else ""
