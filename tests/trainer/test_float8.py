"""FP8 products beside frozen weights: how far they are from the exact ones, which layers get them, that adapters train beside them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from tests.trainer.engine_cases import ARCHITECTURE, CPU, VOCABULARY, make_config, train
from trainer.data.shards import TokenShards
from trainer.engines import make_engine
from trainer.errors import UserError
from trainer.model import float8
from trainer.model.float8 import BACKWARD, FORWARD, FrozenLinear, product, to_float8, use_float8
from trainer.model.load import empty_model, model_config
from trainer.model.methods import shape_for_method


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    """Relative difference, in the Euclidean norm."""
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


def checked(a: torch.Tensor, b: torch.Tensor, of_a: torch.Tensor, of_b: torch.Tensor, dtype: torch.dtype, fast: bool) -> torch.Tensor:
    """`product`, held to what the GPU's kernels take."""
    assert a.is_contiguous() and b.t().is_contiguous()
    assert of_a.numel() == of_b.numel() == 1 or (of_a.shape == (a.shape[0], 1) and of_b.shape == (1, b.shape[1]))
    assert FORWARD in (a.dtype, b.dtype)
    return product(a, b, of_a, of_b, dtype, fast)


@pytest.mark.parametrize("dtype", [FORWARD, BACKWARD])
@pytest.mark.parametrize("rowwise", [False, True])
def test_scales(dtype: torch.dtype, rowwise: bool) -> None:
    """The largest value (of a row) is the type's largest; zeros stay zeros; what is not a number stays so."""
    x = torch.randn(8, 64) * torch.logspace(-2, 2, 8)[:, None]
    x[0] = 0
    values, scale = to_float8(x, dtype, rowwise)
    assert scale.shape == ((8, 1) if rowwise else ())
    top = values.float().abs().amax(-1) if rowwise else values.float().abs().amax()[None]
    assert (top[int(rowwise):] == torch.finfo(dtype).max).all()
    assert (values[0].float() == 0).all()
    back = values.float() * scale
    assert apart(back[1:] if rowwise else back[-1], x[1:] if rowwise else x[-1]) < (0.03 if dtype is FORWARD else 0.06)
    x[3, 5] = float("nan")
    assert to_float8(x, dtype, rowwise)[0][3, 5].float().isnan()


@pytest.mark.parametrize("rowwise", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_frozen_layer(rowwise: bool, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Output and gradient of a frozen layer are those of the exact one but for FP8's rounding; nothing of the input is kept."""
    torch.manual_seed(0)
    exact = nn.Linear(128, 192, bias=bias).bfloat16().requires_grad_(False)
    exact.weight.mul_(torch.logspace(-1, 1, 192)[:, None])  # outputs of unlike size
    layer = FrozenLinear(exact, rowwise)
    layer.hold(exact.weight)
    monkeypatch.setattr(float8, "product", checked)
    x = torch.randn(2, 32, 128, dtype=torch.bfloat16, requires_grad=True)
    ours, wanted = layer(x), exact(x)
    assert ours.shape == wanted.shape and ours.dtype == wanted.dtype and apart(ours, wanted) < 0.05
    cotangent = torch.randn_like(wanted)
    (gradient,), (of_exact,) = torch.autograd.grad(ours, x, cotangent), torch.autograd.grad(wanted, x, cotangent)
    assert apart(gradient, of_exact) < (0.05 if rowwise else 0.08)
    if rowwise:
        small = ours.float()[..., :64], wanted.float()[..., :64]
        assert apart(*small) < 0.05, "a scale for each output: small ones are as exact"
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        layer(x)
    assert all(t.data_ptr() != x.data_ptr() and t.shape != (64, 128) for t in kept)


def test_compiled_without_a_break() -> None:
    torch.manual_seed(0)
    exact = nn.Linear(64, 32, bias=False).requires_grad_(False)
    layer = FrozenLinear(exact, rowwise=False)
    layer.hold(exact.weight)
    compiled = torch.compile(layer, fullgraph=True, dynamic=False, backend="aot_eager")
    x = torch.randn(16, 64, requires_grad=True)
    torch.testing.assert_close(compiled(x), layer(x))
    torch.testing.assert_close(*(torch.autograd.grad(f(x).sum(), x)[0] for f in (compiled, layer)))


@pytest.mark.parametrize("kind", ["tensorwise", "rowwise"])
def test_adapters_train_beside_frozen_weights(kind: str, toy_rows: Path) -> None:
    """LoRA's model with FP8 layers: the same curve but for rounding, weights as they were."""
    sizes = {**ARCHITECTURE, "hidden_size": 64, "intermediate_size": 128}
    config, shards = make_config(method="lora", model={"architecture": sizes}), TokenShards(toy_rows, "train")
    exact = train(make_engine(config, CPU, 0, 1, VOCABULARY + 3), shards, 0, 6)
    config = make_config(method="lora", model={"architecture": sizes}, engine={"float8": kind})
    engine = make_engine(config, CPU, 0, 1, VOCABULARY + 3)
    layers = [m for m in engine.model.modules() if isinstance(m, FrozenLinear)]
    assert len(layers) == 14 and all(m.weight.dtype == FORWARD for m in layers)
    kept = [m.weight.float() for m in layers]
    curve = train(engine, shards, 0, 6)
    assert curve[-1][0] < curve[0][0] - 0.3
    assert [loss for loss, *_ in curve] == pytest.approx([loss for loss, *_ in exact], rel=5e-3)
    assert [loss for loss, *_ in curve] != [loss for loss, *_ in exact]
    assert all(torch.equal(m.weight.float(), w) for m, w in zip(layers, kept, strict=True))
    names = {p.name.split("/", 1)[1] for p in engine.pieces()}
    assert len(names) == 30 and "model.layers.1.mlp.down_proj.lora_B.weight" in names


@pytest.mark.parametrize(("method", "whole", "layer"), [("full", True, "Float8Linear"), ("full", False, "Float8Linear"),
                                                        ("lora", False, "Float8Linear"), ("lora", True, "FrozenLinear")])
def test_which_layers(method: str, whole: bool, layer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU: all linear layers of the decoder, no adapter, not the head; torchao's where weights are trained or sharded."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    config = make_config(method=method, engine={"float8": "tensorwise"},
                         model={"architecture": {**ARCHITECTURE, "hidden_size": 64, "intermediate_size": 128}})
    model = empty_model(model_config(config, VOCABULARY), torch.bfloat16)
    shape_for_method(model, config.run.method, VOCABULARY, torch.bfloat16)
    use_float8(model, config.run.engine, torch.device("cuda"), whole)
    kinds = {name: type(m).__name__ for name, m in model.named_modules() if hasattr(m, "in_features") and "lora" not in type(m).__module__}
    assert sum(kind == layer for kind in kinds.values()) == 14
    assert {name for name, kind in kinds.items() if kind == "Linear"} == {"lm_head", *(name for name in kinds if ".lora_" in name)}


@pytest.mark.parametrize("kind", ["tensorwise", "rowwise"])
def test_trained_weights_need_a_gpu(kind: str) -> None:
    with pytest.raises(UserError, match=rf"run.engine.float8: '{kind}'.*needs GPUs"):
        make_engine(make_config(engine={"float8": kind}), CPU, 0, 1)


def test_four_bits_are_not_eight() -> None:
    with pytest.raises(UserError, match=r"run.engine.float8: 'tensorwise'.*lora"):
        make_config(method="qlora", engine={"float8": "tensorwise"})
