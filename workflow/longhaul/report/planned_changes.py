"""Says what a config will do to stages that have trained already: which are kept, which continue, which train again and why."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired, cast

from typing_extensions import TypedDict

from longhaul.artifacts.artifact_schemas import Checkpoint, DataManifest, Export, TokenizerManifest
from longhaul.artifacts.paths import STAGE_KIND, JobId, WeightsFolder
from longhaul.artifacts.typed_json import read_typed_json
from longhaul.errors import InputError, UserError, printable
from longhaul.jobs.job_kind import job_kinds, job_spec
from longhaul.jobs.kinds.train_job import TrainSpec
from longhaul.planning import Plan, StagePlan
from longhaul.planning.steps_of_epochs import estimate_steps
from longhaul.report import number_format as text
from longhaul.report.plan_json import stage_hours
from longhaul.report.stage_records import last_trained
from longhaul.train.checkpoint.checkpoint_folders import complete_checkpoints
from longhaul.train.checkpoint.weights_identity import (
    check_steps,
    find_starting_checkpoint,
    weights_folder,
    weights_identity,
)

TRAINS, CONTINUES, AGAIN, KEPT = "trains", "continues", "trains again", "is kept"
UNREADABLE = "cannot be compared"
_LISTED_DIFFERENCES = 6


@dataclass(frozen=True)
class StageChange:
    """The next run's action on one stage.

    action:    TRAINS (for the first time), CONTINUES, AGAIN, KEPT, or UNREADABLE: a record is damaged or of another release
    reasons:   why the present weights do not fit the config, or which record cannot be read
    done:      steps that are trained already
    gpu_hours: estimate for the steps that are left; None where the plan has none
    present:   the weights folder that the stage has now; None before its first attempt
    planned:   the weights folder that the next run uses; None where its name is not known before the jobs have run
    export:    what happens to the stage's export, as a sentence
    """

    stage: str
    action: str
    reasons: tuple[str, ...]
    done: int
    steps: int | None
    gpu_hours: tuple[float, float] | None
    present: Path | None
    planned: Path | None
    export: str


class _Identity(TypedDict):
    """identity.json of a weights folder: what its name is a hash of, and the planned steps."""

    spec: dict[str, Any]
    data: str
    tokenizer: str
    pretrained: str | None
    start: str | None
    steps: NotRequired[int]
    epochs: NotRequired[float]


def stage_changes(plan: Plan) -> list[StageChange]:
    """Compare the plan with the results that the working folder holds. Stages are in the plan's order.

    Raises:
        InputError: the weights of a stage cannot continue under the planned number of steps.
    """
    found: dict[str, StageChange] = {}
    for stage in plan.stages:
        try:
            found[stage.name] = _stage_change(plan, stage, found)
        except InputError:
            raise
        except (UserError, OSError, ValueError) as error:  # the jobs that write or read the record decide
            reasons = (error.message if isinstance(error, UserError) else str(error),)
            found[stage.name] = StageChange(stage.name, UNREADABLE, reasons, 0, stage.steps, None, None, None, "")
    return list(found.values())


def removed_stages(plan: Plan) -> dict[str, Path]:
    """Return stage -> its present weights folder, of trained stages that the config has no more, as after a rename."""
    known = {stage.name for stage in plan.stages}
    folders = sorted(plan.paths.stage("any").path.parent.glob("*/"))
    found = {path.name: last_trained(plan.paths.stage(path.name).weights) for path in folders if path.name not in known}
    return {stage: weights.path for stage, weights in found.items() if weights}


def change_lines(
    changes: list[StageChange], new_title: str = "", removed: Mapping[str, Path] | None = None
) -> list[str]:
    """Return a line per stage, below a title. Where no stage has weights yet, the title is `new_title`; without it, no line."""
    is_new = not removed and all(change.present is None and change.action != UNREADABLE for change in changes)
    title = new_title if is_new else "Compared with the results of this run:"
    lines = [
        *map(_line, changes),
        *(
            f"stage {stage} is not in the config. Its weights {path.name} stay"
            for stage, path in (removed or {}).items()
        ),
    ]
    return [title, *(printable(f"  {line}") for line in lines)] if changes and title else []


def _line(change: StageChange) -> str:
    hours = f", about {text.estimate(change.gpu_hours)} GPU-hours" if change.gpu_hours else ""
    what = {
        TRAINS: f"trains for the first time{hours}",
        CONTINUES: f"continues at step {change.done:,} of {text.exact(change.steps)}{hours}",
        AGAIN: f"trains again{hours}: {'; '.join(change.reasons)}",
        KEPT: f"is kept: {text.exact(change.steps)} steps are trained",
        UNREADABLE: f"cannot be compared: {'; '.join(change.reasons)}",
    }[change.action]
    stays = f". Its weights {change.present.name} stay" if change.present and change.action == AGAIN else ""
    return f"stage {change.stage} {what}{stays}" + (f". {change.export}" if change.export else "")


def _stage_change(plan: Plan, stage: StagePlan, earlier: dict[str, StageChange]) -> StageChange:
    job = cast(TrainSpec, job_spec(plan, JobId(STAGE_KIND, (stage.name,))))
    present = _present_weights(job)
    made_again = list(_inputs_made_again(plan, stage, earlier))
    planned = None if made_again else _planned_weights(job)
    job = job.model_copy(update={"planned_steps": _steps(plan, stage, planned)})
    done = _trained_steps(job, planned) if planned else 0
    if planned and WeightsFolder(planned).identity.exists():
        action = KEPT if present == planned and _is_finished(job, done) else CONTINUES
    else:
        action = AGAIN if present else TRAINS
    reasons = (*_differences(job, present), *made_again) if action == AGAIN and present else ()
    steps = job.planned_steps
    hours = stage_hours(plan, stage)
    share = 1 - min(done, steps) / steps if steps else 1
    left = (hours.low * share, hours.high * share) if hours and action != KEPT else None
    export = _export_text(plan, stage, action != KEPT)
    return StageChange(stage.name, action, reasons, done, steps, left, present, planned, export)


def _steps(plan: Plan, stage: StagePlan, weights: Path | None) -> int | None:
    """Return the number of steps; for a length in epochs what a job counted for the same epochs, else an estimate."""
    path = WeightsFolder(weights).identity if weights and stage.steps is None else None
    recorded = read_typed_json(path, _Identity) if path and path.exists() else {}
    if recorded.get("epochs") == stage.stage.epochs and recorded.get("steps"):
        return recorded.get("steps")
    return stage.steps or estimate_steps(plan, stage.stage)


def _present_weights(job: TrainSpec) -> Path | None:
    """Return the weights folder of the finished stage, else the one that was trained last."""
    if Path(job.out).exists():
        return Path(Checkpoint.read(Path(job.out)).weights)
    trained = last_trained(Path(job.weights_root))
    return trained.path if trained else None


def _planned_weights(job: TrainSpec) -> Path | None:
    """Return the weights folder that the trainer would choose; None while the data or the starting checkpoint are missing."""
    if job.start_checkpoint and not Path(job.start_checkpoint).exists():
        return None
    data, tokenizer = DataManifest.read(Path(job.data)), TokenizerManifest.read(Path(job.tokenizer))
    return weights_folder(job, weights_identity(job, data, tokenizer, find_starting_checkpoint(job)))


def _trained_steps(job: TrainSpec, folder: Path) -> int:
    """Return the newest complete checkpoint's step. Raises UserError if the weights cannot continue under the planned steps."""
    if job.stage.epochs is None:  # else the job checks them: it counts the samples
        check_steps(job, folder)
    return max(complete_checkpoints(folder), default=0)


