"""What the engine tests run in each process: a tiny Llama, rows of random tokens, a few steps. See test_golden.py."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from trainer.config import Config, parse
from trainer.data.loader import PackedBatch, collate
from trainer.data.shards import TokenShards, write_shard
from trainer.engines import make_engine
from trainer.engines.base import Engine

VOCABULARY, MAX_TOKENS, STEPS, ROWS_PER_STEP = 50, 24, 6, 12
ARCHITECTURE = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
                "vocab_size": VOCABULARY, "max_position_embeddings": 64, "initializer_range": 0.05}
SHARES = {1: [12], 2: [7, 5], 3: [6, 4, 2]}
"""Rows of a step on each rank: unequal on purpose."""
CPU = torch.device("cpu")


def make_config(method: str = "full", engine: str | dict[str, Any] = "fsdp", stage: int = 3, tied: bool = False,
                **parts: dict[str, Any]) -> Config:
    """A configuration for the CPU; `engine` is its kind or fields of run.engine, `parts` are further fields of run.train and run.model."""
    run = {"name": "golden", "seed": 5, "data": {"sample": True, "max_tokens": MAX_TOKENS},
           "model": {"path": "none", "dtype": "float32", "architecture": {**ARCHITECTURE, "tie_word_embeddings": tied}},
           "method": {"kind": method, "rank": 4, "alpha": 8},
           "train": {"micro_batch_tokens": 64, "tokens_per_step": 256, "learning_rate": 1e-2, "weight_decay": 0.1, "max_grad_norm": 1.0},
           "engine": {"zero_stage": stage, "checkpointing": "none", **({"kind": engine} if isinstance(engine, str) else engine)}}
    for part, fields in parts.items():
        run[part] |= fields
    return parse({"run": run, "storage": "/nonexistent"})


def write_rows(directory: Path, rows: int = 120) -> TokenShards:
    """Rows in which each token follows from the one before it but for noise, so that the loss falls."""
    generator = np.random.default_rng(3)
    rng_rows, starts = [], []
    for _ in range(rows):
        length = int(generator.integers(5, MAX_TOKENS + 1))
        row = [int(generator.integers(VOCABULARY))]
        for _ in range(length - 1):
            row.append((row[-1] * 5 + 7) % VOCABULARY if generator.random() < 0.95 else int(generator.integers(VOCABULARY)))
        rng_rows.append(np.array(row, dtype=np.int32))
        starts.append(int(generator.integers(1, length - 1)))
    directory.mkdir(parents=True, exist_ok=True)
    write_shard(directory / "train-00000.safetensors", rng_rows, starts, 0, MAX_TOKENS)
    return TokenShards(directory, "train")


def deal(step: int, rank: int, world: int, micro: int = 2) -> list[list[int]]:
    """This rank's rows of a step, in `micro` micro-batches."""
    first = step * ROWS_PER_STEP + sum(SHARES[world][:rank])
    rows = list(range(first, first + SHARES[world][rank]))
    return [rows[i::micro] for i in range(micro)]


def batches_of(shards: TokenShards, step: int, rank: int, world: int, micro: int = 2) -> tuple[list[PackedBatch], int]:
    """Micro-batches of one budget for the rank, and the step's number of trained tokens over all ranks."""
    budget = 8 * MAX_TOKENS
    batches = [collate(shards, rows, budget) for rows in deal(step, rank, world, micro)]
    return batches, shards.loss_tokens(range(step * ROWS_PER_STEP, (step + 1) * ROWS_PER_STEP))


def train(engine: Engine, shards: TokenShards, first: int, last: int, micro: int = 2) -> list[tuple[float, float]]:
    """Steps `first` to `last`: (mean loss over all ranks, gradient norm) of each."""
    import torch.distributed as dist

    curve = []
    for step in range(first, last):
        batches, loss_tokens = batches_of(shards, step, engine.rank, engine.world, micro)
        loss = engine.forward_backward(batches, loss_tokens).detach().clone()
        norm = engine.step(engine.config.run.train.learning_rate * (1 - step / 10))  # type: ignore[attr-defined]
        if engine.world > 1:
            dist.all_reduce(loss)
        curve.append((loss.item() / loss_tokens, float(norm)))
    return curve


@contextlib.contextmanager
def engine_of(rank: int, world: int, tokens: int | None = None, node: int = 0, **config: Any) -> Iterator[Engine]:
    """`node`: ranks of a node (0: all are on one)."""
    os.environ["LOCAL_WORLD_SIZE"] = str(node or world)
    engine = make_engine(make_config(**config), CPU, rank, world, tokens)
    try:
        yield engine
    finally:
        engine.close()


def curve(rank: int, world: int, data: str, **config: Any) -> list[tuple[float, float]]:
    """The loss curve of a configuration."""
    with engine_of(rank, world, **config) as engine:
        return train(engine, TokenShards(Path(data), "train"), 0, STEPS)


Held = list[tuple[str, tuple[int, ...], int, np.ndarray, bool]]


