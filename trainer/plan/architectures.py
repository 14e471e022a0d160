"""Shapes of Llama models, and what follows from them: parameters, and floating-point operations a token.

The named shapes are those of the models' published config.json; a model directory's own config.json (or a GGUF file's header) comes
first where it is at hand. tests/trainer/test_plan_architectures.py holds the counts against transformers' own modules.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.config import Config
from trainer.errors import ConfigError


@dataclass(frozen=True)
class Architecture:
    """A decoder of Llama's kind: grouped-query attention, gated MLP, RMS norms, no biases."""

    hidden: int
    """Width of the residual stream."""
    layers: int
    """Decoder layers."""
    heads: int
    """Query heads."""
    kv_heads: int
    """Key and value heads."""
    head_dim: int
    """Width of a head."""
    ffn: int
    """Width of the MLP."""
    vocabulary: int
    """Rows of the embedding."""
    tied: bool = False
    """The head shares the embedding's weights."""

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Architecture:
        """From fields of transformers' LlamaConfig (missing ones take its defaults)."""
        hidden, heads = int(config.get("hidden_size") or 4096), int(config.get("num_attention_heads") or 32)
        return cls(hidden=hidden, layers=int(config.get("num_hidden_layers") or 32), heads=heads,
                   kv_heads=int(config.get("num_key_value_heads") or heads), head_dim=int(config.get("head_dim") or hidden // heads),
                   ffn=int(config.get("intermediate_size") or 11008), vocabulary=int(config.get("vocab_size") or 32000),
                   tied=bool(config.get("tie_word_embeddings", False)))

    @property
    def q_dim(self) -> int:
        """Width of all query heads."""
        return self.heads * self.head_dim

    @property
    def kv_dim(self) -> int:
        """Width of all key heads (and of all value heads)."""
        return self.kv_heads * self.head_dim

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Linear layers of a decoder layer: name to (inputs, outputs)."""
        h = self.hidden
        return {"q_proj": (h, self.q_dim), "k_proj": (h, self.kv_dim), "v_proj": (h, self.kv_dim), "o_proj": (self.q_dim, h),
                "gate_proj": (h, self.ffn), "up_proj": (h, self.ffn), "down_proj": (self.ffn, h)}

    @property
    def layer_linear(self) -> int:
        """Weights of the linear layers of one decoder layer."""
        return sum(i * o for i, o in self.linears.values())

    @property
    def layer_parameters(self) -> int:
        """Weights of one decoder layer."""
        return self.layer_linear + 2 * self.hidden

    @property
    def embedding(self) -> int:
        """Weights of the embedding."""
        return self.vocabulary * self.hidden

    @property
    def head(self) -> int:
        """Weights of the head that are its own."""
        return 0 if self.tied else self.embedding

    @property
    def parameters(self) -> int:
        """All weights."""
        return self.layers * self.layer_parameters + self.embedding + self.head + self.hidden

    def adapters(self, rank: int, targets: list[str]) -> int:
        """Weights of low-rank adapters on the named linear layers of every decoder layer (`all-linear`: on all)."""
        names = list(self.linears) if "all-linear" in targets else targets
        unknown = [n for n in names if n not in self.linears]
        if unknown:
            raise ConfigError("run.method.targets", unknown, f"A Llama layer has {', '.join(self.linears)} (or all-linear).")
        return self.layers * sum(rank * sum(self.linears[n]) for n in names)


KNOWN: dict[str, Architecture] = {
    "Llama-2-7b": Architecture(4096, 32, 32, 32, 128, 11008, 32000),
    "Llama-2-13b": Architecture(5120, 40, 40, 40, 128, 13824, 32000),
    "Llama-2-70b": Architecture(8192, 80, 64, 8, 128, 28672, 32000),
    "Llama-3.1-8B": Architecture(4096, 32, 32, 8, 128, 14336, 128256),
    "Llama-3.1-70B": Architecture(8192, 80, 64, 8, 128, 28672, 128256),
    "Llama-3.2-1B": Architecture(2048, 16, 32, 8, 64, 8192, 128256, tied=True),
    "Llama-3.2-3B": Architecture(3072, 28, 24, 8, 128, 8192, 128256, tied=True),
    "SmolLM2-135M": Architecture(576, 30, 9, 3, 64, 1536, 49152, tied=True),
    "SmolLM2-360M": Architecture(960, 32, 15, 5, 64, 2560, 49152, tied=True),
}
"""Published shapes by the stem of the hub name."""

ALIASES = {"meta-llama-3-8b": "Llama-3.1-8B", "llama-3-8b": "Llama-3.1-8B", "meta-llama-3.1-8b": "Llama-3.1-8B",
           "meta-llama-3-70b": "Llama-3.1-70B", "llama-3-70b": "Llama-3.1-70B", "meta-llama-3.1-70b": "Llama-3.1-70B",
           "llama-3.3-70b": "Llama-3.1-70B"}
"""Other names of the same shapes."""


def by_name(name: str) -> Architecture | None:
    """The shape of a published model by its hub or directory name (owner, `-hf`, `-Instruct`, `-chat` do not matter), or None."""
    stem = name.rsplit("/", 1)[-1].lower()
    for ending in ("-hf", "-instruct", "-chat"):
        stem = stem.removesuffix(ending)
    return KNOWN.get(ALIASES.get(stem, "")) or next((a for n, a in KNOWN.items() if n.lower() == stem), None)


def of_gguf(path: Path) -> Architecture:
    """From a GGUF file's header. Raises ConfigError if it does not hold a Llama."""
    from gguf import GGUFReader

    reader = GGUFReader(path)
    fields = reader.fields

    def value(key: str) -> Any:
        return fields[key].contents() if key in fields else None

    if value("general.architecture") != "llama":
        raise ConfigError("run.model.gguf_file", str(path), f"It holds a {value('general.architecture')} model, not a Llama.")
    tensors = {t.name: t for t in reader.tensors}
    return Architecture.of({
        "hidden_size": value("llama.embedding_length"), "num_hidden_layers": value("llama.block_count"),
        "num_attention_heads": value("llama.attention.head_count"), "num_key_value_heads": value("llama.attention.head_count_kv"),
        "head_dim": value("llama.attention.key_length"), "intermediate_size": value("llama.feed_forward_length"),
        "vocab_size": int(tensors["token_embd.weight"].shape[-1]), "tie_word_embeddings": "output.weight" not in tensors})


def of_config(config: Config) -> tuple[str, Architecture]:
    """Name and shape of a run's base model: `run.model.architecture`, else the model directory on the storage, else by its name.

    Raises ConfigError if none of them tells the shape.
    """
    model = config.run.model
    name = model.name or model.path
    if model.architecture:
        return name.rsplit("/", 1)[-1], Architecture.of(model.architecture)
    if model.path:
        directory = config.storage_path / model.path
        if model.gguf_file and (directory / model.gguf_file).is_file():
            return directory.name, of_gguf(directory / model.gguf_file)
        if (directory / "config.json").is_file():
            document = json.loads((directory / "config.json").read_text(encoding="utf-8"))
            kind = document.get("model_type", "llama")
            if kind != "llama":
                raise ConfigError("run.model.path", model.path, f"It holds a {kind} model; this trainer is for Llama models.")
            return directory.name, Architecture.of(document)
    found = by_name(name)
    if found is None:
        raise ConfigError("run.model.path" if model.path else "run.model.name", name,
                          f"Its shape is not known: put the model on the storage, or use one of {', '.join(KNOWN)}.")
    return name.rsplit("/", 1)[-1], found
