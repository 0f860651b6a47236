"""Collects facts about one node: versions, GPUs, hardware, memory, disk, compiler, compiled ops; node_problems.py and
hardware_checks.py classify them.
"""

from __future__ import annotations

import mmap
import os
import platform
import shutil
import subprocess
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from longhaul.artifacts.atomic_files import free_bytes
from longhaul.checks.amd_gpu_facts import AmdReading, with_earlier_processes
from longhaul.checks.amd_gpu_reading import read_amd_gpus
from longhaul.checks.gpu_labels import names_of_torch_gpus
from longhaul.checks.gpu_pair_paths import paths_between_torch_gpus
from longhaul.checks.hardware_facts import read_hardware
from longhaul.checks.nvidia_gpu_facts import (
    GpuReading,
    chosen_gpus,
    read_gpus,
    with_earlier_nvlink_errors,
    with_processes_left,
    with_processes_of,
)
from longhaul.checks.process_limits import lockable_bytes
from longhaul.checks.sysfs_files import read_text
from longhaul.config.software_config import build_name
from longhaul.errors import first_line
from longhaul.jobs.container import SHARED_MEMORY
from longhaul.jobs.kinds.environment_job import EnvironmentSpec
from longhaul.runtime.compiled_ops import remove_stale_builds, use_ops_folder
from longhaul.runtime.swap_folders import remove_stale_swap_folders, swap_folder

if TYPE_CHECKING:
    from longhaul.checks.measurement_types import NodeMeasurements

PACKAGES = ("torch", "deepspeed", "transformers", "tokenizers", "datasets", "safetensors", "numpy")
_RELEASE_S = 15.0
"""The driver may need so long to free the memory of a process that was killed."""
_SHORT_BURN_IN_S = 3.0
"""Before each attempt of a training."""
PROBE_BYTES = 4096
"""One block of a file system. A quota may allow an empty or a tiny file when no block is left."""


def node_facts(host: str, job: EnvironmentSpec) -> dict[str, Any]:
    """Return the facts of this node."""
    folder = Path(job.folder)
    earlier, earlier_amd = (
        read_gpus(),
        read_amd_gpus(),
    )  # before torch opens the GPUs: what runs on them now is not of this job
    found = gpus()
    idle = _released_gpus(earlier, [gpu["uuid"] for gpu in found])
    measured, (now, now_amd) = _measure(job, found)
    now = with_earlier_nvlink_errors(idle, with_processes_of(idle, now))
    return {
        "host": host,
        "kernel": platform.release(),
        "cpus": len(os.sched_getaffinity(0)),
        "memory_bytes": psutil.virtual_memory().total,
        "shared_memory_bytes": _free_bytes(Path(SHARED_MEMORY)),
        "disk_free_bytes": _free_bytes(folder),
        "write_error": write_error(folder),
        "compiler": compiler(),
        "gpus": found,
        "hardware": read_hardware(now, with_earlier_processes(earlier_amd, now_amd)),
        "measured": measured,
        "versions": versions(),
    }


def _released_gpus(earlier: GpuReading, uuids: Sequence[str]) -> GpuReading:
    """Return the state of the job's GPUs. Processes of a killed attempt get some seconds to release them.

    earlier: the state of all GPUs before this process opened them
    """
    deadline = time.monotonic() + _RELEASE_S
    reading = chosen_gpus(earlier, uuids)
    # A job without GPUs waits for none: processes of other jobs stay.
    while uuids and any(gpu.processes for gpu in reading.gpus) and time.monotonic() < deadline:
        time.sleep(1)
        reading = with_processes_left(reading, read_gpus(uuids))
    return reading


def _measure(
    job: EnvironmentSpec, found: list[dict[str, Any]]
) -> tuple[NodeMeasurements | None, tuple[GpuReading, AmdReading]]:
    """Return the measurements, and the state of the job's GPUs under load. A short check measures nothing but GPUs.

    found: facts of the GPUs, which a complete check gives their rate of matrix products
    """
    uuids, addresses = [gpu["uuid"] for gpu in found], [gpu["pci_address"] for gpu in found]

    def read(is_loaded: bool = False) -> tuple[GpuReading, AmdReading]:
        return read_gpus(uuids, is_loaded), read_amd_gpus(addresses)

    if not (found or job.measures_speed):
        return None, read()
    from longhaul.checks.measurement_types import NodeMeasurements
    from longhaul.checks.node_measurements import read_under_load

    try:
        measured = _measure_speed(job, found)
        readings = read_under_load(lambda: read(is_loaded=bool(uuids)))
    except RuntimeError as error:  # of a GPU that fails under load, or whose memory another process holds
        return NodeMeasurements([], error=first_line(error)), read()
    names, paths = names_of_torch_gpus(found, readings[0]), paths_between_torch_gpus(found, *readings)
    return measured.with_names(names, paths), readings


def _measure_speed(job: EnvironmentSpec, found: list[dict[str, Any]]) -> NodeMeasurements:
    from longhaul.checks.node_measurements import matrix_rates, measure_gpus, measure_node

    if not job.measures_speed:
        return measure_gpus(min(job.checks.burn_in_s, _SHORT_BURN_IN_S))
    for gpu, rate in zip(found, matrix_rates(), strict=True):
        gpu["matrix_tflops"] = rate
    return measure_node(Path(job.folder), job.scratch, job.checks.burn_in_s)


