"""The plan: arithmetic, order, what a stage's weights depend on, sizes, requests."""

from __future__ import annotations

import itertools
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longhaul.artifacts.schemas import Lock
from longhaul.config.load import load_config
from longhaul.config.model_size import geometry
from longhaul.config.run_config import Model
from longhaul.errors import UserError
from longhaul.jobs.builders import payload
from longhaul.jobs.launch_files import REPOSITORY
from longhaul.jobs.specs import EnvironmentSpec
from longhaul.planning import make_plan
from longhaul.report.plan_table import plan_json
from longhaul.scheduling.rule_helpers import spec_key
from tests.support.small_configs import CHAT, LLAMA, STAGE, plan_of

EXAMPLES = sorted((REPOSITORY / "config" / "examples").glob("*.yaml"))


def test_tokens_are_rounded_up_to_whole_steps(tmp_path: Path):
    stage = plan_of(tmp_path, {"stages.0.steps": ..., "stages.0.tokens": 8 * 64 * 3 + 1}).stages[0]
    assert (stage.steps, stage.tokens) == (4, 8 * 64 * 4)


@pytest.mark.parametrize(
    ("nodes", "gpus", "micro", "accumulation"), [(1, 1, 1, 64), (1, 8, 2, 4), (2, 8, 4, 1), (4, 4, 1, 4)]
)
def test_batch_is_micro_times_ranks_times_accumulation(
    tmp_path: Path, nodes: int, gpus: int, micro: int, accumulation: int
):
    shape = {"nodes": nodes, "gpus_per_node": gpus, "micro_batch_size": micro, "global_batch_size": 64}
    stage = plan_of(tmp_path, {f"stages.0.{key}": value for key, value in shape.items()}).stages[0]
    assert (stage.world_size, stage.data_parallel, stage.accumulation) == (nodes * gpus, nodes * gpus, accumulation)


def family(names: list[str]) -> list[dict[str, Any]]:
    """A line of stages, each from the one before."""
    first = {**STAGE, "name": names[0]}
    return [first, *({**STAGE, "name": b, "from": {"stage": a}} for a, b in itertools.pairwise(names))]


@given(st.permutations(range(4)))
def test_stages_follow_what_they_start_from_in_whatever_order_they_are_written(order: list[int]):
    with tempfile.TemporaryDirectory() as folder:
        line = family(["a", "b", "c", "d"])
        plan = plan_of(Path(folder), {"stages": [line[index] for index in order]})
    assert [stage.name for stage in plan.stages] == ["a", "b", "c", "d"]


@pytest.mark.parametrize(
    ("axes", "ranks", "data", "accumulation"),
    [
        ({"tensor": 2}, 8, 4, 16),
        ({"pipeline": 2, "tensor": 2}, 8, 2, 32),
        ({"sequence": 2}, 8, 4, 16),
    ],
)
def test_ranks_that_share_their_samples_count_once(
    tmp_path: Path, axes: dict[str, int], ranks: int, data: int, accumulation: int
):
    shape = {"gpus_per_node": ranks, "global_batch_size": 64, "parallel": axes}
    stage = plan_of(tmp_path, {f"stages.0.{key}": value for key, value in shape.items()}).stages[0]
    assert (stage.data_parallel, stage.accumulation) == (data, accumulation)


def test_the_layout_is_no_cause(tmp_path: Path):
    ranks = {"stages.0.gpus_per_node": 4}
    assert keys(tmp_path, {**ranks, "stages.0.parallel": {"tensor": 2, "pipeline": 2}}) == keys(tmp_path, ranks)


def test_a_pipeline_that_idles_is_warned_of_with_the_batch_that_mends_it(tmp_path: Path):
    shape = {"gpus_per_node": 2, "parallel": {"pipeline": 2}}
    few = plan_of(tmp_path, {f"stages.0.{k}": v for k, v in {**shape, "global_batch_size": 2}.items()}).stages[0]
    assert few.bubble == pytest.approx(1 / 3) and "4 micro batches" in few.warnings[0]
    enough = plan_of(tmp_path, {f"stages.0.{k}": v for k, v in {**shape, "global_batch_size": 4}.items()}).stages[0]
    assert enough.bubble == pytest.approx(0.2) and enough.warnings == ()


