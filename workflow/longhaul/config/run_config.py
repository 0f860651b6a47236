"""The run's config: every key a user may write, with its unit, default and bounds.

`config/config.schema.json`, `config/default.yaml` and `docs/config.md` are generated from these models.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from longhaul.config.architectures import Model
from longhaul.config.dataset_config import Dataset, Tokenizer
from longhaul.config.field_types import Count, FrozenModel, MachineCount, Name, OneLine, Precision, Whole, exactly_one


class Storage(FrozenModel):
    """Where big data goes. Relative paths are taken from the working folder (snakemake --directory)."""

    weights: OneLine | None = Field(default=None, description="Root for checkpoints; default results/<run>/stages.")
    data: OneLine | None = Field(default=None, description="Root for token shards; default results/<run>/data.")
    scratch: OneLine | None = Field(
        default=None, description="Node-local folder for compiled ops and temporary files; default: $TMPDIR, else /tmp."
    )


class StartFrom(FrozenModel):
    """The checkpoint of another stage that this one starts from."""

    stage: Name = Field(description="Name of the stage.")
    checkpoint: Literal["last", "best"] = Field(default="last", description="best: by validation loss.")


class Optimizer(FrozenModel):
    """AdamW; norms, biases and other one-dimensional parameters have no weight decay."""

    lr: Annotated[float, Field(gt=0)] = Field(default=3e-4, description="Peak learning rate.")
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        default=(0.9, 0.95), description="Decay rates of the two moments."
    )
    eps: Annotated[float, Field(gt=0)] = Field(default=1e-8, description="Added to the denominator.")
    weight_decay: Annotated[float, Field(ge=0)] = Field(default=0.1, description="Decoupled weight decay.")
    gradient_clipping: Annotated[float, Field(ge=0)] = Field(
        default=1.0, description="Largest global gradient norm; 0 switches clipping off. Always written for DeepSpeed."
    )


class Schedule(FrozenModel):
    """Learning rate over optimizer steps."""

    kind: Literal["constant", "cosine", "linear", "wsd"] = Field(
        default="cosine", description="Shape after the warm-up."
    )
    warmup_steps: Whole = Field(default=0, description="Linear rise from 0 to the peak.")
    decay_steps: Whole = Field(default=0, description="wsd: length of the linear decay at the end.")
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.1, description="Final rate as a share of the peak."
    )


class Fp16(FrozenModel):
    """Loss scaling of fp16, in DeepSpeed's names."""

    loss_scale: Annotated[float, Field(ge=0)] = Field(default=0.0, description="Fixed scale; 0: dynamic.")
    initial_scale_power: Annotated[int, Field(ge=0, le=32)] = Field(
        default=16, description="The dynamic scale starts at 2^this."
    )
    loss_scale_window: Count = Field(default=1000, description="Overflow-free steps before the scale is doubled.")
    hysteresis: Count = Field(default=2, description="Overflows before the scale is halved.")
    min_loss_scale: Annotated[float, Field(gt=0)] = Field(default=1.0, description="The scale never falls below this.")


class Parallel(FrozenModel):
    """How many ranks share one copy of the model; the rest is data parallel."""

    tensor: Count = Field(
        default=1, description="Ranks that split heads, inner widths and the vocabulary; keep it in a node."
    )
    pipeline: Count = Field(default=1, description="Stages of consecutive decoder layers; needs ZeRO 1.")
    expert: Count = Field(default=1, description="Data-parallel ranks that split the routed experts; ZeRO 1 to 3.")
    sequence: Count = Field(default=1, description="Ranks that split the tokens of a sample (Ulysses).")


class Zero(FrozenModel):
    """DeepSpeed's ZeRO. Fields left at null keep DeepSpeed's own default."""

    stage: Annotated[int, Field(ge=0, le=3)] = Field(
        default=1, description="What is partitioned: 1 optimizer, 2 + gradients, 3 + weights."
    )
    offload_optimizer: Literal["none", "cpu", "nvme"] = Field(
        default="none",
        description="Optimizer states in CPU memory (stage >= 1), or in files below storage.scratch of every node (nvme, "
        "stage 3 only).",
    )
    offload_param: Literal["none", "cpu", "nvme"] = Field(
        default="none",
        description="Weights in CPU memory, or in files below storage.scratch of every node (nvme); stage 3 only.",
    )
    zero_hpz_partition_size: Count = Field(
        default=1,
        description="Stage 3: a second copy of the weights is partitioned over this many neighbouring ranks only (ZeRO++ hpZ), "
        "so that the backward pass gathers inside a node; 1: none.",
    )
    pin_memory: bool = Field(default=True, description="Pin offloaded CPU memory.")
    overlap_comm: bool = Field(default=True, description="Overlap gradient reduction with the backward pass.")
    contiguous_gradients: bool = Field(default=True, description="Copy gradients to one buffer as they are produced.")
    reduce_bucket_size: Count | None = Field(default=None, description="Elements reduced at a time.")
    allgather_bucket_size: Count | None = Field(
        default=None, description="Elements gathered at a time (stages 1 and 2)."
    )
    stage3_prefetch_bucket_size: Count | None = Field(default=None, description="Elements prefetched (stage 3).")
    stage3_param_persistence_threshold: Whole | None = Field(
        default=None, description="Weights smaller than this many elements stay whole (stage 3)."
    )
    stage3_max_live_parameters: Count | None = Field(
        default=None,
        description="Elements of gathered weights that a rank holds at most, beside the layer at work (stage 3).",
    )
    stage3_max_reuse_distance: Whole | None = Field(
        default=None,
        description="Gathered weights stay if they are used again within this many elements: until the backward pass, in a "
        "model that is not larger (stage 3).",
    )

    @property
    def on_disk(self) -> list[str]:
        """Which of these keys put something on the nodes' disks."""
        return [key for key in ("offload_optimizer", "offload_param") if getattr(self, key) == "nvme"]


