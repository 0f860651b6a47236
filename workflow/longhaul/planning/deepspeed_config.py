"""Sets each key of ds_config.json (lr, weight_decay, zero_optimization, fp16); parameter groups are in train/deepspeed_engine.py.
The trainer adds the values that only a running process knows.

The optimizer's lr and weight_decay are written only here; the trainer reads them from ds_config.json.
"""

from __future__ import annotations

from typing import Any

from longhaul.config.site_config import Site
from longhaul.planning.constants_shared_with_trainer import (
    SWAP_OPTIMIZER_BUFFERS,
    SWAP_PARAM_BUFFERS,
    SWAP_SUB_GROUP_ELEMENTS,
)
from longhaul.planning.model_state_memory import reduces_gradients
from longhaul.planning.plan import StagePlan

_OPTIONAL_KEYS = ("reduce_bucket_size", "allgather_bucket_size")
_OPTIONAL_KEYS_OF_STAGE_3 = (
    "reduce_bucket_size",
    "stage3_prefetch_bucket_size",
    "stage3_param_persistence_threshold",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
)


def deepspeed_sections(plan: StagePlan, site: Site) -> dict[str, Any]:
    """Return DeepSpeed's config for a stage. A test checks that the pinned DeepSpeed reads each key."""
    stage = plan.stage
    sections: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": stage.micro_batch_size,
        "gradient_accumulation_steps": plan.accumulation,
        # Without this key, DeepSpeed clips at 1.0.
        "gradient_clipping": stage.optimizer.gradient_clipping,
        "steps_per_print": 1_000_000_000,
        # DeepSpeed's own clock waits for the GPU in every micro batch.
        "timers": {"throughput": {"enabled": False}},
        "optimizer": _optimizer(plan, site),
        "zero_optimization": _zero(plan),
    }
    if stage.communication.data_type:
        sections["communication_data_type"] = stage.communication.data_type
    if stage.parallel.pipeline > 1:
        # Pipeline ranks send whole activations. If DeepSpeed splits them over tensor ranks, it loses the position ids.
        sections["pipeline"] = {"pipe_partitioned": False, "grad_partitioned": False}
    if stage.precision in {"bf16", "fp8"}:
        # The trainer examines the loss and the gradient norm of every step itself (train/detect_bad_steps.py).
        sections["bf16"] = {"enabled": True, "check_grad_overflow": False}
    if stage.precision == "fp16":
        scale = stage.fp16
        sections["fp16"] = {
            "enabled": True,
            "loss_scale": scale.loss_scale,
            "initial_scale_power": scale.initial_scale_power,
            "loss_scale_window": scale.loss_scale_window,
            "hysteresis": scale.hysteresis,
            "min_loss_scale": scale.min_loss_scale,
        }
    return sections


def _optimizer(plan: StagePlan, site: Site) -> dict[str, Any]:
    optimizer = plan.stage.optimizer
    params: dict[str, Any] = {
        "lr": optimizer.lr,
        "betas": list(optimizer.betas),
        "eps": optimizer.eps,
        "weight_decay": optimizer.weight_decay,
    }
    if plan.stage.zero.offload_optimizer == "none":
        # torch's AdamW needs no compiler. DeepSpeed's FusedAdam is compiled at run time.
        params["torch_adam"] = True
        if site.node.gpus:
            params["fused"] = True
    return {"type": "AdamW", "params": params}


def _zero(plan: StagePlan) -> dict[str, Any]:
    zero = plan.stage.zero
    section: dict[str, Any] = {"stage": zero.stage}
    if zero.stage == 0:
        return section
    ranks = plan.data_parallel * plan.stage.parallel.sequence  # all have gradients of other tokens
    reduces = reduces_gradients(plan.stage, ranks)  # else, copies into buckets would only cost time
    # PowerSGD compresses whole gradient matrices, which exist only after the backward pass.
    overlap_comm = reduces and zero.overlap_comm and plan.stage.communication.powersgd is None
    section |= {"overlap_comm": overlap_comm, "contiguous_gradients": reduces and zero.contiguous_gradients}
    if zero.stage == 3 and plan.stage.activation_checkpointing != "none":
        # DeepSpeed's own linear function adds the bias in place, to the matrix product that selective checkpointing keeps. The
        # recomputed layer would add it again. With full checkpointing, torch.compile up to torch 2.12 keeps the function's
        # results instead of recomputing them.
        section["memory_efficient_linear"] = False
    if zero.offload_optimizer != "none":
        section["offload_optimizer"] = {"device": zero.offload_optimizer, "pin_memory": zero.pin_memory}
    if zero.offload_optimizer == "nvme":
        # The trainer adds nvme_path, because each process has its own swap folder.
        section["offload_optimizer"]["buffer_count"] = SWAP_OPTIMIZER_BUFFERS
        section["sub_group_size"] = SWAP_SUB_GROUP_ELEMENTS
    if zero.offload_param != "none":
        section["offload_param"] = {"device": zero.offload_param, "pin_memory": zero.pin_memory}
    if zero.offload_param == "nvme":
        # By default DeepSpeed keeps the first billion elements in CPU memory; max_in_cpu 0 keeps none there.
        # The trainer adds buffer_size and nvme_path.
        section["offload_param"] |= {"buffer_count": SWAP_PARAM_BUFFERS, "max_in_cpu": 0}
        # A gathered tensor occupies its buffer until it is released. DeepSpeed's defaults keep a billion elements and prefetch
        # fifty million, so a larger model would run out of buffers in its first step.
        section |= {"stage3_prefetch_bucket_size": 0, "stage3_max_reuse_distance": 0}
    if zero.zero_hpz_partition_size > 1:
        section["zero_hpz_partition_size"] = zero.zero_hpz_partition_size
    keys = _OPTIONAL_KEYS_OF_STAGE_3 if zero.stage == 3 else _OPTIONAL_KEYS
    return section | {key: value for key in keys if (value := getattr(zero, key)) is not None}
