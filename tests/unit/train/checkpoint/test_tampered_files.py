"""Files that the start of a training reads: a tampered one is refused with its name, or the checkpoint counts as damaged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from longhaul.artifacts.artifact_schemas import Checkpoint, DataManifest, TokenizerManifest
from longhaul.artifacts.atomic_files import write_json
from longhaul.artifacts.paths import JobId, RunPaths, WeightsFolder
from longhaul.artifacts.typed_json import read_typed_json
from longhaul.data.sampling.sample_sources import PackTotals
from longhaul.errors import UserError
from longhaul.jobs.job_kind import job_spec
from longhaul.train.checkpoint.checkpoint_folders import complete_checkpoints, referenced_checkpoints, wrong_sizes
from longhaul.train.checkpoint.checkpoint_manager import CheckpointManager
from longhaul.train.checkpoint.load_checkpoint import TRAINING_STATE, check_belongs_to
from longhaul.train.checkpoint.retention import last_and_best
from longhaul.train.checkpoint.training_state import TrainingState
from longhaul.train.checkpoint.weights_folder import _check_identity
from longhaul.train.checkpoint.weights_identity import check_steps
from longhaul.train.deepspeed_engine import peak_learning_rate
from longhaul.train.monitoring.events import EventWriter
from longhaul.train.monitoring.metrics import _drop_lines_from
from longhaul.train.monitoring.trackers import _run_ids
from tests.support.finished_run_files import STAGE, STEP, write_finished_run
from tests.support.small_configs import plan_of
from tests.support.tampered_files import DAMAGED_BYTES, tampered_texts


@pytest.fixture
def run(tmp_path: Path) -> RunPaths:
    paths = write_finished_run(tmp_path / "results")
    folder = weights_of(paths).checkpoint(STEP)
    write_json(folder / TRAINING_STATE, {"step": STEP, "skipped": [], "recent_losses": [1.0]})
    write_json(weights_of(paths).tracker_runs, {"wandb": "abc"})
    return paths


def weights_of(run: RunPaths) -> WeightsFolder:
    return WeightsFolder(run.stage(STAGE).path / "weights" / "0123")


def read_manifest(run: RunPaths, path: Path) -> None:
    """A bad manifest makes the checkpoint a damaged one; a manifest that is still valid is computed with."""
    weights = weights_of(run).path
    if wrong_sizes(path.parent) is None:
        assert set(last_and_best(weights)) >= {"last"}
        check_belongs_to(weights, path.parent)
    else:
        assert complete_checkpoints(weights) == {}


def read_identity(run: RunPaths, path: Path) -> None:
    job: Any = job_spec(plan_of(run.results / "planned", {"stages.0.gpus_per_node": 1}), JobId("train", ("base",)))
    _check_identity(path.parent, {"spec": {}, "start": None})
    check_steps(job.model_copy(update={"planned_steps": STEP}), path.parent)
    referenced_checkpoints(run.stage(STAGE).path / "weights", run.stage(STAGE).checkpoint)


def read_skipped(_run: RunPaths, path: Path) -> list[int]:
    manager = CheckpointManager(path.parent, SimpleNamespace(asynchronous_saves=False), None, EventWriter(None))  # type: ignore[arg-type]
    state = TrainingState(step=0)
    state.skip(set(manager._recorded_skipped()))
    return state.skipped


def make_ds_config(run: RunPaths) -> Path:
    path = run.stage(STAGE).path / "ds_config.json"
    sections = {"optimizer": {"type": "AdamW", "params": {"lr": 0.001, "eps": 1e-8}}, "zero_optimization": {"stage": 1}}
    write_json(path, {"train_micro_batch_size_per_gpu": 1, **sections})
    return path


READERS: dict[str, tuple[Callable[[RunPaths], Path], Callable[[RunPaths, Path], object]]] = {
    "data manifest": (lambda run: run.manifest("prose"), lambda run, path: DataManifest.read(path)),
    "tokenizer manifest": (lambda run: run.tokenizer, lambda run, path: TokenizerManifest.read(path)),
    "checkpoint.json": (lambda run: run.stage(STAGE).checkpoint, lambda run, path: Checkpoint.read(path)),
    "manifest.json": (lambda run: weights_of(run).checkpoint(STEP) / "manifest.json", read_manifest),
    "state.json": (
        lambda run: weights_of(run).checkpoint(STEP) / TRAINING_STATE,
        lambda run, path: read_typed_json(path, TrainingState).next_batch,
    ),
    "identity.json": (lambda run: weights_of(run).identity, read_identity),
    "skipped batches": (lambda run: weights_of(run).skipped_batches, read_skipped),
    "tracker runs": (lambda run: weights_of(run).tracker_runs, lambda run, path: _run_ids(path.parent)),
    "ds_config.json": (
        make_ds_config,
        lambda run, path: peak_learning_rate(SimpleNamespace(deepspeed=str(path))) > 0,  # type: ignore[arg-type]
    ),
    "packs": (
        lambda run: next(weights_of(run).samples.glob("*.json")),
        lambda run, path: read_typed_json(path, PackTotals),
    ),
}


@pytest.mark.parametrize("name", READERS)
def test_no_tampered_file_ends_in_a_traceback(name: str, run: RunPaths):
    path_of, read = READERS[name]
    path = path_of(run)
    text = path.read_bytes()
    read(run, path)
    outcomes = set()
    for change, tampered in tampered_texts(text):
        path.write_bytes(tampered)
        try:
            read(run, path)
            outcomes.add("read")
        except UserError as error:
            outcomes.add("refused")
            assert error.hint, change
        except Exception as error:
            raise AssertionError(f"{name}: {change}") from error
    assert "refused" in outcomes or name == "manifest.json"


def test_the_remedy_of_damaged_skipped_batches_is_to_write_them_again(run: RunPaths):
    """Without the file, the stage would train on the bad batches."""
    path = weights_of(run).skipped_batches
    for batch in (12, 40):
        EventWriter(weights_of(run).path).write("bad_step", step=4, batch=batch)
    path.write_text("[12, 4")
    with pytest.raises(UserError) as refused:
        read_skipped(run, path)
    assert str(path) in refused.value.message
    hint = "write the skipped batches again, such as [12, 40]; those with the event bad_step in events.jsonl"
    assert refused.value.hint == hint and "delete" not in hint
    events = [json.loads(line) for line in weights_of(run).events.read_text().splitlines()]
    path.write_text(str([event["batch"] for event in events if event["event"] == "bad_step"]))
    assert read_skipped(run, path) == [12, 40]


def test_damaged_ids_of_tracker_runs_are_refused_until_they_are_deleted(run: RunPaths):
    path = weights_of(run).tracker_runs
    path.write_text("{")
    with pytest.raises(UserError, match="remedy: delete it: the trackers begin new runs"):
        _run_ids(path.parent)
    path.unlink()
    assert _run_ids(path.parent) == {}


def test_a_resume_drops_bad_lines_of_the_metrics_and_events(run: RunPaths, capfd: pytest.CaptureFixture[str]):
    weights = weights_of(run)
    good = weights.metrics.read_bytes()
    weights.metrics.write_bytes(good + b"\n".join(DAMAGED_BYTES) + b'\n{"step": "7"}\n{"step": 9, "loss": 1.0}\n')
    lost = _drop_lines_from(weights.metrics, 5)
    assert [row["step"] for row in lost] == [9] and weights.metrics.read_bytes() == good
    assert f"{weights.metrics}, line 3: " in capfd.readouterr().err
    weights.events.write_bytes(weights.events.read_bytes() + b'{"event": "saved", "saving_s": "x", "time_s": 1}\n{"ev')
    events = EventWriter(weights.path)
    assert events.largest("saved", "saving_s") == 0.5
    events.write("training", step=3)
    assert weights.events.read_bytes().splitlines()[-1].endswith(b'"event": "training", "step": 3}')
