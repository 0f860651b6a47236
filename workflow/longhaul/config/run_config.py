"""Top-level keys of a run config (run, site, seed, storage, checks, scale_test, data_jobs, trackers), with defaults and limits.

`config/config.schema.json`, `config/default.yaml` and `docs/config.md` are generated from these classes.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from longhaul.config.architectures import Model
from longhaul.config.dataset_config import Dataset, Tokenizer
from longhaul.config.field_types import FrozenModel, HardwareCount, Minutes, Name, SingleLine
from longhaul.config.scale_test_config import ScaleTest, ScaleTestOrShortForm
from longhaul.config.stage_config import Stage


class Storage(FrozenModel):
    """Folders for large files. Relative paths are relative to the working folder (`snakemake --directory`)."""

    weights: SingleLine | None = Field(
        default=None, description="Root folder for checkpoints; null: `results/<run>/stages`."
    )
    data: SingleLine | None = Field(
        default=None, description="Root folder for token shards; null: `results/<run>/data`."
    )
    scratch: SingleLine | None = Field(
        default=None,
        description="Folder on a local disk of each node, for compiled ops and temporary files; null: $TMPDIR, or /tmp if that "
        "is not set.",
    )


class Checks(FrozenModel):
    """The environment check and the fabric check, which run before training."""

    nodes: HardwareCount | None = Field(
        default=None,
        description="Number of nodes to check; null: 2, or 1 if no stage has more, or the site has only one node.",
    )
    gpus_per_node: HardwareCount | None = Field(
        default=None, description="Ranks per node; null: the largest gpus_per_node of all stages."
    )
    minutes: Minutes = Field(
        default=20, description="Time limit of each check's allocation, in minutes or as hours:minutes:00."
    )
    bad_hardware: Literal["refuse", "warn"] = Field(
        default="refuse",
        description="What a failed hardware check does. refuse: the run does not train on the node. warn: the check "
        "only reports it, for sites whose nodes are usable although they fail; the fabric check then "
        "reports slow nodes, links and rates, and goes on. Wrong results, steps that hang, and the limits of interconnect "
        "in the site file count as with refuse.",
    )
    burn_in_s: Annotated[float, Field(ge=0, le=30)] = Field(
        default=10.0,
        description="Time for which all GPUs of a node multiply matrices at once, in seconds. The check compares "
        "their rates and verifies products with a known result. Before each attempt of a training, this time is 3 s "
        "at most.",
    )
    min_disk_free_gb: Annotated[float, Field(ge=0, le=1e9)] = Field(
        default=10.0, description="Minimum free disk space for the run folder, in GB."
    )
    max_clock_skew_s: Annotated[float, Field(gt=0, le=3600)] = Field(
        default=5.0, description="Maximum difference between the clocks of the nodes, in seconds."
    )


class Trackers(FrozenModel):
    """Experiment trackers that receive the metrics in addition to metrics.jsonl.

    They write into the weights folder, unless WANDB_MODE or MLFLOW_TRACKING_URI is set.
    """

    tensorboard: bool = Field(default=True, description="Write TensorBoard event files next to metrics.jsonl.")
    wandb: bool = Field(default=False, description="Weights & Biases. Needs the package wandb.")
    mlflow: bool = Field(default=False, description="MLflow. Needs the package mlflow-skinny.")


class Config(FrozenModel):
    """One run, from raw text to verified models."""

    run: Name = Field(description="Name of the run. Results are written to `results/<run>`.")
    site: SingleLine = Field(
        default="local",
        description="Name of a file in `config/sites/`, or the path of a site file, relative to the config file.",
    )
    seed: Annotated[int, Field(ge=0, lt=2**31)] = Field(
        default=0, description="Random seed for initial weights, data order and packing."
    )
    storage: Storage = Field(default=Storage(), description="Folders for large files.")
    tokenizer: Tokenizer = Field(description="The tokenizer of the run.")
    datasets: dict[Name, Dataset] = Field(min_length=1, description="Datasets by name.")
    model: Model = Field(description="An architecture with its sizes, or a pretrained model.")
    checks: Checks = Field(default=Checks(), description="Environment check and fabric check.")
    scale_test: ScaleTestOrShortForm = Field(
        default=ScaleTest(),
        description="Short trainings on fewer nodes before the first stage. `[1, 2, 4, full]` is the short form of `nodes`; off: "
        "none.",
    )
    data_minutes: Minutes = Field(
        default=120, description="Time limit of one tokenizing or export allocation, in minutes or as hours:minutes:00."
    )
    data_jobs: dict[Name, Annotated[int, Field(ge=1, le=1000)]] = Field(
        default={},
        description="Number of encode jobs by dataset; each job uses one node. Default: 1. Does not change the output.",
    )
    trackers: Trackers = Field(default=Trackers(), description="Experiment trackers.")
    stages: tuple[Stage, ...] = Field(
        min_length=1, description="Training stages in any order. The key `from` connects them."
    )
