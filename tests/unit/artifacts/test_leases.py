"""One holder at a time: alive, dead, silent, and several that race."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from longhaul.artifacts.leases import Holder, Lease, RunLease
from longhaul.train.checkpoint.weights_lock import Claim


def held_by(path: Path, holder: Holder) -> None:
    path.write_text(json.dumps(asdict(holder)))


def dead_process() -> Holder:
    """A process of this host that has ended."""
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    child.wait()
    return replace(Holder.this_process(), pid=child.pid)


def test_a_living_holder_keeps_it(tmp_path: Path):
    first, second = Lease(tmp_path / "lease"), Lease(tmp_path / "lease")
    assert first.try_acquire()
    assert not second.try_acquire()
    assert str(second.current()) == f"process {os.getpid()} on {socket.gethostname()}"
    first.release()
    assert second.try_acquire()


@pytest.mark.parametrize("reused", [False, True], ids=["ended", "another process has its number"])
def test_a_dead_holder_of_this_host_loses_it(tmp_path: Path, reused: bool):
    dead = replace(Holder.this_process(), started="1.00000000") if reused else dead_process()
    held_by(tmp_path / "lease", dead)
    lease = Lease(tmp_path / "lease")
    assert lease.try_acquire() and lease.current() == lease.holder
    assert [path.name for path in tmp_path.iterdir()] == ["lease"]


def test_a_holder_of_another_host_is_never_taken_for_dead(tmp_path: Path):
    held_by(tmp_path / "lease", replace(dead_process(), host="elsewhere"))
    assert not Lease(tmp_path / "lease").try_acquire()


def test_a_lease_of_somebody_else_is_not_given_back(tmp_path: Path):
    held_by(tmp_path / "lease", replace(Holder.this_process(), host="elsewhere"))
    Lease(tmp_path / "lease").release()
    assert (tmp_path / "lease").exists()


def test_half_a_file_is_held(tmp_path: Path):
    """Its writer may be about to finish it."""
    (tmp_path / "lease").write_text("")
    assert not Lease(tmp_path / "lease").try_acquire()


def race(path: Path, gate: object, results: object) -> None:
    gate.wait()  # type: ignore[attr-defined]
    won = Lease(path).try_acquire()
    results.put(won)  # type: ignore[attr-defined]
    gate.wait()  # type: ignore[attr-defined]  # a winner stays alive until all have tried


@pytest.mark.parametrize("over_a_dead_one", [False, True])
def test_of_several_that_race_one_wins(tmp_path: Path, over_a_dead_one: bool):
    if over_a_dead_one:
        held_by(tmp_path / "lease", dead_process())
    context = multiprocessing.get_context("fork")
    gate, results = context.Barrier(8), context.Queue()
    racers = [context.Process(target=race, args=(tmp_path / "lease", gate, results)) for _ in range(8)]
    for racer in racers:
        racer.start()
    won = [results.get(timeout=30) for _ in racers]
    for racer in racers:
        racer.join(timeout=30)
    assert sum(won) == 1


def claim(folder: Path, dead_after_s: float) -> Claim:
    return Claim(Lease(folder / "lease"), folder / "beat", dead_after_s)


def test_a_silent_holder_of_another_host_is_taken_for_dead(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    held_by(tmp_path / "lease", replace(Holder.this_process(), host="elsewhere"))
    (tmp_path / "beat").write_text("41\n")
    patient, hasty = claim(tmp_path, 60.0), claim(tmp_path, 0.2)
    assert not patient.succeeds() and "waiting for it" in capsys.readouterr().out
    assert not hasty.succeeds(), "the first look only learns the count"
    time.sleep(0.3)
    assert not patient.succeeds()
    assert not hasty.succeeds() and "taking over" in capsys.readouterr().out
    assert hasty.succeeds()


def test_a_holder_that_counts_is_alive(tmp_path: Path):
    held_by(tmp_path / "lease", replace(Holder.this_process(), host="elsewhere"))
    waiting = claim(tmp_path, 0.1)
    for count in range(4):
        (tmp_path / "beat").write_text(f"{count}\n")
        time.sleep(0.15)
        assert not waiting.succeeds()


def run_lease_of(path: Path, holder: Holder) -> RunLease:
    held_by(path, holder)
    return RunLease(path)


def test_a_main_on_another_host_is_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    lease = run_lease_of(tmp_path / "lease", replace(dead_process(), host="login7"))
    with pytest.raises(SystemExit) as ended:
        lease.take(lambda job_id: True)
    said = capsys.readouterr().err
    assert ended.value.code == 2 and "on login7" in said and f"rm {tmp_path / 'lease'}" in said


@pytest.mark.parametrize("over", [True, False])
def test_a_main_in_a_job_is_dead_when_slurm_says_so(
    tmp_path: Path, over: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("LONGHAUL_JOB_ID", "8")
    lease = run_lease_of(tmp_path / "lease", replace(Holder.this_process(), host="n3", job_id="7"))
    asked: list[str] = []
    if over:
        lease.take(lambda job_id: not asked.append(job_id))
        assert lease.current() == lease.holder and lease.holder.job_id == "8"
        assert "(job 7) has ended; taking over" in capsys.readouterr().out
        lease.release()
    else:
        with pytest.raises(SystemExit):
            lease.take(lambda job_id: bool(asked.append(job_id)))
        assert "(job 7)) works on this run" in capsys.readouterr().err
    assert asked == ["7"]
