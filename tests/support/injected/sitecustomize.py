"""Python imports this file at its start if the folder is on its path. Faults of single processes:

NAN_BATCHES: trainers compute NaN in these batches
WRONG_CLOCK: while this file exists, the clock of the last node is an hour ahead in the environment check
"""

import os
import sys
import time
from pathlib import Path

variables = os.environ
if "train" in sys.orig_argv and "NAN_BATCHES" in variables and "SLURM_PROCID" in variables:
    from tests.support.injected_faults import poison_batches

    poison_batches({int(batch): float("nan") for batch in variables["NAN_BATCHES"].split(",")})

is_wrong = "environment" in sys.orig_argv and Path(variables.get("WRONG_CLOCK", "none")).exists()
if is_wrong and int(variables["SLURM_PROCID"]) == int(variables["SLURM_NTASKS"]) - 1:
    right_time = time.time
    time.time = lambda: right_time() + 3600
