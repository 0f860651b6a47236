"""A killed rank and a killed main Snakemake process: the same command resumes to bit-identical weights."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.support.pipeline_run import PipelineRun

STAGE = "results/tiny/stages/base/checkpoint.json"


def steps_done(chain: PipelineRun) -> int:
    """Return the last step in the stage's metrics."""
    lines = [line for path in chain.results.glob("stages/base/weights/*/metrics.jsonl") for line in path.open()]
    return max((json.loads(line)["step"] for line in lines if line.endswith("\n")), default=0)


def is_saved(chain: PipelineRun, step: int) -> bool:
    """Return whether the checkpoint of a step is complete; its files are written while later steps run."""
    return any(chain.results.glob(f"stages/base/weights/*/checkpoints/step-{step:08d}"))


def wait_for(condition: Callable[[], bool], main: subprocess.Popen[str], timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert main.poll() is None, "snakemake ended early:\n" + main.communicate()[0][-3000:]
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s"
        time.sleep(0.005)


def start(chain: PipelineRun) -> subprocess.Popen[str]:
    command = chain.command(STAGE)
    return subprocess.Popen(
        command, cwd=chain.folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=chain.environment()
    )


def trainers(main: subprocess.Popen[str]) -> list[psutil.Process]:
    """Return the training processes below a main Snakemake process, ordered by rank."""
    below = psutil.Process(main.pid).children(recursive=True)
    found = [process for process in below if "train" in process.cmdline() and "longhaul" in process.cmdline()]
    ranks = [
        process for process in found if "RANK" in process.environ() and "torch.distributed.run" not in process.cmdline()
    ]
    return sorted(ranks, key=lambda process: int(process.environ()["RANK"]))


def start_steps(chain: PipelineRun) -> list[int]:
    """Return the step from which each start of the stage resumed."""
    lines = [line for path in chain.results.glob("stages/base/weights/*/attempts.jsonl") for line in path.open()]
    return [json.loads(line)["resumed_from"] for line in lines if line.endswith("\n")]


def master_weights(chain: PipelineRun) -> dict[str, str]:
    """Return tensor name -> SHA-256 of the last checkpoint's master weights."""
    checkpoint = chain.read("stages/base/checkpoint.json")
    last = Path(checkpoint["weights"]) / checkpoint["checkpoints"]["last"]["path"]
    tensors = json.loads((chain.folder / last / "reference" / "tensors.json").read_text())
    return {name: entry["sha256_fp32"] for name, entry in tensors.items()}


@pytest.fixture
def killed(finished: PipelineRun, tmp_path: Path) -> PipelineRun:
    """A run with the config of the finished run, not yet started."""
    return PipelineRun(tmp_path / "killed", finished.config)


@pytest.mark.slow
def test_weights_are_bit_identical_after_kills(finished: PipelineRun, killed: PipelineRun):
    first = start(killed)
    wait_for(lambda: steps_done(killed) >= 12 and is_saved(killed, 10), first)
    trainers(first)[-1].send_signal(signal.SIGKILL)  # restarted in place
    second = killed.snakemake(STAGE)
    assert second.returncode == 2, second.stdout + second.stderr
    assert f"process {first.pid} on " in second.stderr and "works on this run already" in second.stderr
    wait_for(lambda: steps_done(killed) >= 22 and len(start_steps(killed)) == 2, first)
    first.kill()  # its trainers save and end; those of the next run wait for them
    first.wait()

    killed.run(STAGE)
    weights = killed.folder / killed.read("stages/base/checkpoint.json")["weights"]
    assert start_steps(killed)[:2] == [0, 10]
    rows = [json.loads(line) for line in (weights / "metrics.jsonl").open()]
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 41))
    assert master_weights(killed) == master_weights(finished)
