"""Random faults at a set mean time between them, for some minutes; then the run must end with the right weights.

    make chaos MINUTES=10 MTBF_S=60 SEED=1

The waits are drawn from an exponential distribution, as those between independent failures are. The time table of the run
(goodput.py) and the faults go to bench/results/chaos.txt. pytest runs this file only when it is named.
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

from bench.machine import header, publish
from longhaul.report.number_format import duration, percent, words
from tests.faults.fault_matrix import (
    end_main,
    kill_launcher,
    kill_nested_snakemake,
    kill_rank,
    power_off,
    preempt,
    requeue,
    restart_slurmctld,
    scancel,
    shorten,
    stop_rank,
    unplug_for,
)
from tests.faults.faulted_run import FaultedRun, faulted_config
from tests.support.chain import Chain
from tests.support.running_cluster import running
from tests.support.slurm_conf import Shape
from tests.support.virtual_cluster import ClusterError

MINUTES, MTBF_S, SEED = (
    float(os.environ.get(name, default)) for name, default in (("MINUTES", 5), ("MTBF_S", 45), ("SEED", 1))
)
STEPS_A_MINUTE = 800
"""About what two ranks train on two quiet cores: the run is to outlast the faults."""
FAULTS: dict[str, Callable[[FaultedRun], None]] = {
    "kill -9 of a rank": kill_rank(1),
    "kill -9 of rank 0": kill_rank(0),
    "kill -9 of the launcher": kill_launcher,
    "kill -9 of the nested snakemake": kill_nested_snakemake,
    "kill -9 of the main snakemake": end_main(signal.SIGKILL),
    "scancel": scancel,
    "scontrol requeue": requeue,
    "preemption": preempt,
    "time limit": shorten,
    "power-off of a node": power_off(1),
    "link unplugged for 10 s": unplug_for(1, 10),
    "slurmctld restarted": restart_slurmctld,
    "a hung rank": stop_rank(1),
}
# After these the user, or a controller job, gives the command again.
ENDS_THE_MAIN = ("kill -9 of the main snakemake", "scancel")
_MISSED = (AssertionError, IndexError, KeyError, StopIteration, psutil.Error, ClusterError)


@pytest.mark.timeout(int(60 * MINUTES * 6) + 900)
def test_chaos(tmp_path_factory: pytest.TempPathFactory, finished: Chain):
    steps = int(MINUTES * STEPS_A_MINUTE)
    folder = tmp_path_factory.mktemp("chaos")
    config = faulted_config(finished.config, steps=steps)
    with running(tmp_path_factory.mktemp("cluster"), Shape(nodes=3)) as cluster:
        calm = FaultedRun(folder / "calm", config, cluster, finished.results)
        calm.start()
        assert calm.finish(3600) == 0, calm.said()[-4000:]
        run = FaultedRun(folder / "run", config, cluster, finished.results)
        started = time.monotonic()
        done = torment(run, random.Random(SEED), started + 60 * MINUTES)
        assert finish(run) == 0, run.said()[-8000:]
        seconds = time.monotonic() - started
        assert run.masters() == calm.masters()
        assert run.trained_steps() == list(range(1, steps + 1))
        tell(run, calm, done, seconds)


def torment(run: FaultedRun, chance: random.Random, until: float) -> Counter[str]:
    """Faults until the time is over or the run is; whatever a fault ended is started again. Returns how many of each."""
    done: Counter[str] = Counter()
    run.start()
    while time.monotonic() < until and not (run.folder / run.target).exists():
        time.sleep(chance.expovariate(1 / MTBF_S))
        mend(run)
        name = chance.choice(list(FAULTS))
        try:
            FAULTS[name](run)
        except (*_MISSED, OSError) as error:  # what it would have hit is not there just now
            print(f"missed: {name}: {type(error).__name__}", flush=True)
            continue
        done[name] += 1
        print(f"{time.monotonic():.0f} s: {name}, at step {run.step()}", flush=True)
        if name in ENDS_THE_MAIN:
            start_again(run)
    return done


def start_again(run: FaultedRun) -> None:
    assert run.main is not None
    run.main.wait(timeout=300)
    run.start()


def finish(run: FaultedRun) -> int:
    """The same command, once more where a fault was too much for the retries of one."""
    assert run.main is not None
    mend(run)
    if run.main.wait(timeout=900) and not (run.folder / run.target).exists():
        run.start()
    return run.main.wait(timeout=900)


def mend(run: FaultedRun) -> None:
    """Somebody looks after the nodes: they come back, and off the quarantine."""
    for node in run.cluster.node_names:
        if not run.cluster.is_on(node):
            run.cluster.boot(node)
    (run.folder / "results/quarantine.json").unlink(missing_ok=True)


def tell(run: FaultedRun, calm: FaultedRun, done: Counter[str], seconds: float) -> None:
    goodput = run.goodput()
    lines = [f"command: make chaos MINUTES={MINUTES:g} MTBF_S={MTBF_S:g} SEED={SEED:g}"]
    lines += header(("torch", "deepspeed", "snakemake"))[1:]
    lines += [
        f"{sum(done.values())} faults in {duration(seconds)}: {', '.join(f'{n} x {name}' for name, n in done.items())}"
    ]
    lines += [f"{run.attempts()} attempts; final weights bit-identical to the calm run's, every step once", ""]
    for part, share in goodput.shares().items():
        lines.append(f"{words(part):<12} {duration(getattr(goodput, part)):>12} {percent(share):>8}")
    lines += [f"goodput      {percent(goodput.goodput):>21}, without faults {percent(calm.goodput().goodput)}"]
    publish("chaos", lines)