def save(rank: int, world: int, data: str, step: int, **config: Any) -> Held:
    """The state after some steps, as this rank's pieces."""
    with engine_of(rank, world, **config) as engine:
        train(engine, TokenShards(Path(data), "train"), 0, step)
        return [(p.name, p.shape, p.start, p.tensor.detach().cpu().numpy().copy(), p.owned) for p in engine.pieces()]


def resume(rank: int, world: int, data: str, step: int, state: str, **config: Any) -> list[tuple[float, float]]:
    """Train on from a state (an .npz of whole flat tensors) to the end."""
    whole = np.load(state)

    def read(name: str, start: int, out: torch.Tensor) -> None:
        out.copy_(torch.from_numpy(whole[name][start:start + out.numel()]))

    with engine_of(rank, world, **config) as engine:
        engine.load_pieces(read, step)
        return train(engine, TokenShards(Path(data), "train"), step, STEPS)


def evaluations(rank: int, world: int, data: str, **config: Any) -> dict[str, Any]:
    """Loss sum and tokens of this rank's first batches: twice before training, once after a step; and the step itself."""
    shards = TokenShards(Path(data), "train")
    with engine_of(rank, world, **config) as engine:
        batches, _ = batches_of(shards, 0, rank, world)
        first, again = engine.evaluate(batches), engine.evaluate(batches)
        trained = train(engine, shards, 0, 1)
        return {"first": first, "again": again, "trained": trained, "after": engine.evaluate(batches)}


def uneven(rank: int, world: int, data: str, micro: list[int], **config: Any) -> list[tuple[float, float]]:
    """The loss curve with `micro[rank]` micro-batches on each rank; RuntimeError unless the engine says that it can."""
    with engine_of(rank, world, **config) as engine:
        if engine.lockstep_group != rank:
            raise RuntimeError("the engine wants equal numbers of micro-batches")
        return train(engine, TokenShards(Path(data), "train"), 0, STEPS, micro[rank])


def collectives(rank: int, world: int, data: str, micro: int, **config: Any) -> dict[str, int]:
    """How often the forward and backward passes of a step of `micro` micro-batches gather weights and reduce gradients."""
    with engine_of(rank, world, **config) as engine:
        shards = TokenShards(Path(data), "train")
        train(engine, shards, 0, 1, micro)  # what only the first step does
        with contextlib.ExitStack() as watched:
            seen = {name: watched.enter_context(mock.patch.object(torch.distributed, name, wraps=getattr(torch.distributed, name)))
                    for name in ("all_gather_into_tensor", "reduce_scatter_tensor")}
            engine.forward_backward(*batches_of(shards, 1, rank, world, micro))
            return {name: collective.call_count for name, collective in seen.items()}


def sharded_adapters(rank: int, world: int, data: str, **config: Any) -> list[tuple[float, float]]:
    """The loss curve of adapters beside frozen weights that are sharded too, as for a model that no GPU holds whole."""
    from trainer.engines.fsdp import FsdpEngine

    engine = FsdpEngine(make_config(**config), None, CPU, rank, world)
    return train(engine, TokenShards(Path(data), "train"), 0, STEPS)


def hybrid(rank: int, world: int, data: str, node: int, micro: list[int] | None = None) -> dict[str, Any]:
    """FSDP in groups of `node` ranks: the loss curve, and how many elements this rank holds and would write."""
    with engine_of(rank, world, node=node, engine={"shard_group": "node"}) as engine:
        pieces = engine.pieces()
        return {"curve": train(engine, TokenShards(Path(data), "train"), 0, STEPS, micro[rank] if micro else 2),
                "held": sum(p.tensor.numel() for p in pieces), "written": sum(p.tensor.numel() for p in pieces if p.owned)}


def not_a_number(rank: int, world: int, data: str, **config: Any) -> dict[str, Any]:
    """A step whose gradient is not a number: its norm, and whether weights changed then and in the next, good step."""
    shards = TokenShards(Path(data), "train")
    with engine_of(rank, world, **config) as engine:
        def weights() -> list[np.ndarray]:
            return [p.tensor.clone().numpy() for p in engine.pieces()]

        start = weights()
        batches, loss_tokens = batches_of(shards, 0, rank, world)
        engine.forward_backward(batches, loss_tokens)
        parameter = next(p for p in engine.model.parameters() if p.requires_grad)
        gradient = parameter.grad if parameter.grad is not None else engine._parts[0]  # type: ignore[attr-defined]
        getattr(gradient, "_local_tensor", gradient).fill_(float("nan"))
        norm = float(engine.step(1e-2))
        after = weights()
        train(engine, shards, 0, 1)
        return {"norm": norm, "kept": all(np.array_equal(a, b) for a, b in zip(start, after, strict=True)),
                "trains": not all(np.array_equal(a, b) for a, b in zip(after, weights(), strict=True))}


def many(rank: int, world: int, calls: dict[str, tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    """Several of the functions above (name, keywords) in one world."""
    return {key: globals()[name](rank=rank, world=world, **keywords) for key, (name, keywords) in calls.items()}
