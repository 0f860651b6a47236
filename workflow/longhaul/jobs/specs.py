"""What each job is told: one JSON file per job, rendered before submission and read by nothing else than that job.

A job never reads the user's config, so an edit made while it waits in the queue cannot change it. Relative paths are
taken from the working folder (snakemake --directory), in which `launch.sh` starts every job.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

from pydantic import ValidationError

from longhaul.artifacts.files import write_text
from longhaul.config.dataset_config import Dataset
from longhaul.config.field_types import FrozenModel
from longhaul.config.run_config import Checks, Stage, Trackers
from longhaul.config.site_config import FabricLimits
from longhaul.errors import UserError


class Job(FrozenModel):
    """Reads and writes itself."""

    run: str

    def write(self, path: Path) -> None:
        """Writes the job's JSON atomically."""
        write_text(path, self.model_dump_json(indent=2, by_alias=True) + "\n")

    @classmethod
    def read(cls, path: Path) -> Self:
        """Reads the job's JSON; UserError when it is missing or was rendered by another release."""
        try:
            return cls.model_validate_json(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(f"{path} does not exist", "let Snakemake's render rule make it") from None
        except ValidationError as error:
            raise UserError(f"{path} is not a complete {cls.__name__}: {error}", "delete it and run again") from None


class LaunchStep(FrozenModel):
    """One command of a job, as words; no shell reads them."""

    title: str
    command: tuple[str, ...]


class LaunchSpec(Job):
    """What launch.sh becomes: a supervisor around the steps of a job, which checks, restarts and queues again."""

    name: str  # train-<stage>, tokenize-<dataset>, …
    folder: str  # absolute: launch.json lies in it, and what is recorded about the job
    slurm: bool
    nodes: int
    requeue: bool  # the job may put itself back into the queue
    max_restarts: int  # crashes without progress that are followed by a restart in place
    deadline_poll_interval_s: float  # how often Slurm is asked for the end of the allocation
    steps: tuple[LaunchStep, ...]
    inputs: tuple[str, ...]  # texts that a permanent failure depends on, and
    data: tuple[str, ...]  # files that it depends on, too large to be read for it
    checkpoints: str | None  # weights root of a stage: where progress is looked for
    quarantine: str  # results/quarantine.json


class EnvironmentSpec(Job):
    """Checks the nodes it runs on: one process per node."""

    nodes: int
    gpus_per_node: int
    checks: Checks
    memory_mb: int  # that the site file gives a node, in MiB
    interconnect: str  # infiniband | roce | ethernet | none, as the site file says
    cuda_build: str
    scratch: str | None
    prebuild_ops: tuple[str, ...]  # DeepSpeed op builders the stages need: "cpu_adam" where the optimizer is offloaded
    swap_bytes: int  # that a node's ranks need below scratch, where optimizer states lie on its disk; else 0
    locked_bytes: int  # that each rank must be able to lock for it
    folder: str  # results/<run>; where write access and free space are tested
    out: str  # results/<run>/environment.json


class FabricSpec(Job):
    """Measures collectives between all ranks of its allocation."""

    nodes: int
    gpus_per_node: int
    limits: FabricLimits
    out: str  # results/<run>/fabric.json


class TokenizerSpec(Job):
    """Loads or trains the tokenizer."""

    path: str | None  # folder with tokenizer.json, or
    train_vocab_size: int | None  # size of the one to train
    train_files: dict[str, tuple[str, ...]]  # dataset name -> its files
    train_datasets: dict[str, Dataset]
    chat_template: str | None  # path of a Jinja file
    needs_chat_template: bool  # a stage trains on chats
    model_vocab_size: int | None  # refuse a larger tokenizer; None when the model is not known yet
    folder: str  # results/<run>/tokenizers
    out: str  # results/<run>/tokenizer.json


class TokenizeSpec(Job):
    """Turns one dataset into token shards."""

    name: str
    dataset: Dataset
    files: tuple[str, ...]  # resolved files, in order
    evaluation: tuple[str, ...]  # evaluation files to keep out of the data, in order
    parts: dict[str, str]  # of a mixture: dataset -> its results/<run>/data/<dataset>.json
    tokenizer: str  # results/<run>/tokenizer.json
    workers: int
    survey: str | None  # results/<run>/data/<dataset>.survey.json, where several jobs share its units
    folder: str  # results/<run>/data/<dataset>
    out: str  # results/<run>/data/<dataset>.json; the job that surveys writes the survey there


class EncodeSpec(TokenizeSpec):
    """Makes a share of a dataset's units."""

    share: int  # 1 … shares
    shares: int


class TrainSpec(Job):
    """Trains one stage: one process per rank."""

    seed: int
    stage: Stage
    model: dict[str, Any]  # Hugging Face config, model_type included
    pretrained: str | None  # folder with the first weights; None: random from the seed
    trust_remote_code: bool
    steps: int
    accumulation: int  # micro batches per optimizer step and rank
    data_parallel: int
    world_size: int
    exportable: tuple[str, ...]  # "last", "best": saves that must carry a proof, because they are exported
    spec: dict[str, Any]  # result spec: what the weights depend on beside data and starting checkpoint
    start_checkpoint: str | None  # the earlier stage's checkpoint.json
    tokenizer: str  # results/<run>/tokenizer.json
    data: str  # results/<run>/data/<dataset>.json
    deepspeed: str  # results/<run>/stages/<stage>/ds_config.json
    folder: str  # results/<run>/stages/<stage>
    weights_root: str  # …/weights; the trainer works in <weights_root>/<hash>
    out: str  # results/<run>/stages/<stage>/checkpoint.json
    gpu_peak_tflops: float | None
    trackers: Trackers
    scratch: str | None


class ExportSpec(Job):
    """Exports and proves one checkpoint of one stage."""

    stage: str
    checkpoint: str  # results/<run>/stages/<stage>/checkpoint.json
    which: str  # last | best
    dtype: str  # fp32 | bf16
    tokenizer: str
    config_hash: str
    first_weights: tuple[str, ...]  # how they differ from those in the pretrained folder, in words
    chat: bool  # the export must hold a chat template
    folder: str  # results/<run>/export/<stage>
    out: str  # results/<run>/export/<stage>.json
