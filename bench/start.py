"""Time from the start of a trainer's process to the end of its first step, compared with bare DeepSpeed, in one run.

    make bench-start                  on this machine's first GPU a dense model of 1.2 B parameters, else one of 0.3 B
    make bench-start PYTHON=python3   with an installed torch, without a virtual environment

Both train the same model from random weights and are started in turns. The first start of each fills the caches of files and of
compiled kernels, and does not count. longhaul is `longhaul job run train`, as a launch script starts it; its phases are those of
the event `start_up`. bench/start_deepspeed.py is the peer.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from bench.gpu_speed import plan_stages, write_data
from bench.gpu_speed_rows import MODELS
from bench.machine import describe_machine, write_result
from longhaul.artifacts.line_record_fields import START_UP_PHASES, read_events
from longhaul.artifacts.paths import JobId, WeightsFolder
from longhaul.jobs.job_kind import job_spec
from longhaul.jobs.kinds.train_job import TrainSpec
from longhaul.jobs.launch_files import render_job

ROUNDS, TIMEOUT_S = 3, 300
HERE = Path(__file__).resolve().parent
JOB = JobId("train", ("start",))
Times = dict[str, float]


def main() -> None:
    """Start both in turns, and print the median of every phase."""
    on_gpu = torch.cuda.is_available()
    found: dict[str, list[Times]] = {"longhaul": [], "deepspeed": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_data(folder)
        job = _write_job(folder, on_gpu)
        for number in range(ROUNDS + 1):
            found["longhaul"].append(_start_longhaul(job, folder / f"round-{number}"))
            found["deepspeed"].append(_start_deepspeed(job, folder))
            print({way: times[-1] for way, times in found.items()}, flush=True)
    _publish({way: times[1:] for way, times in found.items()}, on_gpu)


def _write_job(folder: Path, on_gpu: bool) -> TrainSpec:
    micro_batch, length, precision = (8, 4096, "bf16") if on_gpu else (1, 256, "fp32")
    stage = {
        "name": JOB.names[0],
        "kind": "pretrain",
        "dataset": "corpus",
        "steps": 1_000,
        "global_batch_size": micro_batch,
        "micro_batch_size": micro_batch,
        "sequence_length": length,
        "precision": precision,
        "zero": {"stage": 1},
        "checkpoints": {"every_steps": 1_000},
    }
    planned = plan_stages(folder, MODELS["dense" if on_gpu else "losses"], [stage])
    render_job(planned, JOB, folder / "job").write(folder / "job")
    job = job_spec(planned, JOB)
    assert isinstance(job, TrainSpec)
    paths = {"tokenizer": "tokenizer.json", "data": "corpus/data.json", "deepspeed": "job/ds_config.json"}
    return job.model_copy(update={key: str(folder / path) for key, path in paths.items()})


def _environment() -> dict[str, str]:
    rank = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "GROUP_WORLD_SIZE": "1"}
    return {**os.environ, **rank, "OMP_NUM_THREADS": str(min(16, os.cpu_count() or 1)), "MASTER_ADDR": "127.0.0.1"}


def _start_longhaul(job: TrainSpec, own: Path) -> Times:
    """Start the trainer and end it after its first step, before it saves."""
    own.mkdir()
    paths = {"folder": own, "weights_root": own / "weights", "out": own / "checkpoint.json"}
    job.model_copy(update={key: str(path) for key, path in paths.items()}).write(own / "job.json")
    command = [sys.executable, "-m", "longhaul", "job", "run", "train", str(own / "job.json")]
    with (own / "log.txt").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=_environment())
    deadline = time.monotonic() + TIMEOUT_S
    while not (event := _start_up_event(own)) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    process.kill()
    process.wait()
    assert event, (own / "log.txt").read_text(errors="replace")[-4000:]
    return {phase: event[f"{phase}_s"] for phase in START_UP_PHASES}


def _start_up_event(own: Path) -> dict[str, Any] | None:
    events = [event for weights in own.glob("weights/*") for event in read_events(WeightsFolder(weights).events)]
    return next((event for event in events if event["event"] == "start_up"), None)


def _start_deepspeed(job: TrainSpec, folder: Path) -> Times:
    job.write(folder / "peer.json")
    command = [sys.executable, str(HERE / "start_deepspeed.py"), str(time.time()), str(folder / "peer.json")]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        env=_environment() | {"MASTER_PORT": "29555"},
        check=False,
    )
    result = next((line for line in done.stdout.splitlines() if line.startswith("RESULT ")), None)
    assert result, done.stderr[-4000:]
    return json.loads(result.removeprefix("RESULT "))


def _publish(found: dict[str, list[Times]], on_gpu: bool) -> None:
    card = torch.cuda.get_device_name(0) if on_gpu else "none"
    lines = [
        *describe_machine(("torch", "deepspeed", "transformers")),
        f"GPU: {card}; dense model of {'1.2' if on_gpu else '0.3'} B parameters, ZeRO 1, one process",
        f"seconds from the start of the process, median of {ROUNDS} starts (from the fastest to the slowest)",
        f"{'':14}" + "".join(f"{way:>26}" for way in found),
    ]
    totals = {way: [sum(times.values()) for times in starts] for way, starts in found.items()}
    for phase in START_UP_PHASES:
        rows = {way: [times.get(phase, 0.0) for times in starts] for way, starts in found.items()}
        lines.append(f"{phase.replace('_', ' '):14}" + "".join(_cell(seconds) for seconds in rows.values()))
    lines.append(f"{'in all':14}" + "".join(_cell(seconds) for seconds in totals.values()))
    write_result("gpu_start" if on_gpu else "start", lines)


def _cell(seconds: list[float]) -> str:
    return f"{statistics.median(seconds):10.2f} ({min(seconds):5.2f} to {max(seconds):5.2f})"


if __name__ == "__main__":
    main()
