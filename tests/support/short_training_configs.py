"""Hypothesis strategy for configs of short trainings on this machine. The plan refuses some of them."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from tests.support.pipeline_run import tiny_config

_SIZES = {
    "vocab_size": st.sampled_from([400, 401, 512]),
    "hidden_size": st.sampled_from([32, 48, 64]),
    "intermediate_size": st.sampled_from([64, 96]),
    "num_hidden_layers": st.integers(1, 3),
    "num_attention_heads": st.sampled_from([1, 2, 4]),
    "max_position_embeddings": st.sampled_from([64, 128, 4096]),
}
_CHOICES = {"tie_word_embeddings": st.booleans(), "initializer_range": st.sampled_from([0.02, 0.5])}
_EXPERTS = {
    "moe_intermediate_size": st.sampled_from([16, 32]),
    "num_experts_per_tok": st.integers(1, 2),
}
_SCALING = st.sampled_from(
    [
        None,
        {"type": "linear", "factor": 2.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        {"rope_type": "dynamic", "factor": 2.0},
    ]
)
_GROUPED = {"num_key_value_heads": st.sampled_from([1, 2, 4]), "rope_scaling": _SCALING}
_MODELS = st.one_of(
    *(
        st.fixed_dictionaries({name: st.fixed_dictionaries({**_SIZES, **_GROUPED}, optional=_CHOICES)})
        for name in ("llama", "qwen2", "qwen3")
    ),
    st.fixed_dictionaries(
        {
            "qwen3_moe": st.fixed_dictionaries(
                {**_SIZES, **_GROUPED, **_EXPERTS, "num_experts": st.sampled_from([2, 4])}, optional=_CHOICES
            )
        }
    ),
    st.fixed_dictionaries(
        {
            "deepseek_v3": st.fixed_dictionaries(
                {
                    **_SIZES,
                    **_EXPERTS,
                    "n_routed_experts": st.sampled_from([2, 4]),
                    "n_shared_experts": st.integers(1, 2),
                    "n_group": st.integers(1, 2),
                    "topk_group": st.just(1),
                    "first_k_dense_replace": st.integers(0, 2),
                    "q_lora_rank": st.sampled_from([None, 16]),
                    "kv_lora_rank": st.sampled_from([16]),
                    "qk_nope_head_dim": st.sampled_from([8, 16]),
                    "qk_rope_head_dim": st.sampled_from([8, 16]),
                    "v_head_dim": st.sampled_from([8, 16]),
                },
                optional=_CHOICES,
            ).map(lambda keys: {**keys, "num_key_value_heads": keys["num_attention_heads"]})
        }
    ),
)
_DATASETS: dict[str, st.SearchStrategy[Any]] = {
    "deduplicate": st.sampled_from(["none", "exact", "near"]),
    "validation_fraction": st.sampled_from([0.0, 0.1, 0.4]),
    "bad_rows": st.sampled_from(["stop", "skip"]),
    "reasoning_in_loss": st.booleans(),
    "allow_control_tokens": st.booleans(),
    "chunk_mb": st.sampled_from([0.001, 16.0]),
}
_STAGE: dict[str, st.SearchStrategy[Any]] = {
    "global_batch_size": st.integers(1, 6),
    "micro_batch_size": st.integers(1, 3),
    "sequence_length": st.sampled_from([64, 66, 128]),
    "gpus_per_node": st.integers(1, 2),
    "precision": st.sampled_from(["fp32", "bf16"]),
    "zero": st.fixed_dictionaries(
        {"stage": st.integers(0, 3)},
        optional={"overlap_comm": st.booleans(), "reduce_bucket_size": st.sampled_from([1000, 10**8])},
    ),
}
_STAGE_CHOICES: dict[str, st.SearchStrategy[Any]] = {
    "parallel": st.sampled_from([{"tensor": 2}, {"pipeline": 2}, {"expert": 2}, {"sequence": 2}]),
    "activation_checkpointing": st.sampled_from(["none", "selective", "full", "offload"]),
    "optimizer": st.fixed_dictionaries(
        {},
        optional={
            "lr": st.sampled_from([1e-5, 1e-2]),
            "weight_decay": st.sampled_from([0.0, 1.0]),
            "gradient_clipping": st.sampled_from([0.0, 1.0]),
            "betas": st.sampled_from([[0.0, 0.0], [0.9, 0.999]]),
        },
    ),
    "schedule": st.sampled_from(
        [
            {"kind": "constant", "warmup_steps": 1},
            {"kind": "wsd", "decay_steps": 1},
            {"kind": "linear", "min_lr_ratio": 0.0},
        ]
    ),
    "communication": st.sampled_from([{"data_type": "bf16"}, {"powersgd": {"rank": 1, "start_step": 2}}]),
    "validation": st.fixed_dictionaries({"every_steps": st.integers(1, 3), "max_samples": st.integers(1, 5)}),
    "checkpoints": st.fixed_dictionaries({"every_steps": st.integers(1, 3), "keep_best": st.integers(0, 1)}),
    "bad_steps": st.sampled_from([{"policy": "skip"}, {"policy": "roll_back"}]),
    "skip_batches": st.sampled_from([[0], [1, 3]]),
    "truncate": st.sampled_from(["right", "left", "drop"]),
}

_BALANCE = {
    "qwen3_moe": {"sequence_aux_loss_coef": st.sampled_from([0.0, 0.01])},
    "deepseek_v3": {
        "sequence_aux_loss_coef": st.sampled_from([0.0, 0.01]),
        "router_bias_update_rate": st.sampled_from([0.0, 0.01]),
    },
}


@st.composite
def trainings(draw: st.DrawFn) -> dict[str, Any]:
    """Draw the config of one stage of two steps. Data and site are those of tests.support.pipeline_run."""
    kind = draw(st.sampled_from(["pretrain", "sft"]))
    stage = {
        "name": "main",
        "kind": kind,
        "dataset": "prose" if kind == "pretrain" else "chats",
        "steps": 2,
        "minutes": 5,
        **draw(st.fixed_dictionaries(_STAGE, optional=_STAGE_CHOICES)),
    }
    model = draw(_MODELS)
    stage |= draw(st.fixed_dictionaries({}, optional=_BALANCE.get(next(iter(model)), {})))
    config = tiny_config(stages=[stage], model=model, seed=draw(st.integers(0, 3)))
    for name in config["datasets"]:
        config["datasets"][name] |= draw(st.fixed_dictionaries({}, optional=_DATASETS))
    return config
