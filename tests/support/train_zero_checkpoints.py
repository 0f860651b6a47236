"""Trains small models for two steps with real DeepSpeed and saves checkpoints, together with the weights of the live engine.

python train_zero_checkpoints.py FOLDER, in one process for each rank (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT). Every case
of the world size is written to FOLDER/<case>/: `reference.safetensors` with the gathered weights, and the weights folder of a
stage with one checkpoint and its reference values.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

from tests.support.checkpoint_manifest import manifest_fields

STEPS = 2
TAG = "step-00000002"


@dataclass(frozen=True)
class Case:
    """One training. kind: transformers' model type; freeze: part of the names of parameters that are not trained."""

    kind: str
    zero: int
    precision: str = "fp32"
    tied: bool = False
    freeze: str = ""
    zero_extra: tuple[tuple[str, object], ...] = ()


OFFLOAD = (("offload_optimizer", {"device": "cpu"}),)
CASES: dict[int, dict[str, Case]] = {
    1: {
        "one-llama-z0": Case("llama", 0, tied=True),
        "one-llama-z1": Case("llama", 1, "bf16", tied=True),
        "one-llama-z3": Case("llama", 3),
    },
    2: {
        "llama-z0": Case("llama", 0),
        "llama-tied-z0": Case("llama", 0, tied=True),
        "llama-tied-z1": Case("llama", 1, tied=True),
        "llama-tied-z2-bf16": Case("llama", 2, "bf16", tied=True),
        "llama-tied-z3-bf16": Case("llama", 3, "bf16", tied=True),
        "llama-frozen-z1": Case("llama", 1, freeze="layers.0.mlp"),
        "llama-frozen-z2": Case("llama", 2, freeze="layers.0.mlp"),
        "llama-frozen-z3": Case("llama", 3, freeze="layers.0.mlp"),
        "llama-offload-z2": Case("llama", 2, "bf16", zero_extra=OFFLOAD),
        "llama-offload-z3": Case("llama", 3, "bf16", zero_extra=OFFLOAD),
        "llama-round-robin-z2": Case("llama", 2, zero_extra=(("round_robin_gradients", True),)),
        "llama-sub-groups-z3": Case("llama", 3, zero_extra=(("sub_group_size", 5000),)),
        "qwen3-z1-fp16": Case("qwen3", 1, "fp16"),
        "qwen3-z3-fp16": Case("qwen3", 3, "fp16"),
        "qwen3-moe-z1-bf16": Case("qwen3_moe", 1, "bf16"),
        "qwen3-moe-z3": Case("qwen3_moe", 3),
        "deepseek-v2-z2": Case("deepseek_v2", 2),
        "deepseek-v3-z1": Case("deepseek_v3", 1),
        "deepseek-v3-tied-z1": Case("deepseek_v3", 1, tied=True),
        "deepseek-v3-z3-bf16": Case("deepseek_v3", 3, "bf16"),
    },
}


def hugging_face_config(kind: str, tied: bool):
    """Return the config of a model of two layers. Sizes are odd where possible, so that every kind of padding occurs.

    torch's grouped matrix product needs strides of 16 bytes, so the widths of mixtures of experts are multiples of 8.
    """
    import transformers

    mixture = kind not in ("llama", "qwen3")
    common = {
        "vocab_size": 261,
        "hidden_size": 48 if mixture else 33,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "intermediate_size": 45,
        "max_position_embeddings": 64,
        "tie_word_embeddings": tied,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    }
    grouped = {"num_key_value_heads": 1, "head_dim": 18}
    latent = {
        "num_key_value_heads": 3,
        "moe_intermediate_size": 24,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 14,
        "qk_rope_head_dim": 6,
        "qk_nope_head_dim": 10,
        "v_head_dim": 7,
    }
    experts = {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}
    if kind == "llama":
        return transformers.LlamaConfig(**common, **grouped)
    if kind == "qwen3":
        return transformers.Qwen3Config(**common, **grouped)
    if kind == "qwen3_moe":
        return transformers.Qwen3MoeConfig(**common, **grouped, **experts)
    if kind == "deepseek_v2":
        return transformers.DeepseekV2Config(**common, **latent, q_lora_rank=None)
    return transformers.DeepseekV3Config(**common, **latent, q_lora_rank=14, n_group=2, topk_group=1)


def deepspeed_config(case: Case) -> dict:
    """Return a ds_config with the ZeRO stage and precision of the case."""
    config: dict = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": case.zero, "stage3_param_persistence_threshold": 100, **dict(case.zero_extra)},
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
    }
    if case.precision != "fp32":
        config[case.precision] = {"enabled": True}
    if case.precision == "fp16":
        config["fp16"]["initial_scale_power"] = 8
    return config


def train(case: Case, seed: int, config=None):
    """Return the engine after STEPS steps of AdamW with two parameter groups; config: of another model than the case's."""
    import deepspeed
    import torch
    import transformers

    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config or hugging_face_config(case.kind, case.tied))
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(torch.randn(buffer.shape) / 7)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not (case.freeze and case.freeze in name))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=deepspeed_config(case))
    tokens = torch.randint(0, 261, (2, 24), generator=torch.Generator().manual_seed(engine.global_rank))
    for _ in range(STEPS):
        engine.backward(engine(input_ids=tokens, labels=tokens).loss)
        engine.step()
    return engine


