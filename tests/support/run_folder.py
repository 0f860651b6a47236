"""The files of a run with an environment check and training stages, as its jobs and its trainer write them."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from longhaul.artifacts.job_state import State, StateName
from longhaul.artifacts.leases import LeaseOwner
from longhaul.artifacts.paths import JobId, RunPaths, WeightsFolder
from longhaul.errors import UserError
from longhaul.report.run_status import RunStatus, read_status
from longhaul.report.slurm_queue_types import Queue, QueuedJob

TRAIN = JobId("train", ("base",))


class RunFolder:
    """A run with an environment check and one stage of 100 steps on 2 nodes with 4 GPUs each."""

    def __init__(self, root: Path, scheduler: str = "slurm", stages: int = 1) -> None:
        self.paths = RunPaths("r", root / "results")
        self.names = ["base", *(f"stage-{number}" for number in range(1, stages))]
        self.paths.folder.mkdir(parents=True)
        jobs = [JobId("environment"), *(JobId("train", (name,)) for name in self.names)]
        plan = {
            "run": "r",
            "site": "here",
            "scheduler": scheduler,
            "stages": [self._row(name) for name in self.names],
            "jobs": [{"kind": job.kind, "names": list(job.names), "request": {}} for job in jobs],
        }
        self.paths.plan.write_text(json.dumps(plan))

    @staticmethod
    def _row(name: str) -> dict[str, Any]:
        return {
            "name": name,
            "kind": "pretrain",
            "dataset": "prose",
            "steps": 100,
            "nodes": 2,
            "gpus_per_node": 4,
            "gpu_hours_range": [7.5, 9.0],
            "memory_per_gpu_gib": None,
        }

    def main_process(self, owner: LeaseOwner | None = None) -> None:
        """Let a process be the main process of the run, by default this one."""
        self.paths.lease.write_text(json.dumps(asdict(owner or LeaseOwner.this_process())))

    def state(self, job: JobId, state: StateName, job_id: str | None = "7", reason: str = "") -> None:
        record = State(state, job_id, "n1", ["n1", "n2"], 1, "2026-11-28T10:00:00+00:00", reason)
        record.write(self.paths.job(job).state)

    def fail_to_fetch(self, *task: str) -> Path:
        """Write the log of a fetch that failed, of the sources or of the data of a task (stage, task). Return its path."""
        log = self.paths.logs / "fetch.log"
        if task:
            log = self.paths.task_data_log(*task)
            plan = json.loads(self.paths.plan.read_text())
            plan["jobs"].append({"kind": "evaluate", "names": [task[0], "trained", task[1]], "request": {}})
            self.paths.plan.write_text(json.dumps(plan))
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(f"error: earlier\nok\nerror: {UserError('org/x is not on the hub', 'correct the name')}\n")
        return log

    def weights(self, stage: str = "base", device: str = "cuda") -> WeightsFolder:
        folder = self.paths.stage(stage)
        weights = WeightsFolder(folder.weights / "0123")
        weights.path.mkdir(parents=True)
        folder.job_spec.write_text(json.dumps({"weights_root": str(folder.weights)}))
        weights.attempts.write_text(json.dumps({"hosts": ["n1"], "device": device}) + "\n")
        return weights

    def train(self, steps: int, stage: str = "base") -> WeightsFolder:
        """Write the metrics of `steps` steps: step k has the loss 5 - k/100, 2 s of training, 0.5 s of waiting for data."""
        weights = self.weights(stage)
        rows: list[dict[str, Any]] = [{"step": 0, "validation_loss": 5.5}]
        rows += [
            {"step": k, "loss": 5 - k / 100, "step_time_s": 2.0, "data_wait_s": 0.5, "tokens_per_s": 1000.0, "mfu": 0.4}
            for k in range(1, steps + 1)
        ]
        rows.append({"step": steps, "validation_loss": 4.5})
        weights.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
        saved = {
            "time_s": 1000.0,
            "event": "saved",
            "step": 30,
            "training_s": 1.0,
            "validation_s": 0.0,
            "saving_s": 0.0,
        }
        weights.events.write_text(json.dumps(saved) + "\n")
        checkpoint = weights.checkpoint(30)
        checkpoint.mkdir(parents=True)
        (checkpoint / "rank0.pt").write_bytes(b"x" * 1000)
        return weights

    def status(self, **queue: QueuedJob) -> RunStatus:
        by_job = {name.replace("_", "-"): job for name, job in queue.items()}
        return read_status(self.paths, lambda jobs: Queue(by_job))
