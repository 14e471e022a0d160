"""The stage `export`: a checkpoint as a model directory that loads with plain AutoModelForCausalLM.

Tensors are read, merged, converted and written one file at a time, so memory is bounded by run.export.shard_size_gb (and the
largest tensors, one a thread), not by the model. No engine and no GPU are needed.
"""

from __future__ import annotations

import json
import math
import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from trainer.config import Config, MethodConfig
from trainer.data import formats
from trainer.errors import UserError
from trainer.files import MANIFEST, directory_digest, require_manifest, sha256, write_atomic, write_directory, write_json
from trainer.model.load import DTYPES, EMBEDDING, HEAD, Weights, base_config, empty_model, model_config, model_directory, open_weights
from trainer.paths import RunPaths
from trainer.report.card import model_card

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase

THREADS = 4
"""Tensors made at the same time: each takes its size in float32 and twice in the exported type."""
PREFIX = "weights/"
"""Checkpoint names of what is exported; the rest is optimizer state."""

NEW_ROWS = ".new_rows"
"""Rows of embedding and head that a run with adapters added for its special tokens (trainer/model/methods.py)."""


class Reader(Protocol):
    """What is needed of a checkpoint (trainer/checkpoint/reader.py)."""

    def names(self) -> list[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def read(self, name: str, start: int, out: torch.Tensor) -> None: ...


class TensorReader:
    """`Reader` over tensors in memory, by parameter name."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self._tensors = {PREFIX + name: tensor for name, tensor in tensors.items()}

    def names(self) -> list[str]:
        return sorted(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def read(self, name: str, start: int, out: torch.Tensor) -> None:
        out.copy_(self._tensors[name].reshape(-1)[start:start + out.numel()])


class Source:
    """Where an exported tensor comes from: the checkpoint, or the base model with what the checkpoint adds to it.

    `base` opens the base model's weights; it is called only if they are needed.
    """

    def __init__(self, trained: Reader, base: Callable[[], Weights], method: MethodConfig) -> None:
        self._trained, self._open, self._method = trained, base, method
        self._names = {name.removeprefix(PREFIX) for name in trained.names() if name.startswith(PREFIX)}
        self._base: Weights | None = None
        self._opening = threading.Lock()

    def tensor(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """The whole tensor in `dtype`. A sum with an adapter's product is taken in float32 and rounded once. Threads may call it."""
        if name in self._names:
            return self._read(name, dtype)
        with self._opening:
            self._base = self._base or self._open()
        whole = self._base.read(name, 0, math.prod(shape)).view(shape)
        layer = name.removesuffix(".weight")
        if f"{layer}.lora_A.weight" in self._names:
            # W + (alpha / rank) B A: https://arxiv.org/abs/2106.09685, section 4.1
            up, down = self._read(f"{layer}.lora_B.weight"), self._read(f"{layer}.lora_A.weight")
            return whole.to(torch.float32, copy=True).addmm_(up, down, alpha=self._method.alpha / self._method.rank).to(dtype)
        added = layer + NEW_ROWS
        if name == HEAD and added not in self._names and EMBEDDING.removesuffix(".weight") + NEW_ROWS in self._names:
            raise UserError(f"The checkpoint has new rows for the embedding but none for {HEAD}, which is not tied to it.")
        if added in self._names:
            rows = self._read(added, dtype)
            return torch.cat([whole[:-len(rows)].to(dtype), rows])
        return whole.to(dtype)

    def _read(self, name: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        shape = self._trained.shape(PREFIX + name)
        out = torch.empty(math.prod(shape), dtype=dtype)
        self._trained.read(PREFIX + name, 0, out)
        return out.view(shape)


def check_names(reader: Reader, shapes: dict[str, tuple[int, ...]], method: MethodConfig) -> None:
    """UserError unless the checkpoint holds a whole model (full) or parts of adapters of this model (otherwise)."""
    trained = {name.removeprefix(PREFIX) for name in reader.names() if name.startswith(PREFIX)}
    if method.kind == "full":
        missing, unknown = shapes.keys() - trained, trained - shapes.keys() - {HEAD}
    else:
        adapted = {re.sub(r"\.(lora_[AB]\.weight|new_rows)$", ".weight", n) for n in trained}
        missing, unknown = set() if trained else {"any adapter"}, adapted - shapes.keys() - {HEAD}
    for what, names in (("lacks", missing), ("has the unknown tensor", unknown)):
        if names:
            raise UserError(f"The checkpoint {what} {min(names)} ({len(names)} such): it is of another model or method than run.model "
                            "and run.method say. Export with the run's own configuration (run.yaml).")
    for name in trained & shapes.keys():
        if reader.shape(PREFIX + name) != shapes[name]:
            raise UserError(f"The checkpoint's {name} has the shape {list(reader.shape(PREFIX + name))}, the run's model needs "
                            f"{list(shapes[name])}. Export with the dataset directory and configuration that the run was trained with.")


def plan_files(shapes: dict[str, tuple[int, ...]], itemsize: int, limit: int) -> list[list[str]]:
    """Names of the tensors of each file, in order; a file has at most `limit` bytes or one tensor."""
    files: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        bytes_ = math.prod(shape) * itemsize
        if files[-1] and size + bytes_ > limit:
            files.append([])
            size = 0
        files[-1].append(name)
        size += bytes_
    return files


def not_finite(tensor: torch.Tensor) -> int:
    """Numbers that are infinite or none. A NaN is the smallest and the largest; to look for those takes a twentieth of counting."""
    ends = torch.stack(torch.aminmax(tensor)) if tensor.numel() else tensor
    return 0 if torch.isfinite(ends).all() else int(tensor.numel() - torch.isfinite(tensor).sum())


def _write_weights(directory: Path, source: Source, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, limit: int,
                   progress: Callable[[float], None]) -> tuple[int, int]:
    """Write model*.safetensors and, for several files, their index. Returns bytes and the number of non-finite weights."""
    from safetensors.torch import save_file

    def make(name: str) -> tuple[torch.Tensor, int]:
        tensor = source.tensor(name, shapes[name], dtype)
        return tensor, not_finite(tensor)

    files = plan_files(shapes, dtype.itemsize, limit)
    place, done, broken = {}, 0, 0
    with ThreadPoolExecutor(THREADS) as pool:
        for number, names in enumerate(files, 1):
            file = "model.safetensors" if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
            tensors = {}
            for name, (tensor, lost) in zip(names, pool.map(make, names), strict=True):
                tensors[name] = tensor
                broken += lost
                place[name] = file
                done += tensor.nbytes
            save_file(tensors, directory / file, metadata={"format": "pt"})
            progress(number / len(files))
    if len(files) > 1:
        write_json(directory / "model.safetensors.index.json", {"metadata": {"total_size": done}, "weight_map": place})
    return done, broken


def _stop_texts(template: formats.Template, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Special tokens of the format's end, as text."""
    special = {i: token.content for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return [special[i] for i in formats.encode(tokenizer, template.end) if i in special]


def prompt_description(config: Config, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """prompt.json: how the model was asked in training, for whoever serves it (chatbot/serving/prompt.py says what the keys mean)."""
    data = config.run.data
    chat = data.format == "chat"
    template = formats.template(data.format, tokenizer)
    plain, with_context = formats.chat_messages() if chat else (template.prompt("{question}"), template.prompt("{question}", "{context}"))
    takes_context = template.takes_context and (data.context or data.format == "tags-context")
    return {"format": data.format, "with_context": with_context if takes_context else None, "without_context": plain, "chat": chat,
            "add_special_tokens": False, "stop": _stop_texts(template, tokenizer),
            "decision": {"prefix": formats.DECISION, "words": ["yes", "no", "maybe"]} if data.decision else None}


def _generation_config(config: Config, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """The base model's sampling settings, with the ends of the run's format."""
    from transformers import GenerationConfig

    model, own = config.run.model, {}
    ends = tokenizer.convert_tokens_to_ids(_stop_texts(formats.template(config.run.data.format, tokenizer), tokenizer))
    base_ends: Any = base_config(config).eos_token_id
    if not model.architecture and (file := model_directory(config) / "generation_config.json").is_file():
        base = json.loads(file.read_text(encoding="utf-8"))
        base_ends = base.get("eos_token_id", base_ends)
        if base.get("do_sample"):
            own = {k: base[k] for k in ("do_sample", "temperature", "top_p", "top_k", "repetition_penalty") if base.get(k) is not None}
    base_list = base_ends if isinstance(base_ends, list) else [base_ends] if base_ends is not None else []
    return GenerationConfig(bos_token_id=tokenizer.bos_token_id, pad_token_id=tokenizer.pad_token_id,
                            eos_token_id=list(dict.fromkeys([*ends, tokenizer.eos_token_id, *base_list])), **own)


def export(config: Config, paths: RunPaths, reader: Reader, tokenizer: PreTrainedTokenizerBase,
           progress: Callable[[float], None] = lambda share: None) -> dict[str, Any]:
    """Write `model/` from a checkpoint (its weights, or its adapters merged into the base model). Returns the manifest.

    One process calls it. UserError if the checkpoint is of another model, or if float16 cannot hold the weights.
    """
    run = config.run
    dtype = DTYPES[run.export.dtype]
    target = model_config(config, len(tokenizer))
    shapes = {name: tuple(p.shape) for name, p in empty_model(target, dtype).named_parameters()}  # tied ones once
    check_names(reader, shapes, run.method)
    source = Source(reader, lambda: open_weights(config, target), run.method)
    step = getattr(reader, "step", None)

    def fill(directory: Path) -> dict[str, Any]:
        size, broken = _write_weights(directory, source, shapes, dtype, int(run.export.shard_size_gb * 1e9), progress)
        if broken and dtype == torch.float16:
            raise UserError(f"{broken} weights are not finite as float16. Set run.export.dtype: bfloat16, which has float32's range.")
        target.dtype, target.use_cache, target.architectures = dtype, True, ["LlamaForCausalLM"]
        generation = _generation_config(config, tokenizer)
        target.bos_token_id, target.eos_token_id, target.pad_token_id = (
            generation.bos_token_id, generation.eos_token_id, generation.pad_token_id)
        target.save_pretrained(directory)
        generation.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        write_json(directory / "prompt.json", prompt_description(config, tokenizer))
        write_atomic(directory / "README.md", model_card(config, paths, None))
        return {"run": config.run_id, "step": step, "dtype": run.export.dtype, "bytes": size,
                "parameters": sum(math.prod(s) for s in shapes.values()), "not_finite": broken}

    return write_directory(paths.model, fill)


def update_card(config: Config, paths: RunPaths, report: dict[str, Any]) -> None:
    """Write the model card again, with the evaluation's figures. The model's digest leaves it out, so it stays the same.

    Between the two writes the manifest does not fit; a reader that comes upon that, and an export that is started again after a
    crash there, do what they do for any directory that is not whole.
    """
    manifest = require_manifest(paths.model, "export")
    readme, card, digest = paths.model / "README.md", model_card(config, paths, report), directory_digest(manifest)
    if readme.read_text(encoding="utf-8") == card:
        return
    write_atomic(readme, card)
    manifest["files"]["README.md"] = {"size": readme.stat().st_size, "sha256": sha256(readme)}
    if directory_digest(manifest) != digest:
        raise AssertionError("the model card must not be part of the model's digest")
    write_json(paths.model / MANIFEST, manifest)
