"""The fault matrix: which fault is injected into a run, when, and how the run must end."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from tests.faults import broken_environments as environment
from tests.faults import damaged_files as damage
from tests.faults.broken_environments import EXPORTS, SMALL
from tests.faults.faulted_run import EXPORT, NAN_BATCHES, TOKENIZE, TRAIN, FaultedRun

THE_START = "the start"
POLICIES, CONTROLLER = ("skip", "roll_back"), "time limit of the controller job"
_PHASES = {"tokenizing": TOKENIZE, "exporting": EXPORT}


@dataclass(frozen=True)
class FaultCase:
    """One fault. The run must finish afterwards; if the fault ends the command, the same command is given once more.

    when:          queued | starting | training | saving | tokenizing | exporting | the start: `before_start` is the fault
    inject:        injects the fault when `when` holds
    ends_command:  the fault ends the main Snakemake process, or a user ends the job
    fails_with:    cause of the failure of the first command, or of the second one if the fault ends the first; it needs a repair
    last_message:  part of what the first command, which does not retry, prints at its end
    before_start:  called before the first command
    before_second: called before the second command
    remedy:        called before the command that must succeed, if `fails_with` is not repaired by `before_second`
    mount:         folder of the run that is a small file system of its own
    checks:        keys of the config's `checks`
    makes:         phase whose results are compared, if `when` does not say it
    logs:          part of the logs
    min_attempts:  with fewer attempts the fault came too late to test anything
    cuts_off_node: a node stays unreachable; its processes must end when it is reachable again
    quick:         part of `make test`
    """

    name: str
    when: str
    inject: Callable[[FaultedRun], None] = lambda run: None
    ends_command: bool = False
    fails_with: str = ""
    last_message: str = ""
    before_start: Callable[[FaultedRun], None] = lambda run: None
    before_second: Callable[[FaultedRun], None] = lambda run: None
    remedy: Callable[[FaultedRun], None] | None = None
    mount: str = ""
    checks: dict[str, float] = field(default_factory=dict)
    makes: str = ""
    logs: str = ""
    min_attempts: int = 2
    cuts_off_node: bool = False
    partition: str = "main"
    nodes: int = 2
    quick: bool = False

    @property
    def phase(self) -> str:
        return self.makes or _PHASES.get(self.when, TRAIN)


def kill_rank(index: int) -> Callable[[FaultedRun], None]:
    return lambda run: run.ranks()[index].kill()


def stop_rank(index: int) -> Callable[[FaultedRun], None]:
    """Hang a rank: the process exists and does nothing."""
    return lambda run: run.ranks()[index].suspend()


def slow_rank(index: int, seconds: float = 12.0, stopped_s: float = 0.015) -> Callable[[FaultedRun], None]:
    """Slow a rank down for `seconds`: it runs for 5 ms, then it is stopped for `stopped_s`, and so on."""

    def inject(run: FaultedRun) -> None:
        process, until = run.ranks()[index], time.monotonic() + seconds
        while time.monotonic() < until and process.is_running():
            process.suspend()
            time.sleep(stopped_s)
            process.resume()
            time.sleep(0.005)

    return inject


def kill_supervisor(run: FaultedRun) -> None:
    run.processes("longhaul", "supervise")[0].kill()


def kill_nested_snakemake(run: FaultedRun) -> None:
    supervisor = run.processes("longhaul", "supervise")[0]
    nested = [p for p in supervisor.parents() if "snakemake" in p.cmdline() and "--mode" in p.cmdline()]
    nested[0].kill()


def end_main(number: signal.Signals) -> Callable[[FaultedRun], None]:
    return lambda run: run.snakemake_process().send_signal(number)


def scancel(run: FaultedRun) -> None:
    run.slurm("scancel", run.job_id)


def occupy(run: FaultedRun) -> None:
    """Occupy all nodes with another job."""
    wanted = [f"--nodes={len(run.cluster.node_names)}", "--exclusive", "--time=10", "--output=/dev/null"]
    run.slurm("sbatch", "--job-name=occupant", *wanted, "--wrap=sleep 600")
    run.wait_until(lambda: not run.queued_jobs())


def release_nodes(run: FaultedRun) -> None:
    run.slurm("scancel", "--name=occupant")


def scancel_queued(run: FaultedRun) -> None:
    run.slurm("scancel", *run.queued_jobs())


def requeue(run: FaultedRun) -> None:
    run.slurm("scontrol", "requeue", run.job_id)


def preempt(run: FaultedRun) -> None:
    """Submit a job of a few seconds to the urgent partition that needs all cores of the run's nodes."""
    nodes = run.state()["nodes"]
    wanted = [f"--nodes={len(nodes)}", f"--nodelist={','.join(nodes)}", "--exclusive", "--output=/dev/null"]
    run.slurm("sbatch", "--partition=urgent", *wanted, "--wrap=sleep 3")


