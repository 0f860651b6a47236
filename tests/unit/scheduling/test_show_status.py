"""`longhaul status`, `doctor` and `report` find the run that the user names."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest

from longhaul.artifacts.paths import JobId
from longhaul.cli import main
from longhaul.scheduling import show_status
from longhaul.scheduling.show_status import run_paths
from tests.support.check_user_errors import refused_message
from tests.support.finished_run_files import write_finished_run
from tests.support.run_folder import TRAIN, RunFolder
from tests.support.small_configs import LOCAL, write_config


def test_report_of_a_config_is_that_of_its_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path, None, LOCAL)
    monkeypatch.chdir(tmp_path)
    write_finished_run(tmp_path / "results")
    for arguments in ([str(config)], [], ["results/small", "--out", "page.html"]):
        with pytest.raises(SystemExit) as ended:
            main(["report", *arguments])
        assert not ended.value.code
        page = Path("page.html" if "--out" in arguments else "results/small/report.html")
        assert capsys.readouterr().out == f"wrote {page}\n"
        assert page.stat().st_size > 1000


@pytest.mark.parametrize("verb", ["status", "doctor", "report"])
def test_run_that_does_not_exist_is_refused_until_one_is_named(
    verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    message = refused_message(capsys, verb, str(tmp_path / "typo"))
    assert f"{tmp_path}/typo does not exist" in message and "YAML file, or its folder results/<run>" in message
    monkeypatch.chdir(tmp_path)
    Path("elsewhere").mkdir()
    config = write_config(tmp_path, None, LOCAL)
    write_finished_run(tmp_path / "results")
    monkeypatch.chdir("elsewhere")
    message = refused_message(capsys, verb)
    assert "name the run's config or folder, or work in the folder that holds results/" in message
    for named in (["../results/small"], [str(config)], []):
        monkeypatch.chdir(tmp_path / ("elsewhere" if named == ["../results/small"] else ""))
        with pytest.raises(SystemExit) as ended:
            main([verb, *named])
        assert not ended.value.code, capsys.readouterr().err


def test_report_of_a_run_that_has_not_started_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_config(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert "results/small holds no plan.json" in refused_message(capsys, "report", str(config))
    assert not Path("results").exists()


def test_file_that_cannot_be_read_is_named_until_it_can(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunFolder(tmp_path)
    metrics = run.train(5).metrics
    metrics.unlink()
    metrics.mkdir()
    assert f"{metrics} cannot be read: Is a directory" in refused_message(capsys, "status", str(run.paths.folder))
    metrics.rmdir()
    with pytest.raises(SystemExit) as ended:
        main(["status", str(run.paths.folder)])
    assert not ended.value.code


def test_file_system_that_does_not_answer_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ESTALE, "Stale file handle", "results/r/plan.json")

    run = RunFolder(tmp_path)
    monkeypatch.setattr(show_status, "read_status", fail)
    for verb in ("status", "doctor"):
        message = refused_message(capsys, verb, str(run.paths.folder))
        assert "results/r/plan.json cannot be read: Stale file handle" in message


def test_watch_goes_on_after_a_problem_until_the_user_stops_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunFolder(tmp_path, scheduler="local")
    plan, waits = run.paths.plan.read_text(), iter(["damage", "repair", "stop"])

    def sleep(seconds: float) -> None:
        next_one = next(waits)
        if next_one == "stop":
            raise KeyboardInterrupt
        run.paths.plan.write_text(plan if next_one == "repair" else "{")
        if next_one == "repair":
            run.state(TRAIN, "done", job_id=None)

    monkeypatch.setattr(show_status.time, "sleep", sleep)
    with pytest.raises(SystemExit) as ended:
        main(["status", str(run.paths.folder), "--watch"])
    printed = capsys.readouterr().out
    assert not ended.value.code and printed.count("Run r on site here: ") == 2
    assert printed.index("plan.json: no valid JSON") < printed.rindex("Run r on site here: ")


def test_watch_in_a_pipe_prints_each_status_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunFolder(tmp_path, scheduler="local")
    printed: list[str] = []

    def sleep(seconds: float) -> None:
        printed.append(capsys.readouterr().out)
        if len(printed) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(show_status.time, "sleep", sleep)
    with pytest.raises(SystemExit):
        main(["status", str(run.paths.folder), "--watch"])
    assert [text.count("Run r on site here: ") for text in printed] == [1, 1]


def test_json_has_the_same_keys_from_the_start_to_the_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunFolder(tmp_path, scheduler="local")
    plan, states = run.paths.plan.read_text(), {}
    run.paths.plan.unlink()
    run.main_process()
    for moment in ("start", "training", "end"):
        with pytest.raises(SystemExit) as ended:
            main(["status", str(run.paths.folder), "--json"])
        assert not ended.value.code
        shown = json.loads(capsys.readouterr().out)
        states[shown["state"]] = list(shown)
        run.paths.plan.write_text(plan)
        for job in (TRAIN, JobId("environment")):
            run.state(job, "running" if moment == "start" else "done", job_id=None)
    assert list(states) == ["starting", "running", "done"]
    assert states["starting"] == states["running"] == states["done"]


def test_watch_of_json_is_refused_until_one_is_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunFolder(tmp_path, scheduler="local")
    assert "use one of them" in refused_message(capsys, "status", str(run.paths.folder), "--watch", "--json")
    for one in ("--watch", "--json"):
        monkeypatch.setattr(show_status, "_repeat", lambda *_: None)  # --watch has no end
        with pytest.raises(SystemExit) as ended:
            main(["status", str(run.paths.folder), one])
        assert not ended.value.code


def test_json_of_a_diverged_training_is_valid(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = RunFolder(tmp_path, scheduler="local")
    with run.train(5).metrics.open("a") as metrics:
        metrics.write('{"step": 6, "loss": NaN, "mfu": Infinity}\n')
    with pytest.raises(SystemExit):
        main(["status", str(run.paths.folder), "--json"])

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    (stage,) = json.loads(capsys.readouterr().out, parse_constant=refuse)["stages"]
    assert stage["progress"]["step"] == 6 and stage["progress"]["loss"] is None


@pytest.mark.parametrize(("inside", "named"), [("results/r", "."), ("results", "r"), ("elsewhere", "../results/r")])
def test_run_is_shown_with_its_steps_from_any_folder(
    inside: str, named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    run = RunFolder(Path())  # its files name relative paths, as those of any run do
    run.train(5)
    Path("elsewhere").mkdir()
    monkeypatch.chdir(inside)
    with pytest.raises(SystemExit) as ended:
        main(["status", named])
    assert not ended.value.code and " 5/100 " in capsys.readouterr().out


@pytest.mark.parametrize("named", [".", "../small", "../../results/small"])
def test_run_is_found_by_its_folder_from_inside(named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "results/small"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    found = run_paths(Path(named))
    assert found.run == "small" and found.folder.samefile(folder)
