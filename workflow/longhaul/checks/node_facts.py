"""What one node holds: versions, GPUs, memory, disk, compiler, compiled ops. Nothing here judges."""

from __future__ import annotations

import mmap
import os
import platform
import resource
import shutil
import subprocess
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from longhaul.runtime.compiled_ops import clear_stale_locks, compile_without_debug_information, use_ops_folder
from longhaul.runtime.swap_folders import clear_stale_swaps, swap_folder

PACKAGES = ("torch", "deepspeed", "transformers", "tokenizers", "datasets", "safetensors", "numpy")


def node_facts(host: str, folder: Path) -> dict[str, Any]:
    """Facts of this node; `folder` is the run folder, on the file system that will hold the checkpoints."""
    return {
        "host": host,
        "kernel": platform.release(),
        "cpus": len(os.sched_getaffinity(0)),
        "memory_bytes": psutil.virtual_memory().total,
        "shared_memory_bytes": _free_bytes(Path("/dev/shm")),
        "disk_free_bytes": _free_bytes(folder),
        "write_error": write_error(folder),
        "compiler": compiler(),
        "gpus": gpus(),
        "rdma_ports": rdma_ports(),
        "versions": versions(),
    }


def versions() -> dict[str, str | None]:
    """Everything that must be the same on all nodes; None: not installed, or not there."""
    import torch

    found: dict[str, str | None] = {"python": platform.python_version()}
    found |= {package: _version(package) for package in PACKAGES}
    found["cuda_build"] = cuda_build(torch.version.cuda)
    found["nccl"] = _nccl() if torch.cuda.is_available() else None
    found["driver"] = _driver()
    return found


def _nccl() -> str:
    from torch.cuda import nccl

    return ".".join(map(str, nccl.version()))


def cuda_build(cuda: str | None) -> str:
    """torch's build as wheels name it: "12.8" -> "cu128", None -> "cpu"."""
    return "cu" + cuda.replace(".", "") if cuda else "cpu"


def gpus() -> list[dict[str, Any]]:
    """Name and memory of every GPU that this job may use."""
    import torch

    if not torch.cuda.is_available():
        return []
    found = (torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count()))
    return [{"name": gpu.name, "memory_bytes": gpu.total_memory} for gpu in found]


def rdma_ports(devices: Path = Path("/sys/class/infiniband")) -> list[str]:
    """The link layer of every active port that can do RDMA, as the kernel has it: "InfiniBand", or "Ethernet" for RoCE."""
    ports = sorted(devices.glob("*/ports/*"))
    return [_text(port / "link_layer") for port in ports if _text(port / "state").endswith("ACTIVE")]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def compiler() -> str | None:
    """First line of the C++ compiler's version; None where there is none. $CXX is what torch compiles with."""
    path = shutil.which(os.environ.get("CXX") or "c++")
    return _first_output_line([path, "--version"]) if path else None


def write_error(folder: Path) -> str | None:
    """Why nothing can be written to `folder`; None when it can. The disk is asked, as rights do not tell of quotas."""
    probe = folder / f".write-test-{uuid.uuid4().hex}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with probe.open("wb") as stream:
            stream.write(os.urandom(4096))
            os.fsync(stream.fileno())
        return None
    except OSError as error:
        return error.strerror or str(error)
    finally:
        with suppress(OSError):
            probe.unlink()


def build_ops(names: Sequence[str], scratch: str | None) -> dict[str, Any]:
    """Clears locks of killed builds and compiles DeepSpeed's ops on this node, once, before any rank needs them.

    Returns {"folder", "cleared": [op], "built": {op: seconds}, "failed": {op: reason}}.
    """
    folder = use_ops_folder(scratch)
    result: dict[str, Any] = {"folder": str(folder), "cleared": clear_stale_locks(folder), "built": {}, "failed": {}}
    for name in names:
        started = time.monotonic()
        try:
            _builder(name).load(verbose=False)
            result["built"][name] = round(time.monotonic() - started, 1)
        except Exception as error:  # a compiler fails in many ways, and every one of them must reach the report
            result["failed"][name] = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
    return result


def swap_facts(scratch: str) -> dict[str, Any]:
    """Whether optimizer states can lie below `scratch`, after what killed jobs left there is removed.

    Returns {"folder", "cleared": [folder], "free_bytes", "lockable_bytes", "error": why nothing can be swapped there, or None}.
    """
    cleared = clear_stale_swaps(scratch)
    with swap_folder(scratch, "test") as folder:
        error = _direct_error(folder)
    return {
        "folder": scratch,
        "cleared": cleared,
        "free_bytes": _free_bytes(Path(scratch)),
        "lockable_bytes": lockable_bytes(),
        "error": error,
    }


def _direct_error(folder: Path) -> str | None:
    """Why the file system takes no unbuffered writes, as libaio makes them; None when it does. tmpfs of old kernels does not."""
    with mmap.mmap(-1, mmap.PAGESIZE) as page:  # aligned, as O_DIRECT wants it
        try:
            handle = os.open(folder / "direct", os.O_CREAT | os.O_WRONLY | os.O_DIRECT, 0o600)
            try:
                os.write(handle, page)
            finally:
                os.close(handle)
        except OSError as error:
            return error.strerror or str(error)
    return None


def lockable_bytes() -> int | None:
    """Memory that a process may lock; None: without limit. CAP_IPC_LOCK (bit 14) lifts it."""
    status = dict(line.split(":\t", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":\t" in line)
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return None if soft == resource.RLIM_INFINITY or int(status["CapEff"], 16) >> 14 & 1 else soft


def _builder(name: str) -> Any:
    from deepspeed.ops.op_builder.all_ops import ALL_OPS

    compile_without_debug_information()
    return ALL_OPS[name]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _driver() -> str | None:
    tool = shutil.which("nvidia-smi")
    return _first_output_line([tool, "--query-gpu=driver_version", "--format=csv,noheader"]) if tool else None


def _first_output_line(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(done.stdout.splitlines()), None)


def _free_bytes(folder: Path) -> int | None:
    """Free bytes of the file system of `folder`, or of its nearest parent that exists."""
    existing = next((path for path in (folder, *folder.absolute().parents) if path.exists()), Path("/"))
    try:
        return shutil.disk_usage(existing).free
    except OSError:
        return None
