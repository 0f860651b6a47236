"""One main Snakemake per run. Snakemake's own lock outlives a killed main; this lease does not.

O_CREAT|O_EXCL decides who holds it, on any file system; whether a holder still lives is asked of the operating system on
its own host. From another host that cannot be known, so a person must say it (`rm`), never a time-out.
"""

from __future__ import annotations

import atexit
import json
import os
import socket
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from longhaul.errors import UserError


@dataclass(frozen=True)
class Holder:
    """Who holds a lease; `started_s` tells a process from a later one with the same number."""

    host: str
    pid: int
    started_s: float

    @classmethod
    def this_process(cls) -> Holder:
        return cls(socket.gethostname(), os.getpid(), psutil.Process().create_time())

    def is_gone(self) -> bool:
        """True when the holder is surely dead: on this host, and its process is not there any more."""
        if self.host != socket.gethostname():
            return False
        try:
            return abs(psutil.Process(self.pid).create_time() - self.started_s) > 1.0
        except psutil.NoSuchProcess:
            return True


class RunLease:
    """A lease file that is given back when this process ends in any orderly way."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.holder = Holder.this_process()

    def take(self) -> None:
        """Takes the lease, or prints who holds it and ends this process with exit code 2."""
        try:
            self.acquire()
        except UserError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            sys.exit(UserError.exit_code)
        atexit.register(self.release)

    def acquire(self) -> None:
        """Takes the lease, over a dead holder too; UserError while a live or unknown one holds it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        for _ in range(3):
            try:
                handle = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
            except FileExistsError:
                self._clear_dead_holder()
                continue
            with os.fdopen(handle, "w") as stream:
                json.dump(asdict(self.holder), stream)
            return
        raise UserError(f"{self.path} changes hands too fast", "run again")

    def release(self) -> None:
        """Gives the lease back, if it is still ours."""
        if self._read() == self.holder:
            self.path.unlink(missing_ok=True)

    def _read(self) -> Holder | None:
        try:
            return Holder(**json.loads(self.path.read_text()))
        except (OSError, ValueError, TypeError):
            return None

    def _clear_dead_holder(self) -> None:
        holder = self._read()
        if holder is None:
            raise UserError(f"{self.path} is unreadable", f"if no other snakemake works on this run: rm {self.path}")
        if not holder.is_gone():
            raise UserError(
                f"another snakemake (process {holder.pid} on {holder.host}) works on this run",
                f"wait for it or stop it; if it is surely gone: rm {self.path}",
            )
        # Of several that find it dead, the one whose rename succeeds clears it; a fresh lease is put back.
        moved = self.path.with_name(f"{self.path.name}.{os.getpid()}")
        try:
            self.path.rename(moved)
        except FileNotFoundError:
            return
        taken = Holder(**json.loads(moved.read_text()))
        if taken != holder:
            os.link(moved, self.path)
        moved.unlink()
