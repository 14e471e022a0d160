"""Unequal workers through the product's own path (`python -m trainer train`): what dealing tokens by speed gains and changes.

    python benchmarks/unequal.py --share 0.5                        # two workers on two cores, one held to half of its core
    python benchmarks/unequal.py --share 0.333 --repeats 3 --out benchmarks/results/cpu.jsonl
    python benchmarks/unequal.py --gpus 2 --slowdown 1.75 --model 1b --timeout 540
    python benchmarks/unequal.py --gpus 4 --nodes 2 --slowdown 1.3 1.75 3 --model 1b                 # two and two, hybrid shard groups

On the CPU each worker has a core of its own and one thread; one is held to a share of its core by the kernel's CPU quota (10 ms periods;
without the right to set one, by stopping and continuing it at the same period). Compared are, in turns: each worker alone (both at the same
time, no communication), the two together with equal budgets, the two together with budgets by speed.

On GPUs, another process occupies one GPU (`--nodes`: those of one shard group) for part of the time, so that it is slower by about
`--slowdown`. There the sum of what each can do is taken from workers on free GPUs and workers on occupied ones, each with equal budgets
(a 7B needs two GPUs).

All rows have one length that divides every budget, so a step holds the same rows however they are dealt, and the loss curves must agree but
for the order of sums (`loss_difference`: largest relative difference of a step). Prints one JSON object a share or slowdown: tokens/s
(median of the steps after the last change of budgets, then over the repeats), `balanced_of_sum` and `equal_of_sum`. Exits with 1 if a run
told of no steps in time.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
from record import clean_up_when_terminated, record
from runs import Nodes, Run, visible
from train import CONTEXT, MODELS, VOCABULARY, versions

SMALL_VOCABULARY = 4096
"""On the CPU. With the usual one, two thirds of the tiny model would be its embedding, of a 7B 4 %: no other model exchanges so much for so
little computing."""
PERIOD_S = 0.01
"""Period in which a worker gets its share of a core."""
WARM = 3
"""First steps that never count."""


# Slowing a worker down


@contextlib.contextmanager
def held(pid: int, share: float) -> Iterator[str]:
    """Give a process (and its children from now on) a share of one core. Yields how."""
    period = round(PERIOD_S * 1e6)
    for root, files in ((Path("/sys/fs/cgroup/cpu"), {"cpu.cfs_period_us": period, "cpu.cfs_quota_us": round(period * share)}),
                        (Path("/sys/fs/cgroup"), {"cpu.max": f"{round(period * share)} {period}"})):
        place = root / f"unequal-{pid}"
        try:
            place.mkdir()
        except OSError:
            continue
        try:
            for name, value in {**files, "cgroup.procs": pid}.items():
                (place / name).write_text(str(value))
        except OSError:
            place.rmdir()
            continue
        try:
            yield "quota"
        finally:
            while psutil.pid_exists(pid):
                time.sleep(0.05)
            place.rmdir()
        return
    ended = threading.Event()

    def duty() -> None:
        with contextlib.suppress(ProcessLookupError):
            while not ended.wait(PERIOD_S * share):
                os.kill(pid, signal.SIGSTOP)
                time.sleep(PERIOD_S * (1 - share))
                os.kill(pid, signal.SIGCONT)

    thread = threading.Thread(target=duty, daemon=True)
    thread.start()
    try:
        yield "stop and continue"
    finally:
        ended.set()
        thread.join()


def pin(pid: int, core: int) -> None:
    """All threads of a process to one core."""
    for thread in Path(f"/proc/{pid}/task").iterdir():
        os.sched_setaffinity(int(thread.name), {core})


def occupy(busy: float, period_s: float = 0.02) -> None:
    """Keep the visible GPU busy for a share of the time, until the end. The GPU's time is then cut between this process and the worker."""
    import torch

    a = torch.randn(4096, 4096, dtype=torch.bfloat16, device="cuda")
    queued: deque[torch.cuda.Event] = deque()
    print("ready", flush=True)
    while True:
        began = time.perf_counter()
        while time.perf_counter() - began < busy * period_s:
            for _ in range(4):
                a @ a
            queued.append(torch.cuda.Event())
            queued[-1].record()
            if len(queued) > 2 * (busy == 1):  # whoever is always busy queues more meanwhile, or would leave a part of its share
                queued.popleft().synchronize()
        if busy < 1:
            torch.cuda.synchronize()
            time.sleep(max(0.0, period_s - (time.perf_counter() - began)))


