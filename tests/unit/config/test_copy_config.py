"""The copy of a config in a run's folder means the same as the config, without the folder that it came from."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import yaml

import longhaul
from longhaul.config.copy_config import _PATHS, copy_config
from longhaul.config.load_config import load_config
from longhaul.planning import Plan
from longhaul.planning.load_plan import load_plan
from tests.support.small_configs import write_config

DATA = """\
  prose:
    kind: text
    files: &own   # a comment
      - data/*.txt
      - >-
        more/b.txt
    decontaminate: {files: ["../quiz.txt"]}  # ünïcode
"""


def write_run(folder: Path) -> Path:
    """Write a config with relative paths in all styles of YAML."""
    path = write_config(folder, {"datasets.prose": "HERE", "storage.weights": "weights", "stages.1": ...})
    path.write_text(path.read_text().replace("  prose: HERE\n", DATA))
    for name, text in (("data/a.txt", "a"), ("more/b.txt", "b"), ("../quiz.txt", "c")):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return path


def results_of(plan: Plan) -> tuple[object, ...]:
    """Return what the weights of each stage depend on, and the files of the data."""
    return {stage.name: stage.spec for stage in plan.stages}, plan.rule_inputs("prose")


def test_copy_gives_the_same_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config, copy = write_run(tmp_path / "mine"), tmp_path / "results" / "small" / "config.yaml"
    copy.parent.mkdir(parents=True)
    copy_config(load_config(config), copy)
    planned, text = load_plan(config), copy.read_text()
    assert results_of(load_plan(copy)) == results_of(planned)
    files = yaml.safe_load(text)["datasets"]["prose"]
    assert files["files"] == [f"{tmp_path}/mine/data/*.txt", f"{tmp_path}/mine/more/b.txt"]
    assert files["decontaminate"]["files"] == [f"{tmp_path}/quiz.txt"]
    assert "&own   # a comment" in text and "# ünïcode" in text and "weights: weights" in text
    copy_config(load_config(copy), copy)
    assert copy.read_text() == text, "a run may use its own copy"
    config.unlink()
    config.with_name("site.yaml").unlink()
    assert results_of(load_plan(copy)) == results_of(planned)


def test_names_of_shipped_files_stay_names(tmp_path: Path) -> None:
    config = write_config(tmp_path, {"site": "local", "stages.0.nodes": 1})
    copy = tmp_path / "results" / "config.yaml"
    copy.parent.mkdir()
    copy.with_name("site.yaml").write_text("of an earlier config")
    copy_config(load_config(config), copy)
    assert copy.read_text() == config.read_text() and not copy.with_name("site.yaml").exists()


def test_anchor_and_tokenizer_path_are_kept(tmp_path: Path) -> None:
    config = write_config(tmp_path / "a", {"tokenizer": {"path": "HERE"}})
    config.write_text(config.read_text().replace("path: HERE", "path: &folder words"))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    copy_config(load_config(config), tmp_path / "b" / "copy.yaml")
    assert f'path: &folder "{tmp_path}/a/words"' in (tmp_path / "b" / "copy.yaml").read_text()


def test_every_key_that_the_package_takes_as_a_path_is_changed_in_the_copy() -> None:
    package = Path(longhaul.__file__).parent
    keys = {key for path in package.rglob("*.py") for key in re.findall(r'\.resolve\("([\w.]+)"', path.read_text())}
    assert "tokenizer.path" in keys and keys <= set(_PATHS)
