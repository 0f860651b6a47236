"""Writes launch.sh, launch.json, job.sbatch and controller.sbatch: gives srun command and binding to their templates."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path

from longhaul.artifacts.atomic_files import replace_link, write_text
from longhaul.artifacts.paths import CODE_LINK, QUARANTINE, JobFolder, JobId
from longhaul.config.shipped_files import PACKAGE, data_root, is_installed
from longhaul.config.site_config import Site
from longhaul.config.slurm_options import is_option
from longhaul.errors import UserError
from longhaul.jobs.container import container_command
from longhaul.jobs.environment_variables import job_variables
from longhaul.jobs.job_kind import JobKind, PlannedStep, job_kinds, job_name_by_hand, jobs_of
from longhaul.jobs.job_spec import LaunchSpec, LaunchStep
from longhaul.jobs.templates import template
from longhaul.planning import Plan
from longhaul.planning.slurm_request import SlurmRequest, controller_request

# MIOpen keeps databases in the home folder by default. Its locks fail there when jobs of several nodes use them:
# https://docs.lumi-supercomputer.eu/software/packages/pytorch/
_JOB_FOLDERS = ("MIOPEN_USER_DB_PATH", "MIOPEN_CUSTOM_CACHE_DIR")
_UNSAFE_IN_PATHS = set("\"'\\$`%\n\r")


@dataclass(frozen=True)
class RenderedFiles:
    """The files of one folder, by name."""

    files: dict[str, str]

    def write(self, folder: Path) -> None:
        """Write those files into `folder` whose text has changed, each atomically."""
        for name, text in self.files.items():
            path = folder / name
            if not path.exists() or path.read_bytes() != text.encode():
                write_text(path, text)


def write_launch_files(plan: Plan, workdir: Path) -> None:
    """Write the files of every job that can be rendered now, and make the log folders: Slurm starts no job without them."""
    for log in (plan.paths.controller_log, *(plan.paths.log(job) for job in jobs_of(plan))):
        (workdir / log).parent.mkdir(parents=True, exist_ok=True)
    _create_mounted_folders(plan, workdir)
    _link_code(workdir / CODE_LINK)
    for folder, files in render_run(plan, workdir).items():
        files.write(workdir / folder)


def write_job_files(plan: Plan, job: JobId, workdir: Path) -> JobFolder:
    """Write the files of one job, make its log folder, and return the job's folder."""
    (workdir / plan.paths.log(job)).parent.mkdir(parents=True, exist_ok=True)
    _create_mounted_folders(plan, workdir)
    _link_code(workdir / CODE_LINK)
    folder = JobFolder(workdir / plan.paths.job(job).path)
    render_job(plan, job, workdir).write(folder.path)
    return folder


def _create_mounted_folders(plan: Plan, workdir: Path) -> None:
    """Create the shared folders of `storage` where pyxis mounts them: it refuses a folder that does not exist.

    Raises:
        UserError: one of them cannot be created.
    """
    storage = plan.config.storage
    if not plan.site.software.is_pyxis:
        return
    for folder in (workdir / root for root in (storage.weights, storage.data) if root):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"storage: {folder} cannot be created: {error.strerror}",
                "name a folder of storage.weights and storage.data that you may write to",
            ) from None


def _link_code(link: Path) -> None:
    """Link an installed package, whose folder jobs have on PYTHONPATH."""
    if not is_installed() or (link.is_symlink() and link.readlink() == PACKAGE):
        return
    link.parent.mkdir(parents=True, exist_ok=True)
    replace_link(link, str(PACKAGE))


def _code_folder(workdir: Path) -> Path:
    """Return the folder that a job's Python imports longhaul from."""
    return (workdir / CODE_LINK).parent if is_installed() else PACKAGE.parent


def render_run(plan: Plan, workdir: Path) -> dict[Path, RenderedFiles]:
    """Return folder -> files of every job that can be rendered now; jobs that read fetched data wait for the lock.

    Raises:
        UserError: sbatch or the container command would misread a path.
    """
    fetched = plan.lock is not None or not plan.needs_fetch
    jobs = [job for job in jobs_of(plan) if fetched or not job_kinds()[job.kind].needs_fetch]
    files = {plan.paths.job(job).path: render_job(plan, job, workdir) for job in jobs}
    if _needs_controller(plan.site):
        files[plan.paths.folder] = render_controller(plan, workdir)
    return files


