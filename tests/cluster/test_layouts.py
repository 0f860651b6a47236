"""Layouts whose ranks are on different hosts: each trains like plain PyTorch in one process, and its export is verified."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from bench.machine import describe_machine, write_result
from longhaul.artifacts.artifact_schemas import DataManifest
from longhaul.config.stage_config import Parallel
from longhaul.data.sampling.samples import Samples
from longhaul.jobs.kinds.train_job import TrainSpec
from tests.parity import reference_loop as reference
from tests.parity.parity_cases import FP32, MODELS
from tests.parity.parity_table import largest_difference
from tests.support.pipeline_run import tiny_config
from tests.support.pipeline_run_on_cluster import SITE, PipelineRunOnCluster
from tests.support.running_cluster import running_cluster
from tests.support.slurm_conf import ClusterSize
from tests.support.virtual_cluster import VirtualCluster

pytestmark = pytest.mark.slow

Layout = tuple[int, int, dict[str, Any]]

STEPS = 6
PART_OF_A_NODE = {"max_nodes": 4, "node": {"cpus": 2, "memory_mb": 2000}}
"""Request of a job of one node: a quarter of the node, so that an export runs at the same time as the trainings."""
# model -> stage -> (nodes, ranks per node, keys of the stage). Groups of every axis cross hosts. Two hosts suffice for data and
# tensor parallelism and for replicas of experts. Four hosts show what two cannot: pipeline ranks that are neither first nor
# last, experts that send to three hosts at once, ZeRO 3 over more than two ranks, two axes that both cross hosts, three axes.
LAYOUTS: dict[str, dict[str, Layout]] = {
    "llama": {
        "pipeline4": (4, 1, {"zero": {"stage": 1}, "parallel": {"pipeline": 4}}),
        "sequence2-data2-zero3": (4, 1, {"zero": {"stage": 3}, "parallel": {"sequence": 2}}),
        "tensor2-data2-zero2": (2, 2, {"zero": {"stage": 2}, "parallel": {"tensor": 2}}),
        "tensor2": (2, 1, {"zero": {"stage": 1}, "parallel": {"tensor": 2}, "micro_batch_size": 2}),
        "data2-zero3": (2, 1, {"zero": {"stage": 3}}),
    },
    "deepseek_v3": {
        "pipeline2-tensor2-data2": (4, 2, {"zero": {"stage": 1}, "parallel": {"pipeline": 2, "tensor": 2}}),
        "expert4": (4, 1, {"zero": {"stage": 1}, "parallel": {"expert": 4}}),
        "expert2-data4-zero2": (2, 2, {"zero": {"stage": 2}, "parallel": {"expert": 2}}),
        "expert2-pipeline2": (4, 1, {"zero": {"stage": 1}, "parallel": {"expert": 2, "pipeline": 2}}),
        "expert2-tensor2": (2, 2, {"zero": {"stage": 1}, "parallel": {"expert": 2, "tensor": 2}}),
        "pipeline2-tensor2": (4, 1, {"zero": {"stage": 1}, "parallel": {"pipeline": 2, "tensor": 2}}),
        "expert2-zero3": (2, 1, {"zero": {"stage": 3}, "parallel": {"expert": 2}, "micro_batch_size": 2}),
        "sequence2-zero3": (2, 1, {"zero": {"stage": 3}, "parallel": {"sequence": 2}, "micro_batch_size": 2}),
    },
}
# The layouts of `make test`: every axis crosses hosts once, in one run. `make layouts` trains all.
QUICK = {"deepseek_v3": ("pipeline2-tensor2", "expert2-zero3", "sequence2-zero3")}


def selected_layouts(config: pytest.Config) -> dict[str, dict[str, Layout]]:
    """Return the layouts that this test run trains."""
    return LAYOUTS if config.getoption("--all-layouts") else quick_layouts()


def quick_layouts() -> dict[str, dict[str, Layout]]:
    return {model_name: {name: LAYOUTS[model_name][name] for name in names} for model_name, names in QUICK.items()}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "name" in metafunc.fixturenames:
        cases = [
            (model_name, name) for model_name, layouts in selected_layouts(metafunc.config).items() for name in layouts
        ]
        metafunc.parametrize(("model_name", "name"), cases, ids=["/".join(case) for case in cases])


def test_quick_layouts_have_every_axis_and_zero_3():
    stages = [keys for layouts in quick_layouts().values() for _, _, keys in layouts.values()]
    assert {axis for keys in stages for axis in keys["parallel"]} == set(Parallel.model_fields)
    assert 3 in {keys["zero"]["stage"] for keys in stages}


@pytest.fixture(scope="module")
def table(pytestconfig: pytest.Config) -> Iterator[list[str]]:
    """One line for each layout that passed. With --all-layouts they are written to bench/results/cluster_layouts.txt."""
    lines: list[str] = []
    yield lines
    if pytestconfig.getoption("--all-layouts"):
        head = ["command: make layouts", *describe_machine(("torch", "deepspeed", "snakemake"))[1:]]
        count = sum(map(len, LAYOUTS.values()))
        summary = f"{len(lines)} of {count} layouts on a real Slurm cluster agree with plain PyTorch in one process"
        write_result("cluster_layouts", [*head, f"{summary}, by at most", *lines])


@pytest.fixture(scope="module")
def four_nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VirtualCluster]:
    with running_cluster(tmp_path_factory.mktemp("four"), ClusterSize(nodes=4)) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def trained(
    four_nodes: VirtualCluster, tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config
) -> dict[str, PipelineRunOnCluster]:
    """One run per model, both at once. It has one stage per layout, all with the same first weights and data."""
    runs = {}
    for model_name, layouts in selected_layouts(pytestconfig).items():
        config = tiny_config(model=MODELS[model_name], run="layouts")
        config["checks"]["bad_hardware"] = "warn"  # all hosts share the cores of one machine
        config["stages"] = [_stage(name, *layout) for name, layout in layouts.items()]
        runs[model_name] = PipelineRunOnCluster(
            tmp_path_factory.mktemp(model_name),
            config,
            four_nodes,
            partitions=[{**SITE["partitions"][0], **PART_OF_A_NODE}],
        )
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda chain: chain.run("--jobs", "3", timeout_s=900), runs.values()))
    return runs


def _stage(name: str, nodes: int, ranks: int, keys: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": name,
        "kind": "sft",
        "dataset": "chats",
        "steps": STEPS,
        "global_batch_size": 8,
        "micro_batch_size": 1,
        "sequence_length": 64,
        "precision": "fp32",
        "optimizer": {"lr": 3e-3, "weight_decay": 0.1, "gradient_clipping": 0.5, "eps": 1e-6},
        "schedule": {"kind": "constant", "warmup_steps": 3},
        "nodes": nodes,
        "gpus_per_node": ranks,
        "checkpoints": {"every_steps": STEPS},
        "validation": {"every_steps": STEPS, "max_samples": 8},
        "export": "last",
        "export_dtype": "fp32",
        "minutes": 5,
        **keys,
    }


@pytest.fixture(scope="module")
def traces(trained: dict[str, PipelineRunOnCluster], pytestconfig: pytest.Config) -> dict[str, reference.Trace]:
    """The same steps in plain PyTorch, per model."""
    return {
        model_name: _trace(trained[model_name], next(iter(layouts)))
        for model_name, layouts in selected_layouts(pytestconfig).items()
    }


def _trace(chain: PipelineRunOnCluster, name: str) -> reference.Trace:
    job = TrainSpec.read(chain.results / "stages" / name / "job.json")
    stage, manifest = job.stage, DataManifest.read(chain.results / "data/chats.json")
    cache = chain.folder / "reference-samples"
    samples, held_out = (
        Samples.open(_resolved(manifest, chain.folder), split, stage.kind, stage.sequence_length, job.seed, cache)
        for split in ("train", "validation")
    )
    return reference.train(job, samples, held_out)


def _resolved(manifest: DataManifest, folder: Path) -> DataManifest:
    """Return the manifest with an absolute path; it is relative to the run's working folder."""
    return DataManifest(**{**vars(manifest), "path": str(folder / manifest.path)})