def test_a_save_longer_than_the_lead_is_warned_of_and_one_longer_than_the_allocation_refused(tmp_path: Path):
    save_bytes = plan_of(tmp_path).stages[0].checkpoint_bytes
    assert save_bytes and plan_of(tmp_path).stages[0].warnings == ()
    site = {"checkpoint_write_gb_per_s": save_bytes / 1e9 / 90}
    warning = plan_of(tmp_path, site=site).stages[0].warnings[0]
    assert "takes about 90 s, longer than recovery.stop_margin_s 60" in warning
    with pytest.raises(UserError, match=r"stages.base.minutes 2: a save of .* takes about 90 s"):
        plan_of(tmp_path, {"stages.0.minutes": 2}, site)


def keys(folder: Path, config: dict[str, Any] | None = None, site: dict[str, Any] | None = None) -> tuple[str, str]:
    plan = plan_of(folder, config, site)
    return spec_key(plan, "train-base"), spec_key(plan, "train-chat")


LAYOUT_ONLY: dict[str, Any] = {
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


@pytest.mark.parametrize(("key", "value"), LAYOUT_ONLY.items(), ids=LAYOUT_ONLY)
def test_where_and_how_fast_is_no_cause(tmp_path: Path, key: str, value: Any):
    assert keys(tmp_path, {f"stages.0.{key}": value}) == keys(tmp_path)


RESULT: dict[str, Any] = {
    "steps": 11,
    "global_batch_size": 16,
    "sequence_length": 32,
    "optimizer": {"lr": 1e-5},
    "schedule": {"warmup_steps": 1},
    "precision": "bf16",
    "communication": {"data_type": "bf16"},
    "sequence_aux_loss_coef": 0.001,
}


@pytest.mark.parametrize(("key", "value"), RESULT.items(), ids=RESULT)
def test_what_changes_weights_is_a_cause_of_that_stage_alone(tmp_path: Path, key: str, value: Any):
    """What follows is run by its input, the checkpoint."""
    before, after = keys(tmp_path), keys(tmp_path, {f"stages.0.{key}": value})
    assert before[0] != after[0] and before[1] == after[1]


def test_seed_and_model_are_causes_of_all_stages(tmp_path: Path):
    before = keys(tmp_path)
    for change in ({"seed": 1}, {"model.llama.num_hidden_layers": 3}):
        assert all(a != b for a, b in zip(before, keys(tmp_path, change), strict=True))


def test_a_hub_models_size_waits_for_fetch_and_its_lock_changes_no_key(tmp_path: Path):
    config = {"model": {"pretrained": {"hub": {"id": "org/model"}}}}
    waiting = plan_of(tmp_path, config)
    assert "org/model" in waiting.waiting[0] and waiting.stages[0].memory is None
    llama = {"model_type": "llama", **plan_of(tmp_path).config.model.config_dict()}
    lock = Lock({"model": {"path": "/m"}}, llama)
    known = plan_of(tmp_path, config, lock=lock)
    assert known.waiting == () and known.stages[0].memory is not None
    assert spec_key(waiting, "train-base") == spec_key(known, "train-base")


def test_jobs_that_share_a_dataset_stand_before_the_one_that_writes_its_manifest(tmp_path: Path):
    requests = plan_json(plan_of(tmp_path, {"data_jobs": {"prose": 2}}))["requests"]
    of_data = {job: asked for job, asked in requests.items() if job.startswith(("survey", "encode", "tokenize-"))}
    assert list(of_data) == ["tokenize-chats", "survey-prose", "encode-prose-1", "encode-prose-2", "tokenize-prose"]
    assert all(asked == of_data["tokenize-chats"] for asked in of_data.values())


def test_checks_take_two_nodes_or_all_of_a_smaller_site(tmp_path: Path):
    assert plan_of(tmp_path, {"checks": {}}).request("fabric").nodes == 2
    assert plan_of(tmp_path, {"checks": {}}, {"max_nodes": 1}).request("environment").nodes == 1


def test_half_of_a_nodes_gpus_asks_for_half_of_the_node(tmp_path: Path):
    request = plan_of(tmp_path, {"stages.0.gpus_per_node": 4}).request("train-base")
    assert (request.gpus_per_node, request.tasks_per_node, request.cpus_per_task) == (4, 4, 8)
    assert request.memory_mb == 250_000


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_can_be_planned(path: Path):
    plan = make_plan(load_config(path))
    assert plan.stages and plan.request(f"train-{plan.stages[0].name}").nodes >= 1


def test_deepseek_v3_has_the_published_size():
    """671 B parameters, 37 B active: arXiv:2412.19437, section 4.2."""
    plan = make_plan(load_config(REPOSITORY / "config" / "examples" / "deepseek-v3-671b.yaml"))
    sizes = geometry(plan.config.model.config_dict())
    assert sizes.total == pytest.approx(671e9, rel=1e-3)
    assert sizes.active == pytest.approx(37e9, rel=2e-2)


SHARED = {
    "vocab_size": 400,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LATENT = {
    **SHARED,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {**SHARED, "mlp_bias": True, "attention_bias": True},
    "qwen2": {**SHARED, "tie_word_embeddings": True},
    "qwen3": {**SHARED, "head_dim": 16},
    "qwen3_moe": {
        **SHARED,
        "head_dim": 24,
        "moe_intermediate_size": 32,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "mlp_only_layers": [0],
    },
    "deepseek_v2": {**LATENT, "q_lora_rank": None},
    "deepseek_v3": {**LATENT, "q_lora_rank": 24, "n_group": 2, "topk_group": 1},
}


@pytest.mark.parametrize("architecture", MODELS)
def test_parameters_are_counted_as_transformers_builds_them(tmp_path: Path, architecture: str):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    plan = plan_of(
        tmp_path, {"model": {architecture: MODELS[architecture]}, "stages": [STAGE, {**CHAT, "sequence_length": 64}]}
    )
    config = plan.config.model.config_dict()
    settings = {key: value for key, value in config.items() if key != "model_type"}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **settings))
    sizes = [parameter.numel() for parameter in model.parameters()]
    assert (geometry(config).total, geometry(config).tensor_max) == (sum(sizes), max(sizes))


