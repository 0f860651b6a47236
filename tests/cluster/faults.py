"""The fault matrix: what is done to a run, when, and how the run must end."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from cluster_chain import ClusterChain
from virtual_cluster import VirtualCluster

STAGE = "results/tiny/stages/base/checkpoint.json"
EXPORT = "results/tiny/export/base.json"
STEPS, SAVE_EVERY = 400, 25
SITE = {"max_nodes": 3, "deadline_every_s": 1.0}
RECOVERY = {"hang_s": 6.0, "lead_s": 3.0, "collective_timeout_s": 60.0, "restarts": 3}


def faulted_config(finished: dict[str, Any]) -> dict[str, Any]:
    """The tiny run's first stage, longer, over two nodes with a rank each."""
    config = json.loads(json.dumps(finished))
    base = config["stages"][0]
    base |= {"nodes": 2, "gpus_per_node": 1, "steps": STEPS, "recovery": RECOVERY, "minutes": 5}
    base["schedule"] = {"kind": "constant"}
    base["checkpoints"] = {"every_steps": SAVE_EVERY, "keep_best": 1}
    base["validation"] = {"every_steps": SAVE_EVERY, "max_samples": 8}
    config["stages"] = [base]
    return config


class FaultedRun(ClusterChain):
    """A run in a folder of its own, whose data are there already, and what a test does to it."""

    def __init__(self, folder: Path, config: dict[str, Any], cluster: VirtualCluster, data_of: Path | None) -> None:
        super().__init__(folder, faulted_config(config), cluster, **SITE)
        if data_of:
            shutil.copytree(data_of, self.results, ignore=shutil.ignore_patterns("stages", "export", "logs", "jobs"))
        self.target = STAGE
        self.main: subprocess.Popen[str] | None = None

    # Its life

    def start(self) -> None:
        log = (self.folder / "main.log").open("a")
        self.main = subprocess.Popen(
            self.command(self.target),
            cwd=self.folder,
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
            env=self.environment(),
            # a shell that runs tests in the background has it ignored
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def finish(self, timeout_s: float = 300) -> int:
        """Waits for the main Snakemake: after a permanent failure each of its retries takes some ten seconds to say so again."""
        assert self.main is not None
        return self.main.wait(timeout=timeout_s)

    def snakemake_process(self) -> psutil.Process:
        """The main Snakemake itself, below nsenter."""
        assert self.main is not None
        found = [p for p in [psutil.Process(self.main.pid), *psutil.Process(self.main.pid).children(recursive=True)]]
        return next(
            p for p in found if "fast_snakemake.py" in " ".join(p.cmdline()) and "nsenter" not in p.cmdline()[0]
        )

    def said(self) -> str:
        return (self.folder / "main.log").read_text() + self.logs()

    # What it is doing

    def step(self) -> int:
        rows = [line for path in self.results.glob("stages/base/weights/*/metrics.jsonl") for line in path.open()]
        return max((json.loads(row)["step"] for row in rows if row.endswith("\n")), default=0)

    def saved_steps(self) -> list[int]:
        found = self.results.glob("stages/base/weights/*/checkpoints/step-????????/manifest.json")
        return sorted(int(path.parent.name.removeprefix("step-")) for path in found)

    def is_saving(self) -> bool:
        return any(self.results.glob("stages/base/weights/*/checkpoints/step-*.partial"))

    def until(self, condition: Callable[[], bool], seconds: float = 90) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.main is None or self.main.poll() is None, "snakemake ended early:\n" + self.said()[-4000:]
            assert time.monotonic() < deadline, "it did not happen in time:\n" + self.said()[-6000:]
            time.sleep(0.01)

    def state(self) -> dict[str, Any]:
        return self.read("stages/base/state.json")

    @property
    def job_id(self) -> str:
        return self.state()["job_id"]

    def processes(self, *words: str) -> list[psutil.Process]:
        """Processes of this run, on whatever host, whose command line has all the words."""
        mine = str(self.folder)
        found = []
        for process in psutil.process_iter(["cmdline"]):
            line = process.info["cmdline"] or []
            text = " ".join(line)
            if (
                mine in text
                and all(word in line for word in words)
                and line[0] not in ("srun", "bash", "sh", "nsenter")
            ):
                found.append(process)
        return found

    def ranks(self) -> list[psutil.Process]:
        found = self.processes("longhaul", "train")
        return sorted(found, key=lambda process: int(process.environ()["SLURM_PROCID"]))

    def slurm(self, *words: str) -> str:
        return self.cluster.run(*words)

    # What must hold afterwards

    def masters(self) -> dict[str, str]:
        checkpoint = self.read("stages/base/checkpoint.json")
        last = Path(checkpoint["weights"]) / checkpoint["checkpoints"]["last"]["path"]
        tensors = json.loads((self.folder / last / "proof" / "tensors.json").read_text())
        return {name: entry["sha256_fp32"] for name, entry in tensors.items()}

    def trained_steps(self) -> list[int]:
        rows = [json.loads(line) for line in (self.weights("base") / "metrics.jsonl").open()]
        return [row["step"] for row in rows if "loss" in row]

    def legs(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.weights("base") / "legs.jsonl").open()]


