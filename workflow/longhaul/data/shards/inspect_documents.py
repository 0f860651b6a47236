"""Documents of a shard as a person reads them: what is in the loss in green, what is only context dim."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.text import Text

from longhaul.artifacts.schemas import DataManifest, TokenizerManifest
from longhaul.data.shards.indexed_dataset import SplitReader
from longhaul.errors import UserError

IN_LOSS, CONTEXT = "green", "dim"


def run(manifest_path: Path, split: str, first: int, count: int, tokenizer_path: Path | None) -> None:
    """Prints documents `first` … of a split.

    Raises UserError for a split or document that is not there, and for a tokenizer that did not make these shards.
    """
    manifest = DataManifest.read(manifest_path)
    tokenizer = TokenizerManifest.read(tokenizer_path or manifest_path.parent.parent / "tokenizer.json")
    if tokenizer.hash != manifest.tokenizer_hash:
        raise UserError(
            f"{manifest_path} was made by tokenizer {manifest.tokenizer_hash}, not {tokenizer.hash}",
            "name its tokenizer.json with --tokenizer",
        )
    reader = _reader(manifest, split)
    if not 0 <= first < reader.document_count:
        raise UserError(
            f"{split} has documents 0 to {reader.document_count - 1}, not {first}", "choose another --first"
        )
    console = Console(soft_wrap=True, highlight=False)
    for number in range(first, min(first + count, reader.document_count)):
        tokens, mask = reader.document(number)
        console.rule(f"{manifest.dataset} {split} {number}: {len(tokens)} tokens, {int(mask.sum())} in the loss")
        console.print(coloured(tokens, mask, Path(tokenizer.path), marked=not console.is_terminal))
    if not console.is_terminal:
        print("[[…]] is in the loss", file=sys.stderr)


def coloured(tokens: np.ndarray, mask: np.ndarray, tokenizer: Path, marked: bool) -> Text:
    """The text of tokens [T] by the runs of their mask [T]; `marked` also puts [[…]] around what is in the loss."""
    from tokenizers import Tokenizer

    decode = Tokenizer.from_file(str(tokenizer / "tokenizer.json")).decode
    text = Text()
    edges = np.flatnonzero(np.diff(mask)) + 1
    for run, is_in in zip(np.split(tokens, edges), mask[[0, *edges]] == 1, strict=True):
        written = decode(run.tolist(), skip_special_tokens=False)
        text.append(f"[[{written}]]" if marked and is_in else written, style=IN_LOSS if is_in else CONTEXT)
    return text


def _reader(manifest: DataManifest, split: str) -> SplitReader:
    if split not in manifest.splits:
        raise UserError(f"{manifest.dataset} has no split {split!r}", f"choose one of {', '.join(manifest.splits)}")
    return SplitReader(Path(manifest.path), manifest.splits[split], with_mask=manifest.kind == "chat")
