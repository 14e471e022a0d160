"""What of a model is trained: everything (full), or adapters beside frozen weights (LoRA), in 4 bits (QLoRA).

`shape_for_method` works on a model on the meta device, before any engine shards it. New tokens under LoRA and QLoRA: the embedding is
frozen, so the rows that the tokenizer added are trained as small tensors of their own (`new_rows`), else the model would never learn
what its special tokens mean.

Names: a parameter's canonical name is Hugging Face's, also where peft wraps the layer; adapters are `<layer>.lora_A.weight` and
`<layer>.lora_B.weight`, new rows `<embedding or head>.new_rows`. Checkpoints use canonical names.
"""

from __future__ import annotations

import math
import types
import zlib
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from trainer.config import MethodConfig
from trainer.errors import ConfigError, UserError
from trainer.model.float8 import FrozenLinear
from trainer.model.load import EMBEDDING, HEAD, Weights

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

ADAPTER = "default"
"""peft's name of the one adapter."""
NEW_ROWS = ".new_rows"


def canonical(name: str) -> str:
    """A parameter's name as Hugging Face's model has it (see the module's text)."""
    return name.replace(".base_layer.", ".").replace(f".{ADAPTER}.", ".")


def adapter_targets(model: nn.Module, method: MethodConfig) -> list[str]:
    """The linear layers that get adapters, by their full names; ConfigError if a target names none."""
    linear = [f"model.layers.{n}" for n, m in model.model.layers.named_modules() if isinstance(m, nn.Linear)]  # type: ignore[union-attr]
    if method.targets == ["all-linear"]:
        return linear
    known = sorted({n.rsplit(".", 1)[1] for n in linear})
    for target in method.targets:
        if not any(n.endswith(f".{target}") for n in linear):
            raise ConfigError("run.method.targets", target,
                              f"No linear layer of the decoder has this name: use all-linear, or {', '.join(known)}.")
    return [n for n in linear if any(n.endswith(f".{t}") for t in method.targets)]


def shape_for_method(model: LlamaForCausalLM, method: MethodConfig, base_rows: int, dtype: torch.dtype) -> None:
    """Give a model on the meta device its adapters and say what is trained. `base_rows`: embedding rows of the base model."""
    if method.kind == "full":
        return
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    targets = adapter_targets(model, method)
    model.requires_grad_(False)
    if method.kind == "qlora":
        _quantised_layers(model, dtype)
    adapters = LoraConfig(r=method.rank, lora_alpha=method.alpha,  # type: ignore[arg-type]  # a float works
                          lora_dropout=method.dropout, target_modules=targets, task_type="CAUSAL_LM")
    inject_adapter_in_model(adapters, model, ADAPTER, low_cpu_mem_usage=True)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.forward = types.MethodType(_adapted_forward, module)  # type: ignore[method-assign]
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.to(dtype)
            parameter.requires_grad_(True)
    if model.config.vocab_size > base_rows:
        _trainable_rows(model, base_rows, dtype)


def _adapted_forward(self: Any, x: torch.Tensor) -> torch.Tensor:
    """An adapted layer's forward: W x + B (alpha / rank * A x).

    peft's own multiplies B's output instead of A's, so that its gradient is one more tensor as wide as the layer (measured:
    docs/decisions/engines.md); for 4-bit layers it also copies the frozen product.
    """
    low = self.lora_A[ADAPTER](self.lora_dropout[ADAPTER](x)) * self.scaling[ADAPTER]
    return self.base_layer(x) + self.lora_B[ADAPTER](low)


# New tokens under adapters

def _trainable_rows(model: LlamaForCausalLM, first: int, dtype: torch.dtype) -> None:
    embedding, head = model.model.embed_tokens, model.lm_head
    rows, width = embedding.weight.shape
    embedding.new_rows = nn.Parameter(torch.empty(rows - first, width, dtype=dtype, device="meta"))
    head.new_rows = (embedding.new_rows if head.weight is embedding.weight
                     else nn.Parameter(torch.empty(rows - first, width, dtype=dtype, device="meta")))
    embedding.forward = _Embedding(embedding, first)