def neighbours(slowdown: float) -> list[float]:
    """How busy other processes must be to leave a worker 1/slowdown of a GPU that is cut evenly between those that want it."""
    always = int(slowdown) - 1  # they alone leave 1/(always + 1); one more, while it works, leaves 1/(always + 2)
    rest = (always + 2) * (1 - (always + 1) / slowdown)
    return [1.0] * always + ([rest] if rest > 0.01 else [])


@contextlib.contextmanager
def occupied(gpus: list[int], slowdown: float) -> Iterator[None]:
    """Other processes on these GPUs."""
    others = []
    try:
        for gpu in gpus:
            for busy in neighbours(slowdown):
                command = [sys.executable, __file__, "--occupy", str(busy)]
                others.append(subprocess.Popen(command, env={**os.environ, "CUDA_VISIBLE_DEVICES": visible([gpu])}, stdout=subprocess.PIPE))
        for other in others:
            assert other.stdout is not None
            other.stdout.readline()
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


# Runs


def configuration(options: argparse.Namespace, storage: Path, workers: int, balance: str) -> dict[str, Any]:
    """The trainer's configuration file: one micro-batch can hold the tokens of all workers, so budgets are never cut by it."""
    gpu = bool(options.gpus)
    architecture = {**MODELS[options.model], "vocab_size": VOCABULARY if gpu else SMALL_VOCABULARY, "max_position_embeddings": 4096,
                    "tie_word_embeddings": not gpu}
    return {
        "storage": str(storage),
        "run": {"name": "unequal", "model": {"path": "none", "dtype": "bfloat16" if gpu else "float32", "architecture": architecture},
                "data": {"path": "made.jsonl", "max_tokens": CONTEXT},
                "train": {"epochs": 1, "tokens_per_step": options.tokens * options.accumulate, "micro_batch_tokens": options.tokens,
                          "schedule": "constant", "learning_rate": 1e-5 if gpu else 1e-3, "eval_every": 10**6, "eval_rows": 8},
                "engine": {"kind": "fsdp", "reduce_dtype": "bfloat16" if gpu else "float32", "zero_stage": 1,
                           "shard_group": "node" if options.nodes > 1 else "world"},
                "checkpoint": {"every_minutes": 10**6}},
        "resources": {"workers": workers, "gpus_per_worker": 1 if gpu else 0, "cpus_per_worker": 1, "max_failures": 0, "balance": balance}}


class Measured(Run):
    """One run, watched until it has told of enough steps."""

    def __init__(self, options: argparse.Namespace, folder: Path, workers: int, balance: str = "equal", steps: int = 0,
                 environment: dict[str, str] | None = None) -> None:
        self.steps = steps or options.steps
        tokens = (options.steps + 20) * options.tokens * options.accumulate
        super().__init__(configuration(options, folder, workers, balance), folder, tokens, environment)

    def done(self) -> bool:
        return self.process.poll() is not None or len(self.lines()) >= self.steps

    def result(self) -> dict[str, Any]:
        """Speed, budgets and losses."""
        lines = self.lines()
        told = [(line["step"], line["workers"]) for line in lines if "workers" in line]
        budgets = [[rank["micro_batches"] * rank["micro_batch_tokens"] for rank in each["ranks"]] for _, each in told]
        changed = max((step for (step, _), now, then in zip(told, budgets, budgets[1:], strict=False) if now != then), default=0)
        steady = [line for line in lines if line["step"] > max(WARM, changed + 2)]
        if not steady:
            raise SystemExit(f"No steps were told of.\n{self.told()}")
        last = told[-1][1]
        return {"tokens_per_second": statistics.median(line["tokens"] / sum_of(line) for line in steady), "steps": len(steady),
                "budgets": budgets[-1], "waiting": [round(rank["wait"] / last["seconds"], 3) for rank in last["ranks"]],
                "losses": [line["loss"] for line in lines]}


def sum_of(line: dict[str, Any]) -> float:
    """Seconds of a step."""
    return float(line["tokens"] / line["tokens_per_second"])


def wait_for(runs: list[Measured], deadline: float) -> None:
    """Until all have told of enough steps, or the time is up."""
    while not all(run.done() for run in runs) and time.monotonic() < deadline:
        time.sleep(0.2)


@contextlib.contextmanager
def started(options: argparse.Namespace, *arguments: Any, **keywords: Any) -> Iterator[Measured]:
    """A run in a folder of its own."""
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        run = Measured(options, Path(folder), *arguments, **keywords)
        try:
            yield run
        finally:
            run.end()


