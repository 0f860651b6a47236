"""Config -> Plan: everything that can be decided before a job is submitted, and every refusal that can be made there.

Pure but for small local JSON (the site, `results/<run>.lock.json`, a local model's config.json), so `snakemake -n` stays
instant and every job may make the plan again.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from longhaul.artifacts.schemas import Lock
from longhaul.config.load import LoadedConfig
from longhaul.config.model_size import ModelSize, geometry
from longhaul.config.run_config import Config, Stage
from longhaul.config.site_config import Site
from longhaul.planning import allocations as requests
from longhaul.planning.feasibility import (
    accumulation,
    check_checks,
    check_inodes,
    check_lead,
    check_memory,
    check_offload,
    check_positions,
    check_precision,
    check_schedule,
    check_site,
    check_unit_files,
    check_vocabulary,
    checkpoint_bytes,
    files_per_checkpoint,
)
from longhaul.planning.gpu_memory import Memory, estimate
from longhaul.planning.input_files import check_files, dataset_files, first_weights_notes, model_config
from longhaul.planning.parallel_layout import bubble, bubble_warning, check_model, sample_ranks
from longhaul.planning.result_spec import result_spec
from longhaul.planning.slurm_request import SlurmRequest
from longhaul.planning.stage_order import check_references, order

# MFU assumed for GPU-hours where nothing was measured yet; DeepSpeed ZeRO runs on H100-class GPUs reach 35-50 %.
ASSUMED_MFU = 0.4


@dataclass(frozen=True)
class StagePlan:
    """One stage, worked out. tokens: trained on in all. memory and flops are None until the model's geometry is known."""

    stage: Stage
    steps: int
    tokens: int
    world_size: int
    data_parallel: int  # ranks that read different samples
    accumulation: int
    memory: Memory | None
    flops: float | None
    files_per_checkpoint: int
    checkpoint_bytes: int | None
    exportable: tuple[str, ...]
    spec: dict[str, Any]
    bubble: float
    warnings: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.stage.name


@dataclass(frozen=True)
class Plan:
    """A run, worked out. `stages` are in an order in which each follows the one it starts from."""

    loaded: LoadedConfig
    lock: Lock | None
    stages: tuple[StagePlan, ...]
    waiting: tuple[str, ...] = field(default=())

    @property
    def config(self) -> Config:
        return self.loaded.config

    @property
    def site(self) -> Site:
        return self.loaded.site

    @property
    def run(self) -> str:
        return self.config.run

    def stage(self, name: str) -> StagePlan:
        return next(stage for stage in self.stages if stage.name == name)

    @property
    def exported(self) -> tuple[str, ...]:
        return tuple(stage.name for stage in self.stages if stage.stage.export != "none")

    @property
    def used_datasets(self) -> set[str]:
        """Datasets that a stage trains on, and the parts of mixtures."""
        trained_on = {stage.stage.dataset for stage in self.stages}
        return trained_on.union(*(self.config.datasets[name].mixture for name in trained_on))

    def data_jobs(self, dataset: str) -> int:
        """Jobs that share out a dataset's units."""
        return self.config.data_jobs.get(dataset, 1)

    @cached_property
    def needs_fetch(self) -> bool:
        """Whether anything comes from the hub or is collected on this machine."""
        config = self.config
        pretrained = config.model.pretrained
        sources = [config.tokenizer.hub, pretrained and pretrained.hub]
        return any(sources) or any(d.hub or d.python_stdlib for d in config.datasets.values())

    @cached_property
    def first_weights(self) -> tuple[str, ...]:
        """How they differ from those in the pretrained folder, in words."""
        return first_weights_notes(self.loaded, self.lock)

    @property
    def check_nodes(self) -> int:
        return self.config.checks.nodes or min(2, self.site.max_nodes)

    @property
    def check_gpus_per_node(self) -> int:
        return self.config.checks.gpus_per_node or max(s.stage.gpus_per_node for s in self.stages)

    @property
    def controller_request(self) -> SlurmRequest:
        """The allocation of the main Snakemake, where it runs as a job."""
        return requests.controller_request(self.site)

    def request(self, job: str) -> SlurmRequest:
        """The allocation of a job, by its name (longhaul.jobs.builders.payload)."""
        return requests.request(self, job)


def lock_path(run: str) -> Path:
    """Where fetch writes what it pinned, relative to the working folder."""
    return Path("results") / f"{run}.lock.json"


def make_plan(loaded: LoadedConfig, lock: Lock | None = None) -> Plan:
    """Works a config out; UserError names the first thing that cannot work.

    `lock` is what fetch pinned; until it exists the checks that need a hub model's geometry wait (Plan.waiting).
    """
    config = loaded.config
    ordered = order(config)
    check_references(config)
    check_files(loaded)
    check_checks(config, loaded.site)
    model = model_config(loaded, lock)
    sizes = geometry(model) if model else None
    if sizes is None:
        hub = config.model.pretrained.hub if config.model.pretrained else None
        waiting = (
            f"model {hub.id if hub else ''}: memory, positions and vocabulary are checked once fetch knows its size",
        )
    else:
        waiting = ()
        check_vocabulary(config, sizes)
    stages = tuple(_plan_stage(loaded, stage, sizes, model) for stage in ordered)
    plan = Plan(loaded, lock, stages, waiting)
    for name in sorted(plan.used_datasets):
        if config.datasets[name].files:
            sizes_bytes = [path.stat().st_size for path in dataset_files(loaded, name)]
            check_unit_files(name, config.datasets[name], sizes_bytes, loaded.site)
    return plan


def _plan_stage(loaded: LoadedConfig, stage: Stage, sizes: ModelSize | None, model: dict[str, Any] | None) -> StagePlan:
    world_size = stage.nodes * stage.gpus_per_node
    ranks = sample_ranks(stage, world_size)
    exportable = () if stage.export == "none" else (stage.export,)
    tokens_per_step = stage.global_batch_size * stage.sequence_length
    steps = stage.steps or -(-(stage.tokens or 0) // tokens_per_step)
    check_schedule(stage, steps)
    check_precision(stage, loaded.site)
    check_offload(stage, loaded.config.storage)
    check_site(stage, loaded.site)
    memory = estimate(stage, sizes, world_size) if sizes else None
    if model and sizes and memory:
        check_model(stage, model)
        check_positions(stage, sizes)
        check_memory(stage, memory, loaded.site)
    files = files_per_checkpoint(stage, world_size, bool(exportable))
    check_inodes(stage, files, loaded.site)
    micro_batches = accumulation(stage, ranks)
    save_bytes = checkpoint_bytes(stage, sizes) if sizes else None
    warnings = (bubble_warning(stage, micro_batches), check_lead(stage, save_bytes or 0, loaded.site))
    return StagePlan(
        stage=stage,
        steps=steps,
        tokens=steps * tokens_per_step,
        world_size=world_size,
        data_parallel=ranks,
        accumulation=micro_batches,
        memory=memory,
        flops=sizes.flops_per_token(stage.sequence_length) * steps * tokens_per_step if sizes else None,
        files_per_checkpoint=files,
        checkpoint_bytes=save_bytes,
        exportable=exportable,
        spec=result_spec(loaded, stage, steps),
        bubble=bubble(stage.parallel.pipeline, micro_batches),
        warnings=tuple(warning for warning in warnings if warning),
    )
