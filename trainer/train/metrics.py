"""Where the numbers of a run go: metrics.jsonl, TensorBoard, Prometheus gauges (through Ray), progress.json.

Rank 0 has one `Recorder`. Its thread does the writing, so that a slow or stalled storage never holds the training up.
"""

from __future__ import annotations

import json
import logging
import math
import os
import queue
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from trainer.files import write_atomic
from trainer.paths import RunPaths
from trainer.train.progress import Progress

log = logging.getLogger(__name__)


class MetricsFile:
    """metrics.jsonl: appended, synced every `sync_s` seconds and on `sync`. A full storage delays lines, and never tears one."""

    def __init__(self, path: Path, after_step: int = 0, sync_s: float = 10.0) -> None:
        """Opens the file and drops what lies after `after_step`: steps that were done after the checkpoint that is resumed."""
        self._path, self._every = path, sync_s
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            write_atomic(path, "".join(json.dumps(r, allow_nan=False) + "\n" for r in read(path) if r["step"] <= after_step))
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 (held until close)
        self._good = os.path.getsize(path)
        self._pending: list[bytes] = []
        self._synced = time.monotonic()

    def append(self, record: dict[str, Any]) -> None:
        """Add a line. Numbers that are not finite become null."""
        self._pending.append(json.dumps(_finite(record), allow_nan=False).encode() + b"\n")
        try:
            self._write()
            if time.monotonic() - self._synced >= self._every:
                self.sync()
        except OSError as error:
            if len(self._pending) == 1:
                log.warning("metrics.jsonl was not written, its lines are kept for later: %s", error)
            os.ftruncate(self._file.fileno(), self._good)

    def _write(self) -> None:
        while self._pending:
            done, line = 0, self._pending[0]
            while done < len(line):
                done += self._file.write(line[done:]) or 0
            self._good += len(line)
            self._pending.pop(0)

    def sync(self) -> None:
        """Make all lines durable. Raises OSError."""
        self._write()
        os.fsync(self._file.fileno())
        self._synced = time.monotonic()

    def close(self) -> None:
        try:
            self.sync()
        except OSError as error:
            log.warning("metrics.jsonl: %d lines were not written: %s", len(self._pending), error)
        self._file.close()


def read(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a metrics.jsonl; a torn one (a crash) is left out."""
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                records.append(record)
        except ValueError:
            continue
    return records


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return {k: _finite(v) for k, v in value.items()} if isinstance(value, dict) else value


class Gauges:
    """Prometheus gauges of the newest values, on the node's Ray metrics port (the one KubeRay's PodMonitor scrapes)."""

    NAMES = {
        "step": "Optimizer steps done", "epoch": "Passes over the training rows", "loss": "Training loss per trained token",
        "eval_loss": "Held-out loss per trained token",
        "learning_rate": "Learning rate", "grad_norm": "Global gradient norm before clipping",
        "tokens_per_second": "Tokens trained on per second, all workers", "mfu": "Model FLOPs utilisation",
    }

    def __init__(self, run: str) -> None:
        from ray.util.metrics import Gauge

        self._gauges = {name: Gauge(f"llm_finetune_{name}", description=text, tag_keys=("run",)) for name, text in self.NAMES.items()}
        for gauge in self._gauges.values():
            gauge.set_default_tags({"run": run})

    def set(self, record: dict[str, Any]) -> None:
        values = {**record, "learning_rate": record.get("lr")}
        for name, gauge in self._gauges.items():
            if isinstance(values.get(name), int | float) and math.isfinite(values[name]):
                gauge.set(float(values[name]))


class Board:
    """TensorBoard's event files. Values after a resumed step are purged by TensorBoard itself (purge_step)."""

    def __init__(self, directory: Path, after_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(directory), purge_step=after_step + 1, flush_secs=30)

    def add(self, record: dict[str, Any]) -> None:
        for name in ("loss", "eval_loss", "perplexity", "lr", "grad_norm", "tokens_per_second", "samples_per_second", "mfu", "epoch"):
            if isinstance(record.get(name), int | float):
                self._writer.add_scalar(f"train/{name}", record[name], record["step"], walltime=record["time"])
        for name, seconds in record["seconds"].items():
            self._writer.add_scalar(f"seconds/{name}", seconds, record["step"], walltime=record["time"])

    def close(self) -> None:
        self._writer.close()


