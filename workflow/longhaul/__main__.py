"""python -m longhaul: how launch scripts start every job, so that the mounted checkout is what runs."""

import sys

from longhaul.cli import main
from longhaul.runtime.log_lines import stamp_lines
from longhaul.runtime.process_rank import exit_without_cleanup

if sys.argv[1:2] == ["job"]:  # what a job prints goes to a log
    stamp_lines()
try:
    main()
    code = 0
except SystemExit as stop:
    code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
exit_without_cleanup(code)
