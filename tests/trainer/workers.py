"""Worker groups that may be killed: processes forked from one server that has imported torch and done nothing with it.

    with Workers() as workers:
        workers.run(2, "tests.trainer.tiny:case", {...}) -> [result of each rank], or None where a rank was lost

As a worker group of Ray Train does, a group ends when one of its processes is lost: the others are then killed. Run as a module it is
the server. (tests/trainer/ranks.py serves tests that need transformers and DeepSpeed, and whose processes live on.)
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import pickle
import subprocess
import sys
import tempfile
import time
from typing import Any


class Workers:
    """A server of worker groups; a context manager."""

    def __enter__(self) -> Workers:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        self._server = subprocess.Popen([sys.executable, "-m", "tests.trainer.workers"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        env=environment)
        return self

    def __exit__(self, *_: object) -> None:
        self._server.kill()
        self._server.wait()

    def run(self, world: int, function: str, keywords: dict[str, Any], timeout: float = 100.0) -> list[Any] | None:
        """Call `function` in each rank with `rank`, `world` and the keywords. AssertionError if it raises or takes too long."""
        assert self._server.stdin is not None and self._server.stdout is not None
        pickle.dump((world, function, keywords, timeout), self._server.stdin)
        self._server.stdin.flush()
        kind, value = pickle.load(self._server.stdout)
        assert kind == "ok", value
        return value


def _rank(connection: Any, rank: int, world: int, store: str, function: str, keywords: dict[str, Any]) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    module, name = function.split(":")
    connection.send(getattr(importlib.import_module(module), name)(rank=rank, world=world, **keywords))
    connection.close()
    os._exit(0)


def _group(world: int, function: str, keywords: dict[str, Any], timeout: float) -> list[Any] | None:
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as directory:
        group, results = [], {}
        for rank in range(world):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_rank, args=(theirs, rank, world, f"{directory}/store", function, keywords), daemon=True)
            process.start()
            theirs.close()
            group.append((process, ours))
        deadline = time.monotonic() + timeout
        try:
            while time.monotonic() < deadline:
                for rank, (_, connection) in enumerate(group):
                    if rank not in results and connection.poll(0.01):
                        try:
                            results[rank] = connection.recv()
                        except EOFError:
                            return None
                if len(results) == world:
                    return [results[rank] for rank in range(world)]
            raise AssertionError("the worker group neither ended nor failed")
        finally:
            for process, connection in group:
                process.kill()
                process.join()
                connection.close()


def _serve() -> None:
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what the workers print must not come between the answers
    import tests.trainer.tiny  # noqa: F401

    while True:
        try:
            task = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            answer = ("ok", _group(*task))
        except BaseException as error:
            answer = ("error", repr(error))
        pickle.dump(answer, out)
        out.flush()


if __name__ == "__main__":
    _serve()
