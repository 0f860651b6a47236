"""`longhaul init`: the copied files are a valid start of a run, and nothing is overwritten."""

from __future__ import annotations

from pathlib import Path

import pytest

from longhaul.config.load_config import SITES, load_config, load_site
from longhaul.config.start_files import EXAMPLES, copy_start_files, names_in
from longhaul.errors import UserError
from longhaul.planning import build_plan
from tests.support.bad_input import refused_message
from tests.support.local_model import write_local_files


@pytest.mark.parametrize("example", names_in(EXAMPLES))
def test_every_example_can_be_planned_as_a_copy(example: str, tmp_path: Path):
    write_local_files(tmp_path)
    config, site = copy_start_files(example, "slurm-generic", "mine", tmp_path)
    loaded = load_config(config)
    assert (config.name, site.name, loaded.config.run, loaded.site.name) == (
        "mine.yaml",
        "slurm-generic.yaml",
        "mine",
        "slurm-generic",
    )
    assert build_plan(loaded).stages


@pytest.mark.parametrize("site", names_in(SITES))
def test_every_site_is_copied_unchanged(site: str, tmp_path: Path):
    _, copy = copy_start_files("llama-8b-pretrain", site, "mine", tmp_path)
    assert copy.read_text() == (SITES / f"{site}.yaml").read_text()


def test_site_file_of_the_user_is_used_where_it_is(tmp_path: Path):
    own = tmp_path / "centre.yaml"
    own.write_text((SITES / "slurm-gres.yaml").read_text())
    config, site = copy_start_files("llama-8b-pretrain", str(own), "mine", tmp_path)
    assert site == own and load_config(config).site.name == "slurm-gres"


@pytest.mark.parametrize(
    ("example", "site", "run", "message"),
    [
        ("nothing", "local", "mine", "there is no example 'nothing'"),
        ("llama-8b-pretrain", "moon", "mine", "there is no site 'moon'"),
        ("llama-8b-pretrain", "local", "../mine", "run '../mine' is no name"),
    ],
)
def test_mistake_is_refused_and_writes_nothing(example: str, site: str, run: str, message: str, tmp_path: Path):
    with pytest.raises(UserError, match=message):
        copy_start_files(example, site, run, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_existing_file_is_not_overwritten(tmp_path: Path):
    (tmp_path / "mine.yaml").write_text("precious")
    with pytest.raises(UserError, match=r"mine\.yaml exists already"):
        copy_start_files("llama-8b-pretrain", "local", "mine", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"]
    assert (tmp_path / "mine.yaml").read_text() == "precious"


def test_verb_writes_both_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(tmp_path)
    words = ["init", "--example", "llama-8b-pretrain", "--site", "lumi", "--run", "mine"]
    from longhaul.cli import main

    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 0 and "longhaul plan mine.yaml" in capsys.readouterr().out
    assert load_site("./lumi.yaml", tmp_path).name == "lumi"
    assert "mine.yaml exists already" in refused_message(capsys, *words)
