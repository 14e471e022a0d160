"""What is measured on GPUs, in calls of at most eight minutes that fill a machine: `python benchmarks/gpu_session.py CALL`.

    python benchmarks/gpu_session.py                       # list the calls: machine, what each shows, commands, seconds, GPUs
    python benchmarks/gpu_session.py 4xH100-singles --out benchmarks/results

Rows that need only some of the machine's GPUs run beside each other, each on GPUs of its own; rows of the same GPUs, and rows that need
all, one after another. A command is ended when its own time or the call's (`--seconds`) is up. Results are appended to
`<out>/<GPUs>x<type>.jsonl` of what was used; lifecycles, kills and so on have files of their own. Needs the trainer's packages
(trainer/uv.lock) beside a PyTorch that sees the GPUs; nothing is downloaded. The first row of each group of GPUs should be the one that
matters most: what comes back if the machine is taken away are the results up to then. `python benchmarks/table.py --write` then renews
the tables.
"""

from __future__ import annotations

import argparse
import functools
import os
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path

from record import BESIDE

REPOSITORY = Path(__file__).resolve().parent.parent
SPEED = ""
"""Results of a command that go to the machine's own file."""
RUNS = {"lifecycle.py": 2, "float8.py": 3}
"""Runs of a script that each get `--timeout` seconds, one after another."""


@dataclass(frozen=True)
class Row:
    """One command of a call."""

    command: str
    """Script below benchmarks/ and its options, without --out and --timeout."""
    seconds: int
    """Time it is given at most."""
    shows: str
    """What it is run for, and the figure to reach."""
    gpus: str = ""
    """Numbers of its GPUs, by commas; empty: all, with nothing beside it."""
    file: str = SPEED
    """Name of the results file, if not the machine's."""


TWO_7B = ("train.py --unsaved --model 7b --rows qca --micro 8192 --accumulate 4 --checkpointing none --steps 12 --workers 2 "
          "--set engine.zero_stage=2")
FOUR = "train.py --unsaved --workers 4 --micro 8192 --accumulate 2 --steps 12"
LORA = "train.py --unsaved --model 7b --rows qca --micro 8192 --accumulate 2 --steps 14 --method lora"
# On a fresh machine with four runs at once, a 7B takes about 90 s to its first step; alone, and when its kernels are compiled, 60 s.
CALLS: dict[str, list[Row]] = {
    "4xH100-singles": [
        Row("float8.py --unsaved --model 1b --steps 300 --seeds 2 --kinds tensorwise --micro 8192", 470,
            "FP8's loss over 300 steps within bf16's noise", "0", "float8"),
        Row("lifecycle.py --model 1b --method lora --gpus 1 --steps 60", 250, "1B LoRA: run, killed, resumed, exported", "1", "lifecycle"),
        Row(f"{LORA} --checkpointing none", 150, "LoRA 7B on an H100: 19,000 (an H200 has 19,041)", "1"),
        Row(TWO_7B.replace("qca", "qa"), 160, "7B full bf16, rows without context, beside the old recipe's 1,360", "2,3"),
        Row(f"{TWO_7B} --float8 tensorwise", 150, "7B full FP8 on two: 19,500 a GPU", "2,3"),
        Row("train.py --unsaved --model 13b --rows qca --workers 2 --micro 8192 --accumulate 4 --steps 9", 160,
            "13B full bf16 on two H200: 6,500 a GPU (6,347 with two micro-batches)", "2,3"),
    ],
    "4xH100-full": [
        Row(f"{FOUR} --model 7b --rows qca", 160, "7B full bf16: 13,500 a GPU"),
        Row(f"{LORA} --workers 1", 110, "LoRA 7B on one GPU of the host, beside two others", "0"),
        Row(f"{LORA} --workers 2", 110, "on two: 95 %", "2,3"),
        Row(f"{LORA} --workers 4", 90, "on four: 95 %"),
        Row(f"{FOUR} --model 7b --rows qa", 100, "7B full bf16, qa"),
    ],
    "4xH100-pairs": [
        Row("unequal.py --gpus 2 --model 1b --slowdown 1.75 --steps 30", 235, "one GPU of two slowed: 95 % of the sum", "0,1", "unequal"),
        Row("kills.py --gpus 2 --model 1b --tokens 8192 --kills 2 --elastic", 235,
            "a worker killed, a node lost and come again: the same rows, seconds to go on", "2,3", "kills"),
        Row("unequal.py --gpus 4 --nodes 2 --model 1b --slowdown 1.75 --steps 24", 235, "2 + 2 in hybrid shard groups: 95 % of the sum",
            file="unequal"),
    ],
    "4xH100-slower": [
        Row("unequal.py --gpus 2 --model 1b --slowdown 1.3 --steps 30", 235, "one GPU of two slowed 1.3 times", "0,1", "unequal"),
        Row("unequal.py --gpus 2 --model 1b --slowdown 3 --steps 30", 235, "one GPU of two slowed three times", "2,3", "unequal"),
        Row("unequal.py --gpus 4 --nodes 2 --model 1b --slowdown 3 --steps 24", 235, "2 + 2, slowed three times", file="unequal"),
    ],
    "2xH200-export": [
        Row("lifecycle.py --model 70b --layers 20 --method qlora --gpus 1 --steps 16", 470,
            "layers of a 70B, QLoRA: run, killed, resumed, exported (a quarter of them: the whole export is 140 GB of disk; resumes, its "
            "export of 36 GB was cut off after 46 s)", "0", "lifecycle"),
        Row("train.py --unsaved --model 3b --rows qca --micro 8192 --accumulate 4 --checkpointing none --steps 120 "
            "--set train.eval_every=60 --set train.eval_rows=128 --set checkpoint.every_steps=50", 330,
            "time lost to data, logging, evaluation and saving: under 3 % (lost_share; 5.3 % with 256 rows every 20 steps)", "1"),
    ],
    "2xH200-engines": [
        Row("train.py --unsaved --model 1b --rows qca --workers 2 --steps 14", 110, "1.2B full, FSDP2, beside DeepSpeed"),
        Row("train.py --unsaved --model 1b --rows qca --workers 2 --steps 14 --engine deepspeed", 110, "the same, DeepSpeed ZeRO-3"),
        Row("train.py --unsaved --model 1b --rows qca --workers 2 --steps 14 --set engine.zero_stage=2", 110, "the same, FSDP2 stage 2"),
        Row("peers.py --peer old --model 7b --rows qca --gpus 2", 120, "the old recipe, 7B, qca: ours 2.1 times as fast", file="peers"),
    ],
}


