"""Throughput of one GPU: longhaul's trainer beside what a user would pick instead, in one run, with equal weights and tokens.

    make bench-gpu                       every row, of a dense model of 1.2 B parameters and a mixture of experts of 1 B
    make bench-gpu PYTHON=python3        with an installed torch, without a virtual environment
    make bench-gpu ROWS="dense/ losses/" only the rows of these models; a row's whole name chooses it alone

A row runs in a process of its own (bench/gpu_speed_worker.py). It prepares its model while the row before it is measured, and
touches the GPU only after that. The rows `losses` train 200 steps on real text and are compared step by step.
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
import yaml

from bench.gpu_speed_rows import LOSS_STEPS, MODELS, ROWS, Row
from bench.machine import describe_machine, write_result
from longhaul.artifacts.paths import JobId
from longhaul.config.dataset_config import Columns, PythonStdlib
from longhaul.config.load_config import load_config
from longhaul.config.model_size import model_size
from longhaul.data.demo_corpus import write_demo_corpus
from longhaul.jobs.job_kind import job_spec
from longhaul.jobs.kinds.train_job import TrainSpec
from longhaul.jobs.launch_files import render_job
from longhaul.planning import Plan, build_plan
from tests.support.corpora import dataset, make_shards, make_tokenizer

PEAK_TFLOPS = 989
"""Dense bf16 of an H100 or H200, by NVIDIA's data sheet."""
ROW_TIMEOUT_S = 300


def main() -> None:
    """Run the chosen rows and write the table."""
    chosen = [row for row in ROWS if not sys.argv[1:] or {row.name, f"{row.model}/"} & set(sys.argv[1:])]
    if not chosen:
        raise SystemExit("no such row; the names are\n" + "\n".join(row.name for row in ROWS))
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_data(folder)
        try:
            run_rows(chosen, folder, results)
        except KeyboardInterrupt:
            print("interrupted: the table has the rows that are finished", flush=True)
    card = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "CPU"
    packages = ("torch", "triton", "deepspeed", "transformers", "liger-kernel")
    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [*describe_machine(packages), f"card: {card}, driver {driver.stdout.strip()}, CUDA {torch.version.cuda}"]
    write_result("gpu_speed", [*lines, *speed_table(results), *loss_table(results)])


def write_data(folder: Path) -> None:
    """Write a tokenizer and shards of real text: the source code of Python's standard library."""
    corpus = folder / "corpus.jsonl"
    write_demo_corpus("text", PythonStdlib(max_mb=12), corpus, Columns())
    make_tokenizer(folder, [corpus], train_vocab_size=16_000)
    make_shards(folder / "corpus", folder, [corpus], dataset("text"), workers=min(8, os.cpu_count() or 1))


def plan_rows(folder: Path, model: str, stages: list[dict[str, Any]]) -> Plan:
    """Return a plan with these stages on this machine's first GPU."""
    gpus = min(1, torch.cuda.device_count())
    node = {"cpus": os.cpu_count(), "memory_mb": 100_000, "gpus": gpus, "gpu_peak_tflops": PEAK_TFLOPS}
    partition = {"jobs": ["gpu"], "max_nodes": 1, "node": node, "gpu_request": "none"}
    site: dict[str, Any] = {"name": "here", "scheduler": "local", "partitions": [partition]}
    if gpus:
        site["accelerator"] = {"cuda": str(torch.version.cuda)}
    config = {
        "run": "speed",
        "site": "./site.yaml",
        "tokenizer": {"train": {"vocab_size": 16_000, "datasets": ["corpus"]}},
        "datasets": {"corpus": {"kind": "text", "files": ["corpus.jsonl"]}},
        "model": MODELS[model],
        "trackers": {"tensorboard": False},
        "storage": {"scratch": str(folder)},
        "stages": stages,
    }
    (folder / "site.yaml").write_text(yaml.safe_dump(site))
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    return build_plan(load_config(folder / "run.yaml"))


def write_job(row: Row, folder: Path) -> Path:
    """Write the spec of the training job that a row runs, or from which a peer takes its model and its batches."""
    planned = plan_rows(folder, row.model, [{**row.stage, "name": "row", "dataset": "corpus"}])
    own = folder / row.name.replace("/", "-").replace(" ", "-")
    job_id = JobId("train", ("row",))
    render_job(planned, job_id, own).write(own)
    job = job_spec(planned, job_id)
    assert isinstance(job, TrainSpec)
    paths = {"tokenizer": folder / "tokenizer.json", "data": folder / "corpus/data.json"}
    paths["deepspeed"] = own / "ds_config.json"
    job.model_copy(update={key: str(path) for key, path in paths.items()}).write(own / "job.json")
    return own


