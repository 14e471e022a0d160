"""Which shard groups a run gets by itself, on nodes and GPUs on paper."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from trainer import config as configuration
from trainer.engines import choose, fsdp

GIB = 2**30
LAYERS = 16
"""Of Llama 2 7B's, 3.5 B parameters in all: 56 GB of state."""


def chosen(monkeypatch: pytest.MonkeyPatch, sizes: list[int], gib: float, others_fit: bool = True, **run: Any) -> str:
    """What `auto` becomes with these nodes and this GPU memory. `others_fit`: what the other ranks say."""
    monkeypatch.setattr(fsdp, "node_sizes", lambda world: sizes)
    monkeypatch.setattr(choose, "_memory", lambda device: int(gib * GIB))
    monkeypatch.setattr(choose, "_on_all", lambda fits, device: fits and others_fit)
    shape = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": LAYERS, "num_attention_heads": 32,
             "num_key_value_heads": 32, "vocab_size": 32000}
    document = {"run": {"name": "x", "model": {"path": "none", "architecture": shape}, "data": {"sample": True}, **run},
                "resources": {"workers": sum(sizes), "gpus_per_worker": 1}, "storage": "/storage"}
    made = configuration.parse(document)
    got = choose._with_shard_group(made, torch.device("cpu"), sum(sizes), 32000, 0)
    return got.run.engine.shard_group


@pytest.mark.parametrize(("sizes", "gib", "group"), [
    ([4, 4], 80, "node"), ([8], 80, "world"), ([4, 2], 80, "world"), ([1, 1], 140, "world"), ([2, 2], 24, "world"), ([4, 4], 0, "world")])
def test_full(monkeypatch: pytest.MonkeyPatch, sizes: list[int], gib: float, group: str) -> None:
    assert chosen(monkeypatch, sizes, gib) == group


def test_one_rank_without_room_decides_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen(monkeypatch, [4, 4], 80, others_fit=False) == "world"


def test_what_is_configured_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen(monkeypatch, [4, 4], 80, engine={"shard_group": "world"}) == "world"
    assert chosen(monkeypatch, [1, 1], 80, engine={"shard_group": "node"}) == "node"


def test_frozen_weights_stay_inside_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """7 GB of weights: a node of two 5 GiB GPUs holds them, a node of two 4 GiB GPUs does not."""
    assert chosen(monkeypatch, [2, 2], 5, method={"kind": "lora"}) == "node"
    assert chosen(monkeypatch, [2, 2], 4, method={"kind": "lora"}) == "world"
