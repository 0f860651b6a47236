"""The guides for a first run: the commands that need neither Slurm, GPUs nor internet work, in the order of the page."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from longhaul.cli import main
from tests.support.chain import REPOSITORY

GUIDES = ("docs/how-to/first-run-at-your-centre.md", "docs/zh/first-run.md")
WITHOUT_CENTRE = ("longhaul init", "longhaul plan")
"""The other commands ask Slurm or the hub."""


def commands(page: Path) -> list[str]:
    blocks = re.findall(r"^```bash\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return [line for block in blocks for line in block.splitlines()]


@pytest.mark.parametrize("guide", GUIDES)
def test_commands_work_in_an_empty_folder(
    guide: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    found = [line for line in commands(REPOSITORY / guide) if line.startswith(WITHOUT_CENTRE)]
    # The page's second `init` is for a centre that is not in the list, with a file that only Slurm can give.
    found = [line for line in found if "./my-centre.yaml" not in line]
    assert [line.split()[1] for line in found] == ["init", "plan"]
    for line in found:
        with pytest.raises(SystemExit) as ended:
            main(shlex.split(line)[1:])
        assert ended.value.code == 0, capsys.readouterr().out
    assert "GPU" in capsys.readouterr().out


def test_both_guides_show_the_same_commands():
    english, chinese = ({" ".join(line.split()[:3]) for line in commands(REPOSITORY / guide)} for guide in GUIDES)
    assert chinese <= english
