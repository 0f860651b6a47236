"""Documents of one pack do not attend to each other: neither in the outputs nor in the gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
}
EXPERTS = {"moe_intermediate_size": 16, "num_experts_per_tok": 2}
MODELS: dict[str, dict[str, Any]] = {
    "llama": SIZES,
    "qwen2": SIZES,
    "qwen3": {**SIZES, "head_dim": 8},
    "qwen3_moe": {**SIZES, **EXPERTS, "num_experts": 4, "head_dim": 8},
    "deepseek_v3": {
        **SIZES,
        **EXPERTS,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
    },
}
FIRST, SECOND = 9, 7


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", MODELS)
def test_documents_of_a_pack_do_not_attend_to_each_other(architecture: str, attention: str):
    torch.manual_seed(0)
    config = AutoConfig.for_model(architecture, **MODELS[architecture])
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).train()
    ids = torch.randint(0, 64, (1, FIRST + SECOND))
    positions = torch.cat([torch.arange(FIRST), torch.arange(SECOND)])[None]
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    packed = model(inputs_embeds=embedded, position_ids=positions, use_cache=False).logits[0]
    for own, other in ((slice(0, FIRST), slice(FIRST, None)), (slice(FIRST, None), slice(0, FIRST))):
        alone = model(input_ids=ids[:, own], position_ids=positions[:, own], use_cache=False).logits[0]
        torch.testing.assert_close(packed[own], alone, rtol=1e-4, atol=1e-5)
        (gradient,) = torch.autograd.grad(packed[own].square().sum(), embedded, retain_graph=True)
        assert gradient[0, other].abs().max() == 0
        assert gradient[0, own].abs().max() > 0


def test_the_check_detects_attention_across_documents():
    """With positions that do not restart, the second document attends to the first one."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SIZES)).train()
    embedded = model.get_input_embeddings()(torch.randint(0, 64, (1, FIRST + SECOND))).detach().requires_grad_()
    logits = model(inputs_embeds=embedded, position_ids=torch.arange(FIRST + SECOND)[None], use_cache=False).logits[0]
    (gradient,) = torch.autograd.grad(logits[FIRST:].square().sum(), embedded)
    assert gradient[0, :FIRST].abs().max() > 0