class Recorder:
    """Takes records from the loop and hands them to all sinks, in a thread. A sink that fails says so once and is left out."""

    def __init__(self, paths: RunPaths, run: str, after_step: int, *, gauges: bool, board: bool = True) -> None:
        """`after_step`: the step that is resumed; later values are dropped. `gauges`: also to Ray's metrics. `board`: TensorBoard."""
        self.progress = Progress(paths.progress)
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._broken: set[str] = set()
        self._thread = threading.Thread(target=self._run, args=(paths, run, after_step, gauges, board), name="recorder", daemon=True)
        self._thread.start()

    def record(self, record: dict[str, Any]) -> None:
        """One step's values (see the run directory's metrics.jsonl)."""
        self._queue.put(lambda: self._write(record))

    def report_progress(self, percent: float, message: str = "", *, now: bool = False, **fields: Any) -> None:
        """Progress of the training stage."""
        self._queue.put(lambda: self.progress.update("train", percent, message, now=now, **fields))

    def close(self, timeout_s: float = 60.0) -> None:
        """Write what is left; gives up after `timeout_s` if the storage hangs."""
        self._queue.put(None)
        self._thread.join(timeout=timeout_s)

    def _run(self, paths: RunPaths, run: str, after_step: int, gauges: bool, board: bool) -> None:
        self._sinks: dict[str, Any] = {}
        makers: dict[str, Callable[[], Any]] = {"metrics.jsonl": lambda: MetricsFile(paths.metrics, after_step)}
        if board:
            makers["TensorBoard"] = lambda: Board(paths.tensorboard, after_step)
        if gauges:
            makers["Prometheus"] = lambda: Gauges(run)
        for name, make in makers.items():
            self._guard(name, partial(self._open, name, make))
        while (work := self._queue.get()) is not None:
            work()
        for name, sink in self._sinks.items():
            if hasattr(sink, "close"):
                self._guard(name, sink.close)

    def _open(self, name: str, make: Callable[[], Any]) -> None:
        self._sinks[name] = make()

    def _write(self, record: dict[str, Any]) -> None:
        for name, sink in self._sinks.items():
            call = {MetricsFile: "append", Board: "add", Gauges: "set"}[type(sink)]
            self._guard(name, partial(getattr(sink, call), record))

    def _guard(self, name: str, work: Callable[[], None]) -> None:
        if name in self._broken:
            return
        try:
            work()
        except Exception as error:  # numbers about the run must not end it
            self._broken.add(name)
            log.warning("%s gets no more values: %s: %s", name, type(error).__name__, error)


def flops_per_token(config: Any, adapters: bool) -> float:
    """Floating-point operations of forward and backward per token: 6 for each weight of a matrix product (2 forward, 4 backward), 4
    where the weights are frozen (no gradient of their own). Attention's own products are left out, as in the published MFU figures
    that this is compared with (PaLM's 12·L·H·Q·T is below 3% at 512 tokens). `config` is the model's LlamaConfig."""
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    attention = config.hidden_size * size * (2 * heads + 2 * (config.num_key_value_heads or heads))
    mlp = 3 * config.hidden_size * config.intermediate_size
    weights = config.num_hidden_layers * (attention + mlp) + config.hidden_size * config.vocab_size
    return (4.0 if adapters else 6.0) * weights


def peak_flops(name: str) -> float:
    """Dense bf16 peak of a GPU by its device name, in FLOP/s; 0 if it is not known (and on the CPU)."""
    from trainer.plan.hardware import GPUS

    product = name.replace(" ", "-")
    return next((gpu.bf16_tflops * 1e12 for gpu in GPUS.values() if product in gpu.products), 0.0)
