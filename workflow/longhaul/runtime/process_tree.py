"""Keeps hold of processes below this one: adopts orphans, kills all descendants, asks for a signal when a parent is killed."""

from __future__ import annotations

import ctypes
import os
import time

import psutil

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h
_UNKILLABLE_S = 60.0
"""As UnkillableStepTimeout of Slurm."""


def adopt_orphans() -> None:
    """Make this process the parent of all orphans below it."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def signal_at_end_of_parent(number: int) -> None:
    """Make Linux send this process a signal when its parent ends, even by kill -9."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)


def kill_descendants(spared: frozenset[int] = frozenset()) -> None:
    """Kill and reap all processes below this one, apart from `spared` and what is below them.

    One that waits in the kernel, for a disk or a GPU that does not answer, cannot be killed. It is named and left behind.
    """
    deadline = time.monotonic() + _UNKILLABLE_S
    while found := [child for child in psutil.Process().children() if child.pid not in spared]:
        if (left_s := deadline - time.monotonic()) <= 0:
            names = ", ".join(map(_name_and_state, found))
            print(
                f"processes that SIGKILL does not end within {_UNKILLABLE_S:g} s are left behind: {names}", flush=True
            )
            return
        for child in found:
            for process in (child, *_below(child)):
                _kill(process)
        # Children of a killed process become children of this one, if it adopted orphans: look again.
        psutil.wait_procs(found, timeout=min(5.0, left_s))
        _reap()


def _name_and_state(process: psutil.Process) -> str:
    try:
        return f"{process.pid} ({process.name()}, {process.status()})"
    except psutil.NoSuchProcess:  # it has just ended
        return str(process.pid)


def _below(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _kill(process: psutil.Process) -> None:
    try:
        process.kill()
    except psutil.NoSuchProcess:
        return


def _reap() -> None:
    """Remove the records of ended children that nothing waits for."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return
