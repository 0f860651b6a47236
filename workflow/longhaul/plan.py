"""Config -> Plan: everything that can be decided before a job is submitted, and every refusal that can be made there.

Pure but for small local JSON (the site, `results/<run>.lock.json`, a local model's config.json), so `snakemake -n` stays
instant and every job may make the plan again.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from longhaul.artifacts import Lock
from longhaul.config.geometry import Geometry, geometry
from longhaul.config.load import LoadedConfig
from longhaul.config.models import Config, Stage
from longhaul.config.sites import Partition, Site
from longhaul.errors import UserError
from longhaul.memory import Memory, estimate
from longhaul.slurm import SlurmRequest

# MFU assumed for GPU-hours where nothing was measured yet; DeepSpeed ZeRO runs on H100-class GPUs reach 35-50 %.
ASSUMED_MFU = 0.4


@dataclass(frozen=True)
class StagePlan:
    """One stage, worked out. tokens: trained on in all. memory and flops are None until the model's geometry is known."""

    stage: Stage
    steps: int
    tokens: int
    world_size: int
    data_parallel: int
    accumulation: int
    memory: Memory | None
    flops: float | None
    files_per_checkpoint: int
    exportable: tuple[str, ...]
    spec: dict[str, Any]

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

    @cached_property
    def needs_fetch(self) -> bool:
        """Whether anything comes from the hub or is collected on this machine."""
        config = self.config
        pretrained = config.model.pretrained
        sources = [config.tokenizer.hub, pretrained and pretrained.hub]
        return any(sources) or any(d.hub or d.python_stdlib for d in config.datasets.values())

    @property
    def check_gpus_per_node(self) -> int:
        return self.config.checks.gpus_per_node or max(s.stage.gpus_per_node for s in self.stages)

    def request(self, job: str) -> SlurmRequest:
        """The allocation of a job: environment, fabric, tokenizer, tokenize-<dataset>, train-<stage>, convert-<stage>."""
        return _request(self, job)


def lock_path(run: str) -> Path:
    """Where fetch writes what it pinned, relative to the working folder."""
    return Path("results") / f"{run}.lock.json"


def make_plan(loaded: LoadedConfig, lock: Lock | None = None) -> Plan:
    """Works a config out; UserError names the first thing that cannot work.

    `lock` is what fetch pinned; until it exists the checks that need a hub model's geometry wait (Plan.waiting).
    """
    config = loaded.config
    ordered = _order(config)
    _check_references(config)
    _check_files(loaded)
    model = model_config(loaded, lock)
    sizes = geometry(model) if model else None
    if sizes is None:
        hub = config.model.pretrained.hub if config.model.pretrained else None
        waiting = (f"model {hub.id if hub else ''}: memory, positions and vocabulary are checked once fetch knows its size",)
    else:
        waiting = ()
        _check_vocabulary(config, sizes)
    needed = _checkpoints_needed(config)
    stages = tuple(_plan_stage(loaded, stage, sizes, needed[stage.name], model) for stage in ordered)
    return Plan(loaded, lock, stages, waiting)


def model_config(loaded: LoadedConfig, lock: Lock | None) -> dict[str, Any] | None:
    """The model's Hugging Face config; None while it is on the hub and not fetched."""
    pretrained = loaded.config.model.pretrained
    if pretrained is None:
        return loaded.config.model.config_dict()
    if pretrained.hub:
        return lock.model if lock and lock.model else None
    path = loaded.resolve(pretrained.path or "") / "config.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"model.pretrained.path: cannot read {path}: {error}", "name a Hugging Face model folder") from None


def _order(config: Config) -> list[Stage]:
    """Stages so that each follows the one it starts from; in the order of the file where that is free."""
    by_name: dict[str, Stage] = {}
    for stage in config.stages:
        if stage.name in by_name:
            raise UserError(f"stages: {stage.name} is there twice", "give every stage its own name")
        by_name[stage.name] = stage
    ordered: list[Stage] = []
    for stage in config.stages:
        for one in reversed(_lineage(stage, by_name)):
            if one not in ordered:
                ordered.append(one)
    return ordered


