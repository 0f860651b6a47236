"""Initial weights have the same bits on CPUs and GPUs."""

from __future__ import annotations

import pytest
import torch

from longhaul.train.counter_based_normal import normal


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_makes_the_same_bits_as_a_cpu():
    shape = torch.Size([3001, 1999])
    on_cpu, on_gpu = (normal("0/name", shape, 0.02, torch.device(device)) for device in ("cpu", "cuda"))
    assert torch.equal(on_cpu, on_gpu.cpu())
