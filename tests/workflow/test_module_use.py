"""Another workflow uses longhaul as a module, as snakedeploy writes it."""

from __future__ import annotations

import re
import subprocess
import textwrap
from pathlib import Path

from tests.support.pipeline_run import REPOSITORY, SNAKEMAKE, PipelineRun, tiny_config

USER = """
from snakemake.utils import min_version

min_version("9.27")

configfile: "run.yaml"

module longhaul:
    snakefile:
        "{snakefile}"
    config:
        config

use rule * from longhaul
"""


def start(chain: PipelineRun, *words: str) -> subprocess.CompletedProcess[str]:
    command = [*SNAKEMAKE, "--cores", "4", "--executor", "local", "--nolock", *words]
    return subprocess.run(
        command, cwd=chain.folder, env=chain.environment(), capture_output=True, text=True, check=False
    )


def test_a_module_runs_jobs_with_the_users_config_file(tmp_path: Path):
    """Snakemake ignores the hooks of a module; without them no launch script would be written."""
    chain = PipelineRun(tmp_path, tiny_config())
    (tmp_path / "Snakefile").write_text(USER.format(snakefile=REPOSITORY / "workflow" / "Snakefile"))
    done = start(chain, "results/tiny/tokenizer.json")
    assert done.returncode == 0, done.stdout + done.stderr + chain.logs()
    assert (chain.results / "tokenizer.json").exists() and (chain.results / "jobs/tokenizer/launch.sh").exists()
    assert "results/tiny/report.html" in start(chain, "-n").stdout


def test_a_second_config_file_is_refused(tmp_path: Path):
    chain = PipelineRun(tmp_path, tiny_config())
    (tmp_path / "Snakefile").write_text(USER.format(snakefile=REPOSITORY / "workflow" / "Snakefile"))
    (tmp_path / "other.yaml").write_text((tmp_path / "run.yaml").read_text())
    done = start(chain, "-n", "--configfile", "other.yaml")
    assert done.returncode != 0 and "2 config files are named" in done.stdout + done.stderr


def test_the_snakefile_of_the_guide_adds_its_rule(tmp_path: Path):
    """A rule of the guide must not have the name of a rule of longhaul."""
    chain = PipelineRun(tmp_path, tiny_config())
    guide = (REPOSITORY / "docs/how-to/call-as-a-module.md").read_text(encoding="utf-8")
    block = re.search(r"```python\n(.*?) *```", guide, flags=re.DOTALL)
    assert block
    text = textwrap.dedent(block[1]).replace("/path/to/longhaul", str(REPOSITORY)).replace("mine.yaml", "run.yaml")
    (tmp_path / "Snakefile").write_text(text.replace("results/my-run", "results/tiny").replace("chat", "base"))
    done = start(chain, "-n")
    assert done.returncode == 0 and "rule my_evaluation:" in done.stdout + done.stderr, done.stdout + done.stderr
