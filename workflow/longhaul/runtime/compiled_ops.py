"""Where DeepSpeed's compiled ops live, and the locks that a killed compiler leaves behind.

torch compiles an op in `$TORCH_EXTENSIONS_DIR/<op>/` under a file named `lock` (torch.utils.file_baton): whoever creates
it builds, everybody else waits, without limit, until it is gone. A builder that is killed leaves it for ever, and every
later run hangs in silence.
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

from longhaul.errors import UserError

ABANDONED_AFTER_S = 1800.0
"""A lock whose folder nobody wrote to for this long is stale even where the kernel cannot say who has it open."""


def ops_folder(scratch: str | None) -> Path:
    """Folder for compiled ops below `scratch` (default: $TMPDIR, else /tmp); one per user, host and software stack.

    Ops are compiled for this CPU (-march=native), this Python, torch, CUDA and C library, and against the headers of this
    environment, so all of them are in the name: environments that differ never load or rebuild each other's binaries. The
    host is in it too: only then can `clear_stale_locks` ask the local kernel whether a builder still lives.
    """
    stack = "|".join(_stack())
    name = f"{_host()}-{hashlib.sha256(stack.encode()).hexdigest()[:12]}"
    return Path(scratch or tempfile.gettempdir()) / f"longhaul-ops-{os.getuid()}" / name


def use_ops_folder(scratch: str | None) -> Path:
    """Creates `ops_folder(scratch)` and has torch compile into it; UserError when it cannot be ours alone.

    Libraries are loaded from it, so a folder that somebody else owns or may write to is refused.
    """
    folder = ops_folder(scratch).absolute()
    for part in (folder.parent, folder):
        make_private(part, "libraries")
    os.environ["TORCH_EXTENSIONS_DIR"] = str(folder)
    return folder


def clear_stale_locks(folder: Path, abandoned_after_s: float = ABANDONED_AFTER_S) -> list[str]:
    """Sets aside every half-built op of `folder` whose builder is dead; returns their names.

    A lock is stale when no process of this machine has it open: torch's builder keeps it open for as long as it builds.
    The kernel answers that through a write lease, whatever PID namespace (container) the builder is in. Where the file
    system grants no leases (NFS, Lustre), a lock is stale when nothing in its folder changed for `abandoned_after_s`.
    The whole folder is renamed, then removed: a compiler that outlived its killed parent goes on in the renamed folder
    and cannot write into the new build. Call it once per node, before any process of the job loads an op.
    """
    cleared = []
    for lock in sorted(folder.glob("*/lock")):
        if _is_stale(lock, abandoned_after_s) and _set_aside(lock.parent):
            cleared.append(lock.parent.name)
    return cleared


def disable_shm_comm() -> None:
    """Stops DeepSpeed from compiling its shared-memory collectives in init_distributed on a CPU; gloo does their work."""
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def compile_without_debug_information() -> None:
    """Of a compile's time it is a third, of the library nine tenths.

    Every process that loads ops must call this, or it compiles them anew for other flags.
    """
    from deepspeed.ops.op_builder.builder import OpBuilder

    OpBuilder.strip_empty_entries = lambda self, args: [flag for flag in args if flag not in ("", "-g")]


def _stack() -> list[str]:
    from importlib.metadata import version

    from torch import version as torch_version

    python = f"{platform.python_implementation()} {platform.python_version()}"
    torch_build = f"{torch_version.__version__} {torch_version.cuda} {torch_version.hip}"
    built_for = [version("deepspeed"), *platform.libc_ver(), platform.machine(), _cpu_flags()]
    return [sys.prefix, python, torch_build, *built_for]


def _cpu_flags() -> str:
    """Instruction sets of the first CPU; empty where the kernel does not list them."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    found = (line.partition(":")[2] for line in lines if line.split(":")[0].strip() in ("flags", "Features"))
    return " ".join(sorted(next(found, "").split()))


def _host() -> str:
    return "".join(c if c.isalnum() or c in "-." else "_" for c in platform.node()) or "host"


def make_private(folder: Path, holds: str) -> None:
    """Makes a folder that this user alone may write to, as `holds` is read back from it; UserError when it cannot be one."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.lstat()
    except OSError as error:
        raise UserError(
            f"{folder}, for {holds}, cannot be made: {error.strerror}",
            "set storage.scratch to a folder that you may write to",
        ) from None
    if status.st_uid != os.getuid() or status.st_mode & 0o022 or folder.is_symlink():
        raise UserError(
            f"{folder} is no folder that only this user may write to; {holds} would be read from it",
            "remove it, or set storage.scratch to a folder of your own",
        )


def _is_stale(lock: Path, abandoned_after_s: float) -> bool:
    try:
        return _nobody_has_open(lock) or _idle_s(lock.parent) > abandoned_after_s
    except FileNotFoundError:  # the builder finished while we looked
        return False


def _nobody_has_open(path: Path) -> bool:
    """True when the kernel grants a write lease: fcntl(2), F_SETLEASE, only without another open descriptor."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        return True
    except OSError:  # EAGAIN: somebody has it open; EINVAL and others: no leases here
        return False
    finally:
        os.close(descriptor)


def _idle_s(folder: Path) -> float:
    """Seconds since anything in the folder, or the folder itself, was written, by the file system's own clock."""
    with tempfile.TemporaryFile(dir=folder.parent) as now:
        now_s = os.fstat(now.fileno()).st_mtime
    return now_s - max(path.lstat().st_mtime for path in (folder, *folder.iterdir()))


def _set_aside(folder: Path) -> bool:
    aside = folder.with_name(f".stale-{folder.name}-{uuid.uuid4().hex[:8]}")
    try:
        folder.rename(aside)
    except FileNotFoundError:  # another process of this host was faster
        return False
    shutil.rmtree(aside, ignore_errors=True)
    return True
