"""Flat against hybrid sharding where the network between nodes is slow: nodes made of network namespaces, behind limited links (root).

    python benchmarks/slow_network.py --out benchmarks/results/network.jsonl
    python benchmarks/slow_network.py --nodes 4 --node-workers 1 --gbps 25

Each node is a namespace with one network card; a switch joins them; both ends of each cable are held to a bandwidth by the kernel (tbf).
Workers of a node talk over its loopback. They run the trainer's own training stage (trainer/stages.py: engine, loop, packing, sampler) on
the CPU with gloo.

What `--gbps` means: a small model on a CPU computes far more slowly than a GPU, so the links are slowed by the same factor. A flat
micro-batch here waits for its bytes as many times as long as it computes as it does for Llama 2 7B with 16,384 tokens on an H100 at that
many Gbit/s between nodes, by trainer/plan. The computing time is that of a micro-batch without a limit, measured first.

Prints one JSON object a bandwidth: tokens/s of each way of sharding, and the bytes that each node's card sent in a step beside those that
trainer/plan predicts.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml
from record import clean_up_when_terminated, record
from train import CONTEXT, REPOSITORY, make_dataset, versions

from trainer.config import parse
from trainer.files import write_atomic
from trainer.paths import RunPaths
from trainer.plan import plan
from trainer.plan.speed import WIRE_EFFICIENCY
from trainer.report.metrics import samples, transferred
from trainer.train import samplers

VOCABULARY = 512
"""Small, so that the layers are nearly all of the model, as in a large one."""
ARCHITECTURE = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 6, "num_key_value_heads": 6,
                "vocab_size": VOCABULARY, "max_position_embeddings": CONTEXT, "tie_word_embeddings": False}
KINDS: dict[str, dict[str, Any]] = {
    "hybrid": {"kind": "fsdp", "shard_group": "node"},
    "flat": {"kind": "fsdp", "shard_group": "world"},
    "ZeRO-3": {"kind": "deepspeed"},
}
"""Ways of sharding, as fields of run.engine."""
ROW = 128
"""Tokens of every row (`even` of train.py)."""
WARM = 1
"""First steps that do not count."""
NETWORK = "192.168.199"


class Cluster:
    """Namespaces joined by a switch. Use as a context manager."""

    def __init__(self, nodes: int) -> None:
        self.names = [f"slow{os.getpid()}-{node}" for node in range(nodes)]
        self.switch = f"slow{os.getpid()}-switch"
        self.cables = [(name, "eth0") for name in self.names] + [(self.switch, f"port{node}") for node in range(nodes)]

    def __enter__(self) -> Cluster:
        for name in (*self.names, self.switch):
            run("ip", "netns", "add", name)
        run("ip", "-n", self.switch, "link", "add", "bridge", "type", "bridge")
        run("ip", "-n", self.switch, "link", "set", "bridge", "up")
        for node, name in enumerate(self.names):
            run("ip", "link", "add", "eth0", "netns", name, "type", "veth", "peer", "name", f"port{node}", "netns", self.switch)
            run("ip", "-n", self.switch, "link", "set", f"port{node}", "master", "bridge", "up")
            run("ip", "-n", name, "addr", "add", f"{NETWORK}.{node + 1}/24", "dev", "eth0")
            for device in ("eth0", "lo"):
                run("ip", "-n", name, "link", "set", device, "up")
        return self

    def __exit__(self, *_: object) -> None:
        for name in (*self.names, self.switch):
            subprocess.run(["ip", "netns", "del", name], check=False)

    def limit(self, bytes_per_second: float) -> None:
        """Hold every cable to this bandwidth, each way (0: no limit)."""
        for name, device in self.cables:
            subprocess.run(["tc", "-n", name, "qdisc", "del", "dev", device, "root"], check=False, capture_output=True)
            if bytes_per_second:
                burst = max(1 << 16, round(bytes_per_second / 100))  # of 10 ms; at least one large segment
                run("tc", "-n", name, "qdisc", "add", "dev", device, "root", "tbf", "rate", f"{round(8 * bytes_per_second)}bit",
                    "burst", str(burst), "latency", "100ms")


def run(*command: str) -> None:
    subprocess.run(command, check=True)


def configuration(options: argparse.Namespace, storage: Path, kind: str, micro_batches: int) -> dict[str, Any]:
    """The trainer's configuration file."""
    workers = options.nodes * options.node_workers
    return {"storage": str(storage), "id": "slow",
            "run": {"name": "slow", "model": {"path": "none", "dtype": "float32", "architecture": ARCHITECTURE},
                    "data": {"path": "made.jsonl", "max_tokens": ROW},
                    "train": {"epochs": 1000, "max_steps": options.steps, "tokens_per_step": options.micro * micro_batches * workers,
                              "micro_batch_tokens": options.micro, "eval_every": 10**6, "eval_rows": 8},
                    "engine": KINDS[kind], "checkpoint": {"every_minutes": 10**6, "keep_best": 0}},
            "resources": {"workers": workers, "cpus_per_worker": 1, "balance": "equal", "node_workers": options.node_workers}}


