"""Which rows go into which micro-batch: packing without padding, the same on every rank.

The rows of a run form one stream: epoch after epoch, each in a shuffled order of its own. `StepPlanner` deals the stream out, step
by step, to the micro-batches of all ranks. A micro-batch starts with the oldest rows not yet dealt and is closed with the one or two
rows of a look-ahead window that fill it best, so that next to nothing stays empty and no row waits for long. Planning needs the
rows' lengths only, so every rank does it for itself and knows the others' rows without communication.

What was dealt is described by stream positions alone. Another number of ranks, or other budgets, therefore go on with exactly the
rows that remain. (Best-fit packing: Ding et al., "Fewer Truncations Improve Language Modeling", 2024.)
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.errors import UserError

Budgets = Sequence[Sequence[int]]
"""Tokens of each micro-batch of each rank: budgets[rank][micro_batch]."""


def mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """splitmix64's finaliser, elementwise: a fixed function, so that orders never change with a library's version."""
    with np.errstate(over="ignore"):
        values = values + np.uint64(0x9E3779B97F4A7C15)
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return values ^ (values >> np.uint64(31))


def permutation(rows: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The order of an epoch, int64 [rows]."""
    key = mix(mix(np.array([seed], dtype=np.uint64)) ^ np.uint64(epoch))
    return np.argsort(mix(np.arange(rows, dtype=np.uint64) ^ key), kind="stable").astype(np.int64)


