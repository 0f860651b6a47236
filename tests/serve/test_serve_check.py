"""The check of a served export: log probabilities, 64 streams, API key, addresses, logs, no process after kill -9.

The demo's export is served by vLLM and by `transformers serve`, tiny ones of other families by vLLM.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from longhaul.artifacts.artifact_schemas import Export
from longhaul.artifacts.serve_check_result import ServeCheckResult
from longhaul.config.serve_check_config import ServeCheck
from longhaul.config.serve_config import Serve
from longhaul.config.site_serving_config import Serving
from longhaul.jobs.kinds.serve_check_job import ServeCheckSpec
from longhaul.serving.engines import LOOPBACK
from longhaul.serving.reference_values import read_reference_values
from tests.serve.conftest import ENGINES, ROOT, manifest_of
from tests.serve.serve_record import LADDER, STREAMS, TRANSFORMERS_SERVE, VICTIMS, ServeRecord
from tests.serve.test_engines import vllm_bound
from tests.support.run_with_fake_engine import answer, processes_in
from tests.support.wait import wait_for, wait_for_end

pytestmark = pytest.mark.timeout(900)  # the first test that needs the demo also waits for its training
SERVING = Serving(
    engine="vllm",
    python=(ENGINES["vllm"],),
    # The kernel rotary_embedding of vLLM 0.32's CPU build is wrong for DeepSeek: see score_with_vllm.py.
    options=("--enforce-eager", '--compilation-config={"custom_ops": ["-rotary_embedding"]}'),
    environment={"VLLM_CPU_KVCACHE_SPACE": "1"},
)
# vLLM 0.32's CPU kernel for latent attention computes 512 + 64 values per token alone, as DeepSeek-V3 has them. The demo has
# 64 + 16. Without it, vLLM caches keys and values of all heads, which its other kernel computes for heads of 48, too.
DEMO_SERVING = SERVING.model_copy(update={"environment": {**SERVING.environment, "VLLM_MLA_DISABLE": "1"}})
TOKENS = 16


def write_job(folder: Path, latest: Path, streams: tuple[int, ...], serving: Serving = SERVING, nodes: int = 1) -> Path:
    """Write the spec of the check of an export, and return its path.

    latest: the link to the export's folder
    nodes:  number of nodes of the server, with one pipeline rank each
    """
    path = folder / "job.json"
    ServeCheckSpec(
        run="unit",
        stage=latest.parent.name,
        export=str(manifest_of(latest)),
        dtype="fp32",
        serving=serving,
        serve=Serve(),
        check=ServeCheck(streams=streams, answer_tokens=TOKENS, start_timeout_s=300.0),
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


def check(
    folder: Path, latest: Path, streams: tuple[int, ...], serving: Serving = SERVING
) -> tuple[ServeCheckResult, str]:
    """Check an export, and return the result and the log. No process is left."""
    words = command(write_job(folder, latest, streams, serving))
    ran = subprocess.run(words, capture_output=True, text=True, check=False, cwd=folder)
    log = ran.stdout + ran.stderr
    assert ran.returncode == 0, log[-4000:]
    assert processes_in(folder) == []
    result = ServeCheckResult.read(folder / "result.json")
    assert [step["streams"] for step in result.load] == list(streams)
    assert all(address.startswith("127.0.0.1:") for address in result.listens_at)
    return result, log


def assert_vllm_holds_to_every_bound(result: ServeCheckResult, log: str, export: Path, bound: float) -> None:
    reference = read_reference_values(Export.read(export))
    assert result.agreement["compared"] == reference.log_probabilities_PT.size
    differences = [result.agreement["largest_difference"], *(step.get("largest_difference") for step in result.load)]
    assert all(one is not None and one < bound for one in differences), differences
    assert all(step["tokens"] == TOKENS * step["streams"] for step in result.load)
    # An untrained model gives some prompts the same text, and so does the demo, which learned few answers.
    assert result.distinct_answers >= max(step["streams"] for step in result.load) / 4
    assert result.refuses_other_keys
    # Neither the API key, which is 64 hexadecimal digits, nor a prompt is in the log.
    assert not re.search(r"\b[0-9a-f]{64}\b", log)
    assert "prompt_token_ids" not in log


@pytest.mark.parametrize(("name", "streams"), STREAMS.items())
def test_a_served_export_holds_to_every_bound(
    name: str, streams: tuple[int, ...], exports: dict[str, Path], tmp_path: Path, record: ServeRecord
):
    result, log = check(tmp_path.resolve(), exports[name], streams)
    assert_vllm_holds_to_every_bound(result, log, manifest_of(exports[name]), vllm_bound(name))
    record.add_check(name, "vllm", result, vllm_bound(name))
    record.add_load(name, "vllm", result, vllm_bound(name))


def test_the_demo_in_vllm_holds_to_every_bound_with_up_to_64_streams(demo: Path, tmp_path: Path, record: ServeRecord):
    result, log = check(tmp_path.resolve(), demo, LADDER, DEMO_SERVING)
    assert_vllm_holds_to_every_bound(result, log, manifest_of(demo), vllm_bound("demo"))
    record.add_check("demo", "vllm", result, vllm_bound("demo"))
    record.add_load("demo", "vllm", result, vllm_bound("demo"))
    record.add_end("serve_check ends", "no process left")


def test_the_demo_in_transformers_serve_answers_up_to_64_streams(demo: Path, tmp_path: Path, record: ServeRecord):
    """It gives no log probabilities: the greedy text is compared, and every answer under load must be equal."""
    result, _ = check(tmp_path.resolve(), demo, LADDER, Serving())
    assert result.agreement["same_text"] is not None and result.agreement["compared"] > 3
    assert result.distinct_answers > 8
    record.add_check("demo", TRANSFORMERS_SERVE, result, 0.0)
    record.add_load("demo", TRANSFORMERS_SERVE, result, 0.0)


def name_of(process: psutil.Process) -> str:
    """Return the title that vLLM gives a process, such as VLLM::Worker; nothing for a process that has ended."""
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


def start_until_vllm_answers(job: Path) -> tuple[subprocess.Popen[bytes], list[psutil.Process]]:
    """Start a check in its folder; return it and all processes below it: guardian, server, engine core, worker."""
    check = subprocess.Popen(command(job), cwd=job.parent)

    def is_healthy() -> bool:
        assert check.poll() is None
        commands = " ".join(map(name_of, psutil.Process(check.pid).children()))
        ports = re.findall(r" --port (\d+)", commands)
        with suppress(OSError):
            return bool(ports) and answer(f"http://{LOOPBACK}:{ports[0]}/health") == 200
        return False

    wait_for(is_healthy, 300)
    return check, psutil.Process(check.pid).children(recursive=True)


@pytest.mark.parametrize("victim", VICTIMS)
def test_no_process_is_left_after_kill_9(victim: str, demo: Path, tmp_path: Path, record: ServeRecord):
    """It comes while the server answers the check."""
    folder = tmp_path.resolve()
    check, processes = start_until_vllm_answers(write_job(folder, demo, LADDER, DEMO_SERVING))
    worker = next(process for process in processes if "VLLM::Worker" in name_of(process))
    victims = {"check": check.pid, "guardian": processes[0].pid, "server": processes[1].pid, "worker": worker.pid}
    os.kill(victims[victim], signal.SIGKILL)
    killed = time.monotonic()
    assert check.wait(timeout=200) != 0
    wait_for_end(processes, 30)
    assert processes_in(folder) == []
    seconds = time.monotonic() - killed
    assert not (folder / "result.json").exists()
    record.add_end(f"serve_check, kill -9 of the {victim}", f"no process left after {seconds:.1f} s")