@pytest.mark.parametrize("architecture", MODELS)
def test_keys_and_defaults_are_transformers_own(architecture: str):
    """A config copied from a model card must work, and must mean the same here."""
    from transformers import AutoConfig

    sizes = {key: value for key, value in MODELS[architecture].items() if key not in ("mlp_bias", "attention_bias")}
    ours = Model.model_validate_json(json.dumps({architecture: sizes})).config_dict()
    theirs = AutoConfig.for_model(architecture, **sizes).to_dict()
    # Qwen3-MoE's attention reads head_dim, which its config class does not list; expert counts have two names.
    theirs.setdefault("head_dim", ours.get("head_dim"))
    theirs.setdefault("num_experts", theirs.get("num_local_experts"))
    assert {key: theirs.get(key, "no key of transformers") for key in ours} == ours


def test_each_kind_of_recomputation_takes_less_memory_than_the_one_before(tmp_path: Path):
    """none > selective > full > offload on the GPU; the host takes the layers' inputs."""
    kinds = ("none", "selective", "full", "offload")
    more = {"stages.0.sequence_length": 128, "stages.0.micro_batch_size": 8, "model.llama.num_hidden_layers": 8}
    plans = [plan_of(tmp_path, {"stages.0.activation_checkpointing": kind, **more}).stages[0] for kind in kinds]
    memory = [plan.memory for plan in plans if plan.memory]
    activations = [one.activations for one in memory]
    assert len(activations) == 4 and activations == sorted(activations, reverse=True)
    assert len(set(activations)) == 4
    inputs_bytes = 4 * 8 * LLAMA["hidden_size"] * 128 * 8
    assert [one.host for one in memory] == [0, 0, 0, inputs_bytes]


