"""Takes and releases leases: one main Snakemake process per run; no time-out ends a lease. weights_lock.py uses them, too.

Snakemake's own lock survives a killed main process. Here link(2) decides who owns a lease; it is atomic on every file system,
NFS included. A lease is taken over only from an owner that is certainly dead: on the owner's own host the operating system
answers that, and for a Slurm job Slurm does. Another host cannot know it. There a user must remove the file; no time-out does.
"""

from __future__ import annotations

import atexit
import json
import os
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from longhaul.artifacts.shared_file_system import exists_on_server
from longhaul.artifacts.typed_json import SlurmJobId, read_typed_json
from longhaul.errors import UserError

ABANDONED_AFTER_S = 60.0
"""Age of a takeover from which on its process counts as dead."""


@dataclass(frozen=True)
class LeaseOwner:
    """The process that owns a lease.

    started: distinguishes the process from a later one with the same PID (process_start); None if it had ended already
    job_id:  Slurm's job id; None outside Slurm
    """

    host: str
    pid: int
    started: str | None
    job_id: SlurmJobId | None = None

    @classmethod
    def this_process(cls) -> LeaseOwner:
        return cls(socket.gethostname(), os.getpid(), process_start(os.getpid()), _job_of_this_process())

    def __str__(self) -> str:
        job = f" (job {self.job_id})" if self.job_id else ""
        return f"process {self.pid} on {self.host}{job}"

    def is_dead(self) -> bool:
        """Return True if the owner was on this host and its process has ended; False if that is not known."""
        return self.is_on_this_host and process_start(self.pid) != self.started

    @property
    def is_on_this_host(self) -> bool:
        return self.host == socket.gethostname()

    @property
    def is_this_process(self) -> bool:
        """Return whether it is this process, which may have replaced its program (exec) or its variables of Slurm since."""
        this = LeaseOwner.this_process()
        return (self.host, self.pid, self.started) == (this.host, this.pid, this.started)


def _job_of_this_process() -> str | None:
    """Return the Slurm job that this process ends with; None outside Slurm.

    salloc opens a shell on the login node that outlives its allocation: only slurmd sets SLURMD_NODENAME. The executor plugin
    removes Slurm's variables from the main process; controller.sbatch sets another one.
    """
    of_slurm = os.environ.get("SLURM_JOB_ID") if "SLURMD_NODENAME" in os.environ else None
    return of_slurm or os.environ.get("LONGHAUL_JOB_ID")


def process_start(pid: int) -> str | None:
    """Return when a process of this host started, as "<clock ticks since boot>.<boot id>"; None if it has ended.

    The kernel counts ticks. A date would change when the host's clock is set.
    """
    try:
        _, _, after_name = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(") ")
    except (FileNotFoundError, ProcessLookupError):
        return None
    state, *rest = after_name.split()
    boot = Path("/proc/sys/kernel/random/boot_id").read_text()[:8]
    return None if state == "Z" else f"{rest[18]}.{boot}"


