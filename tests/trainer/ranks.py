"""Worlds of several processes for tests, forked from one server that imported torch and DeepSpeed once.

    ranks = Ranks(); ranks.run(2, "tests.trainer.engine_cases:curve", {...}) -> [result of rank 0, result of rank 1]

The function is called in each of the world's processes with `rank`, `world` and the keywords, with torch.distributed (gloo, a file
store) initialised; what it returns must be picklable. Each run has new processes: DeepSpeed keeps process groups of the world in
which it was first used.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import tempfile
import traceback
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["DS_ACCELERATOR"] = "cpu"
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "torch.distributed.fsdp", "transformers.models.llama.modeling_llama", "deepspeed", "peft",
                                "accelerate", "trainer.model.loss"])


def _work(rank: int, world: int, store: str, connection: Connection, function: str, keywords: dict[str, Any]) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    try:
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world))
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
        module, name = function.split(":")
        connection.send((True, getattr(importlib.import_module(module), name)(rank=rank, world=world, **keywords)))
    except BaseException:
        connection.send((False, traceback.format_exc()))


class Ranks:
    """Runs functions in worlds of processes. Use as a context manager, or call `close`."""

    def __init__(self) -> None:
        self._directory = tempfile.TemporaryDirectory()
        self._runs = 0

    def run(self, world: int, function: str, keywords: dict[str, Any] | None = None, timeout: float = 600.0) -> list[Any]:
        """Call `function` ("module:name") in `world` processes; AssertionError with the traceback of the first rank that fails."""
        self._runs += 1
        store = str(Path(self._directory.name) / f"store-{self._runs}")
        results: dict[int, Any] = {}
        processes, waiting = [], {}
        try:
            for rank in range(world):
                ours, theirs = CONTEXT.Pipe(duplex=False)
                process = CONTEXT.Process(target=_work, args=(rank, world, store, theirs, function, keywords or {}), daemon=True)
                process.start()
                theirs.close()
                processes.append(process)
                waiting[ours] = rank
            while waiting:
                ready = wait(list(waiting), timeout)
                assert ready, f"{function}: ranks {sorted(waiting.values())} of {world} did not answer within {timeout} s"
                for connection in ready:
                    rank = waiting.pop(connection)  # type: ignore[arg-type]
                    done, value = connection.recv()  # type: ignore[union-attr]
                    assert done, f"{function}, rank {rank} of {world}:\n{value}"
                    results[rank] = value
            return [results[rank] for rank in range(world)]
        finally:
            for process in processes:
                process.kill()
                process.join()

    def close(self) -> None:
        self._directory.cleanup()

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
