"""`longhaul init`: the copied files are a valid start of a run, and nothing is overwritten."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from longhaul.config.init_files import EXAMPLES, copy_start_files, names_in
from longhaul.config.load_config import SITES, load_config, load_site
from longhaul.errors import UserError
from longhaul.planning import build_plan
from tests.support.check_user_errors import refused_message
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
    ("run", "file"),
    [("123", "centre.yaml"), ("null", "my #1.yaml"), ("2026-13-01", "a: b.yaml"), ("mine", "größe.yaml")],
)
def test_names_that_yaml_reads_as_something_else_are_quoted(run: str, file: str, tmp_path: Path):
    (tmp_path / file).write_text((SITES / "lumi.yaml").read_text())
    config, _ = copy_start_files("llama-8b-pretrain", f"./{file}", run, tmp_path)
    loaded = load_config(config)
    assert (loaded.config.run, loaded.site.name) == (run, "lumi")


@pytest.mark.parametrize(
    ("example", "site", "run", "message", "remedy"),
    [
        ("nothing", "local", "mine", "there is no example 'nothing'", "use one of .*llama-8b-pretrain"),
        ("llama-8b-pretrain", "moon", "mine", "there is no site 'moon'", "use one of .*local"),
        ("llama-8b-pretrain", "local", "../mine", "run '../mine' is no name", "use .* letter"),
        ("llama-8b-pretrain", "lumi", "lumi", r"the run and the site would both be .*/lumi\.yaml", "another run name"),
    ],
)
def test_mistake_writes_nothing_until_the_remedy_is_followed(
    example: str, site: str, run: str, message: str, remedy: str, tmp_path: Path
):
    with pytest.raises(UserError, match=message) as refused:
        copy_start_files(example, site, run, tmp_path)
    assert re.search(remedy, refused.value.hint), refused.value.hint
    assert list(tmp_path.iterdir()) == []
    copy_start_files("llama-8b-pretrain", "local", "mine", tmp_path)


def test_existing_file_is_not_overwritten_until_it_is_moved_away(tmp_path: Path):
    (tmp_path / "mine.yaml").write_text("precious")
    with pytest.raises(UserError, match=r"mine\.yaml exists already"):
        copy_start_files("llama-8b-pretrain", "local", "mine", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"]
    assert (tmp_path / "mine.yaml").read_text() == "precious"
    copy_start_files("llama-8b-pretrain", "local", "other", tmp_path)
    (tmp_path / "mine.yaml").rename(tmp_path / "moved.yaml")
    copy_start_files("llama-8b-pretrain", "./local.yaml", "mine", tmp_path)


def test_second_run_is_told_to_use_the_site_file_of_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    copy_start_files("llama-8b-pretrain", "lumi", "first", Path())
    with pytest.raises(UserError, match=r"lumi\.yaml exists already") as error:
        copy_start_files("llama-8b-pretrain", "lumi", "second", Path())
    assert error.value.hint.startswith("use it with --site ./lumi.yaml")
    copy_start_files("llama-8b-pretrain", "./lumi.yaml", "second", Path())
    assert load_config(Path("second.yaml")).site.name == "lumi"


def test_verb_writes_both_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(tmp_path)
    words = ["init", "--example", "llama-8b-pretrain", "--site", "lumi", "--run", "mine"]
    from longhaul.cli import main

    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 0 and "longhaul plan mine.yaml" in capsys.readouterr().out
    assert load_site("./lumi.yaml", tmp_path).name == "lumi"
    assert "mine.yaml exists already" in refused_message(capsys, *words)


@pytest.mark.parametrize("site", ["leonardo", "jupiter", "snellius"])
def test_stages_keep_their_gpus_on_nodes_with_fewer_and_fit_the_time_limit(site: str, tmp_path: Path):
    """The example has 4 nodes with 8 GPUs and asks for 1440 minutes."""
    config, _ = copy_start_files("llama-8b-pretrain", site, "mine", tmp_path)
    loaded = load_config(config)
    (stage,) = loaded.config.stages
    assert (stage.nodes, stage.gpus_per_node) == (8, 4)
    assert stage.minutes == min(1440, loaded.site.partition_for("gpu").max_minutes or 0)
    assert build_plan(loaded).stages


def test_a_server_is_spread_over_nodes_of_the_site_too(tmp_path: Path):
    config, _ = copy_start_files("deepseek-r1-671b-serve", "perlmutter", "mine", tmp_path)
    serve = load_config(config).config.stages[0].serve
    assert serve and (serve.nodes, serve.gpus_per_node) == (4, 4)


def test_missing_site_file_writes_nothing(tmp_path: Path):
    with pytest.raises(UserError, match=r"centre\.yaml"):
        copy_start_files("llama-8b-pretrain", "./centre.yaml", "mine", tmp_path)
    assert list(tmp_path.iterdir()) == []


def converse(folder: Path, answers: str, *words: str) -> tuple[int, str]:
    """Return exit code and output of `longhaul init` in a terminal in which these answers are typed."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "longhaul", "init", *words]
    process = subprocess.Popen(command, cwd=folder, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    os.write(ours, answers.encode())
    output = b""
    try:
        while piece := os.read(ours, 4096):
            output += piece
    except OSError:  # Linux: the other side is closed
        pass
    os.close(ours)
    return process.wait(timeout=60), output.decode()


def test_wrong_answers_are_explained_and_asked_again(tmp_path: Path):
    code, output = converse(tmp_path, "llama\nllama-8b-pretrain\nmoon\n./none.yaml\nleonardo\nmy run\nfirst\n")
    assert code == 0, output
    for text in (
        "there is no example 'llama'",
        "there is no site 'moon'",
        "none.yaml does not exist",
        "run 'my run' is no name",
    ):
        assert output.count(text) == 1, (text, output)
    assert output.count("Which example?") == 2 and output.count("Which site?") == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first.yaml", "leonardo.yaml"]
    assert load_config(tmp_path / "first.yaml").config.run == "first"


def test_only_what_is_not_given_is_asked_and_the_name_has_a_default(tmp_path: Path):
    code, output = converse(tmp_path, "\n", "--example", "qwen3-sft", "--site", "lumi")
    assert code == 0 and "Which" not in output and "Name of the run [mine]" in output
    assert load_config(tmp_path / "mine.yaml").config.run == "mine"


def test_end_of_the_input_writes_nothing(tmp_path: Path):
    code, output = converse(tmp_path, "llama-8b-pretrain\n\x04")
    assert code == 1 and "Aborted" in output and list(tmp_path.iterdir()) == []
