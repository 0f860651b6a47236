"""One rank that trains cases of one world size one after another: python parity_worker.py SHARED FOLDER CASE…

CASE is one of:
- `model/layout`
- `model/layout/pretrained=FOLDER`: start from the weights of a Hugging Face folder
- `model/layout/checkpoint=CHECKPOINT.JSON`: start from the last checkpoint of another case

The first form trains half of the steps, stops, and resumes from its checkpoint in a new engine, as a requeued job does. The
other forms train only the first half. If a case fails, the rank prints the error and exits with code 1.
"""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path

from longhaul.jobs.kinds.train_job import TrainSpec
from longhaul.train import train_stage as loop
from tests.parity.parity_cases import LAYOUTS
from tests.parity.prepare_case import STEPS, prepare_case, run_config
from tests.support.reused_ranks import load_offload_ops, reset_deepspeed, swap_small_tensors


def before_fork() -> None:
    load_offload_ops(LAYOUTS[name.split("/")[1]].stage for name in sys.argv[3:])


def train(job: TrainSpec, first_port: int, only_first_half: bool) -> None:
    half = job.model_copy(update={"planned_steps": STEPS // 2, "exported_checkpoints": ()})
    for index, attempt in enumerate([half] if only_first_half else [half, job]):
        os.environ["MASTER_PORT"] = str(first_port + index)
        loop.run(attempt)
        reset_deepspeed()


def main() -> None:
    shared, folder = Path(sys.argv[1]), Path(sys.argv[2])
    swap_small_tensors()
    for index, name in enumerate(sys.argv[3:]):
        model, layout, *start = name.split("/", 2)
        own = folder / model / (f"{layout}, {start[0].partition('=')[0]}" if start else layout)
        try:
            # Every rank writes the same files; each write is atomic.
            job, _ = prepare_case(own, shared, run_config(model, layout), *start)
            train(job, int(os.environ["PARITY_PORT"]) + 2 * index, only_first_half=bool(start))
        except BaseException:
            print(f"FAILED {name}\n{traceback.format_exc()}\n", flush=True)
            os._exit(1)


if __name__ == "__main__":
    main()
