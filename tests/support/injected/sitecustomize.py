"""Python imports this file at its start if the folder is on its path. Trainers then compute NaN in the batches of NAN_BATCHES."""

import os
import sys

if "train" in sys.orig_argv and "SLURM_PROCID" in os.environ:
    from tests.support.injected_faults import poison_batches

    poison_batches({int(batch): float("nan") for batch in os.environ["NAN_BATCHES"].split(",")})
