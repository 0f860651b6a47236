"""A new step of the pipeline takes three files: a declaration, a rule, one line of the Snakefile."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

from tests.support.pipeline_run import REPOSITORY, SNAKEMAKE, PipelineRun, tiny_config

DECLARATION = '''
"""A step that counts the words of a file."""

from pathlib import Path

from longhaul.artifacts.atomic_files import write_json
from longhaul.artifacts.paths import JobId
from longhaul.jobs.job_kind import JobKind
from longhaul.jobs.job_spec import JobSpec
from longhaul.planning.slurm_request import cpu_request


class CountSpec(JobSpec):
    source: str
    out: str


def run(spec: CountSpec) -> None:
    write_json(Path(spec.out), {"words": len(Path(spec.source).read_text().split())})


KIND = JobKind(
    name="count",
    order=9,
    help="count words",
    spec=CountSpec,
    entry_point="longhaul.jobs.kinds.count_job:run",
    jobs=lambda plan: [JobId("count")],
    build_spec=lambda plan, job: CountSpec(
        run=plan.run, source=str(plan.loaded.path), out=str(plan.paths.folder / "count.json")
    ),
    request=lambda plan, job: cpu_request(plan.site, 5),
)
'''
RULE = """
rule count:
    output:
        "results/{run}/count.json",
    log:
        "results/{run}/logs/count.log",
    benchmark:
        "results/{run}/benchmarks/count.tsv"
    threads: JOBS.threads("count")
    resources:
        **JOBS.resources("count"),
    params:
        **JOBS.params("count"),
    shell:
        "bash {params.launch:q} >> {log:q} 2>&1"
"""


def test_an_added_step_runs_and_is_known_to_plan_and_cli(tmp_path: Path):
    checkout = tmp_path / "checkout"
    for name in ("workflow", "templates", "config", "profiles", "envs"):
        shutil.copytree(REPOSITORY / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPOSITORY / "Snakefile", checkout)
    (checkout / "workflow/longhaul/jobs/kinds/count_job.py").write_text(DECLARATION)
    (checkout / "workflow/rules/count.smk").write_text(RULE)
    snakefile = checkout / "workflow/Snakefile"
    snakefile.write_text(
        snakefile.read_text().replace(
            'include: "rules/report.smk"', 'include: "rules/report.smk"\ninclude: "rules/count.smk"'
        )
    )
    chain = PipelineRun(tmp_path / "run", tiny_config())
    environment = {**os.environ, "PYTHONPATH": str(checkout / "workflow")}

    def call(*words: str) -> str:
        done = subprocess.run(words, cwd=chain.folder, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr + chain.logs()
        return done.stdout

    where = [
        "-s",
        str(checkout / "Snakefile"),
        "--configfile",
        "run.yaml",
        "--profile",
        str(checkout / "profiles/local"),
    ]
    call(*SNAKEMAKE, *where, "results/tiny/count.json")
    assert json.loads((chain.results / "count.json").read_text())["words"] > 10
    assert (chain.results / "jobs/count/launch.sh").exists() and (chain.results / "benchmarks/count.tsv").exists()
    python = SNAKEMAKE[0]
    call(python, "-m", "longhaul", "job", "run", "count", str(chain.results / "jobs/count/job.json"))
    call(python, "-m", "longhaul", "plan", "run.yaml", "--out", "plan.json")
    assert "count" in [job["kind"] for job in json.loads((chain.folder / "plan.json").read_text())["jobs"]]
