"""Settings of the rules: resources, threads and parameters of a job, as Snakemake evaluates them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from longhaul.artifacts.artifact_schemas import Lock
from longhaul.artifacts.paths import RESULTS, JobId
from longhaul.compat.slurm_plugin import SlurmActions
from longhaul.errors import UserError
from longhaul.planning import Plan
from longhaul.planning.slurm_request import SlurmRequest
from longhaul.scheduling import slurm_client, snakefile_functions
from longhaul.scheduling.snakefile_functions import ALL_CORES, RuleSettings
from tests.support.run_with_fake_engine import FAKE_VLLM
from tests.support.small_configs import LLAMA, plan_of

BASE, CHAT = SimpleNamespace(stage="base"), SimpleNamespace(stage="chat")


@pytest.fixture
def submitted(monkeypatch: pytest.MonkeyPatch) -> list[JobId]:
    """Record the jobs whose state is read for a request."""
    jobs: list[JobId] = []
    original = snakefile_functions.submitted_request

    def recorded(plan: Plan, job: JobId, workdir: Path) -> SlurmRequest:
        jobs.append(job)
        return original(plan, job, workdir)

    monkeypatch.setattr(snakefile_functions, "submitted_request", recorded)
    return jobs


def test_folder_that_cannot_be_written_is_refused_until_another_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The check's answer is replaced for one folder: file modes do not restrict root."""
    monkeypatch.chdir(tmp_path)
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path and access(path, mode))
    with pytest.raises(
        UserError, match=rf"cannot write to {tmp_path}\s+remedy: name a folder of your own with --directory"
    ):
        snakefile_functions._check_results_folder(RESULTS)
    (tmp_path / "own").mkdir()
    monkeypatch.chdir("own")  # as --directory does
    assert snakefile_functions._check_results_folder(RESULTS) == tmp_path / "own"


def test_all_resources_of_a_job_come_from_one_reading_of_its_state(tmp_path: Path, submitted: list[JobId]):
    resources = RuleSettings(plan_of(tmp_path)).resources("train")
    values = {key: value(BASE) for key, value in resources.items()}
    assert submitted == [JobId("train", ("base",))]
    assert (values["nodes"], values["runtime"], values["slurm_partition"]) == (1, 60, "gpu")
    assert values["constraint"] is None, "a key that the request does not have"


def test_another_job_and_a_later_submission_read_the_state_again(
    tmp_path: Path, submitted: list[JobId], monkeypatch: pytest.MonkeyPatch
):
    """A retry must see the quarantine of the attempt before it."""
    now_s = 100.0
    monkeypatch.setattr(snakefile_functions.time, "monotonic", lambda: now_s)
    nodes = RuleSettings(plan_of(tmp_path)).resources("train")["nodes"]
    nodes(BASE), nodes(CHAT), nodes(CHAT)
    assert [str(job) for job in submitted] == ["train-base", "train-chat"]
    now_s = 102.0
    nodes(CHAT)
    assert [str(job) for job in submitted] == ["train-base", "train-chat", "train-chat"]


HUB_MODEL = {"model": {"pretrained": {"hub": {"id": "org/model"}}}, "stages.0.export": "last"}
LOCK = Lock(model={"model_type": "llama", "tie_word_embeddings": False, **LLAMA})
WHOLE_NODES = {"serving": FAKE_VLLM, "partitions.0.exclusive": True}


def test_a_server_is_requested_with_the_size_that_fetch_found_in_this_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    plan = plan_of(tmp_path, {**HUB_MODEL, "stages.0.serve_check": {}}, WHOLE_NODES)

    def gpus() -> str:
        return str(RuleSettings(plan).resources("serve_check")["slurm_extra"](BASE))

    assert "--gpus-per-node=1 " in gpus(), "the layout follows from the size of the model"
    lock = tmp_path / plan.paths.lock
    lock.parent.mkdir(exist_ok=True)
    lock.write_text("{")
    assert "--gpus-per-node=1 " in gpus(), "the jobs that read the lock name its fault"
    LOCK.write(lock)
    assert "--gpus-per-node=8 " in gpus()


def test_before_fetch_a_server_has_the_size_that_the_config_names(tmp_path: Path):
    serve = {"stages.0.serve_check": {}, "stages.0.serve": {"nodes": 2, "gpus_per_node": 4}}
    resources = RuleSettings(plan_of(tmp_path, {**HUB_MODEL, **serve}, WHOLE_NODES)).resources("serve_check")
    assert resources["nodes"](BASE) == 2 and "--gpus-per-node=4 " in str(resources["slurm_extra"](BASE))


