"""Keys of a training stage: length, optimizer (lr, weight decay), schedule, parallel, zero, checkpoints, straggler_threshold."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from longhaul.config.communication_config import Communication
from longhaul.config.evaluation_config import Evaluation
from longhaul.config.field_types import (
    Epochs,
    FrozenModel,
    HardwareCount,
    MicroBatchSize,
    Minutes,
    Name,
    NonNegativeInt,
    PositiveInt,
    PositiveStepCount,
    Precision,
    Timeout,
    require_exactly_one,
)
from longhaul.config.schedule_config import Schedule
from longhaul.config.serve_check_config import ServeCheck
from longhaul.config.serve_config import Serve

MOST_PROFILED_STEPS = 20

Truncate = Literal["right", "left", "drop"]
"""Conversations longer than a sequence keep their first tokens (right) or their last ones (left), or are left out (drop)."""


class StartFrom(FrozenModel):
    """The checkpoint of another stage that this stage starts from."""

    stage: Name = Field(description="Name of the other stage.")
    checkpoint: Literal["last", "best"] = Field(
        default="last", description="last: the newest checkpoint. best: the one with the lowest validation loss."
    )


class Optimizer(FrozenModel):
    """AdamW. Weight decay does not apply to norms, biases and other one-dimensional parameters."""

    lr: Annotated[float, Field(gt=0, le=10)] = Field(default=3e-4, description="Peak learning rate.")
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        default=(0.9, 0.95), description="Decay rates of the first and the second moment."
    )
    eps: Annotated[float, Field(gt=0, le=1)] = Field(default=1e-8, description="Term added to the denominator.")
    weight_decay: Annotated[float, Field(ge=0, le=100)] = Field(default=0.1, description="Decoupled weight decay.")
    gradient_clipping: Annotated[float, Field(ge=0, le=1e6)] = Field(
        default=1.0,
        description="Maximum global gradient norm; 0 disables clipping. longhaul always writes this key into ds_config.json.",
    )


class Fp16(FrozenModel):
    """Loss scaling for precision fp16. The keys have DeepSpeed's names."""

    loss_scale: Annotated[float, Field(ge=0, le=2**32)] = Field(
        default=0.0, description="Fixed loss scale; 0: dynamic loss scaling."
    )
    initial_scale_power: Annotated[int, Field(ge=0, le=32)] = Field(
        default=16, description="The dynamic loss scale starts at 2 to this power."
    )
    loss_scale_window: PositiveInt = Field(
        default=1000, description="Number of steps without overflow after which the scale is doubled."
    )
    hysteresis: PositiveInt = Field(default=2, description="Number of overflows after which the scale is halved.")
    min_loss_scale: Annotated[float, Field(gt=0, le=2**32)] = Field(
        default=1.0, description="Lower limit of the dynamic loss scale."
    )


class Parallel(FrozenModel):
    """The parallel layout: how many ranks share one copy of the model. All other parallelism is data parallelism."""

    tensor: PositiveInt = Field(
        default=1,
        description="Tensor-parallel ranks. They split attention heads, MLP widths and the vocabulary. Keep them in one node.",
    )
    pipeline: PositiveInt = Field(
        default=1, description="Pipeline ranks. Each holds consecutive decoder layers. Needs ZeRO stage 1."
    )
    expert: PositiveInt = Field(
        default=1, description="Data-parallel ranks that split the routed experts. Needs ZeRO stage 1, 2 or 3."
    )
    sequence: PositiveInt = Field(
        default=1, description="Sequence-parallel ranks (Ulysses). They split the tokens of each sample."
    )


