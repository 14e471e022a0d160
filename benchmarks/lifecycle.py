"""A run from start to export on this machine, its processes killed in the middle: `python -m trainer run`, a kill, and again.

    python benchmarks/lifecycle.py --model 1b --method qlora --gpus 1 --out results.jsonl
    python benchmarks/lifecycle.py --model tiny --method full                              # two processes on the CPU

The model is a randomly initialised Llama with a tokenizer made from the project's own rows; the data are those rows, repeated for as many
epochs as the steps need. Shows that the loss falls, that the second start goes on from the checkpoint, and that the exported directory
loads with plain `AutoModelForCausalLM`. Exits with 1 if one of them does not hold.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml
from record import record
from train import MODELS, REPOSITORY, end, start, told_steps, versions

SAMPLE = REPOSITORY / "trainer/data/sample"
LOADS = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
words = AutoTokenizer.from_pretrained(sys.argv[1])("Does it load?", return_tensors="pt")
with torch.no_grad():
    logits = model(input_ids=words["input_ids"]).logits
print(json.dumps({"parameters": sum(p.numel() for p in model.parameters()), "finite": bool(torch.isfinite(logits).all())}))
"""


def make_base(directory: Path) -> None:
    """A byte-level tokenizer of 4,000 tokens, made from the sample's rows."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE(unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    files = [str(path) for path in SAMPLE.glob("*.jsonl")]
    inner.train(files, trainers.BpeTrainer(vocab_size=4000, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False,
                                           initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>").save_pretrained(directory)


def configuration(options: argparse.Namespace, storage: Path) -> dict[str, Any]:
    """The trainer's configuration file."""
    workers = options.gpus or 2
    run = {"name": f"lifecycle-{options.model}", "model": {
               "path": "models/made", "dtype": "bfloat16" if options.gpus else "float32",
               "architecture": {**MODELS[options.model], "vocab_size": 4000, "max_position_embeddings": 2048,
                                **({"num_hidden_layers": options.layers} if options.layers else {})}},
           "data": {"sample": True, "format": "instruction", "max_tokens": 512},
           "method": {"kind": options.method},
           "train": {"epochs": 1000, "max_steps": options.steps, "tokens_per_step": 4096 * workers, "micro_batch_tokens": 4096,
                     "learning_rate": options.rate, "warmup_share": 0.1, "eval_every": options.steps // 2},
           "engine": {"kind": options.engine, "compile": bool(options.gpus)},
           "checkpoint": {"every_steps": max(1, options.steps // 4), "keep_last": 1, "keep_best": 0},
           "evaluation": {"generate_rows": 4, "max_new_tokens": 16, "samples": 2}}
    return {"run": run, "storage": str(storage),
            "resources": {"workers": workers, "gpus_per_worker": 1 if options.gpus else 0, "cpus_per_worker": 1, "max_failures": 0}}


def checkpoints(run: Path) -> list[int]:
    """Steps of the whole checkpoints."""
    return [int(path.name.split("-")[1]) for path in (run / "checkpoints").glob("step-*")]


def device(options: argparse.Namespace) -> str:
    """The first GPU's name, or CPU."""
    import torch

    return torch.cuda.get_device_name() if options.gpus else "CPU"


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run, kill, run again; returns what was seen."""
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        storage = Path(folder)
        make_base(storage / "models/made")
        config, log = storage / "run.yaml", Path(options.log or storage / "log")
        document = configuration(options, storage)
        config.write_text(yaml.safe_dump(document))
        run = storage / "runs" / document["run"]["name"]
        began = time.monotonic()
        process = start("run", config, log)
        kill_at = options.steps // 2 + 1
        while process.poll() is None and (len(told_steps(run / "metrics.jsonl")) < kill_at or not checkpoints(run)):
            if time.monotonic() - began > options.timeout:
                break
            time.sleep(0.2)
        before = told_steps(run / "metrics.jsonl")
        kept = max(checkpoints(run), default=0)
        end(process)
        result: dict[str, Any] = {"case": {k: getattr(options, k) for k in ("model", "layers", "method", "engine", "gpus", "steps")},
                                  "killed_after_step": before[-1]["step"] if before else 0, "checkpoint_then": kept,
                                  "seconds_until_kill": round(time.monotonic() - began, 1)}
        again = time.monotonic()
        process = start("run", config, log)
        try:
            result["exit"] = process.wait(options.timeout)
        except subprocess.TimeoutExpired:
            end(process)
            result["exit"] = 124
        result["seconds_of_second_start"] = round(time.monotonic() - again, 1)
        lines = told_steps(run / "metrics.jsonl")
        result["loss"] = [round(lines[0]["loss"], 4), round(lines[-1]["loss"], 4)] if lines else []
        result["steps"] = [line["step"] for line in lines] == list(range(1, options.steps + 1))
        text = log.read_text(errors="replace")
        result["resumed"] = [line.strip()[-120:] for line in text.splitlines() if "Going on after step" in line][:1]
        if result["exit"] == 0:
            loaded = subprocess.run([sys.executable, "-c", LOADS, str(run / "model")], capture_output=True, text=True, check=False)
            result["export"] = json.loads(loaded.stdout.splitlines()[-1]) if loaded.returncode == 0 else loaded.stderr[-1500:]
        else:
            result["log_end"] = text[-3000:]
        result["holds"] = bool(result["exit"] == 0 and result["resumed"] and result["steps"] and kept > 0
                               and isinstance(result["export"], dict) and result["export"]["finite"]
                               and result["loss"][1] < result["loss"][0])
    return result | {"device": device(options), "versions": versions()}


def command_line() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="tiny")
    parser.add_argument("--layers", type=int, default=0, help="decoder layers (0: the model's own; fewer for a small disk)")
    parser.add_argument("--method", choices=("full", "lora", "qlora"), default="full")
    parser.add_argument("--engine", choices=("fsdp", "deepspeed"), default="fsdp")
    parser.add_argument("--gpus", type=int, default=0, help="0: two processes on the CPU")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--rate", type=float, default=3e-4)
    parser.add_argument("--out", default="")
    parser.add_argument("--log", default="")
    parser.add_argument("--scratch", default=None)
    parser.add_argument("--timeout", type=float, default=600)
    return parser


def main() -> None:
    """Measure one case and print it; `--out` appends it to a file."""
    options = command_line().parse_args()
    result = measure(options)
    record(result, options.out)
    sys.exit(not result["holds"])


if __name__ == "__main__":
    main()
