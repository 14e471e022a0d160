"""Users from a mounted file, one `name:hash` a line; hashes are scrypt's."""

from __future__ import annotations

import base64
import hashlib
import hmac
import secrets
import time
from collections import OrderedDict
from pathlib import Path

from chatbot.errors import UserError

N, R, P = 1 << 14, 8, 5
"""scrypt's cost: 16 MiB and about a fifth of a second a try (OWASP password storage cheat sheet)."""


def hash_password(password: str) -> str:
    """`scrypt$n$r$p$salt$hash` of a password."""
    salt = secrets.token_bytes(16)
    return f"scrypt${N}${R}${P}${base64.b64encode(salt).decode()}${base64.b64encode(_derive(password, salt, N, R, P)).decode()}"


def _derive(password: str, salt: bytes, n: int, r: int, p: int) -> bytes:
    return hashlib.scrypt(password.encode(), salt=salt, n=n, r=r, p=p, maxmem=256 * n * r, dklen=32)


def _parse(entry: str) -> tuple[int, int, int, bytes, bytes]:
    kind, n, r, p, salt, digest = entry.split("$")
    if kind != "scrypt" or not (1 < int(n) <= 1 << 20 and 1 <= int(r) <= 32 and 1 <= int(p) <= 16):
        raise ValueError
    return int(n), int(r), int(p), base64.b64decode(salt), base64.b64decode(digest)


class Users:
    """The users' file. It is read again when it changes (a mounted Secret is updated in place)."""

    CHECKED, CHECKED_SECONDS = 1000, 300.0

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stamp: tuple[int, int] | None = None
        self._entries: dict[str, str] = {}
        self._key = secrets.token_bytes(32)
        self._checked: OrderedDict[bytes, float] = OrderedDict()
        self.reload()

    def reload(self) -> None:
        """Read the file if it has changed. Raises UserError naming the line that is wrong."""
        try:
            stat = self.path.stat()
            stamp = (stat.st_mtime_ns, stat.st_size)
            if stamp == self._stamp:
                return
            lines = self.path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"access.users_file: {self.path} cannot be read ({error}). Mount the Secret with the users there.") from error
        entries = {}
        for number, line in enumerate(lines, 1):
            line = line.strip()
            if not line or line.startswith("#"):
                continue
            name, _, entry = line.partition(":")
            try:
                _parse(entry)
            except ValueError:
                raise UserError(f"access.users_file: line {number} of {self.path} is not `name:hash`. "
                                "Make the hash with: python -m chatbot password") from None
            entries[name] = entry
        if not entries:
            raise UserError(f"access.users_file: {self.path} has no users. Add a line `name:hash`.")
        self._entries, self._stamp = entries, stamp
        self._checked.clear()

    def exists(self, name: str) -> bool:
        """A session of a user who was removed is no longer good."""
        self._refresh()
        return name in self._entries

    def _refresh(self) -> None:
        try:
            self.reload()
        except UserError:
            pass  # the last good file holds; a Secret in the middle of its update must not lock everybody out

    def verify(self, name: str, password: str) -> bool:
        """Whether the password is the user's. Takes as long for a user who does not exist. Blocks: call it in a thread."""
        self._refresh()
        # API clients send the password with every request: a good one is remembered for a while, as a keyed hash.
        token = hmac.new(self._key, f"{name}\0{password}".encode(), hashlib.sha256).digest()
        if self._checked.get(token, 0) > time.monotonic():
            return True
        entry = self._entries.get(name) or next(iter(self._entries.values()))
        n, r, p, salt, digest = _parse(entry)
        good = hmac.compare_digest(_derive(password, salt, n, r, p), digest) and name in self._entries
        if good:
            self._checked[token] = time.monotonic() + self.CHECKED_SECONDS
            while len(self._checked) > self.CHECKED:
                self._checked.popitem(last=False)
        return good