def _is_finished(job: TrainSpec, done: int) -> bool:
    steps = job.planned_steps
    return steps is not None and Path(job.out).exists() and done >= steps == Checkpoint.read(Path(job.out)).steps


# Why weights do not fit


def _inputs_made_again(plan: Plan, stage: StagePlan, earlier: dict[str, StageChange]) -> Iterator[str]:
    """Yield the inputs of a stage that the next run makes again, so that their hashes are not known yet."""
    start = stage.stage.start_from
    if start and earlier[start.stage].action != KEPT:
        yield f"it starts from {start.stage}, which {earlier[start.stage].action}"
    if _tokenizer_is_made_again(plan):
        yield "the tokenizer is made again"
    elif _dataset_is_made_again(plan, stage.stage.dataset):
        yield f"dataset {stage.stage.dataset} is made again"


def _tokenizer_is_made_again(plan: Plan) -> bool:
    train = plan.config.tokenizer.train
    inputs = [path for name in (train.datasets if train else ()) for path in plan.rule_inputs(name)]
    return _is_made_again(plan, JobId("tokenizer"), plan.paths.tokenizer, inputs)


def _dataset_is_made_again(plan: Plan, dataset: str) -> bool:
    parts = plan.config.datasets[dataset].mixture
    inputs = [] if parts else plan.rule_inputs(dataset)
    is_made_again = _is_made_again(plan, JobId("tokenize", (dataset,)), plan.paths.manifest(dataset), inputs)
    return is_made_again or any(_dataset_is_made_again(plan, part) for part in parts)


