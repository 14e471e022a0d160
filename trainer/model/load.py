"""The base model: its configuration, an empty model on the meta device, and weights that are read a range at a time.

A model is first built on the meta device (no memory), then shaped by method and engine (adapters, shards), then given memory, and at
last filled: every rank reads from storage only the ranges that it holds, so no rank ever holds a whole model that is sharded.
Only Llama, only safetensors (or GGUF, dequantised): pickled weights and code from a repository are never loaded.
"""

from __future__ import annotations

import abc
import copy
import functools
import math
import os
import zlib
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from trainer.config import Config
from trainer.errors import ConfigError, UserError
from trainer.files import read_json
from trainer.paths import RunPaths

if TYPE_CHECKING:
    from transformers import LlamaConfig, LlamaForCausalLM

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
BLOCK = 1 << 26
"""Elements that are read at once while a mean is taken or a range copied: 256 MiB in float32."""


# Where it lies

def model_directory(config: Config) -> Path:
    """The base model's directory: on the shared storage, or the hub's snapshot (downloaded to the hub's cache, HF_HOME)."""
    model = config.run.model
    if model.path:
        directory = config.storage_path / model.path
        if not directory.is_dir():
            raise ConfigError("run.model.path", model.path, f"There is no directory {directory}.")
        return directory
    return _snapshot(model.name, model.revision, model.gguf_file)


@functools.cache
def _snapshot(name: str, revision: str, gguf_file: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    patterns = ["*.json", "tokenizer.model", gguf_file] if gguf_file else ["*.json", "*.safetensors", "tokenizer.model"]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns, token=os.environ.get("HF_TOKEN")))
    except GatedRepoError:
        raise ConfigError("run.model.name", name, "The model is gated: accept its licence on the hub, and give the Ray pods "
                          "a token with access to it (HF_TOKEN, from the secret named in site.yaml).") from None
    except RepositoryNotFoundError:
        raise ConfigError("run.model.name", name, "The hub has no such model, or HF_TOKEN has no access to it.") from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise UserError(f"run.model.name: {name!r} could not be downloaded ({error}). Check the workers' way to the hub, or "
                        "copy the model to the shared storage and set run.model.path.") from error


def base_config(config: Config) -> LlamaConfig:
    """transformers' configuration of the base model, before any resize. Errors name what is not supported and what to do."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import LlamaConfig

    model = config.run.model
    if model.architecture:
        try:
            base = LlamaConfig(**model.architecture)
        except (TypeError, ValueError, StrictDataclassError) as error:
            raise ConfigError("run.model.architecture", model.architecture, f"LlamaConfig refuses it: {error}") from None
    else:
        base = copy.deepcopy(_stored_config(model_directory(config), model.gguf_file))
    if base.model_type != "llama":
        raise ConfigError("run.model", model.name or model.path, f"It is a {base.model_type} model; only Llama models are trained here.")
    if getattr(base, "quantization_config", None):
        raise ConfigError("run.model", model.name or model.path,
                          "Its weights are quantised; give the unquantised model (run.method.kind: qlora quantises it itself).")
    base.use_cache = False
    return base


@functools.cache
def _stored_config(directory: Path, gguf_file: str) -> Any:
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    if gguf_file and not (directory / gguf_file).is_file():
        raise ConfigError("run.model.gguf_file", gguf_file, f"There is no such file in {directory}.")
    try:
        return AutoConfig.from_pretrained(directory, trust_remote_code=False, **({"gguf_file": gguf_file} if gguf_file else {}))
    except (OSError, ValueError, KeyError, StrictDataclassError) as error:
        raise UserError(f"{directory} has no usable model configuration: {error}") from None


def tokenizer_size(config: Config) -> int | None:
    """Entries of the run's tokenizer, added special tokens included; None before the dataset is prepared."""
    directory = RunPaths.of(config).dataset / "tokenizer"
    if not directory.is_dir():
        return None
    from transformers import AutoTokenizer

    return len(AutoTokenizer.from_pretrained(directory, trust_remote_code=False))


