"""Plan -> files: launch scripts, sbatch headers, DeepSpeed configs and job payloads, as text.

Jinja only places what is decided here. Values reach a shell quoted, and JSON through `tojson`.
"""

from __future__ import annotations

import itertools
import json
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import jinja2

from longhaul.artifacts.files import write_text
from longhaul.config.package_data import data_root
from longhaul.config.site_config import Site
from longhaul.errors import UserError
from longhaul.jobs.builders import job_names, outside_folders, payload, stage_environment_job
from longhaul.jobs.specs import Job, LaunchSpec, LaunchStep, TokenizerSpec, TokenizeSpec, TrainSpec
from longhaul.planning import Plan, StagePlan
from longhaul.planning.deepspeed_config import deepspeed_sections
from longhaul.planning.slurm_request import SlurmRequest

REPOSITORY = data_root()
TEMPLATES = REPOSITORY / "templates"
QUARANTINE = "results/quarantine.json"
CONTROLLER = "controller.sbatch"
_UNSAFE_IN_PATHS = set("\"'\\$`%\n\r")
_UNBINDABLE = set(":,")


@dataclass(frozen=True)
class Rendered:
    """The files of one job, by name."""

    files: dict[str, str]

    def write(self, folder: Path) -> None:
        """Writes into `folder` those whose text is new, each atomically."""
        for name, text in self.files.items():
            path = folder / name
            if not path.exists() or path.read_text(encoding="utf-8") != text:
                write_text(path, text)


def render_run(plan: Plan, workdir: Path) -> None:
    """Writes the files of every job that can be rendered now; Slurm starts no job whose log has no folder."""
    (workdir / "results" / plan.run / "logs").mkdir(parents=True, exist_ok=True)
    for folder, files in rendered_run(plan, workdir).items():
        files.write(workdir / folder)


def rendered_run(plan: Plan, workdir: Path) -> dict[Path, Rendered]:
    """Folder -> files of every job that can be rendered now; what reads fetched data or models waits for the lock.

    Raises:
        UserError: a path that sbatch or the container command would read differently.
    """
    locked = plan.lock is not None or not plan.needs_fetch
    jobs = [job for job in job_names(plan) if locked or job in ("environment", "fabric")]
    files = {job_folder(plan, job): render_job(plan, job, workdir) for job in jobs}
    for stage in plan.stages if locked else ():
        files[stage_folder(plan, stage.name)] = render_stage(plan, stage.name, workdir)
    if plan.site.scheduler == "slurm" and plan.site.sbatch_from_jobs:
        files[Path("results") / plan.run] = render_controller(plan, workdir)
    return files


def render_controller(plan: Plan, workdir: Path) -> Rendered:
    """controller.sbatch: the main Snakemake as a job that is followed by itself."""
    folder = workdir / "results" / plan.run
    title = f"longhaul {plan.run} controller"
    options = _sbatch_options(plan.controller_request, title, folder / "logs" / "controller.log")
    command = [sys.executable, "-m", "snakemake", "--snakefile", REPOSITORY / "Snakefile", "--directory", workdir]
    command += ["--configfile", plan.loaded.path.absolute(), "--profile", REPOSITORY / "profiles" / "slurm"]
    text = _template("sbatch/controller.sbatch.j2").render(
        title=title, options=options, workdir=_safe_path(workdir), controller=folder / CONTROLLER, command=command
    )
    return Rendered({CONTROLLER: text})


def render_stage(plan: Plan, name: str, workdir: Path) -> Rendered:
    """launch.sh and launch.json, job.sbatch (on Slurm), ds_config.json, stage.json and environment.json of one stage."""
    stage = plan.stage(name)
    folder = workdir / stage_folder(plan, name)
    request = plan.request(f"train-{name}")
    title = f"longhaul {plan.run}: stage {name}"
    one_per_node = SlurmRequest(**{**vars(request), "tasks_per_node": 1, "cpus_per_task": 1})
    told, check = cast(TrainSpec, payload(plan, f"train-{name}")), stage_environment_job(plan, name)
    steps = [
        _step("The nodes this stage really got", plan, one_per_node, "environment", folder / "environment.json", check),
        _step("Training", plan, request, "train", folder / "stage.json", told),
    ]
    inputs = [folder / "stage.json", folder / "ds_config.json", told.data, told.start_checkpoint]
    supervised = _supervised(plan, f"train-{name}", request, folder, steps, inputs)
    supervised = supervised.model_copy(
        update={"max_restarts": stage.stage.recovery.max_restarts, "checkpoints": told.weights_root}
    )
    return Rendered(
        {
            "launch.sh": _launch(plan, request, title, folder, workdir),
            "launch.json": _json(supervised),
            **_by_hand(plan, request, title, folder, f"train_stage-{name}"),
            "ds_config.json": render_deepspeed(stage, plan.site),
            "stage.json": _json(told),
            "environment.json": _json(check),
        }
    )


