"""The stage `evaluate`: the base model and the exported one on the same held-out rows, data-parallel over ranks."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

from trainer.config import Config, to_dict
from trainer.data.shards import TokenShards
from trainer.evaluate.answers import Progress, evaluate_model
from trainer.evaluate.bootstrap import Metric, compare, exp_mean, macro_f1, mean, one_hot
from trainer.evaluate.contamination import contaminated, summary
from trainer.evaluate.decisions import chosen
from trainer.evaluate.rows import CHOICES, Row, held_out, rows_digest, share
from trainer.evaluate.text import repetition, rouge_l, token_f1
from trainer.files import directory_digest, require_manifest, write_json
from trainer.memory import release
from trainer.model.load import DTYPES, load_model
from trainer.paths import RunPaths

FORMAT = 1
"""Version of evaluation.json."""

LOOPING = 0.5
"""Repetition of 4-grams (trainer/evaluate/text.py) from which an answer counts as looping."""

Gather = Callable[[Any], list[Any]]
"""Takes this rank's JSON-able object; returns those of all ranks in rank order, at least on rank 0."""


def gather_torch(value: Any) -> list[Any]:
    """`Gather` over torch.distributed's default group."""
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def load_tuned(paths: RunPaths, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """The exported model, as any user loads it."""
    return AutoModelForCausalLM.from_pretrained(paths.model, dtype=dtype, attn_implementation="sdpa", use_safetensors=True,
                                                trust_remote_code=False).to(device)


def evaluate(config: Config, paths: RunPaths, rank: int = 0, world: int = 1, device: torch.device | str = "cpu",
             gather: Gather | None = None, progress: Progress = lambda done, total, text: None) -> dict[str, Any]:
    """Evaluate base and tuned model, and write evaluation.json on rank 0. Returns its content there, and {} on other ranks.

    Collective: every rank must call it. Needs whole `dataset` and `model` directories (UserError otherwise). Nothing is done again
    if evaluation.json already belongs to this model, these rows and these settings. On a GPU both models compute in the exported
    type, on a CPU in float32.
    """
    started = time.monotonic()
    device = torch.device(device)
    if gather is None:
        gather = gather_torch if world > 1 else lambda value: [value]
    require_manifest(paths.dataset, "prepare")
    manifest = require_manifest(paths.model, "export")
    settings = config.run.evaluation
    rows = held_out(paths.dataset, settings.rows, config.run.seed, config.run.data.decision)
    done_for = {"format": FORMAT, "model_sha256": directory_digest(manifest), "rows_sha256": rows_digest(rows),
                "settings": to_dict(settings)}
    before = read_evaluation(paths)
    if before is not None and before["of"] == done_for:
        return before if rank == 0 else {}

    tokenizer = AutoTokenizer.from_pretrained(paths.model, trust_remote_code=False)
    stop = stop_tokens(paths, rows, tokenizer)
    generate = {row.index for row in rows[:max(settings.generate_rows, settings.samples)]}
    answered, others = ([row for row in rows if (row.index in generate) is side] for side in (True, False))
    mine = share(others, world - 1 - rank, world) + share(answered, rank, world)
    dtype = DTYPES[config.run.export.dtype] if device.type == "cuda" else torch.float32
    results: dict[str, list[dict[str, Any]]] = {}
    loaders: dict[str, Callable[[], PreTrainedModel]] = {
        "base": lambda: load_model(config, device, dtype), "tuned": lambda: load_tuned(paths, device, dtype)}
    for number, (name, load) in enumerate(loaders.items()):
        def advance(done: int, total: int, text: str, number: int = number, name: str = name) -> None:
            progress(done + number * total, 2 * total, f"{name} model: {text}")

        model = load()
        results[name] = evaluate_model(model, tokenizer, mine, generate, settings.max_new_tokens, stop,
                                       config.run.data.decision, advance) if mine else []
        del model
        release()
    flagged = sorted(contaminated(rows, training_texts(paths, tokenizer, rank, world)))
    parts = gather({**results, "flagged": flagged})
    if rank != 0:
        return {}
    merged = {name: {r["index"]: r for part in parts for r in part[name]} for name in ("base", "tuned")}
    document = {
        "of": done_for,
        **summarise(rows, merged["base"], merged["tuned"], generated=settings.generate_rows, resamples=settings.bootstrap,
                    seed=config.run.seed),
        "contamination": summary(rows, {i for part in parts for i in part["flagged"]}),
        "samples": samples(rows[:settings.samples], merged["base"], merged["tuned"]),
        "rows_sha256": done_for["rows_sha256"], "seconds": time.monotonic() - started, "world": world, "device": device.type,
        "dtype": str(dtype).removeprefix("torch."),
    }
    write_json(paths.evaluation, document)
    return document


def read_evaluation(paths: RunPaths) -> dict[str, Any] | None:
    """evaluation.json, or None if there is none that this version reads."""
    try:
        document = json.loads(paths.evaluation.read_text(encoding="utf-8"))
        return document if document["of"]["format"] == FORMAT else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def stop_tokens(paths: RunPaths, rows: Sequence[Row], tokenizer: Any) -> set[int]:
    """Tokens that end an answer: those that end the held-out rows, and the exported model's own."""
    ends = GenerationConfig.from_pretrained(paths.model).eos_token_id
    own = ends if isinstance(ends, list) else [ends]
    return {row.target[-1] for row in rows} | {t for t in [*own, tokenizer.eos_token_id] if t is not None}


def training_texts(paths: RunPaths, tokenizer: Any, rank: int, world: int, block: int = 256) -> Iterator[str]:
    """Text of every `world`-th training row from the `rank`-th on, decoded in blocks."""
    shards = TokenShards(paths.dataset, "train")
    mine = range(rank, len(shards), world)
    for start in range(0, len(mine), block):
        yield from tokenizer.batch_decode([shards.row(i)[0].tolist() for i in mine[start:start + block]], skip_special_tokens=True)


def summarise(rows: Sequence[Row], base: dict[int, dict[str, Any]], tuned: dict[int, dict[str, Any]], generated: int, resamples: int,
              seed: int) -> dict[str, Any]:
    """Metrics, differences with intervals and counts from both models' results by row index.

    `generated`: rows (the first ones) whose answers count for the answer metrics.
    """
    def features(model: dict[int, dict[str, Any]], over: Sequence[Row], value: Callable[[Row, dict[str, Any]], float]) -> Any:
        return np.array([[value(row, model[row.index]), 1.0] for row in over])

    def metric(name: str, over: Sequence[Row], value: Callable[[Row, dict[str, Any]], float], lower: bool = False) -> Metric:
        return Metric(name, features(base, over, value), features(tuned, over, value), mean, lower)

    def loss(model: dict[int, dict[str, Any]]) -> Any:
        return np.array([[model[row.index]["loss"], model[row.index]["tokens"]] for row in rows], dtype=float)

    def confusion(model: dict[int, dict[str, Any]], over: Sequence[Row], key: str) -> Any:
        cells = [CHOICES.index(row.decision) * 3 + chosen(model[row.index][key]) for row in over]
        return one_hot(np.array(cells, dtype=np.int64), 9)

    groups = [[Metric("loss", loss(base), loss(tuned), mean, True), Metric("perplexity", loss(base), loss(tuned), exp_mean, True)]]
    if answered := list(rows[:generated]):
        groups.append([metric("token_f1", answered, lambda row, r: token_f1(r["answer"], row.reference)),
                       metric("rouge_l", answered, lambda row, r: rouge_l(r["answer"], row.reference)),
                       metric("looping", answered, lambda row, r: repetition(r["answer"]) >= LOOPING, lower=True),
                       metric("cut", answered, lambda row, r: r["cut"], lower=True),
                       metric("empty", answered, lambda row, r: not r["answer"], lower=True),
                       metric("answer_tokens", answered, lambda row, r: r["answer_tokens"])])
    matrices: dict[str, Any] = {}
    for key, suffix in (("harness", ""), ("own", "_own_prompt")):
        if decided := [row for row in rows if base[row.index][key]]:
            groups.append([metric(f"decision_accuracy{suffix}", decided, partial(_right, key)),
                           Metric(f"macro_f1{suffix}", confusion(base, decided, key), confusion(tuned, decided, key), macro_f1)])
            matrices[f"decisions{suffix}"] = {
                "choices": list(CHOICES), **{name: confusion(model, decided, key).sum(0).reshape(3, 3).astype(int).tolist()
                                             for name, model in (("base", base), ("tuned", tuned))}}
    result: dict[str, Any] = {"rows": len(rows), "tokens": sum(len(row.target) for row in rows), "generated_rows": len(answered),
                              "base": {}, "tuned": {}, "difference": {}, **matrices}
    for group in groups:
        compared = compare(group, resamples, seed)
        for part in ("base", "tuned", "difference"):
            result[part].update(compared[part])
    return finite(result)


def _right(key: str, row: Row, result: dict[str, Any]) -> float:
    """Whether the decision with the greatest score under `key` is the row's."""
    return CHOICES[chosen(result[key])] == row.decision


def finite(value: Any) -> Any:
    """The document with infinite and undefined numbers as None: JSON has no others."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def samples(rows: Sequence[Row], base: dict[int, dict[str, Any]], tuned: dict[int, dict[str, Any]]) -> list[dict[str, Any]]:
    """Questions with the reference and both answers: the first rows of the shuffled order, not chosen by result."""
    return [{"id": row.id, "question": row.question, "context": row.context, "reference": row.reference,
             "decision": row.decision, "base": base[row.index]["answer"], "tuned": tuned[row.index]["answer"],
             "base_cut": base[row.index]["cut"], "tuned_cut": tuned[row.index]["cut"]} for row in rows]
