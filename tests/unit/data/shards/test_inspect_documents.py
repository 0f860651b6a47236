"""A shard as a person reads it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from longhaul.artifacts.schemas import DataManifest, TokenizerManifest
from longhaul.cli import main
from longhaul.data.shards.inspect_documents import CONTEXT, IN_LOSS, coloured


def inspect(manifest: DataManifest, folder: Path, tokenizer_folder: Path, *options: str) -> None:
    manifest.write(folder / "data.json")
    main(
        [
            "data",
            "inspect",
            str(folder / "data.json"),
            "--tokenizer",
            str(tokenizer_folder / "tokenizer.json"),
            *options,
        ]
    )


def test_what_the_assistant_says_is_marked(
    chat_shards: DataManifest, tokenizer_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    inspect(chat_shards, tmp_path, tokenizer_folder, "--first", "1", "--count", "2")
    shown = capsys.readouterr().out
    assert shown.count("tokens, ") == 2 and "[[Answer " in shown and "[[Question" not in shown
    assert "<|endoftext|>]]" in shown, "the end of the turn is in the loss"


def test_runs_have_colours(tokenizer_folder: Path):
    folder = Path(TokenizerManifest.read(tokenizer_folder / "tokenizer.json").path)
    text = coloured(np.array([5, 6, 7, 8]), np.array([0, 1, 1, 0], np.uint8), folder, marked=False)
    assert [span.style for span in text.spans] == [CONTEXT, IN_LOSS, CONTEXT]


@pytest.mark.parametrize(
    ("options", "says"),
    [(("--split", "test"), "has no split 'test'"), (("--first", "9999"), "not 9999"), (("--first", "-1"), "not -1")],
)
def test_what_is_not_there_is_said(
    chat_shards: DataManifest,
    tokenizer_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: tuple[str, ...],
    says: str,
):
    with pytest.raises(SystemExit):
        inspect(chat_shards, tmp_path, tokenizer_folder, *options)
    assert says in capsys.readouterr().err


def test_another_tokenizer_is_refused(
    chat_shards: DataManifest, tokenizer_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit):
        inspect(dataclasses.replace(chat_shards, tokenizer_hash="other"), tmp_path, tokenizer_folder)
    assert "was made by tokenizer other" in capsys.readouterr().err
