"""What rounding the frozen weights does to LoRA on a real model: the same run with them in full, in FP8, in 4 bits (GPUs).

    python benchmarks/adapters.py --base storage/models/SmolLM2-135M-Instruct --gguf SmolLM2-135M-Instruct.Q4_1.gguf --data rows.json
    python benchmarks/adapters.py --base storage/models/Llama-3.2-1B --data rows.json --gpu --kinds none tensorwise qlora --steps 200

Each run is `python -m trainer prepare` and `train` on the same rows in the same order with the same first adapters, by each of
`--seeds` seeds (which change split, order and adapters). Prints the held-out loss after the last step, and how far each kind is from
`none` with the same seed, beside how far seeds are from each other.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml
from record import clean_up_when_terminated, record
from train import end, start, told_steps, versions


def configuration(options: argparse.Namespace, storage: Path, kind: str, seed: int) -> dict[str, Any]:
    """The trainer's configuration file."""
    run = {"name": "adapters", "seed": seed,
           "model": {"path": "models/base", "gguf_file": options.gguf, "dtype": "bfloat16" if options.gpu else "float32"},
           "data": {"path": f"data/{options.data.name}", "format": "instruction", "context": options.context, "max_tokens": 512},
           "method": {"kind": "qlora" if kind == "qlora" else "lora"},
           "train": {"epochs": 1000, "max_steps": options.steps, "tokens_per_step": options.tokens, "micro_batch_tokens": options.tokens,
                     "learning_rate": options.rate, "warmup_share": 0.1, "eval_every": options.steps, "eval_rows": options.rows},
           "engine": {"kind": "fsdp", "compile": options.gpu, "float8": "none" if kind == "qlora" else kind},
           "checkpoint": {"every_minutes": 10**6, "keep_last": 1, "keep_best": 0},
           "evaluation": {"rows": options.rows, "generate_rows": 1, "max_new_tokens": 1, "samples": 1}}
    return {"run": run, "storage": str(storage),
            "resources": {"workers": 1, "gpus_per_worker": int(options.gpu), "cpus_per_worker": options.cpus, "max_failures": 0}}


def finished(stage: str, config: Path, log: Path, timeout: float) -> int:
    """The exit status of a stage."""
    process = start(stage, config, log)
    try:
        return process.wait(timeout)
    except subprocess.TimeoutExpired:
        return 124
    finally:
        end(process)


def measure(options: argparse.Namespace, kind: str, seed: int) -> dict[str, Any]:
    """One run's held-out loss and curve."""
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        storage = Path(folder)
        (storage / "models").mkdir()
        (storage / "models/base").symlink_to(options.base.resolve(), target_is_directory=True)
        (storage / "data").mkdir()
        shutil.copy(options.data, storage / "data")
        config, log = storage / "run.yaml", storage / "log"
        config.write_text(yaml.safe_dump(configuration(options, storage, kind, seed)))
        began = time.monotonic()
        code = next((code for stage in ("prepare", "train") if (code := finished(stage, config, log, options.timeout))), 0)
        lines = told_steps(next(iter((storage / "runs").glob("*/metrics.jsonl")), storage / "none"))
        evaluated = [line["eval_loss"] for line in lines if "eval_loss" in line]
        if code or not evaluated:
            tail = log.read_text(errors="replace")[-3000:]
            sys.exit(f"The run ({kind}, seed {seed}) ended with {code} after {len(lines)} steps.\n{tail}")
        return {"held_out": evaluated[-1], "losses": [line["loss"] for line in lines], "seconds": round(time.monotonic() - began),
                "tokens_per_second": statistics.median(line["tokens_per_second"] for line in lines[2:])}


def command_line() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True, help="directory of a real model")
    parser.add_argument("--gguf", default="", help="its GGUF file, if it is one")
    parser.add_argument("--data", type=Path, required=True, help="rows, as run.data.path takes them")
    parser.add_argument("--context", action="store_true", help="with the rows' contexts")
    parser.add_argument("--kinds", nargs="+", choices=("none", "tensorwise", "rowwise", "qlora"), default=["none", "tensorwise"])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=2048, help="of a step")
    parser.add_argument("--rows", type=int, default=60, help="held-out rows")
    parser.add_argument("--rate", type=float, default=3e-4)
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--cpus", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=3600, help="seconds of a run")
    parser.add_argument("--scratch", default=None)
    parser.add_argument("--out", default="")
    return parser


def main() -> None:
    """Measure and print."""
    options = command_line().parse_args()
    clean_up_when_terminated()
    runs = {kind: [measure(options, kind, seed) for seed in range(options.seeds)] for kind in options.kinds}
    result: dict[str, Any] = {
        "benchmark": "adapters", "case": {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()
                                          if k not in ("out", "scratch", "timeout", "base", "data")} | {"model": options.base.name},
        "held_out": {kind: [round(r["held_out"], 5) for r in each] for kind, each in runs.items()},
        "first_loss": {kind: [round(r["losses"][0], 5) for r in each] for kind, each in runs.items()},
        "last_10": {kind: [round(statistics.mean(r["losses"][-10:]), 5) for r in each] for kind, each in runs.items()},
        "tokens_per_second": {kind: round(statistics.median(r["tokens_per_second"] for r in each)) for kind, each in runs.items()}}
    if "none" in runs:
        plain = [r["held_out"] for r in runs["none"]]
        result["apart"] = {kind: round(max(abs(r["held_out"] - p) for r, p in zip(each, plain, strict=True)), 5)
                           for kind, each in runs.items() if kind != "none"}
        result["seeds_apart"] = round(max(plain) - min(plain), 5)
    record(result | {"versions": versions()}, options.out)


if __name__ == "__main__":
    main()
