"""One of several ranks that train the cells of one world size one after the other: python worker.py SHARED FOLDER CELL…

A cell is `twin/layout`, or `twin/layout/pretrained=FOLDER` to begin with a Hugging Face folder, or
`twin/layout/start=CHECKPOINT.JSON` to begin where another layout's stage ended. Each trains half of its steps and ends. It then
goes on from its checkpoint in a new engine, as a job that was cut off does, unless it only shows how it begins. A rank whose
cell fails prints why and ends with code 1.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from deepspeed.comm import comm
from deepspeed.runtime.pipe import p2p
from deepspeed.utils import groups

from longhaul.checks.node_facts import build_ops
from longhaul.jobs.specs import TrainSpec
from longhaul.train import loop
from tests.parity.parity_cases import LAYOUTS
from tests.parity.run_parity_case import STEPS, config, prepare

TWIN_SWAPPED_BYTES = 4096
"""A rank's part of a tensor that is swapped; less stays in memory, here only norms and biases. DeepSpeed has 1 MiB."""


def reset_deepspeed() -> None:
    """Forgets the groups of the cell before; a user's process trains one stage."""
    groups._release_process_group_references(None)
    comm.cdb = None
    p2p._groups = None
    p2p._grid = None


def load_ops(stages: Iterable[dict[str, Any]]) -> None:
    """Those that the stages' offloading needs: it takes a process seconds, and the ranks have what it was forked with."""
    places = {place for stage in stages for place in stage.get("zero", {}).values()}
    names = ("cpu_adam", "pin_memory", "async_io") if "nvme" in places else ("cpu_adam",) if "cpu" in places else ()
    assert not build_ops(names, None)["failed"]


def before_fork() -> None:
    load_ops(LAYOUTS[name.split("/")[1]].stage for name in sys.argv[3:])


def swap_twins() -> None:
    """Has twins swapped, the states of the optimizer in several groups."""
    from deepspeed.runtime.swap_tensor.optimizer_utils import OptimizerSwapper
    from deepspeed.runtime.swap_tensor.partitioned_param_swapper import AsyncPartitionedParameterSwapper

    from longhaul.jobs import launch_files as render

    render.SWAP_GROUP = 20_000
    for kind in (OptimizerSwapper, AsyncPartitionedParameterSwapper):
        _swap_from(kind, TWIN_SWAPPED_BYTES)


def _swap_from(kind: type[Any], least_bytes: int) -> None:
    make = kind.__init__

    def make_for_twins(swapper: Any, *arguments: Any, **named: Any) -> None:
        make(swapper, *arguments, **named)
        swapper.min_aio_bytes = least_bytes

    kind.__init__ = make_for_twins


def train(job: TrainSpec, first_port: int, begins: bool) -> None:
    """In two legs; the first alone where it is asked how the stage begins."""
    half = job.model_copy(update={"steps": STEPS // 2, "exportable": ()})
    for index, leg in enumerate([half] if begins else [half, job]):
        os.environ["MASTER_PORT"] = str(first_port + index)
        loop.run(leg)
        reset_deepspeed()


def main() -> None:
    shared, folder = Path(sys.argv[1]), Path(sys.argv[2])
    swap_twins()
    for index, name in enumerate(sys.argv[3:]):
        twin, layout, *begin = name.split("/", 2)
        own = folder / twin / (layout if not begin else f"{layout}, {begin[0].partition('=')[0]}")
        try:
            # Every rank writes the same files, each of them atomically.
            job, _ = prepare(own, shared, config(twin, layout), *begin)
            train(job, int(os.environ["PARITY_PORT"]) + 2 * index, begins=bool(begin))
        except BaseException:
            print(f"FAILED {name}\n{traceback.format_exc()}\n", flush=True)
            os._exit(1)


if __name__ == "__main__":
    main()
