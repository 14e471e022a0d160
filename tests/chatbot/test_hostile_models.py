"""Models as attackers: pickled weights and a repository's own code are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from chatbot.engine.loading import load_model, load_tokenizer
from chatbot.errors import UserError

CPU = torch.device("cpu")


@pytest.fixture
def model(models_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(models_dir / "0", tmp_path / "model"))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.bin", "pytorch_model.pth"])
def test_pickled_weights_are_refused(model: Path, name: str) -> None:
    weights = load_model(model, CPU, "float32").state_dict()
    torch.save(weights, model / name)
    (model / "model.safetensors").unlink()
    with pytest.raises(UserError, match="cannot be loaded"):
        load_model(model, CPU, "float32")


def test_code_of_a_repository_is_not_run(model: Path) -> None:
    (model / "own.py").write_text("raise SystemExit('code was run')\n")
    config = json.loads((model / "config.json").read_text())
    names = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own", "AutoTokenizer": ["own.Own", None]}
    own = {"model_type": "own", "auto_map": names}
    (model / "config.json").write_text(json.dumps({**config, **own}))
    (model / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Own", **own}))
    with pytest.raises(UserError, match="cannot be loaded"):
        load_model(model, CPU, "float32")
    try:
        load_tokenizer(model)  # as tokenizer.json alone says, or not at all
    except UserError:
        pass


@pytest.mark.parametrize("content", [(1 << 60).to_bytes(8, "little") + b"{}", b"", (9000).to_bytes(8, "little") + b"[" * 9000])
def test_headers_of_weights_are_bounded(model: Path, content: bytes) -> None:
    (model / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="cannot be loaded"):
        load_model(model, CPU, "float32")
