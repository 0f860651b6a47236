"""A dataset as all of its jobs see it: sources by their hashes, how they are cut into units, and which encoder is believed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from longhaul.artifacts.files import content_hash, read_json, write_json
from longhaul.artifacts.schemas import Survey, TokenizerManifest
from longhaul.artifacts.shared_file_system import appears
from longhaul.data.readers.documents import Document, columns_of, documents_of, texts
from longhaul.data.shards.chunks import Source, Unit, cut
from longhaul.data.shards.write_chunk import Task
from longhaul.data.tokenizers.choose_encoder import Choice, choose
from longhaul.data.tokenizers.encoders import Fast, Reference, Rows
from longhaul.errors import UserError
from longhaul.jobs.specs import TokenizeSpec

_LAYOUT_VERSION = 6
_SAMPLED_UNITS, _SAMPLED_CHARACTERS = 16, 20_000


@dataclass(frozen=True)
class Corpus:
    """The sources, and the encoder that proved itself on hard texts and on a sample of them."""

    job: TokenizeSpec
    tokenizer: TokenizerManifest
    sources: tuple[Source, ...]
    chosen: Choice

    @classmethod
    def survey(
        cls,
        job: TokenizeSpec,
        tokenizer: TokenizerManifest,
        sources: tuple[Source, ...],
        hard: Sequence[Rows],
        parts: int,
        each: Callable[..., Iterable[str]],
    ) -> Corpus:
        """Tries the fast encoder as longhaul.data.tokenizers.choose_encoder.choose does."""
        return cls(job, tokenizer, sources, choose(Path(tokenizer.path), hard, _sample(job, sources), parts, each))

    @classmethod
    def surveyed(cls, job: TokenizeSpec, tokenizer: TokenizerManifest, path: Path) -> Corpus:
        """What another job found out. UserError when that was about other sources."""
        found = Survey.read(path)
        listed = [Source(**source) for source in found.sources]
        if found.tokenizer_hash != tokenizer.hash or [source.path for source in listed] != list(job.files):
            raise UserError(f"{path} is of other files, or of another tokenizer", "delete it and run again")
        with ThreadPoolExecutor(job.workers) as pool:
            return cls(job, tokenizer, tuple(pool.map(Source.again, listed)), Choice(**found.encoder))

    def as_survey(self) -> Survey:
        """For the dataset's other jobs."""
        return Survey(self.tokenizer.hash, list(map(dataclasses.asdict, self.sources)), self.chosen._asdict())

    @property
    def root(self) -> Path:
        """Where units are put."""
        return Path(self.job.folder)

    @property
    def threshold(self) -> int:
        """Documents with lower keys are held out, as far as the dataset's share says it."""
        return int(self.job.dataset.validation_fraction * 2**64)

    def choice(self) -> Choice:
        """The encoder to take now: the chosen one, until a unit of these sources finds it out."""
        if appears(self._refuted):
            return Choice(Reference.name, read_json(self._refuted)["reason"])
        return self.chosen

    def refute(self, reason: str) -> None:
        """Tells all jobs of the dataset that the fast encoder's ids are wrong; the first reason stands."""
        if not appears(self._refuted):
            write_json(self._refuted, {"reason": reason})

    @cached_property
    def _refuted(self) -> Path:
        hashes = [source.sha256 for source in self.sources]
        about = [self.settings(Fast.name, self.threshold), version("gigatoken"), hashes]
        return self.root / f"refuted-{content_hash(about)}.json"

    def task(self, encoder: str, threshold: int) -> Task:
        """What its units share."""
        sources = dict(enumerate(self.sources))
        return Task(self.root, self.job.dataset, sources, self.tokenizer, encoder, threshold)

    def units(self, encoder: str, threshold: int) -> list[Unit]:
        """All of them, in the order of the sources."""
        return _cut(self.job, self.sources, self.settings(encoder, threshold))

    def settings(self, encoder: str, threshold: int) -> dict[str, Any]:
        """What a unit's shards depend on beside its sources."""
        dataset = self.job.dataset
        return {
            "version": _LAYOUT_VERSION,
            "kind": dataset.kind,
            "columns": columns_of(dataset),
            "format": dataset.format,
            "bad_rows": dataset.bad_rows,
            "max_document_mb": dataset.max_document_mb,
            "reasoning_in_loss": dataset.reasoning_in_loss,
            "threshold": threshold,
            "tokenizer": self.tokenizer.hash,
            "encoder": encoder,
        }


def _sample(job: TokenizeSpec, sources: Sequence[Source]) -> list[str]:
    """Texts from units spread over the dataset."""
    units = _cut(job, sources, {})
    sample: list[str] = []
    for unit in units[:: max(1, len(units) // _SAMPLED_UNITS)]:
        documents = documents_of(unit.pieces[0].part(sources), job.dataset)
        found = next((document for document in documents if isinstance(document, Document)), None)
        sample += [text[:_SAMPLED_CHARACTERS] for text in texts(found)] if found else []
    return sample


def _cut(job: TokenizeSpec, sources: Sequence[Source], settings: dict[str, Any]) -> list[Unit]:
    return cut(sources, int(job.dataset.chunk_mb * 1e6), settings)
