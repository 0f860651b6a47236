"""Folder of DeepSpeed's compiled ops (TORCH_EXTENSIONS_DIR), and removal of locks that killed builds leave.

torch compiles an op in `$TORCH_EXTENSIONS_DIR/<op>/`. The process that creates the lock file there builds; all others wait
without limit until the file is removed. A builder that is killed leaves the file, and every later run would hang.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import shutil
import sys
import tempfile
import uuid
from pathlib import Path

from longhaul.runtime.single_user_folder import create_private_folder

ABANDONED_AFTER_S = 1800.0
"""Age from which an idle lock is stale on a file system where the kernel does not know whether a process has it open."""


def ops_folder(scratch: str | None) -> Path:
    """Return the folder for compiled ops below `scratch` (default: $TMPDIR, else /tmp).

    Each user, host and software stack has its own. Ops are compiled for this CPU (-march=native), this Python, torch, CUDA
    and C library, and against the headers of this environment. All of them are hashed into the name, so that different
    environments never load or rebuild each other's binaries. The name has the host, because `remove_stale_builds` asks the
    local kernel whether a builder is alive.
    """
    stack = "|".join(_software_stack())
    name = f"{_host()}-{hashlib.sha256(stack.encode()).hexdigest()[:12]}"
    return Path(scratch or tempfile.gettempdir()) / f"longhaul-ops-{os.getuid()}" / name


def use_ops_folder(scratch: str | None) -> Path:
    """Create `ops_folder(scratch)`, and make torch compile ops and kernels of torch.compile into it and load them from it.

    Raises:
        UserError: another user owns the folder or may write to it. Libraries are loaded from it.
    """
    folder = ops_folder(scratch).absolute()
    for part in (folder.parent, folder):
        create_private_folder(part, "libraries")
    os.environ["TORCH_EXTENSIONS_DIR"] = str(folder)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "inductor")
    os.environ["TRITON_CACHE_DIR"] = str(folder / "triton")
    return folder


def remove_stale_builds(folder: Path, abandoned_after_s: float = ABANDONED_AFTER_S) -> list[str]:
    """Remove every incomplete op below `folder` whose builder is dead. Return the names of these ops.

    torch's builder keeps its lock file open while it builds. So a lock is stale if no process of this machine has it open.
    The kernel answers that through a write lease, in any PID namespace (container) of the builder. Where the file
    system grants no leases (NFS, Lustre), a lock is stale if nothing in its folder changed for `abandoned_after_s` seconds.

    The folder is renamed before it is removed. A compiler that outlives its killed parent continues in the renamed folder
    and cannot write into the new build. To be called once per node, before any process of the job loads an op.
    """
    from longhaul.compat.torch import extension_build_locks

    stale = [lock.parent for lock in extension_build_locks(folder) if _is_stale(lock, abandoned_after_s)]
    return [build.name for build in stale if _remove_build(build)]


def _software_stack() -> list[str]:
    from importlib.metadata import version

    from torch import version as torch_version

    python = f"{platform.python_implementation()} {platform.python_version()}"
    torch_build = f"{torch_version.__version__} {torch_version.cuda} {torch_version.hip}"
    built_for = [version("deepspeed"), *platform.libc_ver(), platform.machine(), _cpu_flags()]
    return [sys.prefix, python, torch_build, *built_for]


def _cpu_flags() -> str:
    """Return the instruction sets of the first CPU; "" if the kernel does not list them."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    found = (line.partition(":")[2] for line in lines if line.split(":")[0].strip() in ("flags", "Features"))
    return " ".join(sorted(next(found, "").split()))


def _host() -> str:
    return "".join(c if c.isalnum() or c in "-." else "_" for c in platform.node()) or "host"


def _is_stale(lock: Path, abandoned_after_s: float) -> bool:
    try:
        return _no_process_has_open(lock) or _idle_s(lock.parent) > abandoned_after_s
    except FileNotFoundError:  # the builder has finished meanwhile
        return False


def _no_process_has_open(path: Path) -> bool:
    """Return True if the kernel grants a write lease, which needs that no other descriptor is open (fcntl(2), F_SETLEASE)."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        return True
    except OSError:  # EAGAIN: a process has it open. EINVAL and others: the file system grants no leases
        return False
    finally:
        os.close(descriptor)


def _idle_s(folder: Path) -> float:
    """Return the seconds since the last write in the folder, by the file system's own clock."""
    with tempfile.TemporaryFile(dir=folder.parent) as now:
        now_s = os.fstat(now.fileno()).st_mtime
    return now_s - max(path.lstat().st_mtime for path in (folder, *folder.iterdir()))


def _remove_build(folder: Path) -> bool:
    """Rename and remove a folder. Return False if another process was faster."""
    renamed = folder.with_name(f".stale-{folder.name}-{uuid.uuid4().hex[:8]}")
    try:
        folder.rename(renamed)
    except FileNotFoundError:
        return False
    shutil.rmtree(renamed, ignore_errors=True)
    return True
