"""The plan: steps, batch arithmetic, warnings, rerun keys, deferred checks and requests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from longhaul.artifacts.paths import JobId
from longhaul.artifacts.schemas import Lock
from longhaul.config.load_config import load_config
from longhaul.config.model_size import model_size
from longhaul.errors import UserError
from longhaul.jobs.kind import job_request, job_rerun_key, job_spec
from longhaul.jobs.kinds.environment_job import EnvironmentSpec
from longhaul.planning import StagePlan, build_plan
from longhaul.report.plan_json import plan_json
from tests.support.chain import REPOSITORY
from tests.support.small_configs import LLAMA, plan_of

EXAMPLES = sorted((REPOSITORY / "config" / "examples").glob("*.yaml"))
BASE, CHAT_STAGE = JobId("train", ("base",)), JobId("train", ("chat",))


def base_stage_plan(folder: Path, **keys: Any) -> StagePlan:
    """Return the plan of the first stage with these keys changed."""
    return plan_of(folder, {f"stages.0.{key}": value for key, value in keys.items()}).stages[0]


def test_tokens_are_rounded_up_to_whole_steps(tmp_path: Path):
    stage = base_stage_plan(tmp_path, steps=..., tokens=8 * 64 * 3 + 1)
    assert (stage.steps, stage.tokens) == (4, 8 * 64 * 4)


@pytest.mark.parametrize(
    ("nodes", "gpus", "micro", "accumulation"), [(1, 1, 1, 64), (1, 8, 2, 4), (2, 8, 4, 1), (4, 4, 1, 4)]
)
def test_global_batch_is_micro_batch_times_ranks_times_accumulation(
    tmp_path: Path, nodes: int, gpus: int, micro: int, accumulation: int
):
    stage = base_stage_plan(tmp_path, nodes=nodes, gpus_per_node=gpus, micro_batch_size=micro, global_batch_size=64)
    assert (stage.world_size, stage.data_parallel, stage.accumulation) == (nodes * gpus, nodes * gpus, accumulation)


@pytest.mark.parametrize(
    ("axes", "data_parallel", "accumulation"),
    [({"tensor": 2}, 4, 16), ({"pipeline": 2, "tensor": 2}, 2, 32), ({"sequence": 2}, 4, 16)],
)
def test_ranks_that_read_the_same_samples_count_once(
    tmp_path: Path, axes: dict[str, int], data_parallel: int, accumulation: int
):
    stage = base_stage_plan(tmp_path, gpus_per_node=8, global_batch_size=64, parallel=axes)
    assert (stage.data_parallel, stage.accumulation) == (data_parallel, accumulation)


def test_idle_pipeline_gives_a_warning_with_the_needed_micro_batches(tmp_path: Path):
    shape = {"gpus_per_node": 2, "parallel": {"pipeline": 2}}
    few = base_stage_plan(tmp_path, **shape, global_batch_size=2)
    assert few.pipeline_bubble == pytest.approx(1 / 3) and "4 micro batches" in few.warnings[0]
    enough = base_stage_plan(tmp_path, **shape, global_batch_size=4)
    assert enough.pipeline_bubble == pytest.approx(0.2) and enough.warnings == ()


def test_slow_save_gives_a_warning_or_an_error(tmp_path: Path):
    """A save of 90 s: a warning with the reserve of 60 s, an error in an allocation of 2 minutes."""
    save_bytes = base_stage_plan(tmp_path).checkpoint_bytes
    assert save_bytes and base_stage_plan(tmp_path).warnings == ()
    site = {"checkpoint_write_gb_per_s": save_bytes / 1e9 / 90}
    warning = plan_of(tmp_path, site=site).stages[0].warnings[0]
    assert "takes about 90 s, longer than recovery.stop_margin_s 60" in warning
    with pytest.raises(UserError, match=r"stages.base.minutes 2: a save of .* takes about 90 s") as refused:
        plan_of(tmp_path, {"stages.0.minutes": 2}, site)
    assert refused.value.hint == "increase minutes, or reduce recovery.stop_margin_s"


def rerun_keys(folder: Path, config: dict[str, Any] | None = None) -> tuple[str, str]:
    plan = plan_of(folder, config)
    return job_rerun_key(plan, BASE), job_rerun_key(plan, CHAT_STAGE)


WITHOUT_RERUN: dict[str, Any] = {
    "nodes": 2,
    "gpus_per_node": 2,
    "micro_batch_size": 2,
    "zero": {"stage": 3, "offload_param": "cpu"},
    "activation_checkpointing": "full",
    "checkpoints": {"every_steps": 1, "keep_last": 9},
    "validation": {"every_steps": 3},
    "export": "last",
    "export_dtype": "fp32",
    "minutes": 7,
    "bad_steps": {"policy": "skip"},
    "skip_batches": [3],
}


@pytest.mark.parametrize(("key", "value"), WITHOUT_RERUN.items(), ids=WITHOUT_RERUN)
def test_place_and_speed_of_training_do_not_trigger_a_rerun(tmp_path: Path, key: str, value: Any):
    assert rerun_keys(tmp_path, {f"stages.0.{key}": value}) == rerun_keys(tmp_path)


def test_parallel_layout_does_not_trigger_a_rerun(tmp_path: Path):
    ranks = {"stages.0.gpus_per_node": 4}
    split = {**ranks, "stages.0.parallel": {"tensor": 2, "pipeline": 2}}
    assert rerun_keys(tmp_path, split) == rerun_keys(tmp_path, ranks)


WITH_RERUN: dict[str, Any] = {
    "steps": 11,
    "global_batch_size": 16,
    "sequence_length": 32,
    "optimizer": {"lr": 1e-5},
    "schedule": {"warmup_steps": 1},
    "precision": "bf16",
    "communication": {"data_type": "bf16"},
    "sequence_aux_loss_coef": 0.001,
}


@pytest.mark.parametrize(("key", "value"), WITH_RERUN.items(), ids=WITH_RERUN)
def test_keys_that_change_weights_trigger_a_rerun_of_their_stage_only(tmp_path: Path, key: str, value: Any):
    """Later stages are run again because of their input, the checkpoint."""
    before, after = rerun_keys(tmp_path), rerun_keys(tmp_path, {f"stages.0.{key}": value})
    assert before[0] != after[0] and before[1] == after[1]


@pytest.mark.parametrize("change", [{"seed": 1}, {"model.llama.num_hidden_layers": 3}], ids=["seed", "model"])
def test_seed_and_model_trigger_a_rerun_of_all_stages(tmp_path: Path, change: dict[str, Any]):
    assert all(a != b for a, b in zip(rerun_keys(tmp_path), rerun_keys(tmp_path, change), strict=True))


def test_checks_of_a_hub_model_are_deferred_until_fetch_has_run(tmp_path: Path):
    config = {"model": {"pretrained": {"hub": {"id": "org/model"}}}}
    before_fetch = plan_of(tmp_path, config)
    assert "org/model" in before_fetch.deferred_checks[0] and before_fetch.stages[0].memory is None
    llama = {"model_type": "llama", **plan_of(tmp_path).config.model.config_dict()}
    after_fetch = plan_of(tmp_path, config, lock=Lock({"model": {"path": "/m"}}, llama))
    assert after_fetch.deferred_checks == () and after_fetch.stages[0].memory is not None
    assert job_rerun_key(before_fetch, BASE) == job_rerun_key(after_fetch, BASE), "fetch must not trigger a rerun"


def test_encode_jobs_are_listed_before_the_job_that_writes_the_manifest(tmp_path: Path):
    jobs = plan_json(plan_of(tmp_path, {"data_jobs": {"prose": 2}}))["jobs"]
    requests = {"-".join([job["kind"], *job["names"]]): job["request"] for job in jobs}
    data_jobs = [job for job in requests if job.startswith(("index_sources", "encode", "tokenize-"))]
    assert data_jobs == [
        "index_sources-prose",
        "encode-prose-1-of-2",
        "encode-prose-2-of-2",
        "tokenize-chats",
        "tokenize-prose",
    ]
    assert all(requests[job] == requests["tokenize-chats"] for job in data_jobs)


def test_checks_use_two_nodes_or_the_only_one(tmp_path: Path):
    assert job_request(plan_of(tmp_path, {"checks": {}}), JobId("fabric")).nodes == 2
    assert job_request(plan_of(tmp_path, {"checks": {}}, {"max_nodes": 1}), JobId("environment")).nodes == 1


def test_half_of_a_nodes_gpus_requests_half_of_the_node(tmp_path: Path):
    request = job_request(plan_of(tmp_path, {"stages.0.gpus_per_node": 4}), BASE)
    assert (request.gpus_per_node, request.tasks_per_node, request.cpus_per_task) == (4, 4, 8)
    assert request.memory_mb == 250_000


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_can_be_planned(path: Path):
    plan = build_plan(load_config(path))
    assert plan.stages and job_request(plan, JobId("train", (plan.stages[0].name,))).nodes >= 1


def test_each_kind_of_recomputation_needs_less_gpu_memory_than_the_one_before(tmp_path: Path):
    """none > selective > full > offload. With offload, the layers' inputs are in CPU memory."""
    kinds = ("none", "selective", "full", "offload")
    more = {"stages.0.sequence_length": 128, "stages.0.micro_batch_size": 8, "model.llama.num_hidden_layers": 8}
    plans = [plan_of(tmp_path, {"stages.0.activation_checkpointing": kind, **more}).stages[0] for kind in kinds]
    memory = [plan.memory for plan in plans if plan.memory]
    activations = [one.activations for one in memory]
    assert len(activations) == 4 and activations == sorted(activations, reverse=True)
    assert len(set(activations)) == 4
    inputs_bytes = 4 * 8 * LLAMA["hidden_size"] * 128 * 8
    assert [one.host for one in memory] == [0, 0, 0, inputs_bytes]


