"""A weights folder is taken over only from an owner whose counter has stood still."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from longhaul.artifacts.leases import Lease, LeaseOwner
from longhaul.train.checkpoint.weights_lock import LeaseClaim


@pytest.fixture
def owned_elsewhere(tmp_path: Path) -> Path:
    """A folder whose lease a process on another host owns."""
    owner = replace(LeaseOwner.this_process(), host="elsewhere")
    (tmp_path / "lease").write_text(json.dumps(asdict(owner)))
    return tmp_path


def claim(folder: Path, dead_after_s: float) -> LeaseClaim:
    return LeaseClaim(Lease(folder / "lease"), folder / "beat", dead_after_s)


def test_silent_owner_on_another_host_loses_the_lease_after_the_timeout(
    owned_elsewhere: Path, capsys: pytest.CaptureFixture[str]
):
    (owned_elsewhere / "beat").write_text("41\n")
    patient, hasty = claim(owned_elsewhere, 60.0), claim(owned_elsewhere, 0.2)
    assert not patient.try_acquire() and "waiting until it ends" in capsys.readouterr().out
    assert not hasty.try_acquire(), "the first attempt only reads the counter"
    time.sleep(0.3)
    assert not patient.try_acquire()
    assert not hasty.try_acquire() and "taking over" in capsys.readouterr().out
    assert hasty.try_acquire()


def test_owner_whose_counter_changes_keeps_the_lease(owned_elsewhere: Path):
    waiting = claim(owned_elsewhere, 0.1)
    for count in range(4):
        (owned_elsewhere / "beat").write_text(f"{count}\n")
        time.sleep(0.15)
        assert not waiting.try_acquire()
