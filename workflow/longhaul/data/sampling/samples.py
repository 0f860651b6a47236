"""Training samples by number: a window of the text stream (pretrain) or a pack of whole conversations (sft).

Which samples a batch holds is a function of (seed, batch number, batch size) alone, so there is no state to save beside
the step and the list of skipped batches, and every layout and world size sees the same batches.

Attention inside a pack. Pass `position_ids` and leave `attention_mask` at None: transformers (>= 5) then finds the
documents of a pack where positions restart and masks attention between them (masking_utils.find_packed_sequence_indices;
it needs use_cache=False or training mode, that is no past_key_values). tests/unit/data/test_isolation.py holds this for
Llama, Qwen3 and DeepSeek V3 (multi-head latent attention) with attn_implementation "sdpa" and "eager".
S = sequence length, T = tokens of a document, D = documents.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from itertools import chain, zip_longest
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from longhaul.artifacts.files import read_json, write_json
from longhaul.artifacts.schemas import DataManifest
from longhaul.data.sampling.mixtures import Order
from longhaul.data.sampling.packing import Packs, make_packs
from longhaul.data.sampling.permutation import permutation
from longhaul.data.shards.indexed_dataset import SplitReader
from longhaul.errors import UserError

IGNORED_LABEL = -100
OPENING_TOKENS = 24


class Sample(NamedTuple):
    """One sequence, all arrays [S] int64.

    labels[t] is the token that position t has to predict (already shifted), IGNORED_LABEL where it is not in the loss.
    position_ids restart at 0 with every conversation of a pack, and once more for the padding behind the last.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    position_ids: np.ndarray


class Samples:
    """The samples of one split at one sequence length."""

    def __init__(self, source: _Windows | _Packed, seed: int) -> None:
        self._source = source
        self._seed = seed

    @classmethod
    def open(
        cls,
        manifest: DataManifest,
        split: str,
        kind: Literal["pretrain", "sft"],
        sequence_length: int,
        seed: int,
        cache: Path,
        pad_id: int = 0,
    ) -> Samples:
        """Maps the shards; for sft also the pack file in `cache`, which is made if it is not there.

        One process should open first, the others behind a barrier: the file is written atomically, but every process
        that does not find it makes it. Raises UserError for damaged shards and for a training split without a sample.
        """
        if manifest.mixture:
            parts = [(part["weight"], DataManifest(**part["manifest"])) for part in manifest.mixture]
            held = [(weight, part) for weight, part in parts if part.splits[split]["documents"]]
            opened = [Samples.open(part, split, kind, sequence_length, seed, cache, pad_id) for _, part in held]
            return Mixed(opened, [weight for weight, _ in held])
        reader = SplitReader(Path(manifest.path), manifest.splits[split], with_mask=manifest.kind == "chat")
        if kind == "pretrain":
            source = _Windows(reader, sequence_length, pad_id)
        else:
            _require_chats(manifest)
            name = f"pack-{manifest.hash}-{split}-{sequence_length}-{seed}.bin"
            source = _Packed(reader, sequence_length, pad_id, seed, cache / name)
        if split == "train" and not len(source):
            raise UserError(
                f"dataset {manifest.dataset}: the train split has {reader.token_count} tokens, too few for one sample",
                "add documents",
            )
        return cls(source, seed)

    def __len__(self) -> int:
        """Samples of one epoch."""
        return len(self._source)

    @property
    def length(self) -> int:
        """Tokens of a sequence."""
        return self._source.length

    def __getitem__(self, index: int) -> Sample:
        """Sample `index` in storage order, 0 <= index < len."""
        sample = Sample(*np.empty((3, self.length), dtype=np.int64))
        self.fill(index, sample)
        return sample

    def fill(self, index: int, sample: Sample) -> None:
        """Writes sample `index` over `sample`, whose arrays may be rows of a batch: the only copy made on the way."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} is outside 0..{len(self) - 1}")
        self._source.fill(int(index), sample)

    @property
    def cut_documents(self) -> int:
        """Conversations longer than a sequence, whose ends are never trained on (0 for windows)."""
        return self._source.cut_documents

    @property
    def padding_share(self) -> float:
        """Share of an epoch's positions that hold no token."""
        positions = len(self) * self._source.length
        return 1 - self._source.token_count / positions if positions else 0.0

    def openings(self) -> Iterator[tuple[int, ...]]:
        """How the documents begin, in storage order, as token ids, each shorter than a sequence.

        For windows the first OPENING_TOKENS, or half of a shorter document. For packs what stands before the first token
        of an answer: the question in the chat template, generation prompt included; a conversation without one is left out.
        """
        return self._source.openings()

    def ids(self, batch: int, global_batch_size: int) -> np.ndarray:
        """[global_batch_size] int64: the samples of global batch number `batch` (from 0), in order.

        Batches are cut one after another from an endless row of epochs, each epoch its own permutation of all samples.
        """
        return self.at(batch * global_batch_size + np.arange(global_batch_size, dtype=np.int64))

    def at(self, places: np.ndarray) -> np.ndarray:
        """The samples [N] at places [N] of the endless row of epochs."""
        epochs, indices = np.divmod(places, len(self))
        ids = np.empty(len(places), dtype=np.int64)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            ids[chosen] = permutation(self._seed, int(epoch), indices[chosen], len(self))
        return ids


