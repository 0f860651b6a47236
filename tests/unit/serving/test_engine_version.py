"""The engine's Python is asked for its packages, before a job waits in the queue where that is possible."""

from __future__ import annotations

from pathlib import Path

import pytest

from longhaul.config.site_serving_config import Serving
from longhaul.errors import UserError
from longhaul.serving.engine_version import check_packages_here, engine_version


def python_that(folder: Path, prints: str) -> str:
    """Return the path of a program that stands for the engine's Python. It leaves a file `asked` in its folder."""
    path = folder / "python"
    path.write_text(f"#!/bin/sh\ntouch {folder}/asked\necho '{prints}'\n")
    path.chmod(0o755)
    return str(path)


MISSING, FOUND = '{"missing": ["vllm"], "version": ""}', '{"missing": [], "version": "0.32.0"}'


def test_a_missing_package_is_named_before_a_job_is_submitted(tmp_path: Path):
    python = python_that(tmp_path, MISSING)
    with pytest.raises(UserError, match=rf"serving\.engine vllm needs the package vllm, which {python} does not have"):
        check_packages_here(Serving(engine="vllm", python=(python,)))


@pytest.mark.parametrize("prints", [FOUND, "Exec format error", "[]", ""])
def test_what_this_machine_cannot_tell_is_left_to_the_job(tmp_path: Path, prints: str):
    check_packages_here(Serving(engine="vllm", python=(python_that(tmp_path, prints),)))
    assert (tmp_path / "asked").exists()


def test_a_python_that_is_not_on_this_machine_is_left_to_the_job(tmp_path: Path):
    check_packages_here(Serving(engine="vllm", python=(str(tmp_path / "python"),)))


def test_a_container_is_not_started_on_this_machine(tmp_path: Path):
    check_packages_here(Serving(engine="vllm", python=(python_that(tmp_path, MISSING), "exec", "vllm.sif", "python3")))
    assert not (tmp_path / "asked").exists()


@pytest.mark.parametrize("prints", ["[]", "text"])
def test_in_the_job_another_answer_is_an_error_until_the_site_file_is_corrected(tmp_path: Path, prints: str):
    (tmp_path / "wrong").mkdir()
    wrong = Serving(engine="vllm", python=(python_that(tmp_path / "wrong", prints),))
    with pytest.raises(UserError, match="does not start a Python of at least version") as refused:
        engine_version(wrong)
    assert refused.value.hint == "try it on a compute node, and correct the site file"
    missing = Serving(engine="vllm", python=(str(tmp_path / "none"),))
    with pytest.raises(UserError, match="none does not start: No such file") as refused:
        engine_version(missing)
    assert refused.value.hint == "correct the site file"
    assert engine_version(Serving(engine="vllm", python=(python_that(tmp_path, FOUND),))) == "0.32.0"


def test_the_version_of_the_engine(tmp_path: Path):
    assert engine_version(Serving(engine="vllm", python=(python_that(tmp_path, FOUND),))) == "0.32.0"
