"""`longhaul site check`: sbatch is asked once for each different request, and its answer is shown."""

from __future__ import annotations

from pathlib import Path

import pytest

from longhaul.cli import main
from longhaul.config.init_files import names_in
from longhaul.config.load_config import SITES, load_site
from longhaul.config.site_serving_config import ENGINE_PACKAGES
from longhaul.errors import UserError
from longhaul.jobs.job_kind import job_kinds
from longhaul.scheduling.check_site import check_run, check_site, example_plan, print_answers
from tests.support.check_user_errors import refused_message
from tests.support.small_configs import LOCAL, SITE, plan_of, write_config
from tests.support.supervised_job import fake_program

CORES = {"jobs": ["cpu"], "name": "cores", "account": "poor", "max_minutes": 60, "node": {"cpus": 8, "memory_mb": 8000}}
SBATCH = """#!/bin/sh
echo "$*" >> "{log}"
case "$*" in
  *--account=poor*) echo "sbatch: error: Batch job submission failed: Invalid account" >&2; exit 1;;
esac
echo "sbatch: Job 24 to start at 2026-11-28T18:00:00 using 8 processors on nodes n1 in partition gpu" >&2
"""


def test_every_different_request_is_tried_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    log = tmp_path / "log"
    monkeypatch.setenv("PATH", fake_program(tmp_path, "sbatch", SBATCH.format(log=log)))
    gpu = {**SITE["partitions"][0], "jobs": ["gpu", "debug"]}
    found = check_run(plan_of(tmp_path, None, {"partitions": [gpu, CORES]}))
    calls = log.read_text().splitlines()
    assert len(calls) == len(found) and all(call.startswith("--test-only ") for call in calls)
    accepted = {answer.jobs: answer.is_accepted for answer in found}
    assert accepted == {
        "environment, fabric": True,
        "tokenizer, tokenize-chats, tokenize-prose": False,
        "count_chats-chats": False,
        "train-base, train-chat": True,
        "controller": False,
    }
    refused = next(answer for answer in found if not answer.is_accepted)
    assert refused.text == "Batch job submission failed: Invalid account" and "correct account" in refused.remedy
    print_answers(found, "each job of run small")
    printed = capsys.readouterr().out
    assert "NO" in printed and "correct account of the partition" in printed


def test_verb_does_not_promise_to_submit_what_slurm_may_accept_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    script = "#!/bin/sh\necho 'allocation failure: Unable to contact slurm controller (connect failure)' >&2; exit 1\n"
    monkeypatch.setenv("PATH", fake_program(tmp_path, "sbatch", script))
    found = check_run(plan_of(tmp_path, None, {"partitions": SITE["partitions"]}))
    assert {answer.remedy for answer in found} == {"Slurm may accept it later; the same command asks again"}


def test_a_machine_of_no_cluster_is_named_once_until_a_login_node_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    said = (
        "sbatch: error: fetch_config: DNS SRV lookup failed\nsbatch: fatal: Could not establish a configuration source"
    )
    monkeypatch.setenv("PATH", fake_program(tmp_path, "sbatch", f"#!/bin/sh\necho '{said}' >&2; exit 1\n"))
    with pytest.raises(UserError, match=r"finds no cluster from this machine.*\s+remedy: call this on a login node"):
        check_run(plan_of(tmp_path, None, {"partitions": SITE["partitions"]}))
    fake_program(tmp_path, "sbatch", SBATCH.format(log=tmp_path / "log"))
    assert all(answer.is_accepted for answer in check_run(plan_of(tmp_path)))


def test_the_request_of_a_planned_server_is_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", fake_program(tmp_path, "sbatch", SBATCH.format(log=tmp_path / "log")))
    changes = {"stages.0.export": "last", "stages.1.export": "last", "stages.1.serve": {"nodes": 3, "gpus_per_node": 8}}
    model = {
        "model.llama.num_attention_heads": 8,
        "model.llama.num_key_value_heads": 8,
        "model.llama.num_hidden_layers": 3,
    }
    found = check_run(plan_of(tmp_path, {**changes, **model}, {"serving": {"engine": "vllm"}}))
    (server,) = [answer for answer in found if "serve" in answer.jobs]
    assert server.jobs == "serve-chat" and (server.request.nodes, server.request.gpus_per_node) == (3, 8)


def test_bare_site_file_is_asked_for_every_kind_of_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    log = tmp_path / "log"
    monkeypatch.setenv("PATH", fake_program(tmp_path, "sbatch", SBATCH.format(log=log)))
    gpu = {**SITE["partitions"][0], "jobs": ["gpu", "debug"]}
    site = plan_of(tmp_path, None, {"partitions": [gpu, CORES]}).site
    found = {answer.jobs: answer for answer in check_site(site)}
    kinds = {name.strip() for jobs in found for name in jobs.split(",")}
    asks_as_serve, step_of_the_fabric_check = "serve_check", "nccl_tests"
    assert kinds >= {"controller", *job_kinds()} - {asks_as_serve, step_of_the_fabric_check}
    assert {jobs for jobs, answer in found.items() if not answer.is_accepted} == {
        "tokenizer, index_sources, encode, tokenize, export",
        "count_chats",
        "controller",
    }
    train = found["train"].request
    assert (train.nodes, train.gpus_per_node, train.minutes) == (2, 8, 30)
    largest = found["train, with max_nodes and max_minutes"].request
    assert (largest.nodes, largest.gpus_per_node, largest.minutes) == (16, 8, 1440)


