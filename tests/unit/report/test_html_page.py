"""Numbers of the page that are computed for it."""

from __future__ import annotations

import html
import json
import re
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from longhaul.artifacts.job_state import Failure, StateName
from longhaul.artifacts.paths import JobId
from longhaul.errors import UserError
from longhaul.report import html_page, run_status
from longhaul.report.html_page import render_page, write_report
from longhaul.report.number_format import nats
from longhaul.report.run_results import read_run
from longhaul.report.run_status import INTERRUPTED, QUEUED, RUNNING, read_status
from longhaul.report.slurm_queue_types import AskQueue, Queue, QueuedJob
from longhaul.report.status_text import status_view, summary_lines
from tests.support.finished_run_files import DATASET, write_finished_run
from tests.support.run_folder import TRAIN, RunFolder


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the text of a small run's page, with one space between its words."""
    monkeypatch.setattr(html_page, "get_plotlyjs", lambda: "")
    run = write_finished_run(tmp_path / "results")
    return text_of(render_page(read_run(run.folder)))


def text_of(page: str) -> str:
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", page)).split())


def test_the_queue_tells_the_report_what_it_tells_the_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job that waits, one that left the queue without a record, and a queue that does not answer."""
    monkeypatch.setattr(html_page, "get_plotlyjs", lambda: "")
    run = RunFolder(tmp_path)
    run.state(TRAIN, "running")
    run.train(40)

    def state_in_report(ask_queue: AskQueue) -> str:
        results = read_run(run.paths.folder, ask_queue)
        assert results.status == replace(
            read_status(run.paths, ask_queue), disk_free_bytes=results.status.disk_free_bytes
        )
        return str(html_page._summary_row(results.stages[0], results)["state"])

    waiting = QueuedJob("8", "PENDING", "Resources", "N/A")
    assert state_in_report(lambda jobs: Queue({"train-base": waiting})) == QUEUED
    assert state_in_report(lambda jobs: Queue({})) == INTERRUPTED

    def ask_in_vain(jobs: object) -> Queue:
        raise UserError("squeue did not answer")

    assert state_in_report(ask_in_vain) == RUNNING
    write_report(run.paths.folder, tmp_path / "page.html", ask_in_vain)
    assert "states are those that the jobs recorded last: squeue did not answer" in (tmp_path / "page.html").read_text()


def test_the_summary_names_each_job_that_does_not_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(html_page, "get_plotlyjs", lambda: "")
    run = RunFolder(tmp_path, stages=4)
    Failure("permanent", "out of memory", "use a smaller micro batch").write(run.paths.job(TRAIN).failure)
    killed, waiting, damaged = (JobId("train", (f"stage-{number}",)) for number in (1, 2, 3))
    run.state(killed, "running")
    run.state(damaged, "running")
    run.paths.job(damaged).state.write_text("{")
    queue = Queue({str(waiting): QueuedJob("8", "PENDING", "Priority", "N/A")})
    summary = text_of(render_page(read_run(run.paths.folder, lambda jobs: queue))).partition("Environment The nodes")[0]
    for line in (
        "train-base failed: out of memory. Remedy: use a smaller micro batch",
        "train-stage-1 interrupted: job 7 is no longer in Slurm's queue",
        "train-stage-2 queued: waits: Priority",
        f"train-stage-3 unknown: {run.paths.job(damaged).state} is not valid JSON",
    ):
        assert line in summary


def test_the_summary_names_why_a_job_starts_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(html_page, "get_plotlyjs", lambda: "")
    run = RunFolder(tmp_path, "local")
    run.main_process()
    invocation = run.paths.lease.read_text()
    failure = Failure("transient", "a link was down", "", invocation=invocation, next_attempt="attempt 2 of 3")
    failure.write(run.paths.job(TRAIN).failure)
    assert "train-base failed, starts again: attempt 2 of 3: a link was down" in text_of(
        render_page(read_run(run.paths.folder))
    )


@pytest.mark.parametrize("more_steps", [0, 5, 4000])
@pytest.mark.parametrize("state", ["running", "failed", "done"])
def test_summary_of_the_terminal_and_of_the_report_agree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: StateName, more_steps: int
) -> None:
    """The report reads all metrics, status their beginning and end."""
    monkeypatch.setattr(html_page, "get_plotlyjs", lambda: "")
    run = RunFolder(tmp_path)
    weights = run.train(40)
    with weights.metrics.open("a") as stream:
        for step in range(41, 41 + more_steps):
            stream.write(json.dumps({"step": step, "loss": 3 + step / 10_000, "step_time_s": 2.0}) + "\n")
    run.state(TRAIN, state)
    if state == "failed":
        Failure("permanent", "out of memory", "").write(run.paths.job(TRAIN).failure)
    begun = json.dumps({"time_s": 0.0, "event": "running"}) + "\n"
    end = json.dumps({"time_s": 7265.0, "event": state}) + "\n" if state != "running" else ""
    run.paths.job(TRAIN).history.write_text(begun + end)
    queue = Queue({str(TRAIN): QueuedJob("7", "RUNNING", "None", "N/A")} if state == "running" else {})
    monkeypatch.setattr(run_status.time, "time", lambda: 3612.0)
    results = read_run(run.paths.folder, lambda jobs: queue)
    (stage,), row = results.status.stages, html_page._summary_row(results.stages[0], results)
    progress = stage.progress
    assert progress is not None and row["state"] == stage.job.state == state
    assert row["steps"] == f"{progress.step:,} of 100" and progress.step == 40 + more_steps
    assert (progress.first_validation_loss, progress.validation_loss) == (5.5, 4.5)
    losses = f"{nats(progress.first_loss)} → {nats(progress.loss)} 5.500 → 4.500"
    assert losses in text_of(render_page(results))
    line, cost = summary_lines(results.status)[1:3]
    assert f"loss {nats(progress.first_loss)} → {nats(progress.loss)}, validation loss 5.500 → 4.500" in line
    hours = {"running": "8.03", "failed": "16.1", "done": "16.1"}[state]
    assert f"GPU-hours: {hours} of" in cost and f"It used {hours} GPU-hours" in text_of(render_page(results))


def test_speeds_of_status_and_report_name_their_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """100 steps at 1,000 tokens/s and an MFU of 40 %, then 60 steps at half of both: the GPUs have become slow."""
    monkeypatch.setattr(html_page, "get_plotlyjs", lambda: "")
    run = RunFolder(tmp_path)
    weights = run.train(100)
    with weights.metrics.open("a") as stream:
        for step in range(101, 161):
            slow = {"step_time_s": 4.0, "data_wait_s": 1.0, "tokens_per_s": 500.0, "mfu": 0.2}
            stream.write(json.dumps({"step": step, "loss": 3.0, **slow}) + "\n")
    recent = "500 tokens/s and MFU 20 %"
    stream = StringIO()
    Console(file=stream, width=1000).print(status_view(run.status()))
    assert f"{recent} in the last 50 steps" in stream.getvalue()
    page = text_of(render_page(read_run(run.paths.folder)))
    assert f"speed in the last 50 steps {recent}" in page
    assert "tokens/s without padding, waiting included, median of all steps 1,000 " in page
    assert "model FLOPs utilisation, median of all steps 40 %" in page and "MFU 40 % –" in page


def test_a_loss_that_is_not_finite_is_the_same_in_status_and_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last validation is not finite, and neither are the losses of all the last steps that status reads."""
    monkeypatch.setattr(html_page, "get_plotlyjs", lambda: "")
    run = RunFolder(tmp_path)
    with run.train(40).metrics.open("a") as stream:
        for step in range(41, 100):
            stream.write(json.dumps({"step": step, "loss": None}) + "\n")
        stream.write(json.dumps({"step": 99, "validation_loss": None}) + "\n")
    results = read_run(run.paths.folder)
    line = summary_lines(results.status)[1]
    assert line.endswith("loss –, validation loss –")
    assert "4.990 → – 5.500 → –" in text_of(render_page(results))


