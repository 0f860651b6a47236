"""Guides: the commands that need neither Slurm, GPUs nor internet work, in the order of the page."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from longhaul.cli import main
from tests.support.local_model import write_local_files
from tests.support.pipeline_run import REPOSITORY

FIRST_RUN = ("docs/how-to/first-run-at-your-centre.md", "docs/zh/first-run.md")
LOCAL_FILES = "docs/how-to/use-local-data-and-a-local-model.md"
# Page -> the verbs of its commands that need no centre, in order. Both guides for a first run have the same commands.
GUIDES = {
    FIRST_RUN[0]: ["init", "plan", "run -n", "run -n"],
    "docs/zh/multi-node-guide.md": ["site nodes", "init", "plan", "run -n", "fabric explain", "init", "plan", "doctor"],
    LOCAL_FILES: ["init", "plan", "run -n"],
}


def commands(page: Path) -> list[str]:
    blocks = re.findall(r"^```bash\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return [line for block in blocks for line in block.splitlines()]


def verb_without_centre(line: str) -> str | None:
    """Return the verb of a command that needs neither Slurm, GPUs nor internet; None for the other commands.

    The second `init` of a guide for a first run is for a site file that only Slurm can give. A run up to a file is tried as
    a dry run.
    """
    if line.startswith(("longhaul init", "longhaul plan", "longhaul doctor")) and "./my-centre.yaml" not in line:
        return line.split()[1]
    if line.startswith(("longhaul site nodes", "longhaul fabric explain")):
        return " ".join(line.split()[1:3])
    return "run -n" if line.startswith("longhaul run") and (line.endswith(" -n") or "results/" in line) else None


@pytest.mark.parametrize("guide", GUIDES)
def test_commands_work_in_an_empty_folder(
    guide: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    if guide == LOCAL_FILES:
        write_local_files(tmp_path)
    found = [line for line in commands(REPOSITORY / guide) if verb_without_centre(line)]
    assert [verb_without_centre(line) for line in found] == GUIDES[guide]
    for line in found:
        if verb_without_centre(line) == "run -n":
            words = [sys.executable, "-m", *shlex.split(line.removesuffix(" -n")), "-n"]
            done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
            assert done.returncode == 0 and "This was a dry run" in done.stdout, done.stderr
            continue
        with pytest.raises(SystemExit) as ended:
            main(shlex.split(line)[1:])
        # Nothing has run in this folder, so `doctor` says how to start.
        assert ended.value.code == (2 if verb_without_centre(line) == "doctor" else 0), capsys.readouterr().out
    output = capsys.readouterr()
    assert "GPU" in output.out
    assert ("remedy: start it with `longhaul run CONFIG`" in output.err) == ("doctor" in GUIDES[guide])


def test_both_guides_for_a_first_run_have_the_same_steps_commands_tables_and_links():
    english, chinese = (REPOSITORY / guide for guide in FIRST_RUN)
    assert commands(chinese) == commands(english)
    assert outline(chinese) == outline(english)
    assert not linked_pages(english) - linked_pages(chinese) - {chinese}


def test_guides_install_the_tested_version_of_torch_for_cuda_and_rocm():
    pinned = re.search(r"^torch==.*$", (REPOSITORY / "envs/constraints.txt").read_text(), flags=re.MULTILINE)
    assert pinned
    for guide in FIRST_RUN:
        installs = [line.split() for line in commands(REPOSITORY / guide) if "torch==" in line]
        indexes = [re.sub(r".*/|[\d.]", "", words[-1]) for words in installs if pinned[0] in words]
        assert indexes == ["cu", "rocm"], guide


def outline(page: Path) -> list[str]:
    """Return the level of each heading, and a mark for each row of a table, in order."""
    lines = page.read_text(encoding="utf-8").splitlines()
    return [line.split()[0] for line in lines if re.match(r"#+ |\| ", line)]


def linked_pages(page: Path) -> set[Path]:
    links = re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8"))
    return {(page.parent / link).resolve() for link in links}
