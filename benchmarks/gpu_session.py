"""What is still to be measured on GPUs, in calls of at most eight minutes: `python benchmarks/gpu_session.py CALL`.

    python benchmarks/gpu_session.py                       # list the calls: machine, what each shows, commands, seconds
    python benchmarks/gpu_session.py 1xH100-adapters --out benchmarks/results

A call runs its commands one after another, each ended when its own time or the call's (`--seconds`) is up, and appends every result to
`<out>/<GPUs>x<type>.jsonl` of the machine that it runs on; lifecycles, kills and peers have files of their own. Needs the trainer's
packages (trainer/uv.lock) beside a PyTorch that sees the GPUs; nothing is downloaded. The first command of a call should be the one that
matters most: what comes back if the machine is taken away are the results up to then. `python benchmarks/table.py --write` then renews the
tables.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
SPEED = ""
"""Results of a command that go to the machine's own file."""


@dataclass(frozen=True)
class Row:
    """One command of a call."""

    command: str
    """Script below benchmarks/ and its options, without --out and --timeout."""
    seconds: int
    """Time it is given at most."""
    shows: str
    """What it is run for, and the figure to reach."""
    file: str = SPEED
    """Name of the results file, if not the machine's."""


FULL_7B = "train.py --model 7b --rows qca --micro 8192 --accumulate 4 --checkpointing none --steps 12"
ADAPTERS = "train.py --model 7b --rows qca --micro 8192 --accumulate 2 --steps 14"
CALLS: dict[str, list[Row]] = {
    "1xH100-adapters": [
        Row(f"{ADAPTERS} --method lora --checkpointing none", 110, "LoRA 7B: 19,000 (17,808 with one micro-batch of 16,384)"),
        Row(f"{ADAPTERS} --method qlora --checkpointing none", 130, "QLoRA 7B: 12,000"),
        Row("train.py --model 7b --rows qca --method lora --micro 12288 --steps 14", 110, "LoRA 7B, another micro-batch"),
        Row("train.py --model 7b --rows qa --method lora --micro 8192 --accumulate 2 --checkpointing none --steps 14", 110, "LoRA 7B, qa"),
    ],
    "1xH100-lifecycle": [
        Row("lifecycle.py --model 1b --method full --gpus 1 --steps 60", 150, "1B full: run, killed, resumed, exported", "lifecycle"),
        Row("lifecycle.py --model 1b --method lora --gpus 1 --steps 60", 120, "1B LoRA: the same", "lifecycle"),
        Row("lifecycle.py --model 1b --method qlora --gpus 1 --steps 60", 120, "1B QLoRA: the same", "lifecycle"),
    ],
    "1xH100-lost": [
        Row("train.py --model 3b --rows qca --micro 8192 --accumulate 4 --checkpointing none --steps 60 --set train.eval_every=20 "
            "--set train.eval_rows=256 --set checkpoint.every_steps=25", 240,
            "time lost to data, logging, evaluation and saving: under 3 % (lost_share)"),
        Row("train.py --model 3b --rows qa --micro 8192 --accumulate 4 --checkpointing none --steps 12", 120,
            "3.5B full, qa, beside the old recipe's 2,422"),
    ],
    "1xH200-full": [
        Row(FULL_7B, 150, "7B full bf16: 12,500 (12,129 with 16,384 at once and recomputation)"),
        Row(f"{FULL_7B} --float8 tensorwise", 150, "7B full FP8 in the same call: 1.3 times bf16"),
        Row(FULL_7B.replace("qca", "qa"), 150, "7B full bf16, qa"),
    ],
    "1xH200-float8": [
        Row("float8.py --model 1b --steps 300 --seeds 3 --kinds tensorwise --micro 8192", 440,
            "FP8's loss over 300 steps within bf16's noise", "float8"),
    ],
    "1xH200-70b": [
        Row("lifecycle.py --model 70b --layers 20 --method qlora --gpus 1 --steps 16", 440,
            "layers of a 70B, QLoRA: run, killed, resumed, exported (a quarter of them: the whole export is 140 GB of disk)", "lifecycle"),
    ],
    "2xH200-full": [
        Row("train.py --model 13b --rows qca --workers 2 --micro 8192 --accumulate 2 --steps 10", 200, "13B full bf16: 6,500 a GPU"),
        Row(f"{FULL_7B} --workers 2 --set engine.zero_stage=2", 130, "7B full bf16: 13,800 a GPU"),
        Row(f"{FULL_7B} --workers 2 --set engine.zero_stage=2 --float8 tensorwise", 130, "the same, FP8: 19,500 a GPU"),
    ],
    "2xH200-engines": [
        Row("train.py --model 1b --rows qca --workers 2 --steps 14", 110, "1.2B full, FSDP2, beside DeepSpeed"),
        Row("train.py --model 1b --rows qca --workers 2 --steps 14 --engine deepspeed", 110, "the same, DeepSpeed ZeRO-3"),
        Row("train.py --model 1b --rows qca --workers 2 --steps 14 --set engine.zero_stage=2", 110, "the same, FSDP2 stage 2"),
    ],
    "2xH200-recipe": [
        Row("peers.py --peer old --model 7b --rows qa --gpus 2", 140, "the old recipe, 7B, qa: ours 9.5 times as fast", "peers"),
        Row("peers.py --peer old --model 7b --rows qca --gpus 2", 140, "the same, qca: 2.1 times", "peers"),
        Row(FULL_7B.replace("qca", "qa") + " --workers 2 --set engine.zero_stage=2", 130, "ours in the same call, qa"),
    ],
    "2xH100-unequal": [
        Row("unequal.py --gpus 2 --model 1b --slowdown 1.75 --steps 30", 230, "one GPU of two slowed: 95 % of the sum", "unequal"),
        Row("unequal.py --gpus 2 --model 1b --slowdown 3 --steps 30", 230, "the same, slowed three times", "unequal"),
    ],
    "2xH100-losses": [
        Row("kills.py --gpus 2 --model 1b --tokens 8192 --kills 3", 240,
            "a worker killed at random steps: the same losses, seconds to go on", "kills"),
        Row("kills.py --gpus 2 --model 1b --tokens 8192 --kills 0 --elastic", 230, "elastic to one fewer and back: the same rows", "kills"),
    ],
    "4xH100-full": [
        Row("train.py --model 7b --rows qca --workers 4 --micro 8192 --accumulate 2 --steps 12", 140, "7B full bf16: 13,500 a GPU"),
        Row("train.py --model 7b --rows qa --workers 4 --micro 8192 --accumulate 2 --steps 12", 140, "the same, qa"),
        Row("train.py --model 13b --rows qca --workers 4 --micro 8192 --accumulate 2 --steps 10", 190, "13B full bf16: 6,500 a GPU"),
    ],
    "4xH100-unequal": [
        Row("unequal.py --gpus 4 --nodes 2 --model 1b --slowdown 1.75 --steps 24", 240,
            "2 + 2 in hybrid shard groups: 95 % of the sum", "unequal"),
        Row("unequal.py --gpus 4 --nodes 2 --model 1b --slowdown 3 --steps 24", 230, "the same, slowed three times", "unequal"),
    ],
    "4xH100-scaling": [
        Row(f"{ADAPTERS} --method lora --workers 1", 100, "LoRA 7B on one GPU of the host"),
        Row(f"{ADAPTERS} --method lora --workers 2", 100, "on two: 95 %"),
        Row(f"{ADAPTERS} --method lora --workers 4", 100, "on four: 95 %"),
    ],
}


