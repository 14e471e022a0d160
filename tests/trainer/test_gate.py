"""The promotion gate. Run: python -m pytest tests/trainer/test_gate.py"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from trainer.errors import UserError
from trainer.evaluate.gate import check_gate, judge, load_gate

REPORT: dict[str, Any] = {
    "base": {"loss": 2.5, "token_f1": 0.20, "decision_accuracy": 0.50},
    "tuned": {"loss": 2.0, "token_f1": 0.19, "decision_accuracy": 0.60},
    "difference": {
        "loss": {"mean": -0.5, "low": -0.6, "high": -0.4, "rows": 120, "better": "lower", "bounds": {"0.95": 0.42, "0.99": 0.38}},
        "token_f1": {"mean": -0.01, "low": -0.05, "high": 0.03, "rows": 60, "better": "higher", "bounds": {"0.95": -0.045}},
        "decision_accuracy": {"mean": 0.1, "low": -0.02, "high": 0.2, "rows": 120, "better": "higher", "bounds": {"0.95": -0.01}},
    },
    "contamination": {"rows": 120, "flagged": 0, "share": 0.0, "ids": []},
    "evaluation": {"rows_sha256": "ab"},
}


def passed(gate: dict[str, Any], served: dict[str, Any] | None = None, **changes: Any) -> bool:
    verdict = judge({**copy.deepcopy(REPORT), **changes}, gate, served)
    assert verdict["passed"] == (verdict["reasons"] == []) and verdict["checks"]
    return verdict["passed"]


@pytest.mark.parametrize(("gate", "expected"), [
    ({"loss": {"better_than_base": True}}, True),
    ({"loss": {"better_than_base": True, "confidence": 0.95}}, True),
    ({"loss": {"better_than_base": True, "confidence": 0.9}}, False),  # the report has no such bound
    ({"loss": {"min_difference": 0.5}}, True),
    ({"loss": {"min_difference": 0.51}}, False),
    ({"loss": {"min_difference": 0.45, "confidence": 0.95}}, False),
    ({"loss": {"max": 2.0}}, True),
    ({"loss": {"max": 1.9}}, False),
    ({"token_f1": {"better_than_base": True}}, False),
    ({"token_f1": {"not_worse_by": 0.02}}, True),
    ({"token_f1": {"not_worse_by": 0.005}}, False),
    ({"token_f1": {"not_worse_by": 0.02, "confidence": 0.95}}, False),
    ({"token_f1": {"min": 0.19}}, True),
    ({"decision_accuracy": {"better_than_base": True}}, True),
    ({"decision_accuracy": {"better_than_base": True, "confidence": 0.95}}, False),
    ({"macro_f1": {"min": 0.0}}, False),  # not in the report
    ({"token_f1": {"not_clearly_worse": True}}, True),
    ({"macro_f1": {"not_clearly_worse": True}}, False),
    ({"macro_f1": {"not_clearly_worse": True, "min": 0.9, "optional": True}}, True),
    ({"contamination": "none"}, True),
    ({"min_rows": 120}, True),
    ({"min_rows": 121}, False),
])
def test_thresholds(gate: dict[str, Any], expected: bool) -> None:
    assert passed(gate) is expected


def test_identical_models_are_not_better() -> None:
    same = {"mean": 0.0, "low": 0.0, "high": 0.0, "rows": 9, "better": "lower", "bounds": {"0.95": 0.0}}
    for gate in ({"better_than_base": True}, {"better_than_base": True, "confidence": 0.95}):
        assert not passed({"loss": gate}, difference={"loss": same})
    assert passed({"loss": {"not_worse_by": 0}}, difference={"loss": same})


def test_clearly_worse() -> None:
    worse = {**REPORT["difference"], "token_f1": {**REPORT["difference"]["token_f1"], "low": -0.05, "high": -0.001}}
    assert not passed({"token_f1": {"not_clearly_worse": True}}, difference=worse)
    assert passed({"loss": {"not_clearly_worse": True}})
    worse["loss"] = {**REPORT["difference"]["loss"], "mean": 0.2, "low": 0.1, "high": 0.3}
    assert not passed({"loss": {"not_clearly_worse": True, "optional": True}}, difference=worse)
    worse["loss"] = {**worse["loss"], "high": None}  # present, but not finite: not what optional is for
    assert not passed({"loss": {"not_clearly_worse": True, "optional": True}}, difference=worse)


def test_contamination() -> None:
    flagged = {"rows": 120, "flagged": 3, "share": 0.025, "ids": ["1", "2", "3"]}
    assert not passed({"contamination": "none"}, contamination=flagged)
    assert not passed({"contamination": 0.02}, contamination=flagged)
    assert passed({"contamination": 0.025}, contamination=flagged)
    assert not passed({"contamination": 1.0}, contamination=None)  # a report that doesn't say does not pass


def test_served_model() -> None:
    served = copy.deepcopy(REPORT)
    served["tuned"]["loss"] = 1.95
    assert passed({"loss": {"not_worse_than_served": 0.1}}, served)
    assert not passed({"loss": {"not_worse_than_served": 0.01}}, served)
    assert passed({"loss": {"not_worse_than_served": 0.0}}, None)
    served["evaluation"]["rows_sha256"] = "cd"
    verdict = judge(REPORT, {"loss": {"not_worse_than_served": 9}}, served)
    assert not verdict["passed"] and "other held-out rows" in verdict["reasons"][0]


@pytest.mark.parametrize(("gate", "message"), [
    ({}, "at least one threshold"), ([], "at least one threshold"), (None, "at least one threshold"),
    ({"loss": {"better": True}}, "loss.better"), ({"loss": True}, "loss: True"), ({"loss": {}}, "loss: {}"),
    ({"loss": {"better_than_base": False}}, "leave the entry out"),
    ({"loss": {"optional": "yes"}}, "leave the entry out"), ({"loss": {"confidence": 0.95}}, "goes with"),
    ({"loss": {"better_than_base": True, "confidence": 95}}, "0.95"), ({"loss": {"max": "2"}}, "Give a number"),
    ({"loss": {"max": float("nan")}}, "Give a number"), ({"loss": {"not_worse_by": -1}}, "positive margin"),
    ({"contamination": "some"}, "none or a share"), ({"contamination": True}, "none or a share"), ({"min_rows": 0}, "at least 1"),
])
def test_malformed_gates_are_refused(gate: Any, message: str) -> None:
    with pytest.raises(UserError, match="is not usable") as error:
        check_gate(gate)
    assert message in str(error.value)


def test_gate_files(tmp_path: Path) -> None:
    assert load_gate()["contamination"] == "none"
    (tmp_path / "gate.yaml").write_text("loss: {max: 2")
    with pytest.raises(UserError, match=r"gate\.yaml cannot be read"):
        load_gate(tmp_path / "gate.yaml")
    with pytest.raises(UserError, match="cannot be read"):
        load_gate(tmp_path / "none.yaml")


def test_no_heavy_imports() -> None:
    code = "import sys, json, trainer.evaluate.gate; print(json.dumps([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules]))"
    assert json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout) == []
