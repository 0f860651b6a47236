"""`longhaul serve` on this machine: who may ask, where it listens, how it stops, and that no process is left."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.support.run_with_fake_engine import FAKE_VLLM, KEY, LOCAL_SITE, ServedRun, answer, listening_addresses
from tests.support.wait import wait_for, wait_for_end


@pytest.fixture
def run(tmp_path: Path) -> Iterator[ServedRun]:
    served = ServedRun(tmp_path.resolve(), {"drain_s": 20}, LOCAL_SITE)
    served.write_export()
    yield served
    for process in served.processes():
        process.kill()


def children_named(run: ServedRun, word: str) -> list[psutil.Process]:
    return [process for process in run.processes() if word in process.cmdline()]


def test_server_asks_for_the_key_and_stops_without_a_trace(run: ServedRun):
    endpoint = run.start()
    assert endpoint.model == "small-base" and endpoint.url.startswith("http://127.0.0.1:")
    assert [answer(f"{endpoint.url}/models", key) for key in (None, "wrong", KEY)] == [401, 401, 200]
    _check_that_the_key_is_secret(run)
    _check_that_only_loopback_listens(run)
    shown = _longhaul(run, "status", "results/small")
    place = f"{endpoint.url} (on {endpoint.owner.host} only)"
    assert f"vllm answers at {place}, model small-base, API key in {endpoint.key_file}" in " ".join(shown.split())
    second = run.call()
    assert second.returncode == 2 and f"process {endpoint.owner.pid}" in second.stderr and "--stop" in second.stderr
    answers: list[int] = []
    asking = threading.Thread(target=lambda: answers.append(answer(f"{endpoint.url}/slow", KEY)))
    asking.start()
    wait_for((run.folder / "slow-request").exists)
    stopped = run.call("--stop")
    asking.join()
    assert answers == [200], "the accepted request is answered"
    assert stopped.returncode == 0 and f"stopped process {endpoint.owner.pid}" in stopped.stdout
    wait_for(lambda: not run.processes())
    assert not run.job.endpoint.exists() and run.state and run.state.reason == "stopped by a signal"
    assert "small-base" not in _longhaul(run, "status", "results/small")
    assert run.call("--stop").returncode == 2


def _check_that_the_key_is_secret(run: ServedRun) -> None:
    assert stat.S_IMODE(run.job.api_key.stat().st_mode) == 0o600
    assert not [process for process in run.processes() if KEY in " ".join(process.cmdline())]
    texts = [path for path in run.folder.rglob("*") if path.is_file() and path != run.job.api_key]
    assert len(texts) > 5 and not [path for path in texts if KEY in path.read_text(errors="replace")]


def _check_that_only_loopback_listens(run: ServedRun) -> None:
    assert listening_addresses(run.processes()) == {"127.0.0.1"}


def _longhaul(run: ServedRun, *words: str) -> str:
    command = [run.command()[0], "-m", "longhaul", *words]
    environment = {**run.environment(), "COLUMNS": "300"}
    return subprocess.run(command, cwd=run.folder, env=environment, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("victim", ["supervise", "run", "longhaul.serving.guard_processes"])
def test_no_process_is_left_after_kill_9(run: ServedRun, victim: str):
    """The supervisor's end ends all. If another process is killed, the server starts again."""
    endpoint = run.start()
    (killed,) = children_named(run, victim)
    engines = children_named(run, "--host") + children_named(run, "worker-of-fake-engine")
    killed.kill()
    wait_for_end(engines)
    if victim != "supervise":
        wait_for(lambda: len(run.started_engines()) == 2)
        again = run.wait_until_ready()
        assert again.owner.pid != endpoint.owner.pid and answer(f"{again.url}/models", KEY) == 200
        assert run.call("--stop").returncode == 0
    wait_for(lambda: not run.processes())


def test_a_server_that_still_loads_is_shown_and_can_be_stopped(run: ServedRun):
    (run.folder / "loading").touch()
    run.start_verb()
    wait_for(lambda: run.started_engines() and run.job.endpoint.exists())
    assert "loads the model; it will answer at http://127.0.0.1:" in _longhaul(run, "status", "results/small")
    assert run.call("--stop").returncode == 0
    wait_for(lambda: not run.processes())


def test_a_server_that_starts_is_known_before_it_has_an_endpoint(run: ServedRun):
    """The job hashes the export first. Here its processes are paused meanwhile."""
    run.start_verb()
    wait_for(lambda: run.job.server_lock.exists() and run.job.server_lock.stat().st_size)
    assert run.process
    os.killpg(run.process.pid, signal.SIGSTOP)
    assert not run.job.endpoint.exists()
    second = run.call()
    assert second.returncode == 2 and f"process {run.process.pid} on " in second.stderr and "already" in second.stderr
    os.killpg(run.process.pid, signal.SIGCONT)
    stopped = run.call("--stop")
    assert stopped.returncode == 0 and "stopped process" in stopped.stdout, stopped.stderr
    wait_for(lambda: not run.processes())
    assert run.call("--stop").returncode == 2, "a lock without its process is no server"


def test_an_engine_that_ends_after_its_first_answer_is_started_again(run: ServedRun):
    """Its end is no wrong address, for which another start would not help."""
    (run.folder / "dies").touch()
    endpoint = run.start()
    assert len(run.started_engines()) == 2 and answer(f"{endpoint.url}/models", KEY) == 200
    assert run.call("--stop").returncode == 0
    wait_for(lambda: not run.processes())


def test_a_server_that_listens_elsewhere_is_ended(tmp_path: Path):
    serving = {**FAKE_VLLM, "environment": {"LISTEN_AT": "0.0.0.0"}}
    run = ServedRun(tmp_path.resolve(), {"drain_s": 1}, {**LOCAL_SITE, "serving": serving})
    run.write_export()
    done = run.call()
    assert done.returncode == 1 and len(run.started_engines()) == 1, "another start would end alike"
    port = run.started_engines()[0][run.started_engines()[0].index("--port") + 1]
    log = "".join(path.read_text() for path in (run.folder / "results/small/logs/serve").glob("*.log"))
    assert f"listens at 0.0.0.0:{port} instead of 127.0.0.1:{port} alone" in log + done.stdout + done.stderr
    wait_for(lambda: not run.processes())
    assert not run.job.endpoint.exists()


def test_dry_run_prints_memory_and_command_and_starts_nothing(run: ServedRun):
    done = run.call("-n")
    assert (
        done.returncode == 0 and "1 node x 1 GPU" in done.stdout and "serve EXPORT --served-model-name" in done.stdout
    )
    assert not run.job.path.exists() and not run.processes()


def test_what_can_be_known_is_refused_before_the_start(run: ServedRun, tmp_path: Path):
    (run.folder / "results/small/export/base.json").unlink()
    missing = run.call()
    assert missing.returncode == 2 and "stage base is not exported yet" in missing.stderr
    unknown = [*run.command()[:-1], "nothing"]
    done = subprocess.run(unknown, cwd=run.folder, env=run.environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "use one of base, chat" in done.stderr
    chat = [*run.command()[:-1], "chat"]
    done = subprocess.run(chat, cwd=run.folder, env=run.environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "stages.chat.export is none" in done.stderr


def test_a_port_in_use_is_refused_before_the_start(tmp_path: Path):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        run = ServedRun(tmp_path.resolve(), {"port": port}, LOCAL_SITE)
        run.write_export()
        done = run.call()
    assert done.returncode == 2 and f"port {port} of 127.0.0.1 cannot be used: Address already in use" in done.stderr
    assert not run.job.launch_script.exists()
