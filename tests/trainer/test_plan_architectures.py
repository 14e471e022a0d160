"""Parameter counts against transformers' own modules on the meta device (importing them takes most of this test's time)."""

from __future__ import annotations

from dataclasses import replace

import pytest

from trainer.plan.architectures import KNOWN, Architecture


@pytest.mark.parametrize("name", ["Llama-2-7b", "Llama-3.1-8B", "Llama-3.2-1B", "Llama-2-70b"])
def test_counts_against_transformers(name: str) -> None:
    """Parameters, and those of adapters, are those of transformers' own modules."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = KNOWN[name]
    shape = replace(shape, layers=2)  # each layer has the same weights
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(
            hidden_size=shape.hidden, num_hidden_layers=2, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
            head_dim=shape.head_dim, intermediate_size=shape.ffn, vocab_size=shape.vocabulary, tie_word_embeddings=shape.tied))
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert shape.layer_parameters == sum(p.numel() for p in model.model.layers[0].parameters())
    assert Architecture.of(model.config.to_dict()) == shape
    linear = [m for m in model.model.layers.modules() if isinstance(m, torch.nn.Linear)]
    assert shape.adapters(16, ["all-linear"]) == sum(16 * (m.in_features + m.out_features) for m in linear)
