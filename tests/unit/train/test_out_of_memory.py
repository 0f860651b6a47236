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


@pytest.mark.parametrize(
    "text",
    [
        "NCCL error in: ProcessGroupNCCL.cpp:94, unhandled cuda error\nLast error:\nCuda failure 2 'out of memory'",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "HIP error: out of memory",
    ],
)
def test_memory_that_other_libraries_allocate_counts_too(tmp_path: Path, text: str):
    with pytest.raises(InputError) as refused, names_smaller_settings(base_stage(tmp_path)):
        raise torch.distributed.DistBackendError(text)
    assert refused.value.message.endswith(text.splitlines()[-1])


@pytest.mark.parametrize("text", ["CUDA error: an illegal memory access was encountered", "can't allocate memory"])
def test_other_errors_stay_as_they_are(tmp_path: Path, text: str):
    with pytest.raises(RuntimeError, match=text), names_smaller_settings(base_stage(tmp_path)):
        raise RuntimeError(text)
