"""A small DeepSeek-V3 folder as DeepSeek publishes its models: block-scaled FP8, with a multi-token prediction layer.

https://huggingface.co/deepseek-ai/DeepSeek-V3: matrices of attention and experts as float8_e4m3fn with fp32 factors
`<name>_scale_inv` of blocks of 128 x 128, everything else as bf16, the router's bias as fp32; several files and an index.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, DeepseekV3Config
from transformers.core_model_loading import revert_weight_conversion

BLOCK, LARGEST = 128, 448.0
LAYERS = 2
CONFIG: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "vocab_size": 300,
    "hidden_size": 200,
    "intermediate_size": 136,
    "num_hidden_layers": LAYERS,
    "num_nextn_predict_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "moe_intermediate_size": 72,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 140,
    "kv_lora_rank": 48,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 40,
    "v_head_dim": 36,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "auto_map": {"AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM"},
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [BLOCK, BLOCK],
    },
}
NETWORK_KEYS = set(CONFIG) - {"architectures", "model_type", "torch_dtype", "auto_map", "quantization_config"}


def write_folder(folder: Path) -> dict[str, torch.Tensor]:
    """Write the folder. Return the tensors from which training must start: transformers' names, in fp32."""
    folder.mkdir(parents=True)
    torch.manual_seed(3)
    config = DeepseekV3Config(**{key: CONFIG[key] for key in NETWORK_KEYS})
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.add_(torch.randn(tensor.shape) / 3)
    stored: dict[str, torch.Tensor] = {}
    dequantized: dict[str, torch.Tensor] = {}
    for name, tensor in revert_weight_conversion(model, model.state_dict()).items():
        stored |= _stored(name, tensor, dequantized)
    stored |= _prediction_layer(stored)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    write_shards(folder, stored)
    return {name: _fused(name, tensor, dequantized) for name, tensor in model.state_dict().items()}


def write_shards(folder: Path, stored: dict[str, torch.Tensor]) -> None:
    """Write three files in turn, so that factors lie in other files than their matrices."""
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    names = [f"model-{number:05d}-of-000003.safetensors" for number in (1, 2, 3)]
    places = {key: names[index % 3] for index, key in enumerate(stored)}
    for name in names:
        part = {key: tensor.contiguous() for key, tensor in stored.items() if places[key] == name}
        save_file(part, folder / name, {"format": "pt"})
    index = {"metadata": {"total_size": 0}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _stored(name: str, tensor: torch.Tensor, dequantized: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    if name.endswith("e_score_correction_bias"):
        dequantized[name] = tensor
        return {name: tensor}
    if tensor.ndim < 2 or name in ("model.embed_tokens.weight", "lm_head.weight") or name.endswith("mlp.gate.weight"):
        dequantized[name] = tensor.bfloat16().float()
        return {name: tensor.bfloat16()}
    quantized, factors = quantize(tensor)
    # Element by element, unlike the code under test.
    rows, columns = (torch.arange(size) // BLOCK for size in tensor.shape)
    dequantized[name] = quantized.float() * factors[rows][:, columns]
    return {name: quantized, f"{name}_scale_inv": factors}


def quantize(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return FP8 values and one factor per block; the largest element of a block becomes the largest FP8 number."""
    padded = F.pad(tensor, (0, -tensor.shape[1] % BLOCK, 0, -tensor.shape[0] % BLOCK))
    blocks = padded.unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK))
    factors = blocks.abs().amax((1, 3)) / LARGEST
    scaled = (blocks / factors[:, None, :, None]).flatten(2, 3).flatten(0, 1)
    return scaled[: tensor.shape[0], : tensor.shape[1]].to(torch.float8_e4m3fn), factors


def _prediction_layer(stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a multi-token prediction layer with its own tensors; embedding and head are the model's."""
    last, added = f"model.layers.{LAYERS - 1}.", f"model.layers.{LAYERS}."
    hidden = CONFIG["hidden_size"]
    found = {key.replace(last, added): tensor.clone() for key, tensor in stored.items() if key.startswith(last)}
    norm = torch.ones(hidden, dtype=torch.bfloat16)
    return found | {
        f"{added}embed_tokens.weight": stored["model.embed_tokens.weight"].clone(),
        f"{added}enorm.weight": norm,
        f"{added}hnorm.weight": norm.clone(),
        f"{added}eh_proj.weight": torch.zeros(hidden, 2 * hidden, dtype=torch.bfloat16),
        f"{added}shared_head.norm.weight": norm.clone(),
        f"{added}shared_head.head.weight": stored["lm_head.weight"].clone(),
    }


def _fused(name: str, like: torch.Tensor, dequantized: dict[str, torch.Tensor]) -> torch.Tensor:
    if name in dequantized:
        return dequantized[name]
    prefix, _, kind = name.rpartition(".")
    parts = ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",)
    each = [
        torch.cat([dequantized[f"{prefix}.{expert}.{part}.weight"] for part in parts]) for expert in range(len(like))
    ]
    return torch.stack(each)
