"""Variables of jobs: derived ones follow from site and request, and never replace one that is set."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from longhaul.artifacts.paths import JobId
from longhaul.jobs.environment_variables import job_variables
from longhaul.jobs.job_kind import job_request
from longhaul.jobs.launch_files import render_job
from tests.support.small_configs import LOCAL, plan_of

BASE = JobId("train", ("base",))
ALL_GPUS = {"stages.0.gpus_per_node": 8, "stages.0.global_batch_size": 16}
MULTICAST = {"NCCL_NVLS_ENABLE", "TORCH_SYMM_MEM_DISABLE_MULTICAST", "NVSHMEM_DISABLE_NVLS"}


def variables(folder: Path, config: dict[str, Any] | None = None, site: dict[str, Any] | None = None) -> dict[str, str]:
    plan = plan_of(folder, config, site)
    found = job_variables(plan.site, job_request(plan, BASE))
    assert all(variable.source and variable.reason for variable in found)
    assert len({variable.name for variable in found}) == len(found)
    return {variable.name: variable.value for variable in found}


@pytest.mark.parametrize(
    ("gpus", "site", "is_off"),
    [
        (4, {}, True),
        (8, {}, False),
        (1, {}, False),
        (4, {"partitions.0.exclusive": True}, False),
        (4, {"accelerator": {"rocm": "6.4"}}, False),
        (8, {"interconnect.nvlink_multicast": "off"}, True),
        (8, {"interconnect.nvlink_multicast": "auto"}, False),
        (4, {"interconnect.nvlink_multicast": "off", "partitions.0.exclusive": True}, True),
        (4, {"accelerator": {"rocm": "6.4"}}, False),
    ],
)
def test_multicast_is_off_where_other_jobs_may_use_it(gpus: int, site: dict[str, Any], is_off: bool, tmp_path: Path):
    stage = {"stages.0.gpus_per_node": gpus, "stages.0.global_batch_size": 16}
    found = variables(tmp_path, stage, site)
    assert MULTICAST & set(found) == (MULTICAST if is_off else set())
    assert found.get("NCCL_NVLS_ENABLE", "0") == "0"


def test_flight_recorder_is_on_for_gpus_alone(tmp_path: Path):
    assert variables(tmp_path, ALL_GPUS)["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "1"
    cpus = {**LOCAL, "accelerator": "cpu", "partitions.0.node.gpus": 0}
    found = variables(tmp_path, {"stages.0.gpus_per_node": 1}, cpus)
    assert found["DS_ACCELERATOR"] == "cpu" and not [name for name in found if name.startswith(("NCCL", "TORCH"))]


def test_site_file_replaces_what_is_derived(tmp_path: Path):
    site = {"environment": {"NCCL_NVLS_ENABLE": "1"}, "interconnect.socket_interface": "ib0"}
    found = variables(tmp_path, {"stages.0.gpus_per_node": 4, "stages.0.global_batch_size": 16}, site)
    assert found["NCCL_NVLS_ENABLE"] == "1" and found["NCCL_SOCKET_IFNAME"] == found["GLOO_SOCKET_IFNAME"] == "ib0"


@pytest.mark.parametrize(
    ("inherited", "site", "value"), [({}, {}, "0"), ({"NCCL_NVLS_ENABLE": ""}, {}, ""), ({"NCCL_NVLS_ENABLE": "1"}, {}, "1"),
    ({"NCCL_NVLS_ENABLE": "1"}, {"environment": {"NCCL_NVLS_ENABLE": "2"}}, "2"),
    ({"NCCL_NVLS_ENABLE": "1"}, {"interconnect.nvlink_multicast": "off"}, "0")]
)  # fmt: skip
def test_launch_script_keeps_what_is_set(inherited: dict[str, str], site: dict[str, Any], value: str, tmp_path: Path):
    """A module or the user's shell may have set it; an empty value counts, too. Keys of the site file replace it."""
    plan = plan_of(tmp_path, {"stages.0.gpus_per_node": 4, "stages.0.global_batch_size": 16}, site)
    script = render_job(plan, BASE, tmp_path).files["launch.sh"]
    script = script[: script.index("exec ")] + 'printf %s "$NCCL_NVLS_ENABLE"'
    environment = {name: text for name, text in os.environ.items() if not name.startswith("NCCL_")} | inherited
    shown = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert shown.stdout == value
