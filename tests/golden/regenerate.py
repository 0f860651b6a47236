"""Render the stage of every <case>/run.yaml beside it, servers, and the headers of all jobs at every shipped site.

python -m tests.golden.regenerate (make generate)
"""

from __future__ import annotations

import json
import shlex
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from longhaul.artifacts.artifact_schemas import Lock, LockedSource
from longhaul.artifacts.atomic_files import write_text
from longhaul.artifacts.paths import SERVE_KIND, JobId
from longhaul.config.load_config import load_config, load_site
from longhaul.config.shipped_files import data_root
from longhaul.config.site_config import Site
from longhaul.config.well_known_models import REFERENCE_MODELS
from longhaul.jobs.job_kind import job_spec, jobs_of, jobs_on_demand
from longhaul.jobs.kinds.serve_job import ServeSpec, serving_plan
from longhaul.jobs.launch_files import RenderedFiles, render_controller, render_job, render_run
from longhaul.planning import Plan, build_plan
from longhaul.report.serving_table import serving_lines
from longhaul.scheduling.serve_verb import engine_commands
from tests.support.pipeline_run import REPOSITORY
from tests.support.small_configs import changed, write_config

GOLDEN = Path(__file__).parent
CASES = sorted(path.parent.name for path in GOLDEN.glob("*/run.yaml"))
SITES = sorted(
    path.stem
    for path in (data_root() / "config" / "sites").glob("*.yaml")
    if "scheduler: slurm" in path.read_text("utf-8")
)
H100_GIB, H200_GIB = 80, 140
SERVERS: dict[str, tuple[float, dict[str, Any]]] = {
    "deepseek-r1-fp8-h100": (H100_GIB, {}),
    "deepseek-r1-fp8-h200": (H200_GIB, {"stages.0.serve.context": 131072}),
    "deepseek-r1-bf16-h100": (H100_GIB, {"stages.0.export_dtype": "bf16", "stages.0.serve.nodes": 4}),
}
"""Memory of a GPU in GiB, and changes of config/examples/deepseek-r1-671b-serve.yaml."""
_SOURCES: dict[str, LockedSource] = {
    name: {"path": "/data", "files": ["/data/rows.jsonl"]} for name in ("tokenizer", "model", "traces")
}
WORKDIR = Path("/scratch/my-run")
SHOWN = ("launch.sh", "launch.json", "job.sbatch", "ds_config.json")


def rendered(case: str) -> dict[str, str]:
    """Return file name -> text of the case's stage, as if run in /scratch/my-run from a checkout in /opt/longhaul."""
    plan = build_plan(load_config(GOLDEN / case / "run.yaml"))
    files = render_job(plan, JobId("train", ("main",)), WORKDIR).files
    return {name: _with_example_paths(files[name]) for name in SHOWN if name in files}


def rendered_headers(site: str) -> str:
    """Return the sbatch options and the commands of every job of a run at a shipped site; training takes two nodes."""
    plan = _plan_at(site)
    lines: list[str] = []
    for job in (*jobs_of(plan), *jobs_on_demand(plan)):
        lines += ["", f"== {job}", *_header(render_job(plan, job, WORKDIR))]
    if plan.paths.folder in render_run(plan, WORKDIR):
        lines += ["", "== controller", *_header(render_controller(plan, WORKDIR))]
    return _with_example_paths("\n".join(lines).strip() + "\n")


def _plan_at(site: str) -> Plan:
    gpus = load_site(site, Path()).node.gpus
    stage = {"nodes": 2, "gpus_per_node": gpus, "global_batch_size": 2 * gpus}
    jobs = {"export": "last", "serve_check": {}, "evaluate": {"tasks": ["arc_easy"]}}
    config = {"site": site, "checks": {}, "scale_test.nodes": [1], "data_jobs.prose": 2}
    config |= {f"stages.0.{key}": value for key, value in {**stage, **jobs}.items()}
    lock = Lock({name: {"path": "/data", "files": [f"/data/{name}.jsonl"]} for name in ("prose", "chats")})
    with tempfile.TemporaryDirectory() as folder:
        loaded = load_config(write_config(Path(folder), config))
        return build_plan(replace(loaded, site=_with_this_python(loaded.site)), lock)


