"""Builds the plan: steps from tokens, ranks and accumulation of every stage; calls all checks and collects their warnings.

Apart from the config, the plan reads only small local JSON files: the lock file and a local model's config.json. So
`snakemake -n` is fast, and every job can compute the plan again. All errors that can be found here are raised here.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

from longhaul.artifacts.artifact_schemas import Lock
from longhaul.artifacts.paths import RunPaths
from longhaul.config.field_types import HuggingFaceConfig
from longhaul.config.load_config import LoadedConfig
from longhaul.config.model_size import ModelSize, model_size
from longhaul.config.run_config import Config
from longhaul.config.site_config import Site
from longhaul.config.stage_config import Stage
from longhaul.planning.check_feasibility import (
    accumulation_steps,
    check_checkpoint_files,
    check_chunk_files,
    check_expert_balance,
    check_job_limits,
    check_memory,
    check_number_of_steps,
    check_offload,
    check_positions,
    check_precision,
    check_save_time,
    check_schedule,
    check_site,
    check_vocabulary,
    data_minutes_warning,
    deterministic_warning,
    memory_warning,
    not_compiled_warning,
    save_time_warning,
)
from longhaul.planning.check_files_exist import (
    changes_of_pretrained_weights,
    check_files,
    dataset_files,
    evaluation_files,
    model_config,
)
from longhaul.planning.check_inference_servers import check_engine_of_jobs, check_job_servers, has_served_evaluation
from longhaul.planning.check_parallel_layout import (
    check_model,
    data_parallel_size,
    pipeline_bubble,
    pipeline_bubble_warning,
)
from longhaul.planning.check_pretrained_weights import check_pretrained_folder
from longhaul.planning.checkpoint_size import checkpoint_bytes, files_per_checkpoint
from longhaul.planning.config_references import check_references
from longhaul.planning.evaluation_tasks import check_evaluations
from longhaul.planning.find_nccl_tests import check_nccl_tests, nccl_tests_warning
from longhaul.planning.fit_memory import fit_memory
from longhaul.planning.gpu_memory import MemoryEstimate, estimate_gpu_memory
from longhaul.planning.node_memory import node_memory_warning
from longhaul.planning.retraining_keys import result_spec
from longhaul.planning.save_mode import synchronous_save_reason
from longhaul.planning.serving_plan import ServingPlan, plan_serving
from longhaul.planning.stage_order import sort_stages


@dataclass(frozen=True)
class StagePlan:
    """The plan of one training stage.

    steps:         None with `epochs`: the training job counts the samples (planning.steps_of_epochs)
    data_parallel: number of groups of ranks that read different samples
    accumulation:  micro batches per rank and optimizer step
    sizes, memory, checkpoint_bytes: None until fetch has read the size of a Hub model
    asynchronous_saves: whether files of a checkpoint are written while training continues
    exported_checkpoints: "last", "best" or none; these checkpoints need reference values
    spec:          the result spec
    serving:       the plan of the server that `serve` describes; None without that section and `serve_check`, and as `sizes`
    """

    stage: Stage
    steps: int | None
    tokens_per_step: int
    world_size: int
    data_parallel: int
    accumulation: int
    memory: MemoryEstimate | None
    sizes: ModelSize | None
    files_per_checkpoint: int
    checkpoint_bytes: int | None
    asynchronous_saves: bool
    exported_checkpoints: tuple[str, ...]
    spec: dict[str, object]
    pipeline_bubble: float
    serving: ServingPlan | None
    warnings: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.stage.name


@dataclass(frozen=True)
class Plan:
    """The plan of a run.

    stages:          sorted so that each stage follows the one that it starts from
    deferred_checks: checks that need the size of a Hub model, which fetch has not read yet
    """

    loaded: LoadedConfig
    lock: Lock | None
    stages: tuple[StagePlan, ...]
    deferred_checks: tuple[str, ...] = field(default=())

    @property
    def config(self) -> Config:
        return self.loaded.config

    @property
    def site(self) -> Site:
        return self.loaded.site

    @property
    def run(self) -> str:
        return self.config.run

    @property
    def paths(self) -> RunPaths:
        """The run's paths, relative to the working folder."""
        return RunPaths(self.run)

    def stage(self, name: str) -> StagePlan:
        return next(stage for stage in self.stages if stage.name == name)

    @property
    def exported(self) -> tuple[str, ...]:
        return tuple(stage.name for stage in self.stages if stage.stage.export != "none")

    @property
    def used_datasets(self) -> set[str]:
        """Names of the datasets that a stage trains on, including the datasets in mixtures."""
        trained_on = {stage.stage.dataset for stage in self.stages}
        return trained_on.union(*(self.config.datasets[name].mixture for name in trained_on))

    @property
    def warnings(self) -> tuple[str, ...]:
        """Warnings that are about no stage."""
        return tuple(filter(None, [data_minutes_warning(self.config, self.site), nccl_tests_warning(self.site)]))

    def data_jobs(self, dataset: str) -> int:
        """Return the number of encode jobs of a dataset."""
        return self.config.data_jobs.get(dataset, 1)

    def weights_root(self, stage: str) -> Path:
        """Return the folder of a stage's weights folders."""
        root = self.config.storage.weights
        return Path(root) / self.run / stage if root else self.paths.stage(stage).weights

    def shards_root(self, dataset: str) -> Path:
        """Return the folder of a dataset's shards."""
        root = self.config.storage.data
        return Path(root) / self.run / dataset if root else self.paths.shards(dataset)

    def fetched(self, name: str, key: Literal["path", "revision"]) -> str | None:
        """Return what fetch recorded under a key of a source (`tokenizer`, `model`); None until fetch has run."""
        return self.lock.sources[name].get(key) if self.lock and name in self.lock.sources else None

    def source_files(self, dataset: str) -> tuple[str, ...]:
        """Return a dataset's files: the user's own, or those that fetch downloaded; empty until fetch has run."""
        if self.config.datasets[dataset].files:
            return tuple(str(path) for path in dataset_files(self.loaded, dataset))
        source = self.lock.sources.get(dataset) if self.lock else None
        return tuple(source.get("files", ())) if source else ()

    def rule_inputs(self, dataset: str) -> list[Path]:
        """Return the inputs of a dataset's rules: the user's files and evaluation files, or a mixture's manifests."""
        if mixture := self.config.datasets[dataset].mixture:
            return [self.paths.manifest(part) for part in mixture]
        own = dataset_files(self.loaded, dataset) if self.config.datasets[dataset].files else []
        return [*own, *evaluation_files(self.loaded, dataset)]

    @cached_property
    def needs_fetch(self) -> bool:
        """True if something other than the data of evaluation tasks is downloaded from the Hub or collected on this machine."""
        config = self.config
        pretrained = config.model.pretrained
        sources = [config.tokenizer.hub, pretrained and pretrained.hub]
        sources += [dataset.hub or dataset.python_stdlib for dataset in config.datasets.values()]
        return any(sources)

    def evaluated_export(self, stage: str, model: str) -> str | None:
        """Return the stage whose export is evaluated as `trained` or `start` of a stage; None: the pretrained model."""
        start = self.stage(stage).stage.start_from
        return stage if model == "trained" else start.stage if start else None

    @property
    def pretrained_folder(self) -> str | None:
        """Folder of the pretrained model; None without one, and until fetch has downloaded it."""
        pretrained = self.config.model.pretrained
        if pretrained is None or pretrained.hub:
            return self.fetched("model", "path")
        return str(self.loaded.resolve("model.pretrained.path", pretrained.path or ""))

    @cached_property
    def pretrained_changes(self) -> tuple[str, ...]:
        """Sentences about the changes between the pretrained folder's weights and the start weights."""
        return changes_of_pretrained_weights(self.loaded, self.lock)

    @property
    def check_nodes(self) -> int:
        """Return the number of nodes that the checks ask for: two, but no more than the largest stage or the site has."""
        limits = (self.site.partition_for(place).max_nodes for place in ("gpu", "debug"))
        largest_stage = max(stage.stage.nodes for stage in self.stages)
        return self.config.checks.nodes or min(2, largest_stage, *limits)

    @property
    def check_gpus_per_node(self) -> int:
        node = self.site.partition_for("debug").node
        most = max(stage.stage.gpus_per_node for stage in self.stages)
        return self.config.checks.gpus_per_node or min(most, node.gpus or node.cpus)