def results_file(row: Row, out: Path) -> Path:
    """Where a row's result is appended."""
    import torch

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    kind = next((k for k in ("H200", "H100", "A100", "L40S") if k in name), name.replace(" ", "-"))
    words = shlex.split(row.command)
    gpus = next((words[words.index(option) + 1] for option in ("--workers", "--gpus") if option in words), "1")
    return out / f"{row.file or f'{gpus}x{kind}'}.jsonl"


def main() -> int:
    """List the calls, or run one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("call", nargs="?", choices=CALLS)
    parser.add_argument("--out", type=Path, default=REPOSITORY / "benchmarks/results", help="folder of the results")
    parser.add_argument("--seconds", type=float, default=470, help="the whole call's time")
    options = parser.parse_args()
    if options.call is None:
        for name, rows in CALLS.items():
            print(f"{name} ({sum(row.seconds for row in rows)} s)")
            for row in rows:
                print(f"  {row.seconds:4d} s  {row.command}\n          {row.shows}")
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    end, failed = time.monotonic() + options.seconds, 0
    for row in CALLS[options.call]:
        left = min(row.seconds, end - time.monotonic())
        if left < 45:
            print(f"== not run, no time left: {row.command}", flush=True)
            failed += 1
            continue
        script, *words = shlex.split(row.command)
        print(f"== {row.command}: {row.shows} (at most {left:.0f} s)", flush=True)
        command = [sys.executable, str(REPOSITORY / "benchmarks" / script), *words, "--out", str(results_file(row, options.out)),
                   "--timeout", str(round((left - 15) / (2 if script == "lifecycle.py" else 1)))]
        try:
            failed += subprocess.run(command, cwd=REPOSITORY, check=False, timeout=left).returncode not in (0, 124)
        except subprocess.TimeoutExpired:  # the script ends its own runs in time; this is for one that hangs
            print(f"== ended after {left:.0f} s: {row.command}", flush=True)
            failed += 1
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
