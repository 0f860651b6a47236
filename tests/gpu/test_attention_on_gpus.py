"""Attention on a GPU: the memory that it keeps for the backward pass, and gradients inside packs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import AutoConfig, AutoModelForCausalLM

from longhaul.compat.transformers import repeat_shared_heads_in_fp32
from longhaul.train.activation_checkpointing import apply_activation_checkpointing
from longhaul.train.compile_layers import compile_layers
from longhaul.train.packed_attention import use_packed_attention
from tests.parity.parity_cases import MODELS

HEADS, TOKENS = 16, 4096


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_keeps_no_scores_of_token_pairs(dtype: torch.dtype):
    repeat_shared_heads_in_fp32()
    config = AutoConfig.for_model(
        "llama",
        vocab_size=64,
        hidden_size=16 * HEADS,
        intermediate_size=16 * HEADS,
        num_hidden_layers=1,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS // 4,
        use_cache=False,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").cuda()
    before = torch.cuda.memory_allocated()
    output = model.model(torch.zeros(1, TOKENS, dtype=torch.long, device="cuda"))
    assert output.last_hidden_state.requires_grad
    assert torch.cuda.memory_allocated() - before < HEADS * TOKENS**2  # bytes; a score takes two or four


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    ("name", "checkpointing"),
    [
        ("llama", "none"),
        ("qwen3_moe", "none"),
        ("deepseek_v3", "none"),
        ("llama", "selective"),
        ("deepseek_v3", "selective"),
        ("llama", "full"),
        ("deepseek_v3", "full"),
    ],
)
def test_compiled_attention_inside_packs_has_the_gradients_of_attention_with_a_mask(name: str, checkpointing: str):
    masked, packed = (_build(name) for _ in range(2))
    use_packed_attention(packed)
    apply_activation_checkpointing(packed, checkpointing)
    compile_layers(packed)
    graphs = []
    for lengths in ([100, 412], [512], [3, 9, 500], [512]):
        expected, found = (_gradients(model, lengths) for model in (masked, packed))
        for key, value in expected.items():
            assert torch.allclose(found[key], value, rtol=1e-3, atol=1e-5 * value.abs().max().item()), (lengths, key)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[1] == graphs[3], "packs with other documents use the same graphs"


def _build(name: str) -> Any:
    (kind, keys), *_ = MODELS[name].items()
    torch.manual_seed(1)
    torch._dynamo.reset()
    counters.clear()
    config = AutoConfig.for_model(kind, **{**keys, "max_position_embeddings": 512}, use_cache=False)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa").train().cuda()


def _gradients(model: Any, lengths: list[int]) -> dict[str, torch.Tensor]:
    """Return the gradients for two samples that have documents of these lengths."""
    model.zero_grad()
    positions = torch.cat([torch.arange(length) for length in lengths]).repeat(2, 1).cuda()
    ids = (torch.arange(positions.numel(), device="cuda").view(2, -1) * 7) % 397 + 2
    model(input_ids=ids, position_ids=positions, use_cache=False).logits.logsumexp(-1).mean().backward()
    return {key: parameter.grad.clone() for key, parameter in model.named_parameters() if parameter.grad is not None}
