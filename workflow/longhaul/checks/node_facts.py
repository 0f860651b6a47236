"""Collects facts about one node: versions of the packages that must be the same, GPUs, hardware, memory, disk, compiler,
compiled ops; node_problems.py and hardware_checks.py classify them.
"""

from __future__ import annotations

import mmap
import os
import platform
import shutil
import subprocess
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import psutil

from longhaul.artifacts.atomic_files import free_bytes
from longhaul.checks.amd_gpu_facts import AmdReading, with_earlier_processes
from longhaul.checks.amd_gpu_reading import read_amd_gpus
from longhaul.checks.gpu_labels import names_of_torch_gpus
from longhaul.checks.gpu_pair_paths import paths_between_torch_gpus
from longhaul.checks.hardware_facts import HardwareFacts, read_hardware
from longhaul.checks.hung_steps import COMMANDS, GPU_DRIVER, GPUS, KERNEL, OPS, RUN_FOLDER, SCRATCH
from longhaul.checks.nvidia_gpu_facts import (
    GpuReading,
    chosen_gpus,
    read_gpus,
    with_earlier_nvlink_errors,
    with_processes_left,
    with_processes_of,
)
from longhaul.checks.process_limits import lockable_bytes
from longhaul.checks.run_parts_in_child import HungStep, Part, Step, announce
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


def node_parts(job: EnvironmentSpec) -> list[Part]:
    """Return the parts of the check of this node, for run_parts_in_child.py."""
    folder = Path(job.folder)
    return [
        # Before torch opens the GPUs: what runs on them now is not of this job.
        Part("earlier", Step("state of the GPUs", GPU_DRIVER), lambda _: (read_gpus(), read_amd_gpus())),
        Part("gpus", Step("first call into CUDA or ROCm", GPUS), lambda _: gpus()),
        Part("idle", Step("state of the GPUs", GPU_DRIVER), _read_idle),
        Part("matrix_rates", Step("matrix products", GPUS), lambda _: _matrix_rates() if job.measures_speed else []),
        Part("devices", Step("burn-in", GPUS), lambda found: _load_devices(job, found.get("gpus", []))),
        Part("pairs", Step("copies between GPUs", GPUS), lambda found: _copy_between_gpus(found["devices"])),
        Part("now", Step("state of the GPUs under load", GPU_DRIVER), _read_under_load),
        Part("hardware", Step("reading of /sys, /proc and the kernel log", KERNEL), _read_hardware),
        Part("versions", Step("versions of the packages", COMMANDS), lambda found: versions(bool(found.get("gpus")))),
        Part("driver", Step("version of the driver", COMMANDS), lambda _: _driver()),
        Part("compiler", Step("version of the C++ compiler", COMMANDS), lambda _: compiler()),
        Part("folder", Step(f"free space of {folder}, and a write", RUN_FOLDER), lambda _: _folder_facts(folder)),
        *(_speed_parts(job) if job.measures_speed else ()),
    ]


def _speed_parts(job: EnvironmentSpec) -> list[Part]:
    """Return the parts that a short check leaves out. In this process they touch no disk: tempfile would write to it."""
    folder, has_gpus = Path(job.folder), job.build != "cpu"  # not by torch, which would open them
    return [
        Part("memory", Step("memory bandwidth", KERNEL), lambda _: _measurements().memory_rate(has_gpus)),
        Part("run_folder", Step(f"write, fsync, rename and read in {folder}", RUN_FOLDER),
             lambda _: _measurements().write_to_run_folder(folder, has_gpus)),
        Part("local_disk", Step(f"writes and reads past the page cache in {_scratch_text(job)}", SCRATCH),
             lambda _: _measurements().local_disk_speed(job.scratch, has_gpus)),
    ]  # fmt: skip


