"""A stage that runs out of GPU memory names the next smaller settings."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from longhaul.errors import InputError
from longhaul.train.out_of_memory import names_smaller_settings
from tests.support.small_configs import base_stage


def test_lack_of_gpu_memory_names_the_next_smaller_settings(tmp_path: Path):
    job = base_stage(tmp_path)
    job = job.model_copy(update={"stage": job.stage.model_copy(update={"micro_batch_size": 4})})
    with pytest.raises(InputError) as refused, names_smaller_settings(job):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has a capacity of 8 GiB")
    assert refused.value.message == (
        "stage base on 1 x 1 GPUs: out of memory with micro_batch_size 4 and activation_checkpointing none: "
        "CUDA out of memory. Tried to allocate 2.00 GiB."
    )
    assert refused.value.hint == "set micro_batch_size to 2 or set activation_checkpointing to selective"
