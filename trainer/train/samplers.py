"""Network and GPU samples, once a second, one sampler a node.

Each node appends to files of its own below `samples/` (appending to one file from several NFS clients loses lines); `merge` makes
network.csv and gpu.csv of them.
"""

from __future__ import annotations

import csv
import io
import logging
import os
import re
import socket
import threading
import time
from pathlib import Path
from typing import Any, Protocol

from trainer.files import write_atomic
from trainer.paths import RunPaths

log = logging.getLogger(__name__)

NETWORK = ("time", "node", "interface", "rx_bytes_per_s", "tx_bytes_per_s")
GPU = ("time", "node", "gpu", "utilisation", "memory_bytes", "power_w", "sm_clock_mhz")


class Source(Protocol):
    """Something that is sampled."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of a row's values."""

    def rows(self, now: float, node: str) -> list[tuple[Any, ...]]:
        """Rows of this moment. Raises OSError or RuntimeError if it cannot be read."""


class Network:
    """Bytes per second of every network interface that has carried anything, from /proc/net/dev."""

    columns = NETWORK

    def __init__(self, path: Path = Path("/proc/net/dev")) -> None:
        self._path = path
        self._last: tuple[float, dict[str, tuple[int, int]]] | None = None

    def counters(self) -> dict[str, tuple[int, int]]:
        """Received and sent bytes by interface."""
        found = {}
        for line in self._path.read_text(encoding="ascii", errors="replace").splitlines()[2:]:
            name, _, values = line.partition(":")
            fields = values.split()
            if len(fields) >= 16:
                found[name.strip()] = (int(fields[0]), int(fields[8]))
        return found

    def rows(self, now: float, node: str) -> list[tuple[Any, ...]]:
        clock, counters = time.monotonic(), self.counters()
        last, self._last = self._last, (clock, counters)
        if last is None or clock <= last[0]:
            return []
        seconds = clock - last[0]
        rows = []
        for name, (rx, tx) in counters.items():
            was = last[1].get(name)
            if was is not None and (rx or tx) and rx >= was[0] and tx >= was[1]:  # counters go back when an interface is made anew
                rows.append((f"{now:.3f}", node, name, round((rx - was[0]) / seconds), round((tx - was[1]) / seconds)))
        return rows


class Gpus:
    """Utilisation (percent), memory, power and clock of the node's GPUs, through NVML."""

    columns = GPU

    def __init__(self) -> None:
        """Raises RuntimeError if there is no NVML, no driver or no GPU."""
        try:
            import pynvml
            pynvml.nvmlInit()
            count = pynvml.nvmlDeviceGetCount()
        except Exception as error:  # NVMLError, or a missing library
            raise RuntimeError(f"no GPU samples: {error}") from None
        if count == 0:
            raise RuntimeError("no GPU samples: no GPU")
        self._nvml = pynvml
        self._handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(count)]

    def rows(self, now: float, node: str) -> list[tuple[Any, ...]]:
        nvml, rows = self._nvml, []
        for i, handle in enumerate(self._handles):
            values: list[Any] = []
            for read in (lambda h: nvml.nvmlDeviceGetUtilizationRates(h).gpu, lambda h: nvml.nvmlDeviceGetMemoryInfo(h).used,
                         lambda h: nvml.nvmlDeviceGetPowerUsage(h) / 1000, lambda h: nvml.nvmlDeviceGetClockInfo(h, nvml.NVML_CLOCK_SM)):
                try:
                    values.append(read(handle))
                except nvml.NVMLError:  # not every device tells everything (MIG, passthrough)
                    values.append("")
            rows.append((f"{now:.3f}", node, i, *values))
        return rows


class Sampler:
    """A thread that appends samples of this node every `every_s` seconds, until `close`. Storage trouble costs samples, not the run."""

    def __init__(self, directory: Path, sources: dict[str, Source], node: str = "", every_s: float = 1.0) -> None:
        self._directory, self._every = directory, every_s
        self._node = node or os.environ.get("NODE_NAME") or socket.gethostname()
        self._sources = sources
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sampler", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop, after the last rows are written."""
        self._stop.set()
        self._thread.join(timeout=5)

    def _run(self) -> None:
        pending: dict[str, list[tuple[Any, ...]]] = {name: [] for name in self._sources}
        flushed, due = time.monotonic(), time.monotonic()
        while True:
            stopping = self._stop.wait(max(0.0, due - time.monotonic()))
            due = max(due + self._every, time.monotonic())  # after a stall: no burst
            for name, source in self._sources.items():
                try:
                    pending[name] += source.rows(time.time(), self._node)
                except (OSError, RuntimeError, ValueError) as error:
                    log.debug("no %s sample: %s", name, error)
            if stopping or time.monotonic() - flushed >= 10 * self._every:
                flushed = time.monotonic()
                for name, rows in pending.items():
                    try:
                        self._append(name, rows)
                        pending[name] = []
                    except OSError as error:
                        log.warning("%d samples were not written: %s", len(rows), error)
                        pending[name] = rows[-3600:]
            if stopping:
                return

    def _append(self, name: str, rows: list[tuple[Any, ...]]) -> None:
        if not rows:
            return
        self._directory.mkdir(parents=True, exist_ok=True)
        path = self._directory / f"{name}-{re.sub(r'[^A-Za-z0-9._-]', '_', self._node)}.csv"
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        if not path.exists():
            writer.writerow(self._sources[name].columns)
        writer.writerows([[_cell(value) for value in row] for row in rows])
        with open(path, "a", encoding="utf-8") as file:
            file.write(text.getvalue())


def _cell(value: Any) -> Any:
    """A name that a spreadsheet would compute is made text: nodes and interfaces are named by others."""
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value


def start(paths: RunPaths, gpus: bool) -> Sampler:
    """The node's sampler of a run."""
    sources: dict[str, Source] = {"network": Network()}
    if gpus:
        try:
            sources["gpu"] = Gpus()
        except RuntimeError as error:
            log.warning("%s", error)
    return Sampler(paths.samples, sources)


def merge(paths: RunPaths) -> None:
    """Make network.csv and gpu.csv of all nodes' samples, ordered by time. A half-written last line is left out."""
    for name, columns, target in (("network", NETWORK, paths.network), ("gpu", GPU, paths.gpu)):
        rows = []
        for path in sorted(paths.samples.glob(f"{name}-*.csv")):
            with open(path, encoding="utf-8", newline="") as file:
                rows += [row for row in csv.reader(file) if len(row) == len(columns) and row[0] != "time"]
        if rows:
            text = io.StringIO()
            csv.writer(text, lineterminator="\n").writerows([columns, *sorted(rows, key=lambda row: (float(row[0]), row[1:3]))])
            write_atomic(target, text.getvalue())
