"""Verb `longhaul serve`: submits the job that serves an export, or runs it on this machine; shows its plan; stops it."""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import os
import shlex
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from longhaul.artifacts.artifact_schemas import Export
from longhaul.artifacts.endpoint import read_endpoint
from longhaul.artifacts.job_state import this_host
from longhaul.artifacts.leases import LeaseOwner
from longhaul.artifacts.paths import SERVE_KIND, JobFolder, JobId
from longhaul.artifacts.typed_json import read_typed_json
from longhaul.compat.slurm_plugin import job_comment
from longhaul.errors import UserError
from longhaul.jobs.job_kind import job_request, job_spec
from longhaul.jobs.kinds.serve_job import ServeSpec, serving_plan
from longhaul.jobs.launch_files import write_job_files
from longhaul.planning import Plan, model_config
from longhaul.planning.check_inference_engine import check_engine
from longhaul.report.serving_table import serving_table
from longhaul.report.slurm_queue_types import QueuedJob
from longhaul.scheduling import slurm_client
from longhaul.scheduling.read_job_queue import read_queue
from longhaul.scheduling.slurm_client import SlurmCommandError
from longhaul.serving.api_key import keep_key
from longhaul.serving.engine_version import check_packages_here
from longhaul.serving.engines import ENGINES, LOOPBACK
from longhaul.serving.run_server import server_of
from longhaul.serving.server_process import require_free_port

KEY_VARIABLE = "LONGHAUL_API_KEY"
"""Environment variable with the API key that the user wants; without it a random key is made."""
_POLL_S = 0.1
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


def serve(plan: Plan, stage: str) -> None:
    """Submit the job that serves a stage's export, or become it on a machine without Slurm.

    Raises:
        UserError: the stage has no export, the engine is missing or has no keys, its server runs, its port is in use on this
            machine, or Slurm refuses the job.
    """
    job = _job(plan, stage)
    _require_export(plan, stage)
    check_engine(plan.site)
    check_packages_here(plan.site.serving)
    _require_key_has_effect(plan)
    _require_no_server(plan, job)
    if plan.site.scheduler == "local":
        _own_server(plan, job)
    spec = _spec(plan, job)
    if spec.local and spec.port:
        require_free_port(LOOPBACK, spec.port)  # the job would look only after it has hashed the export
    folder = write_job_files(plan, job, Path.cwd())
    if spec.key_file:
        # Popped: the job's environment would hold it otherwise.
        keep_key(Path(spec.key_file), os.environ.pop(KEY_VARIABLE, None))
    # The user asks for another attempt, after any failure.
    folder.failure.unlink(missing_ok=True)
    if plan.site.scheduler == "slurm":
        _submit(plan, job, folder)
    else:
        os.execvp("bash", ["bash", str(folder.launch_script)])  # nosec B606, B607  # a file of this run; bash as in $PATH


def show(plan: Plan, stage: str) -> None:
    """Print the memory plan of a stage's server, its Slurm request, and the command of the engine on each node."""
    job = _job(plan, stage)
    console = Console(highlight=False)
    console.print(serving_table(stage, serving_plan(plan, stage)))
    if plan.site.scheduler == "slurm":
        print("sbatch options: " + " ".join(job_request(plan, job).options()))
    for rank, command in enumerate(engine_commands(_spec(plan, job))):
        print(f"node {rank + 1}: {shlex.join(command)}")


def engine_commands(spec: ServeSpec) -> list[tuple[str, ...]]:
    """Return the command of the engine on each node, with words in capitals for what is known only in the job."""
    first = "127.0.0.1" if spec.local or not spec.key_file else "FIRST_NODE"
    leader = (first, 1) if spec.nodes > 1 else None
    servers = [server_of(spec, Path("EXPORT"), first, spec.port or 0)]
    servers += [server_of(spec, Path("EXPORT"), "THIS_NODE", 0)] * (spec.nodes - 1)
    return [tuple(_in_capitals(server.command(rank, leader))) for rank, server in enumerate(servers)]


def _in_capitals(words: tuple[str, ...]) -> Iterator[str]:
    unknown = {("--port", "0"): "PORT", ("--master-port", "1"): "PORT_OF_JOB"}
    for previous, word in itertools.pairwise(("", *words)):
        yield unknown.get((previous, word), word).replace("FIRST_NODE:1", "FIRST_NODE:PORT_OF_JOB")


def stop(plan: Plan, stage: str) -> None:
    """Stop the server of a stage: cancel its Slurm job, or end its process on this machine.

    The config may have lost the stage, or its export, since the server was started.

    Raises:
        UserError: no server runs.
    """
    started = JobId(SERVE_KIND, (stage,))
    rendered = {folder.path for folder in plan.paths.job_folders()}  # a user's text may be no name of a folder
    job = started if plan.paths.job(started).path in rendered else _job(plan, stage)
    if plan.site.scheduler == "slurm":
        _cancel(plan, job)
        return
    owner = _local_server(plan, job)
    if owner is None:
        raise UserError(
            f"no {job} of run {plan.run} runs on {this_host()}", "use --stop on the host where the server was started"
        )
    os.kill(owner.pid, signal.SIGTERM)
    while not owner.is_dead():
        time.sleep(_POLL_S)
    print(f"stopped {owner}")


