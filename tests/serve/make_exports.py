"""Trains one tiny model of each family for two steps and exports it with the real exporter.

python -m tests.serve.make_exports FOLDER writes FOLDER/<case>/export/main/latest and FOLDER/<case>/export/main.json. The
sizes are those that vLLM's CPU kernels accept: heads of 64, and for DeepSeek's latent attention 512 + 64.
"""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path
from typing import Any

import transformers

from longhaul.export.export_checkpoint import run
from tests.support.stage_folder import create_exportable_stage
from tests.support.train_zero_checkpoints import Case, save_case, start_deepspeed, train

CASES = {
    "llama": Case("llama", 1),
    "llama-tied": Case("llama", 1, tied=True),
    "qwen2-tied": Case("qwen2", 1, tied=True),
    "qwen3": Case("qwen3", 1),
    "qwen3-moe-tied": Case("qwen3_moe", 1, tied=True),
    "deepseek-v2-tied": Case("deepseek_v2", 1, tied=True),
    "deepseek-v3-tied": Case("deepseek_v3", 1, tied=True),
    "deepseek-v3-yarn": Case("deepseek_v3", 1),
}
_EXPERTS = {"moe_intermediate_size": 128, "num_experts_per_tok": 2}
_LATENT = _EXPERTS | {
    "num_key_value_heads": 2,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
}
_GROUPED = {"num_key_value_heads": 1, "head_dim": 64}
_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _GROUPED),
    "qwen2": ("Qwen2Config", {"num_key_value_heads": 1}),
    "qwen3": ("Qwen3Config", _GROUPED),
    "qwen3_moe": ("Qwen3MoeConfig", _GROUPED | _EXPERTS | {"num_experts": 8, "norm_topk_prob": True}),
    "deepseek_v2": ("DeepseekV2Config", _LATENT | {"q_lora_rank": None}),
    "deepseek_v3": ("DeepseekV3Config", _LATENT | {"q_lora_rank": 64, "n_group": 2, "topk_group": 1}),
}
_ROPE: dict[str, dict[str, Any]] = {
    "llama": {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "deepseek-v3-yarn": {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 4.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 32,
    },
}


def servable_config(name: str) -> Any:
    """Return the config of a case's model: a width of 128 and two layers."""
    case = CASES[name]
    class_name, keys = _FAMILIES[case.kind]
    rope = {"rope_parameters": _ROPE.get(name, {"rope_type": "default", "rope_theta": 5e4})}
    return getattr(transformers, class_name)(
        vocab_size=320,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
        initializer_range=0.2,
        tie_word_embeddings=case.tied,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        **keys,
        **rope,
    )


def main(folder: Path) -> None:
    """Write the export of every case."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    start_deepspeed()
    for index, (name, case) in enumerate(CASES.items()):
        engine = train(case, seed=index, config=servable_config(name))
        save_case(folder / name / "trained", engine, case)
        engine.destroy()
        run(create_exportable_stage(folder / name / "trained", folder / name, "fp32").job)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
