"""The fault matrix: what is done to a run, when, and how the run must end."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass

from tests.faults.faulted_run import CONVERT, TOKENIZE, TRAIN, FaultedRun

_PHASES = {"tokenizing": TOKENIZE, "converting": CONVERT}


@dataclass(frozen=True)
class Cell:
    """`act` is done when `when` is true; then the same command must finish, once more where it was ended from outside."""

    name: str
    when: str  # queued | starting | training | saving | tokenizing | converting
    act: Callable[[FaultedRun], None]
    ended_from_outside: bool = False
    fails_with: str = ""
    told_last: str = ""  # by the first run, which does not try again
    before: Callable[[FaultedRun], None] = lambda run: None
    before_again: Callable[[FaultedRun], None] = lambda run: None
    says: str = ""  # in the log
    attempts: int = 2  # at least: else the fault came too late to test anything
    cuts_off: bool = False  # a node stays unreachable: what runs there ends when it is back
    partition: str = "main"
    nodes: int = 2
    quick: bool = False

    @property
    def phase(self) -> str:
        return _PHASES.get(self.when, TRAIN)


def kill_rank(index: int) -> Callable[[FaultedRun], None]:
    return lambda run: run.ranks()[index].kill()


def stop_rank(index: int) -> Callable[[FaultedRun], None]:
    """The process hangs: it is there, and does nothing."""
    return lambda run: run.ranks()[index].suspend()


def slow_rank(index: int, seconds: float = 12.0, stopped_s: float = 0.015) -> Callable[[FaultedRun], None]:
    """The process runs for 5 ms, then stands still for `stopped_s`, and so on."""

    def act(run: FaultedRun) -> None:
        process, until = run.ranks()[index], time.monotonic() + seconds
        while time.monotonic() < until and process.is_running():
            process.suspend()
            time.sleep(stopped_s)
            process.resume()
            time.sleep(0.005)

    return act


def kill_launcher(run: FaultedRun) -> None:
    run.processes("longhaul", "supervise")[0].kill()


def kill_nested_snakemake(run: FaultedRun) -> None:
    launcher = run.processes("longhaul", "supervise")[0]
    nested = [p for p in launcher.parents() if "snakemake" in p.cmdline() and "--mode" in p.cmdline()]
    nested[0].kill()


def end_main(number: signal.Signals) -> Callable[[FaultedRun], None]:
    return lambda run: run.snakemake_process().send_signal(number)


def scancel(run: FaultedRun) -> None:
    run.slurm("scancel", run.job_id)


def occupy(run: FaultedRun) -> None:
    """A job holds all nodes."""
    wanted = [f"--nodes={len(run.cluster.node_names)}", "--exclusive", "--output=/dev/null"]
    run.slurm("sbatch", "--job-name=occupant", *wanted, "--wrap=sleep 600")
    run.until(lambda: not run.queued_jobs())


def leave(run: FaultedRun) -> None:
    run.slurm("scancel", "--name=occupant")


def scancel_queued(run: FaultedRun) -> None:
    run.slurm("scancel", *run.queued_jobs())


def requeue(run: FaultedRun) -> None:
    run.slurm("scontrol", "requeue", run.job_id)


def preempt(run: FaultedRun) -> None:
    """A job of the urgent partition wants all cores of the nodes that the run has, for a few seconds."""
    nodes = run.state()["nodes"]
    wanted = [f"--nodes={len(nodes)}", f"--nodelist={','.join(nodes)}", "--exclusive", "--output=/dev/null"]
    run.slurm("sbatch", "--partition=urgent", *wanted, "--wrap=sleep 3")


def shorten(run: FaultedRun, job_id: str | None = None) -> None:
    """The allocation of the stage's job, or of another one, will end in a few seconds."""
    end = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() + 5))
    run.slurm("scontrol", "update", f"JobId={job_id or run.job_id}", f"EndTime={end}")


def power_off(index: int) -> Callable[[FaultedRun], None]:
    return lambda run: run.cluster.power_off(run.state()["nodes"][index])


def unplug_for(index: int, seconds: float) -> Callable[[FaultedRun], None]:
    def act(run: FaultedRun) -> None:
        node = run.state()["nodes"][index]
        run.cluster.unplug(node)
        time.sleep(seconds)
        run.cluster.plug(node)

    return act


def unplug(index: int) -> Callable[[FaultedRun], None]:
    return lambda run: run.cluster.unplug(run.state()["nodes"][index])


def restart_slurmctld(run: FaultedRun) -> None:
    run.cluster.restart_slurmctld()


def restart_slurmd(run: FaultedRun) -> None:
    run.cluster.restart_slurmd(run.state()["nodes"][1])


def fill_disk(run: FaultedRun) -> None:
    """Takes what is free on the small file system that holds the weights, but for a few blocks."""
    root = run.folder / "small"
    free = shutil.disk_usage(root).free
    with (root / "ballast").open("wb") as ballast:
        os.posix_fallocate(ballast.fileno(), 0, free - 65536)


def free_disk(run: FaultedRun) -> None:
    (run.folder / "small" / "ballast").unlink()


