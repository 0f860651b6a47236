"""Runs a command, and ends all its processes when it ends, or when the process that started this one ends, even by kill -9.

python -m longhaul.serving.guard_processes STOP_S COMMAND…, with a pipe as standard input whose other end the starting process
keeps open and never writes to. A server starts workers of its own, which may survive it, and Slurm ends a step's processes
only when the step ends.

- The end of the starting process closes the pipe; this process then sends SIGTERM to the command, and SIGKILL after STOP_S.
- Linux gives orphans below this process to it (PR_SET_CHILD_SUBREAPER), so none escapes.
- If this process is killed, Linux kills the command (PR_SET_PDEATHSIG), and the starting process kills the rest: see
  server_process.py.
"""

from __future__ import annotations

import select
import signal
import subprocess
import sys
import time

from longhaul.runtime.process_tree import adopt_orphans, kill_descendants, signal_at_end_of_parent

STOP_S = 20.0
"""Time that a command gets to stop after SIGTERM."""
_POLL_S = 0.1


def _die_with_parent() -> None:
    signal_at_end_of_parent(signal.SIGKILL)


def main(stop_s: float, command: list[str]) -> int:
    """Run the command; return its exit code, or 128 and the number of the signal that ended it."""
    stopped: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, _: stopped.append(received))
    adopt_orphans()
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=_die_with_parent,  # noqa: PLW1509  # this process has one thread
    )
    try:
        while process.poll() is None:
            parent_ended = bool(select.select([sys.stdin], [], [], _POLL_S)[0])
            if stopped or parent_ended:
                _stop(process, stop_s)
        return process.returncode if process.returncode >= 0 else 128 - process.returncode
    finally:
        kill_descendants()


def _stop(process: subprocess.Popen[bytes], stop_s: float) -> None:
    """Ask the command to stop, and kill it after stop_s seconds."""
    process.terminate()
    end = time.monotonic() + stop_s
    while process.poll() is None and time.monotonic() < end:
        time.sleep(_POLL_S)
    process.kill()
    process.wait()


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]), sys.argv[2:]))
