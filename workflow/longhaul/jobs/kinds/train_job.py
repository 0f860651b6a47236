"""Declares the training of one stage: what the trainer's spec holds, its nodes and GPUs, and the checks of its nodes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from longhaul.artifacts.atomic_files import content_hash
from longhaul.artifacts.paths import STAGE_KIND, JobFolder, JobId
from longhaul.config.field_types import HuggingFaceConfig
from longhaul.config.run_config import Trackers
from longhaul.config.stage_config import Stage
from longhaul.jobs.job_kind import JobKind, PlannedStep
from longhaul.jobs.job_spec import JobSpec
from longhaul.jobs.kinds.environment_job import environment_spec
from longhaul.jobs.kinds.fabric_job import FEWEST_COMPARED_NODES, fabric_spec
from longhaul.jobs.templates import render_deepspeed_config
from longhaul.planning import Plan, model_config
from longhaul.planning.slurm_request import SlurmRequest, gpu_request


class TrainSpec(JobSpec):
    """Trains one stage."""

    seed: int
    stage: Stage
    model: HuggingFaceConfig  # Hugging Face config, model_type included
    pretrained: str | None  # folder with the first weights; None: random weights from the seed
    trust_remote_code: bool
    planned_steps: int | None  # None: they follow from stage.epochs, and the job computes them
    accumulation: int  # micro batches per optimizer step and rank
    data_parallel: int
    world_size: int
    asynchronous_saves: bool  # files are written from a copy in host memory while training continues
    exported_checkpoints: tuple[str, ...]  # "last", "best": these are exported, so they need reference values
    spec: dict[str, object]  # result spec: what the weights depend on, apart from data and starting checkpoint
    start_checkpoint: str | None  # the earlier stage's checkpoint.json
    tokenizer: str  # results/<run>/tokenizer.json
    data: str  # the dataset's manifest
    deepspeed: str  # ds_config.json
    folder: str  # results/<run>/stages/<stage>
    weights_root: str  # the trainer works in <weights_root>/<hash>
    out: str  # checkpoint.json
    gpu_peak_tflops: float | None
    trackers: Trackers
    scratch: str | None
    bind_cores: bool  # each rank takes its part of the cores next to its GPU

    @property
    def steps(self) -> int:
        """Return the number of optimizer steps.

        Raises:
            ValueError: they follow from stage.epochs, and longhaul.train.count_steps has not computed them yet.
        """
        if self.planned_steps is None:
            raise ValueError(f"the steps of {self.stage.epochs} epochs are not computed yet")
        return self.planned_steps

    def input_texts(self) -> Iterable[str | None]:
        return [self.deepspeed, self.data, self.start_checkpoint]

    def weights_folders_root(self) -> str | None:
        return self.weights_root

    def external_paths(self) -> Iterable[str | None]:
        return [self.pretrained]


def train_spec(plan: Plan, name: str) -> TrainSpec:
    """Return the spec of a stage's training."""
    planned, config, folder = plan.stage(name), plan.config, plan.paths.stage(name)
    stage, pretrained = planned.stage, config.model.pretrained
    return TrainSpec(
        run=plan.run,
        seed=config.seed,
        stage=stage,
        model=model_config(plan.loaded, plan.lock) or {},
        pretrained=_pretrained_folder(plan),
        trust_remote_code=bool(pretrained and pretrained.trust_remote_code),
        planned_steps=planned.steps,
        accumulation=planned.accumulation,
        data_parallel=planned.data_parallel,
        world_size=planned.world_size,
        asynchronous_saves=planned.asynchronous_saves,
        exported_checkpoints=planned.exported_checkpoints,
        spec=planned.spec,
        start_checkpoint=str(plan.paths.stage(stage.start_from.stage).checkpoint) if stage.start_from else None,
        tokenizer=str(plan.paths.tokenizer),
        data=str(plan.paths.manifest(stage.dataset)),
        deepspeed=str(folder.deepspeed_config),
        folder=str(folder.path),
        weights_root=str(plan.weights_root(name)),
        out=str(folder.checkpoint),
        gpu_peak_tflops=plan.site.node.gpu_peak_tflops,
        trackers=config.trackers,
        scratch=config.storage.scratch,
        bind_cores=plan.site.partition_for("gpu").cpu_bind == "auto",
    )


def _pretrained_folder(plan: Plan) -> str | None:
    pretrained = plan.config.model.pretrained
    if pretrained is None:
        return None
    if pretrained.path:
        return str(plan.loaded.resolve("model.pretrained.path", pretrained.path))
    return plan.fetched("model", "path")


def _request(plan: Plan, job: JobId) -> SlurmRequest:
    stage = plan.stage(*job.names).stage
    return gpu_request(
        plan.site,
        place="gpu",
        nodes=stage.nodes,
        tasks=stage.gpus_per_node,
        gpus=stage.gpus_per_node,
        minutes=stage.minutes,
    )


def _checks(plan: Plan, job: JobId, request: SlurmRequest) -> Sequence[PlannedStep]:
    """Return the checks on the stage's own nodes, before each attempt."""
    stage, folder = plan.stage(job.names[0]).stage, plan.paths.stage(job.names[0])
    return [node_check(plan, stage, folder, request), *_pair_check(plan, job, request)]


def _pair_check(plan: Plan, job: JobId, request: SlurmRequest) -> Sequence[PlannedStep]:
    """Return the pair tournament. Two nodes are one pair, which only a baseline of the site can judge."""
    (name,) = job.names
    stage, folder = plan.stage(name).stage, plan.paths.stage(name)
    out = str(folder.pair_check_report)
    spec = fabric_spec(plan, job, stage.nodes, stage.gpus_per_node, out, pairs_only=True)
    has_baseline = spec.baseline is not None and bool(spec.baseline.network)
    if stage.nodes < (2 if has_baseline else FEWEST_COMPARED_NODES):
        return []
    title = "Check of the network between these nodes"
    return [PlannedStep(title, "fabric", spec, folder.pair_check_spec.name, request)]


def node_check(plan: Plan, stage: Stage, folder: JobFolder, request: SlurmRequest) -> PlannedStep:
    """Return the environment check on a training's own nodes; it takes seconds, as compiled ops are kept per node."""
    spec = environment_spec(plan, folder, "gpu", stage.nodes, stage.gpus_per_node, str(folder.node_check_report))
    one_per_node = replace(request, tasks_per_node=1, cpus_per_task=1)
    title = "Check of the nodes of this allocation"
    return PlannedStep(title, "environment", spec, folder.node_check_spec.name, one_per_node)


def _deepspeed_config(plan: Plan, job: JobId) -> dict[str, str]:
    name = plan.paths.job(job).deepspeed_config.name
    return {name: render_deepspeed_config(plan.stage(*job.names), plan.site)}


KIND = JobKind(
    name=STAGE_KIND,
    order=8,
    help="train one stage",
    spec=TrainSpec,
    entry_point="longhaul.train.train_stage:run",
    jobs=lambda plan: [JobId(STAGE_KIND, (stage.name,)) for stage in plan.stages],
    build_spec=lambda plan, job: train_spec(plan, *job.names),
    request=_request,
    wildcards=("stage",),
    rerun_key=lambda plan, job: content_hash(plan.stage(*job.names).spec),
    first_steps=_checks,
    more_files=_deepspeed_config,
    binds_ranks=True,
    max_restarts=lambda plan, job: plan.stage(*job.names).stage.recovery.max_restarts,
)