def scratch_parts(job: EnvironmentSpec) -> list[Part]:
    """Return the parts that make storage.scratch ready: compiled ops, and folders for offloaded states."""
    found = [Part("ops", Step(f"locks of killed builds in {_scratch_text(job)}", SCRATCH),
                  lambda found: build_ops(_buildable_ops(job, found), job.scratch))]  # fmt: skip
    scratch = job.scratch
    if job.swap_bytes and scratch:
        found.append(
            Part("swap", Step(f"folders of offloaded states in {scratch}", SCRATCH), lambda _: swap_facts(scratch))
        )
    return found


def _buildable_ops(job: EnvironmentSpec, results: Mapping[str, Any]) -> Sequence[str]:
    """Return the ops to compile; none where the GPUs hang, as DeepSpeed opens them."""
    return job.prebuild_ops if "pairs" in results else ()


def _scratch_text(job: EnvironmentSpec) -> str:
    return job.scratch or os.environ.get("TMPDIR", "/tmp")  # nosec B108  # only named


def _measurements() -> ModuleType:
    """Import torch, where something is measured."""
    from longhaul.checks import node_measurements

    return node_measurements


def node_facts(
    host: str, job: EnvironmentSpec, results: Mapping[str, Any], hung: Sequence[HungStep] = ()
) -> dict[str, Any]:
    """Return the facts of this node from the results of its parts; without those that a hung step hides.

    hung: the steps that did not end; problems are found with their `hangs`
    """
    found, rates = results.get("gpus", []), results.get("matrix_rates", [])
    readings = _state_at_end(results)
    names = names_of_torch_gpus(found, readings[0])
    facts = {
        "host": host,
        "kernel": platform.release(),
        "cpus": len(os.sched_getaffinity(0)),
        "memory_bytes": psutil.virtual_memory().total,
        "shared_memory_bytes": _free_bytes(Path(SHARED_MEMORY)),
        "disk_free_bytes": None,
        "write_error": None,
        **results.get("folder", {}),
        "compiler": results.get("compiler"),
        "gpus": [gpu | {"matrix_tflops": rate} for gpu, rate in zip(found, rates, strict=True)] if rates else found,
        "gpu_names": names,
        "hardware": results.get("hardware"),
        "measured": _joined_measurements(job, results, names, paths_between_torch_gpus(found, *readings)),
        "versions": _known_versions(results),
        "ops": results.get("ops", {"folder": None, "removed": [], "built": {}, "failed": {}}),
        "hung": list(hung),
    }
    return facts | ({"swap": results["swap"]} if "swap" in results else {})


def _known_versions(results: Mapping[str, Any]) -> dict[str, str | None]:
    """Return the versions; without one that a hung step hides, so that nothing is compared with it."""
    found = results.get("versions", {}) | ({"driver": results["driver"]} if "driver" in results else {})
    return {name: value for name, value in found.items() if name != "nccl" or "gpus" in results}


def _joined_measurements(
    job: EnvironmentSpec, results: Mapping[str, Any], names: Sequence[str], paths: Mapping[tuple[int, int], str]
) -> NodeMeasurements | None:
    """Return what the parts measured; None where a short check has no GPUs to measure."""
    from longhaul.checks.measurement_types import NodeMeasurements

    devices: NodeMeasurements | None = results.get("pairs", results.get("devices"))
    if devices is None and not job.measures_speed:
        return None
    found = devices or NodeMeasurements([])
    _, error = results.get("now", (None, ""))
    rest = {"memory_gb_per_s": "memory", "local_disk": "local_disk", "run_folder": "run_folder"}
    found = replace(found, error=found.error or error, **{name: results.get(part) for name, part in rest.items()})
    return found.with_names(names, paths) if found.devices else found


def _state_at_end(results: Mapping[str, Any]) -> tuple[GpuReading, AmdReading]:
    """Return the last state of the GPUs that was read."""
    nothing = GpuReading([]), AmdReading([])
    return results["now"][0] if "now" in results else results.get("earlier", nothing)


