"""Packing: no row lost or repeated, nothing too long, deterministic, resumable on another number of ranks, full."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trainer.data.packing import StepPlanner, best_two, permutation
from trainer.errors import UserError

LENGTHS = st.lists(st.integers(1, 64), min_size=1, max_size=60)
BUDGETS = st.lists(st.lists(st.integers(64, 200), min_size=1, max_size=3), min_size=1, max_size=4)
QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def dealt(plan: list[list[list[int]]]) -> list[int]:
    return [row for of_rank in plan for rows in of_rank for row in rows]


@QUICK
@given(LENGTHS, BUDGETS, st.integers(0, 2**31 - 1), st.integers(1, 3), st.integers(1, 40))
def test_every_row_once_an_epoch_within_budgets(lengths, budgets, seed, epochs, window) -> None:
    planner, counts = StepPlanner(lengths, seed, epochs, window), np.zeros(len(lengths), dtype=int)
    while (plan := planner.plan(budgets)) is not None:
        rows = dealt(plan)
        assert rows, "a step without rows would never end"
        for of_rank, of_budget in zip(plan, budgets, strict=True):
            for rows_, budget in zip(of_rank, of_budget, strict=True):
                assert sum(lengths[r] for r in rows_) <= budget
        np.add.at(counts, rows, 1)
        assert counts.sum() == planner.consumed
        # Epochs stay apart up to what one step mixes.
        assert counts.max() - counts.min() <= 2 + sum(map(sum, budgets)) // max(1, sum(lengths))
    assert (counts == epochs).all()


@QUICK
@given(LENGTHS, BUDGETS, BUDGETS, st.integers(0, 1000), st.integers(0, 6))
def test_resume_on_other_ranks_goes_on_with_what_remains(lengths, before, after, seed, steps) -> None:
    planner, counts = StepPlanner(lengths, seed, 2, 16), np.zeros(len(lengths), dtype=int)
    for _ in range(steps):
        if (plan := planner.plan(before)) is not None:
            np.add.at(counts, dealt(plan), 1)
    other = StepPlanner(lengths, seed, 2, 16)
    other.load_state_dict(json.loads(json.dumps(planner.state_dict())))
    while (plan := other.plan(after)) is not None:
        np.add.at(counts, dealt(plan), 1)
    assert (counts == 2).all()


@QUICK
@given(LENGTHS, BUDGETS, st.integers(0, 1000))
def test_two_planners_agree_and_a_resumed_one_with_them(lengths, budgets, seed) -> None:
    one, two = StepPlanner(lengths, seed, 2), StepPlanner(lengths, seed, 2)
    while True:
        plan = one.plan(budgets)
        resumed = StepPlanner(lengths, seed, 2)
        resumed.load_state_dict(two.state_dict())
        assert plan == resumed.plan(budgets) == two.plan(budgets)
        assert one.state_dict() == two.state_dict()
        if plan is None:
            break


@pytest.mark.parametrize(("mean", "deviation", "shortest"), [(430, 110, 60), (90, 30, 20)])
def test_pubmedqa_lengths_fill_98_percent(mean: int, deviation: int, shortest: int) -> None:
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.normal(mean, deviation, 8000).astype(int), shortest, 512)
    for budgets in ([[4096]] * 2, [[16384], [9000]]):
        planner, real, room = StepPlanner(lengths, 1, 1), 0, 0
        while (plan := planner.plan(budgets)) is not None:
            if planner.consumed < planner.total:
                real, room = real + int(lengths[dealt(plan)].sum()), room + sum(map(sum, budgets))
        assert real / room >= 0.98


def test_a_step_deals_in_proportion_to_the_budgets() -> None:
    lengths = np.full(4000, 10)
    plan = StepPlanner(lengths, 1, 1).plan([[1000], [500]])
    assert plan is not None and [sum(map(len, r)) for r in plan] == [100, 50]


def test_the_last_rows_are_spread_evenly() -> None:
    plan = StepPlanner([10] * 8, 1, 1).plan([[100, 100], [100, 100]])
    assert plan is not None and [[len(m) for m in r] for r in plan] == [[2, 2], [2, 2]]


def test_no_row_waits_long() -> None:
    lengths = np.random.default_rng(3).integers(5, 500, 5000)
    planner = StepPlanner(lengths, 5, 1)
    while planner.plan([[1024], [1024]]) is not None:
        oldest = planner.skipped[0] if len(planner.skipped) else planner.position
        assert planner.position - oldest <= 2 * planner.window


def test_epochs_have_different_orders_and_seeds_too() -> None:
    orders = [permutation(100, seed, epoch).tolist() for seed in (1, 2) for epoch in (0, 1)]
    assert all(sorted(o) == list(range(100)) for o in orders) and len({tuple(o) for o in orders}) == 4


def test_order_is_fixed_for_all_time() -> None:
    assert permutation(8, 17, 0).tolist() == [0, 5, 2, 3, 7, 4, 6, 1]


def test_fraction_of_an_epoch_and_step_counts() -> None:
    planner = StepPlanner([10] * 100, 1, 2.5)
    assert planner.total == 250 and planner.steps_estimate(100) == 25
    assert planner.count_steps([[50], [50]]) == 25 and planner.consumed == 0
    while planner.plan([[50], [50]]) is not None:
        pass
    assert planner.epoch == 2.5


def test_a_row_longer_than_every_budget_is_named() -> None:
    with pytest.raises(UserError, match=r"90 tokens.*micro_batch_tokens"):
        StepPlanner([90], 1, 1).plan([[64], [80]])


def test_a_small_budget_beside_a_large_one_gets_what_fits() -> None:
    planner = StepPlanner([90, 20, 20, 90, 30], 1, 1)
    rows = []
    while (plan := planner.plan([[100], [40]])) is not None:
        rows += dealt(plan)
    assert sorted(rows) == [0, 1, 2, 3, 4]


def test_state_of_other_data_is_refused() -> None:
    state = StepPlanner([10, 20], 1, 1).state_dict()
    for lengths, seed in (([10, 21], 1), ([10, 20, 30], 1), ([10, 20], 2)):
        with pytest.raises(UserError, match="other data"):
            StepPlanner(lengths, seed, 1).load_state_dict(state)


def test_no_rows_are_refused() -> None:
    with pytest.raises(UserError, match="no rows"):
        StepPlanner([], 1, 1)


@QUICK
@given(st.lists(st.integers(1, 30), max_size=30), st.integers(0, 70))
def test_best_two_is_the_best(lengths, room) -> None:
    picked = best_two(np.array(lengths, dtype=np.int64), room)
    n = len(lengths)
    pairs = [lengths[i] + lengths[j] for i in range(n) for j in range(i)]
    sums = [0, *(x for x in [*lengths, *pairs] if x <= room)]
    assert len(set(picked.tolist())) == len(picked) <= 2
    assert sum(lengths[i] for i in picked) == max(sums)