@pytest.mark.parametrize("engine", ENGINE_PACKAGES)
@pytest.mark.parametrize("name", names_in(SITES))
def test_every_shipped_site_has_an_example_plan(name: str, engine: str, tmp_path: Path):
    site = load_site(name, tmp_path)
    plan = example_plan(site.model_copy(update={"serving": site.serving.model_copy(update={"engine": engine})}))
    assert all(stage.stage.gpus_per_node in (2, plan.site.node.gpus) for stage in plan.stages)


def test_site_without_slurm_is_refused_until_one_with_slurm_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    plan = plan_of(tmp_path, None, LOCAL)
    with pytest.raises(UserError, match="scheduler: local"):
        check_run(plan)
    with pytest.raises(UserError, match="scheduler: local"):
        check_site(plan.site)
    monkeypatch.setenv("PATH", fake_program(tmp_path, "sbatch", SBATCH.format(log=tmp_path / "log")))
    assert check_run(plan_of(tmp_path)) and check_site(plan_of(tmp_path).site)


def test_verb_takes_a_config_or_a_site_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("PATH", fake_program(tmp_path, "sbatch", SBATCH.format(log=tmp_path / "log")))
    config = write_config(tmp_path)
    for file, job, subject in (
        (config, "train-base", "each job of run small;"),
        (tmp_path / "site.yaml", "train", "each kind of job on up to 2 nodes of site centre,"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(["site", "check", str(file)])
        printed = capsys.readouterr().out
        assert ended.value.code == 0 and job in printed and "pretrain" not in printed, "the demo's stages"
        assert printed.startswith(f"Slurm was asked for {subject}") and "no job was submitted" in printed
        assert "could start at" in printed and "Job 24" not in printed, "nobody finds that job in the queue"


@pytest.mark.parametrize(
    ("enforced", "is_checked"), [("none", False), ("nosteps", False), ("associations,limits,qos", True)]
)
def test_an_account_that_slurm_does_not_check_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], enforced: str, is_checked: bool
):
    fake_program(tmp_path, "sbatch", SBATCH.format(log=tmp_path / "log"))
    config = f"#!/bin/sh\necho 'AccountingStorageEnforce = {enforced}'\n"
    monkeypatch.setenv("PATH", fake_program(tmp_path, "scontrol", config))
    answers = check_run(plan_of(tmp_path, None, {"partitions.0.account": "rich"}))
    print_answers(answers, "each job of run small")
    assert ("not checked: account rich" in capsys.readouterr().out) is not is_checked


@pytest.mark.parametrize(
    ("account", "enforced", "note"),
    [(None, "associations", True), ("rich", "associations", False), (None, "none", False)],
)
def test_partition_without_an_account_beside_one_with_an_account_is_named(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    account: str,
    enforced: str,
    note: bool,
):
    """Slurm accepts such jobs, and charges another budget."""
    fake_program(tmp_path, "sbatch", SBATCH.format(log=tmp_path / "log"))
    config = f"#!/bin/sh\necho 'AccountingStorageEnforce = {enforced}'\n"
    monkeypatch.setenv("PATH", fake_program(tmp_path, "scontrol", config))
    gpu = {**SITE["partitions"][0], "jobs": ["gpu", "debug"], "account": "rich"}
    answers = check_run(plan_of(tmp_path, None, {"partitions": [gpu, {**CORES, "account": account}]}))
    print_answers(answers, "each job of run small")
    printed = " ".join(capsys.readouterr().out.split())
    jobs = "tokenizer, tokenize-chats, tokenize-prose, count_chats-chats, controller"
    assert (f"without an account: {jobs}. Slurm charges your default" in printed) is note
    assert ("set account in each partition, or in none" in printed) is note


@pytest.mark.parametrize(("account", "code"), [("rich", 0), ("poor", 1)])
def test_plan_asks_slurm_on_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], account: str, code: int
):
    log = tmp_path / "log"
    monkeypatch.setenv("PATH", fake_program(tmp_path, "sbatch", SBATCH.format(log=log)))
    config = str(write_config(tmp_path, None, {"partitions.0.account": account}))
    for options in ([], ["--out", str(tmp_path / "plan.json")]):
        with pytest.raises(SystemExit) as ended:
            main(["plan", config, *options])
        assert not ended.value.code and "Slurm says" not in capsys.readouterr().out
    assert not log.exists(), "only on request"
    for options in ([], ["--out", str(tmp_path / "plan.json")]):
        with pytest.raises(SystemExit) as ended:
            main(["plan", config, "--test-only", *options])
        printed = capsys.readouterr().out
        assert (ended.value.code or 0) == code and "What Slurm says to each request" in printed
        assert ("could start at" in printed) == (code == 0)
        assert "Slurm requests" in printed or "train-base" in printed
    assert len(log.read_text().splitlines()) > 2


def test_plan_without_slurm_cannot_ask_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config = str(write_config(tmp_path, None, LOCAL))
    message = refused_message(capsys, "plan", config, "--test-only")
    assert "has scheduler: local" in message
