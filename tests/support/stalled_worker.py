"""One rank of three: rank 1 does not come to the third collective of the default group. Each rank then writes its record.

Arguments: beginning of the records' file names. torch writes such a file itself only under NCCL, in the same format.
"""

from __future__ import annotations

import os
import sys
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch._C import _distributed_c10d as c10d

_TIMEOUT_S = 3


def main() -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=_TIMEOUT_S))
    rank, values = dist.get_rank(), torch.ones(4)
    dist.all_reduce(values)
    dist.barrier()
    pair = dist.new_group([0, 2])
    if rank != 1:
        dist.all_reduce(values, group=pair)
        with suppress(RuntimeError):
            dist.all_reduce(values)
    else:
        time.sleep(_TIMEOUT_S + 1)
    record = c10d._dump_fr_trace(True, False, False)  # pyright: ignore[reportAttributeAccessIssue]
    Path(f"{sys.argv[1]}{rank}").write_bytes(record)
    sys.stdout.flush()
    os._exit(0)  # without waiting for the other ranks, whose connections are broken


if __name__ == "__main__":
    main()