class PowerSgd(FrozenModel):
    """Low-rank gradients (arXiv:1905.13727): each matrix travels as two thin ones, what that loses in the next step."""

    rank: Count = Field(default=4, description="Columns of the thin matrices: more are more exact and more bytes.")
    start_step: Annotated[int, Field(ge=2)] = Field(
        default=10, description="Steps that are reduced whole before it begins; no fewer than the warm-up is wise."
    )


class Communication(FrozenModel):
    """How gradients travel between data-parallel ranks. It changes what is learnt, so a change trains the stage anew."""

    data_type: Literal["fp32", "bf16", "fp16"] | None = Field(
        default=None, description="Precision they are summed in; null: the stage's. Without other parallelism only."
    )
    powersgd: PowerSgd | None = Field(
        default=None,
        description="Compress them; ZeRO 0 and 1, data parallelism alone. zero.overlap_comm has no effect then.",
    )


class Checkpoints(FrozenModel):
    """When weights are saved and which saves are kept; a save another stage or an export needs is never removed."""

    every_steps: Count = Field(default=100, description="Steps between saves; the last step is always saved.")
    keep_last: Count = Field(default=2, description="Newest saves kept.")
    keep_best: Whole = Field(default=1, description="Best saves kept, by validation loss.")


class Validation(FrozenModel):
    """Loss on the held-out documents."""

    every_steps: Count = Field(default=100, description="Steps between validations; one more follows the last step.")
    max_samples: Count = Field(
        default=256, description="Samples of the validation split that are read, always the same ones."
    )


class BadSteps(FrozenModel):
    """What happens at a bad step: loss or gradients are NaN or infinite, or the loss is a spike. Each is in events.jsonl.

    A bad step never changes weights. Batches that are left out are left out for good: the weights are those of a run
    without bad steps whose skip_batches names them.
    """

    policy: Literal["stop", "skip", "roll_back"] = Field(
        default="stop",
        description="stop: the stage fails. skip: leave the batch out and go on. roll_back: return to the last checkpoint "
        "and leave out the batches since then.",
    )
    limit: Count = Field(
        default=3, description="skip: bad steps in a row, roll_back: returns without a save in between; one more fails."
    )
    window_batches: Count | None = Field(
        default=None, description="roll_back: leave out only this many batches, the bad one the last of them."
    )
    spike_factor: Annotated[float, Field(gt=1)] | None = Field(
        default=None, description="A loss above this many times the median of the last 64 is a spike; null: none is."
    )

    @model_validator(mode="after")
    def _window_of_a_return(self) -> BadSteps:
        if self.window_batches and self.policy != "roll_back":
            raise ValueError(f"window_batches has no meaning for policy {self.policy}; drop it, or use roll_back")
        return self


class Recovery(FrozenModel):
    """How soon a fault is noticed, and what follows."""

    max_restarts: Whole = Field(
        default=3, description="Crashes without a new checkpoint that are followed by a restart in the same allocation."
    )
    heartbeat_timeout_s: Annotated[float, Field(gt=0)] = Field(
        default=300.0, description="A process that is not heard of for this long is taken for hung or dead."
    )
    collective_timeout_s: Annotated[float, Field(gt=0)] = Field(
        default=1800.0, description="A collective that waits longer for a rank ends the attempt."
    )
    stop_margin_s: Annotated[float, Field(ge=0)] = Field(
        default=60.0,
        description="Time kept free before the end of an allocation, beside what a save, a validation and two steps took.",
    )
    straggler_threshold: Annotated[float, Field(gt=0)] = Field(
        default=0.5, description="A rank slower than the others' median by this share, three looks in a row, is named."
    )


