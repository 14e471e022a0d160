"""TCP between two pods with plain sockets: round trips, clock offset, bandwidth.

The server of every pod answers each connection by its first byte: `p` (ping: its clock for every byte), `r` (receive until the client
has finished, then say how many bytes came in how many seconds).
"""

from __future__ import annotations

import json
import socket
import statistics
import struct
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

PORT = 29613
_CLOCK = struct.Struct("!d")
_BLOCK = 1 << 20
TIMEOUT = 10.0
"""Seconds without an answer after which a pair is not connected."""


def _answer(connection: socket.socket) -> None:
    with connection:
        connection.settimeout(TIMEOUT)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            kind = connection.recv(1)
            if kind == b"p":
                while connection.recv(1):
                    connection.sendall(_CLOCK.pack(time.time()))
            elif kind == b"r":
                buffer, received, first, last = bytearray(_BLOCK), 0, 0.0, 0.0
                while size := connection.recv_into(buffer):
                    last = time.monotonic()
                    first = first or last
                    received += size
                connection.sendall(json.dumps({"bytes": received, "seconds": last - first}).encode())
        except OSError:
            return  # the client has gone; it reports what it saw


class Server:
    """Answers measurements on every address of the pod until it is closed."""

    def __init__(self, host: str = "", port: int = PORT) -> None:
        family = socket.AF_INET6 if not host and socket.has_dualstack_ipv6() else socket.AF_INET
        self._socket = socket.create_server((host, port), family=family, dualstack_ipv6=family == socket.AF_INET6, backlog=64)
        self.port: int = self._socket.getsockname()[1]
        threading.Thread(target=self._accept, name="site-check server", daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return  # closed
            threading.Thread(target=_answer, args=(connection,), daemon=True).start()

    def close(self) -> None:
        """Take no more connections."""
        self._socket.close()


def _connect(host: str, port: int) -> socket.socket:
    connection = socket.create_connection((host, port), timeout=TIMEOUT)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def ping(host: str, port: int = PORT, count: int = 300, clock: Callable[[], float] = time.time) -> dict[str, float]:
    """Round trips of one byte, in microseconds, and by how many seconds the other clock is ahead (from the fastest of them, so the error
    is below half of it). Raises OSError if there is no connection."""
    trips: list[tuple[float, float]] = []
    with _connect(host, port) as connection:
        connection.sendall(b"p")
        for _ in range(count):
            sent, begin = clock(), time.perf_counter()
            connection.sendall(b".")
            answer = b""
            while len(answer) < _CLOCK.size:
                part = connection.recv(_CLOCK.size - len(answer))
                if not part:
                    raise ConnectionError("the other side closed the connection")
                answer += part
            took = time.perf_counter() - begin
            trips.append((took, _CLOCK.unpack(answer)[0] - (sent + took / 2)))
    times = sorted(t for t, _ in trips)
    return {"latency_us": statistics.median(times) * 1e6, "latency_p99_us": times[int(len(times) * 0.99)] * 1e6, "ahead_s": min(trips)[1]}


def _send(host: str, port: int, until: float) -> dict[str, float]:
    data = memoryview(bytes(_BLOCK))
    with _connect(host, port) as connection:
        connection.sendall(b"r")
        while time.monotonic() < until:
            connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        answer = b""
        while part := connection.recv(4096):
            answer += part
    return dict(json.loads(answer))


def bandwidth(host: str, port: int = PORT, seconds: float = 2.0, streams: int = 4) -> float:
    """Gbit/s to the other side over several connections at once, as the receiver counts. Raises OSError if there is no connection."""
    until = time.monotonic() + seconds
    with ThreadPoolExecutor(streams) as pool:
        parts = [f.result() for f in [pool.submit(_send, host, port, until) for _ in range(streams)]]
    return sum(p["bytes"] * 8 / p["seconds"] for p in parts if p["seconds"] > 0) / 1e9


def measure(host: str, port: int = PORT, seconds: float = 2.0, streams: int = 4) -> dict[str, Any]:
    """`ping` and `bandwidth` to one pod; `error` instead if it cannot be reached."""
    try:
        return {**ping(host, port), "gbps": bandwidth(host, port, seconds, streams)}
    except (OSError, ValueError) as error:
        return {"error": f"{type(error).__name__}: {error}"}