def alone(options: argparse.Namespace, share: float, deadline: float) -> list[dict[str, Any]]:
    """Each worker by itself, both at the same time: the second does as many steps as it comes to meanwhile."""
    slow_steps = max(WARM + 3, round(options.steps * share))
    with started(options, 1) as fast, started(options, 1, steps=slow_steps) as slow, contextlib.ExitStack() as stack:
        pin(fast.process.pid, 0)
        pin(slow.process.pid, 1)
        hold = stack.enter_context(held(slow.process.pid, share))
        stack.callback(slow.end)
        wait_for([fast, slow], deadline)
        return [fast.result(), slow.result() | {"held_by": hold}]


def together(options: argparse.Namespace, balance: str, share: float, deadline: float) -> dict[str, Any]:
    """Two workers, the second held to a share of its core."""
    with started(options, 2, balance) as run, contextlib.ExitStack() as stack:
        first, second = run.workers(2, deadline)
        pin(first, 0)
        pin(second, 1)
        stack.enter_context(held(second, share))
        stack.callback(run.end)
        wait_for([run], deadline)
        return run.result()


def pair(options: argparse.Namespace, balance: str, slow: list[int], slowdown: float, deadline: float) -> dict[str, Any]:
    """Workers on GPUs, of which those in `slow` are occupied; with several nodes as shard groups of one node each."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(occupied(slow, slowdown))
        nodes = stack.enter_context(Nodes(options.nodes, options.gpus // options.nodes, gpus=True)) if options.nodes > 1 else None
        run = stack.enter_context(started(options, options.gpus, balance, environment=nodes.environment if nodes else None))
        wait_for([run], deadline)
        return run.result()


# Results


def difference(a: dict[str, Any], b: dict[str, Any]) -> float:
    """Largest relative difference of two loss curves over the steps that both have."""
    return max(abs(x - y) / abs(y) for x, y in zip(a["losses"], b["losses"], strict=False))


def median(results: list[dict[str, Any]]) -> float:
    return statistics.median(r["tokens_per_second"] for r in results)


def told(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without the curves."""
    return [{k: round(v, 1) if isinstance(v, float) else v for k, v in r.items() if k != "losses"} for r in results]


def on_cpu(options: argparse.Namespace, share: float) -> dict[str, Any]:
    """All kinds of runs in turns, as often as asked and as the time allows."""
    deadline = time.monotonic() + options.timeout / len(options.share)
    kinds: dict[str, list[dict[str, Any]]] = {"fast": [], "slow": [], "balanced": [], "equal": []}
    loads = []
    for _ in range(options.repeats):
        loads.append([round(load, 2) for load in os.getloadavg()])
        for kind, result in zip(("fast", "slow"), alone(options, share, deadline), strict=True):
            kinds[kind].append(result)
        kinds["balanced"].append(together(options, "speed", share, deadline))
        try:  # the ratio does not need it
            kinds["equal"].append(together(options, "equal", share, deadline))
        except SystemExit as error:
            print(f"equal: {error}", file=sys.stderr, flush=True)
            break
    kinds = {name: found for name, found in kinds.items() if found}
    # Of each turn, then the median of the turns: what changes on the machine between turns is in both sides of a ratio.
    ratios = {name: [r["tokens_per_second"] / (f["tokens_per_second"] + s["tokens_per_second"])
                     for r, f, s in zip(kinds[name], kinds["fast"], kinds["slow"], strict=False)] for name in ("balanced", "equal")
              if name in kinds}
    return {"share": share, "tokens_per_second": {name: round(median(found), 1) for name, found in kinds.items()},
            **{f"{name}_of_sum": round(statistics.median(found), 4) for name, found in ratios.items()},
            "of_sum_by_turn": {name: [round(r, 4) for r in found] for name, found in ratios.items()},
            "loss_difference": {f"balanced_to_{name}": max(map(difference, kinds["balanced"], kinds[kind]))
                                for name, kind in (("equal", "equal"), ("one_worker", "fast")) if kind in kinds},
            "runs": {name: told(found) for name, found in kinds.items()}, "load_before": loads, "cores": os.cpu_count()}