def _lineage(stage: Stage, by_name: dict[str, Stage]) -> list[Stage]:
    line = [stage]
    while line[-1].start_from:
        parent = line[-1].start_from.stage
        if parent not in by_name:
            raise UserError(
                f"stages.{line[-1].name}.from.stage: there is no stage {parent!r}", f"use one of {', '.join(by_name)}"
            )
        if by_name[parent] in line:
            names = " <- ".join(one.name for one in [*line, by_name[parent]])
            raise UserError(f"stages: {names} is a cycle", "let one of them start from the model: drop its `from`")
        line.append(by_name[parent])
    return line


def _check_references(config: Config) -> None:
    for stage in config.stages:
        if stage.dataset not in config.datasets:
            raise UserError(
                f"stages.{stage.name}.dataset: there is no dataset {stage.dataset!r}",
                f"use one of {', '.join(config.datasets)}",
            )
        wanted, kind = ("chat" if stage.kind == "sft" else "text"), config.datasets[stage.dataset].kind
        if kind != wanted:
            raise UserError(
                f"stages.{stage.name}: kind {stage.kind} needs a {wanted} dataset; {stage.dataset} is {kind}",
                f"name a {wanted} dataset, or change the stage's kind",
            )
        _check_best(config, stage)
    train = config.tokenizer.train
    for name in train.datasets if train else ():
        if name not in config.datasets:
            raise UserError(
                f"tokenizer.train.datasets: there is no dataset {name!r}", f"use one of {', '.join(config.datasets)}"
            )
        if config.datasets[name].kind != "text":
            raise UserError(f"tokenizer.train.datasets: {name} is not a text dataset", "name text datasets")


def _check_best(config: Config, stage: Stage) -> None:
    """`best` needs a validation split and a kept best checkpoint."""
    wants_best = {s.start_from.stage for s in config.stages if s.start_from and s.start_from.checkpoint == "best"}
    if stage.name not in wants_best and stage.export != "best":
        return
    if config.datasets[stage.dataset].validation_share == 0:
        raise UserError(
            f"stages.{stage.name}: its best checkpoint is asked for, but {stage.dataset} has validation_share 0",
            "set a validation_share, or ask for the last checkpoint",
        )
    if stage.checkpoints.keep_best == 0:
        raise UserError(
            f"stages.{stage.name}.checkpoints.keep_best is 0, but its best checkpoint is asked for", "set keep_best to 1"
        )


def _check_files(loaded: LoadedConfig) -> None:
    for name, dataset in loaded.config.datasets.items():
        if dataset.files:
            dataset_files(loaded, name)
    tokenizer = loaded.config.tokenizer
    if tokenizer.path and not (loaded.resolve(tokenizer.path) / "tokenizer.json").is_file():
        raise UserError(
            f"tokenizer.path: {loaded.resolve(tokenizer.path)} holds no tokenizer.json", "name a Hugging Face tokenizer folder"
        )
    if tokenizer.chat_template and not loaded.resolve(tokenizer.chat_template).is_file():
        raise UserError(
            f"tokenizer.chat_template: {loaded.resolve(tokenizer.chat_template)} does not exist", "name a Jinja file"
        )


def dataset_files(loaded: LoadedConfig, name: str) -> list[Path]:
    """A dataset's own files, globs expanded, sorted within each pattern; UserError for a pattern that finds none."""
    found: list[Path] = []
    for pattern in loaded.config.datasets[name].files:
        paths = _expand(loaded.resolve(pattern))
        if not paths:
            raise UserError(
                f"datasets.{name}.files: nothing matches {pattern!r} (looked in {loaded.folder})",
                "paths are relative to the config file",
            )
        for path in paths:
            if path.stat().st_size == 0:
                raise UserError(f"datasets.{name}.files: {path} is empty", "remove it from the list, or fill it")
            if path in found:
                raise UserError(f"datasets.{name}.files: {path} is listed twice", "list every file once")
            found.append(path)
    return found


def _expand(pattern: Path) -> list[Path]:
    if pattern.is_file():
        return [pattern]
    if pattern.is_dir():
        return sorted(p for p in pattern.rglob("*") if p.is_file() and not p.name.startswith("."))
    anchor = Path(pattern.anchor)
    return sorted(p for p in anchor.glob(str(pattern.relative_to(anchor))) if p.is_file())


