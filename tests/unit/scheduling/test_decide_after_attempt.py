"""End of an allocation: requeue, leave the retry to Snakemake, or fail with the cause that Slurm gives."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from longhaul.artifacts.job_state import (
    CANCELLED,
    ENVIRONMENT,
    NODE,
    PERMANENT,
    SIGNALLED,
    TRANSIENT,
    WALLTIME,
    Failure,
    read_failure,
    read_state,
)
from longhaul.artifacts.quarantine import add_to_quarantine, read_quarantine
from longhaul.errors import AllocationTooShort, BadNodesError
from longhaul.jobs.job_spec import LaunchSpec
from longhaul.runtime.failure_reports import classify_error
from longhaul.runtime.process_rank import Rank
from longhaul.scheduling import decide_after_attempt, slurm_client
from longhaul.scheduling.allocation import Allocation
from longhaul.scheduling.decide_after_attempt import AllocationEnd
from longhaul.scheduling.job_records import JobRecords
from longhaul.scheduling.slurm_client import JobInfo
from longhaul.scheduling.termination_signals import TerminationSignals
from tests.support.supervised_job import write_job

CRASH = Failure(TRANSIENT, "exited with code 143", "")


class Slurm:
    """The answers of Slurm, and what was asked of it."""

    def __init__(self) -> None:
        self.state, self.reason, self.preempted, self.restarts = "RUNNING", "None", False, 0
        self.refusal = ""
        self.unresponsive: list[str] = []
        self.down: list[str] = []
        self.partition: list[str] = []
        self.requeued: list[tuple[str, list[str]]] = []

    def job_info(self, job_id: str) -> JobInfo:
        return JobInfo(self.state, 2, "n[1-2]", None, self.preempted, None, "main", self.reason, self.restarts)

    def requeue(self, job_id: str, excluded: Any = ()) -> str:
        self.requeued.append((job_id, list(excluded)))
        return self.refusal


@pytest.fixture
def slurm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Slurm:
    found = Slurm()
    monkeypatch.setattr(slurm_client, "job_info", found.job_info)
    monkeypatch.setattr(slurm_client, "requeue", found.requeue)
    monkeypatch.setattr(slurm_client, "down_nodes", lambda nodes: [node for node in nodes if node in found.down])
    monkeypatch.setattr(slurm_client, "unresponsive_nodes", lambda nodes, timeout_s: found.unresponsive)
    monkeypatch.setattr(slurm_client, "partition_nodes", lambda partition: found.partition)
    monkeypatch.setattr(decide_after_attempt, "_REQUEUE_TIMEOUT_S", 0.0)
    monkeypatch.chdir(tmp_path)
    return found


@pytest.fixture
def spec(tmp_path: Path, slurm: Slurm) -> LaunchSpec:
    return write_job(tmp_path, "").model_copy(update={"slurm": True, "checkpoints": "weights"})


def begin(spec: LaunchSpec, signalled: bool = False) -> AllocationEnd:
    """Begin a new allocation of the job. signalled: the supervisor has received SIGTERM."""
    allocation = Allocation("7", ["n1", "n2"], "main")
    records, signals = JobRecords(spec), TerminationSignals(lambda: None)
    signals.received = signal.SIGTERM if signalled else None
    records.begin(allocation)
    records.write_running()
    return AllocationEnd(spec, allocation, records, signals)


def save_checkpoint(step: int) -> None:
    folder = Path(f"weights/abc/checkpoints/step-{step:08d}")
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")


def failure_of(spec: LaunchSpec) -> Failure:
    failure = read_failure(Path(spec.folder))
    assert failure is not None and failure.job_id == "7"
    return failure


def waiting_reason(spec: LaunchSpec) -> str:
    state = read_state(Path(spec.folder))
    assert state and state.state == "waiting" and read_failure(Path(spec.folder)) is None
    return state.reason


def short_of_time() -> Failure:
    """Return the failure that a rank reports if a restart comes too late in an allocation."""
    error = AllocationTooShort("the allocation ends in 1 s: nothing could be saved", "give the stage more minutes")
    return classify_error(error, Rank(0, 2, 0, 2, "n1"))


@pytest.mark.parametrize("reason", ["preempted", "the allocation ends"])
def test_early_stop_requeues_the_job_and_waits_for_the_signal(spec: LaunchSpec, slurm: Slurm, reason: str):
    add_to_quarantine(Path(spec.quarantine), {"n9": "down"}, "job 5")
    with pytest.raises(SystemExit) as ended:
        begin(spec, signalled=True).exit_stopped_early(reason)
    assert ended.value.code == 1 and slurm.requeued == [("7", ["n9"])]
    assert waiting_reason(spec) == reason


def test_site_that_forbids_requeue_leaves_the_job_to_the_next_run(spec: LaunchSpec, slurm: Slurm):
    with pytest.raises(SystemExit):
        begin(spec.model_copy(update={"requeue": False})).exit_stopped_early("preempted")
    assert slurm.requeued == [] and waiting_reason(spec) == "preempted"


def test_refused_requeue_leaves_the_job_to_the_next_run(spec: LaunchSpec, slurm: Slurm):
    slurm.refusal = "Requested operation is presently disabled"
    with pytest.raises(SystemExit):
        begin(spec).exit_stopped_early("preempted")
    assert waiting_reason(spec) == f"preempted; Slurm refused to requeue the job: {slurm.refusal}"


@pytest.mark.parametrize(
    ("state", "reason", "preempted", "failure_class"),
    [
        ("COMPLETING", "None", False, CANCELLED),
        ("CANCELLED", "None", False, CANCELLED),
        ("COMPLETING", "TimeLimit", False, WALLTIME),
        ("COMPLETING", "None", True, None),
        ("NODE_FAIL", "NodeDown", False, None),
    ],
)
def test_signal_means_what_slurm_says(
    spec: LaunchSpec, slurm: Slurm, state: str, reason: str, preempted: bool, failure_class: str | None
):
    slurm.state, slurm.reason, slurm.preempted = state, reason, preempted
    with pytest.raises(SystemExit):
        begin(spec, signalled=True).exit_stopped_early(SIGNALLED)
    assert slurm.requeued == []
    if failure_class:
        assert failure_of(spec).failure_class == failure_class
    else:
        assert waiting_reason(spec) == f"Slurm ended the allocation ({state})"


def test_crash_in_a_running_allocation_is_restartable(spec: LaunchSpec):
    begin(spec).exit_unless_restartable(CRASH)
    state = read_state(Path(spec.folder))
    assert state and state.state == "running"


def test_crash_in_an_allocation_that_slurm_requeues_is_no_failure(spec: LaunchSpec, slurm: Slurm):
    slurm.state, slurm.restarts = "COMPLETING", 1
    with pytest.raises(SystemExit):
        begin(spec).exit_unless_restartable(CRASH)
    assert waiting_reason(spec) == "Slurm ended the allocation (COMPLETING)"


def test_node_that_slurm_lost_is_named_and_quarantined(spec: LaunchSpec, slurm: Slurm):
    """Slurm may find that a node is down, and requeue the job, before the first node's processes have noticed it."""
    slurm.state, slurm.restarts, slurm.down = "COMPLETING", 1, ["n2", "n5"]
    with pytest.raises(SystemExit):
        begin(spec, signalled=True).exit_unless_restartable(CRASH)
    assert waiting_reason(spec) == "Slurm ended the allocation (COMPLETING): n2 is down"
    (entry,) = read_quarantine(Path(spec.quarantine)).nodes
    assert (entry["node"], entry.get("cause")) == ("n2", "down while the job ran on it")


