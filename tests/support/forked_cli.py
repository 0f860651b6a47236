"""Runs `longhaul` in forks of one process. Imports take longer than the work of most verbs, so that process imports once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from runpy import run_module


class ForkedCli:
    """A process that has imported `modules`; `run` starts `longhaul` in a fork of it."""

    def __init__(self, server: subprocess.Popen[str], folder: Path) -> None:
        self._server, self.folder = server, folder

    def run(self, *words: str, cwd: Path, environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
        """Run `longhaul <words>`. `environment` replaces that of the server; what modules read at import stays as it was."""
        assert self._server.stdin and self._server.stdout
        outputs = [self.folder / name for name in ("stdout", "stderr")]
        request = {"words": words, "cwd": str(cwd), "environment": dict(environment), "outputs": [*map(str, outputs)]}
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        code = int(self._server.stdout.readline())
        return subprocess.CompletedProcess(words, code, *(path.read_text() for path in outputs))


@contextmanager
def forked_cli(folder: Path, modules: Sequence[str], environment: Mapping[str, str]) -> Iterator[ForkedCli]:
    """Start the process with `environment`, and end it after the block. `folder` is for its files."""
    command = [sys.executable, "-m", "tests.support.forked_cli", *modules]
    paths = os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])
    with subprocess.Popen(
        command, env={**environment, "PYTHONPATH": paths}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:
        yield ForkedCli(server, folder)
        assert server.stdin
        server.stdin.close()  # ends its loop


def _serve() -> None:
    """Answer each request on stdin with the exit code of a fork."""
    for line in sys.stdin:
        if (pid := os.fork()) == 0:
            _run(**json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


def _run(words: list[str], cwd: str, environment: dict[str, str], outputs: list[str]) -> None:
    """Do what `python -m longhaul <words>` does, with stdout and stderr in files. Does not return."""
    for descriptor, path in enumerate(outputs, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["longhaul", *words]
    run_module("longhaul", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    for name in ("longhaul.cli", *sys.argv[1:]):
        import_module(name)
    _serve()
