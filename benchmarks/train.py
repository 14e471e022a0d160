"""Training speed through the product's own path: `python -m trainer train` (Ray Train, packing, engine, metrics) on made-up rows.

    python benchmarks/train.py --model 7b --rows qca --out results.jsonl                # full fine-tune, FSDP2, one GPU
    python benchmarks/train.py --model 7b --rows qa --method lora --micro 16384
    python benchmarks/train.py --model 3b --workers 2 --engine deepspeed --set engine.checkpointing=selective

Rows have PubMedQA's lengths (question and answer `qa`: 90 tokens on average; with context `qca`: 430), cut at 512; weights are random.
Prints one JSON object a case: median tokens/s, MFU and step time after the warm-up steps, peak memory, versions. Token ids are random, so
the loss says nothing; with `--text chain` they follow a random Markov chain, which a model can learn and never sees twice (float8.py).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import yaml
from record import record

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

CONTEXT = 512
VOCABULARY = 32000
ROWS = {"qa": (90.0, 160.0), "qca": (430.0, 620.0), "even": (128.0, 128.0)}
"""Mean and 95th percentile of the row lengths (`even`: all of one length); answers have 55 and 95."""
MODELS: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8},
    "3b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 32},
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32},
    "13b": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40, "num_key_value_heads": 40},
    "70b": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8},
}


def _lognormal(mean: float, p95: float) -> tuple[float, float]:
    """mu and sigma of the lognormal distribution with that mean and 95th percentile."""
    z = 1.6448536
    sigma = z - math.sqrt(z * z - 2 * math.log(p95 / mean))
    return math.log(mean) - sigma * sigma / 2, sigma


def chain(lengths: list[int], rng: np.random.Generator, vocabulary: int) -> list[Any]:
    """Rows of a Markov chain in which each token has 32 successors of falling probability (entropy about 2.9 nats).

    The table of successors is the same in every dataset of that vocabulary.
    """
    successors = np.random.default_rng(7).integers(3, vocabulary, (vocabulary, 32)).astype(np.int32)
    weights = 1.0 / np.arange(1, 33)
    border = np.cumsum(weights / weights.sum())
    made = np.empty((len(lengths), max(lengths)), dtype=np.int32)
    made[:, 0] = rng.integers(3, vocabulary, len(lengths))
    for place in range(1, made.shape[1]):
        made[:, place] = successors[made[:, place - 1], np.minimum(np.searchsorted(border, rng.random(len(lengths))), 31)]
    return [row[:length].copy() for row, length in zip(made, lengths, strict=True)]


def make_dataset(directory: Path, kind: str, tokens: int, text: str = "random", seed: int = 0, vocabulary: int = VOCABULARY) -> None:
    """Write a dataset as `prepare` does, with at least `tokens` training tokens, all below `vocabulary`."""
    from trainer.data.shards import shard_name, write_shard
    from trainer.files import write_directory

    rng = np.random.default_rng(seed)

    def rows(total: int) -> tuple[list[Any], list[int]]:
        lengths, starts = [], []
        mu, sigma = _lognormal(*ROWS[kind])
        answer_mu, answer_sigma = _lognormal(55.0, 95.0)
        have = 0
        while have < total:
            length = int(np.clip(np.rint(rng.lognormal(mu, sigma)), 16, CONTEXT))
            answer = int(np.clip(np.rint(rng.lognormal(answer_mu, answer_sigma)), 4, length * 3 // 4))
            lengths.append(length)
            starts.append(length - answer)
            have += length
        if text == "chain":
            return chain(lengths, rng, vocabulary), starts
        return [rng.integers(3, vocabulary, length).astype(np.int32) for length in lengths], starts

    def fill(folder: Path) -> dict[str, Any]:
        splits = {}
        for split, total in (("train", tokens), ("test", 20_000)):
            made, starts = rows(total)
            shard = write_shard(folder / shard_name(split, 0), made, starts, 0, CONTEXT)
            splits[split] = {"rows": len(made), "tokens": shard["tokens"], "answer_tokens": shard["answer_tokens"], "shards": [shard]}
        return {"splits": splits, "max_tokens": CONTEXT, "format": "instruction", "source": {"made": kind}}

    write_directory(directory, fill)


def configuration(options: argparse.Namespace, storage: Path) -> dict[str, Any]:
    """The trainer's configuration file."""
    name = f"bench-{options.model}"
    run: dict[str, Any] = {
        "name": name, "model": {"path": "models/none", "dtype": options.dtype,
                                "architecture": {**MODELS[options.model], "vocab_size": VOCABULARY, "max_position_embeddings": 4096}},
        "data": {"path": "made.jsonl", "max_tokens": CONTEXT},
        "method": {"kind": options.method},
        "train": {"epochs": 1000, "max_steps": options.steps, "tokens_per_step": options.micro * options.accumulate * options.workers,
                  "micro_batch_tokens": options.micro, "learning_rate": 1e-5 if options.method == "full" else 1e-4, "eval_every": 10**6,
                  "eval_rows": 8},
        "engine": {"kind": options.engine, "checkpointing": options.checkpointing, "float8": options.float8,
                   "reduce_dtype": options.reduce, "activation_budget": options.budget},
        "checkpoint": {"every_minutes": 10**6}}
    for setting in options.set:
        path, _, value = setting.partition("=")
        *parts, last = path.split(".")
        place = run
        for part in parts:
            place = place.setdefault(part, {})
        place[last] = yaml.safe_load(value)
    return {"run": run, "storage": str(storage),
            "resources": {"workers": options.workers, "gpus_per_worker": 0 if options.cpu else 1, "cpus_per_worker": 1, "max_failures": 0}}


