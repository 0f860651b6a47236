"""The manifest of a mixture: totals of its parts, and their weights as whole numbers."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from longhaul.artifacts.artifact_schemas import DataManifest, Source
from longhaul.artifacts.atomic_files import content_hash
from longhaul.data.sampling import mixture_manifest
from tests.support.corpora import dataset, tokenize_job


def _source(name: str) -> Source:
    return {"path": name, "bytes": 1, "sha256": "0" * 64, "documents": 1}


def part(folder: Path, name: str, number: int) -> DataManifest:
    """Write a manifest with `number` tokens in one shard to <folder>/<name>.json."""
    shard: Any = {"prefix": name, "tokens": number, "documents": 2 * number, "sha256": {"bin": "0" * 64}}
    split: Any = {"shards": [shard], "tokens": number, "documents": 2 * number, "loss_tokens": 3 * number}
    manifest = DataManifest(
        dataset=name,
        kind="text",
        path=f"data/{name}",
        hash=f"hash of {name}",
        tokenizer_hash="tokens",
        dtype="uint16",
        splits={"train": split, "validation": {**split, "tokens": 10 * number, "loss_tokens": 30 * number}},
        sources=[_source(name)],
        skipped={"empty": 5},
        unigram_entropy_nats=float(number),
    )
    manifest.write(folder / f"{name}.json")
    return manifest


def test_manifest_of_a_mixture_has_totals_and_weights(tmp_path: Path):
    parts = {name: part(tmp_path, name, number) for name, number in (("large", 100), ("small", 4))}
    mixture = dataset(files=(), mixture={"large": 0.75, "small": 0.25})
    job = tokenize_job(tmp_path, tmp_path, [], mixture)
    mixture_manifest.run(job.model_copy(update={"parts": {name: str(tmp_path / f"{name}.json") for name in parts}}))
    assert DataManifest.read(tmp_path / "data.json") == DataManifest(
        dataset="corpus",
        kind="text",
        path=str(tmp_path / "data"),
        hash=content_hash([[3, "hash of large"], [1, "hash of small"]]),
        tokenizer_hash="tokens",
        dtype="uint16",
        splits={
            "train": {"shards": [], "tokens": 104, "documents": 208, "loss_tokens": 312},
            "validation": {"shards": [], "tokens": 1040, "documents": 208, "loss_tokens": 3120},
        },
        sources=[_source("large"), _source("small")],
        skipped={},
        unigram_entropy_nats=0.75 * 100 + 0.25 * 4,
        mixture=[
            {"weight": 3, "manifest": dataclasses.asdict(parts["large"])},
            {"weight": 1, "manifest": dataclasses.asdict(parts["small"])},
        ],
    )
