"""The process that watches a node check or a fabric check never calls CUDA, before the fork and after it.

After a call, CUDA fails in each forked process; and on a broken GPU, the call itself never returns.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from longhaul.config.run_config import Checks
from longhaul.config.site_config import FabricLimits
from longhaul.jobs.kinds.fabric_job import FabricSpec
from tests.support.healthy_node_facts import environment_job

_CALLS_ARE_PRINTED = """
import os, sys
from importlib import import_module
from pathlib import Path

import torch

watching = os.getpid()

def printed(name, function):
    def call(*arguments, **options):
        if name != "_accelerator_getAccelerator":  # it says for what torch was built
            os.write(1, f"{'watching' if os.getpid() == watching else 'child'} process calls {name}\\n".encode())
        return function(*arguments, **options)
    return call

def watch(module, names):
    for name in names:
        setattr(module, name, printed(name, getattr(module, name)))

watch(torch.cuda, ("is_available", "device_count", "init", "_lazy_init", "current_device", "set_device", "mem_get_info"))
watch(torch.cuda, ("get_device_properties", "synchronize", "current_stream", "_device_count_nvml"))
watch(torch._C, [name for name in dir(torch._C) if name.startswith(("_cuda_get", "_cuda_init", "_accelerator_"))])

kind = sys.argv[1]
specs = {"environment": "EnvironmentSpec", "fabric": "FabricSpec"}
spec = getattr(import_module(f"longhaul.jobs.kinds.{kind}_job"), specs[kind]).read(Path(sys.argv[2]))
import_module(f"longhaul.checks.{kind}").run(spec)
for library in ("deepspeed", "triton"):  # they call CUDA when they are imported
    if library in sys.modules:
        print("watching process imports", library)
"""


def write_environment_job(folder: Path) -> None:
    paths = {"folder": str(folder / "results"), "job_folder": str(folder), "out": str(folder / "environment.json")}
    environment_job(nodes=1, gpus_per_node=1, build="cpu", measures_speed=True, scratch=str(folder),
                    checks=Checks(min_disk_free_gb=0.001, burn_in_s=0.1), **paths).write(folder / "job.json")  # fmt: skip


def write_fabric_job(folder: Path) -> None:
    FabricSpec(
        run="r", nodes=1, gpus_per_node=1, limits=FabricLimits(), node_limits=FabricLimits(), baseline=None,
        pairs_only=False, bad_hardware="refuse", folder=str(folder), out=str(folder / "fabric.json"),
    ).write(folder / "job.json")  # fmt: skip


@pytest.mark.parametrize("kind", ["environment", "fabric"])
def test_only_the_child_calls_cuda(tmp_path: Path, kind: str):
    write_environment_job(tmp_path) if kind == "environment" else write_fabric_job(tmp_path)
    command = [sys.executable, "-c", _CALLS_ARE_PRINTED, kind, str(tmp_path / "job.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240, env=os.environ)
    assert done.returncode == 0, done.stderr
    assert "child process calls is_available" in done.stdout and "watching process" not in done.stdout
