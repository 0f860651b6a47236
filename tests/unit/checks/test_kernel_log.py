"""Xid and SXid errors are found in lines of the kernel log, and a log that cannot be read says why."""

from __future__ import annotations

from pathlib import Path

import pytest

from longhaul.checks import kernel_log
from longhaul.checks.kernel_log import KernelError, is_fatal, kernel_errors, read_kernel_log

KMSG = """\
6,1204,3021456,-;NVRM: loading NVIDIA UNIX Open Kernel Module for x86_64  580.95.05
3,2201,912345678,-;NVRM: Xid (PCI:0000:3b:00): 79, pid='<unknown>', name=<unknown>, GPU has fallen off the bus.
3,2202,912345999,-;NVRM: GPU 0000:3b:00.0: GPU has fallen off the bus.
3,2300,922345678,-;NVRM: Xid (PCI:0000:86:00): 63, pid=1896, Row Remapper: New row marked for remapping, reset gpu to activate.
3,2301,932345678,-;NVRM: Xid (PCI:0000:86:00): 63, pid=1897, Row Remapper: New row marked for remapping, reset gpu to activate.
3,2400,942345678,-;nvidia-nvswitch0: SXid (PCI:0000:05:00.0): 20034, Fatal, Link 32 LTSSM Fault Up
 SUBSYSTEM=pci
"""


def test_errors_are_counted_by_device_and_number(tmp_path: Path):
    (tmp_path / "kmsg").write_text(KMSG)
    found = read_kernel_log(tmp_path / "kmsg")
    assert found.unreadable == "" and found.errors == [
        KernelError("Xid", 79, "0000:3b:00", 1, "pid='<unknown>', name=<unknown>, GPU has fallen off the bus."),
        KernelError("Xid", 63, "0000:86:00", 2,
                    "pid=1897, Row Remapper: New row marked for remapping, reset gpu to activate."),
        KernelError("SXid", 20034, "0000:05:00.0", 1, "Fatal, Link 32 LTSSM Fault Up"),
    ]  # fmt: skip


def test_fatal_error_stays_when_one_that_is_not_fatal_follows():
    lines = [f"NVRM: Xid (PCI:0009:01:00): 149, NETIR_LINK_EVT  {word}   XC0 i0 Link 01" for word in
             ("Fatal", "Nonfatal", "Nonfatal")]  # fmt: skip
    assert [(error.count, is_fatal(error.text)) for error in kernel_errors(lines)] == [(1, True), (2, False)]
    assert not is_fatal("Non-fatal, Link 32") and is_fatal("Fatal, Link 32")


def test_form_without_the_word_pci_is_read():
    """As the driver wrote it before release 460."""
    assert kernel_errors(["[42.1] NVRM: Xid (0000:03:00): 14, Channel 00000001"]) == [
        KernelError("Xid", 14, "0000:03:00", 1, "Channel 00000001")
    ]


def test_form_with_the_instance_of_a_divided_gpu_is_read():
    line = "NVRM: Xid (PCI:0000:01:00 GPU-I:05): 94, pid=7194, Contained: CE User Channel (0x9). RST: No, D-RST: No"
    assert kernel_errors([line]) == [
        KernelError("Xid", 94, "0000:01:00", 1, "pid=7194, Contained: CE User Channel (0x9). RST: No, D-RST: No")
    ]


def test_journal_is_read_where_the_kernel_log_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tool = tmp_path / "journalctl"
    tool.write_text("#!/bin/sh\necho 'NVRM: Xid (PCI:0000:3b:00): 95, pid=7, Uncontained ECC error'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert [error.number for error in read_kernel_log(tmp_path / "none").errors] == [95]


def test_journal_that_takes_too_long_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tool = tmp_path / "journalctl"
    tool.write_text("#!/bin/sh\nexec sleep 60\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.setattr(kernel_log, "_JOURNAL_S", 0.2)
    assert "the journal shows no kernel messages" in read_kernel_log(tmp_path / "none").unreadable


def test_log_that_nobody_may_read_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kernel_log, "_journal_lines", lambda: [])
    found = read_kernel_log(tmp_path / "none")
    assert (
        found.errors == []
        and "none: No such file or directory; the journal shows no kernel messages" in found.unreadable
    )


AMDGPU = """\
6,901,1000,-;amdgpu 0000:e3:00.0: amdgpu: MEM ECC is active.
3,902,2000,-;amdgpu 0000:e3:00.0: amdgpu: uncorrectable hardware error(ERREVENT_ATHUB_INTERRUPT) detected!
6,903,2001,-;amdgpu 0000:e3:00.0: amdgpu: GPU reset begin!
6,904,2500,-;amdgpu 0000:e3:00.0: amdgpu: GPU reset(1) failed
6,905,2501,-;amdgpu 0000:e3:00.0: amdgpu: GPU reset end with ret = -62
6,906,3000,-;amdgpu 0000:c1:00.0: amdgpu: GPU reset begin!. Source:  3
6,907,3400,-;amdgpu 0000:c1:00.0: amdgpu: GPU reset(1) failed
6,908,4000,-;amdgpu 0000:c1:00.0: amdgpu: GPU reset begin!. Source:  4
6,909,4400,-;amdgpu 0000:c1:00.0: amdgpu: GPU reset(2) succeeded!
3,910,5000,-;amdgpu 0000:68:00.0: {1}uncorrectable hardware error(ERREVENT_ATHUB_INTERRUPT) detected!
6,911,6000,-;amdgpu 0000:68:00.0: amdgpu: 0 uncorrectable hardware errors detected in umc block
"""


def test_resets_and_hardware_errors_of_amd_gpus_are_found(tmp_path: Path):
    """The reset of GPU c1 succeeded at last. Counts of memory errors are no event."""
    (tmp_path / "kmsg").write_text(AMDGPU)
    found = read_kernel_log(tmp_path / "kmsg")
    assert found.errors == [] and [(error.event, error.address, error.count) for error in found.amd_errors] == [
        ("hardware error", "0000:e3:00.0", 1),
        ("GPU reset", "0000:e3:00.0", 1),
        ("failed GPU reset", "0000:e3:00.0", 1),
        ("GPU reset", "0000:c1:00.0", 2),
        ("hardware error", "0000:68:00.0", 1),
    ]
    assert found.amd_errors[3].text == "amdgpu: GPU reset begin!. Source:  4"
