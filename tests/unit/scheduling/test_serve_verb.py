"""`longhaul serve` submits a job, refuses before it does so, and finds the job to cancel."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from longhaul.artifacts.artifact_schemas import Lock
from longhaul.artifacts.endpoint import Endpoint
from longhaul.artifacts.leases import LeaseOwner, process_start
from longhaul.artifacts.paths import JobId
from longhaul.cli import main
from longhaul.errors import UserError
from longhaul.planning import Plan, check_inference_engine
from longhaul.scheduling import serve_verb, slurm_client
from longhaul.scheduling.slurm_client import QueueEntry, SlurmCommandError
from longhaul.serving.api_key import create_key_file, keep_key, read_key_file
from tests.support.pipeline_run import REPOSITORY
from tests.support.run_with_fake_engine import FAKE_VLLM, KEY, ServedRun
from tests.support.small_configs import DEEPSEEK, LLAMA, LOCAL, plan_of
from tests.support.supervised_job import fake_program

COMMENT = "rule_serve_wildcards_small_base"


class FakeSlurm:
    """Records submissions and cancellations. `queue` is what squeue lists."""

    def __init__(self) -> None:
        self.submitted: list[tuple[list[str], Path, str | None]] = []
        self.cancelled: list[str] = []
        self.queue: list[QueueEntry] = []
        self.refusal = ""

    def submit(self, options: list[str], script: Path) -> str:
        if self.refusal:
            raise SlurmCommandError(self.refusal)
        self.submitted.append((options, script, os.environ.get(serve_verb.KEY_VARIABLE)))
        return "17"


@pytest.fixture
def slurm(monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    fake = FakeSlurm()
    monkeypatch.setattr(slurm_client, "submit", fake.submit)
    monkeypatch.setattr(slurm_client, "cancel", fake.cancelled.extend)
    monkeypatch.setattr(slurm_client, "queue_of", lambda *_: fake.queue)
    return fake


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plan:
    monkeypatch.chdir(tmp_path)
    ServedRun(tmp_path, {}, {}).write_export()
    return plan_of(tmp_path, {"stages.0.export": "last"}, {"serving": FAKE_VLLM})


def test_the_job_is_submitted_with_its_comment_and_without_the_key(
    plan: Plan, slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv(serve_verb.KEY_VARIABLE, KEY)
    serve_verb.serve(plan, "base")
    folder = Path.cwd() / "results/small/jobs/serve-base"
    assert slurm.submitted == [([f"--comment={COMMENT}"], folder / "job.sbatch", None)]
    assert read_key_file(folder / "api_key.yaml") == KEY
    assert (folder / "launch.sh").exists() and Path("results/small/logs/serve").is_dir()
    printed = capsys.readouterr().out
    assert printed.startswith("submitted job 17;") and KEY not in printed


def test_a_random_key_is_made_once(plan: Plan, slurm: FakeSlurm):
    key_file = Path("results/small/jobs/serve-base/api_key.yaml")
    serve_verb.serve(plan, "base")
    first = read_key_file(key_file)
    serve_verb.serve(plan, "base")
    assert read_key_file(key_file) == first and len(first) == 64


def test_a_key_of_a_wrong_form_is_refused(tmp_path: Path):
    path = tmp_path / "key.yaml"
    create_key_file(path)
    for wrong in ("short", "a b" * 10, "x" * 20 + "\nadmin: y", "-" + "x" * 20):
        with pytest.raises(UserError, match="16 to 256 letters"):
            keep_key(path, wrong)
    assert len(read_key_file(path)) == 64, "the earlier key stays"
    keep_key(path, "letters_and-digits" * 2)
    assert read_key_file(path) == "letters_and-digits" * 2


def test_a_key_is_refused_where_the_engine_takes_none_until_it_is_unset_or_the_engine_is_another(
    tmp_path: Path, plan: Plan, slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv(serve_verb.KEY_VARIABLE, KEY)
    with pytest.raises(
        UserError, match="LONGHAUL_API_KEY is set, but engine transformers of site centre takes no API key"
    ):
        serve_verb.serve(plan_of(tmp_path, {"stages.0.export": "last"}), "base")
    assert not slurm.submitted
    serve_verb.serve(plan, "base")  # the fixture's engine is vllm
    monkeypatch.delenv(serve_verb.KEY_VARIABLE, raising=False)
    serve_verb.serve(plan_of(tmp_path, {"stages.0.export": "last"}), "base")
    assert len(slurm.submitted) == 2


def test_an_earlier_failure_does_not_prevent_another_start(plan: Plan, slurm: FakeSlurm):
    failure = Path("results/small/jobs/serve-base/failure.json")
    failure.parent.mkdir(parents=True)
    failure.write_text("{}")
    serve_verb.serve(plan, "base")
    assert not failure.exists()


@pytest.mark.parametrize("state", ["PENDING", "RUNNING"])
def test_a_second_server_of_a_stage_is_refused_until_the_first_is_stopped(plan: Plan, slurm: FakeSlurm, state: str):
    slurm.queue = [QueueEntry("9", state, "None", "N/A", "longhaul-small.serve-base", COMMENT)]
    with pytest.raises(UserError, match=rf"job 9 \({state}\) serves stage base already") as error:
        serve_verb.serve(plan, "base")
    assert error.value.hint == f"stop it first: longhaul serve {plan.loaded.path} base --stop" and not slurm.submitted
    serve_verb.stop(plan, "base")
    assert slurm.cancelled == ["9"]
    slurm.queue = []
    serve_verb.serve(plan, "base")
    assert len(slurm.submitted) == 1


def test_a_server_is_stopped_after_the_config_has_lost_its_stage(plan: Plan, slurm: FakeSlurm, tmp_path: Path):
    serve_verb.serve(plan, "base")
    slurm.queue = [QueueEntry("9", "RUNNING", "None", "N/A", "longhaul-small.serve-base", COMMENT)]
    serve_verb.stop(plan_of(tmp_path, {"stages.0.name": "other", "stages.1.from.stage": "other"}), "base")
    serve_verb.stop(plan_of(tmp_path), "base")  # not exported
    assert slurm.cancelled == ["9", "9"]


def test_a_stage_is_refused_until_it_is_one_with_an_export(plan: Plan, slurm: FakeSlurm, tmp_path: Path):
    with pytest.raises(UserError, match=r"no stage 'bse'\s+remedy: use one of base, chat"):
        serve_verb.serve(plan, "bse")
    with pytest.raises(
        UserError, match=r"stages\.chat\.export is none.*\s+remedy: set export to last or best, and run"
    ):
        serve_verb.serve(plan, "chat")
    Path("results/small/export/base.json").unlink()
    with pytest.raises(UserError, match=rf"stage base is not exported yet\s+remedy: longhaul run {plan.loaded.path}"):
        serve_verb.serve(plan, "base")
    ServedRun(tmp_path / "again", {}, {}).write_export()  # what `longhaul run` makes
    exported = plan_of(tmp_path, {"stages.0.export": "best", "stages.1.export": "last"}, {"serving": FAKE_VLLM})
    for stage in ("base", "chat"):
        paths = exported.paths
        paths.export_manifest(stage).write_text((tmp_path / "again" / plan.paths.export_manifest("base")).read_text())
        serve_verb.serve(exported, stage)
    assert len(slurm.submitted) == 2


@pytest.mark.parametrize("stage", ["b" * 300, "base/../../stages/base", "a\0b", ""])
def test_server_of_a_stage_that_never_was_is_no_traceback(plan: Plan, slurm: FakeSlurm, stage: str):
    plan.paths.job(JobId("serve", ("base",))).path.mkdir(parents=True, exist_ok=True)
    plan.paths.stage("base").path.mkdir(parents=True, exist_ok=True)
    with pytest.raises(UserError, match="has no stage"):
        serve_verb.stop(plan, stage)


def test_stop_cancels_the_job_of_this_stage_alone(plan: Plan, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(UserError, match="no serve-base of run small is in Slurm's queue") as refused:
        serve_verb.stop(plan, "base")
    assert refused.value.hint == f"longhaul status {plan.loaded.path} shows jobs"
    with pytest.raises(SystemExit) as ended:
        main(["status", str(plan.loaded.path)])
    assert not ended.value.code and "base" in capsys.readouterr().out
    other = QueueEntry(
        "8", "RUNNING", "", "", "longhaul-small_0b3aa5a6-6a1c-4d5c-9d3a-1f6f6f0e2b11", "rule_train_wildcards_small_base"
    )
    slurm.queue = [other, QueueEntry("9", "PENDING", "", "", "longhaul-small.serve-base", COMMENT)]
    serve_verb.stop(plan, "base")
    assert slurm.cancelled == ["9"]


def test_a_server_of_another_host_is_stopped_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Both hosts see the run's folder. The other one is this machine under another name."""
    monkeypatch.chdir(tmp_path)
    plan = plan_of(tmp_path, {"stages.0.export": "last"}, LOCAL)
    with subprocess.Popen(["sleep", "600"]) as server:
        owner = LeaseOwner("host-b", server.pid, process_start(server.pid))
        endpoint = Endpoint("http://127.0.0.1:1/v1", "m", "transformers", None, True, owner)
        endpoint.write(plan.paths.job(JobId("serve", ("base",))).endpoint)
        with pytest.raises(UserError, match=r"remedy: use --stop on the host where the server was started"):
            serve_verb.stop(plan, "base")
        for module in ("longhaul.scheduling.serve_verb.this_host", "socket.gethostname"):
            monkeypatch.setattr(module, lambda: "host-b")
        serve_verb.stop(plan, "base")
        assert server.wait(10) == -signal.SIGTERM


