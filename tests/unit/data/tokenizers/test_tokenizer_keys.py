"""Keys of tokenizer_config.json and special_tokens_map.json that would end the tokenizer job are refused in the plan."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from longhaul.artifacts.artifact_schemas import TokenizerManifest
from longhaul.config.reserved_keys import TOKENIZER_CLASSES
from longhaul.data.tokenizers.chat_template import ChatTemplate
from longhaul.data.tokenizers.tokenizer_keys import check_tokenizer_keys
from longhaul.data.tokenizers.tokenizer_size import check_tokenizer_folder
from longhaul.errors import UserError
from longhaul.export.tokenizer_files import write_tokenizer
from tests.support.corpora import make_tokenizer
from tests.support.small_configs import plan_of

CONFIG, SPECIAL = "tokenizer_config.json", "special_tokens_map.json"
OWN_NAME = "is a name that transformers' tokenizer classes use themselves; remove this key"
NAME_OF_PYTHON = "is a name that Python uses itself; remove this key"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "text.txt").write_text("one ship sails two ships sail\n" * 50)
    return Path(make_tokenizer(folder, [folder / "text.txt"]).path)


def with_keys(tokenizer: Path, folder: Path, file: str, keys: dict[str, Any]) -> Path:
    """Return a copy of the tokenizer folder with further keys in one file."""
    shutil.copytree(tokenizer, folder)
    path = folder / file
    found = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**found, **keys}))
    return folder


def build(source: Path, folder: Path) -> TokenizerManifest:
    folder.mkdir()
    return make_tokenizer(folder, path=str(source), needs_chat_template=True)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("_tokenizer", OWN_NAME),
        ("__dict__", NAME_OF_PYTHON),
        ("decode", OWN_NAME),
        ("backend_tokenizer", OWN_NAME),
    ],
)
@pytest.mark.parametrize("file", [CONFIG, SPECIAL])
def test_the_plan_and_the_job_refuse_a_key_that_replaces_an_attribute(
    tokenizer: Path, tmp_path: Path, file: str, key: str, message: str
):
    """`_tokenizer` and `__dict__` ended the job in a traceback; `decode` in a message without the file."""
    bad = with_keys(tokenizer, tmp_path / "tokenizer", file, {key: "x"})
    for read in (
        lambda: check_tokenizer_folder(plan_of(tmp_path, {"tokenizer": {"path": "tokenizer"}})),
        lambda: build(bad, tmp_path / "job"),
    ):
        with pytest.raises(UserError, match=f"{file}: '{key}' {message}") as refused:
            read()
        assert f"correct {file}" in refused.value.hint


@pytest.mark.parametrize("file", [CONFIG, SPECIAL])
def test_a_comment_is_accepted(tokenizer: Path, tmp_path: Path, file: str):
    """Two underscores at the beginning alone make no name of Python."""
    commented = with_keys(tokenizer, tmp_path / "tokenizer", file, {"__comment": "x"})
    check_tokenizer_folder(plan_of(tmp_path, {"tokenizer": {"path": "tokenizer"}}))
    plain = build(tokenizer, tmp_path / "plain")
    assert build(commented, tmp_path / "job").hash == plain.hash


def test_a_corrected_copy_of_a_tokenizer_folder_is_accepted(tokenizer: Path, tmp_path: Path):
    bad = with_keys(tokenizer, tmp_path / "tokenizer", CONFIG, {"decode": "x"})
    copy = Path(shutil.copytree(bad, tmp_path / "copy"))
    keys = json.loads((copy / CONFIG).read_text())
    del keys["decode"]
    (copy / CONFIG).write_text(json.dumps(keys))
    check_tokenizer_folder(plan_of(tmp_path, {"tokenizer": {"path": "copy"}}))


def test_every_other_name_of_the_class_changes_nothing(tokenizer: Path, tmp_path: Path):
    """Such keys have no effect, or are settings: the job makes the same tokenizer, or ends with a message."""
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(tokenizer, local_files_only=True)
    own_names = set(TOKENIZER_CLASSES.split())
    names = {name for name in {*dir(loaded), *vars(loaded)} if not name.startswith("__")}
    assert own_names <= names
    built = 0
    for name in sorted(names - own_names):
        for number, value in enumerate(("x", {})):
            changed = with_keys(tokenizer, tmp_path / f"{name}-{number}", CONFIG, {name: value})
            try:
                made = build(changed, tmp_path / f"job-{name}-{number}")
            except UserError:
                continue
            built += 1
            hub_ids = AutoTokenizer.from_pretrained(made.path, local_files_only=True)("one ship")["input_ids"]
            assert hub_ids == loaded("one ship")["input_ids"], name
    assert built > 50, "most of these names have no effect"


@pytest.mark.parametrize("key", ["model_max_length", "max_len"])
def test_an_infinite_length_is_no_limit(tokenizer: Path, tmp_path: Path, key: str):
    from transformers import AutoTokenizer

    source = with_keys(tokenizer, tmp_path / "tokenizer", CONFIG, {key: math.inf})
    check_tokenizer_folder(plan_of(tmp_path, {"tokenizer": {"path": "tokenizer"}}))
    plain, made = build(tokenizer, tmp_path / "plain"), build(source, tmp_path / "job")
    assert made.hash == plain.hash
    exported = tmp_path / "export"
    exported.mkdir()
    (exported / "config.json").write_text('{"model_type": "llama"}')
    assert write_tokenizer(Path(made.path), exported)["auto_tokenizer_equal"]
    loaded = AutoTokenizer.from_pretrained(exported, local_files_only=True)
    assert loaded("one ship" * 500, truncation=True) == loaded("one ship" * 500)


def test_an_empty_text_is_no_token(tokenizer: Path, tmp_path: Path):
    """Neither text is in the vocabulary: the job ended in a traceback."""
    without_end = with_keys(tokenizer, tmp_path / "a", CONFIG, {"eos_token": ""})
    with pytest.raises(UserError, match="has no EOS token"):
        build(without_end, tmp_path / "job-a")
    made = build(with_keys(tokenizer, tmp_path / "b", CONFIG, {"pad_token": ""}), tmp_path / "job-b")
    assert made.pad_id == made.eos_id


def test_a_token_of_another_form_is_not_for_the_template(tokenizer: Path, tmp_path: Path):
    made = build(with_keys(tokenizer, tmp_path / "a", CONFIG, {"image_token": {"a": 1}}), tmp_path / "job")
    assert set(ChatTemplate.load(Path(made.path)).special_tokens) == {"eos_token", "pad_token"}


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (CONFIG, "[]", "`the whole value` is"),
        (CONFIG, "{", "no valid JSON"),
        (SPECIAL, "null", "`the whole value` is"),
        (CONFIG, '{"model_max_length": "x"}', "`model_max_length` is 'x'"),
        (CONFIG, '{"model_max_length": NaN}', "`model_max_length` is nan"),
        (CONFIG, '{"model_max_length": -Infinity}', "`model_max_length` is -inf"),
        (CONFIG, '{"model_max_length": true}', "`model_max_length` is True"),
        (CONFIG, '{"bos_token": false}', "`bos_token` is False"),
        (CONFIG, '{"chat_template": 1}', "`chat_template` is 1"),
        (CONFIG, '{"chat_template": {"a": 1}}', "`chat_template` is {'a': 1}"),
        (SPECIAL, '{"eos_token": 5}', "`eos_token` is 5"),
    ],
)
def test_a_value_of_another_type_is_refused(tmp_path: Path, file: str, content: str, message: str):
    (tmp_path / file).write_text(content)
    with pytest.raises(UserError, match=f"{file}: {message}"):
        check_tokenizer_keys(tmp_path)


@pytest.mark.parametrize(
    "keys",
    [
        {"model_max_length": 1000000000000000019884624838656, "tokenizer_class": "LlamaTokenizer", "legacy": False},
        {"model_max_length": 1e30, "chat_template": [{"name": "default", "template": "x"}], "pad_token": None},
        {"eos_token": {"__type": "AddedToken", "content": "</s>"}, "added_tokens_decoder": {"0": {"content": "a"}}},
        {
            "name_or_path": "x",
            "special_tokens_map_file": None,
            "is_fast": True,
            "auto_map": {"AutoTokenizer": ["a", "b"]},
        },
    ],
)
def test_keys_of_published_tokenizers_are_accepted(tmp_path: Path, keys: dict[str, Any]):
    (tmp_path / CONFIG).write_text(json.dumps(keys))
    check_tokenizer_keys(tmp_path)
