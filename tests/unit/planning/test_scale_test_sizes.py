"""Rungs of the scale test: the same micro batch and accumulation everywhere, and what does not fit is left out and named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from longhaul.artifacts.paths import JobId
from longhaul.errors import UserError
from longhaul.jobs.job_kind import job_kinds, job_request, job_spec, jobs_of
from longhaul.jobs.kinds.scale_test_job import ScaleTestSpec, scale_test_before
from longhaul.planning import Plan
from longhaul.planning.scale_test_sizes import PROFILED_STEPS, STEPS, scale_ladder
from longhaul.report.plan_json import plan_json
from longhaul.report.plan_table import plan_notes
from tests.support.small_configs import plan_of

EIGHT_NODES = {"stages.0.nodes": 8, "stages.0.gpus_per_node": 8, "stages.0.global_batch_size": 256}


def plan(folder: Path, site: dict[str, Any] | None = None, **config: Any) -> Plan:
    return plan_of(folder, {**EIGHT_NODES, **config}, site)


def test_micro_batch_and_accumulation_stay(tmp_path: Path):
    ladder = scale_ladder(plan(tmp_path, scale_test=[4, 1, "full", 8, 2]))
    full = plan(tmp_path).stages[0]
    assert list(ladder.rungs) == [1, 2, 4, 8] and ladder.left_out == {} and ladder.stage == "base"
    for nodes, rung in ladder.rungs.items():
        assert rung.stage.micro_batch_size == full.stage.micro_batch_size and rung.accumulation == full.accumulation
        assert rung.stage.global_batch_size == 32 * nodes and rung.world_size == 8 * nodes
        assert rung.steps == rung.stage.steps == PROFILED_STEPS[1] and rung.stage.profile_steps == PROFILED_STEPS
    assert [ladder.before(nodes) for nodes in (1, 2, 4, 8)] == [None, 1, 2, 4]


def test_steps_on_cpus_are_not_profiled(tmp_path: Path):
    site = {"accelerator": "cpu", "partitions.0.node.gpus": 0}
    (rung,) = scale_ladder(plan(tmp_path, site, **{"stages.0.gpus_per_node": 1}, scale_test=[2])).rungs.values()
    assert rung.steps == STEPS and rung.stage.profile_steps is None


@pytest.mark.parametrize(
    ("config", "site", "rungs"),
    [
        ({}, {}, [2]),
        ({"stages.0.nodes": 2}, {}, []),
        ({"scale_test": "off"}, {}, []),
        ({"scale_test": []}, {}, []),
        ({"scale_test": {"nodes": ["full"]}}, {}, [8]),
        ({"scale_test": {"min_efficiency": 0.5}}, {}, [2]),
        ({"stages.0.gpus_per_node": 1}, {"accelerator": "cpu", "partitions.0.node.gpus": 0}, []),
    ],
)
def test_two_nodes_come_before_more_by_default(
    config: dict[str, Any], site: dict[str, Any], rungs: list[int], tmp_path: Path
):
    assert list(scale_ladder(plan(tmp_path, site, **config)).rungs) == rungs


def test_numbers_of_nodes_on_which_the_stage_does_not_fit_are_named(tmp_path: Path):
    """More nodes than it has, a layout that does not divide, and weights that only more GPUs can hold."""
    sizes = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 24, "num_attention_heads": 64}
    model = {f"model.llama.{key}": value for key, value in {**sizes, "num_key_value_heads": 8}.items()}
    big = plan(
        tmp_path,
        {"partitions.0.node.gpu_memory_gib": 40},
        **model,
        **{"stages.0.zero": {"stage": 3}, "stages.0.activation_checkpointing": "full", "stages.1": ...},
        scale_test=[1, "full", 16],
    )
    ladder = scale_ladder(big)
    assert list(ladder.rungs) == [8] and ladder.left_out[16] == "stage base has 8 nodes"
    assert (
        "need" in ladder.left_out[1]
        and "GiB per GPU" in ladder.left_out[1]
        and "site centre has 40 GiB" in ladder.left_out[1]
    )
    four_ranks = {"stages.0.parallel": {"pipeline": 2, "tensor": 2}, "stages.0.gpus_per_node": 2}
    split = plan(tmp_path, **four_ranks, scale_test=[1, 2])
    assert list(scale_ladder(split).rungs) == [2] and "stages.base" in scale_ladder(split).left_out[1]
    notes = plan_notes(plan_json(big))
    assert "scale test before stage base: 25 steps on 8 nodes; scale_test: off skips it" in notes
    assert "scale test leaves out 16 nodes: stage base has 8 nodes" in notes


def test_jobs_come_before_training_and_compare_with_the_smallest(tmp_path: Path):
    made = plan(tmp_path, scale_test=[1, 4, "full"])
    names = [str(job) for job in jobs_of(made)]
    first = names.index("scale_test-1")
    assert names[first : first + 4] == ["scale_test-1", "scale_test-4", "scale_test-8", "train-base"]
    job = JobId("scale_test", ("8",))
    spec = job_spec(made, job)
    assert isinstance(spec, ScaleTestSpec) and ScaleTestSpec.model_validate_json(spec.to_json()) == spec
    assert spec.smallest == "results/small/scale_test/1.json" and spec.weights_folders_root() is None
    assert spec.planned_steps == PROFILED_STEPS[1] and spec.exported_checkpoints == () and not spec.trackers.tensorboard
    assert (job_request(made, job).nodes, job_request(made, job).minutes) == (8, 30)
    assert scale_test_before(made, 8) == [Path("results/small/scale_test/4.json")] and scale_test_before(made, 1) == []


@pytest.mark.parametrize("key", ["serve", "serve_check"])
def test_a_stage_that_is_served_is_tried_without_its_export(key: str, tmp_path: Path):
    made = plan(tmp_path, **{"stages.0.export": "last", f"stages.0.{key}": {}})
    spec = job_spec(made, JobId("scale_test", ("2",)))
    assert isinstance(spec, ScaleTestSpec) and spec.stage.export == "none"


@pytest.mark.parametrize(
    ("change", "again"),
    [
        ({"stages.0.micro_batch_size": 4}, True),
        ({"scale_test": {"nodes": [2], "min_efficiency": 0.5}}, True),
        ({"scale_test": {"nodes": [2, 4], "minutes": 5}}, False),
        ({"stages.0.minutes": 90}, False),
    ],
)
def test_only_what_the_speed_depends_on_repeats_a_finished_test(change: dict[str, Any], again: bool, tmp_path: Path):
    def key(**config: Any) -> str:
        made = plan(tmp_path, **{"scale_test": [2], **config})
        rerun_key = job_kinds()["scale_test"].rerun_key
        assert rerun_key
        return rerun_key(made, JobId("scale_test", ("2",)))

    assert (key() != key(**change)) == again


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1, "x"], "scale_test.nodes.1: 'x' is no number of nodes from 1 to 100000, and not full"),
        ([0], "scale_test.nodes.0: 0 is no number of nodes"),
        ([True], "scale_test.nodes.0: True is no number of nodes"),
        ("on", "scale_test: 'on' is no section; write off, numbers of nodes such as [1, 2, full], or a section"),
        (False, "scale_test: False is no section; write off"),
        ({"nodes": 2}, "scale_test.nodes is 2; expected: a list"),
        ({"nodes": [2], "max_gpu_memory": 90}, "scale_test.max_gpu_memory is 90; expected: less than or equal to 1"),
    ],
)
def test_bad_values_are_refused(value: object, message: str, tmp_path: Path):
    with pytest.raises(UserError) as refused:
        plan(tmp_path, scale_test=value)
    assert message in str(refused.value)