def lost_share(lines: list[dict[str, Any]]) -> float | None:
    """Share of the time from the first of these steps to the last that was neither forward and backward nor the optimizer: waiting for
    data, logging, evaluations, saves, and whatever else the loop does. None if there are not two steps."""
    if len(lines) < 2:
        return None
    computing = sum(line["seconds"]["forward_backward"] + line["seconds"]["optimizer"] for line in lines[1:])
    return round(1 - computing / (lines[-1]["time"] - lines[0]["time"]), 5)


def told_steps(metrics: Path) -> list[dict[str, Any]]:
    """The whole lines of a run's metrics.jsonl."""
    text = metrics.read_text() if metrics.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def start(stage: str, config: Path, log: Path, environment: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
    """`python -m trainer <stage>`, what it prints appended to `log`."""
    with open(log, "ab") as file:
        return subprocess.Popen([sys.executable, "-m", "trainer", stage, "--config", str(config)], cwd=REPOSITORY, stdout=file,
                                stderr=subprocess.STDOUT, env=environment)


def end(process: subprocess.Popen[bytes]) -> None:
    """End a run without its last checkpoint: this process and its children only."""
    family = []
    with contextlib.suppress(psutil.NoSuchProcess):
        family = psutil.Process(process.pid).children(recursive=True)
    for member in [*family, process]:
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            member.kill()
    process.wait()
    psutil.wait_procs(family, timeout=20)


def watch(process: subprocess.Popen[bytes], metrics: Path, options: argparse.Namespace) -> int:
    """Exit code of a run: 0 too if it was ended after its last step (`--unsaved`), 124 after `--timeout` seconds (what was measured until
    then still counts)."""
    deadline = time.monotonic() + options.timeout
    while process.poll() is None and time.monotonic() < deadline:
        if options.unsaved and len(told_steps(metrics)) >= options.steps:
            end(process)
            return 0
        time.sleep(0.2)
    if process.poll() is not None:
        return process.returncode
    end(process)
    return 124


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run one case; returns its figures."""
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        storage = Path(folder)
        config = configuration(options, storage)
        run = storage / "runs" / config["run"]["name"]
        make_dataset(run / "dataset", options.rows, (options.steps + 2) * config["run"]["train"]["tokens_per_step"], options.text)
        (storage / "run.yaml").write_text(yaml.safe_dump(config))
        began = time.monotonic()
        log = Path(options.log) if options.log else storage / "log"
        code = watch(start("train", storage / "run.yaml", log), run / "metrics.jsonl", options)
        case = {k: v for k, v in vars(options).items() if k not in ("out", "scratch", "log", "timeout")}
        result: dict[str, Any] = {"case": case, "exit": code, "wall_seconds": round(time.monotonic() - began, 1)}
        lines = told_steps(run / "metrics.jsonl")
        steady = lines[options.warm:]
        if steady:
            per_second = statistics.median(line["tokens_per_second"] for line in steady)
            result |= {
                "tokens_per_second": round(per_second, 1), "tokens_per_second_per_worker": round(per_second / options.workers, 1),
                "rows_per_second": round(statistics.median(line["samples_per_second"] for line in steady), 2),
                "mfu": statistics.median(line["mfu"] or 0.0 for line in steady),
                "seconds": {k: round(statistics.median(line["seconds"].get(k, 0.0) for line in steady), 5) for k in steady[-1]["seconds"]},
                "first_step_seconds_after_start": round(lines[0]["time"] - (time.time() - (time.monotonic() - began)), 1),
                "loss": [round(lines[0]["loss"], 4), round(lines[-1]["loss"], 4)], "steps": len(lines)}
            usual = statistics.median(sum(line["seconds"].values()) for line in steady)
            saves = [line for line in steady if line["seconds"].get("checkpoint", 0.0) > 0.01]
            told = [line for line in log.read_text(errors="replace").splitlines() if "heckpoint of step" in line]
            result["checkpoint"] = {
                "held_seconds": round(max((line["seconds"]["checkpoint"] for line in saves), default=0.0), 3),
                "slowest_step_beyond_usual": round(max(sum(line["seconds"].values()) for line in steady) - usual, 3),
                "lost_seconds": round(sum(max(0.0, sum(line["seconds"].values()) - usual) for line in steady), 3),
                "saved": [line.split(") ", 1)[-1][:160] for line in told]}
            result["lost_share"] = lost_share(lines[options.warm - 1:-1])
        if options.curve:
            result["losses"] = [round(line["loss"], 4) for line in lines]
        if code != 0:
            result["log_end"] = log.read_text(errors="replace")[-3000:]
        gpu = run / "gpu.csv"
        if gpu.exists():
            rows = [row.split(",") for row in gpu.read_text().splitlines()[1:]]
            result["peak_gib"] = round(max((float(row[4]) for row in rows if len(row) > 4), default=0.0) / 2**30, 1)
    return result | {"versions": versions()}


def versions(*more: str) -> dict[str, str]:
    """Of what decides the speed."""
    import importlib.metadata as metadata
    found = {}
    for name in ("torch", "transformers", "deepspeed", "peft", "torchao", "ray", *more):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


def command_line(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """The options of one case."""
    parser.add_argument("--model", choices=MODELS, default="7b")
    parser.add_argument("--rows", choices=ROWS, default="qca")
    parser.add_argument("--method", choices=("full", "lora", "qlora"), default="full")
    parser.add_argument("--engine", choices=("fsdp", "deepspeed"), default="fsdp")
    parser.add_argument("--checkpointing", choices=("auto", "none", "selective", "full"), default="auto")
    parser.add_argument("--budget", type=float, default=0.6, help="activations kept with selective checkpointing")
    parser.add_argument("--float8", choices=("none", "tensorwise", "rowwise"), default="none")
    parser.add_argument("--reduce", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--micro", type=int, default=16384, help="tokens of a micro-batch")
    parser.add_argument("--accumulate", type=int, default=1, help="micro-batches a step")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--warm", type=int, default=4, help="first steps that do not count")
    parser.add_argument("--set", action="append", default=[], help="any other field of `run`, for example engine.offload=cpu")
    parser.add_argument("--text", choices=("random", "chain"), default="random", help="what the token ids are drawn from")
    parser.add_argument("--unsaved", action="store_true", help="end the run after its last step, without its final save (81 GB with a 7B)")
    parser.add_argument("--curve", action="store_true", help="tell every step's loss")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--out", default="")
    parser.add_argument("--log", default="")
    parser.add_argument("--scratch", default=None)
    parser.add_argument("--timeout", type=float, default=900)
    return parser


def main() -> None:
    """Measure one case and print it; `--out` appends it to a file."""
    options = command_line(argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)).parse_args()
    result = measure(options)
    record(result, options.out)
    sys.exit(result["exit"])


if __name__ == "__main__":
    main()
