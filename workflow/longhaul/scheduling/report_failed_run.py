"""Writes report.html of a run that failed or was stopped, as `longhaul report` does; the next run writes it again."""

from __future__ import annotations

from typing import Any

from longhaul.artifacts.paths import RunPaths
from longhaul.compat.snakemake import make_again_in_next_run
from longhaul.errors import UserError
from longhaul.scheduling.read_job_queue import queue_asker


def report_failed_run(workflow: Any, paths: RunPaths) -> str:
    """Write the report in the main process, which then ends. Return why it could not be written; "" if it is written.

    workflow: Snakemake's
    Nothing is raised: an error here must not hide why the run failed.
    """
    from longhaul.report.html_page import write_report  # imports plotly, which other runs need not

    try:
        write_report(paths.folder, paths.report, queue_asker(paths), main_process_ends=True)
        make_again_in_next_run(workflow, paths.report, paths.plan)
    except UserError as error:
        return error.message
    except Exception as error:  # of a damaged file, for example
        return f"{type(error).__name__}: {error}"
    return ""
