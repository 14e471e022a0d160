"""Workers killed (SIGKILL) at random steps of one real run, `python -m trainer train`: the same losses, steps done again, time to go on.

    python benchmarks/kills.py --kills 20 --out benchmarks/results/kills.jsonl    # two workers on the CPU
    python benchmarks/kills.py --gpus 2 --model 1b --kills 3
    python benchmarks/kills.py --elastic --kills 0                                # a node is lost for good, and comes back
    python benchmarks/kills.py --gpus 2 --model 1b --elastic --kills 1

The run is compared with an undisturbed one of the same seed and workers, every step's loss bit for bit. A kill comes at a random moment
within one and a half checkpoint intervals after the run has gone on; which worker dies is random too. `--elastic`: each worker has a Ray
node of its own; at the end one node is taken away, the run goes on with one worker fewer, and with all when a node is there again. Then
only the rows are compared: they are the same, losses differ by the order of sums. Exits with 1 if losses or rows differ.

Steps done again may exceed the interval by those that were done while a save was being written: a save that is under way is lost too.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from record import clean_up_when_terminated, record
from runs import Nodes, Run
from train import CONTEXT, MODELS, VOCABULARY, versions

ELASTIC_STEPS = 10
"""Steps that each number of workers does at least: they are told of by tens."""


def configuration(options: argparse.Namespace, storage: Path, steps: int) -> dict[str, Any]:
    """The trainer's configuration file."""
    gpu, workers = bool(options.gpus), options.gpus or 2
    architecture = {**MODELS[options.model], "vocab_size": VOCABULARY, "max_position_embeddings": 4096, "tie_word_embeddings": not gpu}
    return {"storage": str(storage),
            "run": {"name": "kills", "model": {"path": "none", "dtype": "bfloat16" if gpu else "float32", "architecture": architecture},
                    "data": {"path": "made.jsonl", "max_tokens": CONTEXT},
                    "train": {"epochs": 1, "max_steps": steps, "tokens_per_step": options.tokens * workers,
                              "micro_batch_tokens": options.tokens, "learning_rate": 3e-4, "schedule": "constant",
                              "warmup_share": 0.0, "eval_every": 10**6, "eval_rows": 8},
                    "engine": {"kind": options.engine, "compile": not options.eager},
                    "checkpoint": {"every_steps": options.every, "keep_best": 0}},
            "resources": {"workers": workers, "min_workers": workers - 1 if options.elastic else 0, "gpus_per_worker": 1 if gpu else 0,
                          "cpus_per_worker": 1, "max_failures": options.kills + 5, "balance": "equal"}}


