"""Random faults with a given mean time between them, for some minutes. The run must end with the right weights.

    make chaos MINUTES=10 MTBF_S=60 SEED=1

The times between faults are drawn from an exponential distribution, like those between independent failures. The goodput
and the faults are written to bench/results/chaos.txt. pytest runs this file only if it is named on the command line.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable

import psutil
import pytest

from bench.machine import describe_machine, write_result
from longhaul.report.number_format import duration, percent, words
from tests.faults.fault_matrix import (
    end_main,
    kill_nested_snakemake,
    kill_rank,
    kill_supervisor,
    power_off,
    preempt,
    requeue,
    restart_slurmctld,
    scancel,
    shorten_allocation,
    stop_rank,
    unplug_for,
)
from tests.faults.faulted_run import FaultedRun, faulted_config
from tests.support.pipeline_run import PipelineRun
from tests.support.running_cluster import running_cluster
from tests.support.slurm_conf import ClusterSize
from tests.support.virtual_hosts import ClusterError

MINUTES, MTBF_S, SEED = (
    float(os.environ.get(name, default)) for name, default in (("MINUTES", 5), ("MTBF_S", 45), ("SEED", 1))
)
STEPS_A_MINUTE = 800
"""About the steps that two ranks do on two idle cores. The run must last longer than the faults."""
FAULTS: dict[str, Callable[[FaultedRun], None]] = {
    "kill -9 of a rank": kill_rank(1),
    "kill -9 of rank 0": kill_rank(0),
    "kill -9 of the supervisor": kill_supervisor,
    "kill -9 of the nested snakemake": kill_nested_snakemake,
    "kill -9 of the main snakemake": end_main(signal.SIGKILL),
    "scancel": scancel,
    "scontrol requeue": requeue,
    "preemption": preempt,
    "time limit": shorten_allocation,
    "power-off of a node": power_off(1),
    "link unplugged for 10 s": unplug_for(1, 10),
    "slurmctld restarted": restart_slurmctld,
    "a hung rank": stop_rank(1),
}
# After these faults a user, or a controller job, gives the command again.
ENDS_COMMAND = ("kill -9 of the main snakemake", "scancel")
_NO_TARGET = (AssertionError, IndexError, KeyError, StopIteration, psutil.Error, ClusterError)


@pytest.mark.timeout(int(60 * MINUTES * 6) + 900)
def test_chaos(tmp_path_factory: pytest.TempPathFactory, finished: PipelineRun):
    steps = int(MINUTES * STEPS_A_MINUTE)
    folder = tmp_path_factory.mktemp("chaos")
    config = faulted_config(finished.config, steps=steps)
    with running_cluster(tmp_path_factory.mktemp("cluster"), ClusterSize(nodes=3)) as cluster:
        calm = FaultedRun(folder / "calm", config, cluster, finished.results)
        calm.start()
        assert calm.finish(3600) == 0, calm.output()[-4000:]
        run = FaultedRun(folder / "run", config, cluster, finished.results)
        started = time.monotonic()
        done = inject_faults(run, random.Random(SEED), started + 60 * MINUTES)
        assert finish(run) == 0, run.output()[-8000:]
        seconds = time.monotonic() - started
        assert run.master_weights() == calm.master_weights()
        assert run.trained_steps() == list(range(1, steps + 1))
        write_record(run, calm, done, seconds)


def inject_faults(run: FaultedRun, chance: random.Random, until: float) -> Counter[str]:
    """Inject faults until the time or the run ends; restart what a fault ended. Return the number of each fault."""
    done: Counter[str] = Counter()
    run.start()
    while time.monotonic() < until and not (run.folder / run.target).exists():
        time.sleep(chance.expovariate(1 / MTBF_S))
        repair_nodes(run)
        name = chance.choice(list(FAULTS))
        try:
            FAULTS[name](run)
        except (*_NO_TARGET, OSError) as error:  # the target of the fault does not exist at the moment
            print(f"missed: {name}: {type(error).__name__}", flush=True)
            continue
        done[name] += 1
        print(f"{time.monotonic():.0f} s: {name}, at step {run.step()}", flush=True)
        if name in ENDS_COMMAND:
            restart_command(run)
    return done


def restart_command(run: FaultedRun) -> None:
    assert run.main is not None
    run.main.wait(timeout=300)
    run.start()


def finish(run: FaultedRun) -> int:
    """Wait for the run; give the command once more if the faults exceeded its retries. Return the exit code."""
    assert run.main is not None
    repair_nodes(run)
    if run.main.wait(timeout=900) and not (run.folder / run.target).exists():
        run.start()
    return run.main.wait(timeout=900)


def repair_nodes(run: FaultedRun) -> None:
    """Power all nodes on and empty the quarantine, as an administrator would."""
    for node in run.cluster.node_names:
        if not run.cluster.is_on(node):
            run.cluster.boot(node)
    (run.folder / "results/quarantine.json").unlink(missing_ok=True)


def write_record(run: FaultedRun, calm: FaultedRun, done: Counter[str], seconds: float) -> None:
    goodput = run.goodput()
    lines = [f"command: make chaos MINUTES={MINUTES:g} MTBF_S={MTBF_S:g} SEED={SEED:g}"]
    lines += describe_machine(("torch", "deepspeed", "snakemake"))[1:]
    lines += [
        f"{sum(done.values())} faults in {duration(seconds)}: {', '.join(f'{n} x {name}' for name, n in done.items())}"
    ]
    lines += [f"{run.attempts()} attempts; final weights bit-identical to the calm run's, every step once", ""]
    for part, share in goodput.shares().items():
        lines.append(f"{words(part):<12} {duration(getattr(goodput, part)):>12} {percent(share):>8}")
    lines += [f"goodput      {percent(goodput.goodput):>21}, without faults {percent(calm.goodput().goodput)}"]
    write_result("chaos", lines)
