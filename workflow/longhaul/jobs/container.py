"""Builds the Apptainer, Singularity or Pyxis command of a step, and the folders that a container binds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from longhaul.artifacts.paths import RESULTS
from longhaul.config.shipped_files import PACKAGE, data_root
from longhaul.errors import UserError
from longhaul.jobs.job_spec import JobSpec
from longhaul.planning import Plan

SHARED_MEMORY = "/dev/shm"  # nosec B108  # no folder for temporary files: ranks of one node communicate through it
_UNBINDABLE = set(":,")
_SCRIPTS = data_root() / "templates" / "sbatch"
START_SCRIPT = _SCRIPTS / "start_container.sh"
ENTER_SCRIPT = _SCRIPTS / "enter_srun_container.sh"


def container_command(
    plan: Plan, spec: JobSpec, has_gpus: bool, variables: Sequence[str], workdir: Path, code: Path
) -> list[str]:
    """Return the words between the launcher and a step's own command; none where the site uses no container.

    has_gpus:  whether the step asks for GPUs; without them, Apptainer has no files of a driver to add
    variables: names of the environment variables whose values of the job replace those of the image
    code:      folder that Python imports longhaul from

    All that the job reads and writes is bound. Slurm's client stays outside the container, so nothing of it is bound.

    Raises:
        UserError: a folder's name contains a character that the container command reads as a separator.
    """
    software = plan.site.software
    if software.kind == "container":
        return _apptainer_command(plan, spec, has_gpus, workdir)
    if software.kind != "srun":
        return []
    pyxis = _pyxis_options(plan, spec, variables, workdir) if software.is_pyxis else []
    enter = ["bash", str(ENTER_SCRIPT), str(workdir), str(code), *_storage_roots(plan, workdir), "--"]
    return [*software.options, *pyxis, *enter]


def _apptainer_command(plan: Plan, spec: JobSpec, has_gpus: bool, workdir: Path) -> list[str]:
    software, roots = plan.site.software, _storage_roots(plan, workdir)
    start = ["bash", str(START_SCRIPT), *roots, "--", software.runtime, "exec"]
    gpu_flag = _gpu_flag(plan) if has_gpus else []
    folders = [SHARED_MEMORY, *_bound_folders(plan, spec, workdir), *software.binds]
    binds = [word for folder in folders for word in ("--bind", folder)]
    return [*start, *gpu_flag, *software.options, *binds, str(software.path)]


def _gpu_flag(plan: Plan) -> list[str]:
    if not plan.site.software.gpu_flag:
        return []
    return ["--rocm"] if plan.site.accelerator.rocm else ["--nv"]


def _pyxis_options(plan: Plan, spec: JobSpec, variables: Sequence[str], workdir: Path) -> list[str]:
    """Return the mounts and the names of variables; pyxis 0.15 and later replace an image's values by the job's.

    pyxis refuses a folder that a node does not have. A folder inside of one of the binds is made in the container.
    """
    binds = plan.site.software.binds
    folders = _outermost([*_bound_folders(plan, spec, workdir), *(bind for bind in binds if ":" not in bind)])
    mounts = [*(f"{folder}:{folder}" for folder in folders), *(bind for bind in binds if ":" in bind)]
    names = [f"--container-env={','.join(variables)}"] if variables else []
    return [f"--container-mounts={','.join(mounts)}", *names]


def _bound_folders(plan: Plan, spec: JobSpec, workdir: Path) -> list[str]:
    results = workdir / RESULTS
    linked = [results.resolve()] if results.is_symlink() else []
    own = [data_root(), PACKAGE, workdir, *linked, *_storage_roots(plan, workdir)]
    return _outermost([*map(str, own), *external_folders(spec)])


def _storage_roots(plan: Plan, workdir: Path) -> list[str]:
    storage = plan.config.storage
    return [str(workdir / root) for root in (storage.weights, storage.data, storage.scratch) if root]


def external_folders(spec: JobSpec) -> list[str]:
    """Return the folders outside the run that a job reads; a file directly below / stands for itself.

    The targets of links count too: the hub's cache consists of links.
    """
    paths = [Path(path) for path in spec.external_paths() if path]
    return list(dict.fromkeys(str(folder) for path in paths for folder in _folders_of(path)))


def _folders_of(path: Path) -> list[Path]:
    if not path.is_dir():
        places = [path, *([path.resolve()] if path.is_symlink() else [])]
        return [place if place.parent == Path("/") else place.parent for place in places]
    return [path, *(entry.resolve().parent for entry in sorted(path.iterdir()) if entry.is_symlink())]


def _outermost(folders: list[str]) -> list[str]:
    """Return the folders that are in none of the others, in their order, without repetition."""
    for folder in folders:
        if found := _UNBINDABLE & set(folder):
            raise UserError(
                f"software: {folder!r} contains {sorted(found)[0]!r}, which separates folders for the container command",
                "move it to a folder whose name has no : and no ,",
            )
    unique = list(dict.fromkeys(folders))
    return [f for f in unique if not any(f != other and Path(f).is_relative_to(other) for other in unique)]
