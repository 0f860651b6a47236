"""Trains one stage on the first GPU: python resume_worker.py JOB.JSON [KILL_AT_STEP].

With KILL_AT_STEP, the process kills itself before the step after that many, while a save is in flight.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from longhaul.jobs.kinds.train_job import TrainSpec
from longhaul.train import train_stage
from tests.support.injected_faults import disturb_writes, poison_batches

WRITE_S = 2.0
"""Each file of a save takes so much longer. Several steps run in that time."""


def main() -> None:
    job = TrainSpec.read(Path(sys.argv[1]))
    kill_at_step = int(sys.argv[2]) if len(sys.argv) > 2 else None
    assert job.asynchronous_saves and job.stage.compile == "auto"
    disturb_writes(WRITE_S)

    def kill(trainer: train_stage.Trainer) -> None:
        if trainer.state.step == kill_at_step:
            os.kill(os.getpid(), signal.SIGKILL)

    poison_batches({}, kill)
    train_stage.run(job)
    sys.stdout.flush()
    os._exit(0)  # after DeepSpeed the interpreter's teardown is slow


if __name__ == "__main__":
    main()
