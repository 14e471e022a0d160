"""A training run on made-up rows as a process, watched and disturbed from outside: for unequal.py and kills.py."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import psutil
import yaml
from train import REPOSITORY, end, make_dataset, start, told_steps


class Run:
    """One `python -m trainer train`."""

    def __init__(self, document: dict[str, Any], folder: Path, tokens: int, environment: dict[str, str] | None = None) -> None:
        """`document`: the configuration, with `folder` as its storage; `tokens`: of rows of one length that a model can learn."""
        root = folder / "runs" / document["run"]["name"]
        self.metrics = root / "metrics.jsonl"
        if not (root / "dataset").exists():
            make_dataset(root / "dataset", "even", tokens, "chain", vocabulary=document["run"]["model"]["architecture"]["vocab_size"])
        (folder / "run.yaml").write_text(yaml.safe_dump(document))
        own = {**os.environ, "OMP_NUM_THREADS": "1"}
        own.pop("RAY_ADDRESS", None)
        self.log = folder / "log"
        self.process = start("train", folder / "run.yaml", self.log, own | (environment or {}))

    def workers(self, count: int, deadline: float, below: int = 0) -> list[int]:
        """Ray's training workers below a process (default: the run's), once there are `count`."""
        while time.monotonic() < deadline and self.process.poll() is None:
            found = []
            for child in psutil.Process(below or self.process.pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    found += [child.pid] if "RayTrainWorker" in " ".join(child.cmdline()) else []
            if len(found) == count:
                return sorted(found)
            time.sleep(0.1)
        raise SystemExit(f"The workers did not start.\n{self.told()}")

    def lines(self) -> list[dict[str, Any]]:
        """Steps that were told of."""
        return told_steps(self.metrics)

    def told(self) -> str:
        """The end of what the run printed."""
        return self.log.read_text(errors="replace")[-3000:]

    def end(self) -> None:
        """End the run without its last checkpoint: this process's children only."""
        end(self.process)


def visible(numbers: Iterable[int]) -> str:
    """CUDA_VISIBLE_DEVICES for these of the GPUs that this process may use."""
    own = os.environ.get("CUDA_VISIBLE_DEVICES")
    return ",".join(own.split(",")[number] if own else str(number) for number in numbers)


class Nodes:
    """A Ray cluster on this machine whose nodes hold some workers each, so that they are nodes to the trainer too. A context manager."""

    def __init__(self, count: int, workers: int, gpus: bool) -> None:
        self.count, self.workers, self.gpus = count, workers, gpus

    def __enter__(self) -> Nodes:
        import ray
        from ray.cluster_utils import Cluster

        own = {"PYTHONPATH": os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")])), "OMP_NUM_THREADS": "1"}
        os.environ.update(own)  # Ray's nodes and workers take it from here
        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "num_gpus": 0, "include_dashboard": False,
                                                                     "object_store_memory": 80 << 20})
        ray.init(address=self.cluster.address, log_to_driver=False)  # of the head, which stays
        self.nodes = [self.add(number) for number in range(self.count)]
        return self

    def add(self, number: int) -> Any:
        """The node for the workers (and GPUs) of this number."""
        ids = range(number * self.workers, (number + 1) * self.workers)
        gpus = {"num_gpus": self.workers, "env_vars": {"CUDA_VISIBLE_DEVICES": visible(ids)}} if self.gpus else {}
        return self.cluster.add_node(num_cpus=self.workers, object_store_memory=80 << 20, **gpus)

    @property
    def environment(self) -> dict[str, str]:
        """Of a run that joins the cluster."""
        return {"RAY_ADDRESS": self.cluster.address}

    def __exit__(self, *_: object) -> None:
        import ray

        ray.shutdown()
        self.cluster.shutdown()
