"""python -m longhaul: how launch scripts start every job, so that the mounted checkout is what runs.

A job that has done its work leaves without taking the interpreter apart: threads of gloo that want it meanwhile abort
the process now and then ("terminate called without an active exception"), and the finished stage would count as failed.
"""

import os
import sys

from longhaul.cli import main

try:
    main()
    code = 0
except SystemExit as stop:
    code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
sys.stdout.flush()
sys.stderr.flush()
os._exit(code)
