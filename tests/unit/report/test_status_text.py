"""The text of a run's status."""

from __future__ import annotations

from dataclasses import replace
from io import StringIO

import pytest
from rich.console import Console, RenderableType
from rich.text import Text

from longhaul.artifacts.endpoint import Endpoint
from longhaul.artifacts.leases import LeaseOwner
from longhaul.report.learning_result import LearningResult
from longhaul.report.run_status import (
    DONE,
    FAILED,
    NOT_STARTED,
    QUEUED,
    RUNNING,
    JobStatus,
    Progress,
    RunStatus,
    ServerStatus,
    StageStatus,
)
from longhaul.report.status_text import progress_lines, progress_view, start_lines, status_view, summary_lines

PROGRESS = Progress(
    step=120,
    first_loss=8.37,
    loss=5.018,
    validation_loss=5.454,
    first_validation_loss=8.363,
    tokens_per_s=6170,
    mfu=0.41,
    seconds_left=250,
    last_saved_step=80,
    last_saved_s=1.8e9,
    attempts=2,
    checkpoint_bytes=2**31,
)
JOB = JobStatus("train-base", "train", RUNNING, "on n1, n2", slurm_job_id="7")
STAGE = StageStatus("base", JOB, 240, PROGRESS, 12.5, 37.04, (36.0, 45.0), None)
STATUS = RunStatus("r", "here", "results/r", "process 5 on login1", [JOB], [STAGE], ["n3"], 2**40, "", None)


def shown(view: RenderableType, width: int = 80) -> str:
    stream = StringIO()
    Console(file=stream, width=width).print(view)
    return stream.getvalue()


def test_narrow_terminal_shows_fewer_columns_and_no_cut_names() -> None:
    name, job = "pretrain-long-context", replace(JOB, state="failed, starts again")
    stage = replace(STAGE, name=name, job=job, steps=400_000)
    for width, expected in ((100, "120/400,000  5.018"), (80, "120/400,000  5.018"), (60, "120/400,000"), (45, "")):
        for view in (status_view, progress_view):
            text = shown(view(replace(STATUS, stages=[STAGE, stage])), width)
            row = next(line for line in text.splitlines() if line.startswith(name))
            assert f"{name}  failed, starts again  {expected}".rstrip() in row and "…" not in text, (width, text)


def test_cells_of_many_stages_are_not_measured_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[object] = []
    usual = Text.__rich_measure__
    monkeypatch.setattr(
        Text, "__rich_measure__", lambda cell, *options: (measured.append(cell), usual(cell, *options))[1]
    )
    for view in (status_view, progress_view):
        assert shown(view(replace(STATUS, stages=[STAGE] * 200))).count("120/240") == 200
    assert len(measured) < 200


def test_status_fits_80_columns_and_has_every_value() -> None:
    text = shown(status_view(STATUS))
    row = next(line for line in text.splitlines() if line.startswith("base "))
    assert row.split()[:3] == ["base", "running", "120/240"] and "5.018" in row and "5.454" in row
    assert "6,170" in row and "4 min 10 s" in row and "…" not in text
    words = " ".join(text.split())
    for expected in (
        "Run r on site here: running (0 of 1 jobs done, main process: process 5 on login1)",
        "loss 8.370 → 5.018",
        "6,170 tokens/s and MFU 41 % in the last 50 steps",
        "last save at step 80",
        "2 attempts",
        "about 37 GPU-hours in all",
        "train-base (job 7) running: on n1, n2",
        "Quarantined nodes: n3",
        "checkpoints 2 GiB, free 1 TiB",
        "GPU-hours: 12.5 of 36 to 45 planned for the training steps",
    ):
        assert expected in words


def test_main_process_that_cannot_be_checked_is_named() -> None:
    words = " ".join(shown(status_view(replace(STATUS, unchecked_host="login1"))).split())
    assert "Whether process 5 on login1 still runs cannot be checked from this host: ask on login1." in words
    assert "cannot be checked" not in shown(status_view(STATUS))


def test_log_lines_name_step_loss_speed_and_time_left() -> None:
    assert progress_lines(STATUS) == [
        "train-base running, on n1, n2: step 120 of 240, loss 5.018, 6,170 tokens/s, 4 min 10 s left"
    ]
    queued = replace(JOB, state=QUEUED, detail="waits: Priority")
    assert progress_lines(replace(STATUS, jobs=[queued])) == ["train-base queued, waits: Priority"]
    for state in (DONE, FAILED):
        assert progress_lines(replace(STATUS, jobs=[replace(JOB, state=state)])) == []


def test_estimated_steps_stand_until_the_job_has_counted_its_samples() -> None:
    for steps, estimated, shown_as in ((None, 1190, "0/~1,190"), (1200, 1190, "0/1,200"), (None, None, "0/–")):
        stage = replace(STAGE, steps=steps, progress=None, estimated_steps=estimated)
        assert shown_as in shown(progress_view(replace(STATUS, stages=[stage])))


