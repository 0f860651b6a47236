"""Fills one sample of one dataset: a window of the token stream, or a pack; truncates long conversations; writes pack files.

S = sequence length, T = tokens of a document.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from longhaul.artifacts.atomic_files import file_sha256, write_json
from longhaul.artifacts.pack_totals import PackTotals, cut_loss_share, delete_packs_hint, padding_share
from longhaul.artifacts.typed_json import read_typed_json
from longhaul.config.stage_config import Truncate
from longhaul.data.sampling.kept_conversations import count_conversations, kept_tokens, left_out_lines
from longhaul.data.sampling.pack_conversations import PackFile, write_pack_file
from longhaul.data.sampling.sample_format import IGNORED_LABEL, Sample, clear_sample
from longhaul.data.shards.shard_reader import SplitReader
from longhaul.planning.steps_of_epochs import window_count


class WindowSource:
    """Sample i reads tokens [i*S, i*S + S + 1) of the stream: every token but the first is a label exactly once."""

    totals: PackTotals | None = None

    def __init__(self, reader: SplitReader, length: int, pad_id: int) -> None:
        self._reader, self.length, self._pad_id = reader, length, pad_id
        self.token_count = reader.token_count

    def __len__(self) -> int:
        return window_count(self.token_count, self.length)

    def fill(self, index: int, sample: Sample) -> int:
        """Write sample `index` to `sample`; the last window is padded. Return the number of tokens without padding."""
        start = index * self.length
        count = min(self.length, self._reader.token_count - start - 1)
        clear_sample(sample, self._pad_id)
        self._reader.read_into(sample.labels[:count], start + 1)
        tokens = min(self.length, count + 1)
        self._reader.read_into(sample.input_ids[:tokens], start)
        if tokens < self.length:
            sample.position_ids[:] -= self.length + tokens
        return tokens

    def openings(self, tokens: int) -> Iterator[tuple[int, ...]]:
        """Yield the first `tokens` tokens of each document, or half of a shorter document."""
        for number in range(self._reader.document_count):
            document, _ = self._reader.document(number)
            stop = min(tokens, -(-len(document) // 2), self.length - 1)
            if stop:
                yield tuple(document[:stop].tolist())


def pack_file_name(data_hash: str, split: str, length: int, seed: int, truncate: Truncate) -> str:
    """Return the name of the pack file of a split, which depends on everything that its packs depend on."""
    return f"pack-{data_hash}-{split}-{length}-{seed}-{truncate}.bin"


class PackSource:
    """Sample i is pack i. A conversation longer than S is truncated to S tokens, or left out.

    Conversations whose S tokens hold no loss token are in no pack, as nothing would be learned from them.
    """

    def __init__(
        self,
        reader: SplitReader,
        length: int,
        pad_id: int,
        seed: int,
        path: Path,
        truncate: Truncate = "right",
    ) -> None:
        """Open the pack file `path`; write it if it does not exist."""
        self._reader, self.length, self._pad_id = reader, length, pad_id
        self._truncate: Truncate = truncate
        self.token_count = 0
        self.totals: PackTotals | None = None  # None where the split has no documents
        self._packs: PackFile | list[np.ndarray] = []
        if not reader.document_count:
            return
        record = path.with_suffix(".json")
        if not (path.exists() and record.exists()):
            _write_packs(reader, length, seed, path, record, truncate)
        # The totals come from the record, because reading the lengths of all documents is slow.
        totals = read_typed_json(record, PackTotals, delete_packs_hint(path))
        self.totals, self.token_count = totals, totals["tokens"]
        if totals["documents"]:
            self._packs = PackFile(path, totals["documents"])

    def __len__(self) -> int:
        return len(self._packs)

    def fill(self, index: int, sample: Sample) -> int:
        """Write pack `index` to `sample`. Return the number of tokens without padding."""
        clear_sample(sample, self._pad_id)
        start = 0
        for number in self._packs[index]:
            start += self._write_conversation(sample, start, *self._reader.document(int(number)))
        sample.position_ids[start:] = np.arange(start - self.length, 0)
        return start

    def openings(self, _tokens: int) -> Iterator[tuple[int, ...]]:
        """Yield the tokens of each conversation before the first loss token; none where this is 0 or >= S tokens."""
        for number in range(self._reader.document_count):
            tokens, mask = self._reader.document(number)
            stop = int(mask.argmax()) if mask.any() else 0
            if 0 < stop < self.length:
                yield tuple(tokens[:stop].tolist())

    def _write_conversation(self, sample: Sample, start: int, tokens: np.ndarray, mask: np.ndarray) -> int:
        """Write one conversation [T] at position `start`; return its length. Its last position has no label."""
        kept = kept_tokens(len(tokens), self.length, self._truncate)
        tokens, mask = tokens[kept], mask[kept]
        stop = start + len(tokens)
        sample.input_ids[start:stop] = tokens
        sample.labels[start : stop - 1] = np.where(mask[1:] == 1, tokens[1:].astype(np.int64), IGNORED_LABEL)
        sample.position_ids[start:stop] = np.arange(len(tokens))
        return len(tokens)


def _write_packs(reader: SplitReader, length: int, seed: int, path: Path, record: Path, truncate: Truncate) -> None:
    """Write the pack file, then `record`, a JSON file with its totals. The report reads the record too."""
    kept, has_loss, lengths = count_conversations(reader, length, truncate)
    packed = np.flatnonzero(has_loss)
    write_pack_file(lengths[packed], length, seed, path, numbers=packed)
    packs = len(PackFile(path, len(packed))) if len(packed) else 0
    totals: PackTotals = {
        **kept,
        "packs": packs,
        "padding_share": padding_share(kept["tokens"], packs * length),
        "sha256": file_sha256(path),
    }
    write_json(record, totals)
    for line in _describe(totals):
        print(line, file=sys.stderr, flush=True)


def _describe(totals: PackTotals) -> Iterator[str]:
    """Yield lines for the log about a pack file."""
    length = totals["sequence_length"]
    yield (
        f"packed {totals['documents']:,} conversations into {totals['packs']:,} sequences of {length} tokens: "
        f"{totals['padding_share']:.2%} padding, {totals['cut_documents']:,} conversations truncated"
        + (f", which cuts {share:.2%} of the loss tokens" if (share := cut_loss_share([totals])) else "")
    )
    yield from left_out_lines(totals)
