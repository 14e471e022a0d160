"""Saving while training goes on, and restoring.

A save copies this rank's pieces into reused host blocks (pinned, on a stream of its own, if they lie on a GPU) and returns; a
background thread writes and syncs the rank's file. Where the host has no room for a whole copy, pieces in host memory are written from
where they are, pieces on a GPU through two blocks, and the next update waits for that. The threads then tell each other how it went,
over a group of their own, and rank 0 writes state and manifest and renames the temporary directory. Until the rename nothing is visible
under the checkpoint's name; after a failure on any rank the temporary directory is removed and the older checkpoints stay as they are.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import secrets
import shutil
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trainer.checkpoint import format as tensors
from trainer.checkpoint import store
from trainer.checkpoint.format import BrokenCheckpoint, Layout
from trainer.checkpoint.reader import STATE, CheckpointReader, rank_file
from trainer.config import CheckpointConfig
from trainer.engines.base import Engine, Piece
from trainer.errors import UserError
from trainer.files import MANIFEST, sha256, sync_directory, write_json
from trainer.train.ranks import Ranks

log = logging.getLogger(__name__)

OK, NO_ROOM, FAILED = 0, 1, 2
"""How a rank's part of a save went."""

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

CGROUP = Path("/sys/fs/cgroup")

BLOCK = 1 << 28
"""Bytes of a host block. A power of two, to which torch rounds pinned allocations up: one buffer of 81 GB would pin 128 GiB."""

HOST_RESERVE = 8 << 30
"""Bytes of host memory that a pinned copy of the state leaves to the rest: data, page cache, the other processes of the pod."""

SPARE = 64 << 20
"""Bytes that a save leaves free on the storage, for metrics, progress and the manifest."""


@dataclass(frozen=True)
class Outcome:
    """How a save ended; the same on every rank."""

    step: int
    saved: bool
    message: str
    bytes: int
    """Of this rank."""
    seconds: float
    """From the call of `save` until it was durable (or given up), on this rank."""


