"""Asks `longhaul doctor` about a faulted run on the login node."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

from tests.faults.expected_diagnoses import NOT_NOTICED, STOPPED_FIRST, names_the_cause
from tests.faults.faulted_run import FaultedRun
from tests.support.run_folder import TRAIN, RunFolder


class Doctor:
    """Asks `longhaul doctor` on the login node about one run, and keeps the answers."""

    def __init__(self, run: FaultedRun) -> None:
        self._run = run
        self.answers: list[str] = []
        self.seconds = 0.0
        """Time that the answers took: it does not count as time that the fault has cost."""

    def ask(self) -> None:
        started = time.monotonic()
        words = [sys.executable, "-m", "longhaul", "doctor", str(self._run.results)]
        command = self._run.cluster.command(words, cwd=self._run.folder)
        environment = self._run.environment()
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        self.answers.append(done.stdout)
        self.seconds += time.monotonic() - started
        (self._run.folder / f"doctor-{len(self.answers)}.txt").write_text(done.stdout)

    def assert_named_the_cause(self, fault: str, recorded: str = "") -> None:
        """Assert that the first finding of an answer names the fault. After one that no job notices, the job has no problem.

        recorded: a part of the cause that the job recorded
        """
        if fault in NOT_NOTICED:
            problem = re.compile(rf"^\d+\. {self._job}: ", re.MULTILINE)
            assert not any(map(problem.search, self.answers)), (fault, self.answers)
        else:
            assert any(names_the_cause(fault, cause) for cause in self._first_causes(fault)), (fault, self.answers)
        assert any(recorded in answer for answer in self.answers), (recorded, self.answers)

    @property
    def _job(self) -> str:
        folder = Path(self._run.phase)
        return f"train-{folder.name}" if folder.parent.name == "stages" else folder.name

    def _first_causes(self, fault: str) -> list[str]:
        """Return the first finding of each answer about the phase's job, and all that the first one says of the main process."""
        is_left_out = not names_the_cause(fault, STOPPED_FIRST)
        of_job = [
            [cause for cause in _causes(self._job, answer) if not (is_left_out and STOPPED_FIRST in cause)][:1]
            for answer in self.answers
        ]
        of_main = [_causes("main process", answer) for answer in self.answers[:1]]
        return [cause for found in (*of_job, *of_main) for cause in found]


def assert_doctor_names(fault: str, results: Path, job: str) -> None:
    """Assert that doctor names the fault first of what it says about a job of a run on this machine."""
    words = [sys.executable, "-m", "longhaul", "doctor", str(results)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=True)
    causes = _causes(job, done.stdout)
    assert causes and names_the_cause(fault, causes[0]), done.stdout


def assert_doctor_names_from_log(fault: str, root: Path, log: str) -> None:
    """Assert that doctor names the fault of a stage on this machine that is done, and whose ranks have printed `log`."""
    run = RunFolder(root, scheduler="local")
    run.state(TRAIN, "done", job_id=None)
    attempt = run.paths.attempt_logs(TRAIN).log(1)
    attempt.parent.mkdir(parents=True)
    attempt.write_text(log)
    assert_doctor_names(fault, run.paths.folder, str(TRAIN))


def _causes(subject: str, answer: str) -> list[str]:
    """Return the causes that an answer gives for a job or the main process. A cause may have several lines."""
    return re.findall(rf"^(?:\d+\.| -) {subject}: (.*?)^   evidence: ", answer, re.MULTILINE | re.DOTALL)
