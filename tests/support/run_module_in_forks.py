"""Runs a module as `python -m` does, in forks of one process: imports take longer than the work of most commands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from runpy import run_module
from tempfile import TemporaryDirectory

REPOSITORY = Path(__file__).resolve().parents[2]


class ForkedModule:
    """A process that has imported `imports`; `run` starts `python -m <module>` in a fork of it. It ends with this process.

    environment: that of the imports. What a module reads when it is imported stays as it was.
    """

    def __init__(self, module: str, imports: Sequence[str], environment: Mapping[str, str]) -> None:
        self._folder = TemporaryDirectory()
        command = [sys.executable, "-m", "tests.support.run_module_in_forks", module, *imports]
        paths = os.pathsep.join([str(REPOSITORY), *sys.path])
        self._server = subprocess.Popen(
            command,
            env={**environment, "PYTHONPATH": paths},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, *words: str, cwd: Path, environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
        """Run `python -m <module> <words>` in this environment and return its exit code, stdout and stderr."""
        assert self._server.stdin and self._server.stdout
        outputs = [Path(self._folder.name, name) for name in ("stdout", "stderr")]
        request = {"words": words, "cwd": str(cwd), "environment": dict(environment), "outputs": [*map(str, outputs)]}
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        code = int(self._server.stdout.readline())
        return subprocess.CompletedProcess(words, code, *(path.read_text() for path in outputs))

    def close(self) -> None:
        """End the process."""
        self._server.communicate()  # closes its stdin, which ends its loop
        self._folder.cleanup()


def _serve(module: str) -> None:
    """Answer each request on stdin with the exit code of a fork."""
    for line in sys.stdin:
        if (pid := os.fork()) == 0:
            _run(module, **json.loads(line))
            sys.exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


def _run(module: str, words: list[str], cwd: str, environment: dict[str, str], outputs: list[str]) -> None:
    for descriptor, path in enumerate(outputs, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [module, *words]
    run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    for name in sys.argv[2:]:
        import_module(name)
    _serve(sys.argv[1])
