"""Changes that rerun jobs, and changes that must not: a finished training may have taken weeks of GPU time."""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from longhaul.config.load_config import load_config
from longhaul.scheduling.dry_run_lines import jobs_to_run
from tests.support.pipeline_run import PipelineRun, job_counts, local_site, write_site

TRAINING = {"train", "export", "tokenize", "tokenizer", "count_chats"}


@pytest.fixture
def run(finished: PipelineRun) -> Iterator[PipelineRun]:
    """The finished run. A test may change its config, which is restored afterwards."""
    before = copy.deepcopy(finished.config)
    yield finished
    finished.config, finished.profile = before, "local"
    finished.save()
    write_site(finished.folder, local_site())


def expensive(run: PipelineRun) -> dict[str, int]:
    """Return rule -> number of training, data and export jobs of a dry run."""
    return {rule: count for rule, count in run.would_run().items() if rule in TRAINING}


def test_finished_run_has_nothing_to_do(run: PipelineRun):
    assert run.would_run() == {} and "Compared with the results" not in run.dry_run()
    assert not list((run.folder / "results").glob("*.lease*")), "the lease was not released"


def test_run_in_another_folder_contains_nothing_of_the_demo(run: PipelineRun):
    assert [path.name for path in (run.folder / "results").iterdir()] == ["tiny"]
    copy, config = run.results / "config.yaml", run.folder / "run.yaml"
    assert load_config(copy).site == load_config(config).site
    assert load_config(copy).site_path == run.results / "site.yaml"
    assert load_config(copy).config.stages == load_config(config).config.stages
    assert "stdlib" not in (run.results / "plan.json").read_text()


def test_comment_and_key_order_rerun_nothing(run: PipelineRun):
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
def test_settings_that_do_not_change_results_rerun_nothing(run: PipelineRun, change: Any):
    change(run.config)
    run.save()
    assert expensive(run) == {}


def test_partition_environment_and_container_rerun_nothing(run: PipelineRun):
    site = {
        "name": "elsewhere",
        "partitions": [
            {
                "jobs": ["gpu"],
                "name": "other",
                "max_minutes": 100,
                "max_nodes": 2,
                "node": {"cpus": 4, "memory_mb": 2000},
            }
        ],
        "environment": {"NCCL_DEBUG": "INFO"},
        "software": {"kind": "container", "path": "/images/job.sif"},
    }
    write_site(run.folder, site)
    run.profile = "slurm"
    run.config["stages"][0].update(nodes=2, gpus_per_node=1)
    run.save()
    assert expensive(run) == {}


def test_learning_rate_reruns_the_stage_and_its_successors(run: PipelineRun):
    before = run.config["stages"][1]["optimizer"]["lr"]
    run.config["stages"][1]["optimizer"]["lr"] = 0.001
    run.save()
    assert expensive(run) == {"train": 1, "export": 1}
    printed = run.dry_run()
    assert "stage base is kept: " in printed and f"stage chat trains again: optimizer.lr {before} → 0.001" in printed
    words = [sys.executable, "-m", "longhaul", "run", "run.yaml", "-n"]
    own = subprocess.run(words, cwd=run.folder, capture_output=True, text=True, check=True).stdout
    lines = [line for line in printed.splitlines() if line.startswith(("Compared with", "  stage "))]
    counted = jobs_to_run(run.would_run(), len(run.read("plan.json")["jobs"]))
    assert own.splitlines()[:-1] == [*lines, counted]
    run.config["stages"][0]["optimizer"]["lr"] = 0.001
    run.save()
    assert expensive(run) == {"train": 2, "export": 2}


def test_first_stage_waits_for_counted_chats_but_a_finished_one_does_not_depend_on_them(
    run: PipelineRun, tmp_path: Path
):
    """A run of an earlier release has no counts, and is finished. A first stage that trains again waits for them."""
    counts = run.results / "data/chats.kept.json"
    shutil.move(counts, tmp_path)
    earlier = run.would_run()
    run.config["stages"][0]["optimizer"]["lr"] = 0.001
    run.save()
    again = job_counts(run.dry_run("results/tiny/stages/base/checkpoint.json"))
    shutil.move(tmp_path / counts.name, counts)
    assert earlier == {}
    assert (again["count_chats"], again["train"]) == (1, 1) and "tokenize" not in again


def test_stage_on_new_chats_trains_alone_even_if_the_weights_of_a_finished_stage_are_gone(
    run: PipelineRun, tmp_path: Path
):
    run.config["datasets"]["more"] = copy.deepcopy(run.config["datasets"]["chats"])
    stage = {**copy.deepcopy(run.config["stages"][1]), "name": "more", "dataset": "more"}
    run.config["stages"].append({key: value for key, value in stage.items() if key != "from"})
    run.save()
    shutil.move(run.results / "stages/base/weights", tmp_path)
    counts = run.would_run()
    shutil.move(tmp_path / "weights", run.results / "stages/base")
    found = {rule: counts[rule] for rule in sorted(counts.keys() & TRAINING)}
    assert found == {"count_chats": 1, "export": 1, "tokenize": 1, "train": 1}


def test_another_sequence_length_counts_what_it_keeps_and_reruns_only_its_stage(run: PipelineRun):
    """Other stages may read the same chats: their manifest stays."""
    run.config["stages"][1]["sequence_length"] = 96
    run.save()
    assert expensive(run) == {"count_chats": 1, "train": 1, "export": 1}
    assert "dataset chats is made again" not in run.dry_run()