def test_an_optimizer_on_a_disk_takes_16_bytes_a_parameter_of_it(tmp_path: Path):
    """Of a node's ranks together; the buffers that are locked are those of a rank's whole partition, where that is small."""
    keys = {"storage": {"scratch": "/local"}, "stages.1.zero": {"stage": 3, "offload_optimizer": "nvme"}}
    plan = plan_of(tmp_path, {**keys, "stages.1.gpus_per_node": 2})
    memory, kept = plan.stage("chat").memory, plan.stage("base").memory
    sizes = geometry(plan.config.model.config_dict())
    assert memory and kept and (memory.disk, kept.disk, kept.locked) == (16 * sizes.total // 2, 0, 0)
    assert memory.optimizer == memory.gradients == memory.update == 0 < memory.weights
    assert memory.locked == 16 * (sizes.total // 2) < memory.host
    told = payload(plan, "environment")
    assert isinstance(told, EnvironmentSpec) and told.prebuild_ops == ("cpu_adam", "pin_memory", "async_io")
    assert (told.swap_bytes, told.locked_bytes) == (16 * sizes.total, memory.locked)


def test_weights_on_a_disk_leave_the_gpu_and_lock_their_buffers(tmp_path: Path):
    zero = {"stage": 3, "offload_optimizer": "cpu", "offload_param": "nvme"}
    keys = {"storage": {"scratch": "/local"}, "stages.1.zero": zero, "stages.1.gpus_per_node": 2}
    plan = plan_of(tmp_path, keys)
    memory, sizes = plan.stage("chat").memory, geometry(plan.config.model.config_dict())
    assert memory and (memory.weights, memory.optimizer, memory.disk) == (0, 0, 4 * sizes.total // 2)
    assert memory.locked == 4 * (8 * -(-sizes.tensor_max // 2) + sizes.total // 2) < memory.host
    told = payload(plan, "environment")
    assert isinstance(told, EnvironmentSpec) and told.prebuild_ops == ("cpu_adam", "pin_memory", "async_io")
    assert (told.swap_bytes, told.locked_bytes) == (4 * sizes.total, memory.locked)


def test_logits_take_no_more_than_a_chunk(tmp_path: Path):
    def logits(micro_batch_size: int) -> int:
        keys = {
            "stages.0.sequence_length": 128,
            "stages.0.micro_batch_size": micro_batch_size,
            "stages.0.global_batch_size": 64,
        }
        memory = plan_of(tmp_path, keys).stages[0].memory
        assert memory
        return memory.logits

    hidden_bytes = 4 * LLAMA["hidden_size"]
    assert logits(32) - logits(16) == 16 * 128 * hidden_bytes
    assert logits(16) - logits(8) == 8 * 128 * (hidden_bytes + 8 * LLAMA["vocab_size"])


def test_a_file_is_listed_once_whatever_it_is_called(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "b.jsonl").symlink_to("a.jsonl")
    prose = {"kind": "text", "files": ["*.jsonl"]}
    with pytest.raises(UserError, match=r"datasets.prose.files: .*b.jsonl is the same file as .*a.jsonl"):
        plan_of(tmp_path, {"datasets.prose": prose})
    with pytest.raises(UserError, match=r"a.jsonl is listed twice"):
        plan_of(tmp_path, {"datasets.prose": {**prose, "files": ["a.jsonl", "a.jsonl"]}})


def test_an_empty_file_is_refused_unless_bad_rows_are_counted(tmp_path: Path):
    (tmp_path / "a.jsonl").touch()
    prose = {"kind": "text", "files": ["a.jsonl"]}
    with pytest.raises(UserError, match=r"datasets.prose.files: .*a.jsonl is empty"):
        plan_of(tmp_path, {"datasets.prose": prose})
    plan_of(tmp_path, {"datasets.prose": {**prose, "bad_rows": "skip"}})
