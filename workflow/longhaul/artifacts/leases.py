"""Leases: one main Snakemake per run, one writer per weights folder. Snakemake's own lock outlives a killed main.

link(2) decides who holds it, on any file system, NFS included; whether a holder still lives is asked of the operating system on
its own host, and of Slurm where it was in a job. Else it cannot be known from another host, so a person must say it (`rm`),
never a time-out.
"""

from __future__ import annotations

import atexit
import json
import os
import socket
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from longhaul.artifacts.shared_file_system import appears
from longhaul.errors import UserError


@dataclass(frozen=True)
class Holder:
    """Who holds a lease; `started` tells a process from a later one with the same number; `job_id` is Slurm's."""

    host: str
    pid: int
    started: str | None
    job_id: str | None = None

    @classmethod
    def this_process(cls) -> Holder:
        # the executor plugin drops Slurm's variables from the main process; controller.sbatch says it by another name
        job_id = os.environ.get("SLURM_JOB_ID") or os.environ.get("LONGHAUL_JOB_ID")
        return cls(socket.gethostname(), os.getpid(), process_start(os.getpid()), job_id)

    def __str__(self) -> str:
        job = f" (job {self.job_id})" if self.job_id else ""
        return f"process {self.pid} on {self.host}{job}"

    def is_gone(self) -> bool:
        """True when the holder is surely dead: on this host, and its process is not there any more."""
        return self.host == socket.gethostname() and process_start(self.pid) != self.started


def process_start(pid: int) -> str | None:
    """When a process of this host began, in clock ticks since that boot of it; None when it has ended.

    A date would not do: the kernel counts ticks, and what date that was changes when the host's clock is set.
    """
    try:
        _, _, after_name = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(") ")
    except (FileNotFoundError, ProcessLookupError):
        return None
    state, *rest = after_name.split()
    boot = Path("/proc/sys/kernel/random/boot_id").read_text()[:8]
    return None if state == "Z" else f"{rest[18]}.{boot}"


class Lease:
    """A lease file of this process."""

    def __init__(self, path: Path) -> None:
        # absolute: Snakemake has left --directory when it ends
        self.path = path.absolute()
        self.holder = Holder.this_process()

    def try_acquire(self) -> bool:
        """Takes the lease, over a holder that is surely dead too; False while another one has it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        for _ in range(3):
            if self._link():
                return True
            holder = self.current()
            if holder is None and not appears(self.path):
                continue
            if holder is None or not holder.is_gone():
                return False
            self.clear(holder)
        return False

    def _link(self) -> bool:
        """A file that is whole before it has the lease's name: whoever finds it can read who holds it."""
        whole = self.path.with_name(f".{self.path.name}.{self.holder.host}.{self.holder.pid}")
        try:
            whole.write_text(json.dumps(asdict(self.holder)))
            os.link(whole, self.path)
            return True
        except FileExistsError:
            # NFS may repeat a request whose answer was lost: then the name is our own file's
            return whole.stat().st_nlink == 2
        finally:
            whole.unlink(missing_ok=True)

    def release(self) -> None:
        """Gives the lease back, if it is still ours."""
        if self.current() == self.holder:
            self.path.unlink(missing_ok=True)

    def current(self) -> Holder | None:
        """Who holds it; None when nobody does, or the file is not whole yet."""
        try:
            return Holder(**json.loads(self.path.read_text()))
        except (OSError, ValueError, TypeError):
            return None

    def clear(self, dead: Holder) -> None:
        """Takes the file of a dead holder away. Of several that try, one succeeds; a fresh lease is put back."""
        moved = self.path.with_name(f"{self.path.name}.{socket.gethostname()}.{os.getpid()}")
        try:
            self.path.rename(moved)
        except FileNotFoundError:
            return
        if Holder(**json.loads(moved.read_text())) != dead:
            os.link(moved, self.path)
        moved.unlink()


class RunLease(Lease):
    """The lease of a run's main process, given back when the process ends in any orderly way."""

    def take(self, job_has_ended: Callable[[str], bool] = lambda job_id: False) -> None:
        """Takes the lease, or prints who holds it and ends this process with exit code 2.

        job_has_ended: whether a Slurm job is surely over; a main process that was in it is dead, wherever it was.
        """
        holder = self.current()
        if holder and holder.job_id and holder.job_id != self.holder.job_id and job_has_ended(holder.job_id):
            print(f"{holder} has ended; taking over", flush=True)
            self.clear(holder)
        if not self.try_acquire():
            print(f"error: {self._refusal()}", file=sys.stderr, flush=True)
            sys.exit(UserError.exit_code)
        atexit.register(self.release)

    def _refusal(self) -> UserError:
        holder = self.current()
        if holder is None:
            return UserError(f"{self.path} is unreadable", f"if no other snakemake works on this run: rm {self.path}")
        return UserError(
            f"another snakemake ({holder}) works on this run",
            f"wait for it or stop it; if it is surely gone: rm {self.path}",
        )
