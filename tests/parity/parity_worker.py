"""One rank that trains a case: python parity_worker.py SHARED FOLDER CASE

CASE is one of:
- `model/layout`
- `model/layout/pretrained=FOLDER`: start from the weights of a Hugging Face folder
- `model/layout/checkpoint=CHECKPOINT.JSON`: start from the last checkpoint of another case

The first form trains half of the steps, stops, and resumes from its checkpoint in a new engine, as a requeued job does. The
other forms train only the first half.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from longhaul.train import train_stage as loop
from tests.parity.parity_cases import LAYOUTS
from tests.parity.prepare_case import STEPS, prepare_case, run_config
from tests.support.several_stages_in_one_process import load_offload_ops, reset_deepspeed, swap_small_tensors


def before_fork() -> None:
    load_offload_ops([LAYOUTS[sys.argv[3].split("/")[1]].stage])


def main() -> None:
    shared, folder, name = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    swap_small_tensors()
    model, layout, *start = name.split("/", 2)
    own = folder / model / (f"{layout}, {start[0].partition('=')[0]}" if start else layout)
    # Every rank writes the same files; each write is atomic.
    job, _ = prepare_case(own, shared, run_config(model, layout), *start)
    loop.run(job.model_copy(update={"planned_steps": STEPS // 2, "exported_checkpoints": ()}))
    if not start:
        reset_deepspeed()
        os.environ["MASTER_PORT"] = os.environ["PORT_OF_RESUME"]
        loop.run(job)


if __name__ == "__main__":
    main()
