"""The exported tokenizer gives the run's ids in every release of transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from longhaul.export.tokenizer_files import PLAIN_CLASS, readable_by_older_releases, write_tokenizer


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    """A folder with a tokenizer of all bytes and two further special tokens, as transformers 5 saves it."""
    vocabulary = ["<e>", "<a>", "<b>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(vocabulary)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<e>", extra_special_tokens=["<a>", "<b>"])
    wrapped.save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


@pytest.fixture
def export(tmp_path: Path) -> Path:
    """An export's folder with a config.json alone."""
    folder = tmp_path / "export"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return folder


def test_all_releases_know_the_written_class(tokenizer: Path, export: Path):
    found = write_tokenizer(tokenizer, export)
    written = json.loads((export / "tokenizer_config.json").read_text())
    assert written["tokenizer_class"] == found["class"] == PLAIN_CLASS
    assert found["texts"] > 100 and found["auto_tokenizer_equal"]
    assert "extra_special_tokens" not in written and "backend" not in written
    assert written["additional_special_tokens"] == ["<a>", "<b>"]


def test_special_tokens_stay_special(tokenizer: Path, export: Path):
    write_tokenizer(tokenizer, export)
    loaded = AutoTokenizer.from_pretrained(export)
    assert set(loaded.all_special_tokens) == {"<e>", "<a>", "<b>"}
    assert loaded.decode(loaded("x<a>y")["input_ids"], skip_special_tokens=True) == "xy"


def test_other_ids_of_auto_tokenizer_are_stated(tokenizer: Path, export: Path, capsys: pytest.CaptureFixture[str]):
    """transformers 5 reads every tokenizer of a qwen2 folder as Qwen2's, whose normalization and splitting are fixed."""
    (export / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    found = write_tokenizer(tokenizer, export)
    assert found["class"] == PLAIN_CLASS and not found["auto_tokenizer_equal"]
    assert "AutoTokenizer gives other token ids" in capsys.readouterr().out
    texts = ["e\u0301 12 \uff21"]
    plain, own = (PreTrainedTokenizerFast.from_pretrained(folder) for folder in (export, tokenizer))
    assert (
        plain(texts)["input_ids"]
        == own(texts)["input_ids"]
        != AutoTokenizer.from_pretrained(export)(texts)["input_ids"]
    )


def test_named_special_tokens_stay_a_dict():
    config = {"extra_special_tokens": {"image_token": "<i>"}, "tokenizer_class": "LlamaTokenizer"}
    assert readable_by_older_releases(config) == config
