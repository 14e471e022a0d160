"""Token budgets in proportion to speed, within limits; drift."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.trainer.engine_cases import make_config
from trainer.errors import UserError
from trainer.model.load import model_config
from trainer.train.balance import CPU, GPU, Kind, Rebalance, SpeedProbe, budgets_by_speed, harmonised, micro_budgets, quantum, step_budgets


def test_equal_ranks_get_equal_budgets() -> None:
    assert step_budgets([100.0, 101.0, 99.5, 100.2], 65536, [16384] * 4, 512, 128) == [[16384]] * 4
    assert step_budgets([100.0, 88.0], 2048, [2048] * 2, 512, 16, noise=CPU.noise) == [[1024]] * 2


def test_twice_as_fast_gets_twice_as_much() -> None:
    assert micro_budgets([200.0, 100.0], 24576, [16384] * 2, 512, 128) == [16384, 8192]


def test_what_a_limit_leaves_over_goes_to_the_others() -> None:
    assert micro_budgets([300.0, 100.0, 100.0], 10240, [4096, 16384, 16384], 512, 128) == [4096, 3072, 3072]


def test_no_budget_below_the_longest_row() -> None:
    budgets = micro_budgets([1000.0, 10.0], 8192, [16384] * 2, 1000, 128)
    assert budgets == [7168, 1024]


def test_a_limit_below_the_longest_row_is_refused() -> None:
    with pytest.raises(UserError, match="Rank 1 must be able to hold the longest row"):
        micro_budgets([1.0, 1.0], 8192, [16384, 1000], 1000, 128)


def test_fewest_micro_batches_that_stay_in_proportion() -> None:
    assert step_budgets([200.0, 100.0], 49152, [16384] * 2, 512, 128) == [[16384] * 2, [8192] * 2]
    assert step_budgets([1.0] * 4, 65536, [16384] * 4, 512, 128) == [[16384]] * 4


def test_groups_hold_other_numbers_of_micro_batches() -> None:
    """Three times as fast: three micro-batches instead of one, each nearly full; ranks of one group hold the same number."""
    assert step_budgets([300.0, 100.0], 16384, [4096] * 2, 512, 128, groups=[0, 1]) == [[4096] * 3, [4096]]
    assert step_budgets([300.0, 100.0], 16384, [4096] * 2, 512, 128) == [[4096] * 3, [1408] * 3]
    budgets = step_budgets([300.0, 300.0, 100.0, 100.0], 32768, [4096] * 4, 512, 128, groups=[0, 0, 1, 1])
    assert budgets == [[4096] * 3] * 2 + [[4096]] * 2
    mixed = step_budgets([300.0, 150.0, 100.0, 100.0], 26624, [4096] * 4, 512, 128, groups=[0, 0, 1, 1])
    assert [len(b) for b in mixed] == [3, 3, 1, 1] and abs(sum(map(sum, mixed)) - 26624) <= 3 * 128


@pytest.mark.parametrize(("micro", "longest"), [(16384, 512), (1000, 1000), (256, 256), (96, 90), (300, 299)])
def test_quantum_leaves_room_for_the_longest_row(micro: int, longest: int) -> None:
    config = make_config(train={"micro_batch_tokens": micro, "tokens_per_step": 4 * micro}, data={"max_tokens": longest})
    for on_gpu in (False, True):
        step = quantum(config, on_gpu)
        assert -(-longest // step) * step <= micro // step * step
    assert quantum(config, True) == 256 or micro < 16384


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(10, 1e5), min_size=1, max_size=12), st.integers(1, 400), st.sampled_from([1, 16, 128]), st.data())
def test_bounds_and_total(speeds: list[float], passes: int, multiple: int, data: st.DataObject) -> None:
    least = data.draw(st.integers(1, 600))
    floor = -(-least // multiple) * multiple
    limits = [data.draw(st.integers(floor, 40 * floor)) for _ in speeds]
    total = passes * 100
    budgets = micro_budgets(speeds, total, limits, least, multiple)
    for budget, limit in zip(budgets, limits, strict=True):
        assert floor <= budget <= limit and budget % multiple == 0
    tops = sum(limit // multiple * multiple for limit in limits)
    if floor * len(speeds) <= total <= tops:
        assert total - multiple * len(speeds) < sum(budgets) <= total + multiple // 2
    for a, b in zip(range(len(speeds)), range(1, len(speeds)), strict=False):  # neighbours: the faster never gets less, but for its limit
        if harmonised(speeds)[a] > harmonised(speeds)[b] and limits[a] >= limits[b]:
            assert budgets[a] >= budgets[b] - multiple


def test_speeds_within_noise_are_one() -> None:
    same = harmonised([100.0, 50.0, 99.0, 49.5])
    assert same == [99.5, 49.75, 99.5, 49.75]


def deal(speeds: list[float]) -> list[list[int]]:
    return step_budgets(speeds, 6144, [4096] * len(speeds), 256, 64)


def steps(rebalance: Rebalance, speeds: list[float], count: int, left: int = 1000) -> list[list[list[int]]]:
    """Feed `count` steps of ranks of these speeds; returns the budgets that came of it."""
    found = []
    for _ in range(count):
        busy = [sum(of_rank) / speed for of_rank, speed in zip(rebalance.budgets, speeds, strict=True)]
        if (new := rebalance.observe(busy, left)) is not None:
            found.append(new)
    return found


def test_a_rank_that_changes_gets_another_budget() -> None:
    rebalance = Rebalance(deal, deal([1.0, 1.0]), Kind(noise=0.03, gain=0.03, change_s=0.0))
    assert steps(rebalance, [1000.0, 1000.0], 50) == []
    assert steps(rebalance, [500.0, 500.0], 50) == [], "all slower alike"
    assert steps(rebalance, [1000.0, 500.0], 9) == []
    assert steps(rebalance, [1000.0, 500.0], 1) == [[[4096], [2048]]]
    assert steps(rebalance, [1000.0, 500.0], 50) == [], "and is left alone then"


def test_one_slow_window_is_an_outlier() -> None:
    rebalance = Rebalance(deal, deal([1.0, 1.0]), CPU)
    for _ in range(5):
        assert steps(rebalance, [1000.0, 300.0], 5) == [] and steps(rebalance, [1000.0, 1000.0], 5) == []


def test_a_change_must_pay_for_its_compilation() -> None:
    rebalance = Rebalance(deal, deal([1.0, 1.0]), GPU)
    assert steps(rebalance, [3000.0, 2000.0], 100, left=100) == [], "0.3 s saved a step"
    assert steps(rebalance, [3000.0, 2000.0], 10, left=1000) == [[[3712], [2432]]]


def test_a_rank_that_wobbles_is_followed_less_and_less() -> None:
    rebalance = Rebalance(deal, deal([1.0, 1.0]), CPU)
    changes = [len(steps(rebalance, [1000.0, 500.0] if turn % 2 else [1000.0, 1000.0], 40)) for turn in range(20)]
    assert 2 <= sum(changes) <= 4


def test_a_rank_that_stands_still_keeps_the_least() -> None:
    """The longest row must fit; nothing is divided by nothing."""
    rebalance = Rebalance(deal, deal([1.0, 1.0]), CPU)
    found = [rebalance.observe([1e-12, 100.0], 1000) for _ in range(10)]
    assert found[-1] == [[2816] * 2, [256] * 2]


def test_probe_times_a_layer_and_budgets_follow() -> None:
    config = make_config()
    probe = SpeedProbe(model_config(config), torch.float32, torch.device("cpu"), compile_layer=True)
    speed = probe.measure(64, 24, warm=1, least_s=0.05)
    assert speed > 0
    budgets = budgets_by_speed(config, [2 * speed, speed], on_gpu=False)  # 256 tokens a step, 64 at once: 3 passes of 57 + 28
    assert len(budgets[0]) == len(budgets[1]) == 3 and abs(sum(map(sum, budgets)) - 256) <= 3
    assert budgets[0][0] == pytest.approx(2 * budgets[1][0], abs=2)
