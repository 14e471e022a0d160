"""The base model: streamed from safetensors, refused when pickled, resized, tied, by random initialisation."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from tests.trainer.engine_cases import ARCHITECTURE
from trainer.config import Config, parse
from trainer.errors import UserError
from trainer.model.load import (
    MemoryWeights,
    RandomWeights,
    ResizedWeights,
    SafetensorsWeights,
    load_model,
    model_config,
    open_weights,
    resized_vocabulary,
)


def config_for(storage: Path, **model: Any) -> Config:
    return parse({"run": {"name": "t", "seed": 3, "model": {"path": "models/base", "dtype": "float32", **model}, "data": {"sample": True}},
                  "storage": str(storage)})


def saved(storage: Path, tied: bool = False, shard: str = "1GB") -> LlamaForCausalLM:
    torch.manual_seed(1)
    model = LlamaForCausalLM(LlamaConfig(**ARCHITECTURE, tie_word_embeddings=tied))
    model.save_pretrained(storage / "models" / "base", max_shard_size=shard)
    return model


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shard", ["1GB", "20KB"])
def test_loads_what_was_saved(tmp_path: Path, tied: bool, shard: str) -> None:
    """From one file and from several with an index; tied embeddings stay one tensor; the rotary buffers are there."""
    expected = saved(tmp_path, tied, shard)
    model = load_model(config_for(tmp_path))
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    ids = torch.arange(10)[None]
    assert torch.equal(model(input_ids=ids).logits, expected(input_ids=ids).logits)


@pytest.mark.parametrize("tied", [False, True])
def test_new_rows_are_the_mean(tmp_path: Path, tied: bool) -> None:
    base = saved(tmp_path, tied)
    rows = ARCHITECTURE["vocab_size"]
    model = load_model(config_for(tmp_path), tokens=rows + 3)
    for name in ("model.embed_tokens", "lm_head"):
        weight, old = model.get_submodule(name).weight, base.get_submodule(name).weight
        assert weight.shape[0] == resized_vocabulary(rows, rows + 3) == 56
        assert torch.equal(weight[:rows], old)
        assert torch.allclose(weight[rows:], old.mean(0).expand(56 - rows, -1), atol=1e-6)
    assert model.config.vocab_size == 56


def test_a_smaller_tokenizer_changes_nothing(tmp_path: Path) -> None:
    saved(tmp_path)
    assert model_config(config_for(tmp_path), tokens=10).vocab_size == ARCHITECTURE["vocab_size"]


def test_ranges_are_parts_of_the_whole() -> None:
    """Any range of any source is that part of the tensor, also across a resize's border and a random block's."""
    whole = torch.randn(7, 5)
    sources = [(MemoryWeights({"model.embed_tokens.weight": whole}), whole)]
    resized = ResizedWeights(sources[0][0], 10)
    sources.append((resized, torch.cat([whole, whole.mean(0).expand(3, 5)])))
    random = RandomWeights({"model.embed_tokens.weight": (7, 5)}, seed=1, std=0.02, block=8)
    sources.append((random, random.read("model.embed_tokens.weight", 0, 35).view(7, 5)))
    for source, expected in sources:
        flat = expected.reshape(-1)
        for start in range(0, len(flat), 3):
            for stop in range(start + 1, len(flat) + 1, 4):
                assert torch.allclose(source.read("model.embed_tokens.weight", start, stop), flat[start:stop], atol=1e-6), (start, stop)


def test_safetensors_ranges(tmp_path: Path) -> None:
    whole = {"a.weight": torch.randn(6, 4).bfloat16(), "norm.weight": torch.randn(9)}
    save_file(whole, tmp_path / "model.safetensors")
    source = SafetensorsWeights(tmp_path)
    assert source.shapes == {"a.weight": (6, 4), "norm.weight": (9,)}
    assert torch.equal(source.read("a.weight", 3, 17), whole["a.weight"].reshape(-1)[3:17])
    assert torch.equal(source.read("norm.weight", 2, 5), whole["norm.weight"][2:5])


def test_random_initialisation_depends_on_the_seed_alone(tmp_path: Path) -> None:
    config = config_for(tmp_path, architecture=ARCHITECTURE)
    first, second = load_model(config), load_model(config)
    assert torch.equal(first.lm_head.weight, second.lm_head.weight)
    assert not torch.equal(first.lm_head.weight, first.model.embed_tokens.weight)
    assert first.model.layers[1].mlp.up_proj.weight.std().item() == pytest.approx(ARCHITECTURE["initializer_range"], rel=0.05)
    assert (first.model.norm.weight == 1).all()


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    model = saved(tmp_path)
    directory = tmp_path / "models" / "base"
    (directory / "model.safetensors").unlink()
    torch.save(model.state_dict(), directory / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"Pickled weights .pytorch_model\.bin. are not loaded"):
        load_model(config_for(tmp_path))


def change(directory: Path, **fields: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize(("fields", "message"), [
    ({"model_type": "gpt2"}, "only Llama models"), ({"intermediate_size": 96}, "has the shape"),
    ({"num_hidden_layers": 3}, "lack model.layers.2"),
    ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "unquantised")])
def test_a_model_that_does_not_fit_its_config(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    saved(tmp_path)
    change(tmp_path / "models" / "base", **fields)
    with pytest.raises(UserError, match=message):
        load_model(config_for(tmp_path))


def test_code_of_a_repository_is_not_run(tmp_path: Path) -> None:
    saved(tmp_path)
    directory = tmp_path / "models" / "base"
    (directory / "own.py").write_text("raise SystemExit('code was run')\n")
    change(directory, model_type="own", auto_map={"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"})
    with pytest.raises(UserError, match="no usable model configuration"):
        load_model(config_for(tmp_path))


@pytest.mark.parametrize("content", [
    (1 << 60).to_bytes(8, "little") + b"{}", (200_000_000).to_bytes(8, "little") + bytes(64), b"", b"\x00" * 7,
    (9000).to_bytes(8, "little") + b"[" * 9000,
    (74).to_bytes(8, "little") + b'{"model.norm.weight":{"dtype":"F32","shape":[9],"data_offsets":[0,99999]}}'])
def test_headers_of_weights_are_bounded(tmp_path: Path, content: bytes) -> None:
    saved(tmp_path)
    (tmp_path / "models" / "base" / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"is not a readable safetensors file .* Copy the model again"):
        load_model(config_for(tmp_path))


@pytest.mark.parametrize("index", ["[]", "{", '{"weight_map": 1}', "[" * 9000])
def test_an_index_that_is_none(tmp_path: Path, index: str) -> None:
    saved(tmp_path)
    (tmp_path / "models" / "base" / "model.safetensors.index.json").write_text(index)
    with pytest.raises(UserError, match=r"index.json is not readable"):
        load_model(config_for(tmp_path))


@pytest.mark.parametrize("name", ["../../secret.safetensors", "/etc/hostname"])
def test_an_index_names_files_of_the_model_alone(tmp_path: Path, name: str) -> None:
    saved(tmp_path)
    (tmp_path / "secret.safetensors").write_bytes((tmp_path / "models" / "base" / "model.safetensors").read_bytes())
    (tmp_path / "models" / "base" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    with pytest.raises(UserError, match="lacks"):
        load_model(config_for(tmp_path))


def test_nothing_loads_pickles_or_code() -> None:
    """Every place that loads says so itself: no default of a library decides it."""
    import trainer

    root = Path(trainer.__file__).parents[1]
    calls = []
    for path in (*root.glob("trainer/**/*.py"), *root.glob("chatbot/**/*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            given = {keyword.arg: keyword.value for keyword in call.keywords}
            where, name = f"{path.name}:{call.lineno}", call.func.attr
            assert (name, getattr(call.func.value, "id", "")) not in (("load", "torch"), ("load", "pickle"), ("loads", "pickle")), where
            if name == "from_pretrained" and getattr(call.func.value, "id", "").startswith("Auto"):
                calls.append(where)
                assert isinstance(given.get("trust_remote_code"), ast.Constant) and given["trust_remote_code"].value is False, where
    assert len(calls) >= 6


def test_missing_directory(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"run.model.path: 'models/base' is not usable. There is no directory"):
        load_model(config_for(tmp_path))


def test_unknown_architecture_field_and_weights_of_a_resized_model(tmp_path: Path) -> None:
    config = config_for(tmp_path, architecture={**ARCHITECTURE, "num_attention_heads": 5})
    with pytest.raises(UserError, match="architecture"):
        model_config(config)
    good = config_for(tmp_path, architecture=ARCHITECTURE)
    assert open_weights(good, model_config(good, 53)).shapes["lm_head.weight"] == (56, ARCHITECTURE["hidden_size"])