def test_another_task_of_the_hub_runs_only_its_evaluation(run: PipelineRun):
    """Its data have a lock of their own. The files stand for a finished evaluation."""
    always = {"render": 1, "report": 1}
    run.config["stages"][1]["evaluate"] = {"tasks": ["arc_easy"]}
    run.save()
    assert run.would_run() == {**always, "fetch_task_data": 1, "evaluate": 1}
    made = [run.results / "task_data/chat/arc_easy.json", run.results / "evaluation/chat/trained/arc_easy.json"]
    for path in made:
        path.parent.mkdir(parents=True)
        path.write_text("{}")
    finished = run.would_run()
    run.config["stages"][1]["evaluate"] = {"tasks": ["arc_easy", "arc_challenge"]}
    run.save()
    added = run.would_run()
    run.config["stages"][1]["evaluate"] = {"tasks": ["arc_challenge"]}
    run.save()
    removed = run.would_run()
    for folder in ("task_data", "evaluation"):
        shutil.rmtree(run.results / folder)
    assert (finished, added) == (always, {**always, "fetch_task_data": 1, "evaluate": 1})
    assert removed == added


def test_deleted_report_is_written_alone(run: PipelineRun):
    (run.results / "report.html").unlink()
    assert run.would_run() == {"report": 1}
    run.run()
    assert (run.results / "report.html").stat().st_size > 10_000
    assert run.would_run() == {}


def test_report_of_a_failed_run_is_renewed_also_where_all_results_are_as_before(run: PipelineRun):
    """Snakemake compares the contents of small inputs: with the former config, they are those of the report before."""
    report, allowed = run.results / "report.html", run.config["checks"]["min_disk_free_gb"]
    run.config["checks"]["min_disk_free_gb"] = 1e6
    run.save()
    assert run.snakemake().returncode == 1
    assert "The run is <strong>failed</strong>" in report.read_text()
    run.config["checks"]["min_disk_free_gb"] = allowed
    run.save()
    run.run()
    assert "The run is <strong>done</strong>" in report.read_text() and run.would_run() == {}


def test_changed_stage_reruns_even_if_an_earlier_check_reruns(run: PipelineRun):
    """Snakemake does not compare parameters of jobs after a job that reruns, even if its output is ancient()."""
    run.config["checks"]["min_disk_free_gb"] = 0.2
    run.config["stages"][0]["optimizer"]["lr"] = 0.001
    run.save()
    assert run.would_run()["environment"] == 1
    assert expensive(run) == {"train": 2, "export": 2}


@pytest.mark.parametrize(
    "named",
    [
        [],
        ["--until", "train", "--"],
        ["--forcerun", "train", "--"],
        ["--omit-from", "export", "--"],
        [
            "--rerun-triggers",
            "params",
            "mtime",
            "input",
            "--",
        ],  # test_snakefile_parsing.py has fewer triggers, which are refused
    ],
    ids=["target", "until", "forcerun", "omit-from", "rerun-triggers"],
)
def test_missing_target_is_made_even_if_an_earlier_check_reruns(run: PipelineRun, named: list[str]):
    """More GPUs per node need another check of the nodes, which training takes as ancient()."""
    checkpoint = run.results / "stages/base/checkpoint.json"
    text = checkpoint.read_text()
    run.config["stages"][0].update(gpus_per_node=1)
    run.config["stages"][1].update(gpus_per_node=1)
    run.save()
    checkpoint.unlink()
    would_run = job_counts(run.run("-n", *named, str(checkpoint.relative_to(run.folder))))
    checkpoint.write_text(text)
    assert would_run["environment"] == would_run["train"] == 1


def test_target_by_the_name_of_a_rule_is_made_or_refused(run: PipelineRun):
    """A rule whose outputs have wildcards is no target: Snakemake says so, and does not end with exit code 0."""
    assert job_counts(run.dry_run("all")) == {}
    refused = run.snakemake("-n", "train")
    assert refused.returncode != 0 and "Target rules may not contain wildcards" in refused.stdout + refused.stderr


def test_changed_launch_scripts_rerun_no_finished_stage(run: PipelineRun):
    """Launch scripts are no inputs of the rules."""
    for launch in run.results.glob("stages/*/launch.sh"):
        launch.write_text(launch.read_text() + "\n# newer\n")
        os.utime(launch, (time.time() + 5, time.time() + 5))
    assert run.would_run() == {}


@pytest.mark.slow
def test_changed_source_file_gives_new_data_and_new_weights(finished: PipelineRun, tmp_path: Path):
    """A copy of the run, because it trains again."""
    run = copy.deepcopy(finished)
    run.folder = Path(shutil.copytree(finished.folder, tmp_path / "copy", symlinks=True))
    old = {path.name for path in run.results.glob("data/prose/*")}
    weights = {path for path in run.results.glob("stages/*/weights/*")}
    source = run.folder / "prose.jsonl"
    source.write_text(source.read_text().replace("home", "road"))
    assert expensive(run)["train"] == 2
    run.run()
    assert old < {path.name for path in run.results.glob("data/prose/*")}, "old data stay, new data get another folder"
    assert weights < {path for path in run.results.glob("stages/*/weights/*")}
    assert run.would_run() == {}
