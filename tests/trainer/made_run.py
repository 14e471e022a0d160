"""A small run directory made by hand: tokenizer, dataset, base model, metrics and samples. For the tests of evaluation and report."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from trainer.config import Config, parse, to_dict
from trainer.data import formats
from trainer.data.shards import shard_name, write_shard
from trainer.files import write_directory
from trainer.model.tokenizer import with_format
from trainer.paths import RunPaths

ARCHITECTURE = {"vocab_size": 400, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
                "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.2}
CHAT = ("{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}")
DEVICE = "NVIDIA H100 80GB HBM3"
"""Of both workers, each on a node of its own."""
SUBJECTS = ["aspirin", "exercise", "vitamin D", "surgery", "screening", "metformin", "sleep", "coffee", "β-blockers", "physiotherapy"]
OUTCOMES = ["mortality", "pain", "blood pressure", "recovery", "quality of life", "length of stay", "relapse", "falls"]


def configuration(storage: Path, **run: Any) -> Config:
    """A run on a random model; keyword arguments replace parts of `run`."""
    document: dict[str, Any] = {
        "name": "made", "model": {"path": "models/made", "architecture": ARCHITECTURE, "dtype": "float32", "licence": "apache-2.0"},
        "data": {"sample": True, "format": "instruction", "max_tokens": 256},
        "evaluation": {"generate_rows": 6, "max_new_tokens": 8, "samples": 3, "bootstrap": 200},
        "train": {"tokens_per_step": 512, "micro_batch_tokens": 256}, "export": {"dtype": "float32"}}
    for key, value in run.items():
        document[key] = {**document[key], **value} if isinstance(value, dict) and key in document else value
    return parse({"run": document, "storage": str(storage), "id": "made-0123456789"})


def rows(count: int, seed: int = 1) -> list[dict[str, str]]:
    """Rows in the form of test.jsonl (without prompt and completion), each question once."""
    rng = random.Random(seed)
    made = []
    for i in range(count):
        subject, outcome, decision = rng.choice(SUBJECTS), rng.choice(OUTCOMES), rng.choice(["yes", "yes", "no", "maybe"])
        made.append({"id": f"row-{seed}-{i}", "question": f"Does {subject} change {outcome} in cohort {seed}-{i} of older adults?",
                     "context": f"We followed {rng.randrange(50, 900)} patients with {subject}.\nMeasured was {outcome} after one year.",
                     "answer": f"In cohort {seed}-{i}, {subject} {'did' if decision == 'yes' else 'did not'} change {outcome}.",
                     "decision": decision})
    return made


def tokenizer(format: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE of fewer than 400 tokens, with the format's special tokens."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    core.train_from_iterator([json.dumps(r, ensure_ascii=False) for r in rows(60)], trainers.BpeTrainer(
        vocab_size=380, special_tokens=["<s>", "</s>", "<|user|>", "<|assistant|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    made = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", chat_template=CHAT)
    return with_format(made, format)  # type: ignore[return-value]


def make_dataset(config: Config, paths: RunPaths, train: list[dict[str, str]], test: list[dict[str, str]]) -> PreTrainedTokenizerFast:
    """The directory that `prepare` would write from these rows."""
    data, made = config.run.data, tokenizer(config.run.data.format)
    template = formats.template(data.format, made)

    def fill(directory: Path) -> dict[str, Any]:
        splits = {}
        for name, split in (("train", train), ("test", test)):
            tokens, starts, documents = [], [], []
            for row in split:
                prompt = template.prompt(row["question"], row["context"] if data.context else "")
                completion = template.completion(row["answer"], row["decision"] if data.decision else "")
                head, tail = formats.encode(made, prompt), formats.encode(made, completion)
                tokens.append(np.array(head + tail, dtype=np.int32))
                starts.append(len(head))
                documents.append({**row, "prompt": prompt, "completion": completion})
            splits[name] = write_shard(directory / shard_name(name, 0), tokens, starts, 0, data.max_tokens)
            if name == "test":
                (directory / "test.jsonl").write_text("".join(json.dumps(d, ensure_ascii=False) + "\n" for d in documents))
        made.save_pretrained(directory / "tokenizer")
        return {"rows_read": len(train) + len(test) + 3, "rows_kept": len(train) + len(test), "splits": splits,
                "rejected": {"empty answer": 2, "duplicate": 1}}

    write_directory(paths.dataset, fill)
    return made


def make_records(paths: RunPaths, config: Config, steps: int = 120, nodes: int = 2, gpus: bool = False) -> None:
    """run.yaml, metrics.jsonl, network.csv and gpu.csv as a run leaves them."""
    rng = random.Random(4)
    paths.root.mkdir(parents=True, exist_ok=True)
    paths.config.write_text(yaml.safe_dump(to_dict(config), sort_keys=False))
    start, lines = 1_790_000_000.0, []
    for step in range(1, steps + 1):
        line = {"step": step, "epoch": step / steps, "loss": 1.9 + 1.3 * math.exp(-step / 25) + rng.gauss(0, 0.06),
                "lr": 2e-5 * min(1, step / 6) * (0.5 + 0.5 * math.cos(math.pi * step / steps)), "grad_norm": 1 + rng.random(),
                "tokens": 4096, "rows": 11, "tokens_per_second": 820 + rng.gauss(0, 30), "samples_per_second": 2.2, "mfu": None,
                "seconds": {"data": 0.01, "forward_backward": 4.6, "optimizer": 0.3, "checkpoint": 0.02}, "time": start + 5 * step}
        if step % 5 == 0:
            fast, wait = (2048, 9.0) if step <= 10 else (2752, 1.0)  # the second worker is slower; tokens are dealt anew after step 10
            line["workers"] = {"steps": 5, "seconds": 25.0, "layout": [{"device": DEVICE, "workers": 2, "node_workers": 1}], "ranks": [
                {"micro_batches": 1, "micro_batch_tokens": fast, "tokens": 5 * fast, "compute": 23.0 - wait, "wait": wait},
                {"micro_batches": 1, "micro_batch_tokens": 4096 - fast, "tokens": 5 * (4096 - fast), "compute": 23.0, "wait": 0.0}]}
        if step % 30 == 0:
            line |= {"eval_loss": 1.95 + 1.1 * math.exp(-step / 30), "perplexity": math.exp(1.95 + 1.1 * math.exp(-step / 30))}
        lines.append(json.dumps(line))
    paths.metrics.write_text("\n".join(lines) + "\n")
    names = [f"llm-finetune-worker-{n}" for n in range(nodes)]
    with open(paths.network, "w") as file:
        file.write("time,node,interface,rx_bytes_per_s,tx_bytes_per_s\n")
        for second in range(5 * steps):
            for n, node in enumerate(names):
                file.write(f"{start + second},{node},lo,9e12,9e12\n")
                for interface in ("eth0", "veth12ab"):
                    received, sent = abs(rng.gauss(6e7, 3e7)) * (n + 1), abs(rng.gauss(5e7, 3e7))
                    file.write(f"{start + second},{node},{interface},{received:.0f},{sent:.0f}\n")
    if gpus:
        with open(paths.gpu, "w") as file:
            file.write("time,node,gpu,utilisation,memory_bytes,power_w,sm_clock_mhz\n")
            for second in range(5 * steps):
                for node in names:
                    for gpu in range(2):
                        busy, power = min(100, rng.gauss(92, 5)), rng.gauss(610, 20)
                        file.write(f"{start + second},{node},{gpu},{busy:.0f},{6.1e10 + gpu * 1e9:.0f},{power:.0f},1700\n")
