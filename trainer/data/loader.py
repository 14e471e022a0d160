"""Micro-batches as tensors, made ready in the background."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch

from trainer.data.packing import Budgets, StepPlanner
from trainer.data.shards import TokenShards


@dataclass(frozen=True)
class PackedBatch:
    """Whole rows one after another, with their borders. Fixed shapes for a fixed budget, but for `loss_index` and `targets`."""

    input_ids: torch.Tensor
    """int64 [T]; T is the micro-batch's budget. The tail that no row fills is token 0."""
    position_ids: torch.Tensor
    """int64 [T]; 0, 1, 2, … from each row's start."""
    cu_seqlens: torch.Tensor
    """int32 [S + 1]; where each segment starts, then T. The tail is cut into segments of its own; unused segments are empty."""
    max_seqlen: int
    """No segment is longer: data.max_tokens, the same for all batches."""
    loss_index: torch.Tensor
    """int64 [N]; positions whose next token is trained on."""
    targets: torch.Tensor
    """int64 [N]; these next tokens."""
    rows: int
    """Number of rows."""
    tokens: int
    """Number of real tokens."""
    loss_tokens: int
    """N."""

    def pin(self) -> PackedBatch:
        """The same batch in page-locked memory, from which copies to a GPU are asynchronous."""
        return self._with(torch.Tensor.pin_memory)

    def to(self, device: torch.device) -> PackedBatch:
        """The same batch on a device; asynchronous from page-locked memory."""
        return self._with(lambda tensor: tensor.to(device, non_blocking=True))

    def _with(self, change: Callable[[torch.Tensor], torch.Tensor]) -> PackedBatch:
        changed: dict[str, Any] = {f.name: change(v) for f in fields(self) if isinstance(v := getattr(self, f.name), torch.Tensor)}
        return replace(self, **changed)


def collate(shards: TokenShards, rows: Sequence[int], budget: int, loss_on: str = "answer", segments: int = 0) -> PackedBatch:
    """Rows as one batch of `budget` tokens. `segments` is `shards.segments(budget)` if the caller has it already.

    No rows at all give a batch of padding without loss. Raises ValueError if the rows do not fit.
    """
    segments = segments or shards.segments(budget)
    input_ids = np.zeros(budget, dtype=np.int64)
    position_ids = np.zeros(budget, dtype=np.int64)
    borders = [0]
    loss_index = []
    end = 0
    for row in rows:
        tokens, answer_start = shards.row(int(row))
        start, end = end, end + len(tokens)
        if end > budget:
            raise ValueError(f"rows of {sum(int(shards.lengths[r]) for r in rows)} tokens do not fit a budget of {budget}")
        input_ids[start:end] = tokens
        position_ids[start:end] = np.arange(len(tokens))
        borders.append(end)
        first = answer_start if loss_on == "answer" else 1
        loss_index.append(np.arange(start + first - 1, end - 1, dtype=np.int64))
    filled = end
    while end < budget:
        start, end = end, min(end + shards.max_tokens, budget)
        position_ids[start:end] = np.arange(end - start)
        borders.append(end)
    if len(borders) > segments + 1:
        raise ValueError(f"{len(borders) - 1} segments do not fit {segments}")
    cu_seqlens = np.full(segments + 1, budget, dtype=np.int32)
    cu_seqlens[: len(borders)] = borders
    index = np.concatenate(loss_index) if loss_index else np.zeros(0, dtype=np.int64)
    return PackedBatch(input_ids=torch.from_numpy(input_ids), position_ids=torch.from_numpy(position_ids),
                       cu_seqlens=torch.from_numpy(cu_seqlens), max_seqlen=shards.max_tokens, loss_index=torch.from_numpy(index),
                       targets=torch.from_numpy(input_ids[index + 1]), rows=len(rows), tokens=filled, loss_tokens=len(index))


def evaluation_batches(shards: TokenShards, rows: Sequence[int], budgets: Sequence[int], rank: int,
                       loss_on: str = "answer") -> list[PackedBatch]:
    """This rank's share of some rows, each exactly once over all ranks; every rank gets the same number of batches.

    `budgets`: tokens of one batch of each rank.
    """
    planner = StepPlanner(shards.lengths[np.asarray(rows, dtype=np.int64)], seed=0, epochs=1)
    segments, batches = shards.segments(budgets[rank]), []
    while (plan := planner.plan([[budget] for budget in budgets])) is not None:
        batches.append(collate(shards, [int(rows[i]) for i in plan[rank][0]], budgets[rank], loss_on, segments))
    return batches


@dataclass(frozen=True)
class Step:
    """One optimizer step's data: this rank's micro-batches, and what is known of all ranks."""

    batches: list[PackedBatch]
    """This rank's micro-batches."""
    loss_tokens: int
    """Trained tokens over all ranks."""
    tokens: int
    """Real tokens over all ranks."""
    rows: int
    """Rows over all ranks."""
    epoch: float
    """Passes over the rows done after this step."""
    state: dict[str, Any]
    """The planner's state after this step: what a checkpoint of this step stores."""


class Loader:
    """Plans and collates in a background thread; iterate over it for `Step`s until the planner's end.

    Use as a context manager, or call `close`. To change the budgets, close it and make another from a planner that was loaded
    with the last `Step.state`. The planner belongs to the loader from here on: it runs ahead of what was handed out.
    """

    def __init__(self, shards: TokenShards, planner: StepPlanner, budgets: Budgets, rank: int, loss_on: str = "answer",
                 pin: bool = False, ahead: int = 2) -> None:
        """`budgets`: tokens of each micro-batch of each rank; `pin`: page-locked memory; `ahead`: steps kept ready."""
        self._shards, self._planner, self._budgets, self._rank = shards, planner, [list(b) for b in budgets], rank
        self._loss_on, self._pin = loss_on, pin
        self._segments = {budget: shards.segments(budget) for budget in set(self._budgets[rank])}
        self._queue: queue.Queue[Step | BaseException | None] = queue.Queue(maxsize=max(1, ahead))
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="loader", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Step]:
        while not self._stop.is_set():
            item = self._queue.get()
            if isinstance(item, BaseException):
                self.close()
                raise item
            if item is None:
                self.close()
                return
            yield item

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the thread. Safe to call twice."""
        self._stop.set()
        while self._thread.is_alive():
            try:  # a thread that waits for room in the queue sees the event within its timeout
                self._queue.get_nowait()
            except queue.Empty:
                self._thread.join(0.01)

    def _put(self, item: Step | BaseException | None) -> None:
        while not self._stop.is_set():
            try:
                return self._queue.put(item, timeout=0.1)
            except queue.Full:
                continue

    def _work(self) -> None:
        try:
            while not self._stop.is_set():
                plan = self._planner.plan(self._budgets)
                if plan is None:
                    break
                self._put(self._step(plan))
            self._put(None)
        except BaseException as error:  # handed to the consumer, who raises it
            self._put(error)

    def _step(self, plan: list[list[list[int]]]) -> Step:
        batches = []
        for rows, budget in zip(plan[self._rank], self._budgets[self._rank], strict=True):
            batch = collate(self._shards, rows, budget, self._loss_on, self._segments[budget])
            batches.append(batch.pin() if self._pin else batch)
        dealt = np.array([row for of_rank in plan for rows in of_rank for row in rows], dtype=np.int64)
        return Step(batches=batches, loss_tokens=self._shards.loss_tokens(dealt, self._loss_on),
                    tokens=int(self._shards.lengths[dealt].sum(dtype=np.int64)), rows=len(dealt), epoch=self._planner.epoch,
                    state=self._planner.state_dict())
