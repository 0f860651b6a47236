"""Which trainings skip pairs of tokens of different documents, and what passes without gradients compute.

FlexAttention has no gradients on CPUs: tests/gpu/test_attention_on_gpus.py compares them.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.masking_utils import create_causal_mask

from longhaul.train.packed_attention import ATTENTION, can_skip_pairs, use_packed_attention
from tests.parity.parity_cases import MODELS
from tests.support.tiny_sizes import tiny_stage

PACK = torch.cat([torch.arange(100), torch.arange(156)]).repeat(2, 1)
WHOLE = torch.arange(256).repeat(2, 1)


def build(name: str, **keys: Any) -> Any:
    ((kind, sizes),) = MODELS[name].items()
    torch.manual_seed(1)
    config = AutoConfig.for_model(kind, **{**sizes, "max_position_embeddings": 256, **keys}, use_cache=False)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")


STAGE = {"kind": "sft", "sequence_length": 256}
CASES: dict[str, tuple[dict[str, Any], str, dict[str, Any], bool]] = {
    "packs": (STAGE, "llama", {}, True),
    "latent attention": (STAGE, "deepseek_v3", {}, True),
    "whole windows": ({**STAGE, "kind": "pretrain"}, "llama", {}, False),
    "a part of a block": ({**STAGE, "sequence_length": 200}, "llama", {}, False),
    "sequence parallelism": ({**STAGE, "parallel": {"sequence": 2}, "gpus_per_node": 2}, "llama", {}, False),
    "small heads": (STAGE, "llama", {"num_attention_heads": 8}, False),
    "dropout": (STAGE, "llama", {"attention_dropout": 0.1}, False),
}


@pytest.mark.parametrize(("stage", "name", "keys", "expected"), CASES.values(), ids=CASES)
def test_packs_skip_pairs_where_flex_attention_computes_the_same(
    stage: dict[str, Any], name: str, keys: dict[str, Any], expected: bool
):
    assert can_skip_pairs(tiny_stage(**stage), build(name, **keys)) is expected


def test_models_of_remote_code_keep_their_attention():
    model = build("llama")
    remote: Any = type("Remote", (type(model),), {"__module__": "transformers_modules.own.modeling"})
    model.__class__ = remote
    assert not can_skip_pairs(tiny_stage(**STAGE), model)


def test_passes_without_gradients_compute_what_sdpa_does():
    usual, changed = build("llama").eval(), build("llama").eval()
    use_packed_attention(changed)
    ids = torch.arange(2, 258).repeat(2, 1)
    with torch.no_grad():
        for positions in (PACK, WHOLE):
            found, expected = (model(input_ids=ids, position_ids=positions).logits for model in (changed, usual))
            assert torch.equal(found, expected)


def test_only_packs_in_passes_with_gradients_get_blocks():
    model = build("llama")
    use_packed_attention(model)
    assert model.config._attn_implementation == ATTENTION

    @torch.compiler.set_stance("force_eager")  # transformers compiles the search for blocks
    def mask(positions: torch.Tensor) -> object:
        return create_causal_mask(model.config, torch.zeros(2, 256, 64), None, None, positions)

    blocks = mask(PACK)
    assert isinstance(blocks, BlockMask) and blocks.to_dense().tolist() == [[[[1, 0], [1, 1]]]] * 2
    assert mask(WHOLE) is None
    with torch.no_grad():
        dense = mask(PACK)
    assert isinstance(dense, torch.Tensor) and dense.shape == (2, 1, 256, 256) and not dense[0, 0, 150, 50]
