"""One of several ranks that train the legs of a list one after the other: python survival_worker.py LEGS.JSON.

A leg is {"folder", "shared", "run", …} and what befalls it:
stop_after   the process ends before the step after this many, as if it were killed
save_again   the checkpoint that was loaded is saved at once, then the leg ends
poison       {batch number: factor}: the loss of this global batch is multiplied by the factor, on one rank alone
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from longhaul.errors import UserError
from longhaul.train import backend, loop
from parity_cell import prepare
from worker import reset_deepspeed


class Killed(BaseException):
    """The leg ends here."""


def befall(leg: dict[str, Any]) -> None:
    """Wraps the trainer's step and the loss in what the leg says; the product's code knows nothing of it."""
    poison = {int(batch): factor for batch, factor in leg.get("poison", {}).items()}
    at: list[int] = [-1]

    def step(trainer: loop.Trainer, batch: Any) -> bool:
        if leg.get("save_again"):
            trainer.save()
        if leg.get("save_again") or trainer.state.step == leg.get("stop_after"):
            raise Killed
        at[0] = batch.number
        found = STEP(trainer, batch)
        at[0] = -1
        return found

    def poisoned(loss: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def found(*arguments: Any) -> torch.Tensor:
            grid = arguments[-1]
            return loss(*arguments) * (poison.get(at[0], 1.0) if grid.rank == grid.world_size - 1 else 1.0)

        return found

    loop.Trainer.step = step  # pyright: ignore[reportAttributeAccessIssue]
    backend.loss_sum, backend.head_loss_sum = (poisoned(loss) for loss in LOSSES)


STEP, LOSSES = loop.Trainer.step, (backend.loss_sum, backend.head_loss_sum)


def train(leg: dict[str, Any]) -> str:
    """How the leg ended."""
    job, _ = prepare(Path(leg["folder"]), Path(leg["shared"]), leg["run"])
    befall(leg)
    try:
        loop.run(job)
    except Killed:
        return "killed"
    except UserError as error:
        return f"{type(error).__name__}: {error}"
    return "finished"


def main() -> None:
    os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)
    first_port = int(os.environ["SURVIVAL_PORT"])
    for index, leg in enumerate(json.loads(Path(sys.argv[1]).read_text())):
        os.environ["MASTER_PORT"] = str(first_port + index)
        ended = train(leg)
        reset_deepspeed()
        if os.environ["RANK"] == "0":
            left = sorted(path.name for path in Path(leg["folder"]).glob("stages/main/weights/*/checkpoints/*"))
            print("LEG " + json.dumps({"ended": ended, "checkpoints": left}), flush=True)
    sys.stdout.flush()
    os._exit(0)  # the interpreter's teardown is slow after DeepSpeed


if __name__ == "__main__":
    main()
