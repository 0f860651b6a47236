"""A finished run of two tiny stages as files: everything that the report, verify and the start of a training read."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from longhaul.artifacts.artifact_schemas import (
    Checkpoint,
    DataManifest,
    EnvironmentReport,
    Export,
    Lock,
    Split,
    TokenizerManifest,
)
from longhaul.artifacts.atomic_files import file_blake3, file_sha256, replace_link, write_json, write_text
from longhaul.artifacts.evaluation_result import EvaluationResult, Score
from longhaul.artifacts.fabric_report import FabricReport, PairResult
from longhaul.artifacts.line_record_fields import START_UP_PHASES, StepProfile
from longhaul.artifacts.nccl_tests_report import NcclTestsResult, NcclTestsTiming
from longhaul.artifacts.paths import RunPaths, WeightsFolder
from longhaul.artifacts.scale_test_report import ScaleTestReport
from longhaul.artifacts.task_data_lock import PinnedDataset, TaskDataLock, dataset_request
from tests.support.checkpoint_manifest import manifest_fields
from tests.support.serve_check_results import SERVED

HUB_DATA = "org/quiz@5d0e1c7ab0f54c3b8d0e6e1d1c4b9a7f3e2d1c0b"
STAGE, DATASET, STEP = "base", "prose", 2
_SHA256 = hashlib.sha256(b"").hexdigest()


def write_finished_run(results: Path) -> RunPaths:
    """Write results/small and return its paths."""
    paths = RunPaths("small", results)
    _write_plan_and_environment(paths)
    _write_fabric_checks(paths)
    _write_data(paths)
    _write_stage(paths)
    _write_export(paths)
    _write_serve_check(paths)
    _write_evaluations(paths)
    return paths


def _write_plan_and_environment(paths: RunPaths) -> None:
    memory = {"weights": 1.0, "total": 1.5}
    row = {"name": STAGE, "kind": "pretrain", "dataset": DATASET, "memory_per_gpu_gib": memory, "steps": STEP}
    row |= {"nodes": 1, "gpus_per_node": 1, "gpu_hours_range": None}
    job = {"kind": "train", "names": [STAGE], "request": {"--nodes": "1"}}
    write_json(paths.plan, {"run": "small", "site": "local", "scheduler": "local", "stages": [row], "jobs": [job]})
    write_text(paths.config, "run: small\n")
    node = {"host": "n1", "gpus": [], "cpus": 2, "memory_bytes": 1, "disk_free_bytes": 1, "clock_skew_s": 0.0}
    EnvironmentReport([], [{**node, "versions": {"torch": "2"}}], []).write(paths.environment)  # type: ignore[typeddict-item]


def _write_fabric_checks(paths: RunPaths) -> None:
    result = {
        "collective": "all_reduce",
        "scope": "all",
        "bytes": 8,
        "median_us": 1.0,
        "p95_us": 2.0,
        "p99_us": 2.5,
        "min_us": 0.75,
        "max_us": 3.25,
        "world_size": 2,
        "rounds": 3,
        "time_us": 1.0,
        "correct": True,
    }
    result |= {"algorithm_bandwidth_gbps": 1.0, "bus_bandwidth_gbps": 1.0}
    pair: PairResult = {"hosts": ["n1", "n2"], "rail": 0, "bandwidth_gbps": 0.7, "latency_us": 90.0}
    limits = {"all_reduce_gbps": 0.5}
    FabricReport(
        [], "gloo", 2, ["n1", "n2", "n3"], [], {}, [pair], accepted=["the link between n1 and n2 is slow"]
    ).write(paths.stage(STAGE).pair_check_report)
    slow: dict[str, Any] = {"accepted": ["n2 is slow"], "warnings": ["slow by its datasheet"]}
    fabric = FabricReport([], "gloo", 2, ["n1", "n2"], [result], limits, [pair], **slow)  # type: ignore[list-item]
    half = NcclTestsTiming(time_us=6.5, algorithm_bandwidth_gbps=1.25, bus_bandwidth_gbps=1.75, wrong=0.0)
    row = NcclTestsResult(collective="all_reduce", bytes=8, world_size=2, out_of_place=half, in_place=None)
    larger = NcclTestsResult(collective="all_reduce", bytes=64, world_size=2, out_of_place=half, in_place=half)
    replace(fabric, nccl_tests=[row, larger]).write(paths.fabric)
    measured = {"step_time_s": 0.5, "step_time_spread": 0.04, "tokens_per_s_per_rank": 100.0, "efficiency": 0.9}
    gpu = {"gpu_utilisation": 0.8, "gpu_memory_share": 0.5, "hosts": ["n1"], "limits": {"min_efficiency": 0.8}}
    ScaleTestReport([], STAGE, 2, 1, 20, **measured, smallest_nodes=1, **gpu).write(paths.scale_test(2))  # type: ignore[arg-type]


def _write_data(paths: RunPaths) -> None:
    streamed = paths.fetched / "streamed-0123.jsonl"
    write_text(streamed, "{}\n")
    Lock({"streamed": {"path": str(streamed.parent), "files": [str(streamed)], "sha256": file_sha256(streamed)}}).write(
        paths.lock
    )
    tokenizer = paths.tokenizers / "t"
    write_text(tokenizer / "tokenizer.json", "{}")
    files = {"tokenizer.json": file_sha256(tokenizer / "tokenizer.json")}
    TokenizerManifest(str(tokenizer), "t", 9, None, 1, 2, True, files, ["prose"]).write(paths.tokenizer)
    shards = paths.shards(DATASET)
    write_text(shards / "a" / "0.bin", "tokens")
    sha256 = {"bin": file_sha256(shards / "a" / "0.bin")}
    split: Split = {
        "shards": [{"prefix": "a/0", "tokens": 3, "documents": 1, "sha256": sha256}],
        "tokens": 3,
        "documents": 1,
        "loss_tokens": 3,
    }
    source = {"path": "prose.jsonl", "bytes": 9, "sha256": _SHA256, "documents": 1}
    splits = {"train": split, "validation": split}
    manifest = DataManifest(DATASET, "text", str(shards), "d", "t", "uint16", splits, [source], {"empty text": 1}, 1.0)  # type: ignore[list-item]
    manifest.write(paths.manifest(DATASET))
    write_text(paths.shards(DATASET).parent / "ignored.txt", "")


def _write_stage(paths: RunPaths) -> None:
    stage = paths.stage(STAGE)
    weights = WeightsFolder(stage.path / "weights" / "0123")
    folder = weights.checkpoint(STEP)
    write_json(stage.job_spec, {"weights_root": str(weights.path.parent)})
    write_text(folder / "mp_rank_00_model_states.pt", "weights")
    entry = {"bytes": 7, "blake3": file_blake3(folder / "mp_rank_00_model_states.pt")}
    layout = {"zero_stage": 1, "parallel": {"tensor": 1}}
    files = {"mp_rank_00_model_states.pt": entry}
    manifest = manifest_fields(files, step=STEP, validation_loss=1.5, weights="0123", **layout)
    write_json(folder / "manifest.json", manifest)
    saved = {"step": STEP, "path": f"checkpoints/{folder.name}", "sha256": file_sha256(folder / "manifest.json")}
    checkpoint = {"last": {**saved, "validation_loss": 1.5}}
    write_text(weights.model_config, "{}")
    configs = {weights.model_config.name: file_sha256(weights.model_config)}
    Checkpoint("small", STAGE, str(weights.path), {"kind": "pretrain"}, checkpoint, STEP, "d", "t", configs).write(  # type: ignore[arg-type]
        stage.checkpoint
    )
    _write_records(stage.history, {"time_s": 1.0, "event": "running", "queued_since_s": 0.5})
    _write_records(stage.history, {"time_s": 9.0, "event": "done"})
    _write_records(weights.events, {"time_s": 2.0, "event": "training", "step": 0})
    _write_records(weights.events, {"time_s": 5.0, "event": "work_lost", "seconds": 1.0, "to_step": 1})
    times = {"training_s": 1.0, "validation_s": 0.5, "saving_s": 0.5}
    _write_records(weights.events, {"time_s": 8.0, "event": "saved", "step": 2, **times})
    start_up = {f"{phase}_s": 0.5 for phase in START_UP_PHASES}
    _write_records(weights.events, {"time_s": 3.0, "event": "start_up", "step": 1, **start_up})
    write_json(weights.profile(0), _profile())
    _write_records(weights.attempts, {"hosts": ["n1"], "job_id": None})
    _write_records(weights.metrics, {"step": 0, "validation_loss": 2.0})
    _write_records(weights.metrics, {"step": 1, "loss": 2.0, "lr": 0.1, "step_time_s": 0.1, "data_wait_s": 0.1})
    write_json(weights.skipped_batches, [3])
    write_json(weights.identity, {"spec": {}, "start": None, "steps": STEP})
    totals = {"documents": 1, "packs": 1, "sequence_length": 4, "tokens": 3, "cut_documents": 0, "padding_share": 0.25}
    packs = weights.samples / "pack-d-train-4-0.bin"
    write_text(packs, "packs")
    write_json(packs.with_suffix(".json"), {**totals, "sha256": file_sha256(packs)})


def _profile() -> StepProfile:
    """Return a profile of two steps of a second each: 0.8 s matrix products, 0.1 s of 0.3 s communication exposed."""
    return {
        "rank": 0,
        "host": "n1",
        "first_step": 20,
        "steps": 2,
        "breakdown": {
            "has_kernels": True,
            "seconds": 2.0,
            "covered_s": {"matrix products": 1.6, "communication": 0.2},
            "idle_s": 0.2,
            "communication_s": 0.6,
            "gaps": [{"seconds": 0.15, "after": "nvjet_a", "before": "ncclDevKernel_AllReduce"}],
            "kernels": [{"name": "nvjet_a", "kind": "matrix products", "calls": 8, "seconds": 1.6}],
        },
    }


def _write_export(paths: RunPaths) -> None:
    folder = paths.exports(STAGE) / f"0123-{STEP}-fp32"
    write_text(folder / "config.json", "{}")
    replace_link(paths.export(STAGE), folder.name)
    verification = {"tensors": {"count": 3, "equal": 3}, "logits": {"bit_equal": True, "bound": 0.0}}
    sample = {"prompt": "a", "split": "train", "completion": "b", "ended_with_eos": True}
    Export(
        stage=STAGE,
        checkpoint="step-2",
        step=STEP,
        path=str(folder),
        dtype="fp32",
        parameters=3,
        bytes=12,
        files={"config.json": file_sha256(folder / "config.json")},
        verification=verification,
        samples=[sample],  # type: ignore[list-item]
        provenance={"run": "small", "checkpoint_sha256": _SHA256, "versions": {"torch": "2"}},  # type: ignore[typeddict-unknown-key]
    ).write(paths.export_manifest(STAGE))


def _write_evaluations(paths: RunPaths) -> None:
    """Write an evaluation of the start model without a chat template, and one of the trained model with it."""
    for model, value, template in (("start", 0.25, None), ("trained", 0.5, "0123456789abcdef")):
        score = Score(
            task="quiz",
            metric="acc",
            filter="none",
            value=value,
            standard_error=0.01,
            higher_is_better=True,
            documents=40,
        )
        result = EvaluationResult(
            STAGE, model, "quiz", "folder", None, [score], {"chat_template_hash": template}, [HUB_DATA]
        )
        result.write(paths.evaluation(STAGE, model, "quiz"))
    lock = paths.task_data(STAGE, "quiz")
    data = lock.with_suffix("") / "0123" / "data.arrow"
    write_text(data, "questions")
    repository, _, commit = HUB_DATA.partition("@")
    request = dataset_request(repository, None, {})
    files = {data.name: file_sha256(data)}
    TaskDataLock([PinnedDataset(request=request, revision=commit, path=str(data.parent), files=files)]).write(lock)


def _write_serve_check(paths: RunPaths) -> None:
    replace(SERVED, stage=STAGE, path=str(paths.export(STAGE))).write(paths.serve_check(STAGE))


def _write_records(path: Path, record: dict[str, object]) -> None:
    with path.open("a") as stream:
        stream.write(json.dumps(record) + "\n")
