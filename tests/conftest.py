"""Options and fixtures of all tests: parallel workers, hypothesis' examples and deadline, compiled ops, a finished small run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Generator
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from xdist.scheduler import LoadFileScheduling

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; several workers share the cores
os.environ.pop("COLUMNS", None)  # the width of somebody's terminal: tables, and ps, would cut their lines

OPS_BUILD = pytest.StashKey[subprocess.Popen[bytes]]()
# Low priority: the kernel may schedule each session as a group (autogroup), which has its own niceness.
BUILD_OPS = """
import fcntl, os, tempfile
from contextlib import suppress
from pathlib import Path
os.nice(10)
with suppress(OSError):
    Path("/proc/self/autogroup").write_text("10")
lock = Path(tempfile.gettempdir(), f"longhaul-tests-{os.getuid()}.lock").open("w")
fcntl.flock(lock, fcntl.LOCK_EX)  # another worker may build, or may be killed while it builds
from longhaul.checks.node_facts import build_ops
failed = build_ops(("cpu_adam", "pin_memory", "async_io"), None)["failed"]
assert not failed, failed
"""
CLUSTER = "cluster and finished run"
GROUPS = {
    CLUSTER: (
        "tests/cluster/",
        "tests/faults/",
        *(
            f"tests/workflow/test_{name}.py"
            for name in ("kills", "report", "reruns", "scale_test", "secrets", "served_export", "verify")
        ),
    ),
    "ZeRO checkpoints": ("tests/unit/checkpoint_io/test_zero_checkpoint.py", "tests/unit/export/"),
}
"""Name -> tests that one worker runs, because they share what takes long to make. Clusters also start one after another."""


RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
OFFLINE_VARIABLES = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
ALL = ("all_faults", "all_layouts", "all_reshardings")
"""Options that --all implies."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="slow tests, too, and all faults, layouts and reshardings")
    parser.addoption(
        "--all-faults", action="store_true", help="all cases of the fault matrix instead of the quick ones"
    )
    parser.addoption("--all-drills", action="store_true", help="all faults of network and hosts instead of three")
    parser.addoption("--all-layouts", action="store_true", help="all layouts on the cluster instead of one per axis")
    parser.addoption("--all-reshardings", action="store_true", help="all pairs of layouts instead of one of each kind")


def pytest_configure(config: pytest.Config) -> None:
    if config.option.all:
        vars(config.option).update(dict.fromkeys(ALL, True))
    config.addinivalue_line("markers", "slow: takes minutes; make test-all runs it, make test does not")
    _register_examples(config.option.all)
    config.addinivalue_line("markers", "all_faults: runs only with --all-faults (make faults)")


def _register_examples(is_all: bool) -> None:
    """Set the default of hypothesis tests: 200 examples, the same in every run, or 2,000 new ones; 10 s for each."""
    examples = settings(max_examples=2000) if is_all else settings(max_examples=200, derandomize=True)
    settings.register_profile("longhaul", examples, deadline=10_000, suppress_health_check=list(HealthCheck))
    settings.load_profile("longhaul")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect what only `make test-all` or `make faults` runs. A test that is named on the command line runs."""
    named = any("::" in word for word in config.invocation_params.args)
    left_out = {
        marker for marker, wanted in (("slow", "all"), ("all_faults", "all_faults")) if not config.getoption(wanted)
    }
    deselected = [] if named else [item for item in items if any(map(item.get_closest_marker, left_out))]
    config.hook.pytest_deselected(items=deselected)
    items[:] = [item for item in items if item not in deselected]
    misplaced = {item.path.name for item in items if "finished" in _fixtures(item) and _group(item.nodeid) != CLUSTER}
    assert not misplaced, f"these files use the finished run; add them to GROUPS: {misplaced}"
    # Long work first: the cluster, where one worker often waits. Modules that need the ops come last: compiling takes
    # minutes, in which the other tests run.
    waiting = {item.path for item in items if "offload_ops" in _fixtures(item)}
    items.sort(key=lambda item: (_group(item.nodeid) != CLUSTER, item.path in waiting))


def _group(nodeid: str) -> str:
    """Return the group of a test: one of GROUPS, or its file, whose tests share fixtures, too."""
    return next((name for name, tests in GROUPS.items() if nodeid.startswith(tests)), nodeid.partition("::")[0])


def _fixtures(item: pytest.Item) -> set[str]:
    return set(getattr(item, "fixturenames", ()))


class GroupScheduling(LoadFileScheduling):
    """Gives each group of tests to one worker."""

    def _split_scope(self, nodeid: str) -> str:
        return _group(nodeid)


@pytest.hookimpl(optionalhook=True)  # xdist may be off (-p no:xdist)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> GroupScheduling:
    return GroupScheduling(config, log)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Start to compile DeepSpeed's ops if a test needs them. It takes minutes, in which tests that need none run."""
    wanted = any("offload_ops" in _fixtures(item) for item in session.items)
    first_worker = os.environ.get("PYTEST_XDIST_WORKER", "gw0") == "gw0"
    if wanted and first_worker and not session.config.option.collectonly:
        _start_build(session.config)


def _start_build(config: pytest.Config) -> None:
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "MAX_JOBS": "2"}  # each compiler process needs 2 GB
    config.stash[OPS_BUILD] = subprocess.Popen(
        [sys.executable, "-c", BUILD_OPS], env=environment, start_new_session=True, stdout=subprocess.DEVNULL
    )


def pytest_unconfigure(config: pytest.Config) -> None:
    build = config.stash.get(OPS_BUILD, None)
    if build and build.poll() is None:
        os.killpg(build.pid, signal.SIGTERM)  # ninja then ends its compilers


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Wait for the ops outside of pytest-timeout, which would count the wait as time of the first test that needs them."""
    if "offload_ops" in _fixtures(item):
        if OPS_BUILD not in item.config.stash:
            _start_build(item.config)
        item.config.stash[OPS_BUILD].wait(timeout=3600)
    return (yield)


@pytest.fixture(autouse=True)
def _own_signals_and_variables() -> Generator[None]:
    """Undo what a test does to signals that end processes, and to variables that a job sets: later tests would have them."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    variables = {name: os.environ.get(name) for name in (*RANK_VARIABLES, *OFFLINE_VARIABLES)}
    yield
    for number, handler in handlers.items():
        if signal.getsignal(number) is not handler:
            signal.signal(number, handler)
    for name, value in variables.items():
        os.environ.pop(name, None)
        os.environ.update({name: value} if value is not None else {})


@pytest.fixture(scope="session")
def offload_ops(pytestconfig: pytest.Config) -> None:
    """DeepSpeed's ops for an offloaded optimizer, compiled before ranks with a time limit need them."""
    assert pytestconfig.stash[OPS_BUILD].returncode == 0, "DeepSpeed's ops were not compiled"


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory):
    """A finished run of the whole pipeline on this machine, with two processes."""
    from tests.support.pipeline_run import PipelineRun, tiny_config

    # A limit for the step times of a busy machine.
    scale_test = {"nodes": ["full"], "max_step_time_spread": 1000}
    chain = PipelineRun(tmp_path_factory.mktemp("finished"), tiny_config(scale_test=scale_test))
    chain.run()
    return chain


@pytest.fixture
def serve():
    """A function that starts a fake tracking server, which answers with `answer(path, body)`."""
    from tests.support.tracker_server import Server

    servers: list[Server] = []

    def start(answer: Callable[[str, Any], tuple[int, Any]]) -> Server:
        servers.append(Server(answer))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()
