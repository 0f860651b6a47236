"""Reads training samples by number, of one dataset or a mixture; maps steps to batches without skipped ones; sample_sources.py
fills them.

The samples of a batch are a function of seed, batch number and batch size. The training state therefore needs only the
step and the list of skipped batches, and every parallel layout and world size reads the same batches.

Attention inside a pack: pass `position_ids` and leave `attention_mask` at None. transformers (>= 5) then finds the
documents of a pack where positions restart, and masks attention between them
(masking_utils.find_packed_sequence_indices; this needs use_cache=False or training mode, that is no past_key_values).
tests/unit/data/sampling/test_document_isolation.py verifies this for Llama, Qwen2, Qwen3, Qwen3 MoE and DeepSeek V3
(multi-head latent attention), with attn_implementation "sdpa" and "eager".
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, zip_longest
from pathlib import Path
from typing import Literal

import numpy as np

from longhaul.artifacts.artifact_schemas import DataManifest
from longhaul.artifacts.pack_totals import PackTotals, padding_share
from longhaul.config.stage_config import Truncate
from longhaul.data.sampling.kept_conversations import require_kept_conversations
from longhaul.data.sampling.mixture_order import MixtureOrder
from longhaul.data.sampling.permutation import permutation
from longhaul.data.sampling.sample_format import Sample
from longhaul.data.sampling.sample_sources import PackSource, WindowSource, pack_file_name
from longhaul.data.shards.shard_reader import SplitReader
from longhaul.errors import InputError, UserError


class Samples:
    """The samples of one split at one sequence length."""

    def __init__(self, source: WindowSource | PackSource, seed: int, dataset: str) -> None:
        self._source = source
        self._seed = seed
        self.dataset = dataset

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
        truncate: Truncate = "right",
    ) -> Samples:
        """Map the shards. For sft also map the pack file in the folder `cache`, and write it if it does not exist.

        One process should open first, and the others after a barrier: the file is written atomically, but every process
        that does not find it writes it.

        Raises:
            UserError: shards are damaged, an sft stage has a dataset of texts, a training split has no sample, or no
                conversation of a split has a loss token within the sequence length.
        """
        if manifest.mixture:
            parts = [(part["weight"], _part_of(manifest, part["manifest"])) for part in manifest.mixture]
            used = [(weight, part) for weight, part in parts if part.splits[split]["documents"]]
            opened = [
                Samples.open(part, split, kind, sequence_length, seed, cache, pad_id, truncate) for _, part in used
            ]
            return MixedSamples(opened, [weight for weight, _ in used])
        reader = SplitReader(Path(manifest.path), manifest.splits[split], with_mask=manifest.kind == "chat")
        if kind == "pretrain":
            source = WindowSource(reader, sequence_length, pad_id)
        else:
            _require_chats(manifest)
            path = cache / pack_file_name(manifest.hash, split, sequence_length, seed, truncate)
            source = PackSource(reader, sequence_length, pad_id, seed, path, truncate)
            if source.totals:
                require_kept_conversations(source.totals, truncate, split, f"dataset {manifest.dataset}")
        if split == "train" and not len(source):
            raise InputError(
                f"dataset {manifest.dataset}: the train split has {reader.token_count} tokens, too few for one sample",
                "add documents",
            )
        return cls(source, seed, manifest.dataset)

    def __len__(self) -> int:
        """Return the number of samples of one epoch."""
        return len(self._source)

    @property
    def distinct_count(self) -> int:
        """Return the number of different samples: one epoch of every dataset."""
        return len(self)

    @property
    def length(self) -> int:
        """Tokens of a sequence."""
        return self._source.length

    def __getitem__(self, index: int) -> Sample:
        """Return sample `index` in storage order, 0 <= index < len."""
        sample = Sample(*np.empty((3, self.length), dtype=np.int64))
        self.fill(index, sample)
        return sample

    def fill(self, index: int, sample: Sample) -> int:
        """Write sample `index` to `sample`, whose arrays may be rows of a batch: this avoids a second copy.

        Return the number of tokens without padding.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} is outside 0..{len(self) - 1}")
        return self._source.fill(int(index), sample)

    @property
    def pack_totals(self) -> list[PackTotals]:
        """Totals of the packs of every dataset; windows have none."""
        return [self._source.totals] if self._source.totals else []

    @property
    def padding_share(self) -> float:
        """Fraction of an epoch's positions that hold no token."""
        return padding_share(self._source.token_count, len(self) * self._source.length)

    def epochs(self, count: int) -> dict[str, float]:
        """Return by dataset how many of its epochs the first `count` samples are."""
        return {self.dataset: count / len(self)}

    def openings(self, tokens: int) -> Iterator[tuple[int, ...]]:
        """Yield the first token ids of each document, in storage order; each opening is shorter than a sequence.

        For windows these are at most `tokens` tokens. For packs they end before the first token of an answer: the question in
        the chat template, generation prompt included. A conversation without a question is left out.
        """
        return self._source.openings(tokens)

    def ids(self, batch: int, global_batch_size: int) -> np.ndarray:
        """Return [global_batch_size] int64: the samples of global batch number `batch` (from 0), in order.

        Batches are consecutive parts of an endless sequence of epochs; each epoch is a permutation of all samples.
        """
        return self.at(batch * global_batch_size + np.arange(global_batch_size, dtype=np.int64))

    def at(self, positions: np.ndarray) -> np.ndarray:
        """Return the samples [N] at positions [N] of the endless sequence of epochs."""
        epochs, indices = np.divmod(positions, len(self))
        ids = np.empty(len(positions), dtype=np.int64)
        for epoch in np.unique(epochs):
            in_epoch = epochs == epoch
            ids[in_epoch] = permutation(self._seed, int(epoch), indices[in_epoch], len(self))
        return ids


