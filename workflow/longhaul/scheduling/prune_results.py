"""`longhaul prune`: lists old weights, exports and logs of a run, and removes them on request.

Nothing is old that the present config refers to, that the finished stages and exports of the run refer to, or from which one
of these started.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from longhaul.artifacts.artifact_schemas import Export
from longhaul.artifacts.atomic_files import file_sha256
from longhaul.artifacts.endpoint import read_endpoint
from longhaul.artifacts.leases import Lease
from longhaul.artifacts.paths import SERVE_KIND, AttemptLogs, JobId, RunPaths, WeightsFolder
from longhaul.artifacts.typed_json import read_typed_json
from longhaul.errors import UserError, printable
from longhaul.jobs.job_kind import job_kinds, jobs_of, jobs_on_demand
from longhaul.planning import Plan
from longhaul.report import number_format as text
from longhaul.report.planned_changes import StageChange, stage_changes
from longhaul.scheduling.read_job_queue import jobs_in_queue
from longhaul.train.checkpoint.checkpoint_folders import MANIFEST, WeightsIdentity

KEPT_ATTEMPTS = 5
"""Number of the newest attempts of a job whose logs stay; `longhaul doctor` reads no older ones."""
_REMOVED = ".removed"
_WEIGHTS = re.compile(rf"[0-9a-f]{{16}}({re.escape(_REMOVED)})?")
_STAGE_RULE = "render_result_spec"


@dataclass(frozen=True)
class OldResult:
    """A folder or file that the run no longer needs. kind: weights | export | log; reason: why it is old."""

    kind: str
    path: Path
    bytes: int
    reason: str


def prune(plan: Plan, delete: bool) -> None:
    """Print what is old. With `delete`, remove it.

    Raises:
        UserError: with `delete`, a process or a job of the run may still be active, or Slurm does not say.
    """
    found = find_old_results(plan)
    if delete:
        require_idle_run(plan, found)
    _print_list(found)
    if not found:
        return
    total = text.size(sum(result.bytes for result in found))
    if not delete:
        print(f"{total} can be freed. Nothing was removed: add --delete to remove all of it")
        return
    for result in found:
        _remove(result.path)
    _remove_dangling_links(plan.paths)
    print(f"{total} freed")


def find_old_results(plan: Plan) -> list[OldResult]:
    """Return what the run no longer needs: weights first, then exports, then logs."""
    changes = stage_changes(plan)
    exports = {stage: _manifest_export(plan.paths, stage) for stage in plan.exported}
    return [
        *_old_weights(plan, changes, [export for export in exports.values() if export]),
        *_old_exports(plan, {stage: Path(export.path) for stage, export in exports.items() if export}),
        *_old_logs(plan),
    ]


def _manifest_export(paths: RunPaths, stage: str) -> Export | None:
    manifest = paths.export_manifest(stage)
    return Export.read(manifest) if manifest.exists() else None


# Weights


def _old_weights(plan: Plan, changes: list[StageChange], exports: list[Export]) -> Iterator[OldResult]:
    by_stage = _weights_folders(plan)
    kept = _kept_weights(changes, exports, by_stage)
    configured = {change.stage for change in changes}
    for stage, folders in by_stage.items():
        reason = "weights of an earlier config" if stage in configured else "the config has no such stage"
        for folder in folders:
            if folder.absolute() not in kept:
                yield OldResult("weights", folder, _size(folder), f"{stage}: {reason}")


def _weights_folders(plan: Plan) -> dict[str, list[Path]]:
    """Return stage -> its weights folders, also of stages that the config no longer has, below the run and in storage.weights."""
    stages = plan.paths.stage("any").path.parent.glob("*/")
    roots = [(path.name, plan.paths.stage(path.name).weights) for path in sorted(stages)]
    if root := plan.config.storage.weights:
        roots += [(path.name, path) for path in sorted((Path(root) / plan.run).glob("*/"))]
    by_stage: dict[str, list[Path]] = {}
    for stage, folder in roots:
        named = (path for path in sorted(folder.glob("*/")) if _WEIGHTS.fullmatch(path.name))
        by_stage.setdefault(stage, []).extend(path for path in named if not path.is_symlink())
    return by_stage


def _kept_weights(changes: list[StageChange], exports: list[Export], by_stage: dict[str, list[Path]]) -> set[Path]:
    """Return the weights folders that must stay, absolute."""
    kept = {path.absolute() for change in changes for path in (change.present, change.planned) if path}
    kept |= {WeightsFolder.of_checkpoint(Path(export.checkpoint)).path.absolute() for export in exports}
    for change in changes:
        if change.planned is None:  # which of its folders the next run uses is known only when its inputs are made
            kept |= {path.absolute() for path in by_stage.get(change.stage, []) if path.suffix != _REMOVED}
    while new := _origins(kept, by_stage) - kept:
        kept |= new
    return kept


def _origins(kept: set[Path], by_stage: dict[str, list[Path]]) -> set[Path]:
    """Return the weights folders that hold a checkpoint from which one of the kept folders started."""
    identities = [path for folder in kept if (path := WeightsFolder(folder).identity).exists()]
    starts = {read_typed_json(path, WeightsIdentity).get("start") for path in identities} - {None}
    folders = [path.absolute() for paths in by_stage.values() for path in paths] if starts else []
    return {folder for folder in folders if starts & set(_manifest_hashes(folder))}


def _manifest_hashes(weights: Path) -> Iterator[str]:
    yield from map(file_sha256, WeightsFolder(weights).checkpoints.glob(f"step-????????/{MANIFEST}"))


# Exports


def _old_exports(plan: Plan, current: dict[str, Path]) -> Iterator[OldResult]:
    root = plan.paths.exports("any").parent
    for exports in sorted(root.glob("*/")):
        stage, link = exports.name, plan.paths.export(exports.name)
        latest = link.resolve() if link.is_symlink() and stage in plan.exported else None
        kept = {latest, current[stage].resolve() if stage in current else None}
        reason = "an earlier export" if stage in plan.exported else "the config does not export this stage"
        for folder in sorted(path for path in exports.iterdir() if path.is_dir() and not path.is_symlink()):
            if folder.resolve() not in kept:
                why = "an export that was interrupted" if folder.name.startswith(".") else reason
                yield OldResult("export", folder, _size(folder), f"{stage}: {why}")


# Logs


def _old_logs(plan: Plan) -> Iterator[OldResult]:
    jobs = [*jobs_of(plan), *jobs_on_demand(plan), *(JobId(_STAGE_RULE, (stage.name,)) for stage in plan.stages)]
    known = {plan.paths.log(job) for job in jobs}
    kinds = {*job_kinds(), _STAGE_RULE}
    for path in sorted(plan.paths.logs.rglob("*.log")):
        if path.relative_to(plan.paths.logs).with_suffix("").parts[0] not in kinds or path in known:
            continue
        attempts = AttemptLogs(path.parent).logs()
        if path not in attempts or path.parent.with_name(f"{path.parent.name}.log") not in known:
            reason = "the config has no such job"
        elif path not in attempts[-KEPT_ATTEMPTS:]:
            reason = f"older than the last {KEPT_ATTEMPTS} attempts"
        else:
            continue
        for file in (path, *AttemptLogs.collective_records(path).values()):
            yield OldResult("log", file, file.stat().st_size, reason)


# Removal


def require_idle_run(plan: Plan, results: list[OldResult]) -> None:
    """Raise UserError if the main process or a job of the run may be active, or a process may write to old weights."""
    owner = Lease(plan.paths.lease).current_owner()
    if owner and not owner.is_dead():
        raise UserError(
            f"run {plan.run} is active: {owner} works on it",
            f"wait until it ends, or stop it; if it is certainly dead: rm {plan.paths.lease}",
        )
    if plan.site.scheduler == "slurm" and (jobs := jobs_in_queue(plan.paths)):
        raise UserError(
            f"jobs of run {plan.run} are in Slurm's queue: {', '.join(jobs)}", "wait until they end, or cancel them"
        )
    for folder in plan.paths.job_folders():
        if server := read_endpoint(folder.endpoint):
            stage = folder.path.name.removeprefix(f"{SERVE_KIND}-")
            raise UserError(
                f"{server.owner} serves an export of run {plan.run}",
                f"stop it: longhaul serve {plan.loaded.path} {stage} --stop",
            )
    for result in results:
        writer = Lease(WeightsFolder(result.path).lease).current_owner() if result.kind == "weights" else None
        if writer and not writer.is_dead():
            lease = WeightsFolder(result.path).lease
            raise UserError(f"{writer} may write to {result.path}", f"if it is certainly dead: rm {lease}")


def _remove(path: Path) -> None:
    """Remove a file or a folder. A folder gets another name first, so that no half of it is ever used."""
    if not path.is_dir():
        path.unlink(missing_ok=True)
        return
    if not path.name.endswith(_REMOVED):
        renamed = path.with_name(path.name + _REMOVED)
        if renamed.exists():  # an interrupted prune left it, and rename cannot replace a folder that holds files
            shutil.rmtree(renamed)
        path = path.rename(renamed)
    shutil.rmtree(path)


def _remove_dangling_links(paths: RunPaths) -> None:
    """Remove manifest and link of stages whose exports were all removed."""
    for exports in paths.exports("any").parent.glob("*/"):
        link = paths.export(exports.name)
        if link.is_symlink() and not link.exists():
            link.unlink()
            paths.export_manifest(exports.name).unlink(missing_ok=True)


def _size(folder: Path) -> int:
    """Return the bytes of all files below a folder; links are not followed."""
    files = (Path(where, name) for where, _, names in os.walk(folder) for name in names)
    return sum(path.lstat().st_size for path in files)


def _print_list(results: list[OldResult]) -> None:
    if not results:
        print("nothing is old: the config refers to all weights, exports and logs of this run")
        return
    table = Table("what", "path", "size", "why")
    for result in results:
        cells = (result.kind, str(result.path), text.size(result.bytes), result.reason)
        table.add_row(*(Text(printable(cell)) for cell in cells))
    console = Console()
    if not console.is_terminal:
        console.width = 200
    console.print(table)
