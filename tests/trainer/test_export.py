"""Export: exact, whole, loadable. Run: python -m pytest tests/trainer/test_export.py"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

from tests.trainer.made_run import ARCHITECTURE, configuration, make_dataset, make_records, rows, tokenizer
from trainer.errors import UserError
from trainer.evaluate.inference import Reader as Asker
from trainer.export import TensorReader, export, not_finite, plan_files
from trainer.files import directory_digest, read_manifest
from trainer.model.load import load_model
from trainer.paths import RunPaths


def random_model(tied: bool = False, **changes: object) -> LlamaForCausalLM:
    torch.manual_seed(9)
    return LlamaForCausalLM(LlamaConfig(**{**ARCHITECTURE, "tie_word_embeddings": tied, **changes})).eval()


def logits(model: LlamaForCausalLM) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.arange(3, 40)[None]).logits


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shard_gb", [5.0, 0.00002])
def test_full_model_is_what_was_trained(tmp_path: Path, tied: bool, shard_gb: float) -> None:
    config = configuration(tmp_path, model={"architecture": {**ARCHITECTURE, "tie_word_embeddings": tied}},
                           export={"shard_size_gb": shard_gb})
    paths, model = RunPaths.of(config), random_model(tied)
    progress: list[float] = []
    manifest = export(config, paths, TensorReader(dict(model.named_parameters())), tokenizer("instruction"), progress.append)
    assert read_manifest(paths.model, hashes=True) == manifest and progress[-1] == 1 and manifest["not_finite"] == 0
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(paths.model)), logits(model))
    files = sorted(p.name for p in paths.model.glob("*.safetensors"))
    names = [n for f in files for n in safe_open(paths.model / f, "pt").keys()]  # noqa: SIM118
    assert sorted(names) == sorted(n for n, _ in model.named_parameters())  # tied embeddings once
    assert ("lm_head.weight" in names) is not tied
    if shard_gb < 1:
        index = json.loads((paths.model / "model.safetensors.index.json").read_text())
        assert len(files) > 3 and set(index["weight_map"]) == set(names)
        assert index["metadata"]["total_size"] == manifest["bytes"] == sum(p.numel() * 4 for p in model.parameters())
        assert all((paths.model / f).stat().st_size <= 20_000 + 4096 or len(safe_open(paths.model / f, "pt").keys()) == 1 for f in files)
    else:
        assert files == ["model.safetensors"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_counted(dtype: torch.dtype, value: float) -> None:
    tensor = torch.randn(40, 30).to(dtype)
    assert not_finite(tensor) == 0 == not_finite(torch.empty(0, dtype=dtype))
    tensor[3, 7] = tensor[39, 29] = value
    assert not_finite(tensor) == 2


def test_dtype_and_limits_of_float16(tmp_path: Path) -> None:
    config = configuration(tmp_path, export={"dtype": "bfloat16"})
    paths, model = RunPaths.of(config), random_model()
    export(config, paths, TensorReader(dict(model.named_parameters())), tokenizer("instruction"))
    loaded = AutoModelForCausalLM.from_pretrained(paths.model)
    assert loaded.dtype == torch.bfloat16
    for name, parameter in model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter.bfloat16())
    with torch.no_grad():
        model.model.norm.weight[0] = 1e6
    half = configuration(tmp_path, export={"dtype": "float16"})
    with pytest.raises(UserError, match="bfloat16"):
        export(half, paths, TensorReader(dict(model.named_parameters())), tokenizer("instruction"))
    assert read_manifest(paths.model)["dtype"] == "bfloat16"  # the old one is still whole


def test_adapters_are_merged_as_peft_merges(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    config = configuration(tmp_path, method={"kind": "lora", "rank": 4, "alpha": 12.0})
    paths, made = RunPaths.of(config), tokenizer("instruction")
    base = load_model(config, tokens=len(made))
    adapted = get_peft_model(base, LoraConfig(r=4, lora_alpha=12, target_modules="all-linear", task_type="CAUSAL_LM"))
    torch.manual_seed(1)
    trained = {}
    for name, parameter in adapted.named_parameters():
        if ".lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
            trained[name.removeprefix("base_model.model.").replace(".default.", ".")] = parameter.detach().clone()
    assert len(trained) == 2 * 7 * 2
    export(config, paths, TensorReader(trained), made)
    with torch.inference_mode():
        expected = adapted.eval()(torch.arange(3, 40)[None]).logits
    got = logits(AutoModelForCausalLM.from_pretrained(paths.model))
    torch.testing.assert_close(got, expected, atol=2e-4, rtol=1e-4)
    assert (got - logits(load_model(config, tokens=len(made)).eval())).abs().max() > 0.1  # the adapters do something


@pytest.mark.parametrize("tied", [False, True])
def test_new_rows_of_adapters(tmp_path: Path, tied: bool) -> None:
    architecture = {**ARCHITECTURE, "vocab_size": 384, "tie_word_embeddings": tied}
    config = configuration(tmp_path, model={"architecture": architecture}, method={"kind": "lora", "rank": 2}, data={"format": "tags"})
    paths, made = RunPaths.of(config), tokenizer("tags")
    base = load_model(config, tokens=len(made) + 8)
    made.add_tokens([f"extra-{i}" for i in range(8)])
    added = base.config.vocab_size - 384
    assert added > 0
    rows_ = torch.randn(added, 32)
    trained = {"model.embed_tokens.new_rows": rows_} | ({} if tied else {"lm_head.new_rows": rows_ * 2})
    export(config, paths, TensorReader(trained), made)
    loaded = AutoModelForCausalLM.from_pretrained(paths.model)
    assert torch.equal(loaded.model.embed_tokens.weight[384:], rows_)
    assert torch.equal(loaded.lm_head.weight[384:], rows_ if tied else rows_ * 2)
    assert torch.equal(loaded.model.embed_tokens.weight[:384], base.model.embed_tokens.weight[:384])
    if not tied:
        with pytest.raises(UserError, match="not tied"):
            export(config, paths, TensorReader({"model.embed_tokens.new_rows": rows_}), made)


@pytest.mark.parametrize("format", ["instruction", "tags", "tags-context", "chat"])
def test_the_directory_says_how_to_ask(tmp_path: Path, format: str) -> None:
    config = configuration(tmp_path, data={"format": format})
    paths, made = RunPaths.of(config), tokenizer(format)
    model = random_model()
    export(config, paths, TensorReader(dict(model.named_parameters())), made)
    prompt, loaded = json.loads((paths.model / "prompt.json").read_text()), AutoTokenizer.from_pretrained(paths.model)
    assert loaded.get_vocab() == made.get_vocab() and loaded.chat_template == made.chat_template
    from trainer.data.formats import encode, template

    form = template(format, made)
    asked = prompt["without_context"].replace("{question}", "Why?")
    if prompt["chat"]:
        asked = loaded.apply_chat_template([{"role": "user", "content": asked}], tokenize=False, add_generation_prompt=True)
    assert asked == form.prompt("Why?")
    assert (prompt["with_context"] is None) == (format == "tags")
    ends = GenerationConfig.from_pretrained(paths.model).eos_token_id
    assert encode(made, form.end)[0] in ends and loaded.eos_token_id in ends
    assert prompt["stop"][0] == form.end[:len(prompt["stop"][0])] and prompt["decision"]["words"] == ["yes", "no", "maybe"]
    assert AutoConfig.from_pretrained(paths.model).use_cache is True
    answer = Asker(AutoModelForCausalLM.from_pretrained(paths.model)).model.generate(
        torch.tensor([encode(loaded, asked)]), max_new_tokens=2, pad_token_id=loaded.pad_token_id)
    assert answer.shape[1] <= len(encode(loaded, asked)) + 2


def test_checkpoints_of_other_models_are_refused(tmp_path: Path) -> None:
    config = configuration(tmp_path)
    paths, made = RunPaths.of(config), tokenizer("instruction")
    whole = dict(random_model().named_parameters())
    for change, message in (({"model.norm.weight": None}, r"lacks model\.norm\.weight"), ({"other": torch.ones(1)}, "unknown tensor other"),
                            ({"model.norm.weight": torch.ones(31)}, r"shape \[31\]")):
        tensors = {k: v for k, v in {**whole, **change}.items() if v is not None}
        with pytest.raises(UserError, match=message):
            export(config, paths, TensorReader(tensors), made)
    adapters = configuration(tmp_path, method={"kind": "lora"})
    with pytest.raises(UserError, match="lacks any adapter"):
        export(adapters, paths, TensorReader({}), made)
    with pytest.raises(UserError, match="unknown tensor"):
        export(adapters, paths, TensorReader({"model.layers.9.self_attn.q_proj.lora_A.weight": torch.ones(2, 2)}), made)
    assert not paths.model.exists() and not list(paths.root.glob(".model*"))


def test_files_are_planned_within_the_limit() -> None:
    shapes = {"a": (10,), "b": (10,), "c": (50,), "d": (1,), "e": (19,)}
    assert plan_files(shapes, 2, 40) == [["a", "b"], ["c"], ["d", "e"]]
    assert plan_files(shapes, 2, 1) == [["a"], ["b"], ["c"], ["d"], ["e"]]


def test_model_card(tmp_path: Path) -> None:
    config = configuration(tmp_path)
    paths = RunPaths.of(config)
    make_dataset(config, paths, rows(5), rows(2, 2))
    make_records(paths, config)
    manifest = export(config, paths, TensorReader(dict(random_model().named_parameters())), tokenizer("instruction"))
    card = (paths.model / "README.md").read_text()
    for expected in ("license: apache-2.0", "train: 5 rows", "2 empty answer", "120 steps", "Not for medical advice",
                     "learning_rate: 1.0e-05"):
        assert expected in card
    without = {**manifest, "files": {k: v for k, v in manifest["files"].items() if k != "README.md"}}
    assert directory_digest(manifest) == directory_digest(without)
    changed = {**manifest, "files": {**manifest["files"], "config.json": {"size": 1, "sha256": "0"}}}
    assert directory_digest(manifest) != directory_digest(changed)
