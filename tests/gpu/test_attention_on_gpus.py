"""The memory that attention keeps for the backward pass on a GPU."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from longhaul.compat.transformers import repeat_shared_heads_in_fp32

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
