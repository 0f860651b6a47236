"""Tests on this machine's GPUs. Other jobs may use GPUs of the same host, so no process uses NVLink multicast."""

import os

from longhaul.jobs.environment_variables import NO_MULTICAST

os.environ.update(NO_MULTICAST)