def shorten_allocation(run: FaultedRun, job_id: str | None = None) -> None:
    """End the allocation of the stage's job, or of another job, in five seconds."""
    end = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() + 5))
    run.slurm("scontrol", "update", f"JobId={job_id or run.job_id}", f"EndTime={end}")


def power_off(index: int) -> Callable[[FaultedRun], None]:
    return lambda run: run.cluster.power_off(run.state()["nodes"][index])


def unplug_for(index: int, seconds: float) -> Callable[[FaultedRun], None]:
    def inject(run: FaultedRun) -> None:
        node = run.state()["nodes"][index]
        run.cluster.unplug(node)
        time.sleep(seconds)
        run.cluster.plug(node)

    return inject


def unplug(index: int) -> Callable[[FaultedRun], None]:
    return lambda run: run.cluster.unplug(run.state()["nodes"][index])


def restart_slurmctld(run: FaultedRun) -> None:
    run.cluster.restart_slurmctld()


def restart_slurmd(run: FaultedRun) -> None:
    run.cluster.restart_slurmd(run.state()["nodes"][1])


def nan_fault(policy: str) -> str:
    return f"NaN in {len(NAN_BATCHES)} batches, {policy}"


OTHER_FAULTS = (*map(nan_fault, POLICIES), CONTROLLER)
"""Faults that have a test of their own, because they need another config or another main process."""

_ENDED = {"ends_command": True}
_CANCELLED = {**_ENDED, "last_message": "cancelled by scancel"}

