"""Measures how long a training step waits for its data, how long hashing shards takes, and how long opening a manifest takes.

One process on one core reads batches through the trainer's Prefetcher. A pause replaces the computation of a step; it is
as long as the step's tokens take at TOKENS_PER_S. Shards hold random tokens and are in the page cache.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import torch

from bench.machine import describe_machine, write_result
from longhaul.artifacts.artifact_schemas import DataManifest
from longhaul.artifacts.atomic_files import write_json
from longhaul.artifacts.paths import WeightsFolder
from longhaul.data.sampling.sample_sources import pack_file_name
from longhaul.data.sampling.samples import Samples
from longhaul.data.shards.shard_writer import SplitWriter
from longhaul.train.batches import Prefetcher
from longhaul.train.checkpoint.training_state import TrainingState
from longhaul.train.verified_inputs import verify_data

TOKENS_PER_S = 200_000
SEQUENCE_LENGTH, GLOBAL_BATCH, MICRO_BATCH, STEPS = 4096, 16, 4, 40
CHUNKS, CHUNK_DOCUMENTS, MEAN_TOKENS = 40, 2000, 600
BILLION_CHUNKS, BILLION_CHUNK_TOKENS = 64_000, 64_000_000
ALONE: Any = SimpleNamespace(
    rank=SimpleNamespace(rank=0, world_size=1),
    is_main=True,
    gather=lambda value: [value],
    broadcast=lambda value: value,
)
Kind = Literal["pretrain", "sft"]


def main() -> None:
    """Print the waiting time of both kinds of samples, the time to verify their shards, and the time to open them."""
    os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[:1]))
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="bench-read-") as name:
        folder = Path(name)
        manifest = make_shards(folder)
        lines = [
            *describe_machine(("numpy", "torch")),
            f"batches of {GLOBAL_BATCH} x {SEQUENCE_LENGTH} tokens, shuffled, {STEPS} steps, 1 process on 1 core:",
            *(wait_line(manifest, kind, folder) for kind in ("pretrain", "sft")),
            verify_line(manifest, folder),
            *(open_line(kind, folder) for kind in ("pretrain", "sft")),
        ]
    write_result("read", lines)


def make_shards(folder: Path) -> DataManifest:
    """Write chats of about MEAN_TOKENS random tokens in CHUNKS chunks. Pretraining reads them as a stream."""
    generator, shards = np.random.default_rng(0), []
    for chunk in range(CHUNKS):
        (folder / f"{chunk:016x}").mkdir()
        writer = SplitWriter(folder / f"{chunk:016x}", "train", "int32", with_mask=True)
        lengths = 1 + generator.poisson(generator.exponential(MEAN_TOKENS, CHUNK_DOCUMENTS)).astype(np.int32)
        count = int(lengths.sum())
        writer.add(generator.integers(0, 128_000, count), lengths, generator.integers(0, 2, count).astype(np.uint8))
        (shard,) = writer.close()["shards"]
        shards.append({**shard, "prefix": f"{chunk:016x}/{shard['prefix']}"})
    return manifest_of(folder, shards)


def manifest_of(folder: Path, shards: list[dict[str, Any]]) -> DataManifest:
    totals = {key: sum(shard[key] for shard in shards) for key in ("tokens", "documents")}
    splits: Any = {"train": {"shards": shards, **totals, "loss_tokens": totals["tokens"]}}
    return DataManifest("bench", "chat", str(folder), "bench", "none", "int32", splits, [], {}, 0.0)


def wait_line(manifest: DataManifest, kind: Kind, folder: Path) -> str:
    """Run steps that only pause, and report how long they wait; the first step does not count: nothing is prefetched for it."""
    samples = Samples.open(manifest, "train", kind, SEQUENCE_LENGTH, 0, folder)
    step_s = GLOBAL_BATCH * SEQUENCE_LENGTH / TOKENS_PER_S
    waits = []
    for batch in batches(samples):
        waits.append(batch.wait_s)
        time.sleep(step_s)
    wait_s, steps_s = sum(waits[1:]), step_s * (STEPS - 1)
    started = time.thread_time()
    list(batches(samples, is_threaded=False))
    rate = STEPS * GLOBAL_BATCH * SEQUENCE_LENGTH / (time.thread_time() - started)
    return (
        f"  {kind}: at {TOKENS_PER_S:,} tokens/s steps wait {wait_s / (wait_s + steps_s):.3%} of their time for data "
        f"(aim: < 1%); the reader alone makes {rate / 1e6:.1f} M tokens/s of CPU time"
    )


def batches(samples: Samples, is_threaded: bool = True) -> Iterator[Any]:
    """Yield batches like the trainer's, or read them in this thread without prefetching."""
    stage = SimpleNamespace(global_batch_size=GLOBAL_BATCH, micro_batch_size=MICRO_BATCH)
    job = SimpleNamespace(stage=stage, steps=STEPS, accumulation=GLOBAL_BATCH // MICRO_BATCH, data_parallel=1)
    context = SimpleNamespace(dims=SimpleNamespace(sample_rank=0), device=torch.device("cpu"))
    state = TrainingState()
    reader: Any = Prefetcher(samples, job, context, state)  # pyright: ignore[reportArgumentType]
    for batch in reader if is_threaded else map(reader._read, range(STEPS)):
        state.step += 1
        yield batch


def verify_line(manifest: DataManifest, folder: Path) -> str:
    """Measure the comparison of all shards with their hashes in the first attempt of a stage, and what later attempts pay."""
    times_s = []
    for _ in range(2):
        started = time.perf_counter()
        verify_data(SimpleNamespace(data=""), manifest, WeightsFolder(folder / "weights"), ALONE)  # pyright: ignore[reportArgumentType]
        times_s.append(time.perf_counter() - started)
    first_s, later_s = times_s
    tokens, files = manifest.splits["train"]["tokens"], 3 * CHUNKS
    share = first_s / (tokens / TOKENS_PER_S)
    return (
        f"  hashes: the first attempt of a stage compares {tokens / first_s / 1e6:.0f} M tokens/s, {share:.2%} of the "
        f"time of one epoch at {TOKENS_PER_S:,} tokens/s (aim: < 1%); a later one takes {later_s / files * 1e6:.0f} µs per file"
    )


def open_line(kind: Kind, folder: Path) -> str:
    """Measure the time from reading the manifest to the sample numbers of a batch; the pack file is sparse."""
    shard = {
        "tokens": BILLION_CHUNK_TOKENS,
        "documents": 15_625,
        "sha256": {name: "0" * 64 for name in ("bin", "idx", "mask")},
    }
    shards = [{**shard, "prefix": f"{chunk:016x}/train-00000"} for chunk in range(BILLION_CHUNKS)]
    manifest = manifest_of(folder, shards)
    manifest.write(folder / "billion.json")
    documents = manifest.splits["train"]["documents"]
    packs = folder / pack_file_name(manifest.hash, "train", SEQUENCE_LENGTH, 1, "right")
    with packs.open("wb") as stream:
        stream.truncate(8 * documents - 4)
        stream.seek(0, os.SEEK_END)
        stream.write(np.uint32(documents).tobytes())
    tokens = manifest.splits["train"]["tokens"]
    nothing_cut = dict.fromkeys(("cut_documents", "dropped_documents", "documents_without_loss", "cut_loss_tokens"), 0)
    totals = {"documents": documents, "packs": documents - 1, "tokens": tokens, "loss_tokens": tokens, **nothing_cut}
    sizes = {"sequence_length": SEQUENCE_LENGTH, "padding_share": 0.0, "sha256": "0" * 64}
    write_json(packs.with_suffix(".json"), {**totals, **sizes})
    started = time.perf_counter()
    samples = Samples.open(DataManifest.read(folder / "billion.json"), "train", kind, SEQUENCE_LENGTH, 1, folder)
    samples.ids(10**6, GLOBAL_BATCH)
    return (
        f"  {kind}: a manifest of {len(samples):,} samples in {BILLION_CHUNKS:,} chunks opens in "
        f"{time.perf_counter() - started:.2f} s (aim: < 1 s)"
    )


if __name__ == "__main__":
    main()
