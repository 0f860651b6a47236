"""Address of a server, its end, and what it refuses before the engine starts."""

from __future__ import annotations

import socket
import time
from pathlib import Path
from typing import Any

import pytest

from longhaul.artifacts.artifact_schemas import Export
from longhaul.artifacts.job_state import Deadline
from longhaul.artifacts.paths import JobFolder
from longhaul.config.site_serving_config import Serving
from longhaul.errors import UserError
from longhaul.jobs.kinds.serve_job import ServeSpec
from longhaul.serving import run_server
from longhaul.serving.run_server import run
from longhaul.serving.server_process import free_port, require_free_port


def spec(folder: Path, **changes: Any) -> ServeSpec:
    values: dict[str, Any] = {
        "run": "small",
        "stage": "base",
        "export": str(folder / "base.json"),
        "dtype": "bf16",
        "serving": Serving(engine="vllm"),
        "model_name": "small-base",
        "nodes": 1,
        "tensor": 1,
        "pipeline": 1,
        "expert_parallel": False,
        "context": 128,
        "max_running_requests": None,
        "port": None,
        "start_timeout_s": 10,
        "drain_s": 60,
        "key_file": str(folder / "api_key.yaml"),
        "folder": str(folder),
        "local": False,
    }
    return ServeSpec(**{**values, **changes})


def name_resolves_to(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("MASTER_ADDR", "n1")
    monkeypatch.setattr(socket, "gethostbyname", lambda name: {"n1": address}[name])


def test_a_server_listens_in_the_clusters_network_and_never_at_a_public_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    name_resolves_to(monkeypatch, "127.0.5.5")
    assert run_server._listening_address(spec(tmp_path)) == "127.0.5.5"
    name_resolves_to(monkeypatch, "8.8.8.8")
    with pytest.raises(UserError, match=r"8\.8\.8\.8, the address of the first node n1, is public") as error:
        run_server._listening_address(spec(tmp_path))
    assert "interconnect.master_address.interface" in error.value.hint


def test_an_address_that_the_node_does_not_have_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    name_resolves_to(monkeypatch, "198.51.100.7")  # for documentation: no host has it
    message = rf"198\.51\.100\.7, the address of the first node n1, is not an address of {socket.gethostname()}: Cannot assign"
    with pytest.raises(UserError, match=message) as error:
        run_server._listening_address(spec(tmp_path))
    assert "interconnect.master_address.interface" in error.value.hint
    name_resolves_to(monkeypatch, "127.0.5.5")
    assert run_server._listening_address(spec(tmp_path)) == "127.0.5.5"


@pytest.mark.parametrize("changes", [{"local": True}, {"key_file": None}])
def test_without_slurm_or_without_a_key_only_this_machine_reaches_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
):
    name_resolves_to(monkeypatch, "10.1.2.3")
    assert run_server._listening_address(spec(tmp_path, **changes)) == "127.0.0.1"


def test_a_port_in_use_is_refused():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=rf"port {port} of 127\.0\.0\.1 cannot be used: Address already in use"):
            require_free_port("127.0.0.1", port)
        require_free_port("127.0.0.1", free_port("127.0.0.1"))


def test_a_damaged_export_is_not_served(tmp_path: Path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    Export("base", "c", 1, str(model), "fp32", 1, 1, {"config.json": "0" * 64}, {}, [], {}).write(
        tmp_path / "base.json"
    )
    with pytest.raises(UserError, match=r"the export is damaged: .*config\.json does not have the hash"):
        run(spec(tmp_path, local=True))


@pytest.mark.parametrize(
    ("seconds_left", "preempted", "reason"),
    [(3600, False, ""), (60 + 31, False, ""), (60 + 29, False, "the allocation ends"), (3600, True, "preempted")],
)
def test_a_server_stops_drain_s_and_30_seconds_before_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds_left: float, preempted: bool, reason: str
):
    now_s = time.time()
    monkeypatch.setattr(time, "time", lambda: now_s)  # a busy disk may take more than a second for the file
    Deadline(now_s + seconds_left, preempted).write(JobFolder(tmp_path).deadline)
    assert run_server._end_of_allocation(spec(tmp_path)) == reason


def test_without_a_deadline_a_server_goes_on(tmp_path: Path):
    assert run_server._end_of_allocation(spec(tmp_path)) == ""
    Deadline(None, False).write(JobFolder(tmp_path).deadline)
    assert run_server._end_of_allocation(spec(tmp_path)) == ""
