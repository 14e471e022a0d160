"""Shards and batches: borders, positions, loss positions, padding; the background thread."""

from __future__ import annotations

import threading
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.loader import Loader, collate, evaluation_batches
from trainer.data.packing import StepPlanner
from trainer.data.shards import TokenShards, shard_name, write_shard
from trainer.errors import UserError


def make_shards(directory: Path, lengths: list[int], max_tokens: int = 64, per_shard: int = 7) -> tuple[TokenShards, list[np.ndarray]]:
    rng = np.random.default_rng(1)
    rows = [rng.integers(1, 500, n).astype(np.int32) for n in lengths]
    for i, first in enumerate(range(0, len(rows), per_shard)):
        part = rows[first : first + per_shard]
        write_shard(directory / shard_name("train", i), part, [1 + len(r) // 3 for r in part], first, max_tokens)
    return TokenShards(directory, "train"), rows


def test_rows_come_back_over_all_shards(tmp_path: Path) -> None:
    shards, rows = make_shards(tmp_path, list(range(4, 30)))
    assert len(shards) == len(rows) and shards.max_tokens == 64
    for i, row in enumerate(rows):
        tokens, start = shards.row(i)
        assert tokens.tolist() == row.tolist() and start == 1 + len(row) // 3
    with pytest.raises(IndexError):
        shards.row(len(rows))
    assert shards.loss_tokens([0, 3]) == (4 - 2) + (7 - 3) and shards.loss_tokens([0, 3], "all") == 3 + 6


def test_shards_are_read_by_safetensors_as_the_layout_says(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    make_shards(tmp_path, [5, 6, 7, 8, 9, 10, 11, 12])
    tensors = load_file(tmp_path / "train-00001.safetensors")
    assert tensors["row"].tolist() == [7] and tensors["offsets"].tolist() == [0, 12]
    assert {k: str(v.dtype) for k, v in tensors.items()} == {"tokens": "int32", "offsets": "int64", "answer_start": "int32", "row": "int64"}


@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(3, 20), min_size=1, max_size=6), spare=st.integers(0, 50), loss_on=st.sampled_from(["answer", "all"]))
def test_a_batch_holds_its_rows_and_nothing_else(tmp_path_factory, lengths, spare, loss_on) -> None:
    shards, rows = make_shards(tmp_path_factory.mktemp("s"), lengths, max_tokens=20)
    budget = sum(lengths) + spare
    batch = collate(shards, range(len(rows)), budget, loss_on)
    cu = batch.cu_seqlens.tolist()
    assert len(batch.input_ids) == len(batch.position_ids) == budget and cu[0] == 0 and cu[-1] == budget
    assert all(0 <= b - a <= batch.max_seqlen for a, b in pairwise(cu))
    assert len(cu) == shards.segments(budget) + 1
    targets, expected = {}, {}
    for i, row in enumerate(rows):
        a, b = cu[i], cu[i + 1]
        assert batch.input_ids[a:b].tolist() == row.tolist() and batch.position_ids[a:b].tolist() == list(range(len(row)))
        first = shards.row(i)[1] if loss_on == "answer" else 1
        expected |= {a + k - 1: int(row[k]) for k in range(first, len(row))}
    targets = dict(zip(batch.loss_index.tolist(), batch.targets.tolist(), strict=True))
    assert targets == expected
    assert (batch.rows, batch.tokens, batch.loss_tokens) == (len(rows), sum(lengths), len(expected))
    assert batch.loss_tokens == shards.loss_tokens(range(len(rows)), loss_on)


def test_shapes_do_not_depend_on_the_rows(tmp_path: Path) -> None:
    shards, _ = make_shards(tmp_path, [3, 3, 3, 30, 40, 50, 3, 3])
    a, b, empty = (collate(shards, rows, 64, segments=shards.segments(64)) for rows in ([0, 1, 2, 6, 7], [5], []))
    assert a.cu_seqlens.shape == b.cu_seqlens.shape == empty.cu_seqlens.shape and a.max_seqlen == b.max_seqlen == empty.max_seqlen
    assert empty.loss_tokens == empty.rows == empty.tokens == 0 and len(empty.loss_index) == 0


def test_rows_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    shards, _ = make_shards(tmp_path, [30, 40])
    with pytest.raises(ValueError, match="do not fit a budget of 64"):
        collate(shards, [0, 1], 64)


def test_segments_suffice_also_where_epochs_meet(tmp_path: Path) -> None:
    shards, _ = make_shards(tmp_path, [3, 3, 3, 20])
    planner = StepPlanner(shards.lengths, 0, 5)
    while (plan := planner.plan([[100]])) is not None:
        collate(shards, plan[0][0], 100)


def test_loader_gives_what_the_planner_deals(tmp_path: Path) -> None:
    shards, _ = make_shards(tmp_path, [int(n) for n in np.random.default_rng(0).integers(4, 60, 50)])
    budgets = [[128, 64], [100]]
    reference, steps = StepPlanner(shards.lengths, 3, 2), 0
    with Loader(shards, StepPlanner(shards.lengths, 3, 2), budgets, rank=0) as loader:
        for step in loader:
            plan = reference.plan(budgets)
            assert plan is not None and step.state == reference.state_dict() and step.epoch == reference.epoch
            for batch, rows, budget in zip(step.batches, plan[0], budgets[0], strict=True):
                expected = collate(shards, rows, budget)
                assert torch.equal(batch.input_ids, expected.input_ids) and torch.equal(batch.cu_seqlens, expected.cu_seqlens)
            everyone = [row for of_rank in plan for rows in of_rank for row in rows]
            assert (step.rows, step.loss_tokens, step.tokens) == (
                len(everyone), shards.loss_tokens(everyone), int(shards.lengths[everyone].sum()))
            steps += 1
    assert reference.plan(budgets) is None and steps > 10


def test_loader_resumes_after_the_step_that_was_handed_out(tmp_path: Path) -> None:
    shards, _ = make_shards(tmp_path, [20] * 40)
    with Loader(shards, StepPlanner(shards.lengths, 3, 1), [[64]], rank=0, ahead=4) as loader:
        steps = [step.batches[0].input_ids for step in loader]
    with Loader(shards, StepPlanner(shards.lengths, 3, 1), [[64]], rank=0, ahead=4) as loader:
        state = [step for step, _ in zip(loader, range(5), strict=False)][-1].state
    planner = StepPlanner(shards.lengths, 3, 1)
    planner.load_state_dict(state)
    with Loader(shards, planner, [[64]], rank=0) as loader:
        rest = [step.batches[0].input_ids for step in loader]
    assert len(rest) == len(steps) - 5 and all(torch.equal(a, b) for a, b in zip(rest, steps[5:], strict=True))


def test_loader_raises_the_threads_error_and_leaves_no_thread(tmp_path: Path) -> None:
    shards, _ = make_shards(tmp_path, [50, 50])
    before = threading.active_count()
    with pytest.raises(UserError, match="50 tokens"), Loader(shards, StepPlanner(shards.lengths, 0, 1), [[40]], rank=0) as loader:
        list(loader)
    with Loader(shards, StepPlanner(shards.lengths, 0, 100), [[64]], rank=0):
        pass  # closed while the thread waits for room
    assert threading.active_count() == before


@pytest.mark.parametrize("world", [1, 2, 3])
def test_evaluation_covers_each_row_once_with_equal_numbers_of_batches(tmp_path: Path, world: int) -> None:
    shards, _ = make_shards(tmp_path, [int(n) for n in np.random.default_rng(0).integers(4, 60, 31)])
    rows = list(range(1, 31, 2))
    batches = [evaluation_batches(shards, rows, [64, 96, 64][:world], rank) for rank in range(world)]
    assert len({len(b) for b in batches}) == 1
    assert sum(b.rows for of_rank in batches for b in of_rank) == len(rows)
    assert sum(b.loss_tokens for of_rank in batches for b in of_rank) == shards.loss_tokens(rows)


def test_missing_and_damaged_shards_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="prepare"):
        TokenShards(tmp_path, "train")
    make_shards(tmp_path, [5, 6])
    path = tmp_path / "train-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(UserError, match="not a readable token shard"):
        TokenShards(tmp_path, "train")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="page-locked memory needs a GPU's driver")
def test_pinned_batches(tmp_path: Path) -> None:
    shards, _ = make_shards(tmp_path, [5, 6])
    assert collate(shards, [0, 1], 16).pin().input_ids.is_pinned()
