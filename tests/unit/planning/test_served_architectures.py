"""Networks that an engine cannot load, or computes otherwise, are refused with the reason and an engine that computes them.

Sources: the wheel of SGLang 0.5.23 and that of vLLM 0.32; the comment of each case names the file below sglang/srt or vllm.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from longhaul.config.load_config import load_site
from longhaul.config.site_config import Site
from longhaul.config.site_serving_config import EngineName, Serving
from longhaul.config.stage_config import Stage
from longhaul.config.well_known_models import REFERENCE_MODELS
from longhaul.errors import UserError
from longhaul.planning.serving_plan import ServingPlan, plan_serving

R1, QWEN = REFERENCE_MODELS["DeepSeek-R1"], REFERENCE_MODELS["DeepSeek-R1-Distill-Qwen-7B"]
LLAMA = REFERENCE_MODELS["DeepSeek-R1-Distill-Llama-8B"]
QWEN3 = LLAMA | {"model_type": "qwen3", "head_dim": 128}
MIXTURE = QWEN3 | {"model_type": "qwen3_moe", "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 1024}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
LONG = {"rope_type": "longrope", "short_factor": [1.0] * 64, "long_factor": [2.0] * 64}
LONG |= {"original_max_position_embeddings": 65536}
WINDOW = QWEN | {"use_sliding_window": True, "sliding_window": 4096}
BOTH: tuple[EngineName, ...] = ("vllm", "sglang")


@pytest.fixture(scope="module")
def site() -> Site:
    return load_site("slurm-generic", Path())


def planned(site: Site, engine: EngineName, model: dict[str, Any], dtype: str = "bf16", **serve: Any) -> ServingPlan:
    stage = {"name": "chat", "kind": "sft", "dataset": "chats", "steps": 1, "global_batch_size": 1}
    stage |= {"sequence_length": 64, "export": "last", "export_dtype": dtype, "serve": {"context": 8192, **serve}}
    on_site = site.model_copy(update={"serving": Serving(engine=engine)})
    return plan_serving(Stage.model_validate(stage), model, on_site)


@pytest.mark.parametrize(
    ("model", "engines", "message"),
    [
        # models/llama.py, LlamaMLP; both: models/deepseek_v2.py; vllm: models/qwen3.py, o_proj, and models/utils.py
        (LLAMA | {"mlp_bias": True}, ("sglang",), "biases that mlp_bias true adds"),
        (R1 | {"attention_bias": True}, BOTH, "biases that attention_bias true adds"),
        (QWEN3 | {"attention_bias": True}, ("vllm",), "biases that attention_bias true adds"),
        # models/qwen3_moe.py, stage_facts
        (MIXTURE | {"mlp_only_layers": [0, 2]}, ("sglang",), "leaves out the weights of 2 layers without"),
        (MIXTURE | {"decoder_sparse_step": 2}, ("sglang",), "leaves out the weights of 16 layers without"),
        # models/deepseek_v2.py: every rope_type becomes deepseek_yarn; layers/rotary_embedding/rope_variant.py
        (R1 | {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, BOTH, "rope_scaling.rope_type is linear"),
        (R1 | {"rope_scaling": YARN | {"attention_factor": 1.0}}, BOTH, "rope_scaling.attention_factor 1.0"),
        (R1 | {"rope_scaling": YARN | {"truncate": False}}, BOTH, "rope_scaling.truncate False"),
        (R1 | {"rope_scaling": YARN | {"mscale_all_dim": 0.5}}, BOTH, "rope_scaling.mscale_all_dim 0.5"),
        (R1 | {"rope_interleave": False}, ("vllm",), "rope_interleave false"),
        # layers/rotary_embedding/factory.py: yarn reads attn_factor; longrope reads short_mscale and long_mscale
        (QWEN | {"rope_scaling": YARN | {"attention_factor": 2.0}}, ("sglang",), "rope_scaling.attention_factor 2.0"),
        (LLAMA | {"rope_scaling": LONG | {"factor": 8.0}}, BOTH, "rope_scaling.factor 8.0"),
        (LLAMA | {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, ("sglang",), "rope_type dynamic"),
        # models/qwen2.py has no window; vllm: models/qwen2.py, assertion
        (WINDOW | {"max_window_layers": 0}, ("sglang",), "all 8192 tokens .* sliding_window 4096"),
        (WINDOW | {"max_window_layers": 8}, BOTH, "sliding_window"),
    ],
)
def test_a_network_that_an_engine_computes_otherwise_is_refused(
    site: Site, model: dict[str, Any], engines: tuple[EngineName, ...], message: str
):
    for engine in engines:
        with pytest.raises(UserError, match=f"stages.chat: {engine} cannot serve this model: .*{message}") as error:
            planned(site, engine, model, nodes=4)
        others = [other for other in ("sglang", "vllm", "transformers") if other not in engines]
        assert error.value.hint == f"set serving.engine in the site file to {' or '.join(others)}"
    for engine in BOTH:
        if engine not in engines:
            assert planned(site, engine, model, nodes=4)


@pytest.mark.parametrize("engine", BOTH)
@pytest.mark.parametrize(
    "model",
    [
        R1 | {"rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0, "beta_fast": 32, "beta_slow": 1}},
        QWEN | {"rope_scaling": YARN | {"attention_factor": 1.1386294361119891, "truncate": False}},
        QWEN | {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6}},
        LLAMA | {"rope_scaling": LONG | {"factor": 2.0}, "attention_bias": True},
        WINDOW | {"max_window_layers": 28},
        MIXTURE | {"mlp_only_layers": []},
        WINDOW | {"sliding_window": 8192, "max_window_layers": 0},
    ],
)
def test_what_engines_compute_as_the_trainer_is_not_refused(site: Site, engine: EngineName, model: dict[str, Any]):
    assert planned(site, engine, model, nodes=4)


@pytest.mark.parametrize("engine", BOTH)
@pytest.mark.parametrize(
    ("model", "message"),
    [
        # layers/quantization/fp8.py, validate_block_quant_shapes and Fp8MoEMethod: experts, gate and up, query, key and value
        (R1 | {"moe_intermediate_size": 1984}, "moe_intermediate_size is 1984"),
        (QWEN | {"intermediate_size": 18880}, "intermediate_size is 18880"),
        (QWEN | {"hidden_size": 1792, "num_key_value_heads": 1}, "num_key_value_heads x head_dim is 64"),
        # models/deepseek_common/deepseek_weight_loader.py joins the factors of q_a_proj and kv_a_proj_with_mqa
        (R1 | {"q_lora_rank": 1500}, "q_lora_rank is 1500"),
        # kernels/ops/quantization/fp8_kernel.py quantizes inputs in groups of 128
        (QWEN3 | {"hidden_size": 4160}, "hidden_size is 4160"),
        (R1 | {"kv_lora_rank": 448}, "kv_lora_rank is 448"),
        (R1 | {"num_attention_heads": 3, "num_key_value_heads": 3, "v_head_dim": 64}, "x v_head_dim is 192"),
    ],
)
def test_fp8_matrices_must_be_whole_blocks(site: Site, engine: EngineName, model: dict[str, Any], message: str):
    with pytest.raises(UserError, match=f"{engine} cannot serve .* fp8: .*{message}, no multiple of .* 128") as error:
        planned(site, engine, model, "fp8", nodes=4)
    assert error.value.hint == "set export_dtype to bf16"
    assert planned(site, engine, model, nodes=4)


def test_transformers_serves_fp8_matrices_of_any_size(site: Site):
    assert planned(site, "transformers", QWEN | {"intermediate_size": 18880}, "fp8")


def test_sglang_reads_no_fp8_llama(site: Site):
    """models/llama.py renames weight_scale_inv to weight_scale; layers/quantization/fp8.py names the factors weight_scale_inv."""
    with pytest.raises(UserError, match=r"sglang cannot serve .* fp8: SGLang reads no factors .* llama") as error:
        planned(site, "sglang", LLAMA, "fp8")
    assert error.value.hint == "set export_dtype to bf16, or serving.engine in the site file to vllm"
    assert planned(site, "vllm", LLAMA, "fp8") and planned(site, "sglang", QWEN, "fp8")


def test_sglang_spreads_no_llama_with_tied_embeddings_over_pipeline_ranks(site: Site):
    """models/llama.py: lm_head is embed_tokens, which only the first rank has."""
    tied = LLAMA | {"tie_word_embeddings": True}
    with pytest.raises(UserError, match="sglang cannot serve a llama with tie_word_embeddings on 2 pipeline ranks"):
        planned(site, "sglang", tied, nodes=2)
    assert planned(site, "sglang", tied, nodes=1) and planned(site, "vllm", tied, nodes=2)
