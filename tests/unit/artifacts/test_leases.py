"""A lease has one owner at a time: alive, dead, or one of several processes that compete for it."""

from __future__ import annotations

import atexit
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from longhaul.artifacts.leases import Lease, LeaseOwner, RunLease, process_start
from tests.support.wait import wait_for


def write_lease(path: Path, owner: LeaseOwner) -> None:
    path.write_text(json.dumps(asdict(owner)))


def dead_process() -> LeaseOwner:
    """Return the identity of a process of this host that has ended."""
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    child.wait()
    return replace(LeaseOwner.this_process(), pid=child.pid)


def on_another_host() -> LeaseOwner:
    return replace(LeaseOwner.this_process(), host="elsewhere")


def test_living_owner_keeps_the_lease(tmp_path: Path):
    first, second = Lease(tmp_path / "lease"), Lease(tmp_path / "lease")
    assert first.try_acquire()
    assert not second.try_acquire()
    assert str(second.current_owner()) == f"process {os.getpid()} on {socket.gethostname()}"
    first.release()
    assert second.try_acquire()


@pytest.mark.parametrize("pid_reused", [False, True])
def test_dead_owner_of_this_host_loses_the_lease(tmp_path: Path, pid_reused: bool):
    dead = replace(LeaseOwner.this_process(), started="1.00000000") if pid_reused else dead_process()
    write_lease(tmp_path / "lease", dead)
    lease = Lease(tmp_path / "lease")
    assert lease.try_acquire() and lease.current_owner() == lease.owner
    assert [path.name for path in tmp_path.iterdir()] == ["lease"]


def test_owner_on_another_host_is_never_assumed_dead(tmp_path: Path):
    write_lease(tmp_path / "lease", replace(dead_process(), host="elsewhere"))
    assert not Lease(tmp_path / "lease").try_acquire()


def test_lease_of_another_process_is_not_released(tmp_path: Path):
    write_lease(tmp_path / "lease", on_another_host())
    Lease(tmp_path / "lease").release()
    assert (tmp_path / "lease").exists()


def test_lease_acquired_since_the_owner_was_read_is_never_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """If its file were absent for a moment, a third process would acquire the lease, too."""
    write_lease(tmp_path / "lease", on_another_host())
    forbidden = lambda *paths, **options: pytest.fail(f"{paths} was moved or removed")  # noqa: E731
    unlink = Path.unlink
    monkeypatch.setattr(Path, "rename", forbidden)
    monkeypatch.setattr(
        Path, "unlink", lambda path, **options: forbidden(path) if path.name == "lease" else unlink(path, **options)
    )
    Lease(tmp_path / "lease").remove_dead(dead_process())
    assert [path.name for path in tmp_path.iterdir()] == ["lease"]


@pytest.mark.parametrize(("age_s", "is_removed"), [(30, False), (61, True)])
def test_takeover_of_a_living_process_is_left_alone_until_it_is_abandoned(tmp_path: Path, age_s: int, is_removed: bool):
    dead, takeover = dead_process(), tmp_path / ".lease.takeover"
    write_lease(tmp_path / "lease", dead)
    write_lease(takeover, on_another_host())
    os.utime(takeover, (time.time() - age_s,) * 2)
    Lease(tmp_path / "lease").remove_dead(dead)
    assert sorted(path.name for path in tmp_path.iterdir()) == ([] if is_removed else [".lease.takeover", "lease"])


def test_takeover_whose_process_died_on_this_host_does_not_block(tmp_path: Path):
    write_lease(tmp_path / "lease", dead_process())
    write_lease(tmp_path / ".lease.takeover", dead_process())
    assert Lease(tmp_path / "lease").try_acquire()
    assert [path.name for path in tmp_path.iterdir()] == ["lease"]


def test_lease_of_the_dead_owner_is_removed(tmp_path: Path):
    dead = dead_process()
    write_lease(tmp_path / "lease", dead)
    lease = Lease(tmp_path / "lease")
    lease.remove_dead(dead)
    assert list(tmp_path.iterdir()) == []
    lease.remove_dead(dead)


def test_incomplete_lease_file_is_not_taken_over(tmp_path: Path):
    """Its writer may still be writing."""
    (tmp_path / "lease").write_text("")
    assert not Lease(tmp_path / "lease").try_acquire()


COMPETE = """
import sys, time
from pathlib import Path
from longhaul.artifacts.leases import Lease

folder = Path(sys.argv[1])
(folder / sys.argv[2]).touch()
while not (folder / "begin").exists():
    time.sleep(0.001)
print(Lease(folder / "lease").try_acquire(), flush=True)
sys.stdin.read()  # a winner stays alive until all have tried
"""


