"""Records, the queue and logs of a run say why it fails or waits."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import pytest

from longhaul.artifacts.job_state import Failure, JobsToRun
from longhaul.artifacts.leases import LeaseOwner
from longhaul.artifacts.paths import JobId
from longhaul.cli import main
from longhaul.errors import UserError
from longhaul.report.diagnose import diagnose, findings_text
from longhaul.report.ended_jobs import EndedJob
from longhaul.report.run_status import NOT_STARTED, read_status
from longhaul.report.search_logs import Finding, known_problems, match_line, search_log
from longhaul.report.slurm_queue_types import Queue, QueuedJob
from longhaul.serving.engines import LOOPBACK
from longhaul.serving.server_process import require_free_port
from tests.support.run_folder import TRAIN, RunFolder

SLURM_ENDINGS = {
    "TIME LIMIT": "time-limit",
    "PREEMPTION": "preempted",
    "NODE FAILURE, SEE SLURMCTLD LOG FOR DETAILS": "node-failed",
    "JOB REQUEUE": "requeued",
}
"""Text of slurmstepd after `DUE TO` -> the known problem."""
EXAMPLES = Path(__file__).with_name("known_problems")


def test_every_known_problem_has_an_example_and_a_source() -> None:
    names = [problem["name"] for problem in known_problems()]
    assert sorted(names) == sorted(path.stem for path in EXAMPLES.glob("*.log")) and len(names) == len(set(names))
    assert all(problem["source"] and problem["remedy"] and problem["cause"] for problem in known_problems())


@pytest.mark.parametrize("example", sorted(EXAMPLES.glob("*.log")), ids=lambda path: path.stem)
def test_example_is_recognised(example: Path) -> None:
    """Also the most special problem is found, not one that is above it in the file."""
    ordinary, line = example.read_text().splitlines()
    problem = match_line(line)
    assert problem is not None and problem["name"] == example.stem and match_line(ordinary) is None
    (finding,) = search_log("train-base", example)
    assert finding.evidence == f"{example}:2: {line[:300]}" and finding.remedy == problem["remedy"]


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("n1:1:2 [0] init.cc:1 NCCL WARN Cuda failure 2 'out of memory'", "gpu-out-of-memory"),
        (
            "RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
            "gpu-out-of-memory",
        ),
        ("UCX  ERROR ibv_create_cq(cqe=4096) failed: Cannot allocate memory", "locked-memory-limit"),
        (
            "NVRM: Xid (PCI:0000:9b:00): 119, pid=40, name=python, Timeout after 45s of waiting for RPC response",
            "gpu-lost",
        ),
        (
            "Failed to bind NVLink SHARP (NVLS) Multicast memory of size 2097152 : CUDA error 401 'the operation cannot be "
            "performed in the present state'.",
            "nvlink-multicast",
        ),
        ("[rank0]: torch.AcceleratorError: CUDA error: unspecified launch failure", "illegal-memory-access"),
        (
            "n1:1:2 [0] misc/shmutils.cc:93 NCCL WARN Error while creating shared memory segment /dev/shm/nccl-vDxBXX "
            "(size 5767524), error: No space left on device (28)",
            "shared-memory-full",
        ),
        (
            "n1:1:2 [3] misc/socket.cc:50 NCCL WARN socketProgress: Connection closed by remote peer n2<4>",
            "nccl-remote-error",
        ),
        ("torch.distributed.DistNetworkError: failed to recv, got 0 bytes", "nccl-remote-error"),
        (
            "OSError: [Errno 108] Cannot send after transport endpoint shutdown: '/lustre/r/state.json'",
            "file-system-lost",
        ),
        (
            "LustreError: 167-0: work-OST0003: This client was evicted by work-OST0003; in progress ...",
            "file-system-lost",
        ),
        ("OSError: [Errno 28] No space left on device", "disk-full"),
        ("RuntimeError: can't start new thread", "thread-limit"),
        ("bash: /envs/bin/python: cannot execute binary file: Exec format error", "other-processor"),
        ("/tmp/x/cuda_utils.c:6:10: fatal error: Python.h: No such file or directory", "compiler-missing"),
        ("FATAL:   container creation failed: mount /scratch->/scratch error: no such file", "container-not-started"),
        (
            "requests.exceptions.ConnectionError: huggingface.co: Max retries exceeded: Name or service not known",
            "hub-not-reachable",
        ),
        (
            "ImportError: /lib64/libm.so.6: version `GLIBC_2.34' not found (required by libtorch_cpu.so)",
            "library-too-old",
        ),
    ],
)
def test_other_forms_of_a_problem_have_its_cause(line: str, name: str) -> None:
    """A part of the line also appears in other problems: `No space left`, `Cannot allocate memory`, `CUDA error`."""
    problem = match_line(line)
    assert problem is not None and problem["name"] == name


_AT = "ON n1 CANCELLED AT 2026-11-28T16:40:22"
SLURMSTEPD_FORMS = (
    # Slurm 22.05, _handle_signal_container in src/slurmd/slurmstepd/req.c. JOB: the batch script, STEP: what srun started.
    *((f"slurmstepd: error: *** JOB 12 {_AT} DUE TO {why} ***", name) for why, name in SLURM_ENDINGS.items()),
    *((f"0: slurmstepd-n1: error: *** STEP 12.0 {_AT} DUE TO {why} ***", name) for why, name in SLURM_ENDINGS.items()),
    (f"slurmstepd-n1: error: *** JOB 12 {_AT} ***", "cancelled"),
    (f"0: slurmstepd-n1: error: *** STEP 12.0 {_AT} ***", "step-cancelled"),
    ("slurmstepd: error: *** STEP 12.0 ON n1 FAILED (non-zero exit code or other failure mode) ***", "step-cancelled"),
    # Newer ones name the signal, and begin with the time.
    (f"[2026-11-28T16:40:22.695] error: *** JOB 12 {_AT} DUE to SIGNAL Terminated ***", "cancelled"),
    (f"[2026-11-28T16:40:22.695] error: *** STEP 12.24 {_AT} DUE to SIGNAL Terminated ***", "step-cancelled"),
    (f"[2026-11-28T16:40:22.695] error: *** JOB 12 {_AT} DUE TO TIME LIMIT ***", "time-limit"),
    # Older ones name the node at the end.
    ("slurmstepd: *** JOB 12 CANCELLED AT 2015-11-28T16:40:22 DUE TO TIME LIMIT on n1 ***", "time-limit"),
    ("slurmstepd: *** STEP 12.0 CANCELLED AT 2015-11-28T16:40:22 DUE TO PREEMPTION on n1 ***", "preempted"),
    ("slurmstepd: *** JOB 12 CANCELLED AT 2015-11-28T16:40:22 DUE TO NODE n1 FAILURE ***", "node-failed"),
    ("slurmstepd: *** JOB 12 CANCELLED AT 2015-11-28T16:40:22 *** on n1", "cancelled"),
)


@pytest.mark.parametrize(("line", "name"), SLURMSTEPD_FORMS)
def test_every_form_in_which_slurm_says_why_it_ends_processes_is_known(line: str, name: str) -> None:
    problem = match_line(line)
    assert problem is not None and problem["name"] == name


SLURMSTEPD = shutil.which("slurmstepd", path=f"{os.environ['PATH']}:/usr/sbin")


@pytest.mark.skipif(not SLURMSTEPD, reason="Slurm is not installed")
@pytest.mark.parametrize("entity", ["JOB 12", "STEP 12.0"])
def test_every_form_that_the_installed_slurmstepd_contains_is_known(entity: str) -> None:
    texts = re.findall(rb"\*\*\* %s [\x20-\x7e]*?\*\*\*", Path(str(SLURMSTEPD)).read_bytes())
    assert len(texts) >= 7
    for text in map(bytes.decode, texts):
        line = text % (entity, "n1", "2026-11-28T10:00:00")[: text.count("%s")]
        problem = match_line(f"slurmstepd: error: {line}")
        assert problem and problem["name"] != "python-error", line


MADE_HERE = {
    "too-many-open-files": f"ulimit -n 20; exec {sys.executable} -c 'import os; [os.dup(0) for _ in range(30)]'",
    "cpu-allocation-failed": f"ulimit -v 1000000; exec {sys.executable} -c 'bytearray(1 << 40)'",
    "disk-full": "echo text > /dev/full",
    "permission-denied": "touch file; ./file",
    "port-in-use": f"""{sys.executable} -c 'import socket as s
