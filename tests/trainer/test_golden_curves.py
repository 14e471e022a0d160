"""Every engine, on any number of ranks that hold unequal amounts, trains as one process does.

Tolerance: the curves are float32; sums in another order move the loss by some 1e-6 a step at these sizes. 5e-5 relative passes that
and fails a wrong normalisation, a lost micro-batch or a wrong clipping (all move the curve by more than 1e-2).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.golden.regenerate import CASES, CURVES
from tests.trainer.ranks import Ranks

pytestmark = pytest.mark.timeout(900)  # many runs in one world: the first test of a module waits for all
TOLERANCE = 5e-5
ENGINES = {"fsdp3": {"engine": "fsdp", "stage": 3}, "fsdp2": {"engine": "fsdp", "stage": 2}, "fsdp1": {"engine": "fsdp", "stage": 1},
           "zero1": {"engine": "deepspeed", "stage": 1}, "zero2": {"engine": "deepspeed", "stage": 2},
           "zero3": {"engine": "deepspeed", "stage": 3}}
RUNS = [(case, engine) for case in ("full", "lora") for engine in ENGINES] + [
    ("full-tied", "fsdp3"), ("full-tied", "zero2"), ("full-tied", "zero3"), ("lora-new-tokens", "fsdp3"), ("lora-new-tokens", "zero3")]


def golden(name: str) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each step."""
    return json.loads(CURVES.read_text(encoding="utf-8"))[name]


def flat(curve: list[Any]) -> list[float]:
    return [value for step in curve for value in step]


@pytest.fixture(scope="module", params=[1, 2, 3])
def curves(request: pytest.FixtureRequest, ranks: Ranks, toy_rows: Path) -> list[dict[str, list[tuple[float, float]]]]:
    """All runs in one world, by rank."""
    calls = {f"{case}-{engine}": ("curve", {"data": str(toy_rows), **CASES[case], **ENGINES[engine]}) for case, engine in RUNS}
    return ranks.run(request.param, "tests.trainer.engine_cases:many", {"calls": calls})


@pytest.mark.parametrize(("case", "engine"), RUNS)
def test_curve(case: str, engine: str, curves: list[dict[str, list[tuple[float, float]]]]) -> None:
    for rank, of_rank in enumerate(curves):
        assert flat(of_rank[f"{case}-{engine}"]) == pytest.approx(flat(golden(case)), rel=TOLERANCE), f"rank {rank}"


def test_the_golden_loss_falls() -> None:
    """The rows can be learnt, else the curves would guard little."""
    for name in CASES:
        losses = [loss for loss, _ in golden(name)]
        assert losses[-1] < losses[0] - (0.01 if "lora" in name else 0.5), name
