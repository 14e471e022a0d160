"""Adapters: which layers, which names, merged into the model that was trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.trainer.engine_cases import CPU, VOCABULARY, batches_of, make_config, train
from trainer.config import MethodConfig
from trainer.data.shards import TokenShards
from trainer.engines import make_engine
from trainer.engines.base import Piece
from trainer.errors import UserError
from trainer.export import Source
from trainer.model.load import empty_model, load_model, model_config, open_weights
from trainer.model.loss import token_loss_sum, use_packed_forward
from trainer.model.methods import adapter_targets, canonical, shape_for_method


def test_targets() -> None:
    model = empty_model(model_config(make_config()), torch.float32)
    everything = adapter_targets(model, MethodConfig(kind="lora"))
    assert len(everything) == 14 and not any("lm_head" in n for n in everything)
    some = adapter_targets(model, MethodConfig(kind="lora", targets=["q_proj", "mlp.up_proj"]))
    assert some == ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj",
                    "model.layers.1.mlp.up_proj"]
    with pytest.raises(UserError, match=r"run.method.targets: 'query'.*use all-linear, or down_proj, gate_proj"):
        adapter_targets(model, MethodConfig(kind="lora", targets=["query"]))


def test_canonical_names() -> None:
    assert canonical("model.layers.0.mlp.up_proj.base_layer.weight") == "model.layers.0.mlp.up_proj.weight"
    assert canonical("model.layers.0.mlp.up_proj.lora_A.default.weight") == "model.layers.0.mlp.up_proj.lora_A.weight"


def test_adapted_layer_is_pefts() -> None:
    """Output and gradients of an adapted layer are those of peft's own forward, which multiplies B's output."""
    torch.manual_seed(0)
    model = empty_model(model_config(make_config()), torch.float32)
    shape_for_method(model, MethodConfig(kind="lora", rank=4, alpha=12, targets=["up_proj"]), VOCABULARY, torch.float32)
    layer = model.model.layers[0].mlp.up_proj.to_empty(device="cpu").double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(5, layer.base_layer.in_features, dtype=torch.float64, requires_grad=True)
    trained = [x, layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    ours, peft = layer(x), type(layer).forward(layer, x)
    torch.testing.assert_close(ours, peft)
    cotangent = torch.randn_like(ours)
    for a, b in zip(torch.autograd.grad(ours, trained, cotangent), torch.autograd.grad(peft, trained, cotangent), strict=True):
        torch.testing.assert_close(a, b)


class Trained:
    """An engine's pieces as `export` reads a checkpoint's."""

    def __init__(self, pieces: list[Piece]) -> None:
        self._pieces = {p.name: p for p in pieces if p.name.startswith("weights/")}

    def names(self) -> list[str]:
        return list(self._pieces)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._pieces[name].shape

    def read(self, name: str, start: int, out: torch.Tensor) -> None:
        out.copy_(self._pieces[name].tensor[start:start + out.numel()])


@pytest.mark.parametrize(("tied", "tokens"), [(False, None), (False, VOCABULARY + 3), (True, VOCABULARY + 3)])
def test_merged_is_trained(toy_rows: Path, tied: bool, tokens: int | None) -> None:
    """The loss of the merged plain model is that of base and adapters; new tokens' rows were trained and are merged as well."""
    config, shards = make_config(method="lora", tied=tied), TokenShards(toy_rows, "train")
    engine = make_engine(config, CPU, 0, 1, tokens)
    train(engine, shards, 0, 3)
    batches, _ = batches_of(shards, 5, 0, 1)
    loss, count = engine.evaluate(batches)
    state = {p.name.removeprefix("weights/"): p.tensor.view(p.shape) for p in engine.pieces() if p.name.startswith("weights/")}
    assert any(n.endswith("new_rows") for n in state) == (tokens is not None)
    merged = load_model(config, tokens=tokens or VOCABULARY)
    untouched = merged.model.layers[0].mlp.up_proj.weight.clone()
    source = Source(Trained(engine.pieces()), lambda: open_weights(config, merged.config), config.run.method)
    with torch.no_grad():
        for name, parameter in merged.named_parameters():
            parameter.copy_(source.tensor(name, tuple(parameter.shape), parameter.dtype))
    assert not torch.equal(merged.model.layers[0].mlp.up_proj.weight, untouched)
    if tokens is not None:
        rows = state["model.embed_tokens.new_rows"]
        assert torch.equal(merged.model.embed_tokens.weight[-len(rows):], rows)
    use_packed_forward(merged)
    with torch.no_grad():
        assert sum(token_loss_sum(merged, b, CPU).item() for b in batches) / count == pytest.approx(loss / count, rel=1e-5)


def test_new_rows_are_used_and_trained(toy_rows: Path) -> None:
    """A row of new tokens changes its own rows in embedding and head, and nothing else of either."""
    from trainer.data.loader import PackedBatch

    engine = make_engine(make_config(method="lora"), CPU, 0, 1, VOCABULARY + 2)
    ids = torch.tensor([1, VOCABULARY, 2, VOCABULARY + 1, 3, 4])
    batch = PackedBatch(input_ids=ids, position_ids=torch.arange(6), cu_seqlens=torch.tensor([0, 6], dtype=torch.int32), max_seqlen=24,
                        loss_index=torch.arange(5), targets=ids[1:], rows=1, tokens=6, loss_tokens=5)
    before = {p.name: p.tensor.view(p.shape).clone() for p in engine.pieces() if p.name.endswith("new_rows")}
    frozen = engine.model.model.embed_tokens.weight.clone()  # type: ignore[union-attr]
    engine.forward_backward([batch], 5)
    engine.step(1e-2)
    after = {p.name: p.tensor.view(p.shape) for p in engine.pieces() if p.name.endswith("new_rows")}
    changed = (after["weights/model.embed_tokens.new_rows"] != before["weights/model.embed_tokens.new_rows"]).any(1)
    assert changed.tolist()[:2] == [True, True] and not changed[2:].any(), "rows that only round the vocabulary up get no gradient"
    assert (after["weights/lm_head.new_rows"] != before["weights/lm_head.new_rows"]).any(1).all()
    assert torch.equal(engine.model.model.embed_tokens.weight, frozen)  # type: ignore[union-attr]


def test_quantised_layers_train_adapters(toy_rows: Path) -> None:
    """QLoRA's model on the CPU (bitsandbytes' reference kernels; the trainer itself asks for GPUs): 4-bit layers stay as they are."""
    from tests.trainer.engine_cases import ARCHITECTURE
    from trainer.engines.replicated import ReplicatedEngine

    config = make_config(method="qlora", model={"architecture": {**ARCHITECTURE, "hidden_size": 64, "intermediate_size": 128}})
    engine = ReplicatedEngine(config, VOCABULARY + 3, CPU, 0, 1)
    layers = [m for n, m in engine.model.named_modules() if n.endswith(".base_layer")]
    assert len(layers) == 14 and all(m.weight.dtype == torch.uint8 for m in layers)
    packed = [m.weight.clone() for m in layers]
    curve = train(engine, TokenShards(toy_rows, "train"), 0, 4)
    assert curve[-1][0] < curve[0][0] - 0.3
    assert all(torch.equal(m.weight, p) for m, p in zip(layers, packed, strict=True))
    names = {p.name.split("/", 1)[1] for p in engine.pieces()}
    assert len(names) == 30 and "model.layers.1.mlp.down_proj.lora_B.weight" in names and "lm_head.new_rows" in names