def _with_this_python(site: Site) -> Site:
    """Return the site with a Python of its engine that exists: the plan of a check looks for one that is named by its path."""
    python = (sys.executable,) if site.serving.python else ()
    return site.model_copy(update={"serving": site.serving.model_copy(update={"python": python})})


def rendered_server(case: str) -> str:
    """Return memory, sbatch options, the job's step, and the engine's commands of a server of DeepSeek-R1.

    Below them are the sbatch options and the steps of the check and of an evaluation of that server.
    """
    with tempfile.TemporaryDirectory() as folder:
        plan = build_plan(
            load_config(_write_example(Path(folder), *SERVERS[case])), Lock(_SOURCES, REFERENCE_MODELS["DeepSeek-R1"])
        )
    job = JobId(SERVE_KIND, ("sft",))
    spec = job_spec(plan, job)
    assert isinstance(spec, ServeSpec)
    lines = [f"{name}: {value}" for name, value in serving_lines(serving_plan(plan, "sft"))]
    lines += ["", *_header(render_job(plan, job, WORKDIR)), ""]
    lines += [f"node {rank + 1}: {shlex.join(command)}" for rank, command in enumerate(engine_commands(spec))]
    for job in (JobId("serve_check", ("sft",)), JobId("evaluate", ("sft", "trained", "arc_easy"))):
        lines += ["", f"== {job}", *_header(render_job(plan, job, WORKDIR))]
    return _with_example_paths("\n".join(lines) + "\n")


def _write_example(folder: Path, gpu_memory_gib: float, changes: dict[str, Any]) -> Path:
    example = REPOSITORY / "config" / "examples" / "deepseek-r1-671b-serve.yaml"
    config = yaml.safe_load(example.read_text("utf-8"))
    config["tokenizer"]["chat_template"] = str(example.parent / config["tokenizer"]["chat_template"])
    site = yaml.safe_load((REPOSITORY / "config" / "sites" / f"{config['site']}.yaml").read_text("utf-8"))
    site["partitions"][0]["node"]["gpu_memory_gib"] = gpu_memory_gib
    # The plan of a check looks for a Python that is named by its path.
    site["serving"]["python"] = ["apptainer", "exec", "--nv", "/images/vllm.sif", "python3"]
    path = folder / "run.yaml"
    jobs = {"serve_check": {}, "evaluate": {"tasks": ["arc_easy"], "engine": "server"}}
    checked = {f"stages.0.{key}": value for key, value in jobs.items()}
    path.write_text(yaml.safe_dump(changed(config, {"site": "./site.yaml", **checked, **changes})), "utf-8")
    (folder / "site.yaml").write_text(yaml.safe_dump(site), "utf-8")
    return path


def _header(files: RenderedFiles) -> Iterator[str]:
    """Yield the sbatch options of a job, and the beginning of each step's command: all before longhaul's own words."""
    script = next(text for name, text in files.files.items() if name.endswith(".sbatch"))
    yield from (line for line in script.splitlines() if line.startswith("#SBATCH"))
    steps = json.loads(files.files["launch.json"])["steps"] if "launch.json" in files.files else []
    for step in steps:
        words = step["command"][: step["command"].index("-m")]
        yield " ".join(json.dumps(word) if " " in word else word for word in words)


def _with_example_paths(text: str) -> str:
    # The interpreter first: it may be below the checkout.
    return text.replace(sys.executable, "/opt/venv/bin/python").replace(str(REPOSITORY), "/opt/longhaul")


if __name__ == "__main__":
    for case in CASES:
        for name, text in rendered(case).items():
            write_text(GOLDEN / case / name, text)
    for case in SERVERS:
        write_text(GOLDEN / "servers" / f"{case}.txt", rendered_server(case))
    for site in SITES:
        write_text(GOLDEN / "sites" / f"{site}.txt", rendered_headers(site))
