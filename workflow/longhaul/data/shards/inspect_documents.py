"""Verb `longhaul data inspect`: prints documents of a split, with the tokens in the loss in green."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.text import Text

from longhaul.artifacts.artifact_schemas import DataManifest
from longhaul.artifacts.compare_hashes import dataset_files, read_tokenizer, wrong_files
from longhaul.data.shards.shard_reader import SplitReader
from longhaul.errors import UserError, escape_unprintable, printable

LOSS_STYLE, CONTEXT_STYLE = "green", "dim"


def run(manifest_path: Path, split: str, first: int, count: int, tokenizer_path: Path | None) -> None:
    """Print `count` documents of a split, from document `first`.

    Raises:
        UserError: the split or the document does not exist, another tokenizer encoded the shards, or a file of the split
            was altered.
    """
    manifest = DataManifest.read(manifest_path, "give the path of results/<run>/data/<dataset>.json")
    tokenizer = read_tokenizer(tokenizer_path or manifest_path.parent.parent / "tokenizer.json")
    if tokenizer.hash != manifest.tokenizer_hash:
        raise UserError(
            f"{manifest_path} was encoded with tokenizer {manifest.tokenizer_hash}, not {tokenizer.hash}",
            "pass the path of its tokenizer.json with --tokenizer",
        )
    reader = _open_split(manifest, split)
    if not 0 <= first < reader.document_count:
        raise UserError(
            f"{split} has documents 0 to {reader.document_count - 1}, not {first}", "choose another --first"
        )
    console = Console(soft_wrap=True, highlight=False)
    for number in range(first, min(first + count, reader.document_count)):
        tokens, mask = reader.document(number)
        title = f"{manifest.dataset} {split} {number}: {len(tokens)} tokens, {int(mask.sum())} in the loss"
        console.rule(Text(printable(title)))
        console.print(style_tokens(tokens, mask, Path(tokenizer.path), marked=not console.is_terminal))
    if not console.is_terminal:
        print("[[…]] marks loss tokens", file=sys.stderr)


def style_tokens(tokens: np.ndarray, mask: np.ndarray, tokenizer: Path, marked: bool) -> Text:
    """Return the text of tokens [T], styled by their mask [T]; `marked` also puts [[…]] around loss tokens."""
    from tokenizers import Tokenizer

    decode = Tokenizer.from_file(str(tokenizer / "tokenizer.json")).decode
    text = Text()
    edges = np.flatnonzero(np.diff(mask)) + 1
    for run, in_loss in zip(np.split(tokens, edges), mask[[0, *edges]] == 1, strict=True):
        decoded = escape_unprintable(decode(run.tolist(), skip_special_tokens=False))
        text.append(f"[[{decoded}]]" if marked and in_loss else decoded, style=LOSS_STYLE if in_loss else CONTEXT_STYLE)
    return text


def _open_split(manifest: DataManifest, split: str) -> SplitReader:
    """Open a split after its files have been compared with their SHA-256: altered tokens would be shown as true."""
    if split not in manifest.splits:
        raise UserError(f"{manifest.dataset} has no split {split!r}", f"choose one of {', '.join(manifest.splits)}")
    files = dataset_files(manifest, [split])
    if problem := next(wrong_files(files), None):
        raise UserError(
            f"{manifest.dataset} {split}: {problem}",
            f"delete the folder {manifest.path} and the dataset's manifest; then run again",
        )
    return SplitReader(Path(manifest.path), manifest.splits[split], with_mask=manifest.kind == "chat")