def _needs_controller(site: Site) -> bool:
    """Return whether controller.sbatch is of use: it would occupy a GPU node where GPU jobs get only whole nodes."""
    partition = site.partition_for("login")
    wastes_gpus = partition.node.gpus > 0 and partition.exclusive
    return site.scheduler == "slurm" and site.sbatch_from_jobs and not wastes_gpus


def render_job(plan: Plan, job: JobId, workdir: Path) -> RenderedFiles:
    """Return launch.sh, launch.json, the job specs of the steps, what the kind adds, and on Slurm job.sbatch."""
    kind = job_kinds()[job.kind]
    folder = JobFolder(workdir / plan.paths.job(job).path)
    request, spec = kind.request(plan, job), kind.build_spec(plan, job)
    title = f"longhaul {plan.run}: {job}"
    own_step = PlannedStep(
        kind.help, kind.name, spec, folder.job_spec.name, request, kind.binds_ranks, kind.outside_environment(plan)
    )
    steps = [*kind.first_steps(plan, job, request), own_step]
    files = {
        folder.launch_script.name: _launch_script(plan, request, title, folder, workdir),
        folder.launch_spec.name: _launch_spec(plan, job, kind, steps, folder, workdir).to_json(),
        **{step.file: step.spec.to_json() for step in steps},
        **kind.more_files(plan, job),
    }
    if plan.site.scheduler == "slurm":
        log = workdir / plan.paths.log(job)
        options = _sbatch_options(request, job_name_by_hand(plan.run, str(job)), log)
        files[folder.sbatch_script.name] = template("sbatch/job.sbatch.j2").render(
            title=title, options=options, launch=folder.launch_script
        )
    return RenderedFiles(files)


def render_controller(plan: Plan, workdir: Path) -> RenderedFiles:
    """Return controller.sbatch: the main Snakemake process as a job, which queues its own successor."""
    script = plan.paths.controller_script
    title, name = f"longhaul {plan.run} controller", f"longhaul-{plan.run}-controller"
    options = _sbatch_options(controller_request(plan.site), name, workdir / plan.paths.controller_log)
    command = [sys.executable, "-m", "snakemake", "--snakefile", data_root() / "Snakefile", "--directory", workdir]
    command += ["--configfile", plan.loaded.path.absolute(), "--profile", data_root() / "profiles" / "slurm"]
    text = template("sbatch/controller.sbatch.j2").render(
        title=title, options=options, workdir=_safe_path(workdir), controller=workdir / script, command=command
    )
    return RenderedFiles({script.name: text})


def _launch_spec(
    plan: Plan, job: JobId, kind: JobKind, steps: list[PlannedStep], folder: JobFolder, workdir: Path
) -> LaunchSpec:
    spec, request = steps[-1].spec, steps[-1].request
    inputs = [folder.launch_spec, QUARANTINE, folder.job_spec, *filter(None, spec.input_texts())]
    return LaunchSpec(
        run=plan.run,
        name=str(job),
        folder=str(folder.path),
        slurm=plan.site.scheduler == "slurm",
        nodes=request.nodes,
        requeue=plan.site.requeue,
        master_suffix=plan.site.interconnect.master_address.suffix,
        master_interface=plan.site.interconnect.master_address.interface,
        max_restarts=kind.max_restarts(plan, job),
        deadline_poll_interval_s=plan.site.deadline_poll_interval_s,
        steps=tuple(_launch_step(plan, step, folder, workdir) for step in steps),
        inputs=tuple(map(str, inputs)),
        data=tuple(spec.input_data()),
        checkpoints=spec.weights_folders_root(),
        attempt_logs=str(workdir / plan.paths.attempt_logs(job).path),
        quarantine=str(QUARANTINE),
    )


