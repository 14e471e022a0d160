"""Matrix products in FP8 (run.engine.float8), on GPUs of compute capability 8.9 or later. The head, norms and adapters stay as they are.

Weights that are trained, or sharded, get torchao's linear layers, which cast them anew in each pass. Frozen weights that a worker holds
whole (LoRA) are kept in FP8 alone: cast once when they are read, half the memory of bfloat16. These run on the CPU too, which shows what
they do to a run, and is slower than without.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from trainer.config import ConfigError, EngineConfig

FORWARD, BACKWARD = torch.float8_e4m3fn, torch.float8_e5m2
"""Types of weights and inputs, and of gradients, whose range is wider (https://arxiv.org/abs/2209.05433)."""
LEAST = 1e-12
"""Smallest largest value that is scaled: zeros stay zeros."""


def use_float8(model: nn.Module, engine: EngineConfig, device: torch.device, whole: bool) -> None:
    """Replace the decoder's linear layers by FP8 ones. `whole`: this worker holds all of the weights."""
    if engine.float8 == "none":
        return
    layers: nn.Module = model.model.layers  # type: ignore[union-attr, assignment]
    suitable = {name: m for name, m in layers.named_modules()  # sizes in sixteens, no adapters (too narrow to gain)
                if isinstance(m, nn.Linear) and not m.in_features % 16 and not m.out_features % 16 and ".lora_" not in name}
    frozen = whole and not any(m.weight.requires_grad for m in suitable.values())
    if not (frozen if device.type == "cpu" else torch.cuda.get_device_capability(device) >= (8, 9)):
        raise ConfigError("run.engine.float8", engine.float8, "FP8 needs GPUs of compute capability 8.9 or later (Ada, Hopper); use none. "
                          "The CPU has it for run.method.kind: lora alone.")
    if frozen:  # without values yet: `FrozenLinear.hold`
        for name, linear in suitable.items():
            layers.set_submodule(name, FrozenLinear(linear, rowwise=engine.float8 == "rowwise"))
        return
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    convert_to_float8_training(layers, config=Float8LinearConfig.from_recipe_name(engine.float8),  # type: ignore[arg-type]
                               module_filter_fn=lambda _, name: name in suitable)


class FrozenLinear(nn.Module):
    """x W^T + b with a frozen W [outputs, inputs] in FP8: one scale, or one for each output (`rowwise`)."""

    weight: torch.Tensor
    scale: torch.Tensor

    def __init__(self, linear: nn.Linear, rowwise: bool) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rowwise, self.bias = linear.in_features, linear.out_features, rowwise, linear.bias
        self.register_buffer("weight", torch.empty(linear.weight.shape, dtype=FORWARD, device="meta"), persistent=False)
        self.register_buffer("scale", torch.empty((self.out_features, 1) if rowwise else (), device="meta"), persistent=False)

    def hold(self, weight: torch.Tensor) -> None:
        """Keep this weight, cast, on its device."""
        self.weight, self.scale = to_float8(weight, FORWARD, self.rowwise)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = _FrozenProduct.apply(x.reshape(-1, self.in_features), self.weight, self.scale, self.rowwise)
        y = y.view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias


def to_float8(x: torch.Tensor, dtype: torch.dtype, rowwise: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(values in FP8, scale in float32) of a matrix: x is about values * scale. `rowwise`: a scale a row, [rows, 1]; else one."""
    most = (x.abs().amax(-1, keepdim=True) if rowwise else x.abs().amax()).float().clamp(min=LEAST)
    limit = torch.finfo(dtype).max
    return (x.float() * (limit / most)).clamp(-limit, limit).to(dtype), most / limit


def product(a: torch.Tensor, b: torch.Tensor, of_a: torch.Tensor, of_b: torch.Tensor, dtype: torch.dtype, fast: bool) -> torch.Tensor:
    """(a * of_a) (b * of_b) in `dtype`, of FP8 values and their scales; a row-major, b column-major. `fast`: summed in fewer bits."""
    if a.device.type == "cpu":  # PyTorch's kernel for two factors of one type takes 18 s for what this does in 0.02 s
        exact = (a.float() * of_a) @ (b.float() * of_b)
        return exact if dtype == torch.float32 else exact.to(dtype)  # after a conversion to the same type the compiler takes no gradient
    return torch._scaled_mm(a, b, of_a, of_b, out_dtype=dtype, use_fast_accum=fast)


class _FrozenProduct(torch.autograd.Function):
    """x W^T; no gradient of W, so nothing of x is kept. Inputs and gradients are scaled by their own largest value."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, rowwise: bool) -> torch.Tensor:
        ctx.save_for_backward(weight, scale)
        ctx.rowwise = rowwise
        values, of_x = to_float8(x, FORWARD, rowwise)
        return product(values, weight.t(), of_x, scale.t(), x.dtype, fast=True)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (weight, scale), (gradient,) = ctx.saved_tensors, gradients
        dtype = gradient.dtype
        if ctx.rowwise:  # W's scales belong to what is summed over: they go into the gradient
            gradient = gradient * scale.t()
            scale = torch.ones(1, weight.shape[1], device=weight.device)
        values, of_gradient = to_float8(gradient, FORWARD if ctx.rowwise else BACKWARD, ctx.rowwise)
        transposed = weight.t().contiguous().t()  # FP8 products read both factors along what is summed over
        return product(values, transposed, of_gradient, scale, dtype, fast=False), None, None, None
