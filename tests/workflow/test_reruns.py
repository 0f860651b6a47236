"""What a change runs again, and what it must not: finished training is weeks of other people's GPUs."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from tests.support.chain import Chain, local_site, write_site

TRAINING = {"train_stage", "convert", "tokenize", "tokenizer"}


@pytest.fixture
def run(finished: Chain) -> Iterator[Chain]:
    """The finished run, whose config a test may change; it is put back afterwards."""
    before = copy.deepcopy(finished.config)
    yield finished
    finished.config, finished.profile = before, "local"
    finished.save()
    write_site(finished.folder, local_site())


def expensive(run: Chain) -> dict[str, int]:
    """Of what a dry run would start: training, data and conversion."""
    return {rule: count for rule, count in run.would_run().items() if rule in TRAINING}


def test_nothing_is_left_to_do(run: Chain):
    assert run.would_run() == {}
    assert not list((run.folder / "results").glob("*.lease*")), "the lease was not given back"


def test_a_run_from_elsewhere_holds_nothing_of_the_demo(run: Chain):
    assert [path.name for path in (run.folder / "results").iterdir()] == ["tiny"]
    assert (run.results / "config.yaml").read_text() == (run.folder / "run.yaml").read_text()
    assert "stdlib" not in (run.results / "plan.json").read_text()


def test_a_comment_and_another_key_order_run_nothing(run: Chain):
    reordered = dict(reversed(run.config.items()))
    run.save("# a comment\n" + yaml.safe_dump(reordered, sort_keys=True))
    assert run.would_run() == {}


@pytest.mark.parametrize(
    "change",
    [
        lambda config: config["stages"][0].update(minutes=7),
        lambda config: config["stages"][1].update(micro_batch_size=4),
        lambda config: config["stages"][1]["zero"].update(stage=2),
        lambda config: config["checks"].update(minutes=3),
        lambda config: config["stages"][0]["checkpoints"].update(keep_last=5),
    ],
    ids=["minutes", "micro batch", "zero stage", "check minutes", "kept checkpoints"],
)
def test_how_it_runs_is_no_cause(run: Chain, change: Any):
    change(run.config)
    run.save()
    assert expensive(run) == {}


def test_partition_nccl_environment_and_container_are_no_cause(run: Chain):
    site = {
        "name": "elsewhere",
        "partitions": {"gpu": {"name": "other", "max_minutes": 100}},
        "node": {"cpus": 4, "memory_mb": 2000},
        "max_nodes": 2,
        "gpu_request": "none",
        "environment": {"NCCL_DEBUG": "INFO"},
        "software": {"kind": "container", "path": "/images/job.sif"},
    }
    write_site(run.folder, site)
    run.profile = "slurm"
    run.config["stages"][0].update(nodes=2, gpus_per_node=1)
    run.save()
    assert expensive(run) == {}


def test_a_stages_learning_rate_runs_it_and_what_follows(run: Chain):
    run.config["stages"][1]["optimizer"]["lr"] = 0.001
    run.save()
    assert expensive(run) == {"train_stage": 1, "convert": 1}
    run.config["stages"][0]["optimizer"]["lr"] = 0.001
    run.save()
    assert expensive(run) == {"train_stage": 2, "convert": 2}


def test_a_deleted_report_is_made_alone(run: Chain):
    (run.results / "report.html").unlink()
    assert run.would_run() == {"report": 1}
    run.run()
    assert (run.results / "report.html").stat().st_size > 10_000
    assert run.would_run() == {}


def test_a_cause_is_seen_behind_a_check_that_runs_anew(run: Chain):
    """Snakemake compares no parameters behind a job that runs, even where its output is taken as ancient."""
    run.config["checks"]["min_disk_free_gb"] = 0.2
    run.config["stages"][0]["optimizer"]["lr"] = 0.001
    run.save()
    assert run.would_run()["environment"] == 1
    assert expensive(run) == {"train_stage": 2, "convert": 2}


def test_an_upgrade_of_templates_runs_no_finished_stage(run: Chain):
    """What jobs are started with is no input of theirs."""
    for launch in run.results.glob("stages/*/launch.sh"):
        launch.write_text(launch.read_text() + "\n# newer\n")
        os.utime(launch, (time.time() + 5, time.time() + 5))
    assert run.would_run() == {}


def test_a_source_changed_in_place_makes_new_data_and_new_weights(run: Chain):
    """The last of the file, as it changes the run for good."""
    old = {path.name for path in run.results.glob("data/prose/*")}
    weights = {path for path in run.results.glob("stages/*/weights/*")}
    source = run.folder / "prose.jsonl"
    source.write_text(source.read_text().replace("home", "road"))
    assert expensive(run)["train_stage"] == 2
    run.run()
    assert old < {path.name for path in run.results.glob("data/prose/*")}, (
        "old data must stay, new data have their own folder"
    )
    assert weights < {path for path in run.results.glob("stages/*/weights/*")}
    assert run.would_run() == {}
