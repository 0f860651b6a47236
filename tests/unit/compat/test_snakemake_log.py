"""The terminal log of Snakemake is replaced where a run is executed, and nowhere else."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from snakemake.logging import LoggerManager, logger
from snakemake.settings.types import OutputSettings

from longhaul.compat.snakemake import is_dry_run, replace_terminal_log, terminal_log


@pytest.fixture
def records() -> Iterator[list[logging.LogRecord]]:
    """Yield a list; remove all handlers from Snakemake's logger afterwards."""
    before = logger.handlers[:]
    yield []
    logger.handlers[:] = before


def usual_handler() -> logging.Handler:
    usual = terminal_log()
    assert usual is not None
    return usual


def test_records_go_to_the_function(records: list[logging.LogRecord]) -> None:
    """Still needed: Snakemake gives its own handler this name, and a Snakefile cannot choose a logger plugin."""
    LoggerManager(logger, OutputSettings())
    replace_terminal_log(usual_handler(), records.append)
    logger.info("hello")
    assert [record.getMessage() for record in records] == ["hello"]
    assert not any(handler.name == "DefaultStreamHandler" for handler in logger.handlers)


def test_dry_run_is_known(records: list[logging.LogRecord]) -> None:
    """Still needed: the filter of the handler is the only one that knows it while the rules are read."""
    for dry_run in (True, False):
        logger.handlers.clear()
        LoggerManager(logger, OutputSettings(dryrun=dry_run))
        assert is_dry_run(usual_handler()) == dry_run


def test_error_in_the_function_does_not_end_the_run(
    records: list[logging.LogRecord], capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(record: logging.LogRecord) -> None:
        raise KeyError(record.msg)

    LoggerManager(logger, OutputSettings())
    replace_terminal_log(usual_handler(), fail)
    logger.info("hello")
    assert "KeyError" in capsys.readouterr().err


@pytest.mark.parametrize(("chosen", "expected"), [(None, "longhaul-r"), ("mine", "mine")])
def test_job_names_begin_with_the_run(chosen: str | None, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Still needed: the plugin takes the prefix from a setting that no Snakefile can set."""
    import snakemake_executor_plugin_slurm as plugin

    from longhaul.compat.slurm_plugin import name_jobs

    class Executor:
        def __init__(self) -> None:
            self.workflow: Any = SimpleNamespace(executor_settings=plugin.ExecutorSettings(jobname_prefix=chosen))

        def __post_init__(self) -> None:
            self.prefix = self.workflow.executor_settings.jobname_prefix

    monkeypatch.setattr(plugin, "Executor", Executor)
    name_jobs("r")
    executor: Any = Executor()
    executor.__post_init__()
    assert executor.prefix == expected