def _cancel(plan: Plan, job: JobId) -> None:
    queued = _queued(plan, job)
    if queued is None:
        raise UserError(
            f"no {job} of run {plan.run} is in Slurm's queue", f"longhaul status {plan.loaded.path} shows jobs"
        )
    slurm_client.cancel([queued.job_id])
    print(f"cancelled job {queued.job_id}")


def _job(plan: Plan, stage: str) -> JobId:
    names = [planned.name for planned in plan.stages]
    if stage not in names:
        raise UserError(f"run {plan.run} has no stage {stage!r}", f"use one of {', '.join(names)}")
    if stage not in plan.exported:
        raise UserError(
            f"stages.{stage}.export is none: there is nothing to serve", "set export to last or best, and run"
        )
    if model_config(plan.loaded, plan.lock) is None:
        raise UserError("the size of the model is not known yet", f"longhaul fetch {plan.loaded.path}")
    return JobId(SERVE_KIND, (stage,))


def _spec(plan: Plan, job: JobId) -> ServeSpec:
    spec = job_spec(plan, job)
    assert isinstance(spec, ServeSpec)
    return spec


def _require_export(plan: Plan, stage: str) -> None:
    path = plan.paths.export_manifest(stage)
    if not path.exists():
        raise UserError(f"{path} does not exist: stage {stage} is not exported yet", f"longhaul run {plan.loaded.path}")
    Export.read(path)


def _require_key_has_effect(plan: Plan) -> None:
    """Raise UserError if the user wants a key, and the engine answers everybody."""
    engine = plan.site.serving.engine
    if KEY_VARIABLE in os.environ and not ENGINES[engine].accepts_key:
        raise UserError(
            f"{KEY_VARIABLE} is set, but engine {engine} of site {plan.site.name} takes no API key: it would answer everybody on "
            "its node",
            f"unset {KEY_VARIABLE}, or set serving.engine in the site file to vllm or sglang",
        )


def _require_no_server(plan: Plan, job: JobId) -> None:
    if plan.site.scheduler == "slurm":
        if queued := _queued(plan, job):
            raise _serves_already(plan, job, f"job {queued.job_id} ({queued.state})")
    elif owner := _local_server(plan, job):
        raise _serves_already(plan, job, str(owner))


def _serves_already(plan: Plan, job: JobId, server: str) -> UserError:
    stage = job.names[0]
    return UserError(
        f"{server} serves stage {stage} already", f"stop it first: longhaul serve {plan.loaded.path} {stage} --stop"
    )


def _own_server(plan: Plan, job: JobId) -> None:
    """Lock the server of a stage until this process ends, also after it has become the supervisor.

    endpoint.json comes later: the job first hashes the export. Two servers would overwrite each other's files.

    Raises:
        UserError: another process has the lock.
    """
    path = plan.paths.job(job).server_lock
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    if not _lock(handle):
        raise _serves_already(plan, job, "another process")
    os.set_inheritable(handle, True)  # the launch script gets it, and the supervisor from that; the engine does not
    os.truncate(handle, 0)
    os.write(handle, json.dumps(asdict(LeaseOwner.this_process())).encode())


def _starting_server(path: Path) -> LeaseOwner | None:
    """Return the process that has locked the server; None if no process has, or it has not written its name yet."""
    if not path.exists():
        return None
    handle = os.open(path, os.O_RDWR)
    try:
        with suppress(UserError):
            return None if _lock(handle) else read_typed_json(path, LeaseOwner)
    finally:
        os.close(handle)


def _lock(handle: int) -> bool:
    """Lock an open file for this process. Return False if another process has locked it.

    On a file system without locks, such as Lustre that is mounted without `flock`, nothing is known of other processes.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    return True


def _queued(plan: Plan, job: JobId) -> QueuedJob | None:
    return read_queue(plan.paths, [job]).find(str(job), None) if plan.paths.folder.is_dir() else None


def _local_server(plan: Plan, job: JobId) -> LeaseOwner | None:
    """Return the process that serves on this machine, or is about to."""
    folder = plan.paths.job(job)
    endpoint = read_endpoint(folder.endpoint)
    owner = endpoint.owner if endpoint else _starting_server(folder.server_lock)
    return owner if owner and owner.host == this_host() else None


def _submit(plan: Plan, job: JobId, folder: JobFolder) -> None:
    comment = job_comment(job.kind, (plan.run, *job.names))
    try:
        job_id = slurm_client.submit([f"--comment={comment}"], folder.sbatch_script)
    except SlurmCommandError as error:
        raise UserError(f"Slurm refuses the job: {error}", f"longhaul site check {plan.loaded.path}") from None
    print(f"submitted job {job_id}; its log is {plan.paths.log(job)}")
    print(f"where it answers: longhaul status {plan.loaded.path}, or {plan.paths.job(job).endpoint}")