def test_a_run_prints_the_warnings_of_stages_that_will_train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """A person may start a run without reading its plan."""
    monkeypatch.chdir(tmp_path)
    plan = plan_of(tmp_path, {"stages.0.minutes": 20}, {"checkpoint_write_gb_per_s": 1e-5})
    (warning,) = plan.stages[0].warnings
    assert "longer than recovery.stop_margin_s" in warning
    snakefile_functions._print_changes_and_warnings(plan)
    assert f"warning: {warning}\n" in capsys.readouterr().err
    kept = [SimpleNamespace(stage=stage.name, action=snakefile_functions.KEPT) for stage in plan.stages]
    monkeypatch.setattr(snakefile_functions, "stage_changes", lambda plan: kept)
    snakefile_functions._print_changes_and_warnings(plan)
    assert capsys.readouterr().err == ""


def test_threads_are_the_cores_of_this_machine_or_one_on_a_cluster(tmp_path: Path):
    local = {
        "scheduler": "local",
        "partitions.0.max_nodes": 1,
        "partitions.0.node.cpus": 8,
        "partitions.0.node.gpus": 0,
        "accelerator": "cpu",
    }
    changes = {"stages.0.gpus_per_node": 2}
    assert RuleSettings(plan_of(tmp_path / "here", changes, local)).threads("train")(BASE) == 2
    assert RuleSettings(plan_of(tmp_path / "cluster", changes)).threads("train")(BASE) == 1
    assert RuleSettings(plan_of(tmp_path / "cpu", changes, local)).threads("tokenizer")(SimpleNamespace()) == 8


def test_a_local_job_with_gpus_takes_all_cores_so_that_no_other_uses_its_gpus(tmp_path: Path):
    local = {"scheduler": "local", "partitions.0.max_nodes": 1, "partitions.0.node.cpus": 8}
    settings = RuleSettings(plan_of(tmp_path, {"stages.0.gpus_per_node": 1}, local))
    jobs = (("train", BASE), ("environment", SimpleNamespace()), ("export", BASE))
    assert [settings.threads(kind)(wildcards) for kind, wildcards in jobs] == [ALL_CORES] * 3


_RULE = """
rule {name}:
    output: "{name}"
    threads: lambda wildcards: {cores}
    shell: "mkdir running && touch {{output}} && rmdir running"
"""


def test_snakemake_runs_a_job_that_wants_all_cores_alone(tmp_path: Path):
    """With more cores than any machine has: two jobs at once would make the folder twice."""
    rules = [_RULE.format(name=name, cores=ALL_CORES) for name in ("a", "b")]
    (tmp_path / "Snakefile").write_text("rule all:\n    input: 'a', 'b'\n" + "".join(rules))
    command = [sys.executable, "-m", "snakemake", "--cores", "9000"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stderr.count("threads: 9000") == 2, done.stderr


def test_params_are_the_launch_script_and_a_hash_of_the_spec(tmp_path: Path):
    def spec(changes: dict[str, object]) -> str:
        return RuleSettings(plan_of(tmp_path, changes)).params("export")["spec"](BASE)

    params = RuleSettings(plan_of(tmp_path)).params("export")
    assert params["launch"](BASE) == "results/small/jobs/export-base/launch.sh"
    assert spec({}) == spec({"data_minutes": 77}) != spec({"stages.0.export_dtype": "fp32"})


@pytest.mark.parametrize(
    ("site", "answer"),
    [({}, "requeued 7"), ({"requeue": False}, "the site forbids requeue")],
    ids=["allowed", "forbidden"],
)
def test_a_preempted_job_is_requeued_where_the_site_allows_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, site: dict[str, bool], answer: str
):
    given: list[SlurmActions] = []
    monkeypatch.setattr(snakefile_functions.snakemake, "ignore_order_only_inputs", lambda: None)
    monkeypatch.setattr(snakefile_functions.snakemake, "limit_retries", lambda allowed: None)
    monkeypatch.setattr(snakefile_functions.slurm_plugin, "patch_check_active_jobs", given.append)
    monkeypatch.setattr(slurm_client, "requeue", lambda job_id: f"requeued {job_id}")
    snakefile_functions.patch_snakemake(plan_of(tmp_path, site=site), is_main_process=True)
    assert given[0].requeue("7") == answer and given[0].preempted_jobs is slurm_client.preempted_jobs


def test_plan_is_written_before_the_first_job_and_keeps_its_time_while_it_is_current(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    path = plan_of(tmp_path).paths.plan
    snakefile_functions._write_changed_plan(plan_of(tmp_path))
    first = path.read_bytes()
    os.utime(path, (1, 1))
    snakefile_functions._write_changed_plan(plan_of(tmp_path))
    assert path.stat().st_mtime == 1 and path.read_bytes() == first
    snakefile_functions._write_changed_plan(plan_of(tmp_path, {"data_minutes": 7}))
    assert path.stat().st_mtime > 1 and path.read_bytes() != first
    path.write_text("{")
    snakefile_functions._write_changed_plan(plan_of(tmp_path))
    assert path.read_bytes() == first