def versions() -> dict[str, str | None]:
    """Return the versions that must be the same on all nodes; None for what is not installed."""
    import torch

    found: dict[str, str | None] = {"python": platform.python_version()}
    found |= {package: _version(package) for package in PACKAGES}
    found["build"] = torch_build(torch.version.cuda, torch.version.hip)
    found["nccl"] = _nccl() if torch.cuda.is_available() else None
    found["driver"] = _driver()
    return found


def _nccl() -> str:
    from torch.cuda import nccl

    return ".".join(map(str, nccl.version()))


def torch_build(cuda: str | None, hip: str | None) -> str:
    """Return torch's build in the notation of the site file. torch.version.hip has a patch level: 6.4.43483-a187df25c."""
    return build_name(cuda, ".".join(hip.split(".")[:2]) if hip else None)


def gpus() -> list[dict[str, Any]]:
    """Return name, UUID, PCI address and memory of every GPU that this job may use."""
    import torch

    if not torch.cuda.is_available():
        return []
    found = (torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count()))
    return [
        {
            "name": gpu.name,
            "uuid": str(getattr(gpu, "uuid", "")),  # not in each ROCm build
            "pci_address": _pci_address(gpu),
            "memory_bytes": gpu.total_memory,
        }
        for gpu in found
    ]


def _pci_address(properties: Any) -> str:
    """Return the address as sysfs writes it. torch's stubs do not name these properties, but torch/numa/binding.py uses them."""
    numbers = [getattr(properties, f"pci_{part}_id", None) for part in ("domain", "bus", "device")]
    if None in numbers:
        return ""
    domain, bus, device = numbers
    return f"{domain:04x}:{bus:02x}:{device:02x}.0"


def compiler() -> str | None:
    """Return the first line of the C++ compiler's version; None without a compiler. torch compiles with $CXX."""
    path = shutil.which(os.environ.get("CXX") or "c++")
    return _first_output_line([path, "--version"]) if path else None


def write_error(folder: Path) -> str | None:
    """Return why `folder` cannot be written to, or None when it can.

    A file of PROBE_BYTES is written to the disk, as permissions say nothing about quotas.
    """
    probe = folder / f".write-test-{uuid.uuid4().hex}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with probe.open("wb") as stream:
            stream.write(os.urandom(PROBE_BYTES))
            os.fsync(stream.fileno())
        return None
    except OSError as error:
        return error.strerror or str(error)
    finally:
        with suppress(OSError):
            probe.unlink()


def build_ops(names: Sequence[str], scratch: str | None) -> dict[str, Any]:
    """Remove locks of killed builds, and compile DeepSpeed's ops on this node before any rank needs them.

    Returns {"folder", "removed": [op], "built": {op: seconds}, "failed": {op: reason}}.
    """
    folder = use_ops_folder(scratch)
    result: dict[str, Any] = {"folder": str(folder), "removed": remove_stale_builds(folder), "built": {}, "failed": {}}
    for name in names:
        started = time.monotonic()
        try:
            _builder(name).load(verbose=False)
            result["built"][name] = round(time.monotonic() - started, 1)
        except Exception as error:  # compilers fail in many ways, and the report must show each of them
            result["failed"][name] = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
    return result


def swap_facts(scratch: str) -> dict[str, Any]:
    """Remove what killed jobs left below `scratch`, and test whether optimizer states can be offloaded there.

    Returns {"folder", "removed": [folder], "free_bytes", "lockable_bytes", "error": why it is impossible, or None}.
    """
    removed = remove_stale_swap_folders(scratch)
    with swap_folder(scratch, "test") as folder:
        error = _unbuffered_write_error(folder)
    return {
        "folder": scratch,
        "removed": removed,
        "free_bytes": _free_bytes(Path(scratch)),
        "lockable_bytes": lockable_bytes(),
        "error": error,
    }


def _unbuffered_write_error(folder: Path) -> str | None:
    """Return why the file system refuses unbuffered writes (O_DIRECT), which libaio needs; None when it accepts them.

    tmpfs of old kernels refuses them.
    """
    with mmap.mmap(-1, mmap.PAGESIZE) as page:  # aligned memory, which O_DIRECT requires
        try:
            handle = os.open(folder / "direct", os.O_CREAT | os.O_WRONLY | os.O_DIRECT, 0o600)
            try:
                os.write(handle, page)
            finally:
                os.close(handle)
        except OSError as error:
            return error.strerror or str(error)
    return None


def _builder(name: str) -> Any:
    from longhaul.compat.cpuinfo import read_cpu_once_in_this_process
    from longhaul.compat.deepspeed_ops import compile_without_debug_information, op_builder

    read_cpu_once_in_this_process()
    compile_without_debug_information()
    return op_builder(name)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _driver(amd: Path = Path("/sys/module/amdgpu/version")) -> str | None:
    if amd.exists():
        return read_text(amd)
    tool = shutil.which("nvidia-smi")
    return _first_output_line([tool, "--query-gpu=driver_version", "--format=csv,noheader"]) if tool else None


def _first_output_line(command: list[str]) -> str | None:
    """Return the first line that a command prints; None when it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(done.stdout.splitlines()), None)


def _free_bytes(folder: Path) -> int | None:
    """Return the free bytes of the file system of `folder`; None when it does not answer."""
    try:
        return free_bytes(folder)
    except OSError:
        return None