@pytest.mark.timeout(1200)
def test_losses_and_gradient_norms_equal_those_of_plain_pytorch(
    model_name: str,
    name: str,
    trained: dict[str, PipelineRunOnCluster],
    traces: dict[str, reference.Trace],
    table: list[str],
):
    chain, (nodes, ranks, _) = trained[model_name], LAYOUTS[model_name][name]
    attempt = json.loads((chain.weights(name) / "attempts.jsonl").read_text())
    assert len(set(attempt["hosts"])) == nodes and attempt["world_size"] == nodes * ranks
    rows = [json.loads(line) for line in (chain.weights(name) / "metrics.jsonl").open()]
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, STEPS + 1))
    loss = largest_difference([row["loss"] for row in steps], traces[model_name].losses)
    norm = largest_difference([row["grad_norm"] for row in steps], traces[model_name].norms)
    assert loss <= FP32.loss and norm <= FP32.norm
    table.append(
        f"{model_name:12} {name:24} {nodes} hosts, {nodes * ranks} ranks  loss {loss:.1e}  grad norm {norm:.1e}"
    )


def test_export_is_verified(model_name: str, name: str, trained: dict[str, PipelineRunOnCluster]):
    verification = trained[model_name].read(f"export/{name}.json")["verification"]
    assert verification["tensors"]["equal"] == verification["tensors"]["count"] > 10
    assert verification["logits"]["bit_equal"] or verification["logits"]["max_abs_difference"] < 1e-4
