"""A leg in a process of its own: python tracked_leg.py JOB FOLDER logs five steps, says so, and ends when its input does."""

from __future__ import annotations

import sys
from pathlib import Path

from longhaul.jobs.specs import TrainSpec
from longhaul.train.monitoring.trackers import open_trackers

trackers = open_trackers(TrainSpec.read(Path(sys.argv[1])), Path(sys.argv[2]), 0)
for step in range(5):
    for tracker in trackers:
        tracker.log(step, {"loss": 1.0})
print("logged", flush=True)
sys.stdin.read()
for tracker in trackers:
    tracker.close()
