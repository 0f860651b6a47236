"""One rank that trains the stages of a planned run, whose data exists: python train_planned_run.py FOLDER"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from longhaul.artifacts.paths import JobId
from longhaul.config.load_config import load_config
from longhaul.jobs.job_kind import job_spec
from longhaul.jobs.kinds.train_job import TrainSpec
from longhaul.planning import build_plan
from longhaul.train import train_stage


def main() -> None:
    os.chdir(sys.argv[1])
    plan = build_plan(load_config(Path("run.yaml")))
    for stage in plan.stages:
        job = job_spec(plan, JobId("train", (stage.name,)))
        assert isinstance(job, TrainSpec)
        train_stage.run(job)


if __name__ == "__main__":
    main()
