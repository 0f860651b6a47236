"""Declares the job that counts what sft stages keep of a dataset's conversations, before anything is trained."""

from __future__ import annotations

from collections.abc import Iterable

from longhaul.artifacts.atomic_files import content_hash
from longhaul.artifacts.paths import JobId
from longhaul.config.field_types import FrozenModel
from longhaul.config.stage_config import Truncate
from longhaul.jobs.job_kind import JobKind
from longhaul.jobs.job_spec import JobSpec
from longhaul.planning import Plan
from longhaul.planning.slurm_request import CpuJobNeeds, cpu_request

COUNT_CHATS = CpuJobNeeds(2, 4000)
"""The job hashes files in threads, then counts in one, with 25 bytes for each conversation."""


class ChatStage(FrozenModel):
    """Settings of an sft stage that decide how much of a long conversation it keeps."""

    name: str
    sequence_length: int
    truncate: Truncate


class CountChatsSpec(JobSpec):
    """Counts what sft stages keep of the conversations of one dataset."""

    no_rerun_fields = JobSpec.no_rerun_fields | {"stages", "data"}

    dataset: str
    stages: tuple[ChatStage, ...]
    data: str  # the dataset's manifest
    out: str  # results/<run>/data/<dataset>.kept.json

    def rerun_key(self) -> str:
        """Return a hash without the names of stages: they are only in messages."""
        settings = sorted({(stage.sequence_length, stage.truncate) for stage in self.stages})
        return content_hash([super().rerun_key(), settings])

    def input_texts(self) -> Iterable[str | None]:
        return [self.data]


def _jobs(plan: Plan) -> list[JobId]:
    return [JobId("count_chats", (name,)) for name in sorted(plan.used_datasets) if _chat_stages(plan, name)]


def _chat_stages(plan: Plan, name: str) -> tuple[ChatStage, ...]:
    """Return the sft stages that read a dataset, also as a part of a mixture; none for a mixture, whose parts are counted."""
    datasets = plan.config.datasets
    if datasets[name].mixture:
        return ()
    reading = {name, *(other for other, dataset in datasets.items() if name in dataset.mixture)}
    return tuple(
        ChatStage(name=stage.name, sequence_length=stage.sequence_length, truncate=stage.truncate)
        for stage in (planned.stage for planned in plan.stages)
        if stage.kind == "sft" and stage.dataset in reading
    )


def _build(plan: Plan, job: JobId) -> CountChatsSpec:
    (name,) = job.names
    return CountChatsSpec(
        run=plan.run,
        dataset=name,
        stages=_chat_stages(plan, name),
        data=str(plan.paths.manifest(name)),
        out=str(plan.paths.conversation_counts(name)),
    )


KIND = JobKind(
    name="count_chats",
    order=7,
    help="count what sft stages keep of a dataset's conversations",
    spec=CountChatsSpec,
    entry_point="longhaul.data.sampling.count_chats:run",
    jobs=_jobs,
    build_spec=_build,
    request=lambda plan, job: cpu_request(plan.site, plan.config.data_minutes, COUNT_CHATS),
    wildcards=("dataset",),
)