def render_job(plan: Plan, job: str, workdir: Path) -> Rendered:
    """launch.sh and launch.json, job.sbatch (on Slurm) and job.json of a job that is no training stage."""
    folder = workdir / job_folder(plan, job)
    request = plan.request(job)
    title = f"longhaul {plan.run}: {job}"
    told = payload(plan, job)
    steps = [_step(job, plan, request, job.partition("-")[0], folder / "job.json", told)]
    texts, data = _made_from(told)
    supervised = _supervised(plan, job, request, folder, steps, [folder / "job.json", *texts], data)
    return Rendered(
        {
            "launch.sh": _launch(plan, request, title, folder, workdir),
            "launch.json": _json(supervised),
            **_by_hand(plan, request, title, folder, job),
            "job.json": _json(told),
        }
    )


def _made_from(told: Job) -> tuple[list[str | None], tuple[str, ...]]:
    """Small texts and data files that a job reads: who mends one of them may have the job tried again."""
    if isinstance(told, TokenizeSpec):
        return [told.tokenizer, told.survey, *told.parts.values()], (*told.files, *told.evaluation)
    if isinstance(told, TokenizerSpec):
        return [told.chat_template], tuple(itertools.chain.from_iterable(told.train_files.values()))
    return [], ()


def _supervised(
    plan: Plan,
    job: str,
    request: SlurmRequest,
    folder: Path,
    steps: list[LaunchStep],
    inputs: list[Path | str | None],
    data: tuple[str, ...] = (),
) -> LaunchSpec:
    return LaunchSpec(
        run=plan.run,
        name=job,
        folder=str(folder),
        slurm=plan.site.scheduler == "slurm",
        nodes=request.nodes,
        requeue=plan.site.requeue,
        max_restarts=0,
        deadline_poll_interval_s=plan.site.deadline_poll_interval_s,
        steps=tuple(steps),
        inputs=tuple(str(path) for path in (folder / "launch.json", QUARANTINE, *inputs) if path),
        data=data,
        checkpoints=None,
        quarantine=QUARANTINE,
    )


def stage_folder(plan: Plan, name: str) -> Path:
    return Path("results") / plan.run / "stages" / name


def job_folder(plan: Plan, job: str) -> Path:
    return Path("results") / plan.run / "jobs" / job


def render_deepspeed(stage: StagePlan, site: Site) -> str:
    """ds_config.json of a stage; the total batch is left out, as DeepSpeed derives it."""
    return _template("deepspeed/ds_config.json.j2").render(sections=deepspeed_sections(stage, site))


