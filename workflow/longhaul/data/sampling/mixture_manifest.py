"""Writes the manifest of a mixture: its datasets and their weights; no token is copied."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from longhaul.artifacts.artifact_schemas import DataManifest
from longhaul.artifacts.atomic_files import content_hash
from longhaul.config.mixture_proportions import whole_weights
from longhaul.data.shards.build_manifest import sum_splits
from longhaul.jobs.kinds.tokenize_jobs import TokenizeSpec


def run(job: TokenizeSpec) -> None:
    """Write the manifest of a mixture: the manifests of its parts and their weights. No token is copied."""
    parts = {name: DataManifest.read(Path(job.parts[name])) for name in job.dataset.mixture}
    counts = whole_weights(job.dataset.mixture)
    fractions = {name: count / sum(counts.values()) for name, count in counts.items()}
    first = next(iter(parts.values()))
    DataManifest(
        dataset=job.name,
        kind=first.kind,
        path=job.folder,
        hash=content_hash([[count, parts[name].hash] for name, count in counts.items()]),
        tokenizer_hash=first.tokenizer_hash,
        dtype=first.dtype,
        splits={split: sum_splits([part.splits[split] for part in parts.values()], []) for split in first.splits},
        sources=[source for part in parts.values() for source in part.sources],
        skipped={},
        unigram_entropy_nats=sum(fractions[name] * part.unigram_entropy_nats for name, part in parts.items()),
        mixture=[{"weight": counts[name], "manifest": dataclasses.asdict(part)} for name, part in parts.items()],
    ).write(Path(job.out))
