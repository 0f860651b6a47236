"""A finished run's artefacts, read into what the page shows."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longhaul.artifacts.files import read_json
from longhaul.artifacts.schemas import (
    Checkpoint,
    DataManifest,
    EnvironmentReport,
    Export,
    FabricReport,
    TokenizerManifest,
)
from longhaul.report.goodput import Goodput, read_goodput
from longhaul.report.metric_series import Metrics, Summary, read_metrics, summarise
from longhaul.report.number_format import duration


@dataclass(frozen=True)
class StageRecord:
    """One trained stage: what was planned, where it ran, how it went."""

    name: str
    kind: str
    checkpoint: Checkpoint
    legs: list[dict[str, Any]]
    metrics: Metrics
    summary: Summary
    skipped_batches: int
    planned_memory_bytes: float | None  # of the fullest rank, on a GPU
    padding_share: float | None  # of an epoch's packs; None where nothing is packed
    unigram_entropy_nats: float | None
    goodput: Goodput | None

    @property
    def hosts(self) -> list[str]:
        return list(dict.fromkeys(host for leg in self.legs for host in leg["hosts"]))


@dataclass(frozen=True)
class Span:
    """A job's last try, in seconds since 1970."""

    job: str
    start_s: float
    end_s: float

    @property
    def duration(self) -> str:
        return duration(self.end_s - self.start_s)


@dataclass(frozen=True)
class RunRecord:
    """All that a run left behind, in the order of its chain."""

    plan: dict[str, Any]
    config: str
    environment: EnvironmentReport
    fabric: FabricReport
    tokenizer: TokenizerManifest
    data: list[DataManifest]
    stages: list[StageRecord]
    exports: list[Export]
    spans: list[Span]


def read_run(folder: Path) -> RunRecord:
    """Reads `results/<run>`; UserError names the artefact that is missing or of another release."""
    plan = read_json(folder / "plan.json")
    datasets = sorted({row["dataset"] for row in plan["stages"]})
    data = [DataManifest.read(folder / "data" / f"{name}.json") for name in datasets]
    exports = [folder / "export" / f"{row['name']}.json" for row in plan["stages"]]
    return RunRecord(
        plan=plan,
        config=(folder / "config.yaml").read_text(encoding="utf-8"),
        environment=EnvironmentReport.read(folder / "environment.json"),
        fabric=FabricReport.read(folder / "fabric.json"),
        tokenizer=TokenizerManifest.read(folder / "tokenizer.json"),
        data=data,
        stages=[_stage(folder, row, {manifest.dataset: manifest for manifest in data}) for row in plan["stages"]],
        exports=[Export.read(path) for path in exports if path.exists()],
        spans=_spans(folder, plan),
    )


def _stage(folder: Path, row: dict[str, Any], data: dict[str, DataManifest]) -> StageRecord:
    checkpoint = Checkpoint.read(folder / "stages" / row["name"] / "checkpoint.json")
    weights = Path(checkpoint.weights)
    metrics, skipped = read_metrics(weights / "metrics.jsonl"), weights / "skipped.json"
    lines = (weights / "attempts.jsonl").read_text(encoding="utf-8").splitlines()
    return StageRecord(
        name=row["name"],
        kind=row["kind"],
        checkpoint=checkpoint,
        legs=[json.loads(line) for line in lines],
        metrics=metrics,
        summary=summarise(metrics),
        skipped_batches=len(read_json(skipped)) if skipped.exists() else 0,
        planned_memory_bytes=row["memory_per_gpu_gib"] and row["memory_per_gpu_gib"]["total"] * 2**30,
        padding_share=_padding_share(weights / "samples"),
        unigram_entropy_nats=data[row["dataset"]].unigram_entropy_nats,
        goodput=read_goodput(folder / "stages" / row["name"], weights),
    )


def _padding_share(folder: Path) -> float | None:
    """From the records of the training packs (longhaul.data.sampling.samples), one for each part of a mixture."""
    packs = [read_json(path) for path in folder.glob("pack-*-train-*.json")]
    positions = sum(pack["packs"] * pack["sequence_length"] for pack in packs)
    return 1 - sum(pack["tokens"] for pack in packs) / positions if positions else None


def _spans(folder: Path, plan: dict[str, Any]) -> list[Span]:
    """From Snakemake's benchmark files: a job's seconds, ending when the file was written."""
    found = []
    for job in plan["requests"]:
        verb, _, name = job.partition("-")
        rule = "train_stage" if verb == "train" else verb
        path = folder / "benchmarks" / (f"{rule}/{name}.tsv" if name else f"{rule}.tsv")
        if seconds := _benchmark_s(path):
            end_s = path.stat().st_mtime
            found.append(Span(job, end_s - seconds, end_s))
    return sorted(found, key=lambda span: span.start_s)


def _benchmark_s(path: Path) -> float | None:
    if not path.exists():
        return None
    with path.open(encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream, delimiter="\t"))
    return float(rows[-1]["s"]) if rows else None
