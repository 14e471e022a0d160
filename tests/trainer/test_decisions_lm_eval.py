"""Decisions agree with lm-evaluation-harness's own task `pubmedqa`, score by score."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from tests.trainer.made_run import ARCHITECTURE, rows, tokenizer
from trainer.evaluate.answers import evaluate_model
from trainer.evaluate.decisions import chosen
from trainer.evaluate.rows import CHOICES, Row


def task_config(documents: Path) -> dict[str, Any]:
    """The task as lm-eval ships it, reading its documents from a file."""
    import lm_eval

    directory = Path(lm_eval.__file__).parent / "tasks/pubmedqa"
    text = re.sub(r"!function \S+", "replaced", (directory / "pubmedqa.yaml").read_text())
    spec = importlib.util.spec_from_file_location("preprocess_pubmedqa", directory / "preprocess_pubmedqa.py")
    assert spec is not None and spec.loader is not None
    functions = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(functions)
    config = yaml.safe_load(text) | {"doc_to_text": functions.doc_to_text, "dataset_path": "json", "dataset_name": None,
                                     "dataset_kwargs": {"data_files": {"test": str(documents)}}, "training_split": None,
                                     "validation_split": None, "test_split": "test"}
    assert config["doc_to_choice"] == list(CHOICES) and config["output_type"] == "multiple_choice"
    return config


@pytest.mark.parametrize("longest", [512, 60])
def test_every_score_agrees(tmp_path: Path, longest: int) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.models.huggingface import HFLM

    torch.manual_seed(5)
    model = LlamaForCausalLM(LlamaConfig(**{**ARCHITECTURE, "max_position_embeddings": longest})).eval()
    made, documents = tokenizer("instruction"), rows(24, 3)
    with open(tmp_path / "test.jsonl", "w") as file:
        for d in documents:
            document = {"QUESTION": d["question"], "CONTEXTS": d["context"].split("\n"), "final_decision": d["decision"]}
            file.write(json.dumps(document) + "\n")
    task = ConfigurableTask(config=task_config(tmp_path / "test.jsonl"))
    result = simple_evaluate(model=HFLM(pretrained=model, tokenizer=made, device="cpu", batch_size=4, max_length=longest), tasks=[task],
                             log_samples=True, bootstrap_iters=0)
    theirs = [[answer[0][0] for answer in s["resps"]] for s in sorted(result["samples"]["pubmedqa"], key=lambda s: s["doc_id"])]

    own = [Row(index=i, **d, reference=d["answer"], prompt=[5], target=[6]) for i, d in enumerate(documents)]
    ours = [r["harness"] for r in evaluate_model(model, made, own, set(), 1, {1}, True)]
    for a, b in zip(ours, theirs, strict=True):
        assert a == pytest.approx(b, abs=1e-4)
    accuracy = sum(CHOICES[chosen(s)] == d["decision"] for s, d in zip(ours, documents, strict=True)) / len(documents)
    assert accuracy == pytest.approx(result["results"]["pubmedqa"]["acc,none"])
    assert len({round(s[0], 3) for s in ours}) > 12  # the scores depend on the rows
