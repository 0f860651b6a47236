"""The trackers of an attempt in a process of its own: python tracked_training.py JOB FOLDER.

It logs five steps, prints "logged", and closes the trackers when its input ends.
"""

from __future__ import annotations

import sys
from pathlib import Path

from longhaul.jobs.kinds.train_job import TrainSpec
from longhaul.train.monitoring.trackers import open_trackers

trackers = open_trackers(TrainSpec.read(Path(sys.argv[1])), Path(sys.argv[2]), 0)
for step in range(5):
    for tracker in trackers:
        tracker.log(step, {"loss": 1.0})
print("logged", flush=True)
sys.stdin.read()
for tracker in trackers:
    tracker.close()