def test_permanent_failure_is_recorded(spec: LaunchSpec):
    with pytest.raises(SystemExit):
        begin(spec).exit_unless_restartable(Failure(PERMANENT, "disk full", "free space"))
    assert failure_of(spec).failure_class == PERMANENT and failure_of(spec).key


@pytest.mark.parametrize(
    ("failure", "more"),
    [
        (CRASH, ""),
        (Failure(NODE, "rank 1 on n2 sent no heartbeat for 6 s", ""), "; rank 1 on n2 sent no heartbeat for 6 s"),
    ],
)
def test_unresponsive_node_is_quarantined_and_the_job_requeued_without_it(
    spec: LaunchSpec, slurm: Slurm, failure: Failure, more: str
):
    slurm.unresponsive = ["n2"]
    with pytest.raises(SystemExit):
        begin(spec).exit_unless_restartable(failure)
    (entry,) = read_quarantine(Path(spec.quarantine)).nodes
    assert (entry["node"], entry.get("cause")) == ("n2", f"does not respond{more}") and "job 7" in entry.get(
        "evidence", ""
    )
    assert slurm.requeued == [("7", ["n2"])] and waiting_reason(spec) == f"n2 does not respond{more}"


def test_unresponsive_nodes_without_spares_end_the_job_with_the_reason_once(spec: LaunchSpec, slurm: Slurm):
    slurm.partition, spec = ["n1", "n2", "n3"], spec.model_copy(update={"nodes": 3})
    slurm.unresponsive = ["n2", "n3"]
    with pytest.raises(SystemExit):
        begin(spec).exit_unless_restartable(
            Failure(NODE, "n1: rank 0: no end of the rendezvous after 600 s", "test the network")
        )
    assert failure_of(spec).cause == (
        "3 nodes are needed; partition main has 3, of which 2 are quarantined: n2, n3; "
        "n2, n3 do not respond; n1: rank 0: no end of the rendezvous after 600 s"
    )
    assert failure_of(spec).remedy.startswith("test the network; remove repaired nodes")
    assert {entry.get("cause") for entry in read_quarantine(Path(spec.quarantine)).nodes} == {"does not respond"}


