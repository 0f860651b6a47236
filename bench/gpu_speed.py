"""Throughput of GPUs: longhaul's trainer compared with what a user would pick instead, in one run, with equal weights and tokens.

    make bench-gpu                       every row of one GPU: a dense model of 1.2 B parameters, a mixture of experts of 1 B
    make bench-gpu-2                     every row of two GPUs
    make bench-gpu PYTHON=python3        with an installed torch, without a virtual environment
    make bench-gpu ROWS="dense/ losses/" only the rows of these groups; a row's whole name chooses it alone

A row runs in a process of its own (bench/gpu_speed_worker.py). It prepares its model while the row before it is measured, and
touches the GPU only after that. The rows `losses` train 200 steps on real text; their losses are compared with those of plain
runs whose kernels differ.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml

from bench.gpu_speed_rows import LOSS_STEPS, MODELS, ROWS, Row
from bench.kernel_times import class_table, kernel_table
from bench.machine import MODULE_PATH, REPOSITORY, describe_machine, write_result
from longhaul.artifacts.paths import JobId
from longhaul.config.dataset_config import Columns, PythonStdlib
from longhaul.config.load_config import load_config
from longhaul.config.model_size import model_size
from longhaul.data.demo_corpus import write_demo_corpus
from longhaul.jobs.environment_variables import NO_MULTICAST
from longhaul.jobs.job_kind import job_spec
from longhaul.jobs.kinds.train_job import TrainSpec
from longhaul.jobs.launch_files import render_job
from longhaul.planning import Plan, build_plan
from tests.support.corpora import dataset, make_shards, make_tokenizer, write_jsonl

PEAK_TFLOPS = 989
"""Dense bf16 of an H100 or H200, by NVIDIA's data sheet."""
ROW_TIMEOUT_S = 300
CHATML = REPOSITORY / "templates" / "chat" / "chatml.jinja"
DATASETS = {
    "corpus": {"kind": "text", "files": ["corpus.jsonl"]},
    "sources": {"kind": "text", "files": ["sources.jsonl"]},
    "chat": {"kind": "chat", "files": ["chats.jsonl"]},
}
SOURCES_MB = 60
"""Text for a thousand steps without a repetition."""


def main() -> None:
    """Run the chosen rows and write the table."""
    gpus, names = (2, sys.argv[2:]) if sys.argv[1:2] == ["--two"] else (1, sys.argv[1:])
    chosen = [row for row in ROWS if row.gpus == gpus and (not names or {row.name, f"{row.group}/"} & set(names))]
    if not chosen:
        raise SystemExit("no such row; the names are\n" + "\n".join(row.name for row in ROWS))
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_data(folder, {row.dataset for row in chosen})
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
    lines = [
        *describe_machine(packages),
        f"card: {card}, driver {driver.stdout.split()[0] if driver.stdout else None}, CUDA {torch.version.cuda}",
    ]
    for record in sorted({row.record for row in chosen}):
        names = {row.name for row in chosen if row.record == record}
        write_results(lines, {name: found for name, found in results.items() if name in names}, record)


def write_results(lines: list[str], results: dict[str, dict[str, Any]], suffix: str) -> None:
    """Write a record of the speeds and one of the losses, each where it was measured; a part of the rows erases no other."""
    speeds = {name: found for name, found in results.items() if "losses" not in found}
    classes, kernels = (
        {name: found[key] for name, found in speeds.items() if found.get(key)} for key in ("classes", "kernels")
    )
    if kernels:
        write_result("gpu_kernels" + suffix, [*lines, *kernel_table(kernels)])
    if speeds:
        write_result("gpu_speed" + suffix, [*lines, *speed_table(speeds), *class_table(classes)])
    for group in LOSS_STEPS:
        losses = {
            name: found["losses"] for name, found in results.items() if name.startswith(group) and "losses" in found
        }
        if losses:
            record = "gpu_losses" if group == "losses" else "gpu_loss_curves"
            table = loss_table(losses) + (curve_table(losses) if group == "curves" else [])
            write_result(record + suffix, [*lines, *table])


