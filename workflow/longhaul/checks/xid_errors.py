"""Says which Xid errors of NVIDIA GPUs demand a reset, a restart or a repair, and what they mean.

Source: the column "Immediate Action" of NVIDIA's Xid catalog, docs.nvidia.com/deploy/xid-errors/analyzing-xid-catalog.html.
RESET_GPU, RESTART_BM and the workflows of Xid 48 and 74 fail; so do 63 and 94, until the memory row is remapped by a reset.
"""

from __future__ import annotations

import re

from longhaul.checks.kernel_log import is_fatal

ROW_REMAPPED = 63
_RECOVERY_ACTION = 154
_NVLINK_5 = range(144, 151)
_FAILURES = {
    46: "the GPU has stopped processing",
    48: "memory error that ECC could not correct",
    62: "a microcontroller of the GPU has halted",
    ROW_REMAPPED: "a memory row is marked for remapping",
    64: "a memory row could not be remapped",
    74: "NVLink error",
    79: "the GPU has fallen off the bus",
    94: "contained memory error",
    95: "uncontained memory error",
    109: "a change of the context timed out",
    110: "security fault",
    119: "the GPU's system processor (GSP) does not answer",
    120: "error of the GPU's system processor (GSP)",
    136: "an NVLink could not be trained",
    140: "ECC error from which the GPU did not recover",
    143: "the GPU could not be initialized",
    155: "NVLink error",
    156: "a resource of the GPU is retired",
    158: "fatal time-out of the GPU",
}


def xid_failure(number: int, text: str) -> str:
    """Return what an Xid error means if its GPU must not train; "" if training can continue.

    text: the message after the number. The NVLink errors of Blackwell say whether they are fatal, and Xid 154 names the action
    that the driver asks for, as in `GPU recovery action changed from 0x0 (None) to 0x1 (GPU Reset Required)`.
    """
    if number in _NVLINK_5:
        return "NVLink error" if is_fatal(text) else ""
    if number == _RECOVERY_ACTION:
        asked = text.rpartition(" to ")[2]
        return "the driver asks for a reset or a restart" if re.search(r"reset|reboot|\bFLR\b", asked, re.I) else ""
    return _FAILURES.get(number, "")