def build_plan(loaded: LoadedConfig, lock: Lock | None = None) -> Plan:
    """Return the plan of a config. `lock` is what fetch recorded.

    Raises:
        UserError: the first problem that would make the run fail.
    """
    config = loaded.config
    stages = sort_stages(config)
    check_references(config)
    check_files(loaded)
    check_nccl_tests(loaded.site)
    check_evaluations(loaded)
    for stage in stages:
        check_engine_of_jobs(stage, loaded.site)
    check_job_limits(config, loaded.site)
    model = model_config(loaded, lock)
    check_pretrained_folder(loaded)
    sizes = model_size(model) if model else None
    if sizes:
        check_vocabulary(config, sizes)
    plan = Plan(
        loaded,
        lock,
        tuple(_plan_stage(loaded, stage, sizes, model) for stage in stages),
        () if sizes else (_deferred_check(config),),
    )
    for name in sorted(plan.used_datasets):
        if config.datasets[name].files:
            file_sizes = [path.stat().st_size for path in dataset_files(loaded, name)]
            check_chunk_files(name, config.datasets[name], file_sizes, loaded.site)
    return plan


def _deferred_check(config: Config) -> str:
    hub = config.model.pretrained.hub if config.model.pretrained else None
    return f"model {hub.id if hub else ''}: memory, positions and vocabulary are checked after fetch has read the model's size"