class Zero(FrozenModel):
    """DeepSpeed's ZeRO. A key with the value null keeps DeepSpeed's own default."""

    stage: Annotated[int, Field(ge=0, le=3)] = Field(
        default=1,
        description="ZeRO stage. 0: nothing is partitioned. 1: optimizer states. 2: also gradients. 3: also weights.",
    )
    offload_optimizer: Literal["none", "cpu", "nvme"] = Field(
        default="none",
        description="Place of the optimizer states. none: GPU. cpu: CPU memory (ZeRO stage 1 or higher). nvme: files below "
        "storage.scratch on each node (ZeRO stage 3 only).",
    )
    offload_param: Literal["none", "cpu", "nvme"] = Field(
        default="none",
        description="Place of the weights; other values than none need ZeRO stage 3. none: GPU. cpu: CPU memory. nvme: files "
        "below storage.scratch on each node.",
    )
    zero_hpz_partition_size: PositiveInt = Field(
        default=1,
        description="ZeRO++ hpZ, ZeRO stage 3 only: number of neighbouring ranks that share a second copy of the weights. The "
        "backward pass then gathers weights inside a node. 1: no second copy.",
    )
    pin_memory: bool = Field(default=True, description="Use pinned CPU memory for offloaded states.")
    overlap_comm: bool = Field(default=True, description="Overlap gradient reduction with the backward pass.")
    contiguous_gradients: bool = Field(
        default=True,
        description="Copy gradients into one contiguous buffer when they are produced. parallel.expert needs it.",
    )
    reduce_bucket_size: PositiveInt | None = Field(
        default=None, description="Number of elements in one gradient reduction."
    )
    allgather_bucket_size: PositiveInt | None = Field(
        default=None, description="Number of elements in one all-gather (ZeRO stages 1 and 2)."
    )
    stage3_prefetch_bucket_size: PositiveInt | None = Field(
        default=None, description="Number of elements to prefetch (ZeRO stage 3)."
    )
    stage3_param_persistence_threshold: NonNegativeInt | None = Field(
        default=None, description="ZeRO stage 3 does not partition weights with fewer elements than this."
    )
    stage3_max_live_parameters: PositiveInt | None = Field(
        default=None,
        description="Maximum number of gathered elements on a rank, in addition to the layer in use (ZeRO stage 3).",
    )
    stage3_max_reuse_distance: NonNegativeInt | None = Field(
        default=None,
        description="ZeRO stage 3 keeps gathered weights if a layer uses them again within this many elements. In a "
        "smaller model, it keeps them until the backward pass.",
    )

    @property
    def gathers_whole_layers(self) -> bool:
        """Return whether ZeRO 3 gathers whole decoder layers. Buffers for weights on disk hold those of one module."""
        return self.stage == 3 and self.offload_param != "nvme"

    @property
    def nvme_keys(self) -> list[str]:
        """Keys of this section that place something on the nodes' disks."""
        return [key for key in ("offload_optimizer", "offload_param") if getattr(self, key) == "nvme"]


class CheckpointSettings(FrozenModel):
    """Saving and keeping of checkpoints. A checkpoint that another stage or an export needs is always kept."""

    every_steps: PositiveStepCount = Field(
        default=100, description="Steps between two checkpoints. longhaul always saves the last step."
    )
    keep_last: PositiveInt = Field(default=2, description="Number of newest checkpoints to keep.")
    keep_best: NonNegativeInt = Field(
        default=1, description="Number of checkpoints with the lowest validation loss to keep."
    )


class Validation(FrozenModel):
    """Validation on the held-out documents."""

    every_steps: PositiveStepCount = Field(
        default=100, description="Steps between two validations. One always follows the last step."
    )
    max_samples: PositiveInt = Field(
        default=256, description="Maximum number of validation samples. Every validation uses the same samples."
    )
    before_first_step: bool = Field(
        default=False,
        description="Validate the initial weights, too. This delays the first step. The report compares later losses of an sft "
        "stage with this one.",
    )


class BadSteps(FrozenModel):
    """Reaction to a bad step: the loss or the gradient norm is not finite, or the loss is a spike.

    A bad step never changes weights, and events.jsonl records it. A skipped batch stays skipped: the weights equal those of a
    run without bad steps that lists the same batches in skip_batches.
    """

    policy: Literal["stop", "skip", "roll_back"] = Field(
        default="stop",
        description="stop: the stage fails. skip: skip the batch and continue. roll_back: return to the last checkpoint and "
        "skip the batches since then.",
    )
    limit: PositiveInt = Field(
        default=3,
        description="skip: allowed number of consecutive bad steps. roll_back: allowed number of returns without a new "
        "checkpoint. One more makes the stage fail.",
    )
    window_batches: PositiveInt | None = Field(
        default=None,
        description="roll_back: skip only this many batches, of which the bad batch is the last; null: all since the checkpoint.",
    )
    spike_factor: Annotated[float, Field(gt=1, le=1e6)] | None = Field(
        default=None,
        description="A loss is a spike if it exceeds this factor times the median of the last 64 losses; null: no check.",
    )

    @model_validator(mode="after")
    def _check_window(self) -> BadSteps:
        if self.window_batches and self.policy != "roll_back":
            raise ValueError(
                f"window_batches {self.window_batches} has no effect with policy {self.policy}; remove it, or use roll_back"
            )
        return self