class StepPlanner:
    """Deals rows to the micro-batches of all ranks, step by step. Deterministic; keep one on every rank."""

    def __init__(self, lengths: NDArray[np.int32] | Sequence[int], seed: int, epochs: float, window: int = 1024) -> None:
        """`lengths`: tokens of each row. `epochs`: passes over the rows, fractions allowed. `window`: rows looked ahead."""
        self.lengths = np.asarray(lengths, dtype=np.int64)
        if len(self.lengths) == 0:
            raise UserError("There are no rows to train on: the training split is empty.")
        if epochs <= 0 or window < 1:
            raise ValueError("epochs and window must be positive")
        self.seed, self.window = seed, window
        self.total = max(1, round(epochs * len(self.lengths)))
        """Rows of the whole run: the length of the stream."""
        self.position = 0
        """Stream positions from here on have not been dealt."""
        self.skipped = np.zeros(0, dtype=np.int64)
        """Stream positions before `position` that have not been dealt, ascending; fewer than a few windows."""
        self._orders: dict[int, NDArray[np.int64]] = {}

    @property
    def consumed(self) -> int:
        """Rows dealt so far, over all epochs."""
        return self.position - len(self.skipped)

    @property
    def epoch(self) -> float:
        """Passes over the rows done so far."""
        return self.consumed / len(self.lengths)

    def steps_estimate(self, tokens_per_step: int) -> int:
        """Steps of the whole run if every step is full: at least 1. `count_steps` is exact."""
        rows = len(self.lengths)
        tokens = int(self.lengths.sum()) * (self.total // rows)
        if rest := self.total % rows:
            tokens += int(self.lengths[self._order(self.total // rows)[:rest]].sum())
        return max(1, math.ceil(tokens / tokens_per_step))

    def count_steps(self, budgets: Budgets) -> int:
        """Steps from here to the end if every step has these budgets, by planning them; the planner itself does not move."""
        other, steps = copy.copy(self), 0
        while other.plan(budgets) is not None:
            steps += 1
        return steps

    def state_dict(self) -> dict[str, Any]:
        """What has been dealt; JSON-able, at most a few thousand numbers, independent of ranks and budgets."""
        return {"rows": len(self.lengths), "tokens": int(self.lengths.sum()), "seed": self.seed, "position": self.position,
                "skipped": self.skipped.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken. Raises UserError if it belongs to other rows or another order."""
        for key, mine in (("rows", len(self.lengths)), ("tokens", int(self.lengths.sum())), ("seed", self.seed)):
            if state[key] != mine:
                raise UserError(f"The checkpoint was made on other data ({key}: {state[key]}, now {mine}). "
                                "Start a run under another name, or restore the dataset directory.")
        self.position = int(state["position"])
        self.skipped = np.asarray(state["skipped"], dtype=np.int64)

    def plan(self, budgets: Budgets) -> list[list[list[int]]] | None:
        """Rows of the next step, [rank][micro_batch][row]; None when all rows of all epochs have been dealt.

        Micro-batches can only be empty in the last steps, or if a budget is smaller than all rows at hand. Raises UserError if a
        row is longer than every budget.
        """
        if self.consumed >= self.total:
            return None
        bins = [(rank, micro) for rank, of_rank in enumerate(budgets) for micro in range(len(of_rank))]
        capacity = np.array([budgets[rank][micro] for rank, micro in bins], dtype=np.int64)
        positions, rows, whole = self._candidates(int(capacity.sum()))
        lengths = self.lengths[rows]
        if int(lengths[0]) > int(capacity.max(initial=0)):
            raise UserError(f"A row of {int(lengths[0])} tokens fits no micro-batch (the largest has {int(capacity.max(initial=0))}). "
                            "Raise run.train.micro_batch_tokens, or lower run.data.max_tokens.")
        ending = whole and int(lengths.sum()) <= int(capacity.sum())
        chosen = _spread(lengths, capacity) if ending else _fill(lengths, capacity, self.window)

        left = np.ones(len(rows), dtype=bool)
        plan: list[list[list[int]]] = [[[] for _ in of_rank] for of_rank in budgets]
        for (rank, micro), index in zip(bins, chosen, strict=True):
            plan[rank][micro] = rows[index].tolist()
            left[index] = False
        taken = positions[~left]
        # What lies between the first and the last dealt position, undealt, is remembered; the rest is simply not reached yet.
        self.position = max(self.position, int(taken[-1]) + 1)
        self.skipped = positions[left & (positions < self.position)]
        return plan

    def _order(self, epoch: int) -> NDArray[np.int64]:
        if epoch not in self._orders:
            self._orders = {e: o for e, o in self._orders.items() if e >= epoch - 1}
            self._orders[epoch] = permutation(len(self.lengths), self.seed, epoch)
        return self._orders[epoch]

    def _rows(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        epochs, index = np.divmod(positions, len(self.lengths))
        rows = np.empty(len(positions), dtype=np.int64)
        for epoch in np.unique(epochs):
            mask = epochs == epoch
            rows[mask] = self._order(int(epoch))[index[mask]]
        return rows

    def _candidates(self, tokens: int) -> tuple[NDArray[np.int64], NDArray[np.int64], bool]:
        """Stream positions and rows at hand for a step of `tokens`: enough to fill it plus a window; whether they are all that remain.

        The next epoch is looked into only if the rest of this one does not fill the step, so that epochs stay apart.
        """
        rows = len(self.lengths)
        oldest = int(self.skipped[0]) if len(self.skipped) else self.position
        epoch_end = min(self.total, (oldest // rows + 1) * rows)
        count = int(1.1 * tokens / max(1.0, float(self.lengths.mean()))) + self.window
        while True:
            end = min(self.position + count, max(epoch_end, self.position))
            positions = np.concatenate([self.skipped, np.arange(self.position, end, dtype=np.int64)])
            index = self._rows(positions)
            filled = int(np.searchsorted(np.cumsum(self.lengths[index]), tokens, side="right"))
            enough = filled < len(index)  # the rows up to `filled` are one more than the step holds
            if enough and (len(index) - filled >= self.window or end >= epoch_end):
                return positions, index, end >= self.total
            if end >= epoch_end:
                if epoch_end >= self.total:
                    return positions, index, True
                epoch_end = min(self.total, epoch_end + rows)
            count = count * 2 if end >= self.position + count else count


def _fill(lengths: NDArray[np.int64], capacity: NDArray[np.int64], window: int) -> list[NDArray[np.int64]]:
    """Indices into `lengths` for each micro-batch; large budgets first, so that the oldest row always finds a place."""
    alive = np.ones(len(lengths), dtype=bool)
    chosen: list[NDArray[np.int64]] = [np.zeros(0, dtype=np.int64)] * len(capacity)
    for bin_ in np.argsort(-capacity, kind="stable"):
        index = np.flatnonzero(alive)
        room = int(capacity[bin_])
        if len(index) == 0:
            break
        at_hand = lengths[index]
        if at_hand[0] > room:  # a small budget: the oldest rows that fit it
            keep = at_hand <= room
            index, at_hand = index[keep], at_hand[keep]
            if len(index) == 0:
                continue
        prefix = int(np.searchsorted(np.cumsum(at_hand), room, side="right"))
        if prefix < len(index) and prefix > 1:
            prefix -= 1  # give the last one back: two free places fit better than one
        rest = room - int(at_hand[:prefix].sum())
        ahead = at_hand[prefix : prefix + window]
        picked = np.concatenate([index[:prefix], index[prefix + best_two(ahead, rest)]])
        alive[picked] = False
        chosen[int(bin_)] = np.sort(picked)
    return chosen


def best_two(lengths: NDArray[np.int64], room: int) -> NDArray[np.int64]:
    """Indices of at most two rows whose lengths sum to the most that is at most `room`; the oldest rows among equals."""
    values, first, counts = np.unique(lengths, return_index=True, return_counts=True)
    usable = int(np.searchsorted(values, room, side="right"))
    if usable == 0:
        return np.zeros(0, dtype=np.int64)
    values, first, counts = values[:usable], first[:usable], counts[:usable]
    partner = np.searchsorted(values, room - values, side="right") - 1
    partner -= (partner == np.arange(usable)) & (counts == 1)  # a single row is no pair
    sums = values + np.where(partner >= 0, values[np.maximum(partner, 0)], 0)
    best = int(np.argmax(sums))
    other = int(partner[best])
    if other < 0:
        return first[best : best + 1]
    if other == best:
        return np.flatnonzero(lengths == values[best])[:2]
    return np.sort(first[[best, other]])


def _spread(lengths: NDArray[np.int64], capacity: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """The run's last rows, spread evenly: the longest first, each to the micro-batch that is emptiest for its size."""
    load = np.zeros(len(capacity), dtype=np.int64)
    chosen: list[list[int]] = [[] for _ in capacity]
    for row in np.argsort(-lengths, kind="stable"):
        after = (load + lengths[row]) / np.maximum(capacity, 1)
        fits = load + lengths[row] <= capacity
        if not fits.any():
            continue  # stays for another step
        best = int(np.argmin(np.where(fits, after, np.inf)))
        load[best] += lengths[row]
        chosen[best].append(int(row))
    return [np.sort(np.array(rows, dtype=np.int64)) for rows in chosen]
