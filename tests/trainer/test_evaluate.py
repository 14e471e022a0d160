"""The stage `evaluate` on small models. Run: python -m pytest tests/trainer/test_evaluate.py"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.trainer.made_run import configuration, make_dataset, rows
from trainer.config import Config
from trainer.errors import UserError
from trainer.evaluate import run as stage
from trainer.evaluate.contamination import contaminated
from trainer.evaluate.gate import judge
from trainer.evaluate.rows import held_out, rows_digest, share
from trainer.evaluate.text import rouge_l, token_f1
from trainer.export import TensorReader, export
from trainer.model.load import load_model
from trainer.paths import RunPaths


def learn(config: Config, paths: RunPaths, steps: int) -> dict[str, torch.Tensor]:
    """The base model after a few steps on the held-out rows themselves: better than the base for certain."""
    model = load_model(config, tokens=400).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    examples = held_out(paths.dataset, 0, 0, config.run.data.decision)
    for step in range(steps):
        row = examples[step % len(examples)]
        tokens = torch.tensor([row.prompt + row.target])
        labels = tokens.clone()
        labels[:, :len(row.prompt)] = -100
        model(tokens, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {n: p.detach() for n, p in model.named_parameters()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, RunPaths, dict[str, Any]]:
    config = configuration(tmp_path_factory.mktemp("storage"))
    paths = RunPaths.of(config)
    tokenizer = make_dataset(config, paths, rows(8), rows(11, 2))
    export(config, paths, TensorReader(learn(config, paths, 60)), tokenizer)
    return config, paths, stage.evaluate(config, paths)


def test_better_model_is_seen_as_better(finished: tuple[Config, RunPaths, dict[str, Any]]) -> None:
    _, paths, result = finished
    assert result == json.loads(paths.evaluation.read_text())
    assert result["tuned"]["loss"] < result["base"]["loss"] - 0.5
    assert result["difference"]["loss"]["high"] < 0 and result["difference"]["perplexity"]["high"] < 0
    assert result["rows"] == 11 and result["generated_rows"] == 6 and len(result["samples"]) == 3
    assert {"token_f1", "rouge_l", "decision_accuracy", "macro_f1", "decision_accuracy_own_prompt", "looping",
            "cut"} <= result["base"].keys()
    assert sum(map(sum, result["decisions"]["base"])) == 11
    assert result["contamination"] == {"rows": 11, "flagged": 0, "share": 0.0, "ids": []}
    assert judge(result, {"loss": {"better_than_base": True, "confidence": 0.95}, "contamination": "none", "min_rows": 11})["passed"]


def test_loss_is_the_mean_over_answer_tokens(finished: tuple[Config, RunPaths, dict[str, Any]]) -> None:
    config, paths, result = finished
    tuned = stage.load_tuned(paths, torch.device("cpu"), torch.float32)
    for name, model in (("base", load_model(config).eval()), ("tuned", tuned)):
        total, count = 0.0, 0
        for row in held_out(paths.dataset, 0, 0, True):
            tokens = torch.tensor([row.prompt + row.target])
            labels = tokens.clone()
            labels[:, :len(row.prompt)] = -100
            with torch.inference_mode():
                total += model(tokens, labels=labels).loss.item() * len(row.target)
            count += len(row.target)
        assert result[name]["loss"] == pytest.approx(total / count, abs=1e-4)
        assert result[name]["perplexity"] == pytest.approx(np.exp(total / count), rel=1e-3)
    assert result["tokens"] == count


def test_answers_are_those_of_generate(finished: tuple[Config, RunPaths, dict[str, Any]]) -> None:
    config, paths, result = finished
    model = stage.load_tuned(paths, torch.device("cpu"), torch.float32)
    tokenizer = stage.AutoTokenizer.from_pretrained(paths.model)
    answers, order = {}, held_out(paths.dataset, 0, config.run.seed, True)
    for row in order[:6]:
        prompt = torch.tensor([row.prompt])
        out = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False)
        answers[row.id] = tokenizer.decode(out[0, len(row.prompt):], skip_special_tokens=True).strip()
    assert [answers[s["id"]] for s in result["samples"]] == [s["tuned"] for s in result["samples"]]
    assert result["tuned"]["token_f1"] == pytest.approx(np.mean([token_f1(answers[r.id], r.reference) for r in order[:6]]))
    assert result["tuned"]["rouge_l"] == pytest.approx(np.mean([rouge_l(answers[r.id], r.reference) for r in order[:6]]))


def test_ranks_share_the_rows(finished: tuple[Config, RunPaths, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Three ranks one after the other give what one gives; rank 0 comes last, since it needs the others' parts."""
    config, paths, whole = finished
    monkeypatch.setattr(stage, "read_evaluation", lambda paths: None)
    parts: dict[int, Any] = {}
    texts: list[str] = []
    for rank in (1, 2, 0):
        def gather(value: Any, rank: int = rank) -> list[Any]:
            parts[rank] = json.loads(json.dumps(value))
            return [parts[r] for r in sorted(parts)]

        result = stage.evaluate(config, paths, rank, 3, gather=gather,
                                progress=lambda done, total, text: texts.append(f"{done}/{total} {text}"))
        assert rank == 0 or result == {}
    assert [len(parts[r]["base"]) for r in range(3)] == [3, 4, 4]
    for part in ("base", "tuned"):
        assert result[part] == pytest.approx(whole[part], abs=1e-5, rel=1e-5)
    assert result["samples"] == whole["samples"] and result["world"] == 3
    assert texts[0].split()[1:3] == ["base", "model:"] and texts[-1].split()[0].split("/")[0] == texts[-1].split()[0].split("/")[1]