class Checkpointer:
    """Saves an engine's state. Creating it is collective; `save` is called by every rank at the same steps."""

    def __init__(self, directory: Path, config: CheckpointConfig, config_sha256: str, engine: Engine) -> None:
        self.directory, self.config, self.config_sha256, self.engine = directory, config, config_sha256, engine
        self._ranks = Ranks(timeout_s=7200.0)
        if self._ranks.rank == 0:
            directory.mkdir(parents=True, exist_ok=True)
            store.sweep(directory)
        # A name of this attempt's own: what a lost attempt's process may still write never lands in this attempt's directories.
        self._attempt = f"{self._ranks.from_first([secrets.randbits(48)])[0]:012x}"
        self._blocks: list[torch.Tensor] = []
        self._stream = torch.cuda.Stream(engine.device) if engine.device.type == "cuda" else None
        self._copied = threading.Event()
        self._copied.set()
        self._copied_event: torch.cuda.Event | None = None
        self._thread: threading.Thread | None = None
        self._reserving: threading.Thread | None = None
        if self._stream is not None:  # pinning memory takes seconds, which pass while the first steps compile
            size = Layout(engine.pieces(), {}).size
            self._reserving = threading.Thread(target=self._reserve, args=(size, True), name="checkpoint-memory", daemon=True)
            self._reserving.start()
        self._outcomes: list[Outcome] = []

    @property
    def busy(self) -> bool:
        """Whether a save is still being written by this rank or the others."""
        return self._thread is not None and self._thread.is_alive()

    def outcomes(self) -> list[Outcome]:
        """The saves that ended since the last call."""
        ended, self._outcomes = self._outcomes, []
        return ended

    def before_update(self) -> None:
        """To be called before the state is changed: waits until (on a GPU: makes the current stream wait until) it is copied."""
        self._copied.wait()
        if self._copied_event is not None:
            torch.cuda.current_stream(self.engine.device).wait_event(self._copied_event)
            self._copied_event = None

    def save(self, step: int, state: dict[str, Any], hold: bool = False) -> None:
        """Begin to save the state after `step` steps. `state` is JSON: planner, metrics, and whatever the loop needs to go on.

        `hold`: the state does not change until the save has ended, so host memory is not copied. Returns at once. Raises RuntimeError if
        the save before has not ended: ask `busy` on every rank first.
        """
        if self.busy:
            raise RuntimeError("a save is still being written")
        pieces = self.engine.pieces()
        ready = torch.cuda.current_stream(self.engine.device).record_event() if self._stream is not None else None
        self._copied.clear()
        document = {"step": step, "world": self._ranks.world, "config_sha256": self.config_sha256, "time": time.time(), **state}
        self._thread = threading.Thread(target=self._run, args=(step, pieces, document, ready, hold), name=f"checkpoint-{step}",
                                        daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until the save under way has ended."""
        if self._thread is not None:
            self._thread.join()

    def _run(self, step: int, pieces: Sequence[Piece], state: dict[str, Any], ready: torch.cuda.Event | None,
             hold: bool) -> None:
        began = time.monotonic()
        size = 0
        try:
            layout = Layout(pieces, {"step": str(step), "rank": str(self._ranks.rank)})
            size = layout.size
            parts = self._copy(layout, pieces, ready, hold)
            saved, message = self._write(step, layout, parts, state)
        except Exception as error:  # a lost rank, or a fault of this code: the loop hears of it as of any failed save
            log.exception("Saving step %d failed", step)
            saved, message = False, f"{type(error).__name__}: {error}"
        finally:
            self._copied.set()
        self._outcomes.append(Outcome(step, saved, message, size, time.monotonic() - began))

    def _copy(self, layout: Layout, pieces: Sequence[Piece], ready: torch.cuda.Event | None, hold: bool) -> Iterable[torch.Tensor]:
        """The pieces' bytes in the layout's order: from host blocks that hold them all, from where they are, or through two blocks.

        `before_update` may go on as soon as the copies into the blocks are made (on a GPU: issued); otherwise, when the file is written.
        """
        on_gpu = any(pieces[i].tensor.is_cuda for i, _ in layout.entries)
        if self._reserving is not None:
            self._reserving.join()
        whole = (on_gpu or not hold) and self._reserve(layout.size, on_gpu)
        if not whole and not on_gpu:
            return [pieces[i].tensor.detach().contiguous().view(torch.uint8) for i, _ in layout.entries]
        with self._on_stream():
            if self._stream is not None and ready is not None:
                self._stream.wait_event(ready)
        if not whole:
            return self._staged(layout, pieces)
        with self._on_stream():
            for at, block in zip(range(0, layout.size, BLOCK), self._blocks, strict=True):
                layout.copy(pieces, block, at)
            copied = self._stream.record_event() if self._stream is not None else None
        self._copied_event = copied
        self._copied.set()
        if copied is not None:
            copied.synchronize()
        return self._blocks

    def _reserve(self, size: int, on_gpu: bool) -> bool:
        """Make the host blocks: for all of the bytes if the host has room (True), else two, where they lie on a GPU."""
        sizes = [min(BLOCK, size - at) for at in range(0, size, BLOCK)]
        if [b.numel() for b in self._blocks] == sizes:
            return True
        self._blocks = []
        # Without a GPU the copy lies beside the state in the same memory, and training goes on in what is left.
        whole = host_memory_free() > (size + HOST_RESERVE if on_gpu else 2 * size + SPARE)
        if not whole and not on_gpu:
            return False
        if not whole:
            log.warning("The host has no room for a copy of the state (%.1f GB of %.1f GB are free): training stands still while a "
                        "checkpoint is written. Give the workers more memory.", host_memory_free() / 1e9, size / 1e9)
        for block in sizes if whole else sizes[:2]:
            self._blocks.append(torch.empty(block, dtype=torch.uint8, pin_memory=on_gpu))
        return whole

    def _staged(self, layout: Layout, pieces: Sequence[Piece]) -> Iterator[torch.Tensor]:
        """The bytes, block after block; the next is copied while one is written."""
        copied: list[torch.cuda.Event | None] = [None, None]

        def begin(index: int) -> torch.Tensor:
            at = index * BLOCK
            block = self._blocks[index % 2][:min(BLOCK, layout.size - at)]
            with self._on_stream():
                layout.copy(pieces, block, at)
                copied[index % 2] = self._stream.record_event() if self._stream is not None else None
            return block

        count = -(-layout.size // BLOCK)
        following = begin(0)
        for index in range(count):
            block, event = following, copied[index % 2]
            if index + 1 < count:
                following = begin(index + 1)
            if event is not None:
                event.synchronize()
            yield block

    def _on_stream(self) -> contextlib.AbstractContextManager[Any]:
        return torch.cuda.stream(self._stream) if self._stream is not None else contextlib.nullcontext()

    def _write(self, step: int, layout: Layout, data: Iterable[torch.Tensor], state: dict[str, Any]) -> tuple[bool, str]:
        ranks = self._ranks
        temporary = self.directory / f".step-{step}.{self._attempt}"
        name = rank_file(ranks.rank)
        total = int(ranks.sum([float(len(layout.header) + layout.size)])[0])
        status, digest, written, why = OK, bytes(32), 0, ""
        try:
            temporary.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(temporary).free
            if free < total + SPARE:
                raise OSError(errno.ENOSPC, f"{total / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB free")
            written, digest = tensors.write(temporary / name, layout.header, data)
            self._copied.set()
        except OSError as error:
            status, why = NO_ROOM if error.errno in FULL else FAILED, str(error)
            log.warning("Rank %d could not save step %d: %s", ranks.rank, step, error)
        words = [int.from_bytes(digest[i:i + 8], "big", signed=True) for i in range(0, 32, 8)]
        parts = ranks.gather([status, written, *words])
        failed = [r for r, part in enumerate(parts) if part[0] != OK]
        final = OK
        if ranks.rank == 0:
            try:
                if not failed:
                    self._finish(temporary, step, state, parts)
            except (OSError, BrokenCheckpoint) as error:
                final, why = NO_ROOM if getattr(error, "errno", None) in FULL else FAILED, str(error)
                log.warning("Step %d could not be finished: %s", step, error)
            if failed or final != OK:
                shutil.rmtree(temporary, ignore_errors=True)
        final = ranks.from_first([final])[0]
        if not failed and final == OK:
            return True, ""
        reason = "the storage is full" if final == NO_ROOM or any(part[0] == NO_ROOM for part in parts) else "it could not be written"
        return False, reason + (f" ({why})" if why else f" (rank {failed[0]})" if failed else "")

    def _finish(self, temporary: Path, step: int, state: dict[str, Any], parts: list[list[int]]) -> None:
        """Rank 0, when every rank's file is durable: state, manifest, rename, then what retention lets go."""
        files = {}
        for rank, (_, size, *words) in enumerate(parts):
            digest = b"".join(word.to_bytes(8, "big", signed=True) for word in words)
            files[rank_file(rank)] = {"size": size, "sha256": digest.hex()}
        write_json(temporary / STATE, state)
        files[STATE] = {"size": (temporary / STATE).stat().st_size, "sha256": sha256(temporary / STATE)}
        write_json(temporary / MANIFEST, {"step": step, "world": len(parts), "config_sha256": self.config_sha256, "files": files})
        CheckpointReader(temporary)  # headers only: the ranks' pieces must cover every tensor once
        target = store.directory_of(self.directory, step)
        if target.exists():  # a broken one that was passed over, or the same step before a worker was lost
            store.remove(target)
        os.rename(temporary, target)
        sync_directory(self.directory)
        store.retain(self.directory, self.config)


def host_memory_free() -> int:
    """Bytes of memory that this process may still take: of the machine, and of its container (cgroup 1 or 2)."""
    import psutil

    free = int(psutil.virtual_memory().available)
    for limit, usage, stat, cache in (("memory.max", "memory.current", "memory.stat", "inactive_file"),
                                      ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat",
                                       "total_inactive_file")):
        try:
            top = int((CGROUP / limit).read_text(encoding="ascii"))
            fields = dict(line.split() for line in (CGROUP / stat).read_text(encoding="ascii").splitlines())
            free = min(free, top - int((CGROUP / usage).read_text(encoding="ascii")) + int(fields.get(cache, 0)))
        except (OSError, ValueError):  # no such version of cgroups, or no limit ("max")
            continue
    return free


