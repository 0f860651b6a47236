"""Plan -> what each job is told (longhaul.jobs.specs), with the paths that rules and jobs agree on."""

from __future__ import annotations

from pathlib import Path

from longhaul.artifacts.files import content_hash
from longhaul.artifacts.schemas import Lock
from longhaul.jobs.specs import (
    EncodeSpec,
    EnvironmentSpec,
    ExportSpec,
    FabricSpec,
    Job,
    TokenizerSpec,
    TokenizeSpec,
    TrainSpec,
)
from longhaul.planning import Plan, dataset_files, evaluation_files, model_config


def payload(plan: Plan, job: str) -> Job:
    """The payload of a job by its name.

    These are environment, fabric, tokenizer, tokenize-<dataset>, train-<stage>, convert-<stage>, and where several jobs
    share a dataset's units survey-<dataset> and encode-<dataset>-<share>.
    """
    verb, _, name = job.partition("-")
    if verb == "environment":
        return _environment(plan, plan.check_nodes, plan.check_gpus_per_node, f"{results(plan)}/environment.json")
    if verb == "fabric":
        return _fabric(plan)
    if verb == "tokenizer":
        return _tokenizer(plan)
    kinds = {"survey": _survey, "encode": _encode, "tokenize": _tokenize, "train": _train, "convert": _convert}
    return kinds[verb](plan, name)


def results(plan: Plan) -> str:
    """The run's folder, relative to the working folder."""
    return f"results/{plan.run}"


def job_names(plan: Plan) -> list[str]:
    """Every job of a run but the training stages, in the order of the chain."""
    datasets = sorted(plan.used_datasets)
    return [
        "environment",
        "fabric",
        "tokenizer",
        *(job for name in datasets for job in (*shared_jobs(plan, name), f"tokenize-{name}")),
        *(f"convert-{name}" for name in plan.exported),
    ]


def shared_jobs(plan: Plan, dataset: str) -> list[str]:
    """The jobs before the one that writes a dataset's manifest; none where it makes all units itself."""
    shares = plan.data_jobs(dataset)
    encode = [f"encode-{dataset}-{share}" for share in range(1, shares + 1)]
    return [f"survey-{dataset}", *encode] if shares > 1 else []


def shared_artifacts(plan: Plan, dataset: str) -> list[str]:
    """What these jobs write, in their order."""
    shares = plan.data_jobs(dataset)
    encoded = [_encoded_path(plan, dataset, share) for share in range(1, shares + 1)]
    return [_survey_path(plan, dataset), *encoded] if shares > 1 else []


def stage_environment_job(plan: Plan, name: str) -> EnvironmentSpec:
    """The check of the nodes that a stage really got; it takes seconds."""
    stage = plan.stage(name).stage
    return _environment(plan, stage.nodes, stage.gpus_per_node, f"{results(plan)}/stages/{name}/nodes.json")


def outside_folders(told: Job) -> list[str]:
    """Folders of the user's, and of the hub's cache, that a job reads beside the working folder and the storage roots.

    A link's target counts too: the hub's cache consists of them. A file below / stands for itself.
    """
    match told:
        case TokenizerSpec():
            files = [file for files in told.train_files.values() for file in files]
            read = [told.path, told.chat_template, *files]
        case TokenizeSpec():
            read = [*told.files, *told.evaluation]
        case TrainSpec():
            read = [told.pretrained]
        case _:
            read = []
    paths = [Path(path) for path in read if path]
    return list(dict.fromkeys(str(folder) for path in paths for folder in _folders_of(path)))


def _folders_of(path: Path) -> list[Path]:
    if not path.is_dir():
        places = [path, *([path.resolve()] if path.is_symlink() else [])]
        return [place if place.parent == Path("/") else place.parent for place in places]
    return [path, *(entry.resolve().parent for entry in sorted(path.iterdir()) if entry.is_symlink())]


def _environment(plan: Plan, nodes: int, gpus_per_node: int, out: str) -> EnvironmentSpec:
    swapped = [stage for stage in plan.stages if stage.stage.zero.on_disk]
    memory = [(stage.memory, stage.stage.gpus_per_node) for stage in swapped if stage.memory]
    offloads = any(stage.stage.zero.offload_optimizer != "none" for stage in plan.stages)
    return EnvironmentSpec(
        run=plan.run,
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        checks=plan.config.checks,
        memory_mb=plan.site.node.memory_mb,
        interconnect=plan.site.interconnect.kind,
        cuda_build=plan.site.cuda_build,
        scratch=plan.config.storage.scratch,
        prebuild_ops=(("cpu_adam",) if offloads else ()) + (("pin_memory", "async_io") if swapped else ()),
        swap_bytes=max((rank.disk * ranks for rank, ranks in memory), default=0),
        locked_bytes=max((rank.locked for rank, _ in memory), default=0),
        folder=plan.config.storage.weights or results(plan),
        out=out,
    )


def _fabric(plan: Plan) -> FabricSpec:
    return FabricSpec(
        run=plan.run,
        nodes=plan.check_nodes,
        gpus_per_node=plan.check_gpus_per_node,
        limits=plan.site.interconnect.limits,
        out=f"{results(plan)}/fabric.json",
    )