class Mixed(Samples):
    """Samples of several datasets in fixed proportions (longhaul.data.sampling.mixtures); each goes through its own epochs.

    Of K datasets, sample i is sample i // K of dataset i % K, which begins anew behind its last.
    """

    def __init__(self, parts: Sequence[Samples], weights: Sequence[int]) -> None:
        self._parts, self._order = parts, Order(weights)

    def __len__(self) -> int:
        """As if every dataset had as many samples as the largest."""
        return len(self._parts) * max(map(len, self._parts))

    @property
    def length(self) -> int:
        return self._parts[0].length

    def fill(self, index: int, sample: Sample) -> None:
        part = self._parts[int(index) % len(self._parts)]
        part.fill(int(index) // len(self._parts) % len(part), sample)

    @property
    def cut_documents(self) -> int:
        return sum(part.cut_documents for part in self._parts)

    @property
    def padding_share(self) -> float:
        """Of an epoch of every dataset."""
        return sum(part.padding_share * len(part) for part in self._parts) / sum(map(len, self._parts))

    def openings(self) -> Iterator[tuple[int, ...]]:
        """Those of every dataset in turn."""
        turns = chain.from_iterable(zip_longest(*(part.openings() for part in self._parts)))
        return (opening for opening in turns if opening is not None)

    def ids(self, batch: int, global_batch_size: int) -> np.ndarray:
        chosen, numbers = self._order(batch * global_batch_size + np.arange(global_batch_size, dtype=np.int64))
        ids = np.empty(global_batch_size, dtype=np.int64)
        for number, part in enumerate(self._parts):
            mine = chosen == number
            ids[mine] = part.at(numbers[mine]) * len(self._parts) + number
        return ids


def batch_of_step(step: int, skipped: Sequence[int]) -> int:
    """The global batch of optimizer step `step` (from 0), when the batches `skipped` (sorted) are never trained on."""
    batch = step
    for left_out in skipped:
        if left_out > batch:
            break
        batch += 1
    return batch


def _require_chats(manifest: DataManifest) -> None:
    if manifest.kind != "chat":
        raise UserError(
            f"an sft stage needs chats, dataset {manifest.dataset} is {manifest.kind}", "set its kind to chat"
        )


class _Windows:
    """Sample i reads tokens [i*S, i*S + S + 1) of the stream: every token but the first is a label exactly once."""

    cut_documents = 0

    def __init__(self, reader: SplitReader, length: int, pad_id: int) -> None:
        self._reader, self.length, self._pad_id = reader, length, pad_id
        self.token_count = reader.token_count

    def __len__(self) -> int:
        return max(0, -(-(self.token_count - 1) // self.length))

    def fill(self, index: int, sample: Sample) -> None:
        start = index * self.length
        count = min(self.length, self._reader.token_count - start - 1)
        _blank(sample, self._pad_id)
        self._reader.read(start + 1, sample.labels[:count])
        self._reader.read(start, sample.input_ids[: min(self.length, count + 1)])

    def openings(self) -> Iterator[tuple[int, ...]]:
        for document in range(self._reader.document_count):
            tokens, _ = self._reader.document(document)
            stop = min(OPENING_TOKENS, -(-len(tokens) // 2), self.length - 1)
            if stop:
                yield tuple(tokens[:stop].tolist())


class _Packed:
    """Sample i is pack i; a conversation longer than S is cut at S."""

    def __init__(self, reader: SplitReader, length: int, pad_id: int, seed: int, path: Path) -> None:
        self._reader, self.length, self._pad_id = reader, length, pad_id
        self.token_count = self.cut_documents = 0
        self._packs: Packs | list[np.ndarray] = []
        if not reader.document_count:
            return
        record = path.with_suffix(".json")
        if not (path.exists() and record.exists()):
            _pack(reader.lengths(), length, seed, path, record)
        # The record spares a look at every document's length.
        found = read_json(record)
        self.token_count, self.cut_documents = found["tokens"], found["cut_documents"]
        self._packs = Packs(path, reader.document_count)

    def __len__(self) -> int:
        return len(self._packs)

    def fill(self, index: int, sample: Sample) -> None:
        _blank(sample, self._pad_id)
        start = 0
        for document in self._packs[index]:
            start += self._place(sample, start, *self._reader.document(int(document)))
        sample.position_ids[start:] = np.arange(self.length - start)

    def openings(self) -> Iterator[tuple[int, ...]]:
        for document in range(self._reader.document_count):
            tokens, mask = self._reader.document(document)
            stop = int(mask.argmax()) if mask.any() else 0
            if 0 < stop < self.length:
                yield tuple(tokens[:stop].tolist())

    def _place(self, sample: Sample, start: int, tokens: np.ndarray, mask: np.ndarray) -> int:
        """Writes one conversation [T] at `start`; its last position predicts nothing. Returns the room it took."""
        tokens, mask = tokens[: self.length], mask[: self.length]
        stop = start + len(tokens)
        sample.input_ids[start:stop] = tokens
        sample.labels[start : stop - 1] = np.where(mask[1:] == 1, tokens[1:].astype(np.int64), IGNORED_LABEL)
        sample.position_ids[start:stop] = np.arange(len(tokens))
        return len(tokens)


def _pack(lengths: np.ndarray, length: int, seed: int, path: Path, record: Path) -> None:
    """Writes the pack file, then what it came to: `record`, which the report reads too."""
    make_packs(lengths, length, seed, path)
    packs, tokens = len(Packs(path, len(lengths))), int(np.minimum(lengths, length).sum(dtype=np.int64))
    made = {
        "documents": len(lengths),
        "packs": packs,
        "sequence_length": length,
        "tokens": tokens,
        "cut_documents": int((lengths > length).sum()),
        "padding_share": 1 - tokens / (packs * length),
    }
    write_json(record, made)
    print(
        f"packed {len(lengths):,} conversations into {packs:,} sequences of {length}: "
        f"{made['padding_share']:.2%} padding, {made['cut_documents']:,} cut at the end",
        file=sys.stderr,
        flush=True,
    )


def _blank(sample: Sample, pad_id: int) -> None:
    sample.input_ids[:] = pad_id
    sample.labels[:] = IGNORED_LABEL
    sample.position_ids[:] = np.arange(len(sample.position_ids))