class Workers:
    """The processes of all nodes, started once: they do one run after another. Use as a context manager."""

    def __init__(self, options: argparse.Namespace, cluster: Cluster, folder: Path) -> None:
        self.options, self.cluster, self.folder, self.runs = options, cluster, folder, 0
        self.log = folder / "log"

    def __enter__(self) -> Workers:
        options, world = self.options, self.options.nodes * self.options.node_workers
        self.processes = []
        with open(self.log, "ab") as file:
            for rank in range(world):
                node, local = divmod(rank, options.node_workers)
                environment = {**os.environ, "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'benchmarks'}", "OMP_NUM_THREADS": "1",
                               "DS_ACCELERATOR": "cpu", "RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(local),
                               "LOCAL_WORLD_SIZE": str(options.node_workers), "NODE_NAME": f"node-{node}", "GLOO_SOCKET_IFNAME": "eth0",
                               "MASTER_ADDR": f"{NETWORK}.1", "MASTER_PORT": "29500"}
                self.processes.append(subprocess.Popen(["ip", "netns", "exec", self.cluster.names[node], sys.executable, __file__, "--work",
                                                        str(self.folder)], env=environment, stdout=file, stderr=subprocess.STDOUT))
        return self

    def train(self, kind: str, micro_batches: int) -> dict[str, float]:
        """One run; seconds of a step, tokens/s, and bytes a step that each node's card sent (medians, mean over nodes)."""
        storage, self.runs = self.folder / str(self.runs), self.runs + 1
        config = configuration(self.options, storage, kind, micro_batches)
        root = storage / "runs/slow"
        make_dataset(root / "dataset", "even", (self.options.steps + 2) * config["run"]["train"]["tokens_per_step"], vocabulary=VOCABULARY)
        write_atomic(storage / "run.yaml", yaml.safe_dump(config))
        deadline = time.monotonic() + self.options.timeout
        while not (storage / "done").exists():
            if time.monotonic() > deadline or any(process.poll() is not None for process in self.processes):
                raise SystemExit(f"{kind}: a worker failed, or no end in time.\n{self.log.read_text(errors='replace')[-3000:]}")
            time.sleep(0.1)
        lines = [json.loads(line) for line in (root / "metrics.jsonl").read_text().splitlines()][WARM:]
        seconds = statistics.median(line["tokens"] / line["tokens_per_second"] for line in lines)
        print(f"{kind}: {seconds:.2f} s a step", file=sys.stderr, flush=True)
        return {"step_seconds": round(seconds, 4), "tokens_per_second": statistics.median(line["tokens_per_second"] for line in lines),
                "sent_bytes": sent(RunPaths(root), lines[0]["time"], lines[-1]["time"]) / (len(lines) - 1)}

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