class Lease:
    """A lease file, as this process sees it."""

    def __init__(self, path: Path) -> None:
        # Absolute, because Snakemake has left --directory when the process ends.
        self.path = path.absolute()
        self.owner = LeaseOwner.this_process()

    def try_acquire(self) -> bool:
        """Acquire the lease, also from an owner that is certainly dead. Return False if another process owns it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        for _ in range(3):
            if self._create():
                return True
            owner = self.current_owner()
            if owner is None and not exists_on_server(self.path):
                continue
            if owner is None or not owner.is_dead():
                return False
            self.remove_dead(owner)
        return False

    def _create(self) -> bool:
        """Link a complete file to the lease's path, so that every reader can parse the owner. Return whether it is ours."""
        complete = self.path.with_name(f".{self.path.name}.{self.owner.host}.{self.owner.pid}")
        try:
            complete.write_text(json.dumps(asdict(self.owner)))
            os.link(complete, self.path)
            return True
        except FileExistsError:
            # NFS may repeat a request whose answer was lost. The existing name is then our own file.
            return complete.stat().st_nlink == 2
        finally:
            complete.unlink(missing_ok=True)

    def release(self) -> None:
        """Remove the lease file if this process still owns it."""
        if self.current_owner() == self.owner:
            self.path.unlink(missing_ok=True)

    def current_owner(self) -> LeaseOwner | None:
        """Return the owner; None if there is none, or the file cannot be parsed."""
        return _read_owner(self.path)

    def remove_dead(self, dead: LeaseOwner) -> None:
        """Remove the lease file if it is still that of a dead owner; another process may have acquired the lease since.

        A second lease serialises this. Without it, a process could read the dead owner, wait while another one acquires the
        lease, and then remove the file of that living owner.
        """
        takeover = Lease(self.path.with_name(f".{self.path.name}.takeover"))
        takeover._remove_abandoned()
        if not takeover.try_acquire():
            return
        try:
            if self.current_owner() == dead:
                self.path.unlink(missing_ok=True)
        finally:
            takeover.release()

    def _remove_abandoned(self) -> None:
        """Remove a takeover whose process died in it, on any host: a takeover takes milliseconds.

        Both ages come from the clock of the file server, so that the clocks of hosts need not agree.
        """
        now = self.path.with_name(f"{self.path.name}.{self.owner.host}.{self.owner.pid}")
        with suppress(FileNotFoundError):
            started_s = self.path.stat().st_mtime
            now.touch()
            if now.stat().st_mtime - started_s > ABANDONED_AFTER_S:
                self.path.unlink()
        now.unlink(missing_ok=True)


def _read_owner(path: Path) -> LeaseOwner | None:
    try:
        return read_typed_json(path, LeaseOwner)
    except UserError:
        return None


class RunLease(Lease):
    """The lease of a run's main Snakemake process. It is released when the process exits normally.

    made_folder: this process has made the lease's folder. It removes the folder again if the run writes nothing there.
    """

    def __init__(self, path: Path, made_folder: bool = False) -> None:
        super().__init__(path)
        self.made_folder = made_folder

    def acquire_or_exit(self, job_has_ended: Callable[[str], bool] = lambda job_id: False) -> None:
        """Acquire the lease, or print its owner and exit with code 2. `longhaul run` has acquired it before Snakemake starts.

        job_has_ended: returns whether a Slurm job has certainly ended. A main process that ran in it on another host is dead.
        """
        self.made_folder |= not self.path.parent.exists()
        owner = self.current_owner()
        if owner and owner.is_this_process:
            self.owner = owner
        elif owner and not owner.is_on_this_host and self._ended_with_its_job(owner, job_has_ended):
            print(f"{owner} has ended; taking over", flush=True)
            self.remove_dead(owner)
        if self.owner != owner and not self.try_acquire():
            print(f"error: {self._refusal()}", file=sys.stderr, flush=True)
            sys.exit(UserError.exit_code)
        atexit.register(self.release)

    def release(self) -> None:
        """Remove the lease file if this process still owns it, and the folder if this process made it for nothing else."""
        super().release()
        if self.made_folder:
            with suppress(OSError):  # it is not empty: the run has begun
                self.path.parent.rmdir()

    def _ended_with_its_job(self, owner: LeaseOwner, job_has_ended: Callable[[str], bool]) -> bool:
        # A requeued job has the id of its earlier allocation.
        return bool(owner.job_id and owner.job_id != self.owner.job_id and job_has_ended(owner.job_id))

    def _refusal(self) -> UserError:
        owner = self.current_owner()
        if owner is None:
            return UserError(f"{self.path} is unreadable", f"if no other snakemake works on this run: rm {self.path}")
        return UserError(
            f"{owner} works on this run already",
            "see how it stands with `longhaul status CONFIG`; wait for it, or stop it with Ctrl-C in its terminal; "
            f"if it is certainly dead: rm {self.path}",
        )