CASES = [
    FaultCase("kill -9 of a rank", "starting", kill_rank(1), min_attempts=1),
    FaultCase("kill -9 of a rank", "training", kill_rank(1)),
    FaultCase("kill -9 of rank 0", "training", kill_rank(0)),
    FaultCase("kill -9 of a rank", "saving", kill_rank(1), quick=True),
    FaultCase("kill -9 of rank 0", "saving", kill_rank(0)),
    FaultCase("kill -9 of the process", "tokenizing", kill_rank(0)),
    FaultCase("kill -9 of the process", "exporting", kill_rank(0)),
    FaultCase("kill -9 of the supervisor", "training", kill_supervisor),
    FaultCase("kill -9 of the supervisor", "saving", kill_supervisor),
    FaultCase("kill -9 of the supervisor", "tokenizing", kill_supervisor),
    FaultCase("kill -9 of the supervisor", "exporting", kill_supervisor),
    FaultCase("kill -9 of the nested snakemake", "training", kill_nested_snakemake),
    FaultCase("kill -9 of the nested snakemake", "saving", kill_nested_snakemake),
    FaultCase("kill -9 of the main snakemake", "training", end_main(signal.SIGKILL), **_ENDED, min_attempts=1),
    FaultCase("kill -9 of the main snakemake", "saving", end_main(signal.SIGKILL), **_ENDED, min_attempts=1),
    FaultCase("kill -9 of the main snakemake", "tokenizing", end_main(signal.SIGKILL), **_ENDED, min_attempts=1),
    FaultCase("kill -9 of the main snakemake", "exporting", end_main(signal.SIGKILL), **_ENDED, min_attempts=1),
    FaultCase("SIGINT of the main snakemake", "training", end_main(signal.SIGINT), **_ENDED),
    FaultCase("SIGTERM of the main snakemake", "training", end_main(signal.SIGTERM), **_ENDED, min_attempts=1),
    FaultCase(
        "scancel",
        "queued",
        scancel_queued,
        **_CANCELLED,
        before_start=occupy,
        before_second=release_nodes,
        min_attempts=1,
    ),
    FaultCase("scancel", "training", scancel, **_CANCELLED, quick=True),
    FaultCase("scancel", "saving", scancel, **_CANCELLED),
    FaultCase("scontrol requeue", "training", requeue),
    FaultCase("scontrol requeue", "saving", requeue),
    FaultCase("scontrol requeue", "tokenizing", requeue),
    FaultCase("preemption", "training", preempt),
    FaultCase("preemption", "saving", preempt),
    FaultCase("preemption of one process", "training", preempt, nodes=1),
    FaultCase("preemption with grace", "training", preempt, partition="graceful"),
    FaultCase("preemption that cancels", "training", preempt, partition="killable"),
    FaultCase("preemption that cancels, with grace", "training", preempt, partition="killable-graceful"),
    FaultCase("time limit", "training", shorten_allocation),
    FaultCase("time limit", "saving", shorten_allocation),
    FaultCase("time limit of one process", "training", shorten_allocation, nodes=1),
    FaultCase("power-off of a node", "training", power_off(1), quick=True),
    FaultCase("power-off of the first node", "training", power_off(0)),
    FaultCase("power-off of a node", "saving", power_off(1)),
    FaultCase("power-off of the node", "tokenizing", power_off(0)),
    FaultCase("power-off of the node", "exporting", power_off(0)),
    FaultCase("link unplugged for 10 s", "training", unplug_for(1, 10)),
    FaultCase("link unplugged for 10 s", "saving", unplug_for(1, 10)),
    FaultCase("link unplugged for good", "training", unplug(1), cuts_off_node=True),
    FaultCase("link of the first node unplugged for good", "training", unplug(0), cuts_off_node=True),
    FaultCase("slurmctld restarted", "training", restart_slurmctld, min_attempts=1),
    FaultCase("slurmctld restarted", "saving", restart_slurmctld, min_attempts=1),
    FaultCase("slurmd restarted", "training", restart_slurmd, min_attempts=1),
    FaultCase("slurmd restarted", "saving", restart_slurmd, min_attempts=1),
    FaultCase("a hung rank", "training", stop_rank(1)),
    FaultCase("a hung rank 0", "training", stop_rank(0)),
    FaultCase("a slow rank", "training", slow_rank(1), logs="straggler at step", min_attempts=1),
    FaultCase(
        "disk full",
        "training",
        environment.fill_disk(SMALL),
        fails_with="disk full",
        last_message="disk full",
        before_second=environment.free_disk(SMALL),
        mount=SMALL,
    ),
    FaultCase(
        "disk of the exports full",
        THE_START,
        before_start=environment.fill_disk(EXPORTS, left_bytes=300_000),
        fails_with="disk full: an export needs",
        last_message=EXPORTS,
        before_second=environment.free_disk(EXPORTS),
        mount=EXPORTS,
        makes=EXPORT,
    ),
    FaultCase(
        "disk too small, then freed",
        THE_START,
        before_start=environment.fill_disk(SMALL),
        fails_with="GB free, checks.min_disk_free_gb is 0.02",
        before_second=environment.free_disk(SMALL),
        mount=SMALL,
        checks={"min_disk_free_gb": 0.02},
    ),
    FaultCase(
        "weights folder not writable, then writable",
        THE_START,
        before_start=environment.seal_disk,
        fails_with="Read-only file system",
        before_second=environment.unseal_disk,
        mount=SMALL,
    ),
    FaultCase(
        "clock wrong, then right",
        THE_START,
        before_start=environment.set_clock_wrong,
        fails_with="clock is +3600",
        before_second=environment.set_clock_right,
    ),
    FaultCase(
        "host names not resolved",
        THE_START,
        before_start=environment.hide_host_names,
        fails_with="cannot resolve n",
        before_second=environment.use_addresses,
    ),
    FaultCase(
        "newest checkpoint damaged",
        "training",
        scancel,
        **_CANCELLED,
        before_second=damage.damage_newest_checkpoint,
        logs="it is not used",
    ),
    FaultCase(
        "payload in the newest checkpoint",
        "training",
        scancel,
        **_CANCELLED,
        before_second=damage.put_payload_in_newest_checkpoint,
        fails_with="is not read, because it holds more than tensors",
        remedy=damage.move_newest_checkpoint_away,
    ),
    FaultCase(
        "token shard damaged",
        "training",
        scancel,
        **_CANCELLED,
        before_second=damage.damage_token_shard,
        fails_with="does not have the hash",
        remedy=damage.run_remedy(TRAIN),
    ),
    FaultCase(
        "tokenizer damaged",
        THE_START,
        before_start=damage.damage_tokenizer,
        fails_with="does not have the hash",
        before_second=damage.run_remedy(EXPORT),
        makes=EXPORT,
    ),
    FaultCase("records torn", "training", scancel, **_CANCELLED, before_second=damage.tear_records),
]
