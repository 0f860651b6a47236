"""Writes the source index that several data_jobs share: hashes of the source files, their chunks, the chosen encoder."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path

from longhaul.artifacts.artifact_schemas import IndexedSource, SourceIndex, TokenizerManifest
from longhaul.artifacts.atomic_files import content_hash, write_json
from longhaul.artifacts.shared_file_system import exists_on_server
from longhaul.artifacts.typed_json import read_typed_json
from longhaul.data.readers.read_documents import Document, document_texts, read_range
from longhaul.data.shards.chunks import Chunk, SourceFile, divide_into_chunks
from longhaul.data.shards.write_chunk import EncodingTask
from longhaul.data.tokenizers.choose_encoder import EncoderChoice, choose_encoder
from longhaul.data.tokenizers.control_tokens import reasoning_marks
from longhaul.data.tokenizers.reference_and_fast_encoder import FastEncoder, ReferenceEncoder, read_settings
from longhaul.data.tokenizers.token_rows import TokenRows
from longhaul.errors import UserError
from longhaul.jobs.kinds.tokenize_jobs import TokenizeSpec

_LAYOUT_VERSION = 7
_SAMPLED_CHUNKS, _SAMPLED_CHARACTERS = 16, 20_000


@dataclass(frozen=True)
class IndexedSources:
    """A dataset's hashed sources, and the encoder that was chosen for them."""

    job: TokenizeSpec
    tokenizer: TokenizerManifest
    sources: tuple[SourceFile, ...]
    verified_choice: EncoderChoice

    @classmethod
    def create(
        cls,
        job: TokenizeSpec,
        tokenizer: TokenizerManifest,
        sources: tuple[SourceFile, ...],
        stress_ids: Sequence[TokenRows],
        parts: int,
        map_parts: Callable[..., Iterable[str]],
    ) -> IndexedSources:
        """Choose the encoder for hashed sources; stress_ids, parts and map_parts as in choose_encoder."""
        choice = choose_encoder(Path(tokenizer.path), stress_ids, _sample_texts(job, sources), parts, map_parts)
        return cls(job, tokenizer, sources, choice)

    @classmethod
    def load(cls, job: TokenizeSpec, tokenizer: TokenizerManifest, path: Path) -> IndexedSources:
        """Read the source index of an earlier job; UserError when it is about other sources or another tokenizer."""
        index = SourceIndex.read(path)
        sources = [SourceFile(**source) for source in index.sources]
        if index.tokenizer_hash != tokenizer.hash or [source.path for source in sources] != list(job.files):
            raise UserError(f"{path} belongs to other files or another tokenizer", "delete it and run again")
        with ThreadPoolExecutor(job.workers) as pool:
            refreshed = tuple(pool.map(SourceFile.refreshed, sources))
            return cls(job, tokenizer, refreshed, EncoderChoice(**index.encoder))

    def to_artifact(self) -> SourceIndex:
        """Return the source index for the dataset's other jobs."""
        sources = [IndexedSource(**dataclasses.asdict(source)) for source in self.sources]
        return SourceIndex(self.tokenizer.hash, sources, self.verified_choice._asdict())

    @property
    def root(self) -> Path:
        """The folder of the chunks."""
        return Path(self.job.folder)

    @property
    def threshold(self) -> int:
        """Documents with lower keys are in the validation split, as `validation_fraction` asks."""
        return int(self.job.dataset.validation_fraction * 2**64)

    def current_choice(self) -> EncoderChoice:
        """Return the encoder to use now: the reference once a chunk of these sources has rejected the fast encoder."""
        if exists_on_server(self._rejection_file):
            return EncoderChoice(ReferenceEncoder.name, read_typed_json(self._rejection_file, dict[str, str])["reason"])
        return self.verified_choice

    def reject_fast_encoder(self, reason: str) -> None:
        """Record for all jobs of the dataset that the fast encoder's ids are wrong; the first reason is kept."""
        if not exists_on_server(self._rejection_file):
            write_json(self._rejection_file, {"reason": reason})

    @cached_property
    def _rejection_file(self) -> Path:
        hashes = [source.sha256 for source in self.sources]
        subject = [self.settings(FastEncoder.name, self.threshold), version("gigatoken"), hashes]
        return self.root / f"rejected-encoder-{content_hash(subject)}.json"

    def task(self, encoder: str, threshold: int) -> EncodingTask:
        """Return the settings that all chunks share."""
        sources = dict(enumerate(self.sources))
        return EncodingTask(self.root, self.job.dataset, sources, self.tokenizer, encoder, threshold)

    def chunks(self, encoder: str, threshold: int) -> list[Chunk]:
        """Return all chunks, in the order of the sources."""
        return _divide(self.job, self.sources, self.settings(encoder, threshold))

    def settings(self, encoder: str, threshold: int) -> dict[str, object]:
        """Return everything that a chunk's shards depend on, apart from its sources."""
        dataset = self.job.dataset
        # Earlier releases had the answers of a prompt in the loss. Only shards of such datasets are made again.
        prompts = {"answers_of_prompts": "context"} if dataset.kind == "chat" and dataset.columns.prompt else {}
        # Earlier releases encoded Mistral's [THINK] as plain text. Only shards of tokenizers that have it are made again.
        marks = (
            reasoning_marks(read_settings(Path(self.tokenizer.path)).control_tokens) if dataset.kind == "chat" else ()
        )
        reasoning = {"reasoning_marks": marks} if len(marks) > 1 else {}
        return {
            **prompts,
            **reasoning,
            "version": _LAYOUT_VERSION,
            "kind": dataset.kind,
            "columns": dataset.columns.of_kind(dataset.kind),
            "format": dataset.format,
            "bad_rows": dataset.bad_rows,
            "max_document_mb": dataset.max_document_mb,
            "reasoning_in_loss": dataset.reasoning_in_loss,
            "allow_control_tokens": dataset.allow_control_tokens,
            "threshold": threshold,
            "tokenizer": self.tokenizer.hash,
            "encoder": encoder,
        }


def _sample_texts(job: TokenizeSpec, sources: Sequence[SourceFile]) -> list[str]:
    """Return the texts of the first documents of chunks that are spread over the dataset."""
    chunks = _divide(job, sources, {})
    sample: list[str] = []
    for chunk in chunks[:: max(1, len(chunks) // _SAMPLED_CHUNKS)]:
        documents = read_range(chunk.ranges[0].file_range(sources), job.dataset)
        first = next((document for document in documents if isinstance(document, Document)), None)
        sample += [text[:_SAMPLED_CHARACTERS] for text in document_texts(first)] if first else []
    return sample


def _divide(job: TokenizeSpec, sources: Sequence[SourceFile], settings: dict[str, object]) -> list[Chunk]:
    return divide_into_chunks(sources, int(job.dataset.chunk_mb * 1e6), settings)
