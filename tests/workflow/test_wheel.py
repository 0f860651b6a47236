"""An installed wheel works without the checkout: it brings rules, templates, sites, profiles and the demo config along."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from tests.support.pipeline_run import REPOSITORY


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return bin/ of an environment with longhaul's wheel. All else comes from this environment, to spare a download of GB."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "wheel", "--no-deps", "-w", str(folder), str(REPOSITORY)], check=True)
    venv.create(folder / "env", with_pip=False)
    site = next((folder / "env").glob("lib/python*/site-packages"))
    (wheel,) = folder.glob("longhaul-*.whl")
    subprocess.run([*pip, "--python", str(folder / "env"), "install", "--no-deps", str(wheel)], check=True)
    # A path file's folders are searched, but path files in them are not read: the checkout stays unknown.
    (site / "others.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return folder / "env" / "bin"


def longhaul(installed: Path, folder: Path, *words: str) -> str:
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment = {**clean, "PATH": f"{installed}:{os.environ['PATH']}"}
    command = [str(installed / "longhaul"), *words]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_the_demo_is_planned_and_its_jobs_are_found(installed: Path, tmp_path: Path):
    assert "pretrain" in longhaul(installed, tmp_path, "plan", "demo")
    assert "train" in longhaul(installed, tmp_path, "run", "demo", "-n")


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_demo_finishes(installed: Path, tmp_path: Path):
    longhaul(installed, tmp_path, "run", "demo")
    results = tmp_path / "results" / "demo"
    assert str(REPOSITORY) not in (results / "stages/pretrain/launch.sh").read_text()
    assert (tmp_path / "results/.code/longhaul").resolve().is_relative_to(installed.parent)
    assert (results / "report.html").exists() and (results / "export/chat/latest/config.json").exists()
