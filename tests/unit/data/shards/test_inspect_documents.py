"""`longhaul data inspect` prints documents of a shard as text."""

from __future__ import annotations

import copy
import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from longhaul.artifacts.artifact_schemas import DataManifest, TokenizerManifest
from longhaul.cli import main
from longhaul.data.shards.inspect_documents import CONTEXT_STYLE, LOSS_STYLE, style_tokens
from tests.support.corpora import dataset, make_shards, write_jsonl


def inspect(manifest: DataManifest, folder: Path, tokenizer_folder: Path, *options: str) -> object:
    """Run the verb on a manifest; return its exit code."""
    manifest.write(folder / "data.json")
    tokenizer = str(tokenizer_folder / "tokenizer.json")
    with pytest.raises(SystemExit) as exit_:
        main(["data", "inspect", str(folder / "data.json"), "--tokenizer", tokenizer, *options])
    return exit_.value.code


def test_loss_tokens_are_marked(
    chat_shards: DataManifest, tokenizer_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert inspect(chat_shards, tmp_path, tokenizer_folder, "--first", "1", "--count", "2") == 0
    shown = capsys.readouterr().out
    assert shown.count("tokens, ") == 2 and "[[Answer " in shown and "[[Question" not in shown
    assert "<|endoftext|>]]" in shown, "the end of the turn is a loss token"


def test_tokens_are_styled_by_their_mask(tokenizer_folder: Path):
    folder = Path(TokenizerManifest.read(tokenizer_folder / "tokenizer.json").path)
    text = style_tokens(np.array([5, 6, 7, 8]), np.array([0, 1, 1, 0], np.uint8), folder, marked=False)
    assert [span.style for span in text.spans] == [CONTEXT_STYLE, LOSS_STYLE, CONTEXT_STYLE]


@pytest.mark.parametrize(
    ("options", "expected"),
    [(("--split", "test"), "has no split 'test'"), (("--first", "9999"), "not 9999"), (("--first", "-1"), "not -1")],
)
def test_a_missing_split_or_document_is_reported_until_another_is_chosen(
    chat_shards: DataManifest,
    tokenizer_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: tuple[str, ...],
    expected: str,
):
    assert inspect(chat_shards, tmp_path, tokenizer_folder, *options) == 2
    assert expected in capsys.readouterr().err
    assert inspect(chat_shards, tmp_path, tokenizer_folder, "--split", "validation", "--first", "0") == 0


@pytest.mark.parametrize("text", ["run: mine\n", "{}", '{"artifact": "Lock", "schema_version": 1}'])
def test_a_file_that_is_no_manifest_is_refused_until_the_manifest_is_named(
    chat_shards: DataManifest, tokenizer_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(SystemExit):
        main(["data", "inspect", str(tmp_path / "mine.yaml")])
    shown = capsys.readouterr().err
    assert "remedy: give the path of results/<run>/data/<dataset>.json" in shown and "delete" not in shown, (
        "it is the user's"
    )
    assert inspect(chat_shards, tmp_path, tokenizer_folder) == 0


def test_text_is_shown_as_escapes_where_the_locale_is_ascii(tokenizer_folder: Path, tmp_path: Path):
    """Some login nodes set LC_ALL=C. Python then opens stdout as ASCII, unless it may choose UTF-8 itself."""
    corpus = write_jsonl(tmp_path / "corpus.jsonl", "text", ["Gr\u00fc\u00dfe aus \u5317\u4eac"] * 20)
    manifest = make_shards(tmp_path, tokenizer_folder, [corpus], dataset())
    manifest.write(tmp_path / "data.json")
    words = ["data", "inspect", str(tmp_path / "data.json"), "--tokenizer", str(tokenizer_folder / "tokenizer.json")]
    ascii_only = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    ascii_only.pop("PYTHONIOENCODING", None)
    done = subprocess.run([sys.executable, "-m", "longhaul", *words], env=ascii_only, capture_output=True, check=False)
    assert done.returncode == 0 and b"Traceback" not in done.stderr, done.stderr
    assert b"Gr\\xfc\\xdfe aus \\u5317\\u4eac" in done.stdout, done.stdout


def test_codes_of_a_terminal_in_a_text_are_shown_as_escapes(tokenizer_folder: Path):
    folder = Path(TokenizerManifest.read(tokenizer_folder / "tokenizer.json").path)
    ids = np.array(Tokenizer.from_file(str(folder / "tokenizer.json")).encode("a\x1b[31m").ids)
    assert style_tokens(ids, np.ones(len(ids), np.uint8), folder, marked=False).plain == "a\\x1b[31m"


def test_another_tokenizer_is_refused_until_its_own_is_passed(
    chat_shards: DataManifest, tokenizer_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert inspect(dataclasses.replace(chat_shards, tokenizer_hash="other"), tmp_path, tokenizer_folder) == 2
    assert "was encoded with tokenizer other" in capsys.readouterr().err
    assert inspect(chat_shards, tmp_path, tokenizer_folder) == 0


def test_altered_tokens_are_refused(tokenizer_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    corpus = write_jsonl(tmp_path / "corpus.jsonl", "text", ["Some text of a document"] * 20)
    manifest = make_shards(tmp_path, tokenizer_folder, [corpus], dataset())
    (shard, *_) = manifest.splits["train"]["shards"]
    path = Path(manifest.path) / f"{shard['prefix']}.bin"
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(data)
    assert inspect(manifest, tmp_path, tokenizer_folder) == 2
    shown = capsys.readouterr()
    assert f"{path} does not have the hash that was recorded" in shown.err and not shown.out
    assert "remedy: delete the folder" in shown.err


@pytest.mark.parametrize("stated", [10**6, 10**30])
def test_a_wrong_number_of_documents_is_refused(
    chat_shards: DataManifest, tokenizer_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], stated: int
):
    splits: Any = copy.deepcopy(chat_shards.splits)
    splits["train"]["shards"][0]["documents"] = stated
    altered = dataclasses.replace(chat_shards, splits=splits)
    assert inspect(altered, tmp_path, tokenizer_folder) == 2
    assert ("the manifest states 1000000" if stated == 10**6 else "documents") in capsys.readouterr().err