def test_nothing_is_done_twice(finished: tuple[Config, RunPaths, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    config, paths, _ = finished
    written = json.loads(paths.evaluation.read_text())
    monkeypatch.setattr(stage, "load_model", lambda *a: pytest.fail("evaluated again"))
    assert stage.evaluate(config, paths) == written
    other = configuration(Path(config.storage), evaluation={"rows": 5})
    with pytest.raises(pytest.fail.Exception, match="evaluated again"):
        stage.evaluate(other, paths)


def test_special_tokens_and_chat(tmp_path: Path) -> None:
    for format in ("tags", "chat"):
        config = configuration(tmp_path / format, data={"format": format, "decision": format == "chat"},
                               evaluation={"generate_rows": 0, "samples": 2, "max_new_tokens": 3, "bootstrap": 100})
        paths = RunPaths.of(config)
        tokenizer = make_dataset(config, paths, rows(3), rows(4, 2))
        export(config, paths, TensorReader(learn(config, paths, 4)), tokenizer)
        result = stage.evaluate(config, paths)
        assert "token_f1" not in result["base"] and "decision_accuracy_own_prompt" in result["base"] and len(result["samples"]) == 2
        assert all(("Decision" in s["reference"]) is (format == "chat") for s in result["samples"])


def test_rows_without_decisions_or_context(tmp_path: Path) -> None:
    for part, decided in (("decision", False), ("context", True)):
        config = configuration(tmp_path / part, evaluation={"generate_rows": 2, "samples": 1, "max_new_tokens": 2, "bootstrap": 100})
        paths = RunPaths.of(config)
        tokenizer = make_dataset(config, paths, rows(3), [{**r, part: ""} for r in rows(4, 2)])
        export(config, paths, TensorReader(learn(config, paths, 4)), tokenizer)
        result = stage.evaluate(config, paths)
        assert "token_f1" in result["base"]
        assert ("decision_accuracy" in result["base"]) is ("decisions" in result) is decided


def test_copies_in_training_are_flagged(tmp_path: Path) -> None:
    config = configuration(tmp_path)
    paths = RunPaths.of(config)
    test = rows(6, 2)
    training = rows(5)
    training[1] = {**training[1], "question": "  DOES " + test[0]["question"][5:].replace(" in ", "  in\n").upper()}
    training[3] = {**training[3], "context": f"Before. {test[4]['answer'].replace(',', ' -')} After."}
    tokenizer = make_dataset(config, paths, training, test)
    examples = held_out(paths.dataset, 0, 0, True)
    found = [contaminated(examples, stage.training_texts(paths, tokenizer, rank, 2, block=2)) for rank in (0, 1)]
    assert sorted(found[0] | found[1]) == [0, 4]
    assert not contaminated(examples, ["Does", "", "a b c d e f g", *(" ".join(r.question.split()[:7]) for r in examples)])


def test_order_is_the_seeds_and_shares_are_even(tmp_path: Path) -> None:
    config = configuration(tmp_path)
    paths = RunPaths.of(config)
    make_dataset(config, paths, rows(3), rows(9, 2))
    one, two = held_out(paths.dataset, 0, 1, True), held_out(paths.dataset, 0, 2, True)
    assert [r.index for r in one] != [r.index for r in two] and rows_digest(one) == rows_digest(two)
    assert held_out(paths.dataset, 4, 1, True) == one[:4] and rows_digest(one[:4]) != rows_digest(one)
    parts = [share(one, r, 4) for r in range(4)]
    assert sorted(r.index for p in parts for r in p) == list(range(9)) and {len(p) for p in parts} == {2, 3}


def test_missing_parts_are_named(tmp_path: Path) -> None:
    config = configuration(tmp_path)
    paths = RunPaths.of(config)
    with pytest.raises(UserError, match="prepare"):
        stage.evaluate(config, paths)
    make_dataset(config, paths, rows(3), rows(4, 2))
    with pytest.raises(UserError, match="export"):
        stage.evaluate(config, paths)
    (paths.dataset / "test.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match="1 rows, the test shards have 4"):
        held_out(paths.dataset, 0, 0, True)


def test_a_model_of_undefined_numbers_fails_the_gate(finished: tuple[Config, RunPaths, dict[str, Any]], tmp_path: Path) -> None:
    config = configuration(tmp_path, evaluation={"generate_rows": 2, "samples": 1, "max_new_tokens": 2, "bootstrap": 100})
    paths = RunPaths.of(config)
    tokenizer = make_dataset(config, paths, rows(3), rows(4, 2))
    weights = learn(config, paths, 1)
    weights["model.norm.weight"] = torch.full((32,), float("nan"))
    assert export(config, paths, TensorReader(weights), tokenizer)["not_finite"] == 32
    result = stage.evaluate(config, paths)
    assert result["tuned"]["loss"] is None and result["difference"]["loss"]["mean"] is None
    verdict = judge(result, {"loss": {"better_than_base": True, "confidence": 0.95}})
    assert not verdict["passed"] and "not a finite number" in verdict["reasons"][0]
