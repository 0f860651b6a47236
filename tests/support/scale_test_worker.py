"""One rank of a scale test, each rank a node of its own: python scale_test_worker.py FOLDER SHARED [KEY=VALUE…]

FOLDER: gets the reports <nodes>.json. SHARED: tokenizer and shards. KEY=VALUE: keys of the config's scale_test.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from longhaul.checks.scale_test import run
from longhaul.config.scale_test_config import ScaleTest
from longhaul.errors import UserError
from longhaul.jobs.kinds.scale_test_job import ScaleTestSpec
from longhaul.planning.scale_test_sizes import STEPS, WARM_UP_STEPS
from tests.parity.prepare_case import prepare_case, run_config

NO_LIMITS = {"max_step_time_spread": 1000.0, "min_efficiency": 0.0}
"""The speed of ranks on a shared machine says nothing."""


def main() -> None:
    os.environ["LOCAL_WORLD_SIZE"] = "1"
    folder, shared, nodes = Path(sys.argv[1]), Path(sys.argv[2]), int(os.environ["WORLD_SIZE"])
    limits: dict[str, Any] = {**NO_LIMITS}
    limits |= {key: float(value) for key, _, value in (word.partition("=") for word in sys.argv[3:])}
    stage = {"steps": STEPS, "global_batch_size": 2, "micro_batch_size": 2, "export": "none"}
    own = folder / f"rank-{os.environ['RANK']}-of-{nodes}"
    train, _ = prepare_case(own, shared, run_config("llama", "one rank", **stage))
    stage_on_nodes = train.stage.model_copy(update={"nodes": nodes, "global_batch_size": 2 * nodes})
    changes = {
        "stage": stage_on_nodes,
        "world_size": nodes,
        "data_parallel": nodes,
        "asynchronous_saves": False,
        "exported_checkpoints": (),
        "weights_root": str(folder / "discarded"),
        "out": str(folder / f"{nodes}.json"),
        "limits": ScaleTest(**limits),
        "warm_up_steps": WARM_UP_STEPS,
        "smallest": None if nodes == 1 else str(folder / "1.json"),
    }
    try:
        run(ScaleTestSpec.model_validate({**dict(train), **changes}))
    except UserError as error:
        print(error)


if __name__ == "__main__":
    main()
