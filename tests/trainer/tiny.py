"""A very small model under plain Adam as an engine, and whole training runs of it, for tests of loop and checkpoints.

Every rank holds the whole state and owns a slice of it, as a sharding engine's ranks do. Dropout makes the result depend on the
random numbers, so that a resumed run is equal only if they are restored too.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from trainer.checkpoint.saver import Checkpointer, restore
from trainer.config import Config, parse
from trainer.data.loader import PackedBatch, evaluation_batches
from trainer.data.shards import TokenShards, write_shard
from trainer.engines.base import Engine, Piece
from trainer.train import metrics as metrics_module
from trainer.train.loop import Training
from trainer.train.metrics import Recorder
from trainer.train.ranks import Ranks

VOCABULARY, WIDTH, MAX_TOKENS = 64, 12, 16


class TinyEngine(Engine):
    """An embedding, dropout and a head that predict the next token from the current one."""

    def __init__(self, seed: int, rank: int, world: int) -> None:
        torch.manual_seed(seed)
        self.rank, self.world, self.device = rank, world, torch.device("cpu")
        self.model = torch.nn.Sequential(torch.nn.Embedding(VOCABULARY, WIDTH), torch.nn.Dropout(0.2), torch.nn.Linear(WIDTH, VOCABULARY))
        self.moments = {kind: {n: torch.zeros_like(p) for n, p in self.model.named_parameters()} for kind in ("exp_avg", "exp_avg_sq")}
        self.updates = 0

    @property
    def timed_parts(self) -> list[torch.nn.Module]:
        return []  # what it does takes no time that could be told

    def _loss(self, batch: PackedBatch) -> torch.Tensor:
        logits = self.model(batch.input_ids[batch.loss_index])
        return torch.nn.functional.cross_entropy(logits, batch.targets, reduction="sum")

    def forward_backward(self, batches: Sequence[PackedBatch], loss_tokens: int) -> torch.Tensor:
        self.model.train()
        total = torch.zeros(())
        for batch in batches:
            loss = self._loss(batch)
            (loss / loss_tokens).backward()
            total += loss.detach()
        return total

    def step(self, learning_rate: float) -> torch.Tensor:
        if self.world > 1:
            for p in self.model.parameters():
                dist.all_reduce(p.grad)
        self.updates += 1
        norm = torch.sqrt(sum((p.grad ** 2).sum() for p in self.model.parameters()))
        with torch.no_grad():  # Adam by hand: torch.optim imports its compiler, seconds in each process
            for name, p in self.model.named_parameters():
                gradient = p.grad / torch.clamp(norm, min=1.0)
                first = self.moments["exp_avg"][name].lerp_(gradient, 0.1)
                second = self.moments["exp_avg_sq"][name].lerp_(gradient ** 2, 0.01)
                p -= learning_rate * first / (1 - 0.9 ** self.updates) / (torch.sqrt(second / (1 - 0.99 ** self.updates)) + 1e-8)
                p.grad = None
        return norm

    @torch.no_grad()
    def evaluate(self, batches: Iterable[PackedBatch]) -> tuple[float, int]:
        self.model.eval()
        total, count = 0.0, 0
        for batch in batches:
            total, count = total + float(self._loss(batch)), count + batch.loss_tokens
        return total, count

    def _state(self) -> list[tuple[str, torch.Tensor]]:
        named = list(self.model.named_parameters())
        return [(f"weights/{n}", p.data) for n, p in named] + [
            (f"{kind}/{n}", moment) for kind, of in self.moments.items() for n, moment in of.items()]

    def pieces(self) -> list[Piece]:
        out = []
        for name, tensor in self._state():
            begin, end = (tensor.numel() * r // self.world for r in (self.rank, self.rank + 1))
            out.append(Piece(name, tuple(tensor.shape), begin, tensor.view(-1)[begin:end]))
        return out

    def load_pieces(self, read: Callable[[str, int, torch.Tensor], None], step: int) -> None:
        for name, tensor in self._state():
            read(name, 0, tensor.view(-1))
        self.updates = step


def config(storage: Path, train: dict[str, Any] | None = None, checkpoint: dict[str, Any] | None = None, **run: Any) -> Config:
    """A configuration for the tiny engine."""
    return parse({"storage": str(storage), "run": {
        "name": "tiny", "model": {"path": "none"}, "data": {"sample": True, "max_tokens": MAX_TOKENS},
        "train": {"micro_batch_tokens": 64, "tokens_per_step": 128, "learning_rate": 0.02, "epochs": 2, **(train or {})},
        "checkpoint": {"every_steps": 3, **(checkpoint or {})}, **run}})


def write_rows(directory: Path, train: int = 120, test: int = 24) -> None:
    """Rows in which most tokens follow from the one before."""
    generator = np.random.default_rng(3)
    directory.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", train), ("test", test)):
        rows = []
        for _ in range(count):
            row = [int(generator.integers(VOCABULARY))]
            for _ in range(int(generator.integers(4, MAX_TOKENS))):
                row.append((row[-1] * 5 + 7) % VOCABULARY if generator.random() < 0.9 else int(generator.integers(VOCABULARY)))
            rows.append(np.array(row, dtype=np.int32))
        write_shard(directory / f"{split}-00000.safetensors", rows, [1] * count, 0, MAX_TOKENS)


def run(settings: Config, *, rank: int = 0, world: int = 1, die_at: int = 0, terminate_at: int = 0,
        at_step: Callable[[int], None] | None = None, engine: TinyEngine | None = None,
        stop: threading.Event | None = None, short_saves: bool = False) -> dict[str, Any]:
    """Train to the end from the newest checkpoint, if there is one. `die_at`: SIGKILL to itself before that step's update.
    `short_saves`: no save lasts longer than a step (steps take a millisecond here, and a save what the machine lets it take)."""
    from trainer.paths import RunPaths
    from trainer.stages import config_sha256

    torch.set_num_threads(1)
    paths = RunPaths.of(settings)
    shards, held_out = TokenShards(paths.dataset, "train"), TokenShards(paths.dataset, "test")
    ranks = Ranks(timeout_s=60)
    engine = engine or TinyEngine(settings.run.seed, rank, world)
    checkpointer = Checkpointer(paths.checkpoints, settings.run.checkpoint, config_sha256(settings), engine)
    saved = restore(paths.checkpoints, config_sha256(settings), engine, ranks)
    stop = stop or threading.Event()
    update = engine.step

    def step(learning_rate: float) -> torch.Tensor:
        engine.steps = getattr(engine, "steps", saved["step"] if saved else 0) + 1  # type: ignore[attr-defined]
        if engine.steps == die_at:  # type: ignore[attr-defined]
            os.kill(os.getpid(), signal.SIGKILL)
        if engine.steps == terminate_at:  # type: ignore[attr-defined]
            stop.set()
        if at_step is not None:
            at_step(engine.steps)  # type: ignore[attr-defined]
        if short_saves:
            checkpointer.wait()
        return update(learning_rate)

    engine.step = step  # type: ignore[method-assign]
    recorder = Recorder(paths, settings.run_id, saved["step"] if saved else 0, gauges=False, board=False) if rank == 0 else None
    batches = evaluation_batches(held_out, range(len(held_out)), [64] * world, rank)
    training = Training(settings, engine, ranks, checkpointer, shards, batches, [[64] * (2 // world)] * world, recorder=recorder, stop=stop)
    try:
        training.resume(saved)
        state = training.run()
    finally:
        checkpointer.wait()  # as trainer/stages.py does, whatever ended the run
        if recorder is not None:
            recorder.close()
    weights = {n: p.detach().clone() for n, p in engine.model.named_parameters()}
    curve = {r["step"]: r["loss"] for r in metrics_module.read(paths.metrics)} if rank == 0 else {}
    return {"state": vars(state), "step": training.step, "resumed": saved["step"] if saved else 0, "curve": curve,
            "weights": {n: w.numpy() for n, w in weights.items()}}
