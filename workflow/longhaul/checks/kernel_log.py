"""Reads the kernel log since boot, and parses errors that NVIDIA's driver wrote to it: Xid (GPU) and SXid (NVSwitch).

amd_kernel_log.py parses those of AMD's driver. The kernel keeps the newest messages only.
Forms: docs.nvidia.com/deploy/xid-errors, and the Fabric Manager User Guide for SXid.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from longhaul.checks.amd_kernel_log import AmdKernelError, amd_kernel_errors

KMSG = Path("/dev/kmsg")
OPEN_LOG = "let the admins allow it: sysctl kernel.dmesg_restrict=0, or the group systemd-journal"
"""Remedy where a user may not read the log."""
# NVRM: Xid (PCI:0000:3b:00): 79, pid='<unknown>', name=<unknown>, GPU has fallen off the bus.
# With MIG (docs.nvidia.com/deploy/a100-gpu-mem-error-mgmt): NVRM: Xid (PCI:0000:01:00 GPU-I:05): 94, pid=7194, Contained: …
_XID = re.compile(r"NVRM: Xid \((?:PCI:)?([0-9a-fA-F:.]+)[^)]*\): (\d+),?\s*(.*)")
# nvidia-nvswitch0: SXid (PCI:0000:05:00.0): 20034, Fatal, Link 32 LTSSM Fault Up
_SXID = re.compile(r"nvidia-nvswitch\d+: SXid \((?:PCI:)?([0-9a-fA-F:.]+)\): (\d+),?\s*(.*)")
_FATAL = re.compile(r"(?<![-\w])fatal\b", re.IGNORECASE)
_JOURNAL_S = 5.0
"""A stage starts only after this; journals of months may take longer to read."""
_MAX_RECORD_BYTES = 8192
"""The kernel refuses reads of a record into a smaller buffer."""


@dataclass(frozen=True)
class KernelError:
    """One kind of error of one device. kind: Xid or SXid; count: how often; text: the newest message, after the number."""

    kind: str
    number: int
    device: str
    count: int
    text: str


@dataclass(frozen=True)
class KernelLog:
    """Errors in the kernel log. unreadable: why the log cannot be read; "" if it was read."""

    errors: list[KernelError]
    unreadable: str = ""
    amd_errors: list[AmdKernelError] = field(default_factory=list[AmdKernelError])


def read_kernel_log(kmsg: Path = KMSG) -> KernelLog:
    """Return the errors in the kernel log. Many sites let only root read it; members of systemd-journal may read the journal."""
    try:
        return _parsed(_kmsg_lines(kmsg))
    except OSError as error:
        lines = _journal_lines()
        reason = f"{kmsg}: {error.strerror}; the journal shows no kernel messages to this user either"
        return _parsed(lines) if lines else KernelLog([], reason)


def _parsed(lines: list[str]) -> KernelLog:
    return KernelLog(kernel_errors(lines), amd_errors=amd_kernel_errors(lines))


def kernel_errors(lines: Iterable[str]) -> list[KernelError]:
    """Return the Xid and SXid errors in lines of the kernel log.

    There is one entry per device and number, and another one for fatal errors: a later error that is not fatal hides none.
    """
    found: dict[tuple[str, int, str, bool], KernelError] = {}
    for line in lines:
        for kind, pattern in (("Xid", _XID), ("SXid", _SXID)):
            if match := pattern.search(line):
                device, number, text = match[1].lower(), int(match[2]), match[3][:200]
                key = kind, number, device, is_fatal(text)
                count = found[key].count + 1 if key in found else 1
                found[key] = KernelError(kind, number, device, count, text)
    return list(found.values())


def is_fatal(text: str) -> bool:
    """Return whether an error of an NVSwitch or NVLink says that it is fatal, and not that it is `Non-fatal` or `Nonfatal`."""
    return _FATAL.search(text) is not None


def _kmsg_lines(kmsg: Path) -> list[str]:
    """Return the messages of the kernel's ring buffer. Each read returns one record: `priority,number,time,flags;message`.

    Raises:
        OSError: this user may not read them.
    """
    handle, lines = os.open(kmsg, os.O_RDONLY | os.O_NONBLOCK), []
    try:
        while True:
            try:
                record = os.read(handle, _MAX_RECORD_BYTES)
            except BlockingIOError:  # after the newest record
                return lines
            except BrokenPipeError:  # newer messages overwrote this one
                continue
            if not record:  # the end of a plain file
                return lines
            lines += record.decode("utf-8", "replace").splitlines()
    finally:
        os.close(handle)


def _journal_lines() -> list[str]:
    tool = shutil.which("journalctl")
    if tool is None:
        return []
    command = [tool, "--dmesg", "--boot", "--no-pager", "--quiet", "--output=cat"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=_JOURNAL_S, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return done.stdout.splitlines()
