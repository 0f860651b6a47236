"""A planned stage -> DeepSpeed's config, as far as it is known before ranks start; the trainer adds what a process has."""

from __future__ import annotations

from typing import Any

from longhaul.config.site_config import Site
from longhaul.planning import StagePlan
from longhaul.planning.gpu_memory import SWAP_BUFFERS, SWAP_GROUP, SWAP_PARAM_BUFFERS


def deepspeed_sections(plan: StagePlan, site: Site) -> dict[str, Any]:
    """DeepSpeed's config of a stage. Every key is one that the pinned DeepSpeed reads (a test asks it)."""
    stage = plan.stage
    sections: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": stage.micro_batch_size,
        "gradient_accumulation_steps": plan.accumulation,
        # DeepSpeed clips at 1.0 when this is not written.
        "gradient_clipping": stage.optimizer.gradient_clipping,
        "steps_per_print": 1_000_000_000,
        "optimizer": _optimizer(plan, site),
        "zero_optimization": _zero(plan),
    }
    if stage.communication.data_type:
        sections["communication_data_type"] = stage.communication.data_type
    if stage.parallel.pipeline > 1:
        # Between stages whole activations travel: DeepSpeed's splitting over tensor ranks loses the position ids.
        sections["pipeline"] = {"pipe_partitioned": False, "grad_partitioned": False}
    if stage.precision == "bf16":
        sections["bf16"] = {"enabled": True}
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
        # torch's own AdamW needs no compiler; DeepSpeed's FusedAdam is built at run time.
        params["torch_adam"] = True
        if site.node.gpus:
            params["fused"] = True
    return {"type": "AdamW", "params": params}


def _zero(plan: StagePlan) -> dict[str, Any]:
    zero = plan.stage.zero
    section: dict[str, Any] = {"stage": zero.stage}
    if zero.stage == 0:
        return section
    # Compressed gradients are whole matrices, which there are after the backward pass only.
    overlaps = zero.overlap_comm and plan.stage.communication.powersgd is None
    section |= {"overlap_comm": overlaps, "contiguous_gradients": zero.contiguous_gradients}
    if zero.offload_optimizer != "none":
        section["offload_optimizer"] = {"device": zero.offload_optimizer, "pin_memory": zero.pin_memory}
    if zero.offload_optimizer == "nvme":
        # The trainer adds nvme_path: every process has a folder of its own.
        section["offload_optimizer"]["buffer_count"] = SWAP_BUFFERS
        section["sub_group_size"] = SWAP_GROUP
    if zero.offload_param != "none":
        section["offload_param"] = {"device": zero.offload_param, "pin_memory": zero.pin_memory}
    if zero.offload_param == "nvme":
        # Nothing stays in CPU memory, where DeepSpeed would keep the first billion elements; the trainer adds buffer_size, too.
        section["offload_param"] |= {"buffer_count": SWAP_PARAM_BUFFERS, "max_in_cpu": 0}
        # A gathered tensor keeps its buffer until it is let go: with DeepSpeed's defaults, which keep a billion elements and
        # gather fifty million ahead, a larger model runs out of buffers in its first step.
        section |= {"stage3_prefetch_bucket_size": 0, "stage3_max_reuse_distance": 0}
    if zero.zero_hpz_partition_size > 1:
        section["zero_hpz_partition_size"] = zero.zero_hpz_partition_size
    names = ["reduce_bucket_size"]
    names += (
        [
            "stage3_prefetch_bucket_size",
            "stage3_param_persistence_threshold",
            "stage3_max_live_parameters",
            "stage3_max_reuse_distance",
        ]
        if zero.stage == 3
        else ["allgather_bucket_size"]
    )
    return section | {name: value for name in names if (value := getattr(zero, name)) is not None}