def write_data(folder: Path, datasets: set[str] | None = None) -> None:
    """Write a tokenizer, and the shards of each dataset in a folder of its own.

    datasets: "corpus", the source code of Python's standard library, which is always written; "sources", that of all installed
        packages; "chat", questions and answers from docstrings
    """
    corpus, workers = folder / "corpus.jsonl", min(8, os.cpu_count() or 1)
    write_demo_corpus("text", PythonStdlib(max_mb=12), corpus, Columns())
    make_tokenizer(folder, [corpus], train_vocab_size=16_000, chat_template=str(CHATML))
    make_shards(folder / "corpus", folder, [corpus], dataset("text"), workers=workers)
    if "sources" in (datasets or ()):
        sources = write_jsonl(folder / "sources.jsonl", "text", _installed_sources())
        make_shards(folder / "sources", folder, [sources], dataset("text"), workers=workers)
    if "chat" in (datasets or ()):
        chats = folder / "chats.jsonl"
        write_demo_corpus("chat", PythonStdlib(max_mb=12), chats, Columns())
        make_shards(folder / "chat", folder, [chats], dataset("chat"), workers=workers)


def _installed_sources() -> list[str]:
    """Return the source files of the installed packages, in order of their names, up to SOURCES_MB."""
    texts, size = [], 0
    for path in sorted(Path(sysconfig.get_path("purelib")).rglob("*.py")):
        text = path.read_text(encoding="utf-8", errors="ignore")
        size += len(text)
        texts.append(text)
        if size >= SOURCES_MB * 1_000_000:
            break
    return texts


def plan_stages(folder: Path, model: dict[str, Any], stages: list[dict[str, Any]], gpus: int = 1) -> Plan:
    """Return a plan with these stages on this machine's first GPUs, over the data that `write_data` wrote to `folder`."""
    gpus = min(gpus, torch.cuda.device_count())
    node = {"cpus": os.cpu_count(), "memory_mb": 100_000, "gpus": gpus, "gpu_peak_tflops": PEAK_TFLOPS}
    partition = {"jobs": ["gpu"], "max_nodes": 1, "node": node, "gpu_request": "none"}
    site: dict[str, Any] = {"name": "here", "scheduler": "local", "partitions": [partition]}
    if gpus:
        site["interconnect"] = {"kind": "none", "nvlink_multicast": "off"}  # other jobs may use the host's other GPUs
        site["accelerator"] = {"cuda": str(torch.version.cuda)}
    config = {
        "run": "speed",
        "site": "./site.yaml",
        "tokenizer": {"train": {"vocab_size": 16_000, "datasets": ["corpus"]}, "chat_template": str(CHATML)},
        "datasets": {name: DATASETS[name] for name in sorted({"corpus", *(stage["dataset"] for stage in stages)})},
        "model": model,
        "trackers": {"tensorboard": False},
        "storage": {"scratch": str(folder)},
        "stages": stages,
    }
    (folder / "site.yaml").write_text(yaml.safe_dump(site))
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    return build_plan(load_config(folder / "run.yaml"))


def write_job(row: Row, folder: Path) -> Path:
    """Write the spec of the training job that a row runs, or from which a peer takes its model and its batches."""
    planned = plan_stages(folder, MODELS[row.model], [{**row.stage, "name": "row", "dataset": row.dataset}], row.gpus)
    own = folder / row.name.replace("/", "-").replace(" ", "-")
    job_id = JobId("train", ("row",))
    render_job(planned, job_id, own).write(own)
    job = job_spec(planned, job_id)
    assert isinstance(job, TrainSpec)
    paths = {"tokenizer": folder / "tokenizer.json", "data": folder / row.dataset / "data.json"}
    paths["deepspeed"] = own / "ds_config.json"
    job.model_copy(update={key: str(path) for key, path in paths.items()}).write(own / "job.json")
    return own


