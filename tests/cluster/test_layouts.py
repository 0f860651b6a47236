"""Layouts whose ranks sit on different hosts: each trains what plain PyTorch does in one process, and is exported and proved."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from bench.machine import header, publish
from longhaul.artifacts.schemas import DataManifest
from longhaul.config.run_config import Parallel
from longhaul.data.sampling.samples import Samples
from longhaul.jobs.specs import TrainSpec
from tests.parity import reference_loop as reference
from tests.parity.parity_cases import FP32, MODELS
from tests.parity.parity_table import furthest
from tests.support.chain import tiny_config
from tests.support.cluster_chain import ClusterChain
from tests.support.running_cluster import running
from tests.support.slurm_conf import Shape
from tests.support.virtual_cluster import VirtualCluster

Layout = tuple[int, int, dict[str, Any]]

STEPS = 6
PART_OF_A_NODE = {"cpus": 2, "memory_mb": 2000}
"""What a job of one node asks for: a quarter, so that a conversion runs beside the trainings and not instead of them."""
# twin -> stage -> (nodes, ranks a node, the stage's keys). Groups of every axis cross hosts. Two hosts do for data, tensor and
# the replicas of experts. Four are for what two cannot show: stages of a pipeline that are neither first nor last, experts that
# send to three hosts at once, ZeRO 3 over more than a pair, two axes that both cross hosts, and three axes.
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
# What `make test` trains, so that every axis crosses hosts once, in one run; `make layouts` trains all.
QUICK = {"deepseek_v3": ("pipeline2-tensor2", "expert2-zero3", "sequence2-zero3")}


def chosen(config: pytest.Config) -> dict[str, dict[str, Layout]]:
    """Those of LAYOUTS that this run trains."""
    return LAYOUTS if config.getoption("--all-layouts") else quick()


def quick() -> dict[str, dict[str, Layout]]:
    return {twin: {name: LAYOUTS[twin][name] for name in names} for twin, names in QUICK.items()}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "name" in metafunc.fixturenames:
        cases = [(twin, name) for twin, layouts in chosen(metafunc.config).items() for name in layouts]
        metafunc.parametrize(("twin", "name"), cases, ids=["/".join(case) for case in cases])


def test_those_that_are_quick_have_every_axis_and_weights_that_are_gathered():
    stages = [keys for layouts in quick().values() for _, _, keys in layouts.values()]
    assert {axis for keys in stages for axis in keys["parallel"]} == set(Parallel.model_fields)
    assert 3 in {keys["zero"]["stage"] for keys in stages}


@pytest.fixture(scope="module")
def table(pytestconfig: pytest.Config) -> Iterator[list[str]]:
    """A line for every layout that trained as it should, kept where all were to: bench/results/cluster_layouts.txt."""
    lines: list[str] = []
    yield lines
    if pytestconfig.getoption("--all-layouts"):
        head = ["command: make layouts", *header(("torch", "deepspeed", "snakemake"))[1:]]
        count = sum(map(len, LAYOUTS.values()))
        said = f"{len(lines)} of {count} layouts on a real Slurm cluster agree with plain PyTorch in one process"
        publish("cluster_layouts", [*head, f"{said}, by at most", *lines])


@pytest.fixture(scope="module")
def four_nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VirtualCluster]:
    with running(tmp_path_factory.mktemp("four"), Shape(nodes=4)) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def trained(
    four_nodes: VirtualCluster, tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config
) -> dict[str, ClusterChain]:
    """One run for each model, both at once: a stage for each layout, all of them from the same first weights and data."""
    made = {}
    for twin, layouts in chosen(pytestconfig).items():
        config = tiny_config(model=MODELS[twin], run="layouts")
        config["stages"] = [_stage(name, *layout) for name, layout in layouts.items()]
        made[twin] = ClusterChain(tmp_path_factory.mktemp(twin), config, four_nodes, max_nodes=4, node=PART_OF_A_NODE)
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda chain: chain.run("--jobs", "3", timeout_s=900), made.values()))
    return made


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
def traces(trained: dict[str, ClusterChain], pytestconfig: pytest.Config) -> dict[str, reference.Trace]:
    """The same steps in plain PyTorch."""
    return {twin: _trace(trained[twin], next(iter(layouts))) for twin, layouts in chosen(pytestconfig).items()}


def _trace(chain: ClusterChain, name: str) -> reference.Trace:
    job = TrainSpec.read(chain.results / "stages" / name / "stage.json")
    stage, manifest = job.stage, DataManifest.read(chain.results / "data/chats.json")
    cache = chain.folder / "reference-samples"
    samples = Samples.open(
        _found_from(manifest, chain.folder), "train", stage.kind, stage.sequence_length, job.seed, cache
    )
    return reference.train(job, samples)


def _found_from(manifest: DataManifest, folder: Path) -> DataManifest:
    """Its path is relative to the run's working folder."""
    return DataManifest(**{**vars(manifest), "path": str(folder / manifest.path)})


@pytest.mark.timeout(1200)
def test_losses_and_norms_are_those_of_plain_pytorch(
    twin: str, name: str, trained: dict[str, ClusterChain], traces: dict[str, reference.Trace], table: list[str]
):
    chain, (nodes, ranks, _) = trained[twin], LAYOUTS[twin][name]
    leg = json.loads((chain.weights(name) / "attempts.jsonl").read_text())
    assert len(set(leg["hosts"])) == nodes and leg["world_size"] == nodes * ranks
    rows = [json.loads(line) for line in (chain.weights(name) / "metrics.jsonl").open()]
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, STEPS + 1))
    loss = furthest([row["loss"] for row in steps], traces[twin].losses)
    norm = furthest([row["grad_norm"] for row in steps], traces[twin].norms)
    assert loss <= FP32.loss and norm <= FP32.norm
    table.append(f"{twin:12} {name:24} {nodes} hosts, {nodes * ranks} ranks  loss {loss:.1e}  grad norm {norm:.1e}")


def test_the_export_is_proved(twin: str, name: str, trained: dict[str, ClusterChain]):
    proof = trained[twin].read(f"export/{name}.json")["proof"]
    assert proof["tensors"]["equal"] == proof["tensors"]["count"] > 10
    assert proof["logits"]["bit_equal"] or proof["logits"]["max_abs_difference"] < 1e-4
