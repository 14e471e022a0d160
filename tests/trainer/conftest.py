"""Fixtures of the trainer's tests: a small tokenizer and configurations that need no network."""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))  # its scripts import each other by name

import pytest

from tests.trainer.ranks import Ranks
from trainer.config import Config, parse

CHAT_TEMPLATE = ("{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
                 "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")

ARCHITECTURE = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
                "num_key_value_heads": 2, "max_position_embeddings": 1024}
"""A Llama that trains in milliseconds; its vocabulary has room for the tokens of every format."""


@cache
def _tokenizer() -> Any:
    """A byte-level BPE of 400 tokens, learnt from the shipped sample, with SmolLM2's special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from trainer.data.readers import SAMPLE

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    inner.train_from_iterator(SAMPLE.read_text(encoding="utf-8").splitlines(), trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<|im_start|>", eos_token="<|im_end|>", unk_token="<|endoftext|>",
                                   pad_token="<|im_end|>", chat_template=CHAT_TEMPLATE)


@pytest.fixture
def tiny_tokenizer() -> Any:
    """A PreTrainedTokenizerFast of 400 tokens with a chat template; a copy of its own for each test."""
    return copy.deepcopy(_tokenizer())


@pytest.fixture
def make_config(tmp_path: Path) -> Callable[..., Config]:
    """`make_config(data={...}, train={...}, …)`: a configuration on a temporary storage that holds a tiny model's tokenizer."""
    model = tmp_path / "models" / "tiny"
    _tokenizer().save_pretrained(model)

    def make(data: dict[str, Any] | None = None, **run: Any) -> Config:
        resources = run.pop("resources", {})
        document = {"name": "test", "model": {"path": "models/tiny", "dtype": "float32", "architecture": ARCHITECTURE},
                    "data": data or {"sample": True, "max_tokens": 512},
                    "train": {"micro_batch_tokens": 1024, "tokens_per_step": 2048}, **run}
        return parse({"run": document, "resources": resources, "storage": str(tmp_path)})

    return make


@pytest.fixture
def sample_config(make_config: Callable[..., Config]) -> Config:
    """The shipped sample with a tiny random Llama."""
    return make_config()


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Runs functions in worlds of 1 to 3 processes (gloo)."""
    with Ranks() as worlds:
        yield worlds


@pytest.fixture(scope="session")
def toy_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a `train` split of short rows that a tiny model learns (tests/trainer/engine_cases.py)."""
    from tests.trainer.engine_cases import write_rows

    directory = tmp_path_factory.mktemp("rows")
    write_rows(directory)
    return directory