class _Embedding:
    """Forward of an embedding whose rows from `first` on are `new_rows`."""

    def __init__(self, module: Any, first: int) -> None:
        self.module, self.first = module, first

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        new = (ids >= self.first)[..., None]
        return torch.where(new, F.embedding((ids - self.first).clamp(min=0), self.module.new_rows), F.embedding(ids, self.module.weight))


# Values

class MethodWeights(Weights):
    """The base model's weights and the first values of adapters and new rows, by canonical name.

    Adapters start as peft starts them: A uniform within 1/sqrt(inputs) (Kaiming with a = sqrt(5)), B zero, so that training starts at
    the base model. A has a generator of its own per layer (seed and name): all ranks draw the same. New rows start as the resized
    base model has them.
    """

    def __init__(self, base: Weights, model: nn.Module, seed: int) -> None:
        self._base, self._seed = base, seed
        own = {canonical(n): tuple(p.shape) for n, p in model.named_parameters() if ".lora_" in n or n.endswith(NEW_ROWS)}
        self.shapes = {**base.shapes, **own}

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        if name.endswith(NEW_ROWS):
            source = EMBEDDING if name.startswith(EMBEDDING.removesuffix("weight")) else HEAD
            first = math.prod(self._base.shapes[source]) - math.prod(self.shapes[name])
            return self._base.read(source, first + start, first + stop)
        if name.endswith(".lora_B.weight"):
            return torch.zeros(stop - start)
        if name.endswith(".lora_A.weight"):
            bound, size = self.shapes[name][1] ** -0.5, math.prod(self.shapes[name])
            generator = torch.Generator().manual_seed((self._seed << 32 | zlib.crc32(name.encode())) & (2**63 - 1))
            return torch.empty(size).uniform_(-bound, bound, generator=generator)[start:stop]
        return self._base.read(name, start, stop)


# Four and eight bits

def _bitsandbytes() -> Any:
    try:
        import bitsandbytes
    except (ImportError, RuntimeError, OSError) as error:
        raise UserError(f"run.method.kind: qlora needs bitsandbytes, which does not load here: {error}") from None
    return bitsandbytes


def _quantised_layers(model: Any, dtype: torch.dtype) -> None:
    """Replace the decoder's linear layers by 4-bit ones, still without values. Those without adapters are quantised as well."""
    bnb = _bitsandbytes()
    for name, module in [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.startswith("model.layers.")]:
        parent, leaf = name.rsplit(".", 1)
        layer = bnb.nn.Linear4bit(module.in_features, module.out_features, bias=module.bias is not None, compute_dtype=dtype,
                                  compress_statistics=True, quant_type="nf4", device="meta")
        layer.requires_grad_(False)
        setattr(model.get_submodule(parent), leaf, layer)
    model.is_loaded_in_4bit = True


def quantise(model: nn.Module, weights: Weights, device: torch.device, dtype: torch.dtype) -> None:
    """Read, quantise and place the weights that are kept in 4 bits or in FP8, one layer at a time.

    4 bits: NF4 with double quantisation, blocks of 64 (https://arxiv.org/abs/2305.14314). FP8: trainer/model/float8.py.
    """
    bnb = _bitsandbytes() if getattr(model, "is_loaded_in_4bit", False) else None
    for name, module in model.named_modules():
        if not isinstance(module, FrozenLinear if bnb is None else bnb.nn.Linear4bit):
            continue
        key = canonical(f"{name}.weight")
        if key not in weights.shapes:
            raise UserError(f"The base model's weights lack {key}; is its config.json of another model?")
        shape = weights.shapes[key]
        whole = weights.read(key, 0, math.prod(shape)).view(shape).to(dtype)
        if bnb is None:
            module.hold(whole.to(device))
        else:
            module.weight = bnb.nn.Params4bit(whole, requires_grad=False, compress_statistics=True, quant_type="nf4",
                                              module=module).to(device)