def test_time_of_several_stages_is_shown_in_every_form() -> None:
    second = replace(STAGE, name="chat", job=replace(JOB, name="train-chat", state=QUEUED), progress=None)
    status = replace(STATUS, stages=[STAGE, second], training_left_s=(3600.0, 5400.0))
    line = "Training left in 2 stages: about 1 h to 1 h 30 min, without queues, validations and saves"
    assert line in " ".join(shown(status_view(status)).split()) and line in " ".join(
        shown(progress_view(status)).split()
    )
    assert progress_lines(status)[-1] == line and len(progress_lines(status)) == 2
    assert "about 1 h," in progress_lines(replace(status, training_left_s=(3600.0, 3600.0)))[-1]
    for one in (replace(status, stages=[STAGE]), replace(status, training_left_s=None)):
        assert len(progress_lines(one)) == 1


def test_run_that_starts_says_what_it_makes_where_and_how_long_it_takes() -> None:
    waits = replace(JOB, state=NOT_STARTED, detail="", slurm_job_id=None)
    base = replace(STAGE, job=waits, progress=None)
    chat = replace(base, name="chat", steps=None, estimated_steps=90, job=replace(waits, name="train-chat"))
    export = replace(waits, name="export-chat", kind="export")
    status = replace(STATUS, stages=[base, chat], jobs=[base.job, chat.job, export])
    assert start_lines(status) == [
        "Run r on site here: trains base (240 steps), chat (~90 steps); exports chat",
        "Results, logs and report are written to results/r",
        "Training left: known after the first steps of base",
    ]
    assert "known after the first steps of base" in shown(progress_view(status))
    trained = replace(base, job=JOB, progress=replace(PROGRESS, step_s=2.0))
    assert "Training left" not in shown(progress_view(replace(status, stages=[trained, chat]))), "no speed of chat"
    done = replace(STAGE, job=replace(JOB, state=DONE))
    again = replace(status, stages=[done, chat], training_left_s=(60.0, 60.0), jobs=[done.job, chat.job])
    assert start_lines(again)[::2] == [
        "Run r on site here: trains chat (~90 steps)",
        "Training left in 1 stage: about 1 min, without queues, validations and saves",
    ]
    assert start_lines(replace(status, stages=[done], jobs=[done.job])) == [
        "Run r on site here",
        "Results, logs and report are written to results/r",
    ]


def test_summary_says_whether_a_stage_learned() -> None:
    def line(learning: LearningResult | None) -> str:
        return summary_lines(replace(STATUS, stages=[replace(STAGE, learning=learning)]))[1]

    loss = "  base: 120 of 240 steps, loss 8.370 → 5.018, validation loss 8.363 → 5.454"
    assert line(LearningResult(True, 6.808)) == f"{loss} (it learned: below 6.808)"
    assert line(LearningResult(False, 5.3)) == f"{loss} (it has not learned: not below 5.300)"
    assert line(None) == loss


def test_failure_is_shown_with_its_remedy() -> None:
    failed = replace(JOB, state=FAILED, detail="out of memory", remedy="use a smaller micro batch")
    text = shown(progress_view(replace(STATUS, jobs=[failed])))
    assert "train-base (job 7) failed: out of memory\n  remedy: use a smaller micro batch" in text


def test_stage_before_its_first_step_is_shown_with_its_steps() -> None:
    row = next(
        line for line in shown(progress_view(replace(STATUS, stages=[replace(STAGE, progress=None)]))).splitlines()[1:]
    )
    assert row.split()[:3] == ["base", "running", "0/240"]


def test_summary_says_whether_it_trained_what_it_cost_and_where_the_model_is() -> None:
    done = replace(JOB, state=DONE)
    stage = replace(STAGE, job=done, exported_to="results/r/export/base")
    status = replace(STATUS, jobs=[done], stages=[stage], report="results/r/report.html", main_process=None)
    assert summary_lines(status, 3723) == [
        "Run r: done after 1 h 2 min (1 of 1 jobs done)",
        "  base: 120 of 240 steps, loss 8.370 → 5.018, validation loss 8.363 → 5.454",
        "  GPU-hours: 12.5 of 36 to 45 planned for the training steps",
        "  Model of base, verified: results/r/export/base",
        "  Report: results/r/report.html",
    ]


def test_summary_of_a_part_of_a_run_does_not_say_that_it_runs() -> None:
    """The main process still lives when it prints it."""
    line = summary_lines(replace(STATUS, jobs=[JOB, replace(JOB, state=DONE)]), 3.0)[0]
    assert line == "Run r: the requested targets are made after 3 s (1 of 2 jobs done)"
    assert summary_lines(STATUS)[0] == "Run r: running (0 of 1 jobs done)"


def test_the_endpoint_of_a_server_is_shown_without_its_key() -> None:
    job = JobStatus("serve-base", "serve", RUNNING, "on n1", slurm_job_id="9")
    endpoint = Endpoint("http://10.0.0.1:8000/v1", "r-base", "vllm", "k.yaml", True, LeaseOwner("n1", 5, None))
    for found, words in (
        (endpoint, "vllm answers at http://10.0.0.1:8000/v1, model r-base, API key in k.yaml"),
        (
            replace(endpoint, url="http://127.0.0.1:80/v1"),
            "vllm answers at http://127.0.0.1:80/v1 (on n1 only), model r-base",
        ),
        (replace(endpoint, ready=False), "vllm loads the model; it will answer at http://10.0.0.1:8000/v1"),
        (replace(endpoint, key_file=None), "model r-base, no API key"),
        (None, "serve-base (job 9) running: on n1"),
    ):
        status = replace(STATUS, servers=[ServerStatus(job, found)])
        assert words in " ".join(shown(status_view(status), 200).split())
