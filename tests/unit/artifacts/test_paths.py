"""Paths below results/: spelled in one module, and in the rules exactly as there."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest

from longhaul.artifacts import paths
from longhaul.artifacts.paths import JobFolder, JobId, RunPaths, WeightsFolder, job_of, run_of
from longhaul.config.shipped_files import PACKAGE
from longhaul.jobs.job_kind import job_kinds
from tests.support.pipeline_run import REPOSITORY

PATHS = PACKAGE / "artifacts" / "paths.py"
# Names that Hugging Face gives to files of its own, too.
SHARED_NAMES = {"tokenizer.json", "config.yaml"}
# Ranges of hosts and cores, and temporary folders; not job names.
SPLITS_AT_HYPHENS = {"runtime/rendezvous.py", "runtime/rank_placement.py", "data/shards/write_chunk.py"}


def modules() -> list[Path]:
    return [path for path in PACKAGE.rglob("*.py") if path != PATHS]


def texts(module: Path) -> list[tuple[int, str]]:
    """Return the string literals of a module with their lines, docstrings left out."""
    tree = ast.parse(module.read_text(encoding="utf-8"))
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    statements = [node for owner in ast.walk(tree) if isinstance(owner, owners) for node in owner.body]
    docstrings = {id(node.value) for node in statements if isinstance(node, ast.Expr)}
    constants = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return [(node.lineno, str(node.value)) for node in constants if id(node) not in docstrings]


def file_names() -> set[str]:
    """Return every file name that paths.py spells as a whole."""
    return {text for _, text in texts(PATHS) if re.fullmatch(r"[\w.]+\.(json|jsonl|sh|sbatch|html|beat)", text)}


def test_no_other_module_spells_a_file_below_results():
    names = file_names() - SHARED_NAMES
    assert {"state.json", "failure.json", "launch.sh", "metrics.jsonl", "report.html"} <= names
    found = [
        f"{module.relative_to(PACKAGE)}:{line}: {text!r}"
        for module in modules()
        for line, text in texts(module)
        if text in names or text.startswith("results/")
    ]
    assert found == []


def test_no_other_module_decodes_a_job_name():
    decoding = re.compile(r"""\.r?(partition|split)\(["']-["']""")
    found = {str(m.relative_to(PACKAGE)) for m in modules() if decoding.search(m.read_text(encoding="utf-8"))}
    assert found <= SPLITS_AT_HYPHENS


def placeholder(wildcard: str) -> str:
    return wildcard if wildcard == "of" else f"{{{wildcard}}}"


def spelled_by_run_paths() -> set[str]:
    """Return what RunPaths and JobFolder answer for a run, jobs and stages that are named like the rules' wildcards."""
    run = RunPaths("{run}")
    jobs = [JobId(kind.name, tuple(map(placeholder, kind.wildcards))) for kind in job_kinds().values()]
    jobs += [JobId("render"), JobId("report"), JobId("fetch"), JobId("render_result_spec", ("{stage}",))]
    answers: set[object] = set()
    for owner in (run, run.stage("{stage}")):
        for name, member in inspect.getmembers(type(owner)):
            if isinstance(member, property):
                answers.add(getattr(owner, name))
            elif inspect.isfunction(member) and not name.startswith("_"):
                wanted = list(inspect.signature(member).parameters)[1:]
                if wanted == ["job"]:
                    answers.update(member(owner, job) for job in jobs)
                elif wanted and all(
                    w in ("dataset", "stage", "partition", "partitions", "model", "task", "nodes") for w in wanted
                ):
                    answer = member(owner, *map(placeholder, wanted))
                    answers.update(answer if isinstance(answer, list) else [answer])
    return {str(answer) for answer in answers if isinstance(answer, Path)}


@pytest.mark.parametrize("rules", sorted((REPOSITORY / "workflow" / "rules").glob("*.smk")), ids=lambda path: path.stem)
def test_rules_spell_the_same_paths(rules: Path):
    written = {
        text.replace("{{", "{").replace("}}", "}") for text in re.findall(r'"(results/[^"]+)"', rules.read_text())
    }
    assert written - spelled_by_run_paths() == set()


def test_a_job_has_one_name_everywhere():
    run = RunPaths("r")
    assert run.job(JobId("environment")).path == Path("results/r/jobs/environment")
    assert run.job(JobId("train", ("base",))) == run.stage("base")
    assert run.log(JobId("encode", ("web", "1", "of", "2"))) == Path("results/r/logs/encode/web-1-of-2.log")
    for job in (JobId("export", ("chat",)), JobId("train", ("base",)), JobId("environment")):
        folder = run.job(job).path
        assert job_of(folder) == str(job) and run_of(folder) == run


def test_the_newest_step_is_that_of_a_complete_checkpoint(tmp_path: Path):
    assert WeightsFolder.newest_step(tmp_path) == 0
    for weights, step, is_complete in (("a", 10, True), ("b", 30, False), ("b", 20, True)):
        folder = WeightsFolder(tmp_path / weights).checkpoint(step)
        folder.mkdir(parents=True)
        if is_complete:
            (folder / "manifest.json").write_text("{}")
    assert WeightsFolder.newest_step(tmp_path) == 20


def test_job_folders_lists_both_kinds(tmp_path: Path):
    run = RunPaths("r", tmp_path)
    wanted = [run.job(JobId("environment")), run.stage("base")]
    for folder in wanted:
        folder.path.mkdir(parents=True)
    assert list(run.job_folders()) == wanted and isinstance(wanted[0], JobFolder)
    assert Path("results") == paths.RESULTS