def wait(run: Run, seconds: float, what: str, condition: Any) -> Any:
    """The condition's value once it is true. SystemExit if the run ends before, or after too long."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        if run.process.poll() is not None or time.monotonic() > deadline:
            raise SystemExit(f"{what}: {'the run ended' if run.process.poll() is not None else 'not in time'}.\n{run.told()}")
        time.sleep(0.05)
    return value


def kill(options: argparse.Namespace, run: Run, chosen: random.Random) -> dict[str, Any]:
    """One worker dies at a random step; returns after the first step of the workers that follow."""
    begin = (run.lines() or [{"step": 0}])[-1]["step"]
    at = begin + chosen.randint(1, options.every * 3 // 2 + 1)
    wait(run, options.timeout, f"step {at}", lambda: (run.lines() or [{"step": 0}])[-1]["step"] >= at)
    pids = run.workers(options.gpus or 2, time.monotonic() + 60, os.getpid())
    victim = chosen.randrange(len(pids))
    last, when = run.lines()[-1]["step"], time.time()
    os.kill(pids[victim], signal.SIGKILL)
    # A step that was told of after the workers of then are gone: their loss is found by a closed connection, at once.
    first = wait(run, options.timeout, "a step after the kill", lambda: _first_after(run, when, last))
    return {"worker": victim, "after_step": last, "next_step": first["step"], "repeated": last - first["step"] + 1,
            "seconds_to_next_step": round(first["time"] - when, 1)}


def _first_after(run: Run, when: float, last: int) -> dict[str, Any] | None:
    """The first step of the new workers: metrics.jsonl then ends before or with it, and it is newer than the kill."""
    lines = run.lines()
    later = [line for line in lines if line["time"] > when]
    # What the old workers still told follows `last` at once; the new ones begin with a step of their checkpoint.
    return later[0] if later and (later[0]["step"] <= last or later[0]["time"] - when > 3) else None


def elastic(options: argparse.Namespace, run: Run, nodes: Nodes) -> dict[str, Any]:
    """A node is lost for good and comes back; seconds until a step with other workers was done."""
    from ray._private.state import actors

    def steps_by(count: int) -> list[dict[str, Any]]:
        """Lines at the end of the run so far in which this number of workers told."""
        lines = [line for line in run.lines() if "workers" in line]
        if not lines or len(lines[-1]["workers"]["ranks"]) != count:
            return []
        first = max((i + 1 for i, line in enumerate(lines) if len(line["workers"]["ranks"]) != count), default=0)
        return lines[first:] if sum(line["workers"]["steps"] for line in lines[first:]) >= ELASTIC_STEPS else []

    workers = nodes.count
    wait(run, options.timeout, "all workers", lambda: steps_by(workers))
    controllers = {a["Address"]["NodeID"] for a in actors().values() if "TrainController" in a["ActorClassName"]}
    lost = next(n for n in nodes.nodes if n.node_id not in controllers)
    before, when = run.lines()[-1]["step"], time.time()
    print(f"A node is lost after step {before}.", file=sys.stderr, flush=True)
    nodes.cluster.remove_node(lost, allow_graceful=False)
    fewer = wait(run, options.timeout, "one worker fewer", lambda: steps_by(workers - 1))[0]
    back_at = time.time()
    print(f"The node is back after step {run.lines()[-1]['step']}.", file=sys.stderr, flush=True)
    nodes.add(nodes.nodes.index(lost))
    more = wait(run, options.timeout, "all workers again", lambda: steps_by(workers))[0]
    begun = {line["step"]: line["time"] for line in run.lines()}
    return {"lost_after_step": before, "steps_done_again": before - (fewer["step"] - fewer["workers"]["steps"]),
            "seconds_to_fewer": round(begun[fewer["step"] - fewer["workers"]["steps"] + 1] - when, 1),
            "seconds_to_all_again": round(begun[more["step"] - more["workers"]["steps"] + 1] - back_at, 1)}


def same_rows(lines: list[dict[str, Any]], rows: int) -> bool:
    """Whether no row was left out or trained on twice."""
    dealt = 0
    for number, line in enumerate(lines):
        dealt += line["rows"]
        if line["step"] != number + 1 or abs(line["epoch"] * rows - dealt) > 0.5:
            return False
    return True


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The undisturbed run, then the disturbed one."""
    chosen = random.Random(options.seed)
    steps = options.kills * options.every + 10
    result: dict[str, Any] = {"kills": []}
    workers = options.gpus or 2
    tokens = (steps + 2000 * options.elastic) * options.tokens * workers
    if not options.elastic:  # losses of other numbers of workers differ by the order of sums
        with tempfile.TemporaryDirectory(dir=options.scratch) as first:
            whole = Run(configuration(options, Path(first), steps), Path(first), tokens)
            try:
                wait(whole, options.timeout, "the undisturbed run's end", lambda: len(whole.lines()) >= steps)
                truth = [line["loss"] for line in whole.lines()]
            finally:
                whole.end()
    with tempfile.TemporaryDirectory(dir=options.scratch) as second:
        with contextlib.ExitStack() as stack:
            nodes = stack.enter_context(Nodes(workers, 1, bool(options.gpus))) if options.elastic else None
            run = Run(configuration(options, Path(second), 10**6 if nodes else steps), Path(second), tokens,
                      nodes.environment if nodes else None)
            stack.callback(run.end)
            end = time.monotonic() + options.seconds
            while len(result["kills"]) < options.kills and time.monotonic() < end:
                result["kills"].append(kill(options, run, chosen))
                print(result["kills"][-1], file=sys.stderr, flush=True)
            if nodes is not None:
                result["elastic"] = elastic(options, run, nodes)
            elif time.monotonic() < end:
                wait(run, options.timeout, "the disturbed run's end", lambda: len(run.lines()) >= steps)
            lines = run.lines()
        rows = json.loads(Path(second, "runs/kills/dataset/manifest.json").read_text())["splits"]["train"]["rows"]
    losses = [line["loss"] for line in lines]
    result |= {"same_rows": same_rows(lines, rows), "steps": len(lines)}
    if not options.elastic:
        result["same_losses"] = losses == truth[:len(losses)]
    if result["kills"]:
        seconds = [k["seconds_to_next_step"] for k in result["kills"]]
        result |= {"repeated_most": max(k["repeated"] for k in result["kills"]), "seconds_median": statistics.median(seconds),
                   "seconds_most": max(seconds)}
    return result


def command_line() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--elastic", action="store_true")
    parser.add_argument("--gpus", type=int, default=0, help="workers on GPUs (0: two on the CPU)")
    parser.add_argument("--model", choices=MODELS, default="tiny")
    parser.add_argument("--engine", choices=("fsdp", "deepspeed"), default="fsdp")
    parser.add_argument("--eager", action="store_true", help="without torch.compile, whose minutes say nothing of what is measured here")
    parser.add_argument("--tokens", type=int, default=512, help="tokens of a worker and step")
    parser.add_argument("--every", type=int, default=5, help="steps between checkpoints")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=3600, help="no kill after this time; the run is then compared as far as it came")
    parser.add_argument("--timeout", type=float, default=600, help="seconds for the undisturbed run, and for each wait")
    parser.add_argument("--scratch", default=None)
    parser.add_argument("--out", default="")
    return parser


def main() -> None:
    """Measure and print; `--out` appends to a file."""
    options = command_line().parse_args()
    clean_up_when_terminated()
    case = {k: v for k, v in vars(options).items() if k not in ("scratch", "out", "timeout", "seconds")}
    result = measure(options)
    record({"benchmark": "kills", "case": case, **result, "versions": versions()}, options.out)
    sys.exit(not (result["same_rows"] and result.get("same_losses", True)))


if __name__ == "__main__":
    main()
