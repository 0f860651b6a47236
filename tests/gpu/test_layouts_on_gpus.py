"""Every axis of a layout over NCCL: two GPUs against one process on one GPU, in fp32. Needs two GPUs; `make test-gpu`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import parity_table as parity
from machine import header, publish

TWIN = "qwen3_moe"
LAYOUTS = ("data 2, ZeRO 3", "tensor 2", "pipeline 2", "expert 2", "sequence 2")
# Kernels of other shapes sum in another order, and atomic additions in another one every time; 1e-5 holds on CPUs.
BOUND = 1e-4

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every layout trained on two GPUs, and the reference on one, from the same seed on the same samples."""
    folder = tmp_path_factory.mktemp("layouts")
    shared = parity.make_data(folder / "shared")
    cells: list[tuple[str, ...]] = [(TWIN, layout) for layout in LAYOUTS]
    failures = parity.train(1, [(TWIN, "one")], shared, folder, "cuda") | parity.train(2, cells, shared, folder, "cuda")
    assert not failures, "\n".join(f"{cell}: {failure}" for cell, failure in failures.items())
    return folder


@pytest.fixture(scope="module")
def record() -> Iterator[list[str]]:
    """Lines for bench/results/gpu-layouts.txt."""
    lines = [
        f"2 x {torch.cuda.get_device_name(0)}, NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}, fp32 without TF32"
    ]
    yield lines
    publish("gpu-layouts", ["command: make test-gpu", *header(("torch", "deepspeed", "transformers"))[1:], *lines])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_gpus_do_what_one_does(folder: Path, record: list[str], layout: str):
    wanted, found = (parity.steps(folder / TWIN / name) for name in ("one", layout))
    assert len(found) == len(wanted) == parity.STEPS
    loss, norm = (
        parity.largest([row[key] for row in found], [row[key] for row in wanted]) for key in ("loss", "grad_norm")
    )
    proof = parity.prove((TWIN, layout), folder / "shared", folder / TWIN / layout)
    record.append(
        f"{layout:>16}: loss {loss:.1e}, grad norm {norm:.1e} off one GPU's; {proof['tensors']['equal']} tensors equal; "
        f"logits {proof['logits']['max_abs_difference']:.1e} of {proof['logits']['bound']:.1e}"
    )
    assert max(loss, norm) <= BOUND
    assert proof["tensors"]["equal"] == proof["tensors"]["count"] > 0
    assert proof["logits"]["max_abs_difference"] <= proof["logits"]["bound"]
