"""Packed rows give what each row gives alone: loss and gradients, with grouped heads and tied embeddings."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tests.trainer.engine_cases import MAX_TOKENS, make_config
from trainer.config import Config
from trainer.data.loader import PackedBatch, collate
from trainer.data.shards import TokenShards
from trainer.model.load import load_model
from trainer.model.loss import IGNORED, chunked_cross_entropy, token_loss_sum, use_packed_forward

CPU = torch.device("cpu")
ROWS = [3, 14, 15, 9, 26]


def config(heads: int = 4, groups: int = 2, tied: bool = False) -> Config:
    base = make_config(tied=tied)
    return make_config(model={"architecture": {**base.run.model.architecture, "num_attention_heads": heads, "num_key_value_heads": groups}})


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    out = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return out


@pytest.mark.parametrize(("heads", "groups", "tied"), [(4, 4, False), (4, 2, False), (4, 1, False), (4, 2, True)])
def test_packed_is_unpacked(toy_rows: Path, heads: int, groups: int, tied: bool) -> None:
    """Against transformers' own attention, loss and gradients, one row at a time. Tolerance: float32 sums in another order."""
    shards, settings = TokenShards(toy_rows, "train"), config(heads, groups, tied)
    stock = load_model(settings)
    expected = torch.zeros(())
    for row in ROWS:
        tokens, start = shards.row(row)
        ids = torch.tensor(tokens.astype("int64"))
        logits = stock(input_ids=ids[None]).logits[0]
        expected = expected + F.cross_entropy(logits[start - 1:-1], ids[start:], reduction="sum")
    expected.backward()
    wanted = gradients(stock)
    packed = load_model(settings)
    use_packed_forward(packed)
    batch = collate(shards, ROWS, 6 * MAX_TOKENS)
    loss = token_loss_sum(packed, batch, CPU)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    got = gradients(packed)
    assert set(got) == set(wanted)
    for name, gradient in wanted.items():
        assert torch.allclose(got[name], gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item()), name
    assert sum(p.numel() for p in packed.parameters()) == sum(p.numel() for p in stock.parameters())


def test_rows_do_not_see_each_other_and_padding_counts_nothing(toy_rows: Path) -> None:
    """The control: without borders the loss is another one; a longer tail of padding changes nothing."""
    shards = TokenShards(toy_rows, "train")
    model = load_model(config())
    use_packed_forward(model)
    batch = collate(shards, ROWS, 6 * MAX_TOKENS)
    loss = token_loss_sum(model, batch, CPU).item()
    assert token_loss_sum(model, collate(shards, ROWS, 9 * MAX_TOKENS + 5), CPU).item() == pytest.approx(loss, rel=1e-6)
    joined = batch.cu_seqlens.clone()
    joined[1:] = len(batch.input_ids)
    one = PackedBatch(**{**vars(batch), "cu_seqlens": joined, "max_seqlen": len(batch.input_ids)})
    assert abs(token_loss_sum(model, one, CPU).item() - loss) > 1e-4 * loss  # a hundred times the tolerance above


def test_a_batch_without_trained_tokens_has_zero_gradients(toy_rows: Path) -> None:
    """They are zeros, not absent: every rank takes part in the same reductions."""
    model = load_model(config())
    use_packed_forward(model)
    loss = token_loss_sum(model, collate(TokenShards(toy_rows, "train"), [], 2 * MAX_TOKENS), CPU)
    loss.backward()
    assert loss.item() == 0
    assert all((g == 0).all() for g in gradients(model).values()) and model.lm_head.weight.grad is None


def test_borders_must_cover_the_batch(toy_rows: Path) -> None:
    model = load_model(config())
    use_packed_forward(model)
    batch = collate(TokenShards(toy_rows, "train"), ROWS, 6 * MAX_TOKENS)
    short = PackedBatch(**{**vars(batch), "cu_seqlens": batch.cu_seqlens.clamp(max=20)})
    with pytest.raises(ValueError, match="must rise from 0 to 144"):
        token_loss_sum(model, short, CPU)


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_chunks_do_not_change_the_loss(chunk: int) -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(7, 5, requires_grad=True), torch.randn(11, 5, requires_grad=True)
    targets = torch.tensor([1, 2, IGNORED, 4, 5, 10, 0])
    expected = F.cross_entropy(hidden @ weight.t(), targets, reduction="sum")
    wanted = torch.autograd.grad(expected, (hidden, weight))
    loss = chunked_cross_entropy(hidden, weight, targets, chunk)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for got, want in zip(torch.autograd.grad(loss, (hidden, weight)), wanted, strict=True):
        assert torch.allclose(got, want, atol=1e-6)
    with torch.no_grad():
        assert chunked_cross_entropy(hidden, weight, targets, chunk).item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("groups", [4, 2, 1])
def test_gpu_attention_reads_no_value_on_the_host(groups: int) -> None:
    """The GPU's branch on tensors without values: any read of one would raise. Grouped heads are taken as they are."""
    from torch._subclasses import FakeTensorMode

    from trainer.model.attention import packed_attention

    with FakeTensorMode():
        query = torch.empty(1, 4, 64, 16, device="cuda", dtype=torch.bfloat16)
        key, value = (torch.empty(1, groups, 64, 16, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        borders = torch.empty(9, device="cuda", dtype=torch.int32)
        out, _ = packed_attention(torch.nn.Module(), query, key, value, None, scaling=0.25, cu_seq_lens_q=borders, max_length_q=24)
        assert out.shape == (1, 64, 4, 16) and out.is_cuda
