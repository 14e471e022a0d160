"""Confidence intervals. Run: python -m pytest tests/trainer/test_bootstrap.py"""

from __future__ import annotations

import numpy as np
import pytest

from trainer.evaluate.bootstrap import Metric, compare, exp_mean, macro_f1, mean, one_hot


def features(values: np.ndarray) -> np.ndarray:
    return np.stack([values, np.ones_like(values)], -1)


def test_interval_of_a_mean_is_the_normal_one() -> None:
    rng = np.random.default_rng(1)
    base = rng.normal(0, 1, 2000)
    tuned = base + rng.normal(0.1, 0.5, 2000)  # paired: only the difference's spread matters
    result = compare([Metric("x", features(base), features(tuned))], 4000, 7)["difference"]["x"]
    d = tuned - base
    error = d.std() / len(d) ** 0.5
    assert result["mean"] == pytest.approx(d.mean())
    assert result["low"] == pytest.approx(d.mean() - 1.96 * error, abs=0.1 * error)
    assert result["high"] == pytest.approx(d.mean() + 1.96 * error, abs=0.1 * error)
    assert result["bounds"]["0.975"] == pytest.approx(result["low"])
    assert result["bounds"]["0.95"] == pytest.approx(d.mean() - 1.645 * error, abs=0.1 * error)


def test_coverage() -> None:
    """95 % intervals hold the true difference in about 95 % of repeated experiments."""
    rng = np.random.default_rng(2)
    hits = 0
    for seed in range(200):
        base = rng.exponential(1, 80)
        tuned = base + rng.normal(0.3, 1, 80)
        d = compare([Metric("x", features(base), features(tuned))], 400, seed)["difference"]["x"]
        hits += d["low"] <= 0.3 <= d["high"]
    assert 176 <= hits <= 199


def test_same_seed_same_interval_and_one_set_of_resamples() -> None:
    rng = np.random.default_rng(3)
    a, b = features(rng.random(50)), features(rng.random(50))
    one = compare([Metric("x", a, b), Metric("y", a, b)], 300, 11)
    assert one == compare([Metric("x", a, b), Metric("y", a, b)], 300, 11)
    assert one["difference"]["x"] == one["difference"]["y"]


def test_identical_models_have_no_difference() -> None:
    a = features(np.arange(10.0))
    d = compare([Metric("x", a, a, lower_is_better=True)], 200, 0)["difference"]["x"]
    assert (d["mean"], d["low"], d["high"]) == (0, 0, 0)
    assert set(d["bounds"].values()) == {0.0}


def test_lower_is_better_turns_the_bounds() -> None:
    rng = np.random.default_rng(4)
    base = np.stack([rng.random(200) + 2, np.ones(200)], -1)
    tuned = base - [0.5, 0]
    d = compare([Metric("loss", base, tuned, mean, True)], 500, 0)["difference"]["loss"]
    assert d["mean"] == pytest.approx(-0.5) and d["better"] == "lower"
    assert d["bounds"]["0.95"] == pytest.approx(0.5)


def test_perplexity_is_weighted_by_tokens() -> None:
    assert exp_mean(np.array([[2.0, 1.0], [6.0, 3.0]]).sum(0)) == pytest.approx(np.exp(2))
    assert np.isinf(exp_mean(np.array([1e6, 1.0])))


def test_macro_f1_by_hand() -> None:
    reference = np.array([0, 0, 0, 1, 1, 2])
    predicted = np.array([0, 0, 1, 1, 0, 0])
    # class 0: tp 2 fp 2 fn 1 -> 4/7; class 1: tp 1 fp 1 fn 1 -> 1/2; class 2: 0
    assert macro_f1(one_hot(reference * 3 + predicted, 9).sum(0)) == pytest.approx((4 / 7 + 1 / 2 + 0) / 3)
    # a class that is nowhere does not count
    assert macro_f1(one_hot(np.array([0, 4]), 9).sum(0)) == pytest.approx(1.0)


def test_unequal_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="same rows"):
        compare([Metric("x", np.ones((3, 2)), np.ones((2, 2)))], 100, 0)