class MixedSamples(Samples):
    """Samples of several datasets in fixed proportions (longhaul.data.sampling.mixture_order).

    Each dataset has epochs of its own. With K datasets, sample i is sample i // K of dataset i % K, modulo the number of
    its samples.
    """

    def __init__(self, parts: Sequence[Samples], weights: Sequence[int]) -> None:
        self._parts, self._order = parts, MixtureOrder(weights)

    def __len__(self) -> int:
        """Return the number of samples, as if every dataset had as many samples as the largest."""
        return len(self._parts) * max(map(len, self._parts))

    @property
    def distinct_count(self) -> int:
        return sum(map(len, self._parts))

    @property
    def length(self) -> int:
        return self._parts[0].length

    def fill(self, index: int, sample: Sample) -> int:
        part = self._parts[int(index) % len(self._parts)]
        return part.fill(int(index) // len(self._parts) % len(part), sample)

    @property
    def pack_totals(self) -> list[PackTotals]:
        return [totals for part in self._parts for totals in part.pack_totals]

    @property
    def padding_share(self) -> float:
        """Fraction of the positions without a token, in one epoch of every dataset."""
        return sum(part.padding_share * len(part) for part in self._parts) / self.distinct_count

    def epochs(self, count: int) -> dict[str, float]:
        pairs = zip(self._parts, self._order.drawn(count), strict=True)
        return {part.dataset: drawn / len(part) for part, drawn in pairs}

    def openings(self, tokens: int) -> Iterator[tuple[int, ...]]:
        """Yield the openings of the datasets alternately."""
        alternating = chain.from_iterable(zip_longest(*(part.openings(tokens) for part in self._parts)))
        return (opening for opening in alternating if opening is not None)

    def ids(self, batch: int, global_batch_size: int) -> np.ndarray:
        datasets, numbers = self._order(batch * global_batch_size + np.arange(global_batch_size, dtype=np.int64))
        ids = np.empty(global_batch_size, dtype=np.int64)
        for dataset, part in enumerate(self._parts):
            is_dataset = datasets == dataset
            ids[is_dataset] = part.at(numbers[is_dataset]) * len(self._parts) + dataset
        return ids


def batch_of_step(step: int, skipped: Sequence[int]) -> int:
    """Return the global batch of optimizer step `step` (from 0), without the batches `skipped` (sorted)."""
    batch = step
    for skipped_batch in skipped:
        if skipped_batch > batch:
            break
        batch += 1
    return batch


def _part_of(mixture: DataManifest, fields: dict[str, object]) -> DataManifest:
    try:
        return DataManifest.from_fields(fields)
    except ValueError as error:
        raise UserError(
            f"the manifest of the mixture {mixture.dataset} lists an invalid dataset: {error}",
            "delete the mixture's manifest; the next run writes it again",
        ) from None


def _require_chats(manifest: DataManifest) -> None:
    if manifest.kind != "chat":
        raise InputError(
            f"an sft stage needs a dataset of chats, but dataset {manifest.dataset} is {manifest.kind}",
            "use a dataset of kind chat",
        )