def _plan_stage(
    loaded: LoadedConfig, stage: Stage, sizes: ModelSize | None, model: HuggingFaceConfig | None
) -> StagePlan:
    world_size = stage.nodes * stage.gpus_per_node
    stage = fit_memory(stage, sizes, loaded.site, world_size)
    data_parallel = data_parallel_size(stage, world_size)
    exported_checkpoints = () if stage.export == "none" else (stage.export,)
    tokens_per_step = stage.global_batch_size * stage.sequence_length
    steps = -(-stage.tokens // tokens_per_step) if stage.tokens else stage.steps
    check_schedule(stage)
    if steps:
        check_number_of_steps(stage, steps)
    check_precision(stage, loaded.site)
    check_offload(stage, loaded.config.storage)
    check_site(stage, loaded.site)
    memory = estimate_gpu_memory(stage, sizes, world_size, bool(loaded.site.node.gpus)) if sizes else None
    if model and sizes and memory:
        check_model(stage, model)
        check_expert_balance(stage, model)
        check_positions(stage, sizes)
        check_memory(stage, memory, sizes, loaded.site)
    files = files_per_checkpoint(stage, world_size, bool(model and model.get("tie_word_embeddings")))
    check_checkpoint_files(stage, files, loaded.site)
    micro_batches = accumulation_steps(stage, data_parallel)
    save_bytes = checkpoint_bytes(stage, sizes) if sizes else None
    check_save_time(stage, save_bytes or 0, loaded.site)
    planned = StagePlan(
        stage=stage,
        steps=steps,
        tokens_per_step=tokens_per_step,
        world_size=world_size,
        data_parallel=data_parallel,
        accumulation=micro_batches,
        memory=memory,
        sizes=sizes,
        files_per_checkpoint=files,
        checkpoint_bytes=save_bytes,
        asynchronous_saves=synchronous_save_reason(stage, memory, loaded.site) is None,
        exported_checkpoints=exported_checkpoints,
        spec=result_spec(loaded, stage, steps),
        pipeline_bubble=pipeline_bubble(stage.parallel.pipeline, micro_batches),
        serving=_plan_server(loaded, stage, model) if model else None,
    )
    return replace(planned, warnings=_warnings(planned, loaded.site))


def _warnings(planned: StagePlan, site: Site) -> tuple[str, ...]:
    stage, memory, sizes = planned.stage, planned.memory, planned.sizes
    found = (
        memory_warning(stage, memory, sizes, site),
        node_memory_warning(stage, memory, sizes, site),
        synchronous_save_reason(stage, memory, site),
        pipeline_bubble_warning(stage, planned.accumulation),
        save_time_warning(stage, planned.checkpoint_bytes or 0, site),
        not_compiled_warning(stage, sizes, site),
        deterministic_warning(stage, site),
    )
    return tuple(warning for warning in found if warning)


def _plan_server(loaded: LoadedConfig, stage: Stage, model: HuggingFaceConfig) -> ServingPlan | None:
    """Return the plan of a stage's server; None if nothing serves its export."""
    if not (stage.serve or stage.serve_check or has_served_evaluation(stage)):
        return None
    serving = plan_serving(stage, model, loaded.site)
    check_job_servers(stage, serving)
    return serving
