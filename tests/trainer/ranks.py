"""Worlds of several processes for tests: three workers are forked from one server that imported torch once, and run many cases.

    pool = Ranks(); pool.run(2, "tests.trainer.engine_cases:curve", {...}) -> [result of rank 0, result of rank 1]

The function is called in each of the world's processes with `rank`, `world` and the keywords, with torch.distributed (gloo, a file
store) initialised; what it returns must be picklable.
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

WORLD = 3
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["DS_ACCELERATOR"] = "cpu"
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "torch.distributed.fsdp", "transformers.models.llama.modeling_llama", "deepspeed", "peft",
                                "accelerate", "trainer.model.loss"])


def _serve(rank: int, connection: Connection) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    while (task := connection.recv()) is not None:
        world, store, function, keywords = task
        try:
            dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
            os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world))
            module, name = function.split(":")
            result = getattr(importlib.import_module(module), name)(rank=rank, world=world, **keywords)
            connection.send(("ok", result))
        except BaseException:
            connection.send(("error", traceback.format_exc()))
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()


class Ranks:
    """Three processes, of which a run takes the first `world`. Use as a context manager."""

    def __init__(self) -> None:
        self._directory = tempfile.TemporaryDirectory()
        self._runs = 0
        self._workers: list[tuple[Any, Connection]] = []

    def _start(self) -> None:
        for rank in range(WORLD):
            ours, theirs = CONTEXT.Pipe()
            process = CONTEXT.Process(target=_serve, args=(rank, theirs), daemon=True)
            process.start()
            theirs.close()
            self._workers.append((process, ours))

    def run(self, world: int, function: str, keywords: dict[str, Any] | None = None, timeout: float = 100.0) -> list[Any]:
        """Call `function` ("module:name") in `world` processes; AssertionError with the traceback of the first rank that fails."""
        if not self._workers:
            self._start()
        self._runs += 1
        store = Path(self._directory.name) / f"store-{self._runs}"
        for _, connection in self._workers[:world]:
            connection.send((world, str(store), function, keywords or {}))
        results: dict[int, Any] = {}
        waiting = {connection: rank for rank, (_, connection) in enumerate(self._workers[:world])}
        while waiting:
            ready = wait(list(waiting), timeout)
            if not ready:
                self.close()
                raise AssertionError(f"{function}: ranks {sorted(waiting.values())} did not answer within {timeout} s")
            for connection in ready:
                rank = waiting.pop(connection)  # type: ignore[arg-type]
                kind, value = connection.recv()  # type: ignore[union-attr]
                if kind == "error":
                    self.close()  # the others may wait for the lost rank for ever; a later run starts new ones
                    raise AssertionError(f"{function}, rank {rank} of {world}:\n{value}")
                results[rank] = value
        return [results[rank] for rank in range(world)]

    def close(self) -> None:
        for process, connection in self._workers:
            connection.close()
            process.kill()
            process.join()
        self._workers = []

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
        self._directory.cleanup()
