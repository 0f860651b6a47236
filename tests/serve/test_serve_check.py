"""The check of a served export with vLLM: log probabilities, 64 streams, API key, addresses, logs, no process after kill -9."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from longhaul.artifacts.artifact_schemas import Export
from longhaul.artifacts.serve_check_result import ServeCheckResult
from longhaul.config.serve_check_config import ServeCheck
from longhaul.config.serve_config import Serve
from longhaul.config.site_serving_config import Serving
from longhaul.jobs.kinds.serve_check_job import ServeCheckSpec
from longhaul.serving.reference_values import read_reference_values
from tests.serve.conftest import ENGINES, ROOT
from tests.serve.test_engines import vllm_bound
from tests.support.wait import is_alive

SERVING = Serving(
    engine="vllm",
    python=(ENGINES["vllm"],),
    # The kernel rotary_embedding of vLLM 0.32's CPU build is wrong for DeepSeek: see score_with_vllm.py.
    options=("--enforce-eager", '--compilation-config={"custom_ops": ["-rotary_embedding"]}'),
    environment={"VLLM_CPU_KVCACHE_SPACE": "1"},
)


def write_job(folder: Path, latest: Path, streams: tuple[int, ...], serving: Serving = SERVING, nodes: int = 1) -> Path:
    """Write the spec of the check of an export, and return its path.

    latest: the link to the export's folder
    nodes:  number of nodes of the server, with one pipeline rank each
    """
    path = folder / "job.json"
    ServeCheckSpec(
        run="unit",
        stage="main",
        export=str(latest.parents[1] / "main.json"),
        dtype="fp32",
        serving=serving,
        serve=Serve(),
        check=ServeCheck(streams=streams, answer_tokens=16, start_timeout_s=300.0),
        nodes=nodes,
        tensor=1,
        pipeline=nodes,
        context_tokens=64,
        out=str(folder / "result.json"),
    ).write(path)
    return path


def command(job: Path) -> list[str]:
    return [sys.executable, "-m", "longhaul", "job", "run", "serve_check", str(job)]


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("PYTHONPATH", f"{ROOT / 'workflow'}:{ROOT}")


@pytest.mark.parametrize(("name", "streams"), [("llama", (1, 8, 64)), ("qwen3", (4,)), ("deepseek-v3-tied", (1, 64))])
def test_a_served_export_holds_to_every_bound(
    name: str, streams: tuple[int, ...], exports: dict[str, Path], tmp_path: Path
):
    ran = subprocess.run(
        command(write_job(tmp_path, exports[name], streams)), capture_output=True, text=True, check=False
    )
    log = ran.stdout + ran.stderr
    assert ran.returncode == 0, log[-4000:]
    result = ServeCheckResult.read(tmp_path / "result.json")
    largest = result.agreement["largest_difference"]
    reference = read_reference_values(Export.read(exports[name].parents[1] / "main.json"))
    assert result.agreement["compared"] == reference.log_probabilities_PT.size
    assert largest is not None
    assert largest < vllm_bound(name)
    assert [step["streams"] for step in result.load] == list(streams)
    # A few answers end before 16 tokens, and an untrained model gives some prompts the same answer.
    assert all(0.75 * 16 * step["streams"] <= step["tokens"] <= 16 * step["streams"] for step in result.load)
    assert result.distinct_answers >= max(streams) / 4
    assert result.refuses_other_keys
    assert all(address.startswith("127.0.0.1:") for address in result.listens_at)
    # Neither the API key, which is 64 hexadecimal digits, nor a prompt is in the log.
    assert not re.search(r"\b[0-9a-f]{64}\b", log)
    assert "prompt_token_ids" not in log


def name_of(process: psutil.Process) -> str:
    """Return the title that vLLM gives a process, such as VLLM::Worker; nothing for a process that has ended."""
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


def start_until_vllm_has_a_worker(job: Path) -> tuple[subprocess.Popen[bytes], list[psutil.Process]]:
    """Start a check; return it and all processes below it: guardian, server, engine core, worker."""
    check = subprocess.Popen(command(job))
    end = time.monotonic() + 300
    processes: list[psutil.Process] = []
    while time.monotonic() < end and not any("VLLM::Worker" in name_of(process) for process in processes):
        assert check.poll() is None
        time.sleep(0.5)
        processes = psutil.Process(check.pid).children(recursive=True)
    return check, processes


@pytest.mark.parametrize("victim", ["check", "guardian", "server", "worker"])
def test_no_process_is_left_after_kill_9(victim: str, exports: dict[str, Path], tmp_path: Path):
    check, processes = start_until_vllm_has_a_worker(write_job(tmp_path, exports["llama"], (1,)))
    worker = next(process for process in processes if "VLLM::Worker" in name_of(process))
    victims = {"check": check.pid, "guardian": processes[0].pid, "server": processes[1].pid, "worker": worker.pid}
    os.kill(victims[victim], signal.SIGKILL)
    assert check.wait(timeout=200) != 0
    end = time.monotonic() + 30
    while time.monotonic() < end and any(map(is_alive, processes)):
        time.sleep(0.2)
    assert [name_of(process) for process in processes if is_alive(process)] == []
    assert not (tmp_path / "result.json").exists()
