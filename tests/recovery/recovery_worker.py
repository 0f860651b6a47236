"""One of several ranks that train the stages of a list one after another: python recovery_worker.py ATTEMPTS.JSON.

An attempt is {"folder", "shared", "run", …} with any of these keys:
deadline_in_s         the allocation ends after this number of seconds
kill_at_step          the attempt ends before the step after this many, as if it were killed; first it lists its swapped files
writes                arguments of injected_faults.disturb_writes
synchronous_saves     files are written while training waits, as where host memory does not suffice
kill_while_saving     the attempt does not wait for the save in flight before it is killed
terminate_at_step     every rank gets SIGTERM before the step after this many
save_after_load       what was loaded is saved at once, with reference values
copy_checkpoints_from the folder of an earlier stage; the attempt starts with a copy of its checkpoints
start                 the source of the initial weights, as in prepare_case
delay_results         bad steps are decided as on a GPU: the trainer reads the result of a step when it has started the next one
poison                {batch number: factor}: the loss of this global batch is multiplied by the factor, on the last rank alone
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

from longhaul.artifacts.atomic_files import write_text
from longhaul.artifacts.job_state import Deadline
from longhaul.compat.deepspeed import gather_whole_layers
from longhaul.errors import UserError
from longhaul.train import deepspeed_engine, detect_bad_steps
from longhaul.train import train_stage as loop
from longhaul.train.distributed_context import DistributedContext
from longhaul.train.trainer import Trainer
from tests.parity.prepare_case import prepare_case
from tests.support.injected_faults import disturb_writes, poison_batches
from tests.support.several_stages_in_one_process import load_offload_ops, reset_deepspeed, swap_small_tensors


class Killed(BaseException):
    """Ends the attempt as a kill would."""


def before_fork() -> None:
    attempts = json.loads(Path(sys.argv[1]).read_text())
    load_offload_ops(stage for attempt in attempts for stage in attempt["run"]["stages"])


def inject_faults(attempt: dict[str, Any]) -> None:
    """Wrap the trainer's step and the loss in the attempt's faults."""

    def before_step(trainer: Trainer) -> None:
        if attempt.pop("save_after_load", False):
            save_with_reference_values(trainer)
        if trainer.state.step == attempt.get("terminate_at_step"):
            os.kill(os.getpid(), signal.SIGTERM)
        if trainer.state.step == attempt.get("kill_at_step"):
            list_swapped_files(Path(attempt["folder"]), trainer.context)
            if not attempt.get("kill_while_saving"):
                trainer.checkpoints.finish_save()
            raise Killed

    disturb_writes(**attempt.get("writes", {}))
    poison_batches({int(batch): factor for batch, factor in attempt.get("poison", {}).items()}, before_step)


def save_with_reference_values(trainer: Trainer) -> None:
    usual = trainer.checkpoints.needs_reference_values
    trainer.checkpoints.needs_reference_values = lambda step, validation_loss: True
    trainer.save()
    trainer.checkpoints.needs_reference_values = usual


def fuse_optimizer(deepspeed_config: Path) -> None:
    """Let the stage use torch's fused AdamW, which also exists for CPUs, and skips an update by itself."""
    config = json.loads(deepspeed_config.read_text())
    config["optimizer"]["params"]["fused"] = True
    write_text(deepspeed_config, json.dumps(config))


def list_swapped_files(folder: Path, context: DistributedContext) -> None:
    """Write swapped-<rank>.json: name -> bytes of the files in this rank's swap folder, where it has one."""
    if context.swap:
        sizes = {path.name: path.stat().st_size for path in context.swap.rglob("*.swp")}
        (folder / f"swapped-{context.rank.rank}.json").write_text(json.dumps(sizes))


def train(attempt: dict[str, Any]) -> str:
    """Run the attempt and return how it ended."""
    folder = Path(attempt["folder"])
    job, _ = prepare_case(folder, Path(attempt["shared"]), attempt["run"], attempt.get("start", ""))
    if attempt.get("synchronous_saves"):
        job = job.model_copy(update={"asynchronous_saves": False})
    if attempt.get("delay_results"):
        fuse_optimizer(Path(job.deepspeed))
    detect_bad_steps.can_skip_update_on_device = lambda _optimizer: bool(attempt.get("delay_results"))
    gathers_modules = attempt.get("gather_single_modules")
    deepspeed_engine.gather_whole_layers = (lambda *_: None) if gathers_modules else gather_whole_layers
    inject_faults(attempt)
    # Rank 0 alone: the other ranks look for these files only after all ranks have met.
    if "copy_checkpoints_from" in attempt and os.environ["RANK"] == "0":
        weights = Path("stages/main/weights")
        shutil.copytree(Path(attempt["copy_checkpoints_from"]) / weights, folder / weights)
    if "deadline_in_s" in attempt and os.environ["RANK"] == "0":
        Deadline(time.time() + attempt["deadline_in_s"], False).write(Path(job.folder) / "deadline.json")
    try:
        loop.run(job)
    except Killed:
        return "killed"
    except UserError as error:
        return f"{type(error).__name__}: {error}"
    except RuntimeError as error:
        # Rank 0 alone writes metrics.jsonl, which may be the first file for which a full disk has no space.
        if os.environ["RANK"] == "0" or "closed by peer" not in str(error):
            raise
        return "rank 0 has ended"
    return "finished"


def main() -> None:
    swap_small_tensors()
    first_port = int(os.environ["RECOVERY_PORT"])
    for index, attempt in enumerate(json.loads(Path(sys.argv[1]).read_text())):
        os.environ["MASTER_PORT"] = str(first_port + index)
        ended = train(attempt)
        reset_deepspeed()
        if os.environ["RANK"] == "0":
            found = sorted(path.name for path in Path(attempt["folder"]).glob("stages/main/weights/*/checkpoints/*"))
            print("ATTEMPT " + json.dumps({"ended": ended, "checkpoints": found}), flush=True)
    assert "torch._inductor.compile_fx" not in sys.modules, "the compiler is not used; its import costs a rank a second"
    sys.stdout.flush()
    os._exit(0)  # after DeepSpeed the interpreter's teardown is slow


if __name__ == "__main__":
    main()