@functools.cache
def device_name() -> str:
    """The first GPU's, read by a process of its own: a context of CUDA here would take memory of that GPU."""
    command = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else 'CPU')"
    return subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True).stdout.strip()


def results_file(row: Row, out: Path) -> Path:
    """Where a row's result is appended."""
    name = device_name()
    kind = next((k for k in ("H200", "H100", "A100", "L40S") if k in name), name.replace(" ", "-"))
    words = shlex.split(row.command)
    gpus = next((words[words.index(option) + 1] for option in ("--workers", "--gpus") if option in words), "1")
    return out / f"{row.file or f'{gpus}x{kind}'}.jsonl"


def groups(rows: list[Row]) -> list[list[list[Row]]]:
    """What runs after what: of each element all lists at the same time, the rows of a list one after another."""
    parts: list[dict[str, list[Row]]] = []
    for row in rows:
        if not parts or row.gpus == "" or "" in parts[-1]:
            parts.append({})
        parts[-1].setdefault(row.gpus, []).append(row)
    return [list(part.values()) for part in parts]


def run(rows: list[Row], out: Path, end: float, beside: int) -> int:
    """Run rows one after another until `end` (monotonic seconds), while `beside` others run. Returns how many failed or were not run."""
    failed = 0
    for row in rows:
        left = min(row.seconds, end - time.monotonic())
        if left < 45:
            print(f"== not run, no time left: {row.command}", flush=True)
            failed += 1
            continue
        script, *words = shlex.split(row.command)
        print(f"== {row.command}: {row.shows} (at most {left:.0f} s)", flush=True)
        command = [sys.executable, str(REPOSITORY / "benchmarks" / script), *words, "--out", str(results_file(row, out)),
                   "--timeout", str(round((left - 15) / RUNS.get(script, 1)))]
        own = {BESIDE: str(beside), **({"CUDA_VISIBLE_DEVICES": row.gpus} if row.gpus else {})}
        try:
            code = subprocess.run(command, cwd=REPOSITORY, env={**os.environ, **own}, check=False, timeout=left).returncode
        except subprocess.TimeoutExpired:
            code = 1
        print(f"== {'done' if code == 0 else f'exit {code}'}: {row.command}", flush=True)
        failed += code not in (0, 124)
    return failed


def main() -> int:
    """List the calls, or run one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("call", nargs="?", choices=CALLS)
    parser.add_argument("--out", type=Path, default=REPOSITORY / "benchmarks/results", help="folder of the results")
    parser.add_argument("--seconds", type=float, default=470, help="the whole call's time")
    options = parser.parse_args()
    if options.call is None:
        for name, rows in CALLS.items():
            took = sum(max(sum(row.seconds for row in lane) for lane in part) for part in groups(rows))
            print(f"{name} ({took} s)")
            for row in rows:
                print(f"  {row.seconds:4d} s  {'GPU ' + row.gpus if row.gpus else 'all':8} {row.command}\n{' ' * 18}{row.shows}")
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    end, failed = time.monotonic() + options.seconds, 0
    for part in groups(CALLS[options.call]):
        with ThreadPoolExecutor(len(part)) as pool:
            failed += sum(pool.map(run, part, repeat(options.out), repeat(end), repeat(len(part) - 1)))
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
