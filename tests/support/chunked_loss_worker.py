"""Computes the chunked loss with a vocabulary that is sliced over the ranks; rank 0 saves the gathered gradients.

Argument: the folder for the results.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from longhaul.config.stage_config import Parallel
from longhaul.train.loss import chunked_loss_sum
from longhaul.train.parallel.parallel_dims import build_parallel_dims
from tests.support.loss_inputs import operands


def main() -> None:
    dist.init_process_group("gloo")
    ranks = dist.get_world_size()
    dims = build_parallel_dims(Parallel(tensor=ranks), dist.get_rank(), ranks)
    hidden_NH, weight_VH, labels_N = operands()
    own_VH = weight_VH.detach().chunk(ranks)[dims.rank].requires_grad_()
    loss = chunked_loss_sum(hidden_NH, own_VH, labels_N, dims, chunk=16)
    loss.backward()
    assert hidden_NH.grad is not None and own_VH.grad is not None
    dist.all_reduce(hidden_NH.grad)
    parts = [torch.empty_like(own_VH.grad) for _ in range(ranks)]
    dist.all_gather(parts, own_VH.grad)
    if dims.rank == 0:
        found = {"loss": loss.detach(), "hidden": hidden_NH.grad, "weight": torch.cat(parts)}
        save_file(found, Path(sys.argv[1]) / f"ranks{ranks}.safetensors")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
