"""Clocks that differ by minutes between hosts, or that are set, change neither deadlines nor leases."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from longhaul.artifacts.job_state import read_deadline
from longhaul.artifacts.leases import Lease
from longhaul.scheduling import slurm_client
from longhaul.scheduling.deadline_updater import DeadlineUpdater
from tests.support.pipeline_run import REPOSITORY

LEFT_S = 90
SKEWS_S = [-300, 0, 300]
SCONTROL = """\
#!/usr/bin/env python3
import sys, time
def at(seconds): return time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() + {ahead} + seconds))
if sys.argv[1:] == ["show", "config"]:
    print("Configuration data as of", at(0))
else:
    print(f"JobId=7 JobState=RUNNING NumNodes=1 NodeList=n1 EndTime={{at({left})}} SubmitTime={{at(-60)}} PreemptTime=None")
"""


@pytest.fixture(params=SKEWS_S)
def slurmctld_ahead_s(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """Seconds by which slurmctld's clock is ahead of this host's. Job 7 has LEFT_S seconds left."""
    program = tmp_path / "bin/scontrol"
    program.parent.mkdir()
    program.write_text(SCONTROL.format(ahead=request.param, left=LEFT_S))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    return request.param


def test_deadline_does_not_depend_on_the_difference_of_clocks(slurmctld_ahead_s: int, tmp_path: Path):
    """Too early costs at most three seconds. Too late would lose the last checkpoint."""
    with DeadlineUpdater("7", tmp_path, 60.0):
        until = time.monotonic() + 20
        while (deadline := read_deadline(tmp_path)) is None:
            assert time.monotonic() < until
            time.sleep(0.02)
        left_s = (deadline.end_s or 0.0) - time.time()
    assert LEFT_S - 3 < left_s <= LEFT_S
    assert slurm_client.clock_offset_s() == pytest.approx(-slurmctld_ahead_s, abs=2)


HOLD = "import sys; from longhaul.artifacts.leases import Lease; from pathlib import Path; " \
    "print(Lease(Path(sys.argv[1])).try_acquire(), flush=True); sys.stdin.read()"  # fmt: skip
TRY = "import sys; from longhaul.artifacts.leases import Lease; from pathlib import Path; " \
    "sys.exit(Lease(Path(sys.argv[1])).try_acquire())"  # fmt: skip


@pytest.mark.skipif(os.geteuid() != 0, reason="changing the date of the boot needs root, for a mount namespace")
@pytest.mark.parametrize("set_by_s", SKEWS_S)
def test_living_owner_keeps_its_lease_when_the_clock_of_its_host_is_set(tmp_path: Path, set_by_s: int):
    """The date of the boot changes with the clock. The start of a process is counted in ticks since the boot."""
    lines = Path("/proc/stat").read_text().splitlines()
    lines = [f"btime {int(line.split()[1]) + set_by_s}" if line.startswith("btime") else line for line in lines]
    (tmp_path / "stat").write_text("\n".join(lines))
    words, environment = [sys.executable, "-c"], {**os.environ, "PYTHONPATH": str(REPOSITORY / "workflow")}
    lease = str(tmp_path / "lease")
    owner = subprocess.Popen([*words, HOLD, lease], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
    try:
        assert owner.stdout and owner.stdout.readline() == b"True\n"
        mount = f'mount --bind {tmp_path}/stat /proc/stat && exec "$@"'
        later = ["unshare", "--mount", "sh", "-c", mount, "sh", *words, TRY, lease]
        assert subprocess.run(later, env=environment, check=False).returncode == 0, "a living process lost its lease"
    finally:
        owner.kill()
        owner.wait()
    assert Lease(Path(lease)).try_acquire(), "its owner has ended"