def run_rows(rows: list[Row], folder: Path, results: dict[str, dict[str, Any]]) -> None:
    """Run the rows, and put what each row's process prints into `results`; {"error"} where it fails."""
    following = start(rows[0], write_job(rows[0], folder)) if rows else None
    for index, row in enumerate(rows):
        process, following = following, None
        assert process is not None and process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
        if index + 1 < len(rows):
            following = start(rows[index + 1], write_job(rows[index + 1], folder))
        results[row.name] = finish(row, process)
        print(row.name, json.dumps({k: v for k, v in results[row.name].items() if k != "losses"}), flush=True)


def start(row: Row, own: Path) -> subprocess.Popen[str]:
    """Start the process of a row. It waits for a line before it touches the GPU."""
    port = 21_000 + (os.getpid() * 31 + ROWS.index(row)) % 9_000
    rank = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "GROUP_WORLD_SIZE": "1"}
    launch = {"PYTORCH_ALLOC_CONF": "expandable_segments:True", "OMP_NUM_THREADS": str(min(16, os.cpu_count() or 1))}
    environment = {**os.environ, **rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **launch}
    command = [sys.executable, str(Path(__file__).with_name("gpu_speed_worker.py")), str(own), row.name]
    log = (own / "log.txt").open("w")
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, text=True, env=environment
    )


def finish(row: Row, process: subprocess.Popen[str]) -> dict[str, Any]:
    """Wait for a row and return its result."""
    started = time.perf_counter()
    own = Path(process.args[2])  # pyright: ignore
    try:
        process.wait(ROW_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    lines = (own / "log.txt").read_text(errors="replace").splitlines()
    found = next((json.loads(line[7:]) for line in reversed(lines) if line.startswith("RESULT ")), None)
    if found is None:
        print("\n".join(lines[-25:]), flush=True)
        found = {"error": next((line for line in reversed(lines) if line.strip()), "no output")[:200]}
    return {**found, "seconds": round(time.perf_counter() - started, 1)}


def speed_table(results: dict[str, dict[str, Any]]) -> list[str]:
    """Return the lines of the speeds, with the ratio to FSDP2 of the same model."""
    lines = [
        f"bf16 with fp32 master weights, sequence length 4096; MFU of {PEAK_TFLOPS} TFLOP/s; median of three blocks of steps",
        f"{'':58} {'tokens/s':>9} {'MFU':>6} {'GiB':>6} {'of FSDP2':>9} {'first step':>11}",
    ]
    for row in ROWS:
        found = results.get(row.name)
        if not found or "losses" in found:
            continue
        if "error" in found:
            lines.append(f"{row.name:58} {found['error']}")
            continue
        (architecture, keys), *_ = MODELS[row.model].items()
        flops = model_size({"model_type": architecture, **keys}).flops_per_token(4096)
        speed = found["tokens_per_s"]
        peer = results.get(f"{row.model}/FSDP2, compiled layers, chunked loss, micro batch 8", {}).get("tokens_per_s")
        ratio = f"{speed / peer:9.3f}" if peer else f"{'':9}"
        start_s = f"{found['first_step_s']:9.1f} s" if "first_step_s" in found else ""
        gib = f"{found['peak_gib']:6.1f}" if "peak_gib" in found else f"{'':6}"
        lines.append(f"{row.name:58} {speed:9,.0f} {speed * flops / PEAK_TFLOPS / 1e12:6.1%} {gib} {ratio} {start_s}")
    return lines


def loss_table(results: dict[str, dict[str, Any]]) -> list[str]:
    """Return the differences of the losses from those of the plain row, step by step."""
    losses = {name: found["losses"] for name, found in results.items() if "losses" in found}
    plain = next((values for name, values in losses.items() if name.endswith("plain")), None)
    if plain is None:
        return []
    lines = [
        f"losses of {LOSS_STEPS} steps on real text, a dense model of 0.3 B parameters; differences from the first row"
    ]
    for name, values in losses.items():
        differs = [abs(a - b) for a, b in zip(values, plain, strict=True)]
        last = statistics.fmean(values[-20:])
        lines.append(
            f"{name:58} mean {statistics.fmean(differs):.5f}, largest {max(differs):.5f}, last 20 steps {last:.4f}"
        )
    return lines


if __name__ == "__main__":
    main()
