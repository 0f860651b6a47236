"""A supervisor runs its job to the end for any content of the job's records."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from longhaul.artifacts.job_state import Failure, Outcome, State, read_state, utc_now
from longhaul.artifacts.leases import LeaseOwner, RunLease
from longhaul.artifacts.paths import QUARANTINE
from longhaul.artifacts.quarantine import Quarantine, quarantined_nodes, read_quarantine
from longhaul.errors import UserError
from longhaul.jobs.job_spec import LaunchSpec
from longhaul.scheduling.job_records import JobRecords
from longhaul.scheduling.supervisor import run as supervise_job
from tests.support.supervised_job import folder_of, supervise, write_job
from tests.support.tampered_files import DAMAGED_BYTES, tampered_texts


@pytest.fixture(autouse=True)
def working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", ["state", "failure", "outcome", "history"])
def test_no_tampered_record_stops_the_supervisor(name: str, tmp_path: Path):
    spec = write_job(tmp_path, "").model_copy(update={"steps": ()})
    path: Path = getattr(folder_of(spec), name)
    valid = {
        "state": State("waiting", "7", "n1", ["n1"], 1, utc_now()),
        "failure": Failure("transient", "x", "y", needed_bytes=1, needed_in=str(tmp_path)),
        "outcome": Outcome("preempted", 4),
        "history": None,
    }[name]
    path.write_text('{"event": "running", "time_s": 1}')
    if valid:
        valid.write(path)
    for change, text in tampered_texts(path.read_bytes()):
        path.write_bytes(text)
        assert supervise(spec) == 0, change
        state = read_state(Path(spec.folder))
        assert state and state.state == "done", change
        last = folder_of(spec).history.read_bytes().splitlines()[-1]
        assert json.loads(last)["event"] == "done", change


def test_broken_quarantine_is_kept_and_named_while_a_job_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    Quarantine([{"node": "n1"}]).write(tmp_path / QUARANTINE)
    valid = (tmp_path / QUARANTINE).read_bytes()
    records = JobRecords(write_job(tmp_path, ""))
    for change, text in tampered_texts(valid):
        (tmp_path / QUARANTINE).write_bytes(text)
        try:
            read_quarantine(tmp_path / QUARANTINE)
        except UserError:
            assert set(quarantined_nodes(tmp_path / QUARANTINE)) <= {"n1"}, change
            records.quarantine({"n2": "down"})
            assert (tmp_path / QUARANTINE).read_bytes() == text, change
            assert "n2: down; not added to results/quarantine.json" in capsys.readouterr().out


def test_tampered_lease_is_refused_with_its_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    lease = RunLease(tmp_path / "run.lease.json")
    owner = json.dumps(LeaseOwner("elsewhere", 5, "1.a", "7").__dict__).encode()
    for change, text in tampered_texts(owner):
        lease.path.write_bytes(text)
        with pytest.raises(SystemExit):
            lease.acquire_or_exit(lambda job_id: False)
        assert str(lease.path) in capsys.readouterr().err, change


@pytest.mark.parametrize("text", DAMAGED_BYTES)
def test_damaged_launch_spec_is_refused_with_its_path(text: bytes, tmp_path: Path):
    path = folder_of(write_job(tmp_path, "")).launch_spec
    path.write_bytes(text)
    with pytest.raises(UserError, match=r"launch\.json") as refused:
        supervise_job(LaunchSpec.read(path))
    assert refused.value.hint
