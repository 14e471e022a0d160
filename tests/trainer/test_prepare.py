"""The whole preparation: files, invariants, determinism, restart, duplicates, real rows."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trainer.data import parts, readers
from trainer.data import prepare as module
from trainer.data.formats import encode
from trainer.data.prepare import prepare
from trainer.data.readers import SAMPLE
from trainer.data.shards import TokenShards
from trainer.errors import UserError
from trainer.files import read_manifest
from trainer.paths import RunPaths

ROWS = [json.loads(line) for line in SAMPLE.read_text(encoding="utf-8").splitlines()]
PQAL = Path(__file__).parents[3] / "shared" / "data" / "pubmedqa_labeled_train.json"


def texts(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "test.jsonl").read_text(encoding="utf-8").splitlines()]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("format", ["instruction", "tags", "tags-context", "chat"])
def test_tokens_are_those_of_the_texts(make_config: Callable[..., Any], format: str) -> None:
    from transformers import AutoTokenizer

    config = make_config({"sample": True, "format": format, "max_tokens": 300})
    manifest = prepare(config)
    directory = RunPaths.of(config).dataset
    tokenizer = AutoTokenizer.from_pretrained(directory / "tokenizer")
    test, train = TokenShards(directory, "test"), TokenShards(directory, "train")
    held_out = texts(directory)
    assert len(held_out) == len(test) == manifest["splits"]["test"]["rows"]
    for i, row in enumerate(held_out):
        tokens, start = test.row(i)
        assert tokens[:start].tolist() == encode(tokenizer, row["prompt"])
        assert tokens[start:].tolist() == encode(tokenizer, row["completion"])
        assert row["completion"] == row["reference"] + manifest["end"] and row["reference"].endswith(f"\nDecision: {row['decision']}")
        assert tokens[-1] == tokenizer.eos_token_id and len(tokens) <= 300 and row["question"] in row["prompt"]
    assert (format == "tags") == (manifest["shortened"] == 0), "at 300 tokens of a small vocabulary some contexts must be shortened"
    assert manifest["rows_read"] == 167 and manifest["rows_kept"] + sum(manifest["rejected"].values()) == 167
    assert manifest["splits"]["train"]["tokens"] == int(train.lengths.sum())
    assert manifest["splits"]["train"]["answer_tokens"] == train.loss_tokens(range(len(train)))
    assert train.max_tokens == 300 and read_manifest(directory, hashes=True) == manifest
    assert not list(RunPaths.of(config).root.glob(".dataset*")), "nothing temporary stays"
    assert prepare(config) == manifest


def test_context_is_shortened_to_the_token_at_the_end_of_a_sentence_or_word(make_config: Callable[..., Any], tmp_path: Path) -> None:
    rng = random.Random(0)
    rows = [{"id": str(i), "question": "Does it help?", "answer": "It does help well.",
             "context": " ".join(rng.choice(["alpha", "beta.", "gamma", "delta", "epsilon."]) for _ in range(200))} for i in range(60)]
    write_rows(tmp_path / "r.jsonl", rows)
    config = make_config({"path": "r.jsonl", "max_tokens": 128, "near_duplicates": 1.0})
    manifest = prepare(config)
    assert manifest["shortened"] == 60 and manifest["rows_kept"] == 60
    directory = RunPaths.of(config).dataset
    contexts = {row["id"]: row["context"] for row in rows}
    lengths = np.concatenate([TokenShards(directory, s).lengths for s in ("train", "test")])
    assert lengths.max() <= 128 and lengths.mean() > 110
    for row in texts(directory):
        whole = contexts[row["id"]]
        assert whole.startswith(row["context"]) and whole[len(row["context"])] == " " and row["context"] in row["prompt"]


def test_context_without_room_is_left_out_and_question_and_answer_are_whole(make_config: Callable[..., Any], tmp_path: Path) -> None:
    rows = [{"id": str(i), "question": f"Number {i}: what is the meaning of this rather long question of ours?", "answer": f"It is {i}.",
             "context": "Something long, " * 50} for i in range(40)]
    write_rows(tmp_path / "r.jsonl", rows)
    longest = max(len(r["question"]) for r in rows)
    found = 0
    for max_tokens in range(40, 100, 4):
        data = {"path": "r.jsonl", "max_tokens": max_tokens, "near_duplicates": 1.0, "max_rejected": 1.0}
        config = make_config(data, name=f"t{max_tokens}")
        try:
            manifest = prepare(config)
        except UserError as error:
            assert "too long" in str(error) or "split has no rows" in str(error)  # noqa: PT017
            continue
        found += manifest["context_dropped"]
        assert manifest["shortened"] + manifest["context_dropped"] + manifest["rejected"].get("too long", 0) == 40
        assert all(len(r["question"]) <= longest and r["question"] in r["prompt"] for r in texts(RunPaths.of(config).dataset))
    assert found


def shards_digest(config: Any) -> dict[str, str]:
    manifest = read_manifest(RunPaths.of(config).dataset, hashes=True)
    assert manifest is not None
    return {name: entry["sha256"] for name, entry in manifest["files"].items()}


def test_processes_and_chunks_do_not_change_the_result(make_config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    one = make_config(name="one")
    prepare(one)
    monkeypatch.setattr(readers, "CHUNK_BYTES", 20_000)
    monkeypatch.setattr(module, "POOL_BYTES", 0)
    two = make_config(name="two", resources={"prepare_cpus": 2})
    prepare(two)
    assert shards_digest(one) == shards_digest(two)


def test_several_shards_hold_the_same_rows(make_config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = make_config(name="one"), make_config(name="two")
    prepare(one)
    monkeypatch.setattr(readers, "CHUNK_BYTES", 10_000)
    monkeypatch.setattr(module, "SHARD_TOKENS", 3000)
    manifest = prepare(two)
    assert len(manifest["splits"]["train"]["shards"]) > 3
    a, b = (TokenShards(RunPaths.of(c).dataset, "train") for c in (one, two))
    assert len(a) == len(b) and all(np.array_equal(a.row(i)[0], b.row(i)[0]) for i in range(len(a)))


def test_a_restart_keeps_finished_parts(make_config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    reference = make_config(name="reference")
    prepare(reference)
    monkeypatch.setattr(readers, "CHUNK_BYTES", 10_000)
    config, make, made = make_config(name="again"), parts.make_part, []

    def failing(index: int, chunk: Any) -> Any:
        if len(made) == 4:
            raise KeyboardInterrupt
        made.append(index)
        return make(index, chunk)

    monkeypatch.setattr(parts, "make_part", failing)
    with pytest.raises(KeyboardInterrupt):
        prepare(config)
    work = next(RunPaths.of(config).root.glob(".dataset-parts-*"))
    damaged = parts.names(work, 2)[0]
    damaged.write_bytes(damaged.read_bytes()[:-1])
    monkeypatch.setattr(parts, "make_part", lambda index, chunk: made.append(index) or make(index, chunk))
    prepare(config)
    assert made[:5] == [0, 1, 2, 3, 2] and sorted(set(made)) == list(range(max(made) + 1)) and len(made) == max(made) + 2
    assert shards_digest(config) == shards_digest(reference)


def test_parts_of_another_configuration_are_not_used(make_config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    make = parts.make_part
    monkeypatch.setattr(parts, "make_part", lambda index, chunk: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        prepare(make_config({"sample": True, "max_tokens": 256}))
    monkeypatch.setattr(parts, "make_part", make)
    config = make_config()
    prepare(config)
    assert not list(RunPaths.of(config).root.glob(".dataset-parts-*"))


def test_split_does_not_depend_on_order_or_other_rows(make_config: Callable[..., Any], tmp_path: Path) -> None:
    def held_out(name: str, rows: list[dict[str, Any]], **run: Any) -> set[str]:
        write_rows(tmp_path / f"{name}.jsonl", rows)
        config = make_config({"path": f"{name}.jsonl"}, name=name, **run)
        prepare(config)
        return {row["id"] for row in texts(RunPaths.of(config).dataset)}

    whole = held_out("whole", ROWS)
    assert held_out("reversed", ROWS[::-1]) == whole
    assert held_out("half", ROWS[::2]) == whole & {r["id"] for r in ROWS[::2]}
    assert held_out("seed", ROWS, seed=18) != whole and 15 < len(whole) < 55


def test_rows_without_ids_are_split_by_content(make_config: Callable[..., Any], tmp_path: Path) -> None:
    results = []
    for name, rows in (("a", ROWS), ("b", ROWS[::-1])):
        write_rows(tmp_path / f"{name}.jsonl", [{k: v for k, v in r.items() if k != "id"} for r in rows])
        config = make_config({"path": f"{name}.jsonl"}, name=name)
        prepare(config)
        results.append({row["question"] for row in texts(RunPaths.of(config).dataset)})
    assert results[0] == results[1]


def test_near_duplicates_leave_the_training_split_only(make_config: Callable[..., Any], tmp_path: Path) -> None:
    copies = [{**r, "id": f"copy-{r['id']}", "long_answer": r["long_answer"] + " Further work is needed."} for r in ROWS]
    write_rows(tmp_path / "r.jsonl", ROWS + copies)
    config = make_config({"path": "r.jsonl"})
    manifest = prepare(config)
    held_out = {row["id"].removeprefix("copy-") for row in texts(RunPaths.of(config).dataset)}
    train_questions = 334 - manifest["rejected"]["near duplicate of a held-out row"] - manifest["splits"]["test"]["rows"]
    assert manifest["splits"]["train"]["rows"] == train_questions == 2 * (167 - len(held_out))
    samples = [json.loads(line) for line in (RunPaths.of(config).dataset / "rejects.jsonl").read_text().splitlines()]
    assert samples and all(s["reason"] == "near duplicate of a held-out row" and s["snippet"].startswith("kept: id ") for s in samples)
    loose = make_config({"path": "r.jsonl", "near_duplicates": 1.0}, name="loose")
    assert prepare(loose)["rejected"] == {}


def test_which_duplicate_stays_does_not_depend_on_order(make_config: Callable[..., Any], tmp_path: Path) -> None:
    rows = ROWS[:60] + [{**r, "id": f"x{r['id']}"} for r in ROWS[:60]]
    rows += [{**a, "id": b["id"]} for a, b in zip(ROWS[60:90], ROWS[90:120], strict=True)]
    rows += ROWS[90:120]
    results = []
    for name, order in (("a", rows), ("b", rows[::-1])):
        write_rows(tmp_path / f"{name}.jsonl", order)
        config = make_config({"path": f"{name}.jsonl"}, name=name)
        manifest = prepare(config)
        assert manifest["rejected"]["duplicate row"] == 60 and manifest["rejected"]["duplicate id"] == 30
        results.append(sorted((r["id"], r["question"]) for r in texts(RunPaths.of(config).dataset)))
    assert results[0] == results[1]


def test_duplicates_are_found_over_buckets(make_config: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BUCKET_ROWS", 10)
    copies = [{**r, "id": f"c{r['id']}", "question": r["question"].upper()} for r in ROWS[:50]]
    write_rows(tmp_path / "r.jsonl", ROWS + copies)
    assert prepare(make_config({"path": "r.jsonl"}))["rejected"] == {"duplicate row": 50}


def test_max_rows_and_exclusions(make_config: Callable[..., Any], tmp_path: Path) -> None:
    manifest = prepare(make_config({"sample": True, "max_rows": 60}))
    assert manifest["rows_kept"] == 60 and manifest["rejected"] == {"over max_rows": 107}
    (tmp_path / "ids.txt").write_text("sample-001\nsample-002\nnone\n")
    config = make_config({"sample": True, "exclude_ids": "ids.txt", "max_rejected": 0.0}, name="excluded")
    assert prepare(config)["rejected"] == {"excluded id": 2}


@pytest.mark.parametrize(("keep", "expected"), [(False, {"official test id": 3}), (True, {})])
def test_official_test_rows_are_excluded(make_config: Callable[..., Any], tmp_path: Path, keep: bool, expected: dict[str, int]) -> None:
    ids = ["12377809", "26163474", "19100463"] + [str(i) for i in range(100)]
    document = {i: {"QUESTION": r["question"], "CONTEXTS": r["contexts"], "LONG_ANSWER": r["long_answer"],
                    "final_decision": r["final_decision"]}
                for i, r in zip(ids, ROWS, strict=False)}
    (tmp_path / "ori_pqal.json").write_text(json.dumps(document))
    assert prepare(make_config({"path": "ori_pqal.json", "keep_official_test": keep}))["rejected"] == expected


def test_context_and_decision_can_be_left_out(make_config: Callable[..., Any]) -> None:
    config = make_config({"sample": True, "context": False, "decision": False})
    prepare(config)
    for row in texts(RunPaths.of(config).dataset):
        assert "### Context" not in row["prompt"] and row["context"] == "" and row["reference"] == row["answer"] and row["decision"]


def test_progress_rises_to_one(make_config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "CHUNK_BYTES", 10_000)
    seen: list[tuple[float, str]] = []
    prepare(make_config(), progress=lambda share, message: seen.append((share, message)))
    shares = [share for share, _ in seen]
    assert shares == sorted(shares) and shares[-1] == 1.0 and "rows/s" in seen[0][1]


def test_a_killed_process_is_reported_and_leaves_its_parts(make_config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from concurrent.futures.process import BrokenProcessPool

    monkeypatch.setattr(readers, "CHUNK_BYTES", 20_000)
    monkeypatch.setattr(module, "POOL_BYTES", 0)

    class Pool:
        def __init__(self, *_: Any) -> None: ...
        def __enter__(self) -> Any: return self
        def __exit__(self, *_: object) -> None: ...
        def shutdown(self, **_: Any) -> None: ...
        def submit(self, *_: Any) -> Any: raise BrokenProcessPool

    monkeypatch.setattr(module, "ProcessPoolExecutor", Pool)
    with pytest.raises(UserError, match=r"killed.*Finished parts are kept"):
        prepare(make_config(resources={"prepare_cpus": 2}))


@pytest.mark.skipif(not PQAL.exists(), reason=f"the real PQA-L rows are not at {PQAL} (they are not part of the project)")
@pytest.mark.parametrize("format", ["instruction", "tags"])
def test_real_pqa_l_rows_prepare_without_a_reject(make_config: Callable[..., Any], tmp_path: Path, format: str) -> None:
    (tmp_path / "pqal.json").write_bytes(PQAL.read_bytes())
    config = make_config({"path": "pqal.json", "format": format, "max_tokens": 1024, "max_rejected": 0.0})
    manifest = prepare(config)
    assert manifest["rows_read"] == manifest["rows_kept"] == 500 and manifest["rejected"] == {} and manifest["context_dropped"] == 0
