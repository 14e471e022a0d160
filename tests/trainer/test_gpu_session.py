"""The commands of benchmarks/gpu_session.py are ones that the scripts take, and fit into a call."""

from __future__ import annotations

import argparse
import importlib
import shlex
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))  # the scripts import each other by name

import gpu_session  # noqa: E402

ROWS = [(call, row) for call, rows in gpu_session.CALLS.items() for row in rows]


def options_of(script: str) -> argparse.ArgumentParser:
    module = importlib.import_module(script.removesuffix(".py"))
    if script == "train.py":
        parser: argparse.ArgumentParser = module.command_line(argparse.ArgumentParser())
    else:
        parser = module.options_of() if script == "float8.py" else module.command_line()
    return parser


@pytest.mark.parametrize(("call", "row"), ROWS, ids=[f"{call}: {row.command}" for call, row in ROWS])
def test_command_is_known(call: str, row: gpu_session.Row) -> None:
    script, *words = shlex.split(row.command)
    found = options_of(script).parse_args([*words, "--out", "x", "--timeout", "100"])
    gpus = getattr(found, "gpus", None) or getattr(found, "workers", 1)
    assert call.startswith(f"{gpus}x") or call == "4xH100-scaling"


def test_calls_end_in_time() -> None:
    assert all(sum(row.seconds for row in rows) <= 470 for rows in gpu_session.CALLS.values())