a = s.create_server(("127.0.0.1", 0)); s.create_server(a.getsockname())'""",
    "other-processor": "printf '\\177ELF\\2\\1\\1%057d' 0 | tr 0 '\\0' > file; chmod +x file; ./file",
    "module-missing": "unset -f module; module load cuda/99",
    "package-missing": f"{sys.executable} -c 'import no_such_package'",
    "native-crash": f"{sys.executable} -X faulthandler -c 'import ctypes; ctypes.string_at(0)'",
    "python-error": f"{sys.executable} -c 'raise ValueError(1)'",
    "container-missing": "PATH=/nowhere; apptainer exec image.sif true",
}
"""Known problem -> shell commands that meet it."""


@pytest.mark.parametrize("name", MADE_HERE)
def test_problem_that_can_be_made_here_is_known_by_what_its_program_prints(name: str, tmp_path: Path) -> None:
    command = ["bash", "-c", f"ulimit -c 0; {MADE_HERE[name]}"]
    done = subprocess.run(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    found = [problem["name"] for line in done.stderr.splitlines() if (problem := match_line(line))]
    assert done.returncode and name in found, done.stderr


def test_ordinary_lines_of_a_training_are_no_problem() -> None:
    for line in (
        "step 120/240  loss 5.0180  grad norm 0.713  lr 2.00e-04  6,170 tokens/s  1.2 min left",
        "step 120/240  validation loss 5.4538",
        "[2026-11-28 16:34:05,123] [INFO] [logging.py:107:log_dist] [Rank 0] DeepSpeed Final Optimizer = ZeroOptimizer",
        "using fused AdamW; 240 steps of 8 samples: 0.59 epochs of docstrings",
    ):
        assert match_line(line) is None, line


def log_of(run: RunFolder, *lines: str) -> Path:
    log = run.paths.log(TRAIN)
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text("".join(f"{line}\n" for line in lines))
    return log


def found(run: RunFolder, **queue: QueuedJob) -> list[Finding]:
    return diagnose(run.paths, run.status(**queue), run.paths.results.parent / ".snakemake" / "slurm_logs")


def test_recorded_failure_comes_first_and_effects_come_last(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    Failure("permanent", "out of memory", "lower micro_batch_size", job_id="7").write(run.paths.job(TRAIN).failure)
    log = log_of(
        run,
        "RuntimeError: Connection closed by peer",
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB",
        "RuntimeError: Connection closed by peer",
    )
    first, second, third = found(run)
    assert (first.cause, first.evidence) == ("out of memory", str(run.paths.job(TRAIN).failure))
    assert second.evidence.startswith(f"{log}:2: ") and second.job == "train-base"
    assert third.evidence.startswith(f"{log}:1: ") and third.follows and third.count == 2
    text = findings_text([first, second, third], run.status())
    assert text.startswith("1. train-base: out of memory.\n   evidence: ") and "remedy: lower micro_batch_size" in text
    assert "(2 times). This is usually the effect of another problem." in text


def test_pending_job_is_explained(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.main_process()
    (finding,) = found(run, train_base=QueuedJob("8", "PENDING", "QOSMaxJobsPerUserLimit", "N/A"))
    assert finding.cause == "the job waits in Slurm's queue: QOSMaxJobsPerUserLimit"
    assert "QOS" in finding.remedy and finding.evidence == "squeue, job 8" and finding.continues


def test_pending_job_that_will_not_start_is_not_told_to_wait(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.main_process()
    (finding,) = found(run, train_base=QueuedJob("8", "PENDING", "QOSMaxWallDurationPerJobLimit", "N/A"))
    assert finding.cause == "the job waits in Slurm's queue, and will not start: QOSMaxWallDurationPerJobLimit"
    assert finding.remedy.startswith("correct qos, max_nodes or max_minutes") and not finding.continues


def test_server_that_failed_waits_or_was_killed_is_explained(tmp_path: Path) -> None:
    """`longhaul serve` starts it, not the main process."""
    run = RunFolder(tmp_path)
    serve = JobId("serve", ("base",))
    folder = run.paths.job(serve)
    folder.path.mkdir(parents=True)
    folder.launch_spec.write_text("{}")
    (finding,) = found(run, serve_base=QueuedJob("9", "PENDING", "Resources", "N/A"))
    assert (finding.job, finding.cause) == ("serve-base", "the job waits in Slurm's queue: Resources")
    run.state(serve, "running")
    killed = found(run)[0]
    assert (killed.job, killed.cause) == ("serve-base", "job 7 is no longer in Slurm's queue")
    assert killed.remedy == "start the server again: longhaul serve CONFIG base"
    Failure("environment", "no module named vllm", "install vllm", job_id="7").write(folder.failure)
    log = run.paths.log(serve)
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB\n")
    recorded, in_log = found(run)
    assert (recorded.cause, recorded.remedy) == ("no module named vllm", "install vllm")
    assert recorded.evidence == str(folder.failure) and in_log.evidence.startswith(f"{log}:1: ")


def test_port_of_a_server_that_is_in_use_is_not_called_that_of_rank_0_alone() -> None:
    with socket.socket() as taken:
        taken.bind((LOOPBACK, 0))
        taken.listen()
        with pytest.raises(UserError) as refused:
            require_free_port(LOOPBACK, taken.getsockname()[1])
    problem = match_line(f"error: {refused.value}")
    assert problem and problem["name"] == "port-in-use"
    assert "or of a server" in problem["cause"] and "serve.port" in problem["remedy"]


def test_job_that_left_no_record_is_explained_by_the_accounting(tmp_path: Path) -> None:
    run = RunFolder(tmp_path, stages=3)
    run.state(TRAIN, "running", job_id="7")
    run.state(JobId("train", ("stage-1",)), "running", job_id="8")
    run.state(JobId("environment"), "done", job_id="6")
    asked: list[list[str]] = []

    def ask(job_ids: Sequence[str]) -> dict[str, EndedJob]:
        asked.append(list(job_ids))
        return {"7": EndedJob("NODE_FAIL", "0:0", "2026-11-28T18:00:00", "n[1-2]", "sacct -X -j 7")}

    explained, unexplained = diagnose(run.paths, run.status(), tmp_path, ask)[:2]
    assert asked == [["7", "8"]], "once, and only for jobs whose end nobody recorded"
    assert (explained.job, explained.evidence) == ("train-base", "sacct -X -j 7")
    assert explained.cause == "Slurm ended job 7 (NODE_FAIL) at 2026-11-28T18:00:00 on n[1-2]: a node failed"
    assert explained.remedy.endswith("run the same command again: the job continues from its last checkpoint")
    assert unexplained.cause == "job 8 is no longer in Slurm's queue"


@pytest.mark.parametrize("record", ["state", "failure"])
def test_evidence_of_a_damaged_record_is_that_record(record: str, tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.state(TRAIN, "running")
    path = getattr(run.paths.job(TRAIN), record)
    path.write_text("{")
    assert next(finding.evidence for finding in found(run) if finding.job == "train-base") == str(path)


def test_accounting_does_not_replace_a_recorded_reason(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.state(TRAIN, "waiting", reason="the allocation ends")
    finding = diagnose(run.paths, run.status(), tmp_path, lambda job_ids: pytest.fail("asked"))[0]
    assert finding.cause == "the allocation ends; job 7 is no longer in Slurm's queue"


def test_accounting_is_not_asked_about_a_healthy_run(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.main_process()
    run.state(TRAIN, "running")
    status = run.status(train_base=QueuedJob("7", "RUNNING", "None", "N/A"))
    assert diagnose(run.paths, status, tmp_path, lambda job_ids: pytest.fail("asked")) == []


def test_handled_faults_are_named_with_their_number(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.main_process()
    run.state(TRAIN, "running")
    events = [
        {"time_s": 1.0, "event": "running", "reason": "", "job_id": "7"},
        {"time_s": 2.0, "event": "restarted", "reason": "rank 1 was killed", "job_id": "7"},
        {"time_s": 3.0, "event": "restarted", "reason": "rank 1 was killed", "job_id": "7"},
    ]
    run.paths.job(TRAIN).history.write_text("".join(json.dumps(event) + "\n" for event in events))
    (finding,) = found(run, train_base=QueuedJob("7", "RUNNING", "None", "N/A"))
    assert (finding.cause, finding.count) == ("rank 1 was killed", 2) and "the job continued" in finding.remedy


def test_faults_that_a_job_survived_are_notes_and_no_problems(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunFolder(tmp_path, scheduler="local")
    run.state(JobId("environment"), "done", job_id=None)
    run.state(TRAIN, "done", job_id=None)
    log = attempt_of(run, 1, "straggler at step 20: rank 1 on n1: compute takes 61.3 ms")
    with pytest.raises(SystemExit) as ended:
        main(["doctor", str(run.paths.folder)])
    assert not ended.value.code
    answer = capsys.readouterr().out
    assert answer.startswith(
        "No problem found: run r is done.\n\nNotes (the run goes on):\n\n"
        f" - train-base: a rank is slower than the others.\n   evidence: {log}:1: "
    )
    assert "1. " not in answer
    run.state(TRAIN, "running", job_id=None)
    with pytest.raises(SystemExit):
        main(["doctor", str(run.paths.folder)])
    answer = capsys.readouterr().out
    assert answer.startswith("1. ") and "No problem" not in answer and "Slurm" not in answer
    assert answer.index("Notes (") < answer.index(" - train-base: a rank is slower than the others")


def test_skipped_batch_is_a_note_while_its_stage_trains_and_afterwards(tmp_path: Path) -> None:
    """The line begins as that of a stage which a bad step has ended."""
    run = RunFolder(tmp_path, scheduler="local")
    run.main_process()
    log = attempt_of(run, 1, "step 91: loss nan, gradient norm nan; batch 90 is skipped")
    for state in ("running", "done"):
        run.state(TRAIN, state, job_id=None)
        (finding,) = found(run)
        assert finding.cause.endswith("was not finite or jumped, so they were skipped") and finding.is_note
        assert finding.evidence.startswith(f"{log}:1: ")


def test_what_longhaul_handles_itself_is_a_note_also_of_a_stopped_run(tmp_path: Path) -> None:
    run = RunFolder(tmp_path, scheduler="local")
    run.state(JobId("environment"), "done", job_id=None)
    run.state(TRAIN, "running", job_id=None)
    attempt_of(run, 1, "torch.distributed.elastic.multiprocessing.api.SignalException: Process 40 got signal: 15")
    text = findings_text(found(run), run.status())
    problems, notes = text.split("Notes (the run goes on):")
    assert "torchrun" in notes and "torchrun" not in problems and "1. " in problems


def test_log_of_sbatch_is_searched_by_job_id(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.state(TRAIN, "running")
    event = {"time_s": 1.0, "event": "running", "reason": "", "job_id": "7"}
    run.paths.job(TRAIN).history.write_text(json.dumps(event) + "\n")
    folder = run.paths.results.parent / ".snakemake" / "slurm_logs" / "rule_train" / "r_base"
    folder.mkdir(parents=True)
    for job_id in ("7", "8"):
        (folder / f"{job_id}.log").write_text(
            "*** JOB 7 ON n1 CANCELLED AT 2026-11-28T10:00:00 DUE TO TIME LIMIT ***\n"
        )
    causes = [finding.cause for finding in found(run) if "time limit" in finding.cause]
    assert causes == ["the job reached its time limit"]


def test_log_of_a_job_that_is_done_is_not_searched(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.state(TRAIN, "done")
    run.state(JobId("environment"), "done")
    log_of(run, "RuntimeError: Connection closed by peer")
    assert found(run) == []
    assert findings_text([], run.status()) == "No problem found: run r is done."


def attempt_of(run: RunFolder, number: int, *lines: str) -> Path:
    log = run.paths.attempt_logs(TRAIN).log(number)
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text("".join(f"{line}\n" for line in lines))
    return log


def test_preempted_job_that_waits_in_the_queue_again_has_no_problem(tmp_path: Path) -> None:
    """With GraceTime, slurmstepd says at SIGTERM only that it ends the step, and never that it is a preemption."""
    run = RunFolder(tmp_path)
    run.main_process()
    run.state(TRAIN, "waiting", reason="SIGTERM from Slurm")
    attempt_of(run, 1, "0: slurmstepd-n1: error: *** STEP 7.0 ON n1 CANCELLED AT 2026-11-28T16:40:22 ***")
    findings = found(run, train_base=QueuedJob("7", "PENDING", "Priority", "N/A"))
    assert [finding.cause for finding in findings if not finding.is_note] == []
    (log_note,) = (finding for finding in findings if "processes of a step" in finding.cause)
    assert log_note.remedy.startswith("none is needed")
    (problem,) = (finding for finding in found(run, train_base=QueuedJob("7", "RUNNING", "None", "N/A")))
    assert "processes of a step" in problem.cause and not problem.is_note, "the attempt that runs"


def test_cause_of_an_earlier_attempt_is_in_its_own_log(tmp_path: Path) -> None:
    """Messages of other ranks are left out, as the cause is known. The last attempt of a finished job is fine."""
    run = RunFolder(tmp_path)
    run.main_process()
    run.state(TRAIN, "done")
    reason = "RuntimeError: Connection reset by peer"
    events = [{"time_s": 1.0, "event": "running"}, {"time_s": 2.0, "event": "restarted", "reason": reason}]
    run.paths.job(TRAIN).history.write_text("".join(json.dumps(event) + "\n" for event in events))
    first = attempt_of(
        run, 1, "srun: error: n2: task 1: Killed", "*** STEP 2.1 ON n1 CANCELLED AT 2026-11-28T16:40:22 ***"
    )
    second = attempt_of(run, 2, "No space left on device", "straggler at step 120: rank 1 on n2: compute takes 61.3 ms")
    killed, slow = sorted(found(run), key=lambda finding: finding.evidence)
    assert killed.evidence.startswith(f"{first}:1: ") and killed.cause.startswith("a process was killed with signal 9")
    assert slow.evidence.startswith(f"{second}:2: ") and slow.cause == "a rank is slower than the others"
    assert killed.remedy.startswith("none is needed: the job continued. If it happens again: ")


def test_attempts_without_an_end_and_cancelled_ones_are_named(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.main_process()
    run.state(TRAIN, "running")
    names = ["running", "running", "failed", "running"]
    events = [
        {"time_s": float(k), "event": name, "reason": "cancelled: cancelled by scancel"} for k, name in enumerate(names)
    ]
    run.paths.job(TRAIN).history.write_text("".join(json.dumps(event) + "\n" for event in events))
    causes = [finding.cause for finding in found(run, train_base=QueuedJob("7", "RUNNING", "None", "N/A"))]
    assert len(causes) == 2 and causes[0].startswith("the supervisor left no record of an attempt's end")
    assert causes[1] == "cancelled by scancel"


def test_main_process_on_another_host_is_named_unless_a_job_shows_that_the_run_goes_on(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.main_process(LeaseOwner("login9", 5, "1.0"))
    (finding,) = found(run)
    assert finding.cause == "whether process 5 on login9 still runs cannot be checked from this host"
    assert finding.remedy.startswith("run `longhaul doctor` on login9") and f"rm {run.paths.lease}" in finding.remedy
    run.state(TRAIN, "running")
    assert found(run, train_base=QueuedJob("7", "RUNNING", "None", "N/A")) == []


def test_ended_main_process_is_named_while_jobs_are_left(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.state(TRAIN, "running")
    going_on = {"train_base": QueuedJob("7", "RUNNING", "None", "N/A")}
    (finding,) = found(run, **going_on)
    assert "it was stopped; left: environment, train-base" in finding.cause and "same command again" in finding.remedy
    dead = {**asdict(LeaseOwner.this_process()), "started": "1.0"}
    run.paths.lease.write_text(json.dumps(dead))
    (finding,) = found(run, **going_on)
    assert "ended without releasing the run: it was killed" in finding.cause and finding.evidence == str(
        run.paths.lease
    )


def test_time_limit_of_the_controller_job_is_a_note_without_the_other_lines_of_its_log(tmp_path: Path) -> None:
    """Slurm appends the line to the log in which the main process names the failures of the run's jobs."""
    run = RunFolder(tmp_path)
    run.main_process()
    run.paths.logs.mkdir()
    run.paths.controller_log.write_text(
        "10:00:00  train-base failed\n  cause: No space left on device\n"
        "slurmstepd: error: *** JOB 12 ON n3 CANCELLED AT 2026-11-28T10:00:00 DUE TO TIME LIMIT ***\n"
        "10:00:40  train-base submitted\n"
    )
    (finding,) = found(run)
    assert (finding.job, finding.is_note) == ("main process", True)
    assert finding.cause == "its job, controller.sbatch, has ended: the job reached its time limit"
    assert finding.evidence.startswith(f"{run.paths.controller_log}:3: ")


@pytest.mark.parametrize(
    ("line", "cause"),
    [
        ("*** JOB 12 ON n3 CANCELLED AT 2026-11-28T10:00:00 DUE TO TIME LIMIT ***", "the job reached its time limit"),
        (
            "Detected 1 oom_kill event in StepId=12.batch. Some of the step tasks have been OOM Killed.",
            "the processes of a node used more memory than the job asked for, and the kernel killed one of them",
        ),
    ],
)
def test_end_of_the_controller_job_is_named_below_a_repeated_log_with_the_same_problem(
    tmp_path: Path, line: str, cause: str
) -> None:
    """Snakemake repeats the log of a failed job (show-failed-logs), in which the same line is about a step of that job."""
    run = RunFolder(tmp_path)
    run.main_process()
    run.paths.logs.mkdir()
    repeated = line.replace("JOB 12", "STEP 7.0").replace("12.batch", "7.0")
    lines = (f"0: slurmstepd: error: {repeated}\n", f"slurmstepd: error: {line}\n")
    run.paths.controller_log.write_text("".join(lines))
    (finding,) = found(run)
    assert (finding.is_note, finding.count) == (True, 1)
    assert finding.cause == f"its job, controller.sbatch, has ended: {cause}"
    assert finding.evidence.startswith(f"{run.paths.controller_log}:2: ")


def test_main_process_that_was_stopped_before_its_first_job_is_named(tmp_path: Path) -> None:
    run = RunFolder(tmp_path, scheduler="local")
    assert found(run) == []
    JobsToRun("ended", {"environment": ""}).write(run.paths.jobs_to_run)
    (finding,) = found(run)
    assert "it was stopped; left: environment, train-base" in finding.cause


@pytest.mark.parametrize("task", [(), ("base", "quiz")], ids=["sources", "task data"])
def test_failed_fetch_is_named_until_it_succeeds(tmp_path: Path, task: tuple[str, ...]) -> None:
    """The main process fetches. No job has a record of it."""
    run = RunFolder(tmp_path, scheduler="local")
    JobsToRun("ended", {"environment": ""}).write(run.paths.jobs_to_run)
    log = run.fail_to_fetch(*task)
    made = run.paths.task_data(*task) if task else run.paths.lock
    (finding,) = found(run)
    assert finding.job == " ".join(("fetch_task_data", *task)) if task else finding.job == "fetch"
    assert (finding.cause, finding.evidence) == ("org/x is not on the hub", f"{log}:3")
    assert finding.remedy == "correct the name; then run the same command again"
    run.main_process()
    assert found(run) == [], "it may fetch again"
    run.paths.lease.unlink()
    made.parent.mkdir(parents=True, exist_ok=True)
    made.write_text("{}")
    (finding,) = found(run)
    assert finding.job == "main process"


def test_failed_fetch_of_a_task_is_named_where_another_stage_has_fetched_a_task_of_the_same_joined_name(
    tmp_path: Path,
) -> None:
    """Stage `base-a` with task `b`, and stage `base` with task `a-b`."""
    run = RunFolder(tmp_path, scheduler="local")
    fetched, failed = ("base-a", "b"), ("base", "a-b")
    run.fail_to_fetch(*fetched)
    log, lock = run.fail_to_fetch(*failed), run.paths.task_data(*fetched)
    lock.parent.mkdir(parents=True)
    lock.write_text("{}")
    run.paths.lock.write_text("{}")
    (finding,) = (finding for finding in found(run) if "fetch" in finding.job)
    assert (finding.job, finding.evidence) == ("fetch_task_data base a-b", f"{log}:3")


def test_failed_fetch_that_a_changed_config_does_not_need_is_not_named(tmp_path: Path) -> None:
    run = RunFolder(tmp_path, scheduler="local")
    JobsToRun("ended", {"environment": ""}).write(run.paths.jobs_to_run)
    log = run.fail_to_fetch()
    run.paths.config.write_text("")  # the rule `render` ran without a fetch
    os.utime(log, (1.0, 1.0))
    run.fail_to_fetch("base", "quiz")
    plan = json.loads(run.paths.plan.read_text())
    plan["jobs"] = [job for job in plan["jobs"] if job["kind"] != "evaluate"]
    run.paths.plan.write_text(json.dumps(plan))
    (finding,) = found(run)
    assert finding.job == "main process" and run.status().state == NOT_STARTED


def test_failed_job_that_starts_again_needs_nobody(tmp_path: Path) -> None:
    run = RunFolder(tmp_path, scheduler="local")
    run.main_process()
    Failure("node", "node n1 is down", "call the centre", invocation="earlier").write(run.paths.job(TRAIN).failure)
    JobsToRun(run.paths.lease.read_text(), {str(TRAIN): ""}).write(run.paths.jobs_to_run)
    (finding,) = diagnose(run.paths, read_status(run.paths), tmp_path)
    assert (finding.cause, finding.remedy) == ("node n1 is down", "wait: the main process starts the job again")


def test_only_the_end_of_a_huge_log_is_searched_with_right_line_numbers(tmp_path: Path) -> None:
    log = tmp_path / "huge.log"
    line = "x" * 99 + "\n"
    log.write_text("Permission denied\n" + line * 30_000 + "No space left on device\n")
    (finding,) = search_log("train-base", log)
    assert finding.evidence == f"{log}:30002: No space left on device"


def test_silent_slurm_and_removed_logs_are_named(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    Failure("permanent", "out of memory", "lower micro_batch_size").write(run.paths.job(TRAIN).failure)

    def ask(_jobs: object) -> Queue:
        raise UserError("squeue is not on the PATH of this node")

    status = read_status(run.paths, ask)
    failure, slurm, logs = diagnose(run.paths, status, tmp_path / "slurm_logs")
    assert failure.cause == "out of memory" and slurm.cause.endswith("squeue is not on the PATH of this node")
    assert logs.job == "train-base" and logs.cause.startswith("its logs do not exist any more")
    log_of(run, "an ordinary line")
    assert len(diagnose(run.paths, status, tmp_path / "slurm_logs")) == 2


def test_record_of_another_release_is_the_finding(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.main_process()
    run.paths.job(TRAIN).path.mkdir(parents=True)
    run.paths.job(TRAIN).state.write_text('{"artifact": "State", "schema_version": 9}')
    (finding,) = found(run)
    assert "version 9, not State version 1" in finding.cause and "another release" in finding.remedy
