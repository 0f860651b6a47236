"""Runs one of the tools that bench/data.py compares: python data_peers.py <datasets|datatrove|raw> <folder with the corpus>."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from typing import Any, BinaryIO

EOS_ID, BLOCK = 1, 4096
BATCH_BYTES = 8_000_000


def datasets_map(corpus: Path, tokenizer: Path, out: Path) -> None:
    """Follow the recipe of transformers' run_clm.py: tokenize, group into blocks, save as Parquet; 2 processes."""
    from datasets import load_dataset
    from transformers import PreTrainedTokenizerFast

    encode = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer))
    encode.model_max_length = 10**9

    def tokenize(rows: dict[str, Any]) -> dict[str, Any]:
        ids = encode(rows["text"], add_special_tokens=False, return_attention_mask=False)["input_ids"]
        return {"input_ids": [[*row, EOS_ID] for row in ids]}

    def group(rows: dict[str, Any]) -> dict[str, Any]:
        stream = list(chain(*rows["input_ids"]))
        blocks = [stream[start : start + BLOCK] for start in range(0, len(stream) // BLOCK * BLOCK, BLOCK)]
        return {"input_ids": blocks, "labels": [block[:] for block in blocks]}

    data = load_dataset("json", data_files=str(corpus), split="train", cache_dir=str(out / "cache"))
    data = data.map(tokenize, batched=True, num_proc=2, remove_columns=data.column_names)
    data.map(group, batched=True, num_proc=2).to_parquet(str(out / "tokens.parquet"))


def datatrove(corpus: Path, tokenizer: Path, out: Path) -> None:
    """Run datatrove's DocumentTokenizer on two halves of the corpus, 2 tasks on 2 workers."""
    from datatrove.executor import LocalPipelineExecutor  # pyright: ignore[reportMissingImports]
    from datatrove.pipeline.readers import JsonlReader  # pyright: ignore[reportMissingImports]
    from datatrove.pipeline.tokens import DocumentTokenizer  # pyright: ignore[reportMissingImports]

    reader = JsonlReader(str(corpus.parent / "halves"), text_key="text")
    writer = DocumentTokenizer(
        output_folder=str(out / "tokens"),
        tokenizer_name_or_path=str(tokenizer),
        eos_token="<｜end▁of▁sentence｜>",
        shuffle_documents=False,
    )
    LocalPipelineExecutor(pipeline=[reader, writer], tasks=2, workers=2, logging_dir=str(out / "logs")).run()


def raw(corpus: Path, tokenizer: Path, out: Path) -> None:
    """Measure the limit: read lines, parse, encode, write ids and lengths; no comparison, hash or mask; 2 processes."""
    halves = sorted((corpus.parent / "halves").iterdir())
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        list(pool.map(_encode_half, halves, [tokenizer] * 2, [out / half.stem for half in halves]))


def _encode_half(path: Path, tokenizer: Path, out: Path) -> None:
    import gigatoken
    import orjson

    encode = gigatoken.Tokenizer.from_json(tokenizer.read_bytes())
    with (
        path.open("rb") as lines,
        out.with_suffix(".bin").open("wb") as ids,
        out.with_suffix(".len").open("wb") as lengths,
    ):
        batch, size = [], 0
        for line in lines:
            batch.append(orjson.loads(line)["text"].encode())
            size += len(line)
            if size > BATCH_BYTES:
                _write_batch(encode, batch, ids, lengths)
                batch, size = [], 0
        _write_batch(encode, batch, ids, lengths)


def _write_batch(encode: Any, batch: list[bytes], ids: BinaryIO, lengths: BinaryIO) -> None:
    import numpy as np

    layout = encode.encode_batch(batch, parallel=False).layout
    offsets = np.asarray(layout.offsets.data)
    tokens = np.insert(np.asarray(layout.content.data), offsets[1:] - offsets[0], EOS_ID)
    ids.write(tokens.astype(np.int32).data)
    lengths.write((np.diff(offsets) + 1).astype(np.int32).data)


PEERS = {"datasets": datasets_map, "datatrove": datatrove, "raw": raw}


def main(arguments: Sequence[str]) -> None:
    """Run one tool with an empty output folder."""
    name, folder = arguments[0], Path(arguments[1])
    out = folder / f"out-{name}"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    PEERS[name](folder / "corpus.jsonl", folder / "tokenizer" / "tokenizer.json", out)


if __name__ == "__main__":
    main(sys.argv[1:])
