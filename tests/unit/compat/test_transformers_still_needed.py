"""Each function of compat/transformers.py is still needed. A failing test means that a public interface replaces it."""

from __future__ import annotations

import torch
import transformers
from transformers import DeepseekV3ForCausalLM, LlamaConfig, PreTrainedModel

from longhaul.compat.transformers import hub_tensors, is_kept_in_fp32, without_tied_weights


def tied_model() -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=4,
        intermediate_size=4,
        num_hidden_layers=1,
        num_attention_heads=1,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        return transformers.LlamaForCausalLM(config)


def test_fp32_modules_have_only_a_private_name() -> None:
    assert DeepseekV3ForCausalLM._keep_in_fp32_modules_strict == ["e_score_correction_bias"]
    assert not [name for name in dir(PreTrainedModel) if "fp32" in name and not name.startswith("_")]
    assert not is_kept_in_fp32(tied_model(), "model.norm.weight")


def test_tied_weights_are_removed_only_by_an_internal_function() -> None:
    model = tied_model()
    assert set(model.state_dict()) - set(without_tied_weights(model, model.state_dict())) == {"lm_head.weight"}
    assert not [name for name in transformers.__all__ if "tied_weights" in name]


def test_hub_names_are_computed_only_by_an_internal_function() -> None:
    model = tied_model()
    assert set(hub_tensors(model, model.state_dict())) == set(model.state_dict())
    assert not [name for name in transformers.__all__ if "weight_conversion" in name]