def gather_weights(engine, case: Case) -> dict:
    """Return every parameter and persistent buffer of the live engine in fp32, by name; tied ones once."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    weights = {}
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=case.zero == 3):
            value = parameter.detach().float().clone()
        # With round_robin_gradients, DeepSpeed 0.19.8 returns fp32 values of other parameters. The weights are right.
        round_robin = ("round_robin_gradients", True) in case.zero_extra
        if case.zero and parameter.requires_grad and not round_robin:
            value = safe_get_full_fp32_param(parameter)
        weights[name] = value.clone().view(parameter.ds_shape if case.zero == 3 else parameter.shape)
    for name, buffer in engine.module.named_buffers():
        if name in engine.module.state_dict():
            weights[name] = buffer.float().clone()
    return weights


def reference_logits(engine) -> dict:
    """Return two prompts and the live engine's logits, in the form that the trainer writes."""
    import torch

    input_ids = torch.randint(3, 261, (2, 17), generator=torch.Generator().manual_seed(1))
    engine.module.eval()
    with torch.no_grad():
        logits = torch.cat([engine.module(input_ids=row[None], use_cache=False).logits for row in input_ids])
    return {"input_ids": input_ids, "logits": logits.float()}


def write_reference(folder: Path, case: Case, weights: dict, logits: dict) -> None:
    """Write the reference values and the manifest of a checkpoint that is exported as bf16."""
    import torch
    from safetensors.torch import save_file

    reference_folder = folder / "reference"
    reference_folder.mkdir()
    entries = {}
    for name, tensor in weights.items():
        exported = tensor if name.endswith("e_score_correction_bias") else tensor.bfloat16()
        entries[name] = {
            "shape": list(tensor.shape),
            "sha256_fp32": hashlib.sha256(tensor.numpy().tobytes()).hexdigest(),
            "sha256_export": hashlib.sha256(exported.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest(),
        }
    if case.tied:
        entries["model.embed_tokens.weight"]["aliases"] = ["lm_head.weight"]
    (reference_folder / "tensors.json").write_text(json.dumps(entries))
    origin = {"device": "cpu", "threads": 1, "dtype": case.precision, "torch": torch.__version__}
    (reference_folder / "logits.json").write_text(json.dumps(origin))
    (reference_folder / "prompts.json").write_text(
        json.dumps({"split": "validation", "input_ids": [[5, 6, 7], [8, 9]]})
    )
    save_file(logits, reference_folder / "logits.safetensors")
    write_manifest(folder)


def write_manifest(folder: Path) -> str:
    """Write manifest.json for the present files of the checkpoint folder; return its SHA-256."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json"]
    files = {
        str(path.relative_to(folder)): {
            "bytes": path.stat().st_size,
            "blake3": blake3(path.read_bytes()).hexdigest(),
        }
        for path in paths
    }
    manifest = folder / "manifest.json"
    manifest.write_text(json.dumps(manifest_fields(files, step=STEPS, has_reference_values=True)))
    return hashlib.sha256(manifest.read_bytes()).hexdigest()


def save_case(folder: Path, engine, case: Case) -> None:
    """Write the weights folder of a stage with one checkpoint and its reference values, and reference.safetensors."""
    from safetensors.torch import save_file

    weights, logits = gather_weights(engine, case), reference_logits(engine)
    checkpoints = folder / "weights" / "checkpoints"
    engine.save_checkpoint(str(checkpoints), tag=TAG)
    if engine.global_rank == 0:
        save_file(weights, folder / "reference.safetensors")
        write_reference(checkpoints / TAG, case, weights, logits)
        config = {**engine.module.config.to_dict(), "architectures": [type(engine.module).__name__]}
        (folder / "weights" / "model_config.json").write_text(json.dumps(config))


def start_deepspeed() -> None:
    """Prepare this process as one rank over gloo."""
    import deepspeed
    import torch
    from deepspeed.accelerator import get_accelerator

    from longhaul.compat.deepspeed_ops import disable_shm_comm

    torch.set_num_threads(1)
    disable_shm_comm()
    # DeepSpeed refuses fp16 on CPUs without fp16 matrix units. torch computes it on all, and only the files matter here.
    type(get_accelerator()).is_fp16_supported = lambda _: True
    deepspeed.init_distributed("gloo", verbose=False)


def main(folder: Path) -> None:
    """Run every case of this world size."""
    import torch

    from longhaul.runtime.process_rank import exit_without_cleanup

    start_deepspeed()
    for index, (name, case) in enumerate(CASES[int(os.environ["WORLD_SIZE"])].items()):
        engine = train(case, seed=index)
        save_case(folder / name, engine, case)
        engine.destroy()
    torch.distributed.barrier()
    exit_without_cleanup()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
