"""Loading a run's tokenizer."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from trainer.config import parse
from trainer.data.formats import SPECIAL_TOKENS
from trainer.errors import UserError
from trainer.model.tokenizer import load_tokenizer, tokenizer_sha256, with_format


@pytest.mark.parametrize("format", SPECIAL_TOKENS)
def test_loaded_with_the_formats_tokens_and_saved_whole(make_config: Any, tmp_path: Path, format: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = load_tokenizer(make_config({"sample": True, "format": format}))
    added = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}
    assert set(SPECIAL_TOKENS[format]) <= added and {"<|endoftext|>", "<|im_start|>", "<|im_end|>"} <= added
    tokenizer.save_pretrained(tmp_path / "saved")
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert tokenizer_sha256(again) == tokenizer_sha256(tokenizer) and again.chat_template == tokenizer.chat_template


def test_formats_have_different_digests(tiny_tokenizer: Any) -> None:
    before = tokenizer_sha256(tiny_tokenizer)
    assert tokenizer_sha256(with_format(tiny_tokenizer, "tags")) != before


def test_missing_directory_file_and_damaged_tokenizer_are_named(make_config: Any, tmp_path: Path) -> None:
    make_config()

    def config(**model: Any) -> Any:
        return parse({"run": {"name": "t", "model": model, "data": {"sample": True}}, "storage": str(tmp_path)})

    with pytest.raises(UserError, match=r"run.model.path: .*/models/none does not exist"):
        load_tokenizer(config(path="models/none"))
    with pytest.raises(UserError, match="gguf_file"):
        load_tokenizer(config(path="models/tiny", gguf_file="model.gguf"))
    (tmp_path / "models/tiny/tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"cannot be loaded.*tokenizer.json"):
        load_tokenizer(config(path="models/tiny"))
    (tmp_path / "models/empty").mkdir()
    with pytest.raises(UserError):
        load_tokenizer(config(path="models/empty"))


def test_hub_model_that_cannot_be_had_names_the_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    config = parse({"run": {"name": "t", "model": {"name": "owner/gated", "revision": "0" * 40}, "data": {"sample": True}},
                    "storage": str(tmp_path)})
    with pytest.raises(UserError, match=r"owner/gated cannot be loaded.*HF_TOKEN in the environment \(it is not set\)"):
        load_tokenizer(config)


def test_tokenizer_without_end_is_refused(make_config: Any, tmp_path: Path) -> None:
    config = make_config()
    path = tmp_path / "models/tiny/tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings["eos_token"] = None
    path.write_text(json.dumps(settings))
    with pytest.raises(UserError, match="end-of-sequence"):
        load_tokenizer(config)


@pytest.mark.skipif("LLM_FINETUNE_SMOLLM2" not in os.environ, reason="set LLM_FINETUNE_SMOLLM2 to SmolLM2-135M-Instruct.Q4_1.gguf")
def test_smollm2_from_gguf(tmp_path: Path) -> None:
    from trainer.data.formats import encode, template

    gguf = Path(os.environ["LLM_FINETUNE_SMOLLM2"])
    (tmp_path / "models").mkdir()
    (tmp_path / "models/smol").symlink_to(gguf.parent)
    config = parse({"run": {"name": "t", "model": {"path": "models/smol", "gguf_file": gguf.name},
                            "data": {"sample": True, "format": "chat"}},
                    "storage": str(tmp_path)})
    tokenizer = load_tokenizer(config)
    prompt = template("chat", tokenizer).prompt("Is it?")
    assert len(tokenizer) == 49152 and tokenizer.decode(encode(tokenizer, prompt)) == prompt
