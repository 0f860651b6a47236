"""The plan: steps, batch arithmetic, warnings, rerun keys, deferred checks and requests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from longhaul.artifacts.artifact_schemas import Lock
from longhaul.artifacts.paths import JobId
from longhaul.config.load_config import load_config
from longhaul.config.model_size import model_size
from longhaul.errors import UserError
from longhaul.jobs.job_kind import job_request, job_rerun_key, job_spec
from longhaul.jobs.kinds.environment_job import EnvironmentSpec
from longhaul.jobs.kinds.train_job import TrainSpec
from longhaul.planning import Plan, StagePlan, build_plan
from longhaul.planning.gpu_memory import estimate_gpu_memory
from longhaul.planning.retraining_keys import result_spec
from longhaul.report.plan_json import plan_json
from tests.support.pipeline_run import REPOSITORY
from tests.support.small_configs import DEEPSEEK, LLAMA, SITE, plan_of

# The examples local-* need files beside them: tests/workflow/test_local_examples.py
EXAMPLES = sorted(
    set((REPOSITORY / "config/examples").glob("*")) - set((REPOSITORY / "config/examples").glob("local-*"))
)
BASE, CHAT_STAGE = JobId("train", ("base",)), JobId("train", ("chat",))


def base_stage_plan(folder: Path, **keys: Any) -> StagePlan:
    """Return the plan of the first stage with these keys changed."""
    return plan_of(folder, {f"stages.0.{key}": value for key, value in keys.items()}).stages[0]


def test_tokens_are_rounded_up_to_whole_steps(tmp_path: Path):
    stage = base_stage_plan(tmp_path, steps=..., tokens=8 * 64 * 3 + 1)
    assert (stage.steps, stage.tokens_per_step) == (4, 8 * 64)


def test_length_in_epochs_leaves_the_steps_to_the_job(tmp_path: Path):
    plan = plan_of(tmp_path, {"stages.0.steps": ..., "stages.0.epochs": 1.5})
    assert plan.stages[0].steps is None and plan.stages[0].spec["epochs"] == 1.5
    assert "steps" not in plan.stages[0].spec
    spec = job_spec(plan, BASE)
    assert isinstance(spec, TrainSpec)
    with pytest.raises(ValueError, match=r"the steps of 1.5 epochs are not computed yet"):
        print(spec.steps)
    row = plan_json(plan)["stages"][0]
    assert (row["epochs"], row["steps"], row["estimated_steps"]) == (1.5, None, None)
    assert (row["tokens"], row["flops"], row["gpu_hours_range"]) == (None, None, None)


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
    assert refused.value.hint == "set minutes to 3 or more, or recovery.stop_margin_s to at most 30"


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
}


@pytest.mark.parametrize(("key", "value"), WITH_RERUN.items(), ids=WITH_RERUN)
def test_keys_that_change_weights_trigger_a_rerun_of_their_stage_only(tmp_path: Path, key: str, value: Any):
    """Later stages are run again because of their input, the checkpoint."""
    before, after = rerun_keys(tmp_path), rerun_keys(tmp_path, {f"stages.0.{key}": value})
    assert before[0] != after[0] and before[1] == after[1]


@pytest.mark.parametrize("key", ["sequence_aux_loss_coef", "router_bias_update_rate"])
def test_balance_of_experts_triggers_a_rerun_of_its_stage_only(tmp_path: Path, key: str):
    model = {"model": {"deepseek_v3": DEEPSEEK}}
    before, after = rerun_keys(tmp_path, model), rerun_keys(tmp_path, {**model, f"stages.0.{key}": 0.001})
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
    assert job_request(plan_of(tmp_path, {"checks": {}, "stages.0.nodes": 2}), JobId("fabric")).nodes == 2
    assert (
        job_request(plan_of(tmp_path, {"checks": {}}, {"partitions.0.max_nodes": 1}), JobId("environment")).nodes == 1
    )


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


def test_plan_of_a_stage_holds_exactly_what_its_keys_give(tmp_path: Path):
    config = {"stages.0.nodes": 2, "stages.0.gpus_per_node": 2, "stages.0.export": "last"}
    plan = plan_of(tmp_path, config)
    base, chat = plan.stages
    sizes = model_size(plan.config.model.config_dict())
    assert base == StagePlan(
        stage=plan.config.stages[0],
        steps=10,
        tokens_per_step=8 * 64,
        world_size=4,
        data_parallel=4,
        accumulation=2,
        memory=estimate_gpu_memory(base.stage, sizes, 4),
        sizes=sizes,
        files_per_checkpoint=1 + 4 + 4 + 2 + 4,
        checkpoint_bytes=16 * sizes.total,
        asynchronous_saves=True,
        exported_checkpoints=("last",),
        spec=result_spec(plan.loaded, base.stage, 10),
        pipeline_bubble=0.0,
        serving=None,
        warnings=(),
    )
    assert (chat.exported_checkpoints, chat.files_per_checkpoint) == ((), 1 + 1 + 1 + 2 + 4)
    assert (base.name, plan.stage("chat"), plan.exported, plan.run) == ("base", chat, ("base",), "small")


def test_hub_model_has_no_sizes_before_fetch(tmp_path: Path):
    plan = plan_of(tmp_path, {"model": {"pretrained": {"hub": {"id": "org/model"}}}})
    assert plan.deferred_checks == (
        "model org/model: memory, positions and vocabulary are checked after fetch has read the model's size",
    )
    stage = plan.stages[0]
    assert (stage.memory, stage.sizes, stage.checkpoint_bytes) == (None, None, None)
    assert stage.warnings == () and plan.needs_fetch


# changes of the config, of the site, beginning of the message
REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "layout": ({"stages.0.parallel": {"tensor": 2}}, {}, "stages.base.parallel: tensor 2 x"),
    "schedule": ({"stages.0.schedule": {"warmup_steps": 11}}, {}, "stages.base.schedule: warmup_steps 11"),
    "schedule of a stage with tokens": (
        {"stages.0.steps": ..., "stages.0.tokens": 512 * 4, "stages.0.schedule": {"warmup_steps": 5}},
        {},
        "stages.base.schedule: warmup_steps 5 + decay_steps 0 exceed the stage's 4 steps",
    ),
    "shares of a schedule": (
        {
            "stages.0.steps": ...,
            "stages.0.epochs": 1,
            "stages.0.schedule": {"kind": "wsd", "warmup_steps": 0.5, "decay_steps": 0.6},
        },
        {},
        "stages.base.schedule: warmup_steps 0.5 + decay_steps 0.6 exceed the stage",
    ),
    "precision": (
        {"stages.0.precision": "bf16", "stages.0.zero": {"stage": 0}},
        {},
        "stages.base: precision bf16 with",
    ),
    "offload": ({"stages.0.zero": {"offload_param": "cpu"}}, {}, "stages.base.zero.offload_param cpu needs"),
    "scratch": (
        {"stages.0.zero": {"stage": 3, "offload_optimizer": "nvme"}},
        {},
        "stages.base.zero.offload_optimizer nvme needs storage.scratch",
    ),
    "site": ({"stages.1.nodes": 17}, {}, "stages.chat.nodes 17"),
    "jobs": ({"checks.nodes": 17}, {}, "checks.nodes 17"),
    "model": (
        {"stages.0.parallel": {"pipeline": 4}, "stages.0.gpus_per_node": 4},
        {},
        "stages.base.parallel.pipeline 4: the",
    ),
    "positions": ({"stages.0.sequence_length": 129}, {}, "stages.base.sequence_length 129 exceeds"),
    "vocabulary": ({"tokenizer.train.vocab_size": 401}, {}, "tokenizer.train.vocab_size 401 is larger"),
    "memory": (
        {"model.llama.num_hidden_layers": 10_000},
        {"partitions.0.node.gpu_memory_gib": 1},
        "stages.base: weights, gradients and optimizer states need",
    ),
    "checkpoint files": ({}, {"inode_limit": 19}, "stages.base: 4 checkpoints with 9 files each"),
    "batch": ({"stages.0.micro_batch_size": 3}, {}, "stages.base: global_batch_size 8 is not a multiple"),
    "save time": (
        {"stages.0.minutes": 1},
        {"checkpoint_write_gb_per_s": 1.0},
        "stages.base.minutes 1: a save of 0.0 GB",
    ),
    "reference": ({"stages.0.dataset": "x"}, {}, "stages.base.dataset: there is no dataset 'x'"),
    "order": ({"stages.1.from.stage": "x"}, {}, "stages.chat.from.stage: there is no stage 'x'"),
    "files": ({"tokenizer": {"path": "x"}}, {}, "tokenizer.path: "),
}


@pytest.mark.parametrize(("config", "site", "message"), REFUSED.values(), ids=REFUSED)
def test_plan_makes_every_check(tmp_path: Path, config: dict[str, Any], site: dict[str, Any], message: str):
    with pytest.raises(UserError) as refused:
        plan_of(tmp_path, config, site)
    assert refused.value.message.startswith(message)


def test_plan_checks_the_number_of_chunks_of_used_datasets_only(tmp_path: Path):
    (tmp_path / "big.txt").write_text("x" * 100_000)
    many_chunks = {"kind": "text", "files": ["big.txt"], "chunk_mb": 0.001}
    plan_of(tmp_path, {"datasets.unused": many_chunks}, {"inode_limit": 100})
    with pytest.raises(UserError, match=r"datasets.prose: 100 chunks of 0.001 MB need up to 900 files"):
        plan_of(tmp_path, {"datasets.prose": many_chunks}, {"inode_limit": 100})


VERSE = {"datasets.verse": {"kind": "text", "files": ["verse.txt"], "decontaminate": {"files": ["evals.txt"]}}}
BOTH = {"datasets.both": {"kind": "text", "mixture": {"prose": 1, "verse": 1}}}


def with_mixture(folder: Path, changes: dict[str, Any] | None = None, lock: Lock | None = None) -> Plan:
    for name in ("verse.txt", "evals.txt"):
        (folder / name).write_text("text")
    return plan_of(folder, {**VERSE, **BOTH, "stages.0.dataset": "both", **(changes or {})}, lock=lock)


def test_datasets_of_a_mixture_are_used(tmp_path: Path):
    assert with_mixture(tmp_path).used_datasets == {"both", "prose", "verse", "chats"}
    assert plan_of(tmp_path, {**VERSE, **BOTH}).used_datasets == {"prose", "chats"}


def test_rules_of_a_dataset_read_its_files_or_the_manifests_of_its_parts(tmp_path: Path):
    plan = with_mixture(tmp_path)
    assert plan.rule_inputs("both") == [plan.paths.manifest("prose"), plan.paths.manifest("verse")]
    assert plan.rule_inputs("verse") == [tmp_path / "verse.txt", tmp_path / "evals.txt"]
    assert plan.rule_inputs("prose") == []


def test_files_of_a_source_are_known_after_fetch(tmp_path: Path):
    before = with_mixture(tmp_path)
    assert before.source_files("verse") == (str(tmp_path / "verse.txt"),)
    assert before.source_files("prose") == () and before.fetched("prose", "path") is None
    after = with_mixture(tmp_path, lock=Lock({"prose": {"files": ["/a", "/b"], "path": "/hub"}}))
    assert after.source_files("prose") == ("/a", "/b") and after.source_files("chats") == ()
    assert after.fetched("prose", "path") == "/hub" and after.fetched("model", "path") is None


def test_weights_and_shards_are_in_the_runs_folder_or_below_the_storage_keys(tmp_path: Path):
    plan = plan_of(tmp_path)
    assert plan.weights_root("base") == plan.paths.stage("base").weights
    assert plan.shards_root("prose") == plan.paths.shards("prose")
    moved = plan_of(tmp_path, {"storage": {"weights": "/w", "data": "/d"}})
    assert moved.weights_root("base") == Path("/w/small/base")
    assert moved.shards_root("prose") == Path("/d/small/prose")


def test_number_of_encode_jobs_is_one_or_that_of_the_config(tmp_path: Path):
    plan = plan_of(tmp_path, {"data_jobs": {"prose": 3}})
    assert (plan.data_jobs("prose"), plan.data_jobs("chats")) == (3, 1)


FETCHED: dict[str, tuple[dict[str, Any], bool]] = {
    "own files": ({}, False),
    "standard library": ({"datasets.chats": {"kind": "chat", "python_stdlib": {}}}, True),
    "dataset of the Hub": ({"datasets.chats": {"kind": "chat", "hub": {"id": "org/chats"}}}, True),
    "tokenizer of the Hub": ({"tokenizer": {"hub": {"id": "org/tokens"}}}, True),
    "model of the Hub": ({"model": {"pretrained": {"hub": {"id": "org/model"}}}}, True),
}


@pytest.mark.parametrize(("changes", "expected"), FETCHED.values(), ids=FETCHED)
def test_fetch_is_needed_for_sources_that_are_not_the_users_files(
    tmp_path: Path, changes: dict[str, Any], expected: bool
):
    for name in ("prose.txt", "chats.jsonl"):
        (tmp_path / name).write_text("text")
    own = {
        "datasets.prose": {"kind": "text", "files": ["prose.txt"]},
        "datasets.chats": {"kind": "chat", "files": ["chats.jsonl"]},
    }
    assert plan_of(tmp_path, {**own, **changes}).needs_fetch is expected


def test_checks_use_the_nodes_and_gpus_of_the_config_or_those_of_the_largest_stage(tmp_path: Path):
    shape = {"checks": {}, "stages.0.gpus_per_node": 2, "stages.1.gpus_per_node": 4, "stages.1.nodes": 2}
    plan = plan_of(tmp_path, shape)
    assert (plan.check_nodes, plan.check_gpus_per_node) == (2, 4)
    assert plan_of(tmp_path, {**shape, "stages.1.nodes": 1}).check_nodes == 1  # no more than the largest stage
    debug = [
        {**SITE["partitions"][0], "jobs": ["gpu", "cpu"]},
        {**SITE["partitions"][0], "jobs": ["debug"], "max_nodes": 1},
    ]
    assert plan_of(tmp_path, shape, {"partitions": debug}).check_nodes == 1
    plan = plan_of(tmp_path, {**shape, "checks": {"nodes": 3, "gpus_per_node": 1}})
    assert (plan.check_nodes, plan.check_gpus_per_node) == (3, 1)