@pytest.mark.parametrize("over_a_dead_owner", [False, True])
def test_one_of_several_competing_processes_wins(tmp_path: Path, over_a_dead_owner: bool):
    """Each process has a Python of its own: a fork of a process with threads may inherit a lock that nobody releases."""
    if over_a_dead_owner:
        write_lease(tmp_path / "lease", dead_process())
    words = [sys.executable, "-c", COMPETE, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    processes = [subprocess.Popen([*words, f"ready-{number}"], text=True, **pipes) for number in range(8)]  # type: ignore[call-overload]
    try:
        wait_for(lambda: len(list(tmp_path.glob("ready-*"))) == 8, 60)
        (tmp_path / "begin").touch()
        won = [process.stdout.readline().strip() for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert sorted(won) == ["False"] * 7 + ["True"]


def run_lease_of(path: Path, owner: LeaseOwner) -> RunLease:
    write_lease(path, owner)
    return RunLease(path)


def test_second_main_process_is_refused_with_the_owner_and_the_remedy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    lease = run_lease_of(tmp_path / "lease", replace(dead_process(), host="login7"))
    with pytest.raises(SystemExit) as ended:
        lease.acquire_or_exit(lambda job_id: True)
    printed = capsys.readouterr().err
    assert ended.value.code == 2 and "on login7" in printed and f"rm {tmp_path / 'lease'}" in printed


@pytest.mark.parametrize("has_ended", [True, False])
def test_main_process_in_a_job_is_dead_if_slurm_says_so(
    tmp_path: Path, has_ended: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("LONGHAUL_JOB_ID", "8")
    lease = run_lease_of(tmp_path / "lease", replace(LeaseOwner.this_process(), host="n3", job_id="7"))
    asked: list[str] = []
    if has_ended:
        lease.acquire_or_exit(lambda job_id: not asked.append(job_id))
        assert lease.current_owner() == lease.owner and lease.owner.job_id == "8"
        assert "(job 7) has ended; taking over" in capsys.readouterr().out
        lease.release()
    else:
        with pytest.raises(SystemExit):
            lease.acquire_or_exit(lambda job_id: bool(asked.append(job_id)))
        assert "(job 7) works on this run" in capsys.readouterr().err
    assert asked == ["7"]


@pytest.mark.parametrize(
    ("variables", "job_id"),
    [
        ({}, None),
        ({"SLURM_JOB_ID": "7", "SLURMD_NODENAME": "n1"}, "7"),
        ({"SLURM_JOB_ID": "7"}, None),  # a shell of salloc on the login node outlives the job
        ({"LONGHAUL_JOB_ID": "8"}, "8"),
        ({"SLURM_JOB_ID": "7", "LONGHAUL_JOB_ID": "8", "SLURMD_NODENAME": "n1"}, "7"),
    ],
)
def test_owner_has_host_process_and_job(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], job_id: str | None):
    for name in ("SLURM_JOB_ID", "LONGHAUL_JOB_ID", "SLURMD_NODENAME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    owner = LeaseOwner.this_process()
    assert owner == LeaseOwner(socket.gethostname(), os.getpid(), process_start(os.getpid()), job_id)
    suffix = f" (job {job_id})" if job_id else ""
    assert str(owner) == f"process {os.getpid()} on {socket.gethostname()}{suffix}"
    assert not owner.is_dead()


def test_start_of_a_process_is_ticks_and_boot():
    """starttime is field 22 of /proc/<pid>/stat (proc(5))."""
    ticks = Path("/proc/self/stat").read_text().rpartition(")")[2].split()[22 - 3]
    boot = Path("/proc/sys/kernel/random/boot_id").read_text()[:8]
    assert process_start(os.getpid()) == f"{ticks}.{boot}"


@pytest.mark.parametrize("name", [b"a) Z) b", b"\xff"])
def test_start_is_found_for_any_name_of_a_process(tmp_path: Path, name: bytes):
    program = tmp_path / os.fsdecode(name)
    shutil.copy("/bin/sleep", program)
    with subprocess.Popen([program, "60"]) as process:
        while process_start(process.pid) == process_start(os.getpid()):
            time.sleep(0.01)
        started = process_start(process.pid)
        assert started and started.partition(".")[0].isdigit()
        process.kill()
        with Path(f"/proc/{process.pid}/stat").open("rb") as stream:
            while not stream.read().rpartition(b") ")[2].startswith(b"Z"):
                stream.seek(0)
        assert process_start(process.pid) is None, "a zombie has ended"
    assert process_start(process.pid) is None


def test_folder_of_the_lease_is_created(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    lease = Lease(Path("a/b/lease"))
    monkeypatch.chdir("/")
    assert lease.try_acquire()
    assert [path.name for path in (tmp_path / "a/b").iterdir()] == ["lease"]
    assert json.loads((tmp_path / "a/b/lease").read_text()) == asdict(lease.owner)


def test_link_that_nfs_repeats_is_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The first request makes the link, its answer is lost, and the second one finds the name."""
    link = os.link

    def repeated(source: Path, target: Path) -> None:
        link(source, target)
        link(source, target)

    monkeypatch.setattr(os, "link", repeated)
    lease = Lease(tmp_path / "lease")
    assert lease.try_acquire() and lease.current_owner() == lease.owner
    assert [path.name for path in tmp_path.iterdir()] == ["lease"]


def test_lease_that_others_take_and_release_is_tried_three_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    attempts: list[Path] = []

    def refused(source: Path, target: Path) -> None:
        attempts.append(target)
        raise FileExistsError

    monkeypatch.setattr(os, "link", refused)
    assert Lease(tmp_path / "lease").try_acquire() is False
    assert attempts == [tmp_path / "lease"] * 3


@pytest.mark.parametrize("text", ["[]", "{}", '{"host": 1}', "null", "\udcff"])
def test_unreadable_owner_is_no_owner(tmp_path: Path, text: str):
    (tmp_path / "lease").write_text(text, errors="surrogateescape")
    assert Lease(tmp_path / "lease").current_owner() is None


def test_release_without_a_lease_does_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    lease = Lease(tmp_path / "lease")
    lease.release()
    monkeypatch.setattr(lease, "current_owner", lambda: lease.owner)
    lease.release()  # the file was removed after it was read
    assert list(tmp_path.iterdir()) == []


def test_refusal_names_the_owner_and_the_remedy(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    lease = run_lease_of(tmp_path / "lease", LeaseOwner("login7", 5, None, "9"))
    with pytest.raises(SystemExit) as ended:
        lease.acquire_or_exit()
    output = capsys.readouterr()
    assert (ended.value.code, output.out) == (2, "")
    assert output.err == (
        "error: process 5 on login7 (job 9) works on this run already\n"
        "  remedy: see how it stands with `longhaul status CONFIG`; wait for it, or stop it with Ctrl-C in its terminal; "
        f"if it is certainly dead: rm {tmp_path}/lease\n"
    )
    (tmp_path / "lease").unlink()
    lease.acquire_or_exit()
    assert lease.current_owner() == lease.owner
    lease.release()


def test_unreadable_lease_is_refused_with_the_remedy(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "lease").write_text("")
    with pytest.raises(SystemExit) as ended:
        RunLease(tmp_path / "lease").acquire_or_exit()
    assert ended.value.code == 2
    assert capsys.readouterr().err == (
        f"error: {tmp_path}/lease is unreadable\n  remedy: if no other snakemake works on this run: rm {tmp_path}/lease\n"
    )


def test_acquired_lease_of_a_run_is_released_at_exit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    registered: list[object] = []
    monkeypatch.setattr(atexit, "register", registered.append)
    lease = RunLease(tmp_path / "lease")
    lease.acquire_or_exit()
    assert registered == [lease.release] and lease.current_owner() == lease.owner


def test_process_that_became_snakemake_still_owns_its_lease(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Snakemake's Slurm plugin removes the variables of Slurm from the main process."""
    monkeypatch.delenv("LONGHAUL_JOB_ID", raising=False)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURMD_NODENAME", "n1")
    monkeypatch.setattr(atexit, "register", lambda function: None)
    RunLease(tmp_path / "lease").acquire_or_exit()
    monkeypatch.delenv("SLURM_JOB_ID")
    lease = RunLease(tmp_path / "lease")
    lease.acquire_or_exit(lambda job_id: pytest.fail("Slurm is asked about this process"))
    lease.release()
    assert not lease.path.exists()


def test_process_that_lives_on_this_host_keeps_its_run_though_its_job_has_ended(tmp_path: Path):
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        owner = replace(LeaseOwner.this_process(), pid=other.pid, started=process_start(other.pid), job_id="7")
        lease = run_lease_of(tmp_path / "lease", owner)
        with pytest.raises(SystemExit):
            lease.acquire_or_exit(lambda job_id: True)
        other.kill()
    assert lease.current_owner() == owner


def test_job_of_this_process_is_not_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A requeued job has the id of its earlier allocation."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURMD_NODENAME", "n1")
    lease = run_lease_of(tmp_path / "lease", replace(on_another_host(), job_id="7"))
    with pytest.raises(SystemExit):
        lease.acquire_or_exit(lambda job_id: True)
    assert lease.current_owner() == replace(on_another_host(), job_id="7")
