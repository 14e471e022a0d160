"""The base model's tokenizer, with the special tokens of the run's prompt format."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.config import Config
from trainer.data.formats import SPECIAL_TOKENS
from trainer.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(config: Config) -> PreTrainedTokenizerBase:
    """The tokenizer of `run.model` (a hub name with revision, or a path on the storage; also inside a GGUF file).

    Tokens of the prompt format that it lacks are added as special tokens. Raises UserError with the remedy.
    """
    from transformers import AutoTokenizer

    model = config.run.model
    options: dict[str, Any] = {"gguf_file": model.gguf_file} if model.gguf_file else {}
    if model.path:
        directory = config.storage_path / model.path
        if not directory.is_dir():
            raise UserError(f"run.model.path: {directory} does not exist. Put the model there, or correct the path.")
        if model.gguf_file and not (directory / model.gguf_file).is_file():
            raise UserError(f"run.model.gguf_file: {directory / model.gguf_file} does not exist.")
        source = str(directory)
        hint = "Check that the model's tokenizer files (tokenizer.json, tokenizer_config.json) lie there and are whole."
    else:
        source, options["revision"] = model.name, model.revision
        token = "is set" if os.environ.get("HF_TOKEN") else "is not set"
        hint = f"Check the name, the revision and the network; a gated model needs HF_TOKEN in the environment (it {token})."
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, **options)
    except Exception as error:  # transformers and the hub client raise many kinds; all mean that it cannot be had
        raise UserError(f"The tokenizer of {source} cannot be loaded: {type(error).__name__}: {first_line(error)} {hint}") from error
    return with_format(tokenizer, config.run.data.format)


def with_format(tokenizer: PreTrainedTokenizerBase, format: str) -> PreTrainedTokenizerBase:
    """Add the format's special tokens where they are missing. Raises UserError if the tokenizer cannot be used for training."""
    if not getattr(tokenizer, "is_fast", False):
        raise UserError("The tokenizer has no fast (Rust) form. Convert it with transformers' AutoTokenizer and save tokenizer.json.")
    if tokenizer.eos_token_id is None:
        raise UserError("The tokenizer has no end-of-sequence token, so answers could not end. Set eos_token in tokenizer_config.json.")
    if len(tokenizer) == len(tokenizer.added_tokens_decoder):
        raise UserError("The tokenizer has no vocabulary: its files are missing or were not recognised.")
    wanted = SPECIAL_TOKENS[format]
    known = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    if add := [token for token in wanted if token not in known]:
        tokenizer.add_special_tokens({"extra_special_tokens": add}, replace_extra_special_tokens=False)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # only generation in batches pads, and masks what it pads
    return tokenizer


def tokenizer_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """Digest of everything that decides token ids: the Rust tokenizer's own serialisation."""
    return hashlib.sha256(rust(tokenizer).to_str().encode()).hexdigest()


def rust(tokenizer: PreTrainedTokenizerBase) -> Any:
    """The `tokenizers.Tokenizer` inside."""
    return tokenizer.backend_tokenizer  # type: ignore[attr-defined]


def save_rust(tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """Write the Rust tokenizer alone, for processes that do not load transformers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(rust(tokenizer).to_str(), encoding="utf-8")


def first_line(error: BaseException) -> str:
    """The first line of an error's text, without a closing point, at most 300 characters."""
    text = (str(error).strip().splitlines() or [""])[0].strip()
    return text[:300].rstrip(".") + "."
