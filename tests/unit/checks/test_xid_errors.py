"""Xid errors fail a GPU where NVIDIA's catalog demands a reset, a restart or a repair."""

from __future__ import annotations

import pytest

from longhaul.checks.xid_errors import xid_failure

RESET_OR_RESTART = (46, 48, 62, 64, 74, 79, 95, 109, 110, 119, 120, 136, 140, 143, 155, 156, 158)
"""Immediate action RESET_GPU or RESTART_BM in the catalog of October 2025, and the workflows of 48 and 74."""
APPLICATION = (8, 11, 13, 31, 32, 37, 38, 43, 45, 68, 69, 80, 92, 106, 121, 137, 154, 157)
"""Immediate action RESTART_APP, IGNORE or none."""


@pytest.mark.parametrize("number", RESET_OR_RESTART)
def test_errors_that_demand_a_reset_fail(number: int):
    assert xid_failure(number, "")


@pytest.mark.parametrize("number", APPLICATION)
def test_errors_of_applications_do_not_fail(number: int):
    assert xid_failure(number, "text") == ""


def test_time_out_of_the_system_processor_is_named():
    assert xid_failure(119, "pid=1, name=python, Timeout after 45s of waiting for RPC response from GPU0 GSP!") == (
        "the GPU's system processor (GSP) does not answer"
    )


@pytest.mark.parametrize(
    ("text", "fails"),
    [
        ("NETIR_LINK_EVT  Fatal   XC0 i0 Link 09 (0x025525c6 0x00000000)", True),
        ("RLW_SRC_TRACK Nonfatal XC0 i0 Link 09 (0x00000001 0x00000000)", False),
    ],
)
def test_nvlink_errors_of_blackwell_say_whether_they_are_fatal(text: str, fails: bool):
    assert bool(xid_failure(149, text)) == fails


@pytest.mark.parametrize(
    ("text", "fails"),
    [
        ("GPU recovery action changed from 0x0 (None) to 0x1 (GPU Reset Required)", True),
        ("GPU recovery action changed from 0x0 (None) to 0x2 (Node Reboot Required)", True),
        ("GPU recovery action changed from 0x0 (None) to 0x4 (Drain and Reset)", True),
        ("GPU recovery action changed from 0x0 (None) to 0x1 (PF FLR)", True),
        ("GPU recovery action changed from 0x1 (GPU Reset Required) to 0x0 (None)", False),
        ("GPU recovery action changed from 0x0 (None) to 0x3 (Drain P2P)", False),
    ],
)
def test_action_that_the_driver_asks_for_decides(text: str, fails: bool):
    assert bool(xid_failure(154, text)) == fails