def damage_newest(run: FaultedRun) -> None:
    """One byte of the newest checkpoint's largest file is another one than was written."""
    newest = max(run.in_weights("checkpoints/step-????????"))
    largest = max(newest.glob("*.pt"), key=lambda path: path.stat().st_size)
    with largest.open("r+b") as stream:
        stream.seek(largest.stat().st_size // 2)
        byte = stream.read(1)
        stream.seek(-1, os.SEEK_CUR)
        stream.write(bytes([byte[0] ^ 1]))


_BY_HAND = {"ended_from_outside": True}
_CANCELLED = {**_BY_HAND, "told_last": "cancelled by scancel"}

CELLS = [
    Cell("kill -9 of a rank", "starting", kill_rank(1), attempts=1),
    Cell("kill -9 of a rank", "training", kill_rank(1), quick=True),
    Cell("kill -9 of rank 0", "training", kill_rank(0)),
    Cell("kill -9 of a rank", "saving", kill_rank(1), quick=True),
    Cell("kill -9 of rank 0", "saving", kill_rank(0)),
    Cell("kill -9 of the process", "tokenizing", kill_rank(0)),
    Cell("kill -9 of the process", "converting", kill_rank(0)),
    Cell("kill -9 of the launcher", "training", kill_launcher, quick=True),
    Cell("kill -9 of the launcher", "saving", kill_launcher),
    Cell("kill -9 of the launcher", "tokenizing", kill_launcher),
    Cell("kill -9 of the launcher", "converting", kill_launcher),
    Cell("kill -9 of the nested snakemake", "training", kill_nested_snakemake),
    Cell("kill -9 of the nested snakemake", "saving", kill_nested_snakemake),
    Cell("kill -9 of the main snakemake", "training", end_main(signal.SIGKILL), **_BY_HAND, attempts=1, quick=True),
    Cell("kill -9 of the main snakemake", "saving", end_main(signal.SIGKILL), **_BY_HAND, attempts=1),
    Cell("kill -9 of the main snakemake", "tokenizing", end_main(signal.SIGKILL), **_BY_HAND, attempts=1),
    Cell("kill -9 of the main snakemake", "converting", end_main(signal.SIGKILL), **_BY_HAND, attempts=1),
    Cell("SIGINT of the main snakemake", "training", end_main(signal.SIGINT), **_BY_HAND),
    Cell("SIGTERM of the main snakemake", "training", end_main(signal.SIGTERM), **_BY_HAND, attempts=1),
    Cell("scancel", "queued", scancel_queued, **_CANCELLED, before=occupy, before_again=leave, attempts=1),
    Cell("scancel", "training", scancel, **_CANCELLED, quick=True),
    Cell("scancel", "saving", scancel, **_CANCELLED),
    Cell("scontrol requeue", "training", requeue, quick=True),
    Cell("scontrol requeue", "saving", requeue),
    Cell("scontrol requeue", "tokenizing", requeue),
    Cell("preemption", "training", preempt, quick=True),
    Cell("preemption", "saving", preempt),
    Cell("preemption of one process", "training", preempt, nodes=1),
    Cell("preemption with grace", "training", preempt, partition="graceful"),
    Cell("preemption that cancels", "training", preempt, partition="killable"),
    Cell("preemption that cancels, with grace", "training", preempt, partition="killable-graceful"),
    Cell("time limit", "training", shorten, quick=True),
    Cell("time limit", "saving", shorten),
    Cell("time limit of one process", "training", shorten, nodes=1),
    Cell("power-off of a node", "training", power_off(1), quick=True),
    Cell("power-off of the first node", "training", power_off(0)),
    Cell("power-off of a node", "saving", power_off(1)),
    Cell("power-off of the node", "tokenizing", power_off(0)),
    Cell("power-off of the node", "converting", power_off(0)),
    Cell("link unplugged for 10 s", "training", unplug_for(1, 10)),
    Cell("link unplugged for 10 s", "saving", unplug_for(1, 10)),
    Cell("link unplugged for good", "training", unplug(1), cuts_off=True),
    Cell("link of the first node unplugged for good", "training", unplug(0), cuts_off=True),
    Cell("slurmctld restarted", "training", restart_slurmctld, attempts=1, quick=True),
    Cell("slurmctld restarted", "saving", restart_slurmctld, attempts=1),
    Cell("slurmd restarted", "training", restart_slurmd, attempts=1),
    Cell("slurmd restarted", "saving", restart_slurmd, attempts=1),
    Cell("a hung rank", "training", stop_rank(1), quick=True),
    Cell("a hung rank 0", "training", stop_rank(0)),
    Cell("a slow rank", "training", slow_rank(1), says="straggler at step", attempts=1),
    Cell(
        "disk full",
        "training",
        fill_disk,
        fails_with="disk full",
        told_last="disk full",
        before_again=free_disk,
        quick=True,
    ),
    Cell(
        "newest checkpoint damaged",
        "training",
        scancel,
        **_CANCELLED,
        before_again=damage_newest,
        says="it is passed over",
    ),
]
