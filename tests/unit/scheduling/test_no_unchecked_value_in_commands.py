"""No value from a file of the run reaches a shell or a command before its form is checked.

WAYS lists every way from a file below results/ to a command's words. The last test finds a module that starts processes and
is not in the list. launch.json is no such way: it is the command itself, written by the main process, and no shell reads it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import longhaul
from longhaul.artifacts.job_state import State, read_state, utc_now
from longhaul.artifacts.leases import LeaseOwner, RunLease
from longhaul.artifacts.paths import QUARANTINE, RESULTS, JobFolder, JobId
from longhaul.artifacts.quarantine import Quarantine
from longhaul.jobs.job_spec import LaunchSpec
from longhaul.scheduling import allocation, slurm_client
from longhaul.scheduling.allocation import Allocation
from longhaul.scheduling.decide_after_attempt import AllocationEnd
from longhaul.scheduling.job_records import JobRecords
from longhaul.scheduling.request_at_submission import submitted_request
from longhaul.scheduling.supervisor import Supervisor
from longhaul.scheduling.termination_signals import TerminationSignals
from tests.support.small_configs import plan_of

HOSTILE = ["7; touch owned", "$(touch owned)", "7\n", "7 --uid=0", "--uid=0", "`id`", "7,8:9", "", "7|id", "ü"]
TRAIN = JobId("train", ("base",))


def small_plan(folder: Path) -> Any:
    (folder / "prose.jsonl").write_text('{"text": "a"}\n')
    (folder / "chats.jsonl").write_text('{"messages": []}\n')
    datasets = {
        name: {"kind": kind, "files": [f"{name}.jsonl"]} for name, kind in (("prose", "text"), ("chats", "chat"))
    }
    return plan_of(folder, {"datasets": datasets})


def launch_spec(folder: Path) -> LaunchSpec:
    job = JobFolder(folder / RESULTS / "run" / "stages" / "base")
    job.path.mkdir(parents=True, exist_ok=True)
    return LaunchSpec(
        run="run",
        name="train-base",
        folder=str(job.path),
        slurm=True,
        nodes=1,
        requeue=True,
        max_restarts=0,
        deadline_poll_interval_s=1,
        steps=(),
        inputs=(),
        data=(),
        checkpoints=None,
        quarantine=str(folder / QUARANTINE),
        attempt_logs=str(folder / "logs"),
    )


def write_state(path: Path, job_id: str = "7", nodes: tuple[str, ...] = ("n1",)) -> None:
    State("running", job_id, "n1", list(nodes), 1, utc_now()).write(path)


def request_after_job(folder: Path, value: str) -> None:
    plan = small_plan(folder)
    write_state(folder / plan.paths.job(TRAIN).state, job_id=value)
    slurm_client._run(str(submitted_request(plan, TRAIN, folder).as_resources()["slurm_extra"]))


def request_without_quarantined(folder: Path, value: str) -> None:
    Quarantine([{"node": value}]).write(folder / QUARANTINE)
    plan = small_plan(folder)
    slurm_client._run(str(submitted_request(plan, TRAIN, folder).as_resources()["slurm_extra"]))


def requeue_without_quarantined(folder: Path, value: str) -> None:
    Quarantine([{"node": value}]).write(folder / QUARANTINE)
    spec = launch_spec(folder)
    end = AllocationEnd(spec, Allocation("5", ["n1"]), JobRecords(spec), TerminationSignals(lambda: None))
    end._wait_for_signal = lambda: None  # pyright: ignore[reportAttributeAccessIssue]
    end.requeue("test", ["n2"])


def ask_for_the_other_job(folder: Path, value: str) -> None:
    spec = launch_spec(folder)
    write_state(JobFolder(Path(spec.folder)).state, job_id=value)
    allocation._exit_if_another_job_is_active(spec, "5")


def ask_for_nodes_of_the_last_allocation(folder: Path, value: str) -> None:
    spec = launch_spec(folder)
    write_state(JobFolder(Path(spec.folder)).state, nodes=(value,))
    Supervisor(spec)._quarantine_down_nodes(read_state(Path(spec.folder)))


def ask_for_the_job_of_the_lease(folder: Path, value: str) -> None:
    lease = RunLease(folder / "run.lease.json")
    owner = replace(LeaseOwner.this_process(), host="elsewhere", job_id=value)
    lease.path.write_text(json.dumps(owner.__dict__))
    with pytest.raises(SystemExit):
        lease.acquire_or_exit(lambda job_id: slurm_client.job_info(job_id) is None)


WAYS: dict[str, Callable[[Path, str], None]] = {
    "job_id of state.json, through slurm_extra to the shell that runs sbatch": request_after_job,
    "job_id of state.json, to scontrol show job": ask_for_the_other_job,
    "nodes of state.json, to sinfo": ask_for_nodes_of_the_last_allocation,
    "nodes of quarantine.json, through slurm_extra to the shell that runs sbatch": request_without_quarantined,
    "nodes of quarantine.json, to scontrol update": requeue_without_quarantined,
    "job_id of the run's lease, to scontrol show job": ask_for_the_job_of_the_lease,
}


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the words of every command that Slurm's client would run."""
    words: list[str] = []

    def run(*command: str, timeout_s: float = 0.0) -> str:
        words.extend(command)
        return "JobState=RUNNING NumNodes=1"

    monkeypatch.setattr(slurm_client, "_run", run)
    monkeypatch.setattr(slurm_client, "partition_nodes", lambda partition: [])
    return words


@pytest.mark.parametrize("way", WAYS)
def test_a_valid_value_reaches_the_command(way: str, tmp_path: Path, commands: list[str]):
    """Else the next test would prove nothing."""
    with suppress(SystemExit):
        WAYS[way](tmp_path, "4711")
    assert any("4711" in word for word in commands)


@pytest.mark.parametrize("value", HOSTILE)
@pytest.mark.parametrize("way", WAYS)
def test_a_hostile_value_reaches_no_command(way: str, value: str, tmp_path: Path, commands: list[str]):
    with suppress(SystemExit):
        WAYS[way](tmp_path, value)
    assert not [word for word in commands if word == value or (value and value in word)]


def test_no_other_module_starts_processes():
    package = Path(longhaul.__file__).parent
    found = {
        str(path.relative_to(package))
        for path in package.rglob("*.py")
        if re.search(
            r"^import subprocess|os\.(exec|system|spawn|popen)|shell=True|create_subprocess", path.read_text(), re.M
        )
    }
    assert (
        found
        == {
            "scheduling/run_verb.py",  # longhaul run: the user's own words
            "checks/kernel_log.py",  # journalctl: fixed words
            "checks/nccl_tests.py",  # words of its job spec, as launch.json's: srun, srun_extra and the folder of the site file
            "checks/node_facts.py",  # nvidia-smi, the compiler: fixed words
            "export/model_card.py",  # git describe of the package's folder
            "scheduling/slurm_client.py",  # WAYS
            "scheduling/run_job_steps.py",  # the steps of launch.json
            "scheduling/serve_verb.py",  # bash with the launch.sh that it has rendered
            "serving/server_process.py",  # words of the site file, and what serving/engines.py adds: names, numbers, paths
            "serving/engine_version.py",  # words of the site file, and fixed code
            "serving/guard_processes.py",  # the words of server_process.py
        }
    )
