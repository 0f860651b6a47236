"""Ends the jobs of a run without Slurm when its main process gets SIGINT, SIGTERM or SIGHUP; a second signal kills them.

Snakemake only waits for local jobs. Ctrl-C reaches them from the terminal; a signal to the main process alone (`kill`, `timeout`,
a service manager) does not.
"""

from __future__ import annotations

import os
import queue
import signal
import threading
import time
from collections.abc import Iterator

import psutil

from longhaul.runtime.process_tree import adopt_orphans

_LOOK_EVERY_S = 0.2
_SAME_EVENT_S = 2.0
"""Signals within this time count as one: `timeout` sends its signal to the process and to the process group."""


class LocalJobs:
    """The processes of the jobs below this main process. Snakemake is in its main thread when a signal arrives."""

    def __init__(self) -> None:
        self.received: int | None = None
        """Number of the first signal; None if there was none."""
        self._received_s = 0.0
        self._told: queue.SimpleQueue[None] = queue.SimpleQueue()  # may be called in a signal handler
        self._asked: set[psutil.Process] = set()

    def end_at_signal(self) -> None:
        """End the jobs at a signal from now on. A signal that is ignored already, as SIGHUP below nohup, stays so."""
        adopt_orphans()  # a signal to the process group ends Snakemake's shells before the supervisors below them
        threading.Thread(target=self._end_when_told, name="end of local jobs", daemon=True).start()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._handle)

    def wait_until_ended(self) -> None:
        """Wait for the processes that were asked to end; the supervisors wait for their steps, and kill them after a while."""
        while any(map(_is_alive, list(self._asked))):
            time.sleep(_LOOK_EVERY_S)

    def _handle(self, number: int, _: object) -> None:
        if self.received is None:
            self.received, self._received_s = number, time.monotonic()
            self._told.put(None)
            raise KeyboardInterrupt  # Snakemake starts no job any more, and waits for the running ones
        if time.monotonic() > self._received_s + _SAME_EVENT_S:
            self._told.put(None)

    def _end_when_told(self) -> None:
        self._told.get()
        is_patient = True
        while True:
            for process in _below() if is_patient else psutil.Process().children(recursive=True):
                if not is_patient or process not in self._asked:
                    self._asked.add(process)
                    _send(process, signal.SIGTERM if is_patient else signal.SIGKILL)
            try:
                self._told.get(timeout=_LOOK_EVERY_S)
                is_patient = False
            except queue.Empty:
                continue


def _below() -> Iterator[psutil.Process]:
    """Yield the supervisors, and the commands of rules that run here, such as `fetch`.

    Steps have sessions of their own, and their supervisor ends them. A shell that waits for its command ends with it.
    """
    for process in psutil.Process().children(recursive=True):
        try:
            waits = process.name() == "bash" and process.children()
            if not waits and os.getsid(process.pid) == os.getsid(0):
                yield process
        except (psutil.NoSuchProcess, ProcessLookupError):
            continue


def _send(process: psutil.Process, number: int) -> None:
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        return


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