def _read_idle(results: Mapping[str, Any]) -> GpuReading:
    return _released_gpus(results["earlier"][0], [gpu["uuid"] for gpu in results.get("gpus", [])])


def _read_hardware(results: Mapping[str, Any]) -> HardwareFacts:
    now, now_amd = _state_at_end(results)
    earlier, earlier_amd = results.get("earlier", (now, now_amd))
    idle = results.get("idle", earlier)
    now = with_earlier_nvlink_errors(idle, with_processes_of(idle, now))
    return read_hardware(now, with_earlier_processes(earlier_amd, now_amd))


def _folder_facts(folder: Path) -> dict[str, Any]:
    return {"disk_free_bytes": _free_bytes(folder), "write_error": write_error(folder)}


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


def _matrix_rates() -> list[float]:
    """Return the rate of matrix products of each GPU by itself; [] if a GPU fails, which the burn-in then reports."""
    with suppress(RuntimeError):
        return _measurements().matrix_rates()
    return []


def _load_devices(job: EnvironmentSpec, found: Sequence[Mapping[str, Any]]) -> NodeMeasurements | None:
    """Return the results of the GPUs under load, of a complete check also those of a CPU. found: facts of the GPUs"""
    if not (found or job.measures_speed):
        return None
    from longhaul.checks.measurement_types import NodeMeasurements

    seconds = job.checks.burn_in_s if job.measures_speed else min(job.checks.burn_in_s, _SHORT_BURN_IN_S)
    try:
        return NodeMeasurements(_measurements().load_devices(seconds))
    except RuntimeError as error:  # of a GPU that fails under load, or whose memory another process holds
        return NodeMeasurements([], error=first_line(error))


def _copy_between_gpus(measured: NodeMeasurements | None) -> NodeMeasurements | None:
    """Return the measurements with those of all pairs of GPUs. measured: of the GPUs under load"""
    if measured is None or measured.error:  # after an error, each call into CUDA fails
        return measured
    try:
        return replace(measured, gpu_pairs=_measurements().copy_between_all_gpus())
    except RuntimeError as error:
        return replace(measured, error=first_line(error))


def _read_under_load(results: Mapping[str, Any]) -> tuple[tuple[GpuReading, AmdReading], str]:
    """Return the state of the job's GPUs, under load if they work; and why they do not."""
    found: list[dict[str, Any]] = results.get("gpus", [])
    uuids, addresses = [gpu["uuid"] for gpu in found], [gpu["pci_address"] for gpu in found]

    def read(is_loaded: bool = False) -> tuple[GpuReading, AmdReading]:
        announce("state of the GPUs under load", subject=GPU_DRIVER)
        return read_gpus(uuids, is_loaded), read_amd_gpus(addresses)

    measured: NodeMeasurements | None = results.get("pairs")
    if not found or measured is None or measured.error:
        return read(), ""
    try:
        return _measurements().read_under_load(lambda: read(is_loaded=True)), ""
    except RuntimeError as error:
        return read(), first_line(error)


def versions(has_gpus: bool) -> dict[str, str | None]:
    """Return the versions that must be the same on all nodes, but that of the driver; None for what is not installed."""
    import torch

    found: dict[str, str | None] = {"python": platform.python_version()}
    found |= {package: _version(package) for package in PACKAGES}
    found["build"] = torch_build(torch.version.cuda, torch.version.hip)
    found["nccl"] = _nccl() if has_gpus and found["build"] != "cpu" else None
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
        announce(f"compilation of DeepSpeed's {name} in {folder}", subject=OPS)
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
        announce(
            f"command {' '.join(command)}"
        )  # a time-out of subprocess would wait for a process that cannot be killed
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(done.stdout.splitlines()), None)


def _free_bytes(folder: Path) -> int | None:
    """Return the free bytes of the file system of `folder`; None when it does not answer."""
    try:
        return free_bytes(folder)
    except OSError:
        return None