def resized_vocabulary(base: int, tokens: int | None) -> int:
    """Rows of the embedding: as the base has them if the tokenizer fits, else room for the tokenizer, a multiple of 8.

    The multiple keeps the head's matrix product on the tensor cores.
    """
    return base if tokens is None or tokens <= base else -(-tokens // 8) * 8


def model_config(config: Config, tokens: int | None = None) -> LlamaConfig:
    """`base_config` with the vocabulary that the run trains (`tokens`: `tokenizer_size`)."""
    base = base_config(config)
    base.vocab_size = resized_vocabulary(base.vocab_size, tokens)
    return base


# Weights, a range at a time

class Weights(abc.ABC):
    """Named tensors of which flat ranges can be read."""

    shapes: dict[str, tuple[int, ...]]

    @abc.abstractmethod
    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements `start` to `stop` of the flattened tensor: 1-D, CPU, in the source's own type."""


class SafetensorsWeights(Weights):
    """A directory of safetensors, memory-mapped."""

    def __init__(self, directory: Path) -> None:
        from safetensors import SafetensorError, safe_open

        index = directory / "model.safetensors.index.json"
        try:
            files = sorted(set(map(str, read_json(index)["weight_map"].values()))) if index.is_file() else ["model.safetensors"]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{index} is not readable ({error!r}). Copy the model again.") from None
        missing = [f for f in files if "/" in f or not (directory / f).is_file()]
        if missing:
            pickled = sorted(p.name for p in directory.glob("*.bin")) + sorted(p.name for p in directory.glob("*.pth"))
            raise UserError(f"{directory} lacks {', '.join(missing)}." + (
                f" Pickled weights ({', '.join(pickled[:3])}) are not loaded, because they can run code: convert them to safetensors."
                if pickled else " Copy the model again, or set run.model.gguf_file."))
        self._files: dict[str, Any] = {}
        for file in files:
            try:  # safetensors reads no header of more than 100 MB, and none that reaches beyond the file
                opened = safe_open(directory / file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise UserError(f"{directory / file} is not a readable safetensors file ({error}). Copy the model again.") from None
            self._files |= dict.fromkeys(opened.keys(), opened)
        self.shapes = {n: tuple(f.get_slice(n).get_shape()) for n, f in self._files.items()}

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        shape, part = self.shapes[name], self._files[name].get_slice(name)
        width = math.prod(shape[1:])
        first = start // width
        rows = part[first:-(-stop // width)]
        return rows.reshape(-1)[start - first * width:stop - first * width]


class MemoryWeights(Weights):
    """Tensors in memory (a dequantised GGUF file)."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self._tensors = tensors
        self.shapes = {n: tuple(t.shape) for n, t in tensors.items()}

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self._tensors[name].reshape(-1)[start:stop]


class RandomWeights(Weights):
    """Random initialisation: norms one, biases zero, the rest normal with `std`.

    Each tensor has a generator of its own (seed and name) and is drawn in blocks, so that every rank and every sharding sees the
    same values without making the whole.
    """

    def __init__(self, shapes: dict[str, tuple[int, ...]], seed: int, std: float, block: int = 1 << 20) -> None:
        self.shapes, self._seed, self._std, self._block = shapes, seed, std, block

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        if name.endswith("norm.weight"):
            return torch.ones(stop - start)
        if name.endswith("bias"):
            return torch.zeros(stop - start)
        size, out = math.prod(self.shapes[name]), torch.empty(stop - start)

        def draw(index: int) -> None:
            low, high = index * self._block, min((index + 1) * self._block, size)
            generator = torch.Generator().manual_seed((self._seed << 32 | zlib.crc32(f"{name}@{index}".encode())) & (2**63 - 1))
            block = torch.empty(high - low).normal_(0.0, self._std, generator=generator)[max(start - low, 0):stop - low]
            first = max(low - start, 0)
            out[first:first + block.numel()] = block

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(draw, range(start // self._block, -(-stop // self._block))))
        return out


class ResizedWeights(Weights):
    """Weights whose embedding and head have `rows` rows: those beyond the source's are the mean of the source's.

    A mean row makes a new token as likely as an average one, so that it does not disturb the model before it is trained
    (https://nlp.stanford.edu/~johnhew/vocab-expansion.html).
    """

    def __init__(self, source: Weights, rows: int) -> None:
        self._source = source
        self._means: dict[str, torch.Tensor] = {}
        self.shapes = {n: (rows, *s[1:]) if n in (EMBEDDING, HEAD) else s for n, s in source.shapes.items()}

    def _mean(self, name: str) -> torch.Tensor:
        if name not in self._means:
            rows, width = self._source.shapes[name]
            total, step = torch.zeros(width, dtype=torch.float64), max(BLOCK // width, 1)
            for first in range(0, rows, step):
                last = min(first + step, rows)
                total += self._source.read(name, first * width, last * width).view(-1, width).sum(0, dtype=torch.float64)
            self._means[name] = (total / rows).float()
        return self._means[name]

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        size = math.prod(self._source.shapes[name])
        old = self._source.read(name, min(start, size), min(stop, size))
        if stop <= size:
            return old
        mean, width = self._mean(name), self.shapes[name][1]
        first = max(start, size)
        rows = mean.repeat(-(-stop // width) - first // width)[first % width:][:stop - first]
        return torch.cat([old.float(), rows])


def open_weights(config: Config, target: LlamaConfig) -> Weights:
    """The base model's weights in the shapes of `target` (see `model_config`)."""
    model, base = config.run.model, base_config(config)
    source: Weights
    if model.architecture:
        with torch.device("meta"):
            empty = build_model(base)
        source = RandomWeights({n: tuple(p.shape) for n, p in empty.named_parameters()}, config.run.seed, base.initializer_range)
    elif model.gguf_file:
        source = _dequantised(model_directory(config), model.gguf_file)
    else:
        source = SafetensorsWeights(model_directory(config))
    return ResizedWeights(source, target.vocab_size) if target.vocab_size != base.vocab_size else source


def _dequantised(directory: Path, gguf_file: str) -> Weights:
    from transformers import LlamaForCausalLM

    whole = LlamaForCausalLM.from_pretrained(directory, gguf_file=gguf_file, dtype=torch.float32)
    return MemoryWeights({n: p.detach() for n, p in whole.named_parameters()})


# The model itself

def build_model(config: LlamaConfig, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """An uninitialised model; under `torch.device("meta")` it takes no memory."""
    from transformers import LlamaForCausalLM
    from transformers.initialization import no_init_weights

    with no_init_weights():
        model = LlamaForCausalLM._from_config(config, dtype=dtype)
    model.tie_weights()
    return model


def empty_model(config: LlamaConfig, dtype: torch.dtype) -> LlamaForCausalLM:
    """`build_model` on the meta device."""
    with torch.device("meta"):
        return build_model(config, dtype)


@torch.no_grad()
def give_memory(module: nn.Module, device: torch.device) -> None:
    """Give the module's meta parameters (also shards) uninitialised memory on `device`; one that is tied inside it stays tied."""
    made: dict[int, nn.Parameter] = {}
    for part in module.modules():
        for key, parameter in part._parameters.items():
            if parameter is None or not parameter.is_meta:
                continue
            if id(parameter) not in made:
                made[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device=device), parameter.requires_grad)
            setattr(part, key, made[id(parameter)])


def restore_buffers(model: Any, device: torch.device) -> None:
    """Compute the rotary embedding's buffers, which no file holds, in float32 on `device`."""
    rotary = model.model.rotary_emb
    with torch.device(device):
        fresh = type(rotary)(model.config)
    for key, buffer in fresh.named_buffers():
        setattr(rotary, key, buffer)
    if left := [n for n, b in model.named_buffers() if b.is_meta]:
        raise RuntimeError(f"Buffers without values: {left}")


def materialise(model: nn.Module, device: torch.device, buffers: torch.device | None = None) -> None:
    """`give_memory` to a model, and values to its buffers (on `buffers`, if that is another device)."""
    give_memory(model, device)
    restore_buffers(model, buffers or device)


def local_range(parameter: torch.Tensor) -> tuple[torch.Tensor, int]:
    """What this rank holds of a parameter: a flat view and the index of its first element in the flattened whole."""
    from torch.distributed.tensor import DTensor

    if isinstance(parameter, DTensor):
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        _, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
        local = parameter.to_local().detach()
        return local.view(-1), offset[0] * math.prod(parameter.shape[1:]) if local.numel() else 0
    return parameter.detach().view(-1), 0


Ranges = Iterator[tuple[str, torch.Size | tuple[int, ...], torch.Tensor, int]]


def held(model: nn.Module, rename: Callable[[str], str] = lambda name: name, only: Collection[str] | None = None) -> Ranges:
    """(name, whole shape, flat view, start) of every parameter as this rank holds it; a tied one once, under its first name.

    `only`: names (before `rename`) of the parameters that are wanted. Quantised ones are left out (trainer/model/methods.py fills them).
    """
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point() or (only is not None and name not in only):
            continue
        flat, start = local_range(parameter)
        yield rename(name), parameter.shape, flat, start


@torch.no_grad()
def fill(ranges: Ranges, weights: Weights) -> None:
    """Read this rank's ranges. UserError if the source lacks a tensor or has another shape."""
    jobs: list[tuple[str, int, torch.Tensor]] = []
    for name, shape, flat, start in ranges:
        if name not in weights.shapes:
            raise UserError(f"The base model's weights lack {name}; is its config.json of another model?")
        if weights.shapes[name] != tuple(shape):
            raise UserError(f"The base model's {name} has the shape {list(weights.shapes[name])}, config.json says {list(shape)}.")
        for first in range(0, flat.numel(), BLOCK):
            jobs.append((name, start + first, flat[first:first + BLOCK]))
    workers = min(8, os.cpu_count() or 1)
    if workers <= 2 or len(jobs) < 2:
        for name, start, part in jobs:
            part.copy_(weights.read(name, start, start + part.numel()))
        return
    with ThreadPoolExecutor(workers) as pool:  # storage, page faults and random numbers in parallel; at most `workers` blocks at once
        def one(job: tuple[str, int, torch.Tensor]) -> None:
            with torch.no_grad():
                job[2].copy_(weights.read(job[0], job[1], job[1] + job[2].numel()))

        list(pool.map(one, jobs))


def load_model(config: Config, device: torch.device | str = "cpu", dtype: torch.dtype | None = None,
               tokens: int | None = None) -> LlamaForCausalLM:
    """The whole base model on one device, resized for `tokens` tokens (default: the run's tokenizer), in `dtype` (default: the
    configured type). It is a plain model of transformers with its own forward pass."""
    tokens = tokenizer_size(config) if tokens is None else tokens
    target = model_config(config, tokens)
    model = empty_model(target, dtype or DTYPES[config.run.model.dtype])
    materialise(model, torch.device(device))
    fill(held(model), open_weights(config, target))
    return model
