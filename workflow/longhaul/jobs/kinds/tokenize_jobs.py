"""Declares the jobs that tokenize a dataset: one job, or several that share its chunks (config key data_jobs)."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from longhaul.artifacts.paths import JobId
from longhaul.config.dataset_config import Dataset
from longhaul.jobs.job_kind import OF, JobKind
from longhaul.jobs.job_spec import JobSpec
from longhaul.planning import Plan, evaluation_files
from longhaul.planning.slurm_request import CpuJobNeeds, SlurmRequest, cpu_request

_JOIN_MANIFESTS = CpuJobNeeds(1, 2000)


class TokenizeSpec(JobSpec):
    """Turns one dataset into token shards."""

    no_rerun_fields = JobSpec.no_rerun_fields | {"workers", "source_index", "files"}

    name: str
    dataset: Dataset
    files: tuple[str, ...]  # the dataset's files, in order
    evaluation: tuple[str, ...]  # evaluation files whose text must not be in the data, in order
    parts: dict[str, str]  # of a mixture: dataset -> its manifest
    tokenizer: str  # results/<run>/tokenizer.json
    workers: int
    source_index: str | None  # the source index, where several jobs share the dataset's chunks
    folder: str  # results/<run>/data/<dataset>
    out: str  # the dataset's manifest; the index_sources job writes the source index there

    def input_texts(self) -> Iterable[str | None]:
        return [self.tokenizer, self.source_index, *self.parts.values()]

    def input_data(self) -> Iterable[str]:
        return (*self.files, *self.evaluation)

    def external_paths(self) -> Iterable[str | None]:
        return self.input_data()


class EncodeSpec(TokenizeSpec):
    """Encodes one data partition of a dataset."""

    partition: int  # 1 … partitions
    partitions: int


def shared_artifacts(plan: Plan, dataset: str) -> list[Path]:
    """Return what the jobs write that share a dataset's chunks; nothing where one job encodes them all."""
    jobs = plan.data_jobs(dataset)
    if jobs == 1:
        return []
    partitions = [plan.paths.encoded_partition(dataset, number, jobs) for number in range(1, jobs + 1)]
    return [plan.paths.source_index(dataset), *partitions]


def _tokenize(plan: Plan, job: JobId) -> TokenizeSpec:
    return _of_dataset(plan, job.names[0])


def _of_dataset(plan: Plan, name: str) -> TokenizeSpec:
    return TokenizeSpec(
        run=plan.run,
        name=name,
        dataset=plan.config.datasets[name],
        files=plan.source_files(name),
        evaluation=tuple(map(str, evaluation_files(plan.loaded, name))),
        parts={part: str(plan.paths.manifest(part)) for part in plan.config.datasets[name].mixture},
        tokenizer=str(plan.paths.tokenizer),
        workers=_request(plan, JobId("tokenize", (name,))).cpus_per_task,
        source_index=str(plan.paths.source_index(name)) if plan.data_jobs(name) > 1 else None,
        folder=str(plan.shards_root(name)),
        out=str(plan.paths.manifest(name)),
    )


def _index_sources(plan: Plan, job: JobId) -> TokenizeSpec:
    (name,) = job.names
    changes = {"source_index": None, "out": str(plan.paths.source_index(name))}
    return _of_dataset(plan, name).model_copy(update=changes)


def _encode(plan: Plan, job: JobId) -> EncodeSpec:
    name, partition, _, partitions = job.names
    out = plan.paths.encoded_partition(name, int(partition), int(partitions))
    changes = {"out": str(out), "partition": int(partition), "partitions": int(partitions)}
    return EncodeSpec.model_validate({**dict(_of_dataset(plan, name)), **changes})


def _encode_jobs(plan: Plan) -> list[JobId]:
    return [
        JobId("encode", (name, str(number), OF, str(plan.data_jobs(name))))
        for name in _shared_datasets(plan)
        for number in range(1, plan.data_jobs(name) + 1)
    ]


def _shared_datasets(plan: Plan) -> list[str]:
    return [name for name in sorted(plan.used_datasets) if plan.data_jobs(name) > 1]


def _request(plan: Plan, job: JobId) -> SlurmRequest:
    needs = _JOIN_MANIFESTS if plan.config.datasets[job.names[0]].mixture else None
    return cpu_request(plan.site, plan.config.data_minutes, needs)


KINDS = [
    JobKind(
        name="index_sources",
        order=4,
        help="hash a dataset's files and choose its encoder, for jobs that share its chunks",
        spec=TokenizeSpec,
        entry_point="longhaul.data.shards.tokenize_dataset:index_sources",
        jobs=lambda plan: [JobId("index_sources", (name,)) for name in _shared_datasets(plan)],
        build_spec=_index_sources,
        request=_request,
        wildcards=("dataset",),
    ),
    JobKind(
        name="encode",
        order=5,
        help="encode one data partition of a dataset",
        spec=EncodeSpec,
        entry_point="longhaul.data.shards.tokenize_dataset:encode",
        jobs=_encode_jobs,
        build_spec=_encode,
        request=_request,
        wildcards=("dataset", "partition", OF, "partitions"),
    ),
    JobKind(
        name="tokenize",
        order=6,
        help="turn a dataset into token shards",
        spec=TokenizeSpec,
        entry_point="longhaul.data.shards.tokenize_dataset:run",
        jobs=lambda plan: [JobId("tokenize", (name,)) for name in sorted(plan.used_datasets)],
        build_spec=_tokenize,
        request=_request,
        wildcards=("dataset",),
    ),
]