def restore(directory: Path, config_sha256: str, engine: Engine, ranks: Ranks) -> dict[str, Any] | None:
    """Load the newest whole checkpoint into the engine; collective. Returns its state, or None if there is none.

    The ranks share the work of comparing the files with their sha256. A checkpoint that fails is passed over, with a warning, for the
    one before it. Raises UserError if the checkpoints belong to another configuration.
    """
    candidates: list[store.Saved] = store.whole(directory) if ranks.rank == 0 else []
    foreign = [s.step for s in candidates if s.config_sha256 != config_sha256]
    if ranks.from_first([foreign[-1] if foreign else -1])[0] >= 0:
        raise UserError(f"{directory} holds checkpoints of another configuration. Give this run another name or id, "
                        "or remove its run directory to start again.")
    for step in ranks.from_first([s.step for s in reversed(candidates)]):
        path = store.directory_of(directory, step)
        reader, wrong = None, None
        try:
            reader = CheckpointReader(path)
            wrong = reader.verify(ranks.rank, ranks.world)
        except BrokenCheckpoint as error:
            wrong = str(error)
        if wrong:
            log.warning("Checkpoint %s is broken and is passed over: %s", path.name, wrong)
        if ranks.sum([float(wrong is not None)])[0] or reader is None:
            continue
        engine.load_pieces(reader.read, step)
        return json.loads(json.dumps(reader.state))
    return None
