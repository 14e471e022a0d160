"""Checkpoints as a run saves and finds them, by the trainer's own code and without training. Runs in the guest (tests/nodes/test_nfs.py):

    python -m tests.nodes.checkpoint_work /mnt/nfs/run/checkpoints --count 4 --megabytes 128 --gate /tmp/go

Prints one JSON object a line: before each step, after it with what is whole then, and at the end what a restart would find. With
`--gate` it waits for the file /tmp/go-N before each step but the first, and for /tmp/go-end before the end. Another user's id is taken
after the imports: that user need not see this checkout.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from trainer.checkpoint import store
from trainer.checkpoint.reader import CheckpointReader
from trainer.checkpoint.saver import Checkpointer, restore
from trainer.config import CheckpointConfig
from trainer.engines.base import Engine, Piece
from trainer.train.ranks import Ranks

DIGEST = "d" * 64


class State(Engine):
    """One tensor, whose content is that of its step."""

    def __init__(self, megabytes: int) -> None:
        self.device, self.rank, self.world = torch.device("cpu"), 0, 1
        self.block = torch.zeros(megabytes << 18, dtype=torch.int32)

    def fill(self, step: int) -> None:
        torch.arange(step, step + len(self.block), dtype=torch.int32, out=self.block)

    def is_of(self, step: int) -> bool:
        blocks = torch.split(self.block, 1 << 20)  # a second tensor of that size would be a page fault a page, which are slow in the guest
        return all(torch.equal(block, torch.arange(at, at + len(block), dtype=torch.int32))
                   for at, block in zip(range(step, step + len(self.block), 1 << 20), blocks, strict=True))

    def pieces(self) -> list[Piece]:
        return [Piece("weights/block", tuple(self.block.shape), 0, self.block)]

    def load_pieces(self, read: Callable[[str, int, torch.Tensor], None], step: int) -> None:
        read("weights/block", 0, self.block)

    def forward_backward(self, batches: Any, loss_tokens: int) -> torch.Tensor:
        raise NotImplementedError

    def step(self, learning_rate: float) -> torch.Tensor:
        raise NotImplementedError


def say(**values: Any) -> None:
    print(json.dumps({**values, "at": time.time()}), flush=True)


def save(directory: Path, state: State, options: argparse.Namespace, gate: Callable[[object], None]) -> None:
    """Checkpoints of `count` steps, one after another."""
    checkpointer = Checkpointer(directory, CheckpointConfig(keep_last=9), DIGEST, state)
    for step in range(1, options.count + 1):
        if step > 1:
            gate(step)
        state.fill(step)
        say(begins=step)
        checkpointer.save(step, {"planner": {}, "loop": {"finished": ""}, "metrics": {}})
        checkpointer.wait()
        for outcome in checkpointer.outcomes():
            say(step=outcome.step, saved=outcome.saved, message=outcome.message, seconds=outcome.seconds,
                whole=[saved.step for saved in store.whole(directory)])


def look(directory: Path, state: State) -> None:
    """Which checkpoints pass as whole, whether each is what was saved, and which one a restart takes."""
    found, right = store.whole(directory), True
    first = torch.empty(1, dtype=torch.int32)
    for saved in found:
        reader = CheckpointReader(saved.path)
        reader.read("weights/block", 0, first)
        right &= reader.verify() is None and first.item() == saved.step
    state.fill(0)
    document = restore(directory, DIGEST, state, Ranks())
    restored = document["step"] if document else None
    right &= restored is not None and state.is_of(restored)
    say(end=[saved.step for saved in found], right=right, restored=restored, names=sorted(path.name for path in directory.iterdir()))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--uid", type=int, default=1000)
    parser.add_argument("--count", type=int, default=1)
    parser.add_argument("--megabytes", type=int, default=16)
    parser.add_argument("--gate", default="")
    options = parser.parse_args()

    def gate(name: object) -> None:
        while options.gate and not Path(f"{options.gate}-{name}").exists():
            time.sleep(0.1)

    os.setgroups([])
    os.setgid(options.uid)
    os.setuid(options.uid)
    os.umask(0o022)
    state = State(options.megabytes)
    save(options.directory, state, options, gate)
    gate("end")
    look(options.directory, state)


if __name__ == "__main__":
    main()
