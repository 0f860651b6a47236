"""`longhaul run` takes the lease before Snakemake starts: a second run is refused at once, and the status knows the first."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from snakemake.cli import get_argument_parser

from longhaul.artifacts.leases import Lease, LeaseOwner, process_start
from longhaul.artifacts.paths import RunPaths
from longhaul.cli import main
from longhaul.scheduling import run_verb
from longhaul.scheduling.snakemake_main import NEW_FOLDER_OPTION
from tests.support.check_user_errors import refused_message
from tests.support.small_configs import LOCAL, write_config

LEASE = Path("results/small.lease.json")


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A config in the current folder, which is empty otherwise."""
    monkeypatch.chdir(tmp_path)
    return write_config(tmp_path, None, LOCAL).relative_to(tmp_path)


def started(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> list[str]:
    """Run `longhaul run` until it would replace its process. Return the words of the new process after its module."""
    given: list[list[str]] = []

    def replace_process(program: str, words: list[str]) -> None:
        given.append(words[3:])
        raise SystemExit(0)

    monkeypatch.setattr(os, "execv", replace_process)
    with pytest.raises(SystemExit) as ended:
        main(["run", *arguments])
    assert not ended.value.code
    return given[0]


def lease_of(owner: LeaseOwner) -> None:
    LEASE.parent.mkdir()
    LEASE.write_text(json.dumps(asdict(owner)))


def test_run_says_at_once_that_it_starts_and_so_does_the_status(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = started(monkeypatch, str(config))
    assert words[:2] == [NEW_FOLDER_OPTION, str(LEASE.absolute())]
    line = f"Run small starts: config {config}, log of Snakemake in .snakemake/log\n"
    assert capsys.readouterr().err == line
    for named in ([], [str(config)]):
        with pytest.raises(SystemExit) as ended:
            main(["status", *named])
        assert not ended.value.code
        printed = capsys.readouterr().out
        assert f"Run small: starting (main process: process {os.getpid()} on " in printed and "again" in printed
    with pytest.raises(SystemExit):
        main(["status", "--json"])
    assert json.loads(capsys.readouterr().out)["state"] == "starting"
    LEASE.unlink()
    assert "nothing has run there yet" in refused_message(capsys, "status", str(config))


def test_start_on_another_host_that_may_have_failed_is_named(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its process may have died before Snakemake knew the jobs. The run would be `starting` for ever."""
    lease_of(LeaseOwner("login9", 5, "1.0"))
    printed: list[str] = []
    for verb in ("status", "doctor"):
        with pytest.raises(SystemExit) as ended:
            main([verb, str(config)])
        assert not ended.value.code
        printed.append(capsys.readouterr().out)
    status, doctor = printed
    assert "starting" in status and "cannot be checked from this host: ask on login9." in status
    assert "whether process 5 on login9 still runs cannot be checked from this host" in doctor
    assert f"rm {RunPaths('small').lease}" in doctor


def test_second_run_is_refused_before_snakemake_starts(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "execv", lambda *_: pytest.fail("Snakemake starts"))
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        this = LeaseOwner.this_process()
        lease_of(replace(this, pid=other.pid, started=process_start(other.pid)))
        message = refused_message(capsys, "run", str(config))
        other.kill()
    assert f"process {other.pid} on {this.host} works on this run already" in message
    assert "longhaul status CONFIG" in message and f"rm {LEASE.absolute()}" in message


def test_run_after_a_killed_one_takes_its_lease(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lease_of(replace(LeaseOwner.this_process(), started="1.00000000"))
    started(monkeypatch, str(config))
    assert Lease(LEASE).current_owner() == LeaseOwner.this_process()


def test_second_config_is_refused_until_it_is_dropped(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refused_message(capsys, "run", str(config), "--configfile", "other.yaml")
    assert f"drop it: {config} is the run's only config file" in message
    assert "other.yaml" not in started(monkeypatch, str(config))


@pytest.mark.parametrize("options", [["-n"], ["-np"], ["-nj4"], ["--dry-run"], ["--summary"], ["--report=page.html"]])
def test_call_that_starts_no_job_needs_no_lease(
    config: Path, options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "--longhaul-lease" not in " ".join(started(monkeypatch, str(config), *options))
    assert not Path("results").exists()


@pytest.mark.parametrize("options", [["--directory", "there"], ["--directory=there"], ["-d", "there"]])
def test_lease_is_in_the_working_folder_of_the_run(
    config: Path, options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert started(monkeypatch, str(config), *options)[1] == str(Path("there", LEASE).absolute())


def test_folder_that_cannot_be_written_is_left_to_the_snakefile(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has the remedy."""
    Path("results").write_text("")
    assert "--longhaul-lease" not in " ".join(started(monkeypatch, str(config)))


def test_options_that_start_no_job_are_snakemakes() -> None:
    known = set(get_argument_parser()._option_string_actions)
    assert set(run_verb.STARTS_NO_JOB) - known == set()


@pytest.mark.parametrize("has_folder", [False, True])
def test_lease_is_released_where_snakemake_ends_before_its_first_job(config: Path, has_folder: bool) -> None:
    """Here for a target that no rule makes. A folder of the user may have settings, such as the stripes of Lustre."""
    if has_folder:
        Path("results").mkdir()
    words = ["-m", "longhaul", "run", str(config), "no-such-target"]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "Run small starts" in done.stderr and "no-such-target" in done.stderr
    assert not RunPaths("small").lease.exists() and Path("results").exists() == has_folder
