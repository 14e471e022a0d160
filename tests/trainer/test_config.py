"""The configuration: what is refused, and that the refusal names the field, the value and the remedy."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from trainer import config
from trainer.errors import ConfigError, UserError

MINIMAL: dict[str, Any] = {"run": {"name": "a", "model": {"path": "models/m"}, "data": {"sample": True}}}


def document(changes: dict[str, Any]) -> dict[str, Any]:
    """MINIMAL with values set by their place; None removes."""
    result = copy.deepcopy(MINIMAL)
    for place, value in changes.items():
        node = result
        *parents, last = place.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
        if value is None:
            node.pop(last, None)
        else:
            node[last] = value
    return result


@pytest.mark.parametrize(("changes", "field"), [
    ({"run.name": "Upper"}, "run.name"), ({"run.name": "-a"}, "run.name"), ({"run.name": "a" * 37}, "run.name"),
    ({"run.name": "a-"}, "run.name"), ({"run.name": "a\n"}, "run.name"),
    ({"run.model.path": None}, "run.model.name"), ({"run.model.name": "x/y", "run.model.revision": "0" * 40}, "run.model.name"),
    ({"run.model.path": None, "run.model.name": "x/y"}, "run.model.revision"),
    ({"run.model.path": None, "run.model.name": "x/y", "run.model.revision": "main"}, "run.model.revision"),
    ({"run.model.path": "/etc"}, "run.model.path"), ({"run.model.path": "a/../../b"}, "run.model.path"),
    ({"run.model.gguf_file": "../x.gguf"}, "run.model.gguf_file"),
    ({"run.data.path": "rows.txt", "run.data.sample": None}, "run.data.path"),
    ({"run.data.path": "rows.json"}, "run.data"), ({"run.data.sample": None}, "run.data"),
    ({"run.data.name": "a/b", "run.data.sample": None}, "run.data.revision"),
    ({"run.data.columns": {"text": "x"}}, "run.data.columns"), ({"run.data.columns": {"id": 3}}, "run.data.columns.id"),
    ({"run.data.exclude_ids": "/ids"}, "run.data.exclude_ids"),
    ({"run.train.tokens_per_step": 8192}, "run.train.tokens_per_step"),
    ({"run.train.micro_batch_tokens": 256}, "run.train.micro_batch_tokens"),
    ({"run.train.min_learning_rate": 0.1}, "run.train.min_learning_rate"),
    ({"run.train.stop_perplexity": 0.5}, "run.train.stop_perplexity"),
    ({"run.train.learning_rate": float("nan")}, "run.train.learning_rate"),
    ({"run.train.learning_rate": "fast"}, "run.train.learning_rate"),
    ({"run.train.max_steps": True}, "run.train.max_steps"), ({"run.train.max_steps": 1.5}, "run.train.max_steps"),
    ({"run.method.targets": []}, "run.method.targets"), ({"run.method": [1]}, "run.method"),
    ({"run.engine.kind": "deepspeed", "run.engine.shard_group": "node"}, "run.engine.shard_group"),
    ({"run.engine.kind": "deepspeed", "run.engine.float8": "rowwise"}, "run.engine.float8"),
    ({"run.engine.zero_stage": 1, "run.engine.offload": "cpu"}, "run.engine.zero_stage"),
    ({"run.engine.zero_stage": "3"}, "run.engine.zero_stage"),
    ({"run.engine.offload": "nvme"}, "run.engine.offload"),
    ({"run.method.kind": "lora", "run.engine.offload": "cpu"}, "run.engine.offload"),
    ({"run.method.kind": "qlora", "run.engine.kind": "deepspeed"}, "run.engine.kind"),
    ({"resources.min_workers": 2}, "resources.min_workers"), ({"resources.gpus_per_worker": 0.5}, "resources.gpus_per_worker"),
    ({"resources.groups": [{"name": "a", "workers": 3}]}, "resources.groups"),
    ({"resources.groups": [{"name": "a", "workers": 0}]}, "resources.groups.workers"),
    ({"resources.groups": [{"workers": 1}]}, "resources.groups[0].name"),
    ({"resources.groups": [{"name": "a", "gpus": 1}]}, "resources.groups[0].gpus"),
    ({"storage": "relative"}, "storage"), ({"id": "b-0123456789"}, "id"), ({"extra": 1}, "extra"), ({"run": None}, "run"),
])
def test_refused(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config.parse(document(changes))
    assert caught.value.field == field
    assert str(caught.value).startswith(f"{field}: ") and caught.value.remedy.endswith((".", ")"))
    assert isinstance(caught.value, UserError)


def test_defaults_and_round_trip() -> None:
    made = config.parse(MINIMAL)
    assert made.run.engine.checkpointing == "auto" and made.resources.groups == [] and made.run_id == "a"
    assert config.parse(config.to_dict(made)) == made
    assert config.parse(yaml.safe_load(yaml.safe_dump(config.to_dict(made)))) == made


def test_numbers_from_yaml() -> None:
    """YAML 1.1 reads 1e-5 as text, and Helm writes whole numbers as floats."""
    made = config.parse(document({"run.train.learning_rate": "1e-5", "run.train.max_steps": 3.0, "run.train.epochs": 2}))
    assert made.run.train.learning_rate == 1e-5
    assert made.run.train.max_steps == 3 and type(made.run.train.max_steps) is int
    assert made.run.train.epochs == 2.0 and type(made.run.train.epochs) is float


def test_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    assert config.load(str(path), storage=str(tmp_path), id=None).storage == str(tmp_path)
    monkeypatch.setenv("RUN_TEXT", yaml.safe_dump({**MINIMAL, "id": "a-0123456789"}))
    assert config.load("env:RUN_TEXT").run_id == "a-0123456789"
    for bad in ("env:NO_SUCH_VARIABLE", str(tmp_path / "none.yaml")):
        with pytest.raises(ConfigError):
            config.load(bad)
    for text in ("- a\n", "a: [\n", ""):
        path.write_text(text)
        with pytest.raises(ConfigError):
            config.load(str(path))


HEAD = "run: {name: a, model: {path: m}, data: {sample: true}, "
LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join(['*' + a] * 10)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True))


@pytest.mark.parametrize(("content", "field"), [
    (b"\x80", "--config"),  # not UTF-8
    (b"a: " + b"[" * 5000, "--config"), (b"[" * 50_000, "--config"), (b"{a: !!int ''}", "--config"), (b"{a: !!bool x}", "--config"),
    (b"a: 2001-99-99", "--config"), (b"{a: !!timestamp x}", "--config"), (b"x" * ((1 << 20) + 1), "--config"),
    (b"a: " + b"9" * 5000, "--config"), (b"a: 0x" + b"f" * 5000, "a"),
    (b"{}", "run"), (b'{"": 1}', "''"), (b"{1: 2}", "the file"), (b"run: {1: 2}", "run"), (b"{run: 2001-01-01}", "run"),
    (LAUGHS.encode(), "d["), (b"run: &r {name: *r}", "run.name"), (b"run: &r [*r]", "run"),
    (b'{"run": "\\ud800"}', "run"), (b'{"run": {"name": "a\\u0000"}}', "run.name"),
    (f"{HEAD} seed: 1.0e+400}}".encode(), "run.seed"), (f"{HEAD} train: {{epochs: .inf}}}}".encode(), "run.train.epochs"),
    (f"{HEAD} train: {{epochs: inf}}}}".encode(), "run.train.epochs"),
    (f"{HEAD} train: {{max_steps: 9.223372036854776e+18}}}}".encode(), "run.train.max_steps"),
    (f"{HEAD} method: {{alpha: {'9' * 400}}}}}".encode(), "run.method.alpha"),
    (f"{HEAD} model: {{path: m, architecture: &x {{x: *x}}}}}}".encode(), "run.model.architecture"),
])
def test_texts_that_broke_it(tmp_path: Path, content: bytes, field: str) -> None:
    """Found by tests/fuzz/trainer/test_fuzz_config.py, or of that kind: each was an exception without field and remedy, or memory."""
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        config.load(str(path))
    assert caught.value.field.startswith(field) and len(str(caught.value)) < 2000


def test_json_is_read_as_json(tmp_path: Path) -> None:
    """YAML 1.1 reads JSON's 1e-5 and 1E3 as text, which a number of an architecture must not be."""
    path = tmp_path / "run.json"
    path.write_text('{"run": {"name": "a", "model": {"path": "m", "architecture": {"rms_norm_eps": 1e-5}}, "data": {"sample": true},'
                    ' "train": {"learning_rate": 2e-5}}}')
    made = config.load(str(path))
    assert made.run.model.architecture == {"rms_norm_eps": 1e-5} and made.run.train.learning_rate == 2e-5


@pytest.mark.parametrize("changes", [
    {"id": "a/../../../etc"}, {"id": "a" * 48}, {"id": "a-X"},
    {"run.data": {"name": "../../secret", "revision": "0" * 40}}, {"run.data": {"name": "/etc", "revision": "0" * 40}},
    {"run.data": {"name": "a/..", "revision": "0" * 40}}, {"run.data": {"name": "a/b/c", "revision": "0" * 40}},
    {"run.data": {"name": "a/b", "revision": "0" * 40, "subsets": ["../c"]}}, {"run.data": {"path": "../rows.jsonl"}},
    {"run.data": {"path": "/rows.jsonl"}}, {"run.data.exclude_ids": "a/../../ids"},
    {"run.model": {"name": "../m", "revision": "0" * 40}}, {"run.model": {"name": "..", "revision": "0" * 40}},
])
def test_no_name_leads_out_of_the_storage(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        config.parse(document(changes))


def test_every_range_has_a_remedy() -> None:
    """A limit without a remedy would give an error that helps nobody."""
    for kind in vars(config).values():
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            for field in dataclasses.fields(kind):
                if field.metadata.get("limits"):
                    assert field.metadata["remedy"].endswith("."), (kind, field.name)
