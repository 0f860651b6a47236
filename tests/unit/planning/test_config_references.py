"""Names in a config that refer to another part of it: each wrong one is refused with what it may be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from longhaul.config.load_config import load_config
from longhaul.errors import UserError
from longhaul.planning.config_references import check_references
from tests.support.small_configs import write_config

MIXED = {"kind": "text", "mixture": {"prose": 1, "verse": 1}}
VERSE = {"datasets.verse": {"kind": "text", "python_stdlib": {}}}
BEST = {"stages.1.from": {"stage": "base", "checkpoint": "best"}}

ALLOWED: dict[str, dict[str, Any]] = {
    "plain": {},
    "mixture": {**VERSE, "datasets.both": MIXED, "stages.0.dataset": "both"},
    "existing tokenizer": {"tokenizer": {"path": "folder"}},
    "data jobs": {"data_jobs": {"prose": 2, "chats": 3}},
    "export of the best checkpoint": {"stages.1.export": "best"},
    "start from the best checkpoint": BEST,
    "last checkpoint without validation": {
        "datasets.prose.validation_fraction": 0.0,
        "stages.0.checkpoints.keep_best": 0,
    },
    "start from the best checkpoint of a stage, the other one keeps none": {
        **BEST,
        "stages.1.checkpoints.keep_best": 0,
    },
}


@pytest.mark.parametrize("changes", ALLOWED.values(), ids=ALLOWED)
def test_references_to_existing_parts_are_allowed(tmp_path: Path, changes: dict[str, Any]):
    check_references(load_config(write_config(tmp_path, changes)).config)


# changes of the config, expected message, expected remedy
REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "unknown dataset of a stage": (
        {"stages.1.dataset": "chat"},
        "stages.chat.dataset: there is no dataset 'chat'",
        "use one of prose, chats",
    ),
    "texts for fine-tuning": (
        {"stages.1.dataset": "prose"},
        "stages.chat: kind sft needs a dataset of kind chat; prose has kind text",
        "use a dataset of kind chat, or change the stage's kind",
    ),
    "chats for pretraining": (
        {"stages.0.dataset": "chats"},
        "stages.base: kind pretrain needs a dataset of kind text; chats has kind chat",
        "use a dataset of kind text, or change the stage's kind",
    ),
    "export of the best checkpoint without validation": (
        {"stages.1.export": "best", "datasets.chats.validation_fraction": 0.0},
        "stages.chat: its best checkpoint is needed, but dataset chats has validation_fraction 0",
        "set a validation_fraction above 0, or use the last checkpoint",
    ),
    "start from the best checkpoint without validation": (
        {**BEST, "datasets.prose.validation_fraction": 0.0},
        "stages.base: its best checkpoint is needed, but dataset prose has validation_fraction 0",
        "set a validation_fraction above 0, or use the last checkpoint",
    ),
    "best checkpoint that is not kept": (
        {**BEST, "stages.0.checkpoints.keep_best": 0},
        "stages.base.checkpoints.keep_best is 0, but the best checkpoint is needed",
        "set keep_best to 1 or more",
    ),
    "unknown dataset of the tokenizer": (
        {**VERSE, "tokenizer.train.datasets": ["prose", "x"]},
        "tokenizer.train.datasets: there is no dataset 'x'",
        "use one of prose, chats, verse",
    ),
    "chats for the tokenizer": (
        {"tokenizer.train.datasets": ["chats"]},
        "tokenizer.train.datasets: chats is of kind chat",
        "use datasets of kind text that are not mixtures",
    ),
    "mixture for the tokenizer": (
        {**VERSE, "datasets.both": MIXED, "tokenizer.train.datasets": ["both"]},
        "tokenizer.train.datasets: both is a mixture",
        "use datasets of kind text that are not mixtures",
    ),
    "dataset with the name of the model": (
        {"datasets.model": {"kind": "text", "python_stdlib": {}}},
        "datasets.model: this name is reserved; the lock file uses it for the model",
        "rename the dataset",
    ),
    "dataset with the name of the tokenizer": (
        {name: {"kind": "text", "python_stdlib": {}} for name in ("datasets.tokenizer", "datasets.alpha")},
        "datasets.tokenizer: this name is reserved; the lock file uses it for the tokenizer",
        "rename the dataset",
    ),
    "unknown dataset of a mixture": (
        {"datasets.both": {"kind": "text", "mixture": {"prose": 1, "x": 1}}},
        "datasets.both.mixture: there is no dataset 'x'",
        "use some of prose, chats, both",
    ),
    "mixture of a mixture": (
        {**VERSE, "datasets.both": MIXED, "datasets.outer": {"kind": "text", "mixture": {"both": 1}}},
        "datasets.outer.mixture: both is a mixture itself",
        "list the datasets of that mixture, with weights multiplied",
    ),
    "mixture of two kinds": (
        {"datasets.both": {"kind": "text", "mixture": {"prose": 1, "chats": 1}}},
        "datasets.both.mixture: chats has kind chat, both has kind text",
        "mix datasets of one kind",
    ),
    "data jobs of an unknown dataset": (
        {"data_jobs": {"prose": 2, "x": 2}},
        "data_jobs: there is no dataset 'x'",
        "use some of prose, chats",
    ),
    "data jobs of a mixture": (
        {**VERSE, "datasets.both": MIXED, "data_jobs": {"both": 2}},
        "data_jobs: both is a mixture, which has no encode jobs",
        "name the datasets of the mixture instead",
    ),
}


@pytest.mark.parametrize(("changes", "message", "remedy"), REFUSED.values(), ids=REFUSED)
def test_reference_to_a_wrong_part_is_refused(tmp_path: Path, changes: dict[str, Any], message: str, remedy: str):
    config = load_config(write_config(tmp_path, changes)).config
    with pytest.raises(UserError) as refused:
        check_references(config)
    assert (refused.value.message, refused.value.hint) == (message, remedy)
