"""Whoever follows the remedy of a refused config gets a plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from longhaul.data.check_first_rows import check_inputs
from longhaul.errors import UserError
from tests.support.small_configs import CONFIG, SITE, changed, plan_of
from tests.workflow.bad_configs import CONFIGS
from tests.workflow.config_remedies import REMEDIES, Remedy

CASES = {name: (config, site) for name, config, site, _ in CONFIGS}
FOLLOWED = [(name, remedy) for name, remedies in REMEDIES.items() for remedy in remedies]

NEEDS_A_FOLDER = {"missing tokenizer folder", "missing model folder", "home folder of an unknown user"}
"""Their remedies name a folder of Hugging Face; test_bad_configs.py and test_local_examples.py plan with such folders."""


@pytest.mark.parametrize(("name", "remedy"), FOLLOWED, ids=[f"{name}: {remedy.says}" for name, remedy in FOLLOWED])
def test_after_the_remedy_the_run_is_planned(name: str, remedy: Remedy, tmp_path: Path):
    config, site = CASES[name]
    with pytest.raises(UserError) as refused:
        check_inputs(plan_of(tmp_path, config, site))
    assert remedy.says in refused.value.hint
    for path, text in remedy.files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    better_config = changed(changed(CONFIG, config), remedy.config)
    better_site = changed(changed(SITE, site), remedy.site)
    check_inputs(plan_of(tmp_path, better_config, better_site))


def test_every_remedy_of_a_bad_config_is_followed(tmp_path: Path):
    """Messages about the form of a value name the allowed ones themselves, and their remedy is the list of keys."""
    own = {name for name, (config, site) in CASES.items() if "lists all keys" not in hint_of(tmp_path, config, site)}
    assert own - {*REMEDIES} == NEEDS_A_FOLDER
    assert not {*REMEDIES} - {*CASES}


def hint_of(folder: Path, config: dict[str, Any], site: dict[str, Any]) -> str:
    with pytest.raises(UserError) as refused:
        check_inputs(plan_of(folder, config, site))
    return refused.value.hint