def _step(title: str, plan: Plan, request: SlurmRequest, verb: str, path: Path, told: Job) -> LaunchStep:
    workdir = path.parents[4]  # <workdir>/results/<run>/<jobs|stages>/<name>/<file>
    words = ("-m", "longhaul", verb, str(path))
    launcher = _srun(plan.site, request) if plan.site.scheduler == "slurm" else []
    python = _python(plan.site)
    if plan.site.scheduler == "local" and request.tasks > 1:
        # torchrun ends all ranks when one fails, as srun --kill-on-bad-exit does.
        python = [*python, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={request.tasks}"]
    return LaunchStep(title=title, command=(*launcher, *_enter_container(plan, told, workdir), *python, *words))


def _srun(site: Site, request: SlurmRequest) -> list[str]:
    options = ["--kill-on-bad-exit=1", "--wait=60", "--unbuffered", "--label"]
    mpi = [] if any(extra.startswith("--mpi") for extra in site.srun_extra) else ["--mpi=none"]
    return ["srun", *request.as_srun(), *mpi, *options, *site.srun_extra]


def _python(site: Site) -> list[str]:
    software = site.software
    if software.kind in ("venv", "conda"):
        return [f"{software.path}/bin/python"]
    return [sys.executable] if software.kind == "current" else ["python3"]


# A folder that is not there cannot be bound; scratch is another one on every node.
_MAKE_FOLDERS = 'while [ "$1" != -- ]; do mkdir -p -- "$1" || exit; shift; done; shift; exec "$@"'


def _enter_container(plan: Plan, told: Job, workdir: Path) -> list[str]:
    """The container command, with all that the job reads and writes bound; Slurm's client stays outside, so it sees none."""
    site, software, storage = plan.site, plan.site.software, plan.config.storage
    if software.kind != "container" or not software.path:
        return []
    roots = [str(workdir / root) for root in (storage.weights, storage.data, storage.scratch) if root]
    make = ["bash", "-c", _MAKE_FOLDERS, "bash", *roots, "--"] if roots else []
    results = workdir / "results"
    own = [REPOSITORY, workdir, *([results.resolve()] if results.is_symlink() else []), *roots]
    folders = [*_outermost([*map(str, own), *outside_folders(told)]), *software.binds]
    binds = [word for folder in ("/dev/shm", *folders) for word in ("--bind", folder)]
    gpus = ["--nv"] if site.node.gpus else []
    return [*make, software.runtime, "exec", *gpus, *binds, software.path]


def _outermost(folders: list[str]) -> list[str]:
    """Those that lie in no other one, in their order, without repetition."""
    for folder in folders:
        if found := _UNBINDABLE & set(folder):
            raise UserError(
                f"software: {folder!r} holds {sorted(found)[0]!r}, which separates folders for the container command",
                "move it to a plainly named folder",
            )
    unique = list(dict.fromkeys(folders))
    return [f for f in unique if not any(f != other and Path(f).is_relative_to(other) for other in unique)]


def _launch(plan: Plan, request: SlurmRequest, title: str, folder: Path, workdir: Path) -> str:
    """Enters the working folder and the environment, and becomes the supervisor, in the Python that runs Snakemake."""
    site = plan.site
    return _template("sbatch/launch.sh.j2").render(
        title=title,
        workdir=_safe_path(workdir),
        modules=site.software.modules,
        environment=_environment(site, request),
        path_prefix=[f"{site.software.path}/bin"] if site.software.kind in ("venv", "conda") else [],
        python=sys.executable,
        job=folder / "launch.json",
    )


def _environment(site: Site, request: SlurmRequest) -> dict[str, str]:
    variables = {
        "PYTHONPATH": str(REPOSITORY / "workflow"),
        # Compute nodes have no internet: a library that tries it would hang until a time-out.
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": str(request.cpus_per_task),
    }
    if site.node.gpus:
        # Passes of changing sizes leave no holes that are too small for the next one. What torch's own trainers set:
        # https://github.com/pytorch/torchtitan/blob/main/run_train.sh
        variables["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    else:
        variables["DS_ACCELERATOR"] = "cpu"
    if interface := site.interconnect.socket_interface:
        variables |= {"NCCL_SOCKET_IFNAME": interface, "GLOO_SOCKET_IFNAME": interface}
    return variables | site.environment


def _by_hand(plan: Plan, request: SlurmRequest, title: str, folder: Path, log: str) -> dict[str, str]:
    """job.sbatch, where there is a Slurm to give it to."""
    if plan.site.scheduler != "slurm":
        return {}
    return {"job.sbatch": _sbatch(request, title, folder, folder.parents[1] / "logs" / f"{log}.log")}


def _sbatch(request: SlurmRequest, title: str, folder: Path, log: Path) -> str:
    options = _sbatch_options(request, title, log)
    return _template("sbatch/job.sbatch.j2").render(title=title, options=options, launch=str(folder / "launch.sh"))


def _sbatch_options(request: SlurmRequest, title: str, log: Path) -> dict[str, str]:
    options = {"--job-name": title.replace(": ", "-").replace(" ", "-")}
    return {**options, **request.as_sbatch(), "--output": f'"{_safe_path(log)}"'}


def _safe_path(path: Path) -> str:
    if found := _UNSAFE_IN_PATHS & set(str(path)):
        raise UserError(
            f"the working folder {str(path)!r} holds {sorted(found)[0]!r}", "run from a plainly named folder"
        )
    return str(path)


def _json(job: Job) -> str:
    return json.dumps(job.model_dump(mode="json", by_alias=True), indent=2) + "\n"


def _quoted(value: str) -> str:
    """Single-quoted whatever it holds: unquoted, `NAME==value` reads like a comparison."""
    return "'" + value.replace("'", "'\"'\"'") + "'"


def _template(name: str) -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    environment.filters["sh"] = lambda value: shlex.quote(str(value))
    environment.filters["sh_value"] = _quoted
    environment.filters["tojson"] = json.dumps
    return environment.get_template(name)