def _launch_step(plan: Plan, step: PlannedStep, folder: JobFolder, workdir: Path) -> LaunchStep:
    launcher = _srun(plan.site, step) if plan.site.scheduler == "slurm" and not step.starts_tasks else []
    python = [sys.executable] if step.outside_environment else _python(plan.site)
    if plan.site.scheduler == "local" and step.request.tasks > 1 and not step.starts_tasks:
        # torchrun ends all ranks when one fails, as srun --kill-on-bad-exit does.
        # Without --local-addr, the ranks look for rank 0 under this machine's name, which need not be in DNS or /etc/hosts.
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--local-addr=localhost"]
        python = [*python, *torchrun, f"--nproc-per-node={step.request.tasks}"]
    words = ("-m", "longhaul", "job", "run", step.kind, str(folder.path / step.file))
    inside = not step.outside_environment
    has_gpus = step.request.gpus_per_node > 0
    # What is set only where nothing is set yet leaves the image's value, too.
    variables = [variable.name for variable in job_variables(plan.site, step.request) if not variable.unless_set]
    code = _code_folder(workdir)
    container = container_command(plan, step.spec, has_gpus, variables, workdir, code) if inside else []
    return LaunchStep(title=step.title, command=(*launcher, *container, *python, *words))


def _srun(site: Site, step: PlannedStep) -> list[str]:
    # Not --unbuffered: it gives ranks a terminal, and libraries then write colours and progress bars into the log.
    options = ["--kill-on-bad-exit=1", "--wait=60", "--label"]
    mpi = [] if any(is_option(extra, "--mpi") for extra in site.srun_extra) else ["--mpi=none"]
    return ["srun", *step.request.as_srun(), *mpi, *options, *_binding(site, step), *site.srun_extra]


def _binding(site: Site, step: PlannedStep) -> list[str]:
    """Return srun's binding options. With cpu_bind auto, each rank binds itself.

    Masks and maps name cores or GPUs that a smaller step or a part of a node does not have; srun would refuse that step.
    """
    partition = site.partition_for("gpu")
    if not step.binds_ranks:
        return ["--cpu-bind=none"] if partition.cpu_bind else []
    on_part_of_a_node = step.request.tasks_per_node < (partition.node.gpus or partition.node.cpus)
    cpu_bind = "none" if partition.cpu_bind == "auto" else partition.cpu_bind
    options = {"--cpu-bind": cpu_bind, "--gpu-bind": partition.gpu_bind}
    return [
        f"{option}={'none' if on_part_of_a_node and _names_devices(value) else value}"
        for option, value in options.items()
        if value
    ]


def _names_devices(binding: str) -> bool:
    """Return whether a binding is a mask or a map, also after `verbose` or `quiet`."""
    return re.search(r"(^|,)(mask|map)_", binding, re.IGNORECASE) is not None


def _python(site: Site) -> list[str]:
    software = site.software
    if software.kind in ("venv", "conda"):
        return [f"{software.path}/bin/python"]
    return [sys.executable] if software.kind == "current" else [software.python or "python3"]


def _launch_script(plan: Plan, request: SlurmRequest, title: str, folder: JobFolder, workdir: Path) -> str:
    """Return launch.sh: it enters the working folder and the environment, and becomes the supervisor.

    The supervisor runs in the Python that runs Snakemake, outside of any container.
    """
    site = plan.site
    variables = job_variables(site, request)
    return template("sbatch/launch.sh.j2").render(
        title=title,
        workdir=_safe_path(workdir),
        module_commands=_module_commands(site),
        code=_code_folder(workdir),
        variables=[variable for variable in variables if not variable.unless_set],
        default_variables=[variable for variable in variables if variable.unless_set],
        job_folders=_JOB_FOLDERS if site.accelerator.rocm else (),
        path_prefix=[f"{site.software.path}/bin"] if site.software.kind in ("venv", "conda") else [],
        python=sys.executable,
        launch_spec=folder.launch_spec,
    )


def _module_commands(site: Site) -> list[list[str]]:
    software = site.software
    purge = [["module", "purge"]] if software.module_purge else []
    used = [["module", "use", folder] for folder in software.module_use]
    return [*purge, *used, *(["module", "load", module] for module in software.modules)]


def _sbatch_options(request: SlurmRequest, name: str, log: Path) -> dict[str, str]:
    return {"--job-name": name, **request.as_sbatch(), "--output": f'"{_safe_path(log)}"'}


def _safe_path(path: Path) -> str:
    if found := _UNSAFE_IN_PATHS & set(str(path)):
        raise UserError(
            f"the working folder {str(path)!r} contains {sorted(found)[0]!r}",
            "run in a folder whose name has no quotes, $, % or line breaks",
        )
    return str(path)