def on_gpus(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """For each slowdown: workers on unequal GPUs with budgets by speed and with equal budgets, and on occupied GPUs; once: on free ones."""
    deadline = time.monotonic() + options.timeout
    slow = list(range(options.gpus))[-(options.gpus // options.nodes if options.nodes > 1 else 1):]
    everyone = list(range(options.gpus))
    runs: dict[tuple[str, float], dict[str, Any]] = {}

    def measure(name: str, balance: str, busy: list[int], slowdown: float) -> None:
        try:
            runs[name, slowdown] = pair(options, balance, busy, slowdown, deadline)
        except SystemExit as error:
            runs[name, slowdown] = {"error": str(error)}
        print(f"{name}, {slowdown:g}: {runs[name, slowdown].get('tokens_per_second', 'no steps')}", file=sys.stderr, flush=True)

    measure("free", "equal", [], 1)
    for slowdown in options.slowdown:
        measure("balanced", "speed", slow, slowdown)
        measure("occupied", "equal", everyone, slowdown)
        if options.equal:
            measure("equal", "equal", slow, slowdown)
        yield compared({"free": runs["free", 1], **{name: run for (name, of), run in runs.items() if of == slowdown}}, slowdown,
                       len(slow) / options.gpus)


def compared(runs: dict[str, dict[str, Any]], slowdown: float, share: float) -> dict[str, Any]:
    """What `runs` (free, balanced, occupied, equal) show when a `share` of the GPUs is slowed."""
    result: dict[str, Any] = {"slowdown": slowdown, "runs": {k: {i: j for i, j in v.items() if i != "losses"} for k, v in runs.items()}}
    rate = {name: found["tokens_per_second"] for name, found in runs.items() if "error" not in found}
    if {"free", "balanced", "occupied"} <= rate.keys():
        measured = rate["free"] / rate["occupied"]
        if measured < 1 + (slowdown - 1) / 3:  # a GPU's time is not cut evenly
            return result | {"error": f"Occupied GPUs were {measured:.2f} times as slow, not {slowdown:g}: the steps wait for the host. "
                                      "Give --tokens more."}
        whole = rate["occupied"] * share + rate["free"] * (1 - share)
        result |= {"slowdown_measured": round(measured, 3), "balanced_of_sum": round(rate["balanced"] / whole, 4),
                   "loss_difference": {"balanced_to_free": difference(runs["balanced"], runs["free"])}}
        if "equal" in rate:
            result |= {"equal_of_sum": round(rate["equal"] / whole, 4), "gain": round(rate["balanced"] / rate["equal"], 4)}
            result["loss_difference"] |= {"balanced_to_equal": difference(runs["balanced"], runs["equal"]),
                                          "equal_to_equal": difference(runs["equal"], runs["free"])}
    return result


def command_line() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=float, nargs="*", default=[0.5, 1 / 3], help="shares of a core that the slow worker gets")
    parser.add_argument("--gpus", type=int, default=0, help="workers on GPUs instead, the last one slowed")
    parser.add_argument("--nodes", type=int, default=1, help="shard groups that the GPUs are cut into, all of the last slowed")
    parser.add_argument("--slowdown", type=float, nargs="*", default=[1.75])
    parser.add_argument("--model", choices=MODELS, default="", help="default: tiny on the CPU, 1b on GPUs")
    parser.add_argument("--tokens", type=int, default=0,
                        help="tokens of all workers' micro-batches together (default: 16,384 on the CPU, 24,576 for each GPU)")
    parser.add_argument("--accumulate", type=int, default=1, help="micro-batches of a step: what is done once a step weighs less with more")
    parser.add_argument("--steps", type=int, default=0, help="steps of a run (default: 14 on the CPU, 30 on GPUs)")
    parser.add_argument("--no-equal", dest="equal", action="store_false", help="on GPUs: no runs with equal budgets on unequal GPUs")
    parser.add_argument("--repeats", type=int, default=3, help="turns (on the CPU)")
    parser.add_argument("--timeout", type=float, default=3600, help="seconds for all shares or slowdowns")
    parser.add_argument("--scratch", default=None)
    parser.add_argument("--out", default="")
    parser.add_argument("--occupy", type=float, default=0.0, help=argparse.SUPPRESS)
    return parser


def main() -> None:
    """Measure and print; `--out` appends to a file."""
    options = command_line().parse_args()
    if options.occupy:
        occupy(options.occupy)
    clean_up_when_terminated()
    options.model = options.model or ("1b" if options.gpus else "tiny")
    options.tokens = options.tokens or (24576 * options.gpus or 16384)
    options.steps = options.steps or (30 if options.gpus else 14)
    case = {k: v for k, v in vars(options).items() if k not in ("share", "slowdown", "scratch", "out", "occupy", "equal")}
    failed = False
    for found in on_gpus(options) if options.gpus else (on_cpu(options, share) for share in options.share):
        failed |= "balanced_of_sum" not in found
        record({"benchmark": "unequal", "case": case, **found, "versions": versions()}, options.out)
    sys.exit(failed)


if __name__ == "__main__":
    main()