def test_environment_check_gets_disk_and_locked_memory_of_an_optimizer_on_disk(tmp_path: Path):
    """Disk counts for all ranks of a node, locked memory for one rank."""
    keys = {"storage": {"scratch": "/local"}, "stages.1.zero": {"stage": 3, "offload_optimizer": "nvme"}}
    plan = plan_of(tmp_path, {**keys, "stages.1.gpus_per_node": 2})
    total = model_size(plan.config.model.config_dict()).total
    spec = job_spec(plan, JobId("environment"))
    assert isinstance(spec, EnvironmentSpec) and spec.prebuild_ops == ("cpu_adam", "pin_memory", "async_io")
    assert (spec.swap_bytes, spec.locked_bytes) == (16 * total, 16 * (total // 2))
    base = plan.stage("base").memory
    assert base and (base.disk, base.locked) == (0, 0)


def test_environment_check_gets_disk_and_locked_memory_of_weights_on_disk(tmp_path: Path):
    zero = {"stage": 3, "offload_optimizer": "cpu", "offload_param": "nvme"}
    plan = plan_of(tmp_path, {"storage": {"scratch": "/local"}, "stages.1.zero": zero, "stages.1.gpus_per_node": 2})
    sizes = model_size(plan.config.model.config_dict())
    spec = job_spec(plan, JobId("environment"))
    assert isinstance(spec, EnvironmentSpec) and spec.prebuild_ops == ("cpu_adam", "pin_memory", "async_io")
    locked = 4 * (8 * -(-sizes.largest_tensor // 2) + sizes.total // 2)
    assert (spec.swap_bytes, spec.locked_bytes) == (4 * sizes.total, locked)
