"""Runs one job to its end: its steps, their failures, and the way into the next allocation.

A crash of a process restarts the steps in place, in the same allocation. A node that no longer answers is quarantined,
and the job goes back into the queue without it. A training that left for the end of its allocation is queued again.
What would only fail again ends the job, with its reason in failure.json.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from longhaul.artifacts.job_state import (
    CANCELLED,
    NODE,
    PERMANENT,
    SIGNALLED,
    TRANSIENT,
    WALLTIME,
    Failure,
    State,
    clear_attempt,
    invocation,
    launch_key,
    now,
    rank_failures,
    read_failure,
    read_outcome,
    read_state,
    this_host,
)
from longhaul.artifacts.quarantine import quarantine, read_quarantine
from longhaul.errors import UserError
from longhaul.jobs.specs import LaunchSpec
from longhaul.scheduling import slurm_client
from longhaul.scheduling.deadline import DeadlineKeeper
from longhaul.scheduling.slurm_client import JobInfo, SlurmSilentError

_PROBE_S = 20.0
_SLURM_BACK_S = 600.0
_REQUEUE_S = 300.0


def run(job: LaunchSpec) -> None:
    """Ends when the job is done; SystemExit(1) when Snakemake must know that it is not, with the reason printed and kept."""
    Supervisor(job).run()


class Supervisor:
    """One job in one allocation, or on this machine where there is no Slurm."""

    def __init__(self, job: LaunchSpec) -> None:
        self.job, self.folder = job, Path(job.folder)
        self.job_id = os.environ.get("SLURM_JOB_ID") if job.slurm else None
        self.key, self.invocation = launch_key(job.inputs, job.data), invocation(Path("results"), job.run)
        self.nodes = [this_host()]
        self.partition, self.queued_since_s, self.restarts = "", None, 0
        self.earlier_failure = read_failure(self.folder)
        self.leg, self.reached = 1, self._progress()
        self.ended_by: int | None = None
        self._meetings = 0
        self._child: subprocess.Popen[bytes] | None = None

    def run(self) -> None:
        self._refuse_to_fail_again()
        if self.job.slurm:
            self._join_allocation()
        earlier = read_state(self.folder)
        self.leg = earlier.leg + 1 if earlier and earlier.state != "done" else 1
        self._blame_nodes_of(earlier)
        (self.folder / "failure.json").unlink(missing_ok=True)
        self._note("running", queued_since_s=self.queued_since_s)
        with self._signals(), self._deadline() as keeper:
            self._keeper = keeper
            self._attempts()
        self._note("done")

    # Before the first attempt

    def _refuse_to_fail_again(self) -> None:
        failure = self.earlier_failure
        if failure and failure.is_current(self.key, self.invocation):
            print(f"{self.job.name} failed at {failure.time} and would only fail again:\n{failure.told()}", flush=True)
            print(f"  to try all the same: longhaul retry {self.folder}", flush=True)
            sys.exit(1)

    def _join_allocation(self) -> None:
        """Checks that the allocation is the planned one, and finds its nodes."""
        if not self.job_id:
            raise UserError(
                "SLURM_JOB_ID is not set: this is no allocation",
                "Submit job.sbatch, or run snakemake --profile profiles/slurm",
            )
        info = _patiently(self.job_id)
        if info.nodes != self.job.nodes:
            raise UserError(
                f"the allocation has {info.nodes} nodes; the plan says {self.job.nodes}",
                "drop --set-resources, or set nodes in the config",
            )
        self.nodes = slurm_client.hostnames(info.node_list)
        self.partition, self.restarts = info.partition, info.restarts
        if info.submit_s is not None:
            self.queued_since_s = info.submit_s + slurm_client.clock_ahead_s()
        self._wait_for_other_jobs()

    def _wait_for_other_jobs(self) -> None:
        """Another job that still works on this one: this one ends, and its next submission waits in the queue for it."""
        state = read_state(self.folder)
        if state is None or not state.holds_job or state.job_id == self.job_id:
            return
        other = _patiently(str(state.job_id), unknown_is_gone=True)
        if not other.has_ended:
            print(f"job {state.job_id} works on {self.job.name} ({other.state}); this one leaves it to it", flush=True)
            sys.exit(1)

    def _blame_nodes_of(self, earlier: State | None) -> None:
        """Quarantines nodes of an allocation that was taken away while they went down."""
        if self.job.slurm and earlier and earlier.state == "running":
            self._quarantine(slurm_client.down_nodes(earlier.nodes), "down after the job ran on it")

    def _quarantine(self, nodes: list[str], cause: str) -> None:
        if nodes:
            print(f"{', '.join(nodes)}: {cause}; later jobs leave it out ({self.job.quarantine})", flush=True)
            quarantine(Path(self.job.quarantine), nodes, cause, f"{self.job.name}, job {self.job_id}")

    # Attempts

    def _attempts(self) -> None:
        crashes, reached = 0, self._progress()
        while (failure := self._attempt()) is not None:
            self._end_if_over(failure)
            crashes = 1 if self._progress() > reached else crashes + 1
            reached = self._progress()
            if crashes > self.job.max_restarts:
                self._fail_after(crashes, failure)
            print(
                f"{failure.told()}\nrestarted in place ({crashes} of {self.job.max_restarts} without progress)",
                flush=True,
            )
            self._event("restarted", failure.cause)

    def _attempt(self) -> Failure | None:
        """Runs the steps; None when they are done."""
        clear_attempt(self.folder)
        for step in self.job.steps:
            code = self._execute(list(step.command))
            if outcome := read_outcome(self.folder):
                self._next_allocation(outcome.reason)
            if code:
                said = rank_failures(self.folder)
                return said[0] if said else Failure(TRANSIENT, f"{step.title}: ended with {code}", "", host=this_host())
        return None

    def _execute(self, command: list[str]) -> int:
        with subprocess.Popen(command, env=self._environment(), start_new_session=not self.job.slurm) as child:
            self._child = child
            if self.ended_by:  # by a signal that came before the child was known
                self._pass_on()
            code = child.wait()
        self._child = None
        return code

    def _environment(self) -> dict[str, str]:
        """Where ranks meet: below the ephemeral ports, and not where a process of the last attempt may still listen."""
        if not self.job.slurm:
            return dict(os.environ)
        self._meetings += 1
        port = 20000 + (int(self.job_id or 0) * 16 + self.leg * 4 + self._meetings) % 12000
        print(f"job {self.job_id}: {len(self.nodes)} nodes, rendezvous {self.nodes[0]}:{port}", flush=True)
        return {**os.environ, "MASTER_ADDR": self.nodes[0], "MASTER_PORT": str(port)}

    def _progress(self) -> int:
        """The newest step that a checkpoint holds."""
        root = self.job.checkpoints
        found = Path(root).glob("*/checkpoints/step-????????/manifest.json") if root else ()
        return max((int(path.parent.name.removeprefix("step-")) for path in found), default=0)

    # What ends an allocation

    def _end_if_over(self, failure: Failure) -> None:
        """Ends the job when the failure is permanent, the allocation is over, or one of its nodes is gone."""
        if failure.failure_class == PERMANENT:
            self._fail(failure)
        if not self.job.slurm:
            if self.ended_by:
                self._fail(replace(failure, failure_class=CANCELLED, cause=f"ended by signal {self.ended_by}"))
            return
        self._end_if_told(failure)
        if failure.failure_class == WALLTIME:
            self._go_on_elsewhere(failure)
        silent = self._silent_nodes()
        self._end_if_told(failure)  # of an allocation that is being taken away no node answers
        if silent:
            self._quarantine(silent, failure.cause if failure.failure_class == NODE else "does not answer")
            self._next_allocation(f"{', '.join(silent)} does not answer", silent)

    def _end_if_told(self, failure: Failure) -> None:
        info = self._info()
        if self.ended_by or (info and info.state != "RUNNING"):
            self._end_as_told(failure)

    def _end_as_told(self, failure: Failure) -> NoReturn:
        """SIGTERM is all that a batch script hears of scancel, a requeue and the time limit; Slurm tells them apart."""
        info = self._info()
        if info and info.is_cancelled(self.restarts):
            cause = "cancelled by scancel"
            self._fail(replace(failure, failure_class=CANCELLED, cause=cause, remedy="the next run goes on"))
        if info and info.is_at_its_limit:
            self._fail_at_the_limit(failure)
        self._leave(f"Slurm ended the allocation ({info.state if info else 'it does not say why'})")

    def _go_on_elsewhere(self, failure: Failure) -> NoReturn:
        """Too little is left of this allocation for a restart; whether it was ever enough, its saves say."""
        if self._progress() > self.reached:
            self._next_allocation("the allocation ends")
        self._fail_at_the_limit(failure)

    def _fail_at_the_limit(self, failure: Failure) -> NoReturn:
        """Once, it may have been bad luck; a second allocation in which nothing was saved will not be the last one."""
        before = self.earlier_failure
        cause = failure.cause if failure.failure_class == WALLTIME else "the allocation ended before a save"
        again = before and before.failure_class == WALLTIME and before.key == self.key
        if again and self._progress() == self.reached:
            remedy = "give it more minutes, or save more often (checkpoints.every_steps)"
            self._fail(replace(failure, failure_class=PERMANENT, cause=f"{cause}, twice in a row", remedy=remedy))
        self._fail(replace(failure, failure_class=WALLTIME, cause=cause))

    def _silent_nodes(self) -> list[str]:
        """Of the other nodes: this one is at work."""
        others = [node for node in self.nodes if node != this_host()]
        if not others:
            return []
        return slurm_client.down_nodes(others) or slurm_client.silent_nodes(others, _PROBE_S)

    def _info(self) -> JobInfo | None:
        """None when Slurm does not say."""
        try:
            return slurm_client.job_info(str(self.job_id))
        except SlurmSilentError:
            return None

    def _next_allocation(self, reason: str, excluded: list[str] | None = None) -> NoReturn:
        """Requeues this very job, which Snakemake sees running on; where that is not allowed, its retries submit another."""
        if self.job.slurm and reason == SIGNALLED:
            self._end_as_told(Failure(CANCELLED, reason, "", host=this_host()))
        if not self.job.slurm or not self.job.requeue:
            self._leave(reason)
        known = read_quarantine(Path(self.job.quarantine)).names
        left_out = [*known, *(node for node in excluded or [] if node not in known)]
        self._require_nodes(left_out)
        self._note("waiting", reason)
        if refused := slurm_client.requeue(str(self.job_id), left_out):
            self._leave(f"{reason}; requeue was refused: {refused}")
        print(f"{self.job.name}: {reason}; job {self.job_id} is queued again", flush=True)
        self._wait_for_the_end()

    def _require_nodes(self, left_out: list[str]) -> None:
        """A job that no node is left for would wait in the queue for ever."""
        if missing := slurm_client.too_few_nodes(self.partition, self.job.nodes, left_out):
            remedy = f"take those that are mended off {self.job.quarantine}; the next run goes on"
            self._fail(Failure(PERMANENT, missing, remedy, host=this_host()))

    def _wait_for_the_end(self) -> NoReturn:
        """Until Slurm sends SIGTERM, lest the job counts as failed before it is queued; then nothing of it stays behind."""
        deadline = time.monotonic() + _REQUEUE_S
        while self.ended_by is None and time.monotonic() < deadline:
            time.sleep(0.2)
        sys.exit(1)

    def _leave(self, reason: str) -> NoReturn:
        self._note("waiting", reason)
        print(f"{self.job.name}: {reason}; the next run goes on", flush=True)
        sys.exit(1)

    def _fail_after(self, crashes: int, failure: Failure) -> NoReturn:
        if self.job.max_restarts:
            cause = f"{crashes} crashes without a new checkpoint, the last one: {failure.cause}"
            remedy = failure.remedy or f"look into the log; then: longhaul retry {self.folder}"
            failure = replace(failure, failure_class=PERMANENT, cause=cause, remedy=remedy)
        self._fail(failure)

    def _fail(self, failure: Failure) -> NoReturn:
        self._leave_to_successor()
        failure = replace(failure, key=self.key, invocation=self.invocation, job_id=self.job_id)
        failure.write(self.folder / "failure.json")
        self._note("failed", f"{failure.failure_class}: {failure.cause}")
        print(failure.told(), flush=True)
        sys.exit(1)

    # Records and signals

    def _leave_to_successor(self) -> None:
        """A node that was cut off may bring this process back when the job has long been running elsewhere."""
        state = read_state(self.folder)
        if state and (state.job_id, state.leg) != (self.job_id, self.leg):
            print(
                f"{self.job.name} goes on in job {state.job_id}, leg {state.leg}; this one has no more to say",
                flush=True,
            )
            sys.exit(1)

    def _note(self, state: str, reason: str = "", **values: float | None) -> None:
        if state != "running":
            self._leave_to_successor()
        State(state, self.job_id, this_host(), self.nodes, self.leg, now(), reason).write(self.folder / "state.json")
        self._event(state, reason, **values)

    def _event(self, event: str, reason: str, **values: float | None) -> None:
        """A line of history.jsonl: what the stage's time went into (goodput.py reads it)."""
        line = {
            "time_s": round(time.time(), 3),
            "event": event,
            "leg": self.leg,
            "job_id": self.job_id,
            "reason": reason,
            **values,
        }
        with (self.folder / "history.jsonl").open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")

    def _deadline(self):
        return (
            DeadlineKeeper(str(self.job_id), self.folder, self.job.deadline_poll_interval_s)
            if self.job.slurm
            else nullcontext()
        )

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """TERM and INT are noted and passed on, as the processes below save and leave; then it is decided what comes next."""

        def note(number: int, _: object) -> None:
            self.ended_by = number
            if self.job.slurm and self._keeper:
                self._keeper.ask()
            else:
                self._pass_on()

        self._keeper = None
        before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _pass_on(self) -> None:
        """SIGTERM for the processes below; in a job Slurm sends it itself."""
        if self._child and not self.job.slurm:
            os.killpg(self._child.pid, signal.SIGTERM)


def _patiently(job_id: str, unknown_is_gone: bool = False) -> JobInfo:
    """Asks until Slurm answers: a controller that restarts is no dead job."""
    deadline = time.monotonic() + _SLURM_BACK_S
    while True:
        try:
            info = slurm_client.job_info(job_id)
        except SlurmSilentError as error:
            if time.monotonic() > deadline:
                raise UserError(
                    f"Slurm has not answered for {_SLURM_BACK_S:g} s: {error}", "look at slurmctld"
                ) from None
            time.sleep(5)
            continue
        if info is None and not unknown_is_gone:
            raise UserError(
                f"Slurm knows no job {job_id}", "Submit job.sbatch, or run snakemake --profile profiles/slurm"
            )
        return info or JobInfo("COMPLETED", 0, "", None, False)