class Recovery(FrozenModel):
    """Detection of faults, and the reaction to them."""

    max_restarts: Annotated[int, Field(ge=0, le=1000)] = Field(
        default=3,
        description="Number of restarts in the same allocation after crashes without a new checkpoint in between.",
    )
    heartbeat_timeout_s: Timeout = Field(
        default=300.0, description="A rank without a heartbeat for this long is treated as hung or dead."
    )
    collective_timeout_s: Timeout = Field(
        default=1800.0, description="If a collective takes longer than this, the attempt ends."
    )
    stop_margin_s: Annotated[float, Field(ge=0, le=1e6)] = Field(
        default=60.0,
        description="Reserve before the end of an allocation. The trainer adds the measured time of one checkpoint (two "
        "while one is being written), one validation and two steps.",
    )
    straggler_threshold: Annotated[float, Field(gt=0, le=1000)] = Field(
        default=0.5,
        description="The log names a rank that is slower than the median of the other ranks by this fraction in three "
        "consecutive measurements.",
    )


class Stage(FrozenModel):
    """One training stage."""

    name: Name = Field(description="Name of the stage, also in the names of folders and jobs.")
    kind: Literal["pretrain", "sft"] = Field(
        description="pretrain: loss on every token. sft: loss on the assistant's tokens."
    )
    dataset: Name = Field(description="Name of a dataset: kind text for pretrain, kind chat for sft.")
    start_from: StartFrom | None = Field(
        default=None, alias="from", description="Another stage to start from; null: start from `model`."
    )
    steps: PositiveStepCount | None = Field(
        default=None, description="Number of optimizer steps. Set exactly one of steps, tokens and epochs."
    )
    tokens: PositiveInt | None = Field(
        default=None, description="Number of tokens to train on, padding included, rounded up to whole steps."
    )
    epochs: Epochs | None = Field(
        default=None,
        description="Number of passes over the dataset's training samples, such as 3 or 0.5, rounded up to whole steps. The job "
        "counts the samples. A mixture: as many samples as this many passes over all its datasets; its proportions stay.",
    )
    global_batch_size: PositiveInt = Field(description="Samples per optimizer step, over all ranks.")
    micro_batch_size: MicroBatchSize = Field(
        default=1,
        description="Samples per rank and forward pass. auto: the most that fit into the planned memory, which needs "
        "node.gpu_memory_gib in the site file.",
    )
    sequence_length: Annotated[int, Field(ge=8, le=10**8)] = Field(description="Tokens per sample.")
    truncate: Truncate = Field(
        default="right",
        description="sft: what stays of conversations longer than sequence_length. right: the first tokens. left: the last "
        "tokens, so the system message is lost. drop: nothing.",
    )
    optimizer: Optimizer = Field(default=Optimizer(), description="AdamW settings.")
    schedule: Schedule = Field(default=Schedule(), description="Learning-rate schedule.")
    precision: Precision = Field(
        default="bf16",
        description="Compute precision. With ZeRO stage 1 or higher, master weights are fp32. fp8: bf16, with the operands of "
        "the matrix products of decoder layers rounded to FP8; routed experts, head and validation stay in bf16.",
    )
    fp16: Fp16 = Field(default=Fp16(), description="Loss scaling for precision fp16.")
    nodes: HardwareCount = Field(default=1, description="Number of nodes.")
    gpus_per_node: HardwareCount = Field(
        default=1, description="Ranks per node. Each rank uses one GPU; on a site without GPUs it is a CPU process."
    )
    parallel: Parallel = Field(default=Parallel(), description="Parallel layout.")
    zero: Zero = Field(default=Zero(), description="ZeRO and offload.")
    communication: Communication = Field(default=Communication(), description="Gradient reduction.")
    router_bias_update_rate: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.0,
        description="Load balancing without auxiliary loss: change of each expert's bias per step; 0: off. Only routers of "
        "DeepSeek V3 have the bias.",
    )
    sequence_aux_loss_coef: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.0,
        description="Coefficient of the sequence-wise auxiliary loss that balances experts; 0: off. DeepSeek V3 used 0.0001.",
    )
    activation_checkpointing: Literal["none", "selective", "full", "offload", "auto"] = Field(
        default="none",
        description="Operations that a decoder layer recomputes in the backward pass. selective: all except matmuls and "
        "attention. full: the whole layer, from its input. offload: as full, with the input kept in CPU memory. auto: the least "
        "of none, selective and full with which the planned memory fits.",
    )
    compile: Literal["auto", "off"] = Field(
        default="auto",
        description="torch.compile of the decoder layers. auto: on GPUs, where the stage allows it. off: never. "
        "Compiled layers round differently: if this key changes, the stage trains again in a new weights folder.",
    )
    deterministic: bool = Field(
        default=False,
        description="On GPUs, use only kernels that give the same bits in every run: a resumed training then ends "
        "with the bits of an undisturbed one. Attention is slower. If this key changes, the stage trains again in a "
        "new weights folder.",
    )
    checkpoints: CheckpointSettings = Field(default=CheckpointSettings(), description="When to save, and what to keep.")
    validation: Validation = Field(default=Validation(), description="Validation during training.")
    profile_steps: tuple[PositiveStepCount, PositiveStepCount] | None = Field(
        default=None,
        description=f"First and last step to profile, at most {MOST_PROFILED_STEPS} steps, for example [20, 25]; "
        "null: none. The report shows where the time of these steps went. Changes no result.",
    )
    bad_steps: BadSteps = Field(default=BadSteps(), description="Reaction to NaN, infinity and loss spikes.")
    skip_batches: tuple[NonNegativeInt, ...] = Field(
        default=(),
        description="Global batches to skip, counted from 0. A stage that has already trained on one of them refuses to start.",
    )
    recovery: Recovery = Field(default=Recovery(), description="Detection of faults and restarts.")
    export: Literal["none", "last", "best"] = Field(
        default="none", description="Checkpoint to export as a Hugging Face folder."
    )
    export_dtype: Literal["fp32", "bf16", "fp8"] = Field(
        default="bf16",
        description="Precision of the exported weights. fp8: the matrices of the decoder layers in blocks of 128 x 128 as "
        "DeepSeek publishes them, the others in bf16.",
    )
    evaluate: Evaluation | None = Field(
        default=None, description="Evaluation of the export with lm-evaluation-harness; null: none."
    )
    serve: Serve | None = Field(
        default=None,
        description="The job of `longhaul serve`; null: its defaults. With this section, `longhaul plan` checks that the served "
        "model fits.",
    )
    serve_check: ServeCheck | None = Field(
        default=None, description="Check of a server of the export: answers, speed under load, clean end; null: none."
    )
    minutes: Minutes = Field(
        default=60, description="Time limit of one allocation, in minutes or as hours:minutes:00, for example 1:30:00."
    )
    restart: bool = Field(
        default=False,
        description="Allow training from the start, in a new weights folder, if the number of steps of a decaying schedule "
        "changes.",
    )

    def compiles_layers_on_gpus(self, has_experts: bool) -> bool:
        """Return whether the decoder layers of this stage are compiled on GPUs; `has_experts` as in `why_not_compiled`."""
        return self.compile == "auto" and self.why_not_compiled(has_experts) is None

    def why_not_compiled(self, has_experts: bool) -> str | None:
        """Return why the decoder layers of this stage are not compiled; None if they can be.

        has_experts: the model is a mixture of experts
        """
        if self.activation_checkpointing == "offload":
            return "activation_checkpointing: offload moves the input of a layer to the CPU"
        if self.activation_checkpointing == "selective" and self.parallel.expert > 1:
            return (
                "with expert parallelism, activation_checkpointing: selective cannot keep single results of compiled layers; "
                "none and full are compiled"
            )
        is_divided = self.parallel.tensor > 1 or self.parallel.sequence > 1 or self.zero.offload_param != "none"
        if self.zero.stage == 3 and (has_experts or is_divided):
            # Losses on several GPUs were compared without these alone.
            return "under ZeRO stage 3 only dense models are compiled, without tensor or sequence parallelism and offload_param"
        return None

    @model_validator(mode="after")
    def _check_profiled_steps(self) -> Stage:
        first, last = self.profile_steps or (1, 1)
        if not first <= last < first + MOST_PROFILED_STEPS:
            raise ValueError(
                f"profile_steps [{first}, {last}] must be the first and the last of 1 to {MOST_PROFILED_STEPS} steps: a trace "
                "needs up to 100 MB for a step"
            )
        return self

    @model_validator(mode="after")
    def _check_loss_scaling(self) -> Stage:
        if self.precision != "fp16" and self.fp16 != Fp16():
            raise ValueError(f"fp16 has no effect with precision {self.precision}; remove it, or set precision to fp16")
        return self

    @model_validator(mode="after")
    def _check_length(self) -> Stage:
        if self.kind == "pretrain" and self.truncate != "right":
            raise ValueError(f"truncate {self.truncate} has no effect on kind pretrain; remove it")
        for key in ("evaluate", "serve", "serve_check"):
            if getattr(self, key) and self.export == "none":
                raise ValueError(f"{key} needs an exported model; set export to last or best, or remove {key}")
        return require_exactly_one(self, "steps", "tokens", "epochs")
