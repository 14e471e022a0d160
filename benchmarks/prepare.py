"""Preparation speed and memory: `trainer.data.prepare` against `datasets.map`, the same tokenizer on the same rows in one run.

    python benchmarks/prepare.py --rows 20000 --tokenizer DIR --repeat 3 --out benchmarks/results/prepare.jsonl
    python benchmarks/prepare.py --rows 2000000 --short --tokenizer DIR --only ours --out benchmarks/results/prepare.jsonl   # memory

Rows are synthetic, with PubMedQA's lengths (question and answer of some 90 tokens, with the abstract some 430), cut at 512 tokens.
`datasets.map` gets what a user would write: load the JSON lines, render, tokenise prompt and completion in batches, cut the prompt,
make labels, split, save; without any check of rows, without removal of duplicates. Each side runs in a process of its own, fresh,
with the same number of worker processes; its time begins when libraries and tokenizer are loaded, and holds the start of the workers.
Memory is the largest sum of the proportional set sizes of all its processes, files mapped into memory included (`private`: without
those). Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
from record import record
from train import versions

SAMPLE = Path(__file__).parent.parent / "trainer" / "data" / "sample" / "pubmedqa-sample.jsonl"


def rows(count: int, short: bool = False, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Rows of the hub's form made of the shipped sample's sentences, with words exchanged, so that no two are alike. `short`: without
    context, one sentence an answer."""
    rng = random.Random(seed)
    sample = [json.loads(line) for line in SAMPLE.read_text(encoding="utf-8").splitlines()]
    sentences = [s for row in sample for text in (*row["contexts"], row["long_answer"]) for s in re.split(r"(?<=[.])\s+", text)]
    words = sorted({word for sentence in sentences for word in sentence.split() if len(word) > 3})

    def sentence() -> str:
        parts = rng.choice(sentences).split()
        for _ in range(max(1, len(parts) // 3)):
            parts[rng.randrange(len(parts))] = rng.choice(words)
        return " ".join(parts)

    for number in range(count):
        contexts = [] if short else [" ".join(sentence() for _ in range(rng.randint(1, 5))) for _ in range(rng.randint(2, 6))]
        answer = " ".join(sentence() for _ in range(1 if short else rng.randint(1, 3)))
        yield {"pubid": 10_000_000 + number, "question": sentence().rstrip(".") + "?", "context": {"contexts": contexts},
               "long_answer": answer, "final_decision": rng.choice(["yes", "no", "maybe"])}


def ours(storage: Path, processes: int) -> dict[str, Any]:
    """Prepare with the project's code."""
    from trainer.config import parse
    from trainer.data.prepare import prepare
    from trainer.model.tokenizer import load_tokenizer

    config = parse({"run": {"name": "bench", "model": {"path": "tokenizer"}, "data": {"path": "rows.jsonl", "max_tokens": 512}},
                    "resources": {"prepare_cpus": processes}, "storage": str(storage)})
    tokenizer = load_tokenizer(config)
    started = time.perf_counter()
    manifest = prepare(config, tokenizer)
    return {"seconds": time.perf_counter() - started, "rows_kept": manifest["rows_kept"],
            "tokens": sum(manifest["splits"][s]["tokens"] for s in ("train", "test")), "shortened": manifest["shortened"]}


def mapped(storage: Path, processes: int) -> dict[str, Any]:
    """Prepare with datasets.map."""
    import datasets
    from transformers import AutoTokenizer

    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(storage / "tokenizer")
    head, middle, tail, end = "Answer the question.\n\n### Context:\n", "\n\n### Question:\n", "\n\n### Answer:\n", tokenizer.eos_token

    def tokenise(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        prompts = [head + "\n".join(c["contexts"]) + middle + q + tail for c, q in zip(batch["context"], batch["question"], strict=True)]
        completions = [f"{a}\nDecision: {d}{end}" for a, d in zip(batch["long_answer"], batch["final_decision"], strict=True)]
        prompt_ids = tokenizer(prompts, add_special_tokens=False)["input_ids"]
        answer_ids = tokenizer(completions, add_special_tokens=False)["input_ids"]
        prompt_ids = [p[: 512 - len(a)] for p, a in zip(prompt_ids, answer_ids, strict=True)]
        return {"input_ids": [p + a for p, a in zip(prompt_ids, answer_ids, strict=True)],
                "labels": [[-100] * len(p) + a for p, a in zip(prompt_ids, answer_ids, strict=True)]}

    started = time.perf_counter()
    data = datasets.load_dataset("json", data_files=str(storage / "rows.jsonl"), split="train", cache_dir=str(storage / "cache"))
    data = data.map(tokenise, batched=True, num_proc=processes, remove_columns=data.column_names)
    data.train_test_split(0.2, seed=17).save_to_disk(str(storage / "mapped"))
    return {"seconds": time.perf_counter() - started, "rows_kept": len(data)}


def measure(side: str, storage: Path, processes: int) -> dict[str, Any]:
    """Run one side in a fresh process; its result with the peak memory."""
    command = [sys.executable, __file__, "--side", side, "--storage", str(storage), "--processes", str(processes)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}) as process:
        peak, private = 0, 0
        tree = psutil.Process(process.pid)
        while process.poll() is None:
            total = own = 0
            for one in [tree, *_children(tree)]:
                try:
                    memory = one.memory_full_info()
                except psutil.Error:
                    continue
                total += memory.pss
                own += memory.uss
            peak, private = max(peak, total), max(private, own)
            time.sleep(0.5)
        output = process.stdout.read() if process.stdout else ""
    if process.returncode:
        raise SystemExit(f"{side} failed")
    return {**json.loads(output.strip().splitlines()[-1]), "peak_mib": round(peak / 2**20), "peak_private_mib": round(private / 2**20)}


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.Error:
        return []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--tokenizer", type=Path, help="directory with the tokenizer's files")
    parser.add_argument("--short", action="store_true", help="rows without context, five times as many in the same time: memory by rows")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--only", choices=["ours", "map"])
    parser.add_argument("--repeat", type=int, default=1, help="runs of each side, alternating; medians")
    parser.add_argument("--out", default="")
    parser.add_argument("--side", choices=["ours", "map"], help=argparse.SUPPRESS)
    parser.add_argument("--storage", type=Path, help="folder for the rows and results; default: a temporary one")
    arguments = parser.parse_args()
    if arguments.side:
        result = (ours if arguments.side == "ours" else mapped)(arguments.storage, arguments.processes)
        spent = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        print(json.dumps({**result, "cpu_seconds": round(sum(s.ru_utime + s.ru_stime for s in spent), 2)}))
        return
    if arguments.tokenizer is None:
        parser.error("--tokenizer is required")
    with tempfile.TemporaryDirectory(dir=arguments.storage) as folder:
        storage = Path(folder)
        shutil.copytree(arguments.tokenizer, storage / "tokenizer")
        with open(storage / "rows.jsonl", "w", encoding="utf-8") as file:
            for row in rows(arguments.rows, arguments.short):
                file.write(json.dumps(row) + "\n")
        result: dict[str, Any] = {"rows": arguments.rows, "short": arguments.short, "processes": arguments.processes,
                                  "megabytes": (storage / "rows.jsonl").stat().st_size >> 20}
        sides = ["ours", "map"] if arguments.only is None else [arguments.only]
        turns: list[dict[str, dict[str, Any]]] = []
        for _ in range(arguments.repeat):
            turns.append({})
            for side in sides:
                turns[-1][side] = measure(side, storage, arguments.processes)
                for left in ("runs", "cache", "mapped"):
                    shutil.rmtree(storage / left, ignore_errors=True)
        for side in sides:
            numbers = {k for k, v in turns[0][side].items() if isinstance(v, int | float)}
            result[side] = {k: statistics.median(turn[side][k] for turn in turns) for k in sorted(numbers)}
            result[side]["rows_per_second"] = round(arguments.rows / result[side]["seconds"])
        if len(sides) == 2:
            for name, of in (("speedup", "seconds"), ("cpu_ratio", "cpu_seconds")):  # the second is steadier on a shared machine
                by_turn = [round(turn["map"][of] / turn["ours"][of], 2) for turn in turns]
                result |= {name: statistics.median(by_turn), f"{name}_by_turn": by_turn}
    record({"benchmark": "prepare", **result, "cores": os.cpu_count(), "load": [round(x, 1) for x in os.getloadavg()],
            "versions": versions("datasets", "tokenizers")}, arguments.out)


if __name__ == "__main__":
    main()
