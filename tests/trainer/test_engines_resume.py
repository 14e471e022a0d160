"""State as flat ranges: complete, and any engine on any number of ranks goes on from any other's."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.trainer import test_golden_curves as curves
from tests.trainer.engine_cases import Held
from tests.trainer.golden.regenerate import CASES
from tests.trainer.ranks import Ranks
from tests.trainer.test_golden_curves import TOLERANCE, flat, golden

pytestmark = pytest.mark.timeout(900)  # many runs in one world: the first test of a module waits for all
STEP = 3
ENGINES: dict[str, dict[str, Any]] = {**curves.ENGINES, "hybrid": {"engine": {"kind": "fsdp", "shard_group": "node"}, "node": 1}}
"""`hybrid`: shard groups of one rank, each on a node of its own, which hold the same state."""
SAVES = [("full", "fsdp3", 2), ("full", "fsdp2", 2), ("full", "zero1", 2), ("full", "zero2", 2), ("full", "zero3", 2),
         ("lora", "fsdp3", 2), ("lora", "zero1", 2), ("lora", "zero3", 2), ("full-tied", "fsdp3", 2),
         ("full", "hybrid", 2), ("full", "fsdp3", 3), ("full", "zero3", 3), ("full-tied", "zero2", 3), ("lora-new-tokens", "fsdp3", 3)]
"""(case, engine, world) of the states that are saved after STEP steps."""
SAME = [s for s in SAVES if s[2] == 2]
OTHER = [(("full", "zero3", 3), ("fsdp3", 2)), (("full", "fsdp3", 3), ("zero2", 2)), (("full", "zero1", 2), ("fsdp3", 1)),
         (("full", "zero2", 2), ("zero3", 1)), (("full", "fsdp2", 2), ("zero1", 3)), (("full-tied", "fsdp3", 2), ("zero3", 3)),
         (("full", "hybrid", 2), ("fsdp3", 3)), (("full", "zero3", 2), ("hybrid", 2)), (("full", "hybrid", 2), ("zero2", 1)),
         (("full-tied", "zero2", 3), ("fsdp3", 1)), (("lora", "zero3", 2), ("fsdp3", 3)), (("lora-new-tokens", "fsdp3", 3), ("zero2", 1))]
"""A state, and the engine and world that go on from it."""
Save = tuple[str, str, int]


def whole_tensors(held: list[Held]) -> dict[str, np.ndarray]:
    """All ranks' owned pieces put together; every element is held exactly once."""
    out: dict[str, np.ndarray] = {}
    seen: dict[str, np.ndarray] = {}
    for name, shape, start, values, owned in (piece for rank in held for piece in rank):
        assert values.ndim == 1 and values.dtype == np.float32
        out.setdefault(name, np.full(math.prod(shape), np.nan, dtype=np.float32))
        seen.setdefault(name, np.zeros(math.prod(shape), dtype=np.int8))
        if owned:
            out[name][start:start + len(values)] = values
            seen[name][start:start + len(values)] += 1
    for name, count in seen.items():
        assert (count == 1).all(), f"{name}: elements held {sorted(set(count.tolist()))} times"
    return out


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("states")


def file_of(directory: Path, save: Save) -> Path:
    return directory / f"{'-'.join(map(str, save))}.npz"


@pytest.fixture(scope="module")
def states(ranks: Ranks, toy_rows: Path, directory: Path) -> dict[Save, dict[str, np.ndarray]]:
    """The saved states as whole flat tensors, also as files."""
    out = {}
    for world in {s[2] for s in SAVES}:
        chosen = [s for s in SAVES if s[2] == world]
        calls = {str(s): ("save", {"data": str(toy_rows), "step": STEP, **CASES[s[0]], **ENGINES[s[1]]}) for s in chosen}
        held = ranks.run(world, "tests.trainer.engine_cases:many", {"calls": calls})
        for save in chosen:
            out[save] = whole_tensors([of_rank[str(save)] for of_rank in held])
            np.savez(file_of(directory, save), **out[save])
    return out


@pytest.fixture(scope="module")
def resumed(ranks: Ranks, toy_rows: Path, directory: Path, states: dict[Save, Any]) -> dict[Any, list[tuple[float, float]]]:
    """The curves from STEP on, by (state, engine and world); of rank 0."""
    wanted = [(save, (save[1], save[2])) for save in SAME] + OTHER
    out = {}
    for world in (1, 2, 3):
        calls: dict[str, Any] = {str((save, to)): ("resume", {"data": str(toy_rows), "step": STEP, "state": str(file_of(directory, save)),
                                                              **CASES[save[0]], **ENGINES[to[0]]}) for save, to in wanted if to[1] == world}
        if world == 2:
            calls |= {str(save): ("curve", {"data": str(toy_rows), **CASES[save[0]], **ENGINES[save[1]]}) for save in SAME}
        out |= ranks.run(world, "tests.trainer.engine_cases:many", {"calls": calls})[0]
    return out


@pytest.mark.parametrize("save", SAME, ids=str)
def test_same_world_goes_on_exactly(save: Save, resumed: dict[Any, list[tuple[float, float]]]) -> None:
    assert resumed[str((save, (save[1], save[2])))] == resumed[str(save)][STEP:]


@pytest.mark.parametrize(("save", "to"), OTHER, ids=str)
def test_other_engine_and_world_goes_on(save: Save, to: tuple[str, int], resumed: dict[Any, list[tuple[float, float]]]) -> None:
    assert flat(resumed[str((save, to))]) == pytest.approx(flat(golden(save[0])[STEP:]), rel=TOLERANCE)


@pytest.mark.parametrize("save", SAVES, ids=str)
def test_names_are_those_of_the_model(save: Save, states: dict[Save, dict[str, np.ndarray]]) -> None:
    """Weights and both moments of what is trained, by Hugging Face's names; frozen weights are not stored, tied ones once."""
    names = {n.split("/", 1)[1] for n in states[save]}
    assert set(states[save]) == {f"{kind}/{n}" for kind in ("weights", "exp_avg", "exp_avg_sq") for n in names}
    if save[0].startswith("full"):
        assert {"model.embed_tokens.weight", "model.norm.weight", "model.layers.0.self_attn.k_proj.weight"} <= names
        assert ("lm_head.weight" in names) == (save[0] == "full")
    else:
        assert "model.layers.1.mlp.up_proj.lora_A.weight" in names
        own = {n for n in names if not n.endswith((".lora_A.weight", ".lora_B.weight"))}
        assert own == ({"model.embed_tokens.new_rows", "lm_head.new_rows"} if save[0] == "lora-new-tokens" else set())
