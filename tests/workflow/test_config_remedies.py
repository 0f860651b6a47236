"""Whoever follows the remedy of a refused config gets a plan."""

from __future__ import annotations

from pathlib import Path

import pytest

from longhaul.data.check_first_rows import check_inputs
from longhaul.errors import UserError
from tests.support.remedies_in_source import record_places, remedies_in_source
from tests.support.small_configs import CONFIG, SITE, changed, plan_of
from tests.unit.test_every_remedy_is_followed import FOLLOWED_ELSEWHERE, NOT_FOLLOWED, REMEDIES_OF_PLANS
from tests.workflow.bad_configs import CONFIGS, FILES, write_files
from tests.workflow.config_remedies import REMEDIES, Remedy

CASES = {name: (config, site) for name, config, site, _ in CONFIGS}
FOLLOWED = [(name, remedy) for name, remedies in REMEDIES.items() for remedy in remedies]

NEEDS_A_FOLDER = {"missing tokenizer folder", "missing model folder", "home folder of an unknown user"}
"""Their remedies name a folder of Hugging Face; test_bad_configs.py and test_local_examples.py plan with such folders."""


@pytest.mark.parametrize(("name", "remedy"), FOLLOWED, ids=[f"{name}: {remedy.says}" for name, remedy in FOLLOWED])
def test_after_the_remedy_the_run_is_planned(
    name: str, remedy: Remedy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)  # data of evaluation tasks are relative to it
    assert remedy.says in hint_of(tmp_path, name)
    write_files(tmp_path, remedy.files)
    config, site = CASES[name]
    better_config = changed(changed(CONFIG, config), remedy.config)
    better_site = changed(changed(SITE, site), remedy.site)
    check_inputs(plan_of(tmp_path, better_config, better_site))


def test_every_remedy_of_a_bad_config_is_followed(tmp_path: Path):
    """Messages about the form of a value name the allowed ones themselves, and their remedy is the list of keys."""
    own = {name for name in CASES if "lists all keys" not in hint_of(tmp_path / "run", name)}
    assert own - {*REMEDIES} == NEEDS_A_FOLDER
    assert not {*REMEDIES} - {*CASES}


def test_every_remedy_of_a_plan_is_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    places = record_places(monkeypatch)
    for name in REMEDIES:
        hint_of(tmp_path / "run", name)
    elsewhere = (*FOLLOWED_ELSEWHERE, *NOT_FOLLOWED)
    assert [
        str(remedy)
        for remedy in remedies_in_source()
        if remedy.module.startswith(REMEDIES_OF_PLANS)
        and not remedy.is_at(places)
        and not any(part in str(remedy) for part in elsewhere)
    ] == []


def hint_of(folder: Path, name: str) -> str:
    """Return the remedy of a mistake of bad_configs.py, planned in this folder."""
    config, site = CASES[name]
    with pytest.raises(UserError) as refused:
        write_files(folder, FILES.get(name, {}))
        check_inputs(plan_of(folder, config, site))
    return refused.value.hint