def test_bad_node_is_quarantined_and_the_job_requeued_without_it(spec: LaunchSpec, slurm: Slurm):
    """A node outside of the allocation comes from a damaged report; it is not excluded."""
    error = BadNodesError("n2 and n5 are slow", "tell the administrators", {"n2": "n2 is slow", "n5": "n5 is slow"})
    with pytest.raises(SystemExit):
        begin(spec).exit_unless_restartable(classify_error(error, Rank(0, 2, 0, 2, "n1")))
    (entry,) = read_quarantine(Path(spec.quarantine)).nodes
    assert (entry["node"], entry.get("cause")) == ("n2", "n2 is slow")
    assert slurm.requeued == [("7", ["n2"])] and "slow" in waiting_reason(spec)


def test_bad_nodes_without_spares_end_the_job_with_all_problems_once_and_both_remedies(
    spec: LaunchSpec, slurm: Slurm, capsys: pytest.CaptureFixture[str]
):
    """A check may also have found problems of no node."""
    slurm.partition, spec = ["n1", "n2"], spec.model_copy(update={"nodes": 2})
    add_to_quarantine(Path(spec.quarantine), {"n1": "maintenance on Friday"}, "a user")
    problems = {"n1": "GPU 3 is lost", "n2": "its clock is wrong"}
    message = "not ready:\n  - n1: GPU 3 is lost\n  - n2: its clock is wrong\n  - the link between n1 and n2 is slow"
    error = BadNodesError(message, "repair them; the full report is nodes.json", problems)
    with pytest.raises(SystemExit):
        begin(spec).exit_unless_restartable(classify_error(error, Rank(0, 2, 0, 2, "n1")))
    assert read_quarantine(Path(spec.quarantine)).node_names == ("n1", "n2") and slurm.requeued == []
    assert "n2: its clock is wrong; excluded from later jobs (" in capsys.readouterr().out
    assert failure_of(spec).failure_class == ENVIRONMENT and failure_of(spec).cause == (
        f"2 nodes are needed; partition main has 2, of which 2 are quarantined: n1, n2\n{message}"
    )
    assert failure_of(spec).remedy == (
        "repair them; the full report is nodes.json; "
        "remove repaired nodes from results/quarantine.json (longhaul nodes --release NODE), "
        "or name a partition with spare nodes in the site file; then run the same command again to resume"
    )


@pytest.mark.parametrize("requeue", [True, False])
def test_shortage_of_nodes_is_a_permanent_failure(spec: LaunchSpec, slurm: Slurm, requeue: bool):
    """Also at a site that forbids requeue: Snakemake would submit the job again, and sbatch would refuse it."""
    slurm.partition, spec = ["n1", "n2"], spec.model_copy(update={"nodes": 2, "requeue": requeue})
    with pytest.raises(SystemExit):
        begin(spec).requeue("n2 does not respond", ["n2"])
    assert slurm.requeued == [] and failure_of(spec).failure_class == ENVIRONMENT
    assert failure_of(spec).cause == (
        "2 nodes are needed; partition main has 2, of which 1 is quarantined: n2; n2 does not respond"
    )
    assert spec.quarantine in failure_of(spec).remedy


def test_second_allocation_in_a_row_without_a_checkpoint_is_a_permanent_failure(spec: LaunchSpec):
    classes = []
    for _ in range(2):
        with pytest.raises(SystemExit):
            begin(spec).exit_unless_restartable(short_of_time())
        assert "the allocation ends in 1 s" in failure_of(spec).cause and failure_of(spec).remedy
        classes.append(failure_of(spec).failure_class)
    assert classes == [WALLTIME, PERMANENT] and "twice in a row" in failure_of(spec).cause


def test_time_limit_before_a_checkpoint_names_the_cause(spec: LaunchSpec, slurm: Slurm):
    slurm.state, slurm.reason = "TIMEOUT", "TimeLimit"
    with pytest.raises(SystemExit):
        begin(spec, signalled=True).exit_unless_restartable(CRASH)
    assert failure_of(spec).failure_class == WALLTIME
    assert failure_of(spec).cause == "the allocation ended before a checkpoint was saved"


def test_allocation_that_ended_otherwise_in_between_restarts_the_count(spec: LaunchSpec, slurm: Slurm):
    with pytest.raises(SystemExit):
        begin(spec).exit_unless_restartable(short_of_time())
    with pytest.raises(SystemExit):
        begin(spec, signalled=True).exit_stopped_early("preempted")
    with pytest.raises(SystemExit):
        begin(spec).exit_unless_restartable(short_of_time())
    assert failure_of(spec).failure_class == WALLTIME


def test_allocation_with_a_new_checkpoint_is_followed_by_the_next_one(spec: LaunchSpec, slurm: Slurm):
    end = begin(spec)
    save_checkpoint(5)
    with pytest.raises(SystemExit):
        end.exit_unless_restartable(short_of_time())
    assert slurm.requeued == [("7", [])] and waiting_reason(spec) == "the allocation ends"