def _is_made_again(plan: Plan, job: JobId, out: Path, inputs: list[Path]) -> bool:
    """Return whether a job's artifact is missing, older than an input, or of other settings than the config's."""
    if not out.exists() or any(path.stat().st_mtime > out.stat().st_mtime for path in inputs if path.exists()):
        return True
    return _has_other_settings(plan, job)


def _has_other_settings(plan: Plan, job: JobId) -> bool:
    recorded = plan.paths.job(job).job_spec
    try:
        return job_kinds()[job.kind].spec.read(recorded).rerun_key() != job_spec(plan, job).rerun_key()
    except UserError:  # another release wrote it, or it was removed: the rule decides
        return recorded.exists()


def _differences(job: TrainSpec, present: Path) -> list[str]:
    """Return what differs between the planned result spec and that of the present weights, `key old → new`."""
    identity = read_typed_json(WeightsFolder(present).identity, _Identity)
    recorded = _flat({**identity["spec"], "steps": identity.get("steps")})
    planned = _flat(job.spec)
    if not job.stage.restart:  # more steps alone continue the same weights
        for key in ("steps", "epochs"):
            recorded.pop(key, None)
            planned.pop(key, None)
    keys = [key for key in dict.fromkeys([*planned, *recorded]) if planned.get(key) != recorded.get(key)]
    listed = [f"{key} {_value(recorded, key)} → {_value(planned, key)}" for key in keys[:_LISTED_DIFFERENCES]]
    more = [f"{len(keys) - _LISTED_DIFFERENCES} more keys"] if len(keys) > _LISTED_DIFFERENCES else []
    return [*listed, *more, *([] if keys else _other_inputs(job, identity))]


def _other_inputs(job: TrainSpec, identity: _Identity) -> Iterator[str]:
    """Yield which input of the stage has another content than the one that its present weights were trained from."""
    if Path(job.data).exists() and identity["data"] != DataManifest.read(Path(job.data)).hash:
        yield "its data changed"
    if Path(job.tokenizer).exists() and identity["tokenizer"] != TokenizerManifest.read(Path(job.tokenizer)).hash:
        yield "its tokenizer changed"
    if job.start_checkpoint and Path(job.start_checkpoint).exists():
        start = find_starting_checkpoint(job)
        if start and identity["start"] != start.sha256:
            yield "its starting checkpoint changed"
    if identity["pretrained"] != job.pretrained:
        yield f"its first weights {identity['pretrained']} → {job.pretrained}"


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Return dotted key -> value of nested dicts."""
    if not isinstance(value, dict):
        return {prefix: list(value) if isinstance(value, tuple) else value}
    fields = cast(dict[str, Any], value)
    return {
        name: found
        for key, part in fields.items()
        for name, found in _flat(part, f"{prefix}.{key}" if prefix else key).items()
    }


def _value(values: dict[str, Any], key: str) -> str:
    value = values.get(key)
    return "unset" if value is None else str(value)


def _export_text(plan: Plan, stage: StagePlan, is_trained: bool) -> str:
    """Return what happens to the export that the stage has; "" where it has none, or where it stays as it is."""
    manifest = plan.paths.export_manifest(stage.name)
    if stage.name not in plan.exported or not manifest.exists():
        return ""
    if not is_trained and not _has_other_settings(plan, JobId("export", (stage.name,))):
        return ""
    return f"Its export is made again; {Export.read(manifest).path} stays"
