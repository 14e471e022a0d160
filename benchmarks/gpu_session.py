"""What is measured on GPUs, in calls of at most ten minutes that fill a machine: `python benchmarks/gpu_session.py CALL`.

    python benchmarks/gpu_session.py                       # list the calls: machine, what each shows, commands, seconds, GPUs
    python benchmarks/gpu_session.py 4xH200-lora --out benchmarks/results

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
from dataclasses import dataclass, replace
from itertools import repeat
from pathlib import Path

from record import BESIDE

REPOSITORY = Path(__file__).resolve().parent.parent
SPEED = ""
"""Results of a command that go to the machine's own file."""
RUNS = {"lifecycle.py": 2, "float8.py": 2}
"""A script's time in terms of its first run's, which gets `--timeout` seconds: those after it find its kernels compiled."""


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


WIDE_7B = "train.py --unsaved --model 7b --micro 16384 --steps 12 --set engine.zero_stage=1"
FOUR_7B = "train.py --unsaved --workers 4 --model 7b --micro 12288 --steps 14 --set engine.zero_stage=1"
LORA = "train.py --unsaved --model 7b --rows qca --micro 8192 --accumulate 2 --checkpointing none --steps 14"
LORA_ON_ONE = Row(f"{LORA} --method lora", 175, "LoRA 7B: 19,000 on an H100 (18,304)")
QLORA_ON_ONE = Row(f"{LORA} --method qlora", 175, "QLoRA 7B: 12,000 on an H100 (17,391)")
LORA_ON_TWO = Row(f"{LORA} --method lora --workers 2", 160, "LoRA 7B on two GPUs: 95 % of one's", "2,3")
LORA_ON_FOUR = Row(f"{LORA} --method lora --workers 4", 140, "on four: 95 % of one's")
SCALING = [replace(LORA_ON_ONE, gpus="0"), replace(QLORA_ON_ONE, gpus="1"), LORA_ON_TWO]
UNEQUAL = Row("unequal.py --gpus 2 --model 1b --slowdown 3 1.3 --steps 20 --no-equal", 480,
              "one GPU of two slowed by other processes: 95 % of the sum (98.9 at 1.5 times, 98.4 at 2.0)", file="unequal")
UNEQUAL_GROUPS = Row("unequal.py --gpus 4 --nodes 2 --model 1b --slowdown 1.75 --steps 20", 480,
                     "2 + 2 in hybrid shard groups: 95 % of the sum", file="unequal")
KILLS = Row("kills.py --gpus 2 --model 1b --tokens 8192 --kills 1 --every 10 --elastic --eager", 470,
            "a worker killed (next step after 32 to 47 s), a node lost (the run waits a minute for another) and come again: the same rows",
            file="kills")
WIDE_QA = Row(f"{WIDE_7B} --accumulate 2 --rows qa --workers 2", 170,
              "7B full bf16, rows without context: 9.5 times the old recipe's 1,360 (14,090)")
WIDE_FP8 = Row(f"{WIDE_7B} --accumulate 4 --rows qca --workers 2 --float8 tensorwise", 170, "7B full FP8: 19,500 a GPU (20,957)")
WIDE_13B = Row("train.py --unsaved --model 13b --rows qca --workers 2 --micro 10240 --steps 12", 200,
               "13B full bf16: 6,500 a GPU (6,673; one micro-batch: no gradients lie beside the activations)")
# To the first step a 7B takes 60 to 90 s, on hosts with slow cores or several runs at once 100 to 130 s; half with compiled kernels.
CALLS: dict[str, list[Row]] = {
    "1xH100": [LORA_ON_ONE, QLORA_ON_ONE],
    "2xH200-full": [WIDE_FP8, WIDE_QA, WIDE_13B],
    "2x-adapters": [replace(LORA_ON_ONE, gpus="0"), replace(QLORA_ON_ONE, gpus="1")],
    "2x-unequal": [UNEQUAL],
    "2x-kills": [KILLS],
    "4xH200-full": [
        Row(f"{WIDE_7B} --accumulate 2 --rows qca --workers 4", 160, "7B full bf16 on four H200"),
        Row(f"{WIDE_7B} --accumulate 2 --rows qa --workers 4", 140, "rows without context (the old recipe has 1,360 on two)"),
    ],
    "4xH200-lora": [*SCALING, LORA_ON_FOUR],
    "4x-unequal": [UNEQUAL_GROUPS],
    "4xH200-pairs": [replace(WIDE_QA, gpus="0,1"), replace(KILLS, gpus="2,3"), replace(WIDE_13B, gpus="0,1"),
                     replace(WIDE_FP8, gpus="0,1")],
    "4xH100-full": [
        Row(f"{FOUR_7B} --rows qca", 160, "7B full bf16: 13,500 a GPU"), *SCALING, LORA_ON_FOUR,
        Row(f"{FOUR_7B} --rows qa", 120, "rows without context (the old recipe has 1,357 on four)"),
    ],
    "4xH100-13b": [Row("train.py --unsaved --workers 4 --model 13b --micro 8192 --accumulate 4 --steps 9 --rows qca", 220,
                       "13B full bf16: 6,500 a GPU")],
    "2x-export": [
        Row("lifecycle.py --model 70b --layers 10 --method qlora --gpus 1 --steps 16", 360,
            "layers of a 70B, QLoRA: run, killed, resumed, exported (an eighth of them: the whole export is 140 GB of disk)", "0",
            "lifecycle"),
        Row(f"{LORA} --method lora --float8 tensorwise", 150, "LoRA 7B, frozen weights in FP8: 19,000 on an H100", "1"),
    ],
    "2xH200-engines": [
        Row("train.py --unsaved --model 1b --rows qca --workers 2 --steps 14", 110, "1.2B full, FSDP2, beside DeepSpeed"),
        Row("train.py --unsaved --model 1b --rows qca --workers 2 --steps 14 --engine deepspeed", 110, "the same, DeepSpeed ZeRO-3"),
        Row("train.py --unsaved --model 1b --rows qca --workers 2 --steps 14 --set engine.zero_stage=2", 110, "the same, FSDP2 stage 2"),
        Row("train.py --unsaved --model 1b --rows qca --workers 2 --steps 14 --micro 8192 --accumulate 4 --set engine.zero_stage=2", 110,
            "weights gathered once a step"),
        Row("train.py --unsaved --model 1b --rows qca --workers 2 --steps 14 --micro 8192 --accumulate 4 --set engine.zero_stage=1", 110,
            "gradients reduced once a step too"),
    ],
    "2xH200-recipe": [
        Row(f"{WIDE_7B} --accumulate 2 --rows qca --workers 2", 170, "7B full bf16: 13,800 a GPU"),
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
    parser.add_argument("--seconds", type=float, default=570, help="the whole call's time")
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
