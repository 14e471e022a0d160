"""The commands of benchmarks/gpu_session.py are ones that the scripts take, and fit into a call."""

from __future__ import annotations

import argparse
import importlib
import shlex

import gpu_session
import pytest

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
    machine = int(call.partition("x")[0])
    mine = [int(gpu) for gpu in row.gpus.split(",")] if row.gpus else list(range(machine))
    assert (getattr(found, "gpus", None) or getattr(found, "workers", 1)) == len(mine)
    assert max(mine) < machine


@pytest.mark.parametrize("call", gpu_session.CALLS)
def test_rows_that_run_together_share_no_gpu(call: str) -> None:
    for part in gpu_session.groups(gpu_session.CALLS[call]):
        used = [gpu for lane in part for gpu in lane[0].gpus.split(",")]
        assert len(used) == len(set(used))
        assert all(row.gpus == lane[0].gpus for lane in part for row in lane)
    assert [row for part in gpu_session.groups(gpu_session.CALLS[call]) for lane in part for row in lane if not row.gpus] == [
        row for row in gpu_session.CALLS[call] if not row.gpus]


def test_rows_without_gpus_of_their_own_run_alone() -> None:
    rows = [gpu_session.Row("a", 1, "", gpus) for gpus in ("0", "1", "0", "", "2,3")]
    assert gpu_session.groups(rows) == [[[rows[0], rows[2]], [rows[1]]], [[rows[3]]], [[rows[4]]]]
