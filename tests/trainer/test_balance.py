"""Token budgets in proportion to speed, within limits; drift."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.trainer.engine_cases import make_config
from trainer.errors import UserError
from trainer.model.load import model_config
from trainer.train.balance import Drift, SpeedProbe, budgets_by_speed, harmonised, micro_budgets, step_budgets


def test_equal_ranks_get_equal_budgets() -> None:
    assert micro_budgets([100.0, 101.0, 99.5, 100.2], 65536, [16384] * 4, 512, 128) == [16384] * 4


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


def test_drift_names_the_rank_that_changed() -> None:
    drift = Drift([200.0, 100.0, 100.0], tolerance=0.1, window=3)
    for _ in range(3):
        assert drift.observe([180.0, 91.0, 90.0]) == []  # all slower alike
    drift.observe([200.0, 60.0, 100.0])
    drift.observe([200.0, 100.0, 100.0])
    assert drift.observe([200.0, 100.0, 100.0]) == []  # one outlier
    drift.observe([200.0, 80.0, 100.0])
    drift.observe([200.0, 80.0, 100.0])
    assert drift.observe([200.0, 81.0, 100.0]) == [1]


def test_probe_times_a_layer_and_budgets_follow() -> None:
    config = make_config()
    probe = SpeedProbe(model_config(config), torch.float32, torch.device("cpu"), compile_layer=True)
    speed = probe.measure(64, 24, warm=1, repeats=2)
    assert speed > 0
    budgets = budgets_by_speed(config, [2 * speed, speed], on_gpu=False)  # 256 tokens a step, 64 at once: 3 passes of 57 + 28
    assert len(budgets[0]) == len(budgets[1]) == 3 and abs(sum(map(sum, budgets)) - 256) <= 3
    assert budgets[0][0] == pytest.approx(2 * budgets[1][0], abs=2)
