"""The environment check on this machine's GPUs: the state that NVML tells, verified products, rates under load, pairs of GPUs."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.machine import describe_machine, write_result
from longhaul.checks.amd_gpu_facts import AmdReading
from longhaul.checks.build_check_rows import print_checks, problem_lines
from longhaul.checks.burn_in import copy_seconds
from longhaul.checks.core_speed import measure_slowest_core
from longhaul.checks.gpu_pair_copies import copy_between_gpus
from longhaul.checks.gpu_pair_paths import paths_between_torch_gpus
from longhaul.checks.hardware_checks import hardware_rows
from longhaul.checks.node_facts import gpus
from longhaul.checks.nvidia_gpu_facts import NVLINK_PATH, read_gpus
from longhaul.config.gpu_datasheets import datasheet
from longhaul.config.run_config import Checks
from tests.gpu.runs_on_gpus import GPUS, describe_gpus
from tests.support.healthy_node_facts import environment_job
from tests.support.node_facts_of_this_machine import facts_here


@pytest.mark.skipif(not GPUS, reason="needs a GPU")
def test_healthy_gpus_pass_and_every_rate_is_measured(tmp_path: Path):
    job = environment_job(
        nodes=1,
        gpus_per_node=GPUS,
        build=f"cuda {torch.version.cuda}",
        checks=Checks(burn_in_s=5.0),
        measures_speed=True,
        folder=str(tmp_path / "results"),
        scratch=str(tmp_path / "scratch"),
    )
    facts: dict[str, Any] = facts_here("here", job) | {"run_folder_seen_after_s": 0.0, "own_file_seen_after_s": 0.0}
    facts |= {"core_speed": measure_slowest_core()}
    rows = hardware_rows([facts], job)
    print_checks(rows)
    lines = [
        f"{row['result']:8} {row['component']:32} {row['check']:28} {row['value']}"
        + (f"; expected {row['expected']}" if row["expected"] else "")
        for row in rows
    ]
    versions = describe_machine(("torch", "nvidia-ml-py"))
    write_result("gpu_node_checks", ["command: make test-gpu", *versions[1:], describe_gpus(), *lines])
    assert problem_lines(rows) == []
    assert len(facts["measured"].gpu_pairs) == GPUS * (GPUS - 1) // 2
    reading, measured = facts["hardware"].gpus, facts["measured"]
    assert len(reading.gpus) == len(measured.devices) == GPUS and not reading.error and not reading.lost
    assert [gpu.uuid.removeprefix("GPU-") for gpu in reading.gpus] == [gpu["uuid"] for gpu in facts["gpus"]]
    for state, device, gpu in zip(reading.gpus, measured.devices, facts["gpus"], strict=True):
        sheet = datasheet(state.name)
        assert state.is_loaded and state.processes is not None and state.pcie_width
        assert device.verified >= 4 and device.wrong_rows == 0
        assert 0.8 < device.matrix_tflops / gpu["matrix_tflops"] < 1.2
        assert sheet is None or sheet.min_copy_gb_per_s < device.device_copy_gb_per_s < 1.05 * sheet.memory_gb_per_s


@pytest.mark.skipif(not GPUS, reason="needs a GPU")
def test_a_wrong_product_is_found_on_a_gpu():
    from longhaul.checks.matrix_products import ExactProduct

    exact, device = ExactProduct(), torch.device("cuda")
    product_NN = torch.mm(*exact.factors(device))
    assert exact.count_wrong_rows(product_NN) == 0
    product_NN[4000, 17] += 1
    assert exact.count_wrong_rows(product_NN) == 1


@pytest.mark.skipif(GPUS < 2, reason="needs two GPUs")
def test_pairs_of_gpus_copy_fast_and_exactly_and_changed_bytes_are_found():
    """The rate is that of the link, not of a copy through the host, where NVML states NVLink."""
    devices = [torch.device("cuda", index) for index in range(GPUS)]
    facts, reading = gpus(), read_gpus()
    started = time.perf_counter()
    pairs = copy_between_gpus(devices, 64 * 2**20)
    seconds = time.perf_counter() - started
    paths = paths_between_torch_gpus(facts, reading, AmdReading([]))
    print(f"{len(pairs)} pairs took {seconds:.1f} s; {paths}; {pairs}")
    assert len(pairs) == GPUS * (GPUS - 1) // 2 and seconds < 10
    for pair in pairs:
        assert pair.wrong_bytes == 0
        assert pair.gb_per_s > (100 if paths.get((pair.first, pair.second)) == NVLINK_PATH else 3), pairs

    def change_a_byte(to: torch.Tensor, source: torch.Tensor) -> float:
        seconds = copy_seconds(to, source)
        to.view(torch.uint8)[12345] += 1
        return seconds

    assert {pair.wrong_bytes for pair in copy_between_gpus(devices, 2**20, change_a_byte)} == {2}