def _check_vocabulary(config: Config, sizes: Geometry) -> None:
    train = config.tokenizer.train
    if train and train.vocab_size > sizes.vocab_size:
        raise UserError(
            f"tokenizer.train.vocab_size {train.vocab_size} is larger than the model's vocab_size {sizes.vocab_size}",
            f"train at most {sizes.vocab_size} tokens, or enlarge the model's vocab_size",
        )


def _checkpoints_needed(config: Config) -> dict[str, tuple[str, ...]]:
    """Stage -> which of its checkpoints must carry a proof, because they are exported."""
    return {s.name: () if s.export == "none" else (s.export,) for s in config.stages}


def _plan_stage(
    loaded: LoadedConfig, stage: Stage, sizes: Geometry | None, exportable: tuple[str, ...], model: dict[str, Any] | None
) -> StagePlan:
    world_size = stage.nodes * stage.gpus_per_node
    data_parallel = _data_parallel(stage, world_size)
    accumulation = _accumulation(stage, data_parallel)
    tokens_per_step = stage.global_batch * stage.sequence_length
    steps = stage.steps or -(-(stage.tokens or 0) // tokens_per_step)
    _check_schedule(stage, steps)
    _check_precision(stage)
    _check_offload(stage)
    _check_site(stage, loaded.site)
    memory = estimate(stage, sizes, data_parallel) if sizes else None
    if sizes and memory:
        _check_positions(stage, sizes)
        _check_memory(stage, memory, loaded.site)
    files = _files_per_checkpoint(stage, world_size, bool(exportable))
    _check_inodes(stage, files, loaded.site)
    return StagePlan(
        stage=stage,
        steps=steps,
        tokens=steps * tokens_per_step,
        world_size=world_size,
        data_parallel=data_parallel,
        accumulation=accumulation,
        memory=memory,
        flops=sizes.flops_per_token(stage.sequence_length) * steps * tokens_per_step if sizes else None,
        files_per_checkpoint=files,
        exportable=exportable,
        spec=result_spec(loaded, stage, steps),
    )


def result_spec(loaded: LoadedConfig, stage: Stage, steps: int) -> dict[str, Any]:
    """What a stage's weights depend on, beside its data and starting checkpoint, whose hashes the job adds.

    Nodes, layout, ZeRO stage, micro batch and the like are not in it: they change how long the same result takes.
    Written as the config states it, never from the lock: a spec must not change when fetch has run.
    """
    model = loaded.config.model
    return {
        "model": model.config_dict() or _pretrained_identity(loaded),
        "seed": loaded.config.seed,
        "kind": stage.kind,
        "dataset": stage.dataset,
        "from": stage.start_from.model_dump() if stage.start_from else None,
        "steps": steps,
        "restart": stage.restart,
        "global_batch": stage.global_batch,
        "sequence_length": stage.sequence_length,
        "optimizer": stage.optimizer.model_dump(mode="json"),
        "schedule": stage.schedule.model_dump(mode="json"),
        "precision": stage.precision,
        "loss_scale": stage.loss_scale.model_dump(mode="json") if stage.precision == "fp16" else None,
        "nonfinite": stage.nonfinite.model_dump(mode="json"),
    }


def _pretrained_identity(loaded: LoadedConfig) -> dict[str, Any]:
    """A hub model by id and revision; a local one by its files' names and sizes (weights are not hashed at every parse)."""
    pretrained = loaded.config.model.pretrained
    if pretrained is None or pretrained.hub:
        return pretrained.model_dump(mode="json") if pretrained else {}
    folder = loaded.resolve(pretrained.path or "")
    return {"path": str(folder), "files": {p.name: p.stat().st_size for p in sorted(folder.iterdir()) if p.is_file()}}


def _data_parallel(stage: Stage, world_size: int) -> int:
    parallel, where = stage.parallel, f"stages.{stage.name}"
    if parallel.pipeline > 1 and stage.zero.stage >= 2:
        raise UserError(
            f"{where}: pipeline {parallel.pipeline} with ZeRO stage {stage.zero.stage}: DeepSpeed's pipelines work with "
            "ZeRO 0 and 1 only",
            "set zero.stage to 1, or parallel.pipeline to 1",
        )
    for axis in ("tensor", "pipeline", "expert", "sequence"):
        if (ways := getattr(parallel, axis)) > 1:
            raise UserError(
                f"{where}.parallel.{axis} is {ways}: this release trains data-parallel with ZeRO only",
                f"set {axis} to 1 and use zero.stage 3, with offload where the memory does not suffice",
            )
    return world_size


def _accumulation(stage: Stage, data_parallel: int) -> int:
    per_pass = stage.micro_batch * data_parallel
    if stage.global_batch % per_pass:
        raise UserError(
            f"stages.{stage.name}: global_batch {stage.global_batch} is not a multiple of micro_batch "
            f"{stage.micro_batch} x data parallel {data_parallel} = {per_pass}",
            f"use a global_batch of {max(1, stage.global_batch // per_pass) * per_pass}, or another micro_batch",
        )
    return stage.global_batch // per_pass


def _check_schedule(stage: Stage, steps: int) -> None:
    schedule, where = stage.schedule, f"stages.{stage.name}.schedule"
    if schedule.kind == "wsd" and schedule.decay_steps == 0:
        raise UserError(f"{where}: wsd needs decay_steps >= 1", "10 to 20 % of the steps is usual")
    if schedule.kind != "wsd" and schedule.decay_steps:
        raise UserError(f"{where}.decay_steps {schedule.decay_steps} has no meaning for {schedule.kind}", "drop it, or use wsd")
    if schedule.warmup_steps + schedule.decay_steps > steps:
        raise UserError(
            f"{where}: warmup_steps {schedule.warmup_steps} + decay_steps {schedule.decay_steps} exceed the stage's "
            f"{steps} steps",
            "shorten them, or train longer",
        )


def _check_precision(stage: Stage) -> None:
    if stage.precision != "fp32" and stage.zero.stage == 0:
        raise UserError(
            f"stages.{stage.name}: precision {stage.precision} with ZeRO stage 0 keeps no fp32 master weights and trains "
            "to other numbers",
            "set zero.stage to 1",
        )


def _check_offload(stage: Stage) -> None:
    zero, where = stage.zero, f"stages.{stage.name}.zero"
    if zero.offload_optimizer == "cpu" and zero.stage == 0:
        raise UserError(f"{where}.offload_optimizer needs stage >= 1; it is 0", "set stage to 1, 2 or 3")
    if zero.offload_param == "cpu" and zero.stage < 3:
        raise UserError(
            f"{where}.offload_param needs stage 3; it is {zero.stage} (DeepSpeed would ignore it in silence)",
            "set stage to 3, or offload the optimizer only",
        )


def _check_site(stage: Stage, site: Site) -> None:
    where = f"stages.{stage.name}"
    if site.node.gpus and stage.gpus_per_node > site.node.gpus:
        raise UserError(
            f"{where}.gpus_per_node {stage.gpus_per_node}: site {site.name} has {site.node.gpus} GPUs a node",
            "use more nodes with fewer GPUs each",
        )
    if not site.node.gpus and stage.gpus_per_node > site.node.cpus:
        raise UserError(
            f"{where}.gpus_per_node {stage.gpus_per_node}: site {site.name} has {site.node.cpus} CPUs a node and no GPU",
            "one process needs at least one CPU",
        )
    partition = partition_for(site, "gpu")
    most = min(site.max_nodes, (partition.max_nodes if partition else None) or site.max_nodes)
    if stage.nodes > most:
        raise UserError(f"{where}.nodes {stage.nodes}: site {site.name} allows {most}", f"use at most {most} nodes")
    if partition and stage.minutes > partition.max_minutes:
        raise UserError(
            f"{where}.minutes {stage.minutes}: partition {partition.name} allows {partition.max_minutes}",
            f"use at most {partition.max_minutes} minutes",
        )


def _check_positions(stage: Stage, sizes: Geometry) -> None:
    if stage.sequence_length > sizes.positions:
        raise UserError(
            f"stages.{stage.name}.sequence_length {stage.sequence_length} exceeds the model's "
            f"max_position_embeddings {sizes.positions}",
            f"use at most {sizes.positions}, or enlarge the positions",
        )


def _check_memory(stage: Stage, memory: Memory, site: Site) -> None:
    limit = site.node.gpu_memory_gib
    if limit and memory.states > limit * 2**30:
        raise UserError(
            f"stages.{stage.name}: weights, gradients and optimizer alone take {memory.states / 2**30:.1f} GiB per GPU; "
            f"site {site.name} has {limit:g} GiB",
            "raise zero.stage, offload to the CPU, or use more GPUs",
        )


def _files_per_checkpoint(stage: Stage, world_size: int, exportable: bool) -> int:
    """Files of one save: DeepSpeed's model and optimizer states, one trainer state per rank, state, manifest, proof."""
    model = world_size if stage.zero.stage == 3 else 1
    optimizer = world_size if stage.zero.stage >= 1 else 0
    return model + optimizer + world_size + 2 + (3 if exportable else 0)


def _check_inodes(stage: Stage, files: int, site: Site) -> None:
    kept = stage.checkpoints.keep_last + stage.checkpoints.keep_best + 1
    if site.inode_limit and files * kept > site.inode_limit:
        raise UserError(
            f"stages.{stage.name}: {kept} checkpoints of {files} files exceed site {site.name}'s inode_limit "
            f"{site.inode_limit}",
            "keep fewer checkpoints",
        )


def partition_for(site: Site, kind: str) -> Partition | None:
    """The partition that serves cpu, gpu or debug jobs; the gpu partition where the site names no other."""
    if site.partitions is None:
        return None
    return getattr(site.partitions, kind) or site.partitions.gpu


def _request(plan: Plan, job: str) -> SlurmRequest:
    config, site = plan.config, plan.site
    verb, _, name = job.partition("-")
    if verb == "train":
        stage = plan.stage(name).stage
        return _gpu_request(site, "gpu", stage.nodes, stage.gpus_per_node, stage.gpus_per_node, stage.minutes)
    if verb in ("environment", "fabric"):
        tasks = plan.check_gpus_per_node if verb == "fabric" else 1
        return _gpu_request(site, "debug", config.checks.nodes, tasks, plan.check_gpus_per_node, config.checks.minutes)
    return _cpu_request(site, config.data_minutes)


def _gpu_request(site: Site, kind: str, nodes: int, tasks: int, gpus: int, minutes: int) -> SlurmRequest:
    partition = partition_for(site, kind)
    # A share of the node's cores for a share of its GPUs, so that two jobs fit where half is asked for.
    share = gpus / (site.node.gpus or site.node.cpus)
    cpus = max(1, int(site.node.cpus * share) // tasks)
    return SlurmRequest(
        nodes=nodes,
        tasks_per_node=tasks,
        cpus_per_task=cpus,
        minutes=min(minutes, partition.max_minutes) if partition else minutes,
        partition=partition.name if partition else "",
        gpus_per_node=gpus if site.node.gpus else 0,
        gpu_request=site.gpu_request,
        gpu_type=site.gpu_type,
        memory_mb=_memory_mb(site, share),
        **_common(site),
    )


def _cpu_request(site: Site, minutes: int) -> SlurmRequest:
    partition = partition_for(site, "cpu")
    return SlurmRequest(
        nodes=1,
        tasks_per_node=1,
        cpus_per_task=site.node.cpus,
        minutes=min(minutes, partition.max_minutes) if partition else minutes,
        partition=partition.name if partition else "",
        memory_mb=_memory_mb(site, 1.0),
        **_common(site),
    )


def _memory_mb(site: Site, share: float) -> int | None:
    return {"per_node": max(1, int(site.node.memory_mb * min(1.0, share))), "all": 0, "omit": None}[site.memory]


def _common(site: Site) -> dict[str, Any]:
    return {
        "account": site.account,
        "qos": site.qos,
        "constraint": site.constraint,
        "reservation": site.reservation,
        "exclusive": site.exclusive,
    }