@pytest.mark.parametrize(
    ("entropy_nats", "answer"),
    [
        (2.5, '<span class="good">yes: below 2.500</span>'),
        (2.0, '<span class="bad">no: not below 2.000</span>'),  # the loss itself
        (1.0, '<span class="bad">no: not below 1.000</span>'),
    ],
)
def test_a_loss_that_is_not_below_the_entropy_baseline_is_flagged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entropy_nats: float, answer: str
) -> None:
    """The last loss of the stage is 2. The summary in the terminal says the same as the page."""
    monkeypatch.setattr(html_page, "get_plotlyjs", lambda: "")
    run = write_finished_run(tmp_path / "results")
    manifest = json.loads(run.manifest(DATASET).read_text())
    run.manifest(DATASET).write_text(json.dumps({**manifest, "unigram_entropy_nats": entropy_nats}))
    results = read_run(run.folder)
    assert f'<td data-title="did it learn?">{answer}</td>' in render_page(results)
    assert ("it has not learned" in "".join(summary_lines(results.status))) == ("bad" in answer)


def test_acceptance_has_rows_of_the_stage_and_of_the_network(page: str) -> None:
    table = page.replace("\xa0", " ")
    assert "base GPU utilisation " in table and "base MFU " in table
    assert "all bus bandwidth – ≥ 80 % not measured bus bandwidth of the largest all_reduce" in table