class Stage(FrozenModel):
    """One training stage."""

    name: Name = Field(description="Folder name and Snakemake wildcard.")
    kind: Literal["pretrain", "sft"] = Field(description="pretrain: loss on every token; sft: on the assistant's.")
    dataset: Name = Field(description="Name of a dataset: text for pretrain, chat for sft.")
    start_from: StartFrom | None = Field(
        default=None, alias="from", description="Start from another stage; default: the model."
    )
    steps: Count | None = Field(default=None, description="Optimizer steps. Exactly one of steps and tokens.")
    tokens: Count | None = Field(default=None, description="Tokens to train on; rounded up to whole steps.")
    global_batch_size: Count = Field(description="Sequences per optimizer step, over all ranks.")
    micro_batch_size: Count = Field(default=1, description="Sequences per rank and forward pass.")
    sequence_length: Annotated[int, Field(ge=8)] = Field(description="Tokens per sequence.")
    optimizer: Optimizer = Field(default=Optimizer(), description="AdamW's settings.")
    schedule: Schedule = Field(default=Schedule(), description="Learning-rate schedule.")
    precision: Precision = Field(default="bf16", description="Compute precision; master weights are fp32 (ZeRO >= 1).")
    fp16: Fp16 = Field(default=Fp16(), description="Loss scaling, for precision fp16.")
    nodes: MachineCount = Field(default=1, description="Nodes of the allocation.")
    gpus_per_node: MachineCount = Field(
        default=1, description="Ranks per node: one per GPU, or CPU processes where there is none."
    )
    parallel: Parallel = Field(default=Parallel(), description="Parallel layout.")
    zero: Zero = Field(default=Zero(), description="ZeRO and offload.")
    communication: Communication = Field(default=Communication(), description="Reduction of gradients.")
    router_bias_update_rate: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.0,
        description="DeepSeek V3's balancing without auxiliary loss: change of an expert's bias a step; 0: none.",
    )
    sequence_aux_loss_coef: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.0,
        description="Weight of the experts' balance loss of each sequence; DeepSeek V3 took 0.0001. 0: none.",
    )
    activation_checkpointing: Literal["none", "selective", "full", "offload"] = Field(
        default="none",
        description="What a decoder layer does again in the backward pass. selective: all but matmuls and attention; full: "
        "everything, from its input; offload: everything, from its input kept in CPU memory.",
    )
    checkpoints: Checkpoints = Field(default=Checkpoints(), description="Saves.")
    validation: Validation = Field(default=Validation(), description="Held-out loss.")
    bad_steps: BadSteps = Field(default=BadSteps(), description="NaN, infinity, spikes of the loss.")
    skip_batches: tuple[Whole, ...] = Field(
        default=(),
        description="Global batches, counted from 0, that are never trained on; a stage that is past one refuses it.",
    )
    recovery: Recovery = Field(default=Recovery(), description="Faults.")
    export: Literal["none", "last", "best"] = Field(
        default="none", description="Checkpoint that becomes a Hugging Face folder."
    )
    export_dtype: Literal["fp32", "bf16"] = Field(default="bf16", description="Precision of the exported weights.")
    minutes: Count = Field(default=60, description="Length of one allocation.")
    restart: bool = Field(
        default=False,
        description="Allow a changed number of steps to train a decaying schedule anew, in a new weights folder.",
    )

    @model_validator(mode="after")
    def _one_length(self) -> Stage:
        return exactly_one(self, "steps", "tokens")


class Checks(FrozenModel):
    """The environment and fabric checks before training."""

    nodes: MachineCount | None = Field(
        default=None, description="Nodes that are checked; default: 2, or the site's only one."
    )
    gpus_per_node: MachineCount | None = Field(
        default=None, description="Ranks per node; default: the largest of the stages."
    )
    minutes: Count = Field(default=20, description="Length of their allocation.")
    min_disk_free_gb: Annotated[float, Field(ge=0)] = Field(
        default=10.0, description="Free space the run folder needs, in GB."
    )
    max_clock_skew_s: Annotated[float, Field(gt=0)] = Field(
        default=5.0, description="Largest difference between node clocks."
    )


class Trackers(FrozenModel):
    """Where metrics go beside metrics.jsonl: into the weights folder, unless WANDB_MODE or MLFLOW_TRACKING_URI says otherwise."""

    tensorboard: bool = Field(default=True, description="Event files beside the metrics.")
    wandb: bool = Field(default=False, description="Weights & Biases; needs the wandb package.")
    mlflow: bool = Field(default=False, description="MLflow; needs the mlflow-skinny package.")


class Config(FrozenModel):
    """One run, from raw text to verified models."""

    run: Name = Field(description="Results go to results/<run>.")
    site: OneLine = Field(
        default="local", description="A file of config/sites by name, or a path relative to the config file."
    )
    seed: Annotated[int, Field(ge=0, lt=2**31)] = Field(
        default=0, description="Of initial weights, data order and packing."
    )
    storage: Storage = Field(default=Storage(), description="Where big data goes.")
    tokenizer: Tokenizer = Field(description="The tokenizer of the whole run.")
    datasets: dict[Name, Dataset] = Field(min_length=1, description="Name -> dataset.")
    model: Model = Field(description="An architecture with its config, or a pretrained folder.")
    checks: Checks = Field(default=Checks(), description="Environment and fabric checks.")
    data_minutes: Count = Field(default=120, description="Length of a tokenizing or conversion allocation.")
    data_jobs: dict[Name, Annotated[int, Field(ge=1, le=1000)]] = Field(
        default={},
        description="Dataset -> how many jobs share out its units, a node each; 1 where it is not named. Changes no byte.",
    )
    trackers: Trackers = Field(default=Trackers(), description="Experiment trackers.")
    stages: tuple[Stage, ...] = Field(min_length=1, description="In any order; `from` links them.")