def _tokenizer(plan: Plan) -> TokenizerSpec:
    config = plan.config
    tokenizer, train = config.tokenizer, config.tokenizer.train
    path = str(plan.loaded.resolve("tokenizer.path", tokenizer.path)) if tokenizer.path else None
    if tokenizer.hub:
        path = _locked(plan.lock, "tokenizer", "path")
    template = tokenizer.chat_template and str(plan.loaded.resolve("tokenizer.chat_template", tokenizer.chat_template))
    model = model_config(plan.loaded, plan.lock)
    return TokenizerSpec(
        run=plan.run,
        path=path,
        train_vocab_size=train.vocab_size if train else None,
        train_files={name: source_files(plan, name) for name in (train.datasets if train else ())},
        train_datasets={name: config.datasets[name] for name in (train.datasets if train else ())},
        chat_template=template,
        needs_chat_template=any(config.datasets[name].kind == "chat" for name in plan.used_datasets),
        model_vocab_size=model["vocab_size"] if model else None,
        folder=f"{results(plan)}/tokenizers",
        out=f"{results(plan)}/tokenizer.json",
    )


def _tokenize(plan: Plan, name: str) -> TokenizeSpec:
    root = plan.config.storage.data
    return TokenizeSpec(
        run=plan.run,
        name=name,
        dataset=plan.config.datasets[name],
        files=source_files(plan, name),
        evaluation=tuple(map(str, evaluation_files(plan.loaded, name))),
        parts={part: f"{results(plan)}/data/{part}.json" for part in plan.config.datasets[name].mixture},
        tokenizer=f"{results(plan)}/tokenizer.json",
        workers=plan.site.node.cpus,
        survey=_survey_path(plan, name) if plan.data_jobs(name) > 1 else None,
        folder=f"{root}/{plan.run}/{name}" if root else f"{results(plan)}/data/{name}",
        out=f"{results(plan)}/data/{name}.json",
    )


def _survey(plan: Plan, name: str) -> TokenizeSpec:
    return _tokenize(plan, name).model_copy(update={"survey": None, "out": _survey_path(plan, name)})


def _survey_path(plan: Plan, name: str) -> str:
    return f"{results(plan)}/data/{name}.survey.json"


def _encode(plan: Plan, name: str) -> EncodeSpec:
    dataset, _, share = name.rpartition("-")
    own = {"out": _encoded_path(plan, dataset, int(share)), "share": int(share), "shares": plan.data_jobs(dataset)}
    return EncodeSpec.model_validate({**dict(_tokenize(plan, dataset)), **own})


def _encoded_path(plan: Plan, dataset: str, share: int) -> str:
    return f"{results(plan)}/data/{dataset}.encoded-{share}-of-{plan.data_jobs(dataset)}.json"


def _train(plan: Plan, name: str) -> TrainSpec:
    staged, config = plan.stage(name), plan.config
    stage, pretrained, root = staged.stage, config.model.pretrained, config.storage.weights
    folder = f"{results(plan)}/stages/{name}"
    start = f"{results(plan)}/stages/{stage.start_from.stage}/checkpoint.json" if stage.start_from else None
    return TrainSpec(
        run=plan.run,
        seed=config.seed,
        stage=stage,
        model=model_config(plan.loaded, plan.lock) or {},
        pretrained=_pretrained_folder(plan),
        trust_remote_code=bool(pretrained and pretrained.trust_remote_code),
        steps=staged.steps,
        accumulation=staged.accumulation,
        data_parallel=staged.data_parallel,
        world_size=staged.world_size,
        exportable=staged.exportable,
        spec=staged.spec,
        start_checkpoint=start,
        tokenizer=f"{results(plan)}/tokenizer.json",
        data=f"{results(plan)}/data/{stage.dataset}.json",
        deepspeed=f"{folder}/ds_config.json",
        folder=folder,
        weights_root=f"{root}/{plan.run}/{name}" if root else f"{folder}/weights",
        out=f"{folder}/checkpoint.json",
        gpu_peak_tflops=plan.site.node.gpu_peak_tflops,
        trackers=config.trackers,
        scratch=config.storage.scratch,
    )


def _pretrained_folder(plan: Plan) -> str | None:
    pretrained = plan.config.model.pretrained
    if pretrained is None:
        return None
    if pretrained.path:
        return str(plan.loaded.resolve("model.pretrained.path", pretrained.path))
    return _locked(plan.lock, "model", "path")


def _convert(plan: Plan, name: str) -> ExportSpec:
    stage = plan.stage(name).stage
    return ExportSpec(
        run=plan.run,
        stage=name,
        checkpoint=f"{results(plan)}/stages/{name}/checkpoint.json",
        which=stage.export,
        dtype=stage.export_dtype,
        tokenizer=f"{results(plan)}/tokenizer.json",
        config_hash=content_hash(plan.config.model_dump(mode="json")),
        first_weights=plan.first_weights,
        chat=stage.kind == "sft",
        folder=f"{results(plan)}/export/{name}",
        out=f"{results(plan)}/export/{name}.json",
    )


def source_files(plan: Plan, name: str) -> tuple[str, ...]:
    """A dataset's files: the user's own, or those that fetch brought; () until fetch has run."""
    if plan.config.datasets[name].files:
        return tuple(str(path) for path in dataset_files(plan.loaded, name))
    source = plan.lock.sources.get(name) if plan.lock else None
    return tuple(source["files"]) if source else ()


def _locked(lock: Lock | None, name: str, key: str) -> str | None:
    return lock.sources[name][key] if lock and name in lock.sources else None


def repository_sources(plan: Plan, name: str) -> list[Path]:
    """Inputs of a dataset's tokenize rule: the user's own files and evaluation files, or the parts of a mixture."""
    if mixture := plan.config.datasets[name].mixture:
        return [Path(f"{results(plan)}/data/{part}.json") for part in mixture]
    own = dataset_files(plan.loaded, name) if plan.config.datasets[name].files else []
    return [*own, *evaluation_files(plan.loaded, name)]