def test_a_refusal_by_slurm_names_the_check(
    plan: Plan, slurm: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    slurm.refusal = "Invalid qos specification"
    with pytest.raises(UserError, match="Slurm refuses the job: Invalid qos") as error:
        serve_verb.serve(plan, "base")
    assert error.value.hint == f"longhaul site check {plan.loaded.path}"
    refuses = "#!/bin/sh\necho 'sbatch: error: Batch job submission failed: Invalid qos specification' >&2; exit 1\n"
    monkeypatch.setenv("PATH", fake_program(tmp_path, "sbatch", refuses))
    with pytest.raises(SystemExit):
        main(["site", "check", str(plan.loaded.path)])
    assert "correct qos" in " ".join(capsys.readouterr().out.split())
    slurm.refusal = ""
    serve_verb.serve(plan, "base")
    assert slurm.submitted


def test_a_model_whose_size_is_unknown_needs_fetch_first(tmp_path: Path, slurm: FakeSlurm):
    hub = {"model": {"pretrained": {"hub": {"id": "org/model"}}}, "stages.0.export": "last"}
    with pytest.raises(UserError, match="size of the model is not known yet") as error:
        serve_verb.serve(plan_of(tmp_path, hub), "base")
    assert error.value.hint.startswith("longhaul fetch")
    fetched = Lock(model={"model_type": "llama", "tie_word_embeddings": False, **LLAMA})
    serve_verb.show(plan_of(tmp_path, hub, {"serving": FAKE_VLLM}, fetched), "base")


@pytest.mark.parametrize(
    ("serving", "message"),
    [
        ({"engine": "vllm", "python": ["/no/such/python"]}, r"serving\.python: /no/such/python is no program"),
        ({"engine": "sglang"}, "needs the package sglang, which this Python does not have"),
    ],
)
def test_an_engine_that_is_not_installed_is_named_before_submission(
    tmp_path: Path, slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch, serving: dict[str, Any], message: str
):
    monkeypatch.chdir(tmp_path)
    ServedRun(tmp_path, {}, {}).write_export()
    with pytest.raises(UserError, match=message):
        serve_verb.serve(plan_of(tmp_path, {"stages.0.export": "last"}, {"serving": serving}), "base")
    assert not slurm.submitted and not Path("results/small/jobs/serve-base").exists()


def test_the_default_engine_without_its_extra_is_named_before_submission(
    tmp_path: Path, slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    ServedRun(tmp_path, {}, {}).write_export()
    monkeypatch.setattr(check_inference_engine, "find_spec", lambda name: None if name == "fastapi" else name)
    with pytest.raises(UserError, match="engine transformers needs the package fastapi") as error:
        serve_verb.serve(plan_of(tmp_path, {"stages.0.export": "last"}), "base")
    assert (
        error.value.hint == f"pip install -c {REPOSITORY}/envs/constraints.txt 'longhaul[serve]'"
        and not slurm.submitted
    )


def test_requests_and_experts_of_the_section_reach_the_engine(tmp_path: Path):
    serve = {"gpus_per_node": 4, "max_running_requests": 64, "expert_parallel": True}
    config = {"model": {"deepseek_v3": DEEPSEEK}, "stages.0.export": "last", "stages.0.serve": serve}
    plan = plan_of(tmp_path, config, {"serving": FAKE_VLLM})
    (command,) = serve_verb.engine_commands(serve_verb._spec(plan, JobId("serve", ("base",))))
    assert "--tensor-parallel-size 4" in " ".join(command) and "--max-num-seqs 64" in " ".join(command)
    assert "--enable-expert-parallel" in command


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_a_file_system_without_locks_does_not_prevent_a_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
):
    """Lustre that is mounted without `flock` refuses flock(2)."""

    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    lock = tmp_path / "server.lock"
    lock.touch()
    assert serve_verb._starting_server(lock) is None