@dataclass(frozen=True)
class Cell:
    """`act` is done when `when` is true; then the same command must finish, `again` times started anew."""

    name: str
    when: str  # training | saving | starting
    act: Callable[[FaultedRun], None]
    ended_from_outside: bool = False
    fails_with: str = ""
    mends: Callable[[FaultedRun], None] | None = None
    starts: int = 2  # of the training, at least: else the fault came too late to test anything
    cuts_off: bool = False  # a node stays unreachable: what runs there ends when it is back
    quick: bool = False


def kill_rank(index: int) -> Callable[[FaultedRun], None]:
    return lambda run: run.ranks()[index].kill()


def stop_rank(index: int) -> Callable[[FaultedRun], None]:
    """The process hangs: it is there, and does nothing."""
    return lambda run: run.ranks()[index].suspend()


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


def requeue(run: FaultedRun) -> None:
    run.slurm("scontrol", "requeue", run.job_id)


def preempt(run: FaultedRun) -> None:
    """A job of the urgent partition wants all cores of two of the nodes that the run has, for a few seconds."""
    nodes = ",".join(run.state()["nodes"])
    wanted = ["--partition=urgent", "--nodes=2", f"--nodelist={nodes}", "--exclusive", "--output=/dev/null"]
    run.slurm("sbatch", *wanted, "--wrap=sleep 3")


def shorten(run: FaultedRun) -> None:
    """The allocation will end in a few seconds."""
    end = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() + 5))
    run.slurm("scontrol", "update", f"JobId={run.job_id}", f"EndTime={end}")


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


CELLS = [
    Cell("kill -9 of a rank", "training", kill_rank(1), quick=True),
    Cell("kill -9 of rank 0", "training", kill_rank(0)),
    Cell("kill -9 of a rank", "saving", kill_rank(1), quick=True),
    Cell("kill -9 of a rank", "starting", kill_rank(1), starts=1),
    Cell("kill -9 of rank 0", "saving", kill_rank(0)),
    Cell("kill -9 of the launcher", "training", kill_launcher, quick=True),
    Cell("kill -9 of the launcher", "saving", kill_launcher),
    Cell("kill -9 of the nested snakemake", "training", kill_nested_snakemake),
    Cell("kill -9 of the nested snakemake", "saving", kill_nested_snakemake),
    Cell(
        "kill -9 of the main snakemake",
        "training",
        end_main(signal.SIGKILL),
        ended_from_outside=True,
        starts=1,
        quick=True,
    ),
    Cell("kill -9 of the main snakemake", "saving", end_main(signal.SIGKILL), ended_from_outside=True, starts=1),
    Cell("SIGINT of the main snakemake", "training", end_main(signal.SIGINT), ended_from_outside=True),
    Cell("SIGTERM of the main snakemake", "training", end_main(signal.SIGTERM), ended_from_outside=True, starts=1),
    Cell("scancel", "training", scancel, ended_from_outside=True),
    Cell("scancel", "saving", scancel, ended_from_outside=True),
    Cell("scontrol requeue", "training", requeue),
    Cell("scontrol requeue", "saving", requeue),
    Cell("preemption", "training", preempt, quick=True),
    Cell("preemption", "saving", preempt),
    Cell("time limit", "training", shorten, quick=True),
    Cell("time limit", "saving", shorten),
    Cell("power-off of a node", "training", power_off(1), quick=True),
    Cell("power-off of the first node", "training", power_off(0)),
    Cell("power-off of a node", "saving", power_off(1)),
    Cell("link unplugged for 10 s", "training", unplug_for(1, 10)),
    Cell("link unplugged for 10 s", "saving", unplug_for(1, 10)),
    Cell("link unplugged for good", "training", unplug(1), cuts_off=True),
    Cell("link of the first node unplugged for good", "training", unplug(0), cuts_off=True),
    Cell("slurmctld restarted", "training", restart_slurmctld, starts=1),
    Cell("slurmctld restarted", "saving", restart_slurmctld, starts=1),
    Cell("slurmd restarted", "training", restart_slurmd, starts=1),
    Cell("slurmd restarted", "saving", restart_slurmd, starts=1),
    Cell("a hung rank", "training", stop_rank(1), quick=True),
    Cell("a hung rank 0", "training", stop_rank(0)),
    Cell("disk full", "training", fill_disk, fails_with="disk full", mends=free_disk),
]
