"""The learning rate."""

import pytest

from trainer.config import TrainConfig
from trainer.train.schedule import learning_rate


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("total", [1, 2, 7, 100])
@pytest.mark.parametrize("warmup", [0.0, 0.03, 0.5])
def test_rises_to_the_peak_and_falls_to_the_minimum(schedule, total, warmup):
    config = TrainConfig(schedule=schedule, learning_rate=1e-3, min_learning_rate=1e-5, warmup_share=warmup)
    rates = [learning_rate(step, total, config) for step in range(1, total + 1)]
    assert all(0 < r <= 1e-3 for r in rates)
    top = rates.index(max(rates))
    assert rates[:top + 1] == sorted(rates[:top + 1]) and rates[top:] == sorted(rates[top:], reverse=True)
    if total == 100:
        assert rates[-1] == pytest.approx(1e-3 if schedule == "constant" else 1e-5)
        assert warmup == 0 or max(rates) == pytest.approx(1e-3)
        assert learning_rate(130, total, config) == rates[-1]


def test_midpoints():
    config = TrainConfig(learning_rate=2e-4, warmup_share=0.1)
    assert learning_rate(5, 100, config) == pytest.approx(1e-4)
    assert learning_rate(10, 100, config) == pytest.approx(2e-4)
    assert learning_rate(55, 100, config) == pytest.approx(1e-4)  # half-way down the cosine


def test_constant_has_no_fall_but_a_warmup():
    config = TrainConfig(schedule="constant", learning_rate=1e-4, warmup_share=0.5)
    assert [learning_rate(s, 4, config) for s in (1, 2, 3, 4)] == pytest.approx([5e-5, 1e-4, 1e-4, 1e-4])
