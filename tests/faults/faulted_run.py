"""A run on the test cluster into which a fault is injected: its start, its progress and its results."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from longhaul.artifacts.line_record_fields import MetricsRow, read_events
from longhaul.artifacts.line_records import read_records
from longhaul.report.goodput import Goodput, read_goodput, start_up_times
from tests.support.pipeline_run import REPOSITORY
from tests.support.pipeline_run_on_cluster import SITE, PipelineRunOnCluster
from tests.support.virtual_cluster import VirtualCluster

STEPS, QUICK_STEPS, SAVE_EVERY = 400, 200, 25
RECOVERY = {"heartbeat_timeout_s": 6.0, "stop_margin_s": 3.0, "collective_timeout_s": 60.0, "max_restarts": 3}
DOCUMENTS = 60_000
"""Documents of the larger corpus: it takes some seconds to tokenize, in several chunks."""
NAN_BATCHES = (90, 91, 130)

TRAIN, TOKENIZE, EXPORT = "stages/base", "jobs/tokenize-prose", "jobs/export-base"
_TARGETS = {
    TRAIN: "results/tiny/stages/base/checkpoint.json",
    TOKENIZE: "results/tiny/data/prose.json",
    EXPORT: "results/tiny/export/base.json",
}
_JOBS = {TRAIN: "train-base", TOKENIZE: "tokenize-prose", EXPORT: "export-base"}
# Results that a run of a phase does not start with, because the phase writes them.
_NOT_COPIED = {
    TRAIN: ("stages", "export", "logs", "jobs"),
    TOKENIZE: ("stages", "export", "logs", "jobs", "data"),
    EXPORT: ("export", "logs", "jobs"),
}


def faulted_config(finished: dict[str, Any], nodes: int = 2, steps: int = STEPS, **stage: Any) -> dict[str, Any]:
    """Return the config of the tiny run's first stage with more steps, on nodes of one rank, without a scale test before it."""
    config = json.loads(json.dumps({**finished, "scale_test": "off"}))
    base = config["stages"][0]
    base |= {"nodes": nodes, "gpus_per_node": 1, "steps": steps, "recovery": RECOVERY, "minutes": 5}
    base["schedule"] = {"kind": "constant"}
    base["checkpoints"] = {"every_steps": SAVE_EVERY, "keep_best": 1}
    base["validation"] = {"every_steps": SAVE_EVERY, "max_samples": 8}
    config["stages"] = [{**base, **stage}]
    return config


def faulted_site(partition: str = "main", **injected: str) -> dict[str, Any]:
    """Return a site of three nodes. injected: variables for tests/support/injected/sitecustomize.py."""
    (given,) = SITE["partitions"]
    gpu = {**given, "name": partition, "max_nodes": 3}
    cpu = {**given, "jobs": ["cpu"], "name": "main", "max_nodes": 1}
    site: dict[str, Any] = {"deadline_poll_interval_s": 1.0, "partitions": [gpu, cpu]}
    if injected:
        site["srun_extra"] = [f"--task-prolog={REPOSITORY / 'tests/support/injected/task_prolog.sh'}"]
        site["environment"] = injected
    return site


