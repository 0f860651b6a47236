"""A job that meets a limit of the operating system names it, and ends well when the limit is raised."""

from __future__ import annotations

from pathlib import Path

import pytest

from longhaul.artifacts.job_state import ENVIRONMENT, read_failure, read_state
from longhaul.artifacts.paths import RunPaths
from tests.support.supervised_job import supervise, write_job

# limit -> too low a value, a repaired one, what meets it, a part of the remedy
LIMITS = {
    "RLIMIT_AS": (2**31, 2**34, "mmap(-1, 2**32)", "raise the limit on memory (ulimit -v, node.memory_mb)"),
    "RLIMIT_FSIZE": (2**16, 2**30, "Path('large').write_bytes(bytes(2**20))", "the size of a file (ulimit -f)"),
    "RLIMIT_NOFILE": (64, 512, "open_files(100)", "the limit on open files (ulimit -n)"),
}
STEP = """
import resource
from contextlib import ExitStack
from mmap import mmap
from pathlib import Path

from longhaul.runtime.failure_reports import write_failure_report
from longhaul.runtime.process_rank import this_rank


def open_files(number):
    with ExitStack() as files:
        for _ in range(number):
            files.enter_context(open("/dev/null"))


hard = resource.getrlimit(resource.{name})[1]
resource.setrlimit(resource.{name}, (int(Path("limit").read_text()), hard))
try:
    {action}
except Exception as error:
    write_failure_report(Path("results/small/stages/base"), error, this_rank())
    raise
"""


@pytest.mark.parametrize("name", LIMITS)
def test_after_the_limit_is_raised_the_same_command_ends_well(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    low, repaired, action, remedy = LIMITS[name]
    spec, lease, limit = (
        write_job(tmp_path, STEP.format(name=name, action=action)),
        RunPaths("small").lease,
        Path("limit"),
    )
    lease.parent.mkdir(parents=True, exist_ok=True)
    lease.write_text("this main process")
    limit.write_text(str(low))
    assert supervise(spec) == 1
    failure = read_failure(Path(spec.folder))
    assert failure and failure.failure_class == ENVIRONMENT
    assert remedy in failure.remedy and failure.remedy.endswith("then run the same command again")
    limit.write_text(str(repaired))
    lease.write_text("the next main process")
    assert supervise(spec) == 0
    state = read_state(Path(spec.folder))
    assert state and state.state == "done"
