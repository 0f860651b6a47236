"""Declares the jobs of the scale test: a short training of the first stage on one number of nodes each, from the fewest."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from longhaul.artifacts.atomic_files import content_hash
from longhaul.artifacts.paths import JobId
from longhaul.config.scale_test_config import ScaleTest
from longhaul.jobs.job_kind import JobKind, PlannedStep
from longhaul.jobs.kinds.train_job import TrainSpec, node_check, train_spec
from longhaul.jobs.templates import render_deepspeed_config
from longhaul.planning import Plan, StagePlan
from longhaul.planning.scale_test_sizes import WARM_UP_STEPS, scale_ladder
from longhaul.planning.slurm_request import SlurmRequest, gpu_request


class ScaleTestSpec(TrainSpec):
    """Trains a stage for a few steps, and compares the speed with limits and with that on the fewest nodes.

    weights_root: a folder that is deleted after the steps
    """

    limits: ScaleTest
    warm_up_steps: int  # not measured
    smallest: str | None  # report of the test on the fewest nodes; None for that test itself

    def input_texts(self) -> Iterable[str | None]:
        return [*super().input_texts(), self.smallest]

    def weights_folders_root(self) -> str | None:
        return None


def scale_test_before(plan: Plan, nodes: int) -> list[Path]:
    """Return the report on the next smaller number of nodes; none for the smallest."""
    earlier = scale_ladder(plan).before(nodes)
    return [plan.paths.scale_test(earlier)] if earlier else []


def _rung(plan: Plan, job: JobId) -> StagePlan:
    return scale_ladder(plan).rungs[_nodes(job)]


def _nodes(job: JobId) -> int:
    return int(job.names[0])


def _build(plan: Plan, job: JobId) -> ScaleTestSpec:
    ladder, nodes, folder = scale_ladder(plan), _nodes(job), plan.paths.job(job)
    rung, smallest = ladder.rungs[nodes], min(ladder.rungs)
    changes = {
        "stage": rung.stage,
        "planned_steps": rung.steps,
        "data_parallel": rung.data_parallel,
        "world_size": rung.world_size,
        "asynchronous_saves": False,
        "exported_checkpoints": (),
        "deepspeed": str(folder.deepspeed_config),
        "folder": str(folder.path),
        "weights_root": str(folder.discarded_weights),
        "out": str(plan.paths.scale_test(nodes)),
        "trackers": {"tensorboard": False},
        "limits": plan.config.scale_test,
        "warm_up_steps": WARM_UP_STEPS,
        "smallest": None if nodes == smallest else str(plan.paths.scale_test(smallest)),
    }
    return ScaleTestSpec.model_validate({**dict(train_spec(plan, ladder.stage)), **changes})


def _request(plan: Plan, job: JobId) -> SlurmRequest:
    stage = _rung(plan, job).stage
    return gpu_request(
        plan.site,
        place="gpu",
        nodes=stage.nodes,
        tasks=stage.gpus_per_node,
        gpus=stage.gpus_per_node,
        minutes=plan.config.scale_test.minutes,
    )


def _rerun_key(plan: Plan, job: JobId) -> str:
    """Return a hash of what the speed on this number of nodes depends on, and of its limits."""
    stage = plan.stage(scale_ladder(plan).stage)
    layout = stage.stage.model_dump(mode="json", include=set(_LAYOUT_KEYS))
    return content_hash(
        [stage.spec, layout, plan.config.scale_test.model_dump(mode="json", exclude={"nodes", "minutes"})]
    )


_LAYOUT_KEYS = ("gpus_per_node", "micro_batch_size", "activation_checkpointing", "parallel", "zero", "compile")


def _node_check(plan: Plan, job: JobId, request: SlurmRequest) -> Sequence[PlannedStep]:
    return [node_check(plan, _rung(plan, job).stage, plan.paths.job(job), request)]


KIND = JobKind(
    name="scale_test",
    order=7,
    help="train the first stage for a few steps on fewer nodes, and measure its speed",
    spec=ScaleTestSpec,
    entry_point="longhaul.checks.scale_test:run",
    jobs=lambda plan: [JobId("scale_test", (str(nodes),)) for nodes in scale_ladder(plan).rungs],
    build_spec=_build,
    request=_request,
    wildcards=("nodes",),
    rerun_key=_rerun_key,
    first_steps=_node_check,
    more_files=lambda plan, job: {
        plan.paths.job(job).deepspeed_config.name: render_deepspeed_config(_rung(plan, job), plan.site)
    },
    binds_ranks=True,
)