def test_a_profile_shows_the_parts_of_a_step(page: str) -> None:
    assert "Profile of steps 20 to 21, rank 0 on n1: 1 s for a step" in page
    for row in ("matrix products 800 ms 80 %", "communication 100 ms 10 %", "nothing runs 100 ms 10 %"):
        assert row in page
    assert "Another 200 ms of a step ran at the same time as other kernels" in page
    assert "nvjet_a matrix products 8 80 %" in page
    assert "150 ms nvjet_a ncclDevKernel_AllReduce" in page


def test_a_start_is_shown_by_its_phases(page: str) -> None:
    assert "last start, from rank 0's process to its first step 4 s: imports 500 ms, rendezvous 500 ms" in page


def test_a_check_of_a_served_export_has_a_section(page: str) -> None:
    assert "Served exports base engine vllm 0.32.0 layout 1 node, 2 tensor x 1 pipeline ranks answers 62 log" in page
    assert "start of the server 1 min 15 s API key requests without the key are refused" in page
    assert "requests at the same time tokens/s first token, median" in page
    assert " 8 123 0.25 s 0.5 s 0.0123 s – 0.0021 " in page


def test_an_evaluation_says_that_its_prompts_differ(page: str) -> None:
    assert "base quiz acc 40 org/quiz@5d0e1c7a 0.5 ± 0.01 0.25 ± 0.01 +0.25 *" in page
    assert "* The two models read different prompts" in page


def test_pairs_of_the_fabric_check_and_of_a_stage_are_heat_maps(page: str) -> None:
    assert page.count("%{x} and %{y}") == 2


def test_rates_of_nccl_tests_are_beside_the_checks_own(page: str) -> None:
    assert "in place: time, µs algorithm, GB/s bus, GB/s gloo: bus, GB/s" in page
    assert "all all_reduce 8 1 0.75 1 2 2.5 3.25 1 1" in page
    assert "all_reduce 8 6.5 1.25 1.75 1 all_reduce 64 6.5 1.25 1.75 6.5 1.25 1.75" in page


def test_what_is_slow_and_accepted_or_below_published_figures_is_a_warning(page: str) -> None:
    assert "Warning: n2 is slow. Warning: slow by its datasheet." in page
    assert "slow between its nodes the link between n1 and n2 is slow" in page