def run_rows(rows: list[Row], folder: Path, results: dict[str, dict[str, Any]]) -> None:
    """Run the rows, and put what each row's first process prints into `results`; {"error"} where it fails."""
    following = start(rows[0], write_job(rows[0], folder)) if rows else []
    for index, row in enumerate(rows):
        ranks, following = following, []
        for rank in ranks:
            assert rank.stdin is not None
            rank.stdin.write("go\n")
            rank.stdin.flush()
        if index + 1 < len(rows):
            following = start(rows[index + 1], write_job(rows[index + 1], folder))
        results[row.name] = finish(ranks)
        hidden = ("losses", "classes", "kernels")
        print(row.name, json.dumps({k: v for k, v in results[row.name].items() if k not in hidden}), flush=True)


def start(row: Row, own: Path) -> list[subprocess.Popen[str]]:
    """Start a process for each GPU of a row. Each waits for a line before it touches its GPU."""
    sizes = {"WORLD_SIZE": row.gpus, "LOCAL_WORLD_SIZE": row.gpus, "GROUP_WORLD_SIZE": 1}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 21_000 + (os.getpid() * 31 + ROWS.index(row)) % 9_000}
    threads = min(16, (os.cpu_count() or 1) // row.gpus)
    launch = {"PYTORCH_ALLOC_CONF": "expandable_segments:True", "OMP_NUM_THREADS": max(1, threads), **NO_MULTICAST}
    command = [sys.executable, "-m", "bench.gpu_speed_worker", str(own), row.name]
    ranks = []
    for rank in range(row.gpus):
        own_variables = {**sizes, **address, **launch, "RANK": rank, "LOCAL_RANK": rank}
        environment = {**os.environ, **MODULE_PATH, **{name: str(value) for name, value in own_variables.items()}}
        with log_of(own, rank).open("w") as log:
            ranks.append(
                subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, text=True, env=environment
                )
            )
    return ranks


def log_of(own: Path, rank: int) -> Path:
    """Return the file of a rank's output."""
    return own / f"log-{rank}.txt"


def finish(ranks: list[subprocess.Popen[str]]) -> dict[str, Any]:
    """Wait for the processes of a row and return its result. One that fails ends the others, and its log is shown."""
    started = time.perf_counter()
    own = Path(ranks[0].args[-2])  # pyright: ignore
    failed = 0
    while any(rank.poll() is None for rank in ranks):
        if any(rank.poll() for rank in ranks) or time.perf_counter() - started > ROW_TIMEOUT_S:
            failed = next((number for number, rank in enumerate(ranks) if rank.poll()), 0)
            for rank in ranks:
                rank.kill()
            break
        time.sleep(0.05)
    for rank in ranks:
        rank.wait()
    lines = log_of(own, 0).read_text(errors="replace").splitlines()
    found = next((json.loads(line[7:]) for line in reversed(lines) if line.startswith("RESULT ")), None)
    if found is None:
        shown = log_of(own, failed).read_text(errors="replace").splitlines()
        print(f"rank {failed} ended with {ranks[failed].returncode}", *shown[-25:], sep="\n", flush=True)
        found = {"error": next((line for line in reversed(shown) if line.strip()), "no output")[:200]}
    warning = next((line for line in lines if "run without torch.compile" in line), None)
    return {**found, "seconds": round(time.perf_counter() - started, 1), **({"warning": warning} if warning else {})}