class FaultedRun(PipelineRunOnCluster):
    """A run in its own folder that makes one phase: a stage, a dataset or an export. It starts with the other results."""

    def __init__(
        self,
        folder: Path,
        config: dict[str, Any],
        cluster: VirtualCluster,
        given: Path,
        phase: str = TRAIN,
        site: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(folder, config, cluster, **(site or faulted_site()))
        ignored = shutil.ignore_patterns(*_NOT_COPIED[phase])
        shutil.copytree(given, self.results, ignore=ignored, dirs_exist_ok=True)
        for data in folder.glob("*.jsonl"):
            os.utime(data, (1e9, 1e9))  # older than the results made from them
        self.phase, self.target = phase, _TARGETS[phase]
        self.main: subprocess.Popen[str] | None = None
        self.seconds = 0.0  # from the start of the command to its end, where a test measures it
        (folder / "main.log").touch()

    # Start and end

    def start(self) -> None:
        log = (self.folder / "main.log").open("a")
        self.main = subprocess.Popen(
            # a shell that runs the tests in the background ignores SIGINT
            ["env", "--default-signal=INT", *self.command(self.target)],
            cwd=self.folder,
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
            env=self.environment(),
        )

    def start_controller(self) -> None:
        """Submit the main Snakemake process as a job. It asks Slurm every second, too."""
        self.run_render()
        script = self.results / "controller.sbatch"
        fast_command = f"{sys.executable} {REPOSITORY / 'tests/support/fast_snakemake.py'} {self.target}"
        script.write_text(script.read_text().replace(f"{sys.executable} -m snakemake", fast_command))
        self.cluster.run("sbatch", str(script))

    def run_render(self) -> None:
        words = [sys.executable, "-m", "longhaul", "job", "render", str(self.folder / "run.yaml")]
        subprocess.run(words, cwd=self.folder, check=True, env=self.environment(), capture_output=True)

    def finish(self, timeout_s: float = 300) -> int:
        """Wait for the main Snakemake process and return its exit code."""
        assert self.main is not None
        return self.main.wait(timeout=timeout_s)

    def snakemake_process(self) -> psutil.Process:
        """Return the main Snakemake process itself, which is a child of nsenter."""
        assert self.main is not None
        found = [psutil.Process(self.main.pid), *psutil.Process(self.main.pid).children(recursive=True)]
        return next(
            p for p in found if "fast_snakemake.py" in " ".join(p.cmdline()) and "nsenter" not in p.cmdline()[0]
        )

    def output(self) -> str:
        return (self.folder / "main.log").read_text() + self.logs()

    def was_retried(self) -> bool:
        return ", starts again (" in (self.folder / "main.log").read_text()

    def failure_message(self) -> str:
        """Return what the main Snakemake process printed at its end about the failure of the phase's job."""
        return (self.folder / "main.log").read_text().partition(f"\n{_JOBS[self.phase]} failed (")[2]

    def failure(self, job: str) -> dict[str, Any]:
        """Return how a job, jobs/export-base for example, failed."""
        return self.read(f"{job}/failure.json")

    # Progress

    def in_weights(self, pattern: str) -> list[Path]:
        """Return paths in the stage's weights folder, below the run or in its separate storage."""
        roots = (self.results / "stages/base/weights", self.folder / "small/tiny/base")
        return [path for root in roots for path in root.glob(f"*/{pattern}")]

    def step(self) -> int:
        rows = [line for path in self.in_weights("metrics.jsonl") for line in path.open()]
        return max((json.loads(row)["step"] for row in rows if row.endswith("\n")), default=0)

    def is_saving(self) -> bool:
        return bool(self.in_weights("checkpoints/step-*.partial"))

    def has_encoded_a_chunk(self) -> bool:
        return any(self.results.glob("data/prose/*/record.json"))

    def is_exporting(self) -> bool:
        return any(self.results.glob("export/base/.*.partial/*"))

    def wait_until(self, condition: Callable[[], bool], seconds: float = 90) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.main is None or self.main.poll() is None, "snakemake ended early:\n" + self.output()[-4000:]
            assert time.monotonic() < deadline, "the condition did not hold in time:\n" + self.output()[-6000:]
            time.sleep(0.01)

    def queued_jobs(self) -> list[str]:
        """Return the ids of jobs that wait for nodes."""
        return self.slurm("squeue", "-h", "-t", "PENDING", "-o", "%i").split()

    def state(self) -> dict[str, Any]:
        return self.read(f"{self.phase}/state.json")

    @property
    def job_id(self) -> str:
        return self.state()["job_id"]

    def processes(self, *words: str) -> list[psutil.Process]:
        """Return the processes of this run, on any host, whose command line has all the words."""
        own_folder = str(self.folder)
        found = []
        for process in psutil.process_iter(["cmdline"]):
            line = process.info["cmdline"] or []
            is_match = own_folder in " ".join(line) and all(word in line for word in words)
            if is_match and line[0] not in ("srun", "bash", "sh", "nsenter"):
                found.append(process)
        return found

    def ranks(self) -> list[psutil.Process]:
        """Return the processes of the phase's job, ordered by rank."""
        verb = {TRAIN: "train", TOKENIZE: "tokenize", EXPORT: "export"}[self.phase]
        found = self.processes("longhaul", verb)
        return sorted(found, key=lambda process: int(process.environ()["SLURM_PROCID"]))

    def slurm(self, *words: str) -> str:
        return self.cluster.run(*words)

    # Results

    def product(self) -> Any:
        """Return what the phase wrote, by content."""
        if self.phase == TOKENIZE:
            return {key: value for key, value in self.read("data/prose.json").items() if key != "sources"}
        if self.phase == EXPORT:
            return self.read("export/base.json")["files"]
        return self.master_weights()

    def master_weights(self) -> dict[str, str]:
        checkpoint = self.read("stages/base/checkpoint.json")
        last = Path(checkpoint["weights"]) / checkpoint["checkpoints"]["last"]["path"]
        tensors = json.loads((self.folder / last / "reference" / "tensors.json").read_text())
        return {name: entry["sha256_fp32"] for name, entry in tensors.items()}

    def trained_steps(self) -> list[int]:
        """Return the steps of metrics.jsonl, without torn lines."""
        return [
            row["step"] for row in read_records(self.weights("base") / "metrics.jsonl", MetricsRow) if "loss" in row
        ]

    def attempts(self) -> int:
        """Return how often the job's steps were started."""
        history = read_events(self.results / self.phase / "history.jsonl")
        return sum(event["event"] in ("running", "restarted") for event in history)

    def goodput(self) -> Goodput:
        found = read_goodput(self.results / "stages/base", self.weights("base"))
        assert found is not None
        return found

    def last_start_up_s(self) -> float:
        """Return the time from the last start of the job, or its restart in place, to its first step."""
        history = read_events(self.results / "stages/base/history.jsonl")
        return list(start_up_times(history, read_events(self.weights("base") / "events.jsonl")))[-1]


def write_larger_corpus(run: FaultedRun) -> None:
    """Write a large corpus of the same words. It is older than the tokenizer, which is therefore not built again."""
    words = "the long haul takes raw text to a model and proves every step of the way home again".split()  # noqa: SIM905
    with (run.folder / "prose.jsonl").open("w") as stream:
        for i in range(1, DOCUMENTS):
            text = " ".join(words[(i * k) % len(words)] for k in range(1, 120))
            stream.write(json.dumps({"text": f"{i} {text}"}) + "\n")
    os.utime(run.folder / "prose.jsonl", (1e9, 1e9))
