"""One of several ranks that train the legs of a list one after the other: python survival_worker.py LEGS.JSON.

A leg is {"folder", "shared", "run", …} and what befalls it:
left_s       the allocation ends after so many seconds
stop_after   the process ends before the step after this many, as if it were killed; what lies in its swap folder is noted
save_again   what was loaded is saved at once, with its proof
goes_on_from the folder of an earlier leg, whose checkpoints it takes over
begin        the source of its first weights, as in parity_cell.prepare
poison       {batch number: factor}: the loss of this global batch is multiplied by the factor, on one rank alone
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from longhaul.artifacts.job_state import Deadline
from longhaul.errors import UserError
from longhaul.train import loop
from longhaul.train.distributed_context import DistributedContext
from tests.parity.parity_worker import load_ops, reset_deepspeed, swap_twins
from tests.parity.run_parity_case import prepare
from tests.support.injected_faults import poison_batches


class Killed(BaseException):
    """The leg ends here."""


def before_fork() -> None:
    load_ops(stage for leg in json.loads(Path(sys.argv[1]).read_text()) for stage in leg["run"]["stages"])


def befall(leg: dict[str, Any]) -> None:
    """Wraps the trainer's step and the loss in what the leg says."""

    def before_step(trainer: loop.Trainer) -> None:
        if leg.pop("save_again", False):
            save_with_proof(trainer)
        if trainer.state.step == leg.get("stop_after"):
            note_swapped(Path(leg["folder"]), trainer.processes)
            raise Killed

    poison_batches({int(batch): factor for batch, factor in leg.get("poison", {}).items()}, before_step)


def save_with_proof(trainer: loop.Trainer) -> None:
    usual = trainer.checkpoints.is_exportable
    trainer.checkpoints.is_exportable = lambda *_: True
    trainer.save()
    trainer.checkpoints.is_exportable = usual


def note_swapped(folder: Path, processes: DistributedContext) -> None:
    """swapped-<rank>.json: name -> bytes of the files in this rank's swap folder, where it has one."""
    if processes.swap:
        sizes = {path.name: path.stat().st_size for path in processes.swap.rglob("*.swp")}
        (folder / f"swapped-{processes.rank.rank}.json").write_text(json.dumps(sizes))


def train(leg: dict[str, Any]) -> str:
    """How the leg ended."""
    job, _ = prepare(Path(leg["folder"]), Path(leg["shared"]), leg["run"], leg.get("begin", ""))
    befall(leg)
    if "goes_on_from" in leg and os.environ["RANK"] == "0":  # the others look for them when all have met
        weights = Path("stages/main/weights")
        shutil.copytree(Path(leg["goes_on_from"]) / weights, Path(leg["folder"]) / weights)
    if "left_s" in leg and os.environ["RANK"] == "0":
        Deadline(time.time() + leg["left_s"], False).write(Path(job.folder) / "deadline.json")
    try:
        loop.run(job)
    except Killed:
        return "killed"
    except UserError as error:
        return f"{type(error).__name__}: {error}"
    return "finished"


def main() -> None:
    swap_twins()
    first_port = int(os.environ["RECOVERY_PORT"])
    for index, leg in enumerate(json.loads(Path(sys.argv[1]).read_text())):
        os.environ["MASTER_PORT"] = str(first_port + index)
        ended = train(leg)
        reset_deepspeed()
        if os.environ["RANK"] == "0":
            left = sorted(path.name for path in Path(leg["folder"]).glob("stages/main/weights/*/checkpoints/*"))
            print("LEG " + json.dumps({"ended": ended, "checkpoints": left}), flush=True)
    assert "torch._inductor.compile_fx" not in sys.modules, "nothing is compiled; a second of every rank's start"
    sys.stdout.flush()
    os._exit(0)  # the interpreter's teardown is slow after DeepSpeed


if __name__ == "__main__":
    main()