def sent(paths: RunPaths, begin: float, end: float) -> float:
    """Bytes that a node's card sent between two moments, mean over the nodes, from the run's own samples."""
    samplers.merge(paths)
    return statistics.mean(transferred(times, 1, begin, end)
                           for times in samples(paths.network, ("rx_bytes_per_s", "tx_bytes_per_s")).values())


def predicted_bytes(options: argparse.Namespace, kind: str, micro_batches: int) -> float:
    """Bytes through a node's card in one direction, a step, by trainer/plan."""
    config = parse(configuration(options, Path("/storage"), kind, micro_batches))
    return plan(config, advise=False).wire_bytes


def waits(gbps: float) -> float:
    """How many times as long as it computes a flat micro-batch of Llama 2 7B needs for its bytes: 16,384 tokens, 16 H100 on four nodes."""
    config = parse({"run": {"name": "paper", "model": {"name": "meta-llama/Llama-2-7b-hf", "revision": "0" * 40}, "data": {"sample": True},
                            "train": {"tokens_per_step": 16 * 16384, "micro_batch_tokens": 16384}},
                    "resources": {"workers": 16, "node_workers": 4, "gpus_per_worker": 1, "gpu": "H100-80GB", "network_gbps": gbps}})
    found = plan(config, advise=False)
    step = found.groups[0].step
    assert step is not None
    return found.wire_bytes / (gbps / 8 * 1e9 * WIRE_EFFICIENCY) / step.compute


def work(folder: Path) -> None:
    """One worker: the training stage of each run that appears in the folder, until it is ended."""
    import torch
    import torch.distributed as dist

    from trainer import stages

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for number in itertools.count():
        storage = folder / str(number)
        while not (storage / "run.yaml").exists():
            time.sleep(0.1)
        stages.work(stages.from_document(yaml.safe_load((storage / "run.yaml").read_text())), ["train"], torch.device("cpu"),
                    local_rank=int(os.environ["LOCAL_RANK"]))
        dist.barrier()
        if dist.get_rank() == 0:
            (storage / "done").touch()


def main() -> None:
    """Measure and print; `--out` appends to a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--node-workers", type=int, default=2)
    parser.add_argument("--gbps", type=float, nargs="+", default=[100.0], help="bandwidths between GPU servers whose ratio is made")
    parser.add_argument("--micro", type=int, default=256, help="tokens of a micro-batch")
    parser.add_argument("--micro-batches", type=int, default=4, help="micro-batches a step")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--timeout", type=float, default=600, help="seconds for one run")
    parser.add_argument("--scratch", default=None)
    parser.add_argument("--out", default="")
    parser.add_argument("--work", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(Path(options.work))
        return
    case = {k: v for k, v in vars(options).items() if k not in ("out", "scratch", "timeout", "work", "gbps")}
    clean_up_when_terminated()
    with (Cluster(options.nodes) as cluster, tempfile.TemporaryDirectory(dir=options.scratch) as folder,
          Workers(options, cluster, Path(folder)) as workers):
        free = {kind: workers.train(kind, options.micro_batches) for kind in options.kinds}
        compute = free["hybrid" if "hybrid" in free else options.kinds[0]]["step_seconds"] / options.micro_batches
        per_micro = predicted_bytes(options, "flat", 1)
        for gbps in options.gbps:
            ratio = waits(gbps)
            link = per_micro / (ratio * compute)
            cluster.limit(link)
            slow = {kind: workers.train(kind, options.micro_batches) for kind in options.kinds}
            cluster.limit(0)
            for kind, found in slow.items():
                found["predicted_bytes"] = predicted_bytes(options, kind, options.micro_batches)
                found["of_free"] = round(found["tokens_per_second"] / free[kind]["tokens_per_second"], 4)
            record({"benchmark": "slow network", "case": case, "gbps": gbps, "waits": round(ratio, 3), "link_mbit": round(link * 8e-6, 1),
                    "free": free, "slow": slow, "load": [round(x, 1) for x in os.getloadavg()], "cores": os.cpu_count(),
                    "versions": versions()}, options.out)


if __name__ == "__main__":
    main()