def speed_table(results: dict[str, dict[str, Any]]) -> list[str]:
    """Return the lines of the speeds, with the ratio to FSDP2 of the same model."""
    lines = [
        f"bf16 with fp32 master weights, sequence length 4096; MFU of {PEAK_TFLOPS} TFLOP/s; median of three blocks of steps",
        f"{'':58} {'tokens/s':>9} {'MFU':>6} {'GiB':>6} {'of FSDP2':>9} {'first step':>11}",
    ]
    speeds = {
        name: found["tokens_per_s"] for name, found in results.items() if "/FSDP2" in name and "error" not in found
    }
    for row in ROWS:
        found = results.get(row.name)
        if not found:
            continue
        if "error" in found:
            lines.append(f"{row.name:58} {found['error']}")
            continue
        (architecture, keys), *_ = MODELS[row.model].items()
        flops = model_size({"model_type": architecture, **keys}).flops_per_token(4096) / row.gpus
        speed = found["tokens_per_s"]
        peer = next((speeds[other.name] for other in ROWS if other.group == row.group and other.name in speeds), None)
        ratio = f"{speed / peer:9.3f}" if peer else f"{'':9}"
        start_s = f"{found['first_step_s']:9.1f} s" if "first_step_s" in found else ""
        gib = f"{found['peak_gib']:6.1f}" if "peak_gib" in found else f"{'':6}"
        # Attention inside packs does not compute the pairs of a whole window.
        mfu = f"{speed * flops / PEAK_TFLOPS / 1e12:6.1%}" if row.dataset != "chat" else f"{'':6}"
        lines.append(f"{row.name:58} {speed:9,.0f} {mfu} {gib} {ratio} {start_s}  {found.get('warning', '')}".rstrip())
    return lines


def loss_table(losses: dict[str, list[float]]) -> list[str]:
    """Return how much the losses of each row differ from those of the plain runs and of the fp32 run, step by step.

    A plain run is compared with the other plain runs: this is what rounding alone does. The mean is over steps and plain runs.
    """
    plain = [row.name for row in ROWS if row.plain and row.name in losses]
    fp32 = [row.name for row in ROWS if row.stage.get("precision") == "fp32" and row.name in losses]
    steps = len(next(iter(losses.values())))
    lines = [
        f"losses of {steps:,} steps on real text, a dense model of 0.3 B parameters; differences from the plain runs,",
        "which differ from each other in their kernels and in the number of micro batches, whose gradients are added",
    ]
    means = {}
    for name, values in losses.items():
        differences = _differences(losses, name, plain)
        from_fp32 = _differences(losses, name, fp32)
        exact = f", mean {statistics.fmean(from_fp32):.5f} from fp32" if from_fp32 else ""
        last = f"last 20 steps {statistics.fmean(values[-20:]):.4f}{', plain' if name in plain else ''}"
        if not differences:
            lines.append(f"{name:58} no plain run to compare with, {last}")
            continue
        means[name] = statistics.fmean(differences)
        lines.append(f"{name:58} mean {means[name]:.5f}, largest {max(differences):.5f}{exact}, {last}")
    if len(plain) > 1:
        lines.append(f"the largest mean of a plain run is {max(means[name] for name in plain):.5f}")
    return lines


def _differences(losses: dict[str, list[float]], name: str, others: list[str]) -> list[float]:
    """Return the difference of each step's loss from that of each other row."""
    return [abs(a - b) for other in others if other != name for a, b in zip(losses[name], losses[other], strict=True)]


def curve_table(losses: dict[str, list[float]], points: int = 20) -> list[str]:
    """Return the mean losses of equal blocks of steps, a column for each row of the benchmark."""
    steps = len(next(iter(losses.values())))
    block = max(1, steps // points)
    lines = ["", f"mean loss of each {block} steps", "steps up to  " + "  ".join(losses)]
    for start in range(0, steps, block):
        means = [statistics.fmean(values[start : start + block]) for values in losses.values()]
        lines.append(
            f"{start + block:11,}  "
            + "  ".join(f"{mean:{len(name)}.4f}" for name, mean in zip(losses, means, strict=True))
        )
    return lines


if __name__ == "__main__":
    main()
