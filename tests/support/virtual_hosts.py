"""Hosts of the test cluster: processes in their own namespaces on this machine.

A host is a process that is PID 1 of its own PID namespace. It has its own network (an address and a link that can be
unplugged), host name and mounts. Killing the process powers the host off. All hosts share the file system, as at a computing
centre. The bridge and its links are in the controller's network namespace: nothing of them is left on the machine, and two
clusters cannot reach each other.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import psutil

from tests.support.slurm_conf import CONTROLLER

T = TypeVar("T")
_NETWORK = "10.77.0"
SYSTEM_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


class ClusterError(RuntimeError):
    """A command of the test cluster failed."""


_POWER_OFF_TIMEOUT_S = 60
"""A killed process ends after its write to the disk, which takes long on a busy disk."""
_REAP_TIMEOUT_S = 3


class VirtualHosts:
    """The hosts of one cluster. Another process may open the same folder and use them."""

    def __init__(self, folder: Path) -> None:
        """folder: for the PIDs and logs of the hosts."""
        self.folder = folder.absolute()
        self._started: dict[str, subprocess.Popen[bytes]] = {}
        self._dies_with_caller = False
        self._etc, self._run, self._log = (self.folder / name for name in ("etc", "run", "log"))

    def command(self, words: Sequence[str], host: str = CONTROLLER, cwd: Path | None = None) -> list[str]:
        """Return the command that runs `words` on a host. The controller is the login node."""
        init = self.init_process(host)
        if init is None:
            raise ClusterError(f"host {host} is off")
        where = f"--wd={cwd or Path.cwd()}"
        return ["nsenter", f"--target={init.pid}", "--net", "--uts", "--mount", "--pid", where, "--", *words]

    def run(
        self, *words: str, host: str = CONTROLLER, timeout_s: float = 60, check: bool = True, cwd: Path | None = None
    ) -> str:
        """Run a command on a host and return its standard output.

        Raises:
            ClusterError: it failed; the message has its output.
        """
        done = subprocess.run(
            self.command(words, host, cwd),
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
            env=self.environment(),
            stdin=subprocess.DEVNULL,
        )
        if check and done.returncode:
            raise ClusterError(f"{shlex.join(words)} on {host}: exit {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout

    @staticmethod
    def environment() -> dict[str, str]:
        """Return this process' environment with the folders of Slurm's daemons on the PATH, without settings of Slurm."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "SBATCH_", "SRUN_"))}
        return {**kept, "PATH": SYSTEM_PATH}

    def is_on(self, name: str) -> bool:
        return self.init_process(name) is not None

    def node_names_on_disk(self) -> list[str]:
        return sorted(path.stem for path in self._run.glob("n*.init"))

    def power_off(self, name: str) -> None:
        """Kill every process of a host at once, like a power failure."""
        if init := self.init_process(name):
            namespace = _pid_namespace(init.pid)
            os.kill(init.pid, signal.SIGKILL)  # the kernel then kills every process of the namespace
            if left := _wait_for_end(namespace, init.pid):
                print(
                    f"host {name}: killed, and not ended within {_POWER_OFF_TIMEOUT_S} s: {', '.join(left)}", flush=True
                )
        if outer := self._started.pop(name, None):
            _end(outer)
        (self._run / f"{name}.init").unlink(missing_ok=True)

    def unplug(self, name: str) -> None:
        """Take a node's link down. Its processes keep running."""
        self.on_bridge("link", "set", f"v-{name}", "down")

    def plug(self, name: str) -> None:
        """Take a node's link up again."""
        self.on_bridge("link", "set", f"v-{name}", "up")

    def start_host(self, name: str) -> None:
        mounts = [f"mount --bind {shlex.quote(str(self._etc / 'hosts'))} /etc/hosts"]
        # Jobs do not inherit SLURM_CONF, so the default path must hold this cluster's files.
        mounts.append(f"mount --bind {shlex.quote(str(self._etc))} /etc/slurm")
        # Shared memory is named after PIDs, which are unique only per host.
        mounts.append("mount -t tmpfs tmpfs /dev/shm")
        script = (
            f"hostname {name} && {' && '.join(mounts)} && ip link set lo up && trap '' INT HUP && exec sleep infinity"
        )
        words = ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        words += ["--propagation=private", "sh", "-c", script]
        if self._dies_with_caller:
            words = ["setpriv", "--pdeathsig=KILL", *words]
        with (self._log / f"{name}.host.log").open("ab") as log:
            outer = self._started[name] = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, env=self.environment()
            )
        init = self.wait(10, f"host {name}", lambda: _sleeping_child(outer.pid))
        (self._run / f"{name}.init").write_text(f"{init.pid} {init.create_time()}")

    def start_bridge(self) -> None:
        """Start the controller, with the bridge that connects all hosts."""
        Path("/etc/slurm").mkdir(exist_ok=True)  # only a mount point
        self.start_host(CONTROLLER)
        for words in (
            "link add br0 type bridge",
            f"addr add {self.address(CONTROLLER)}/24 dev br0",
            "link set br0 up",
        ):
            self.on_bridge(*words.split())

    def init_process(self, name: str) -> psutil.Process | None:
        """Return the host's PID 1; None if the host is off, even if another process has that PID since."""
        try:
            pid, created = (self._run / f"{name}.init").read_text().split()
            process = psutil.Process(int(pid))
            alive = process.create_time() == float(created) and process.status() != psutil.STATUS_ZOMBIE
        except (OSError, ValueError, psutil.NoSuchProcess):
            return None
        return process if alive else None

    def connect(self, name: str) -> None:
        init = self.init_process(name)
        assert init is not None
        self.on_bridge("link", "delete", f"v-{name}", check=False)
        self.on_bridge("link", "add", f"v-{name}", "type", "veth", "peer", "name", "eth0", "netns", str(init.pid))
        self.on_bridge("link", "set", f"v-{name}", "master", "br0", "up")
        self.run("ip", "addr", "add", f"{self.address(name)}/24", "dev", "eth0", host=name)
        self.run("ip", "link", "set", "eth0", "up", host=name)

    def on_bridge(self, *words: str, check: bool = True) -> None:
        """Run `ip` where the bridge and its links are."""
        self.ip_on(CONTROLLER, *words, check=check)

    def ip_on(self, host: str, *words: str, check: bool = True) -> None:
        """Run `ip` in a host's network namespace and this machine's PID namespace, because `netns` takes its PIDs."""
        init = self.init_process(host)
        if init is None:
            raise ClusterError(f"host {host} is off")
        command = ["nsenter", f"--target={init.pid}", "--net", "--", "ip", *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=self.environment())
        if check and done.returncode:
            raise ClusterError(f"ip {shlex.join(words)}: {done.stderr}")

    def address(self, name: str) -> str:
        return f"{_NETWORK}.1" if name == CONTROLLER else f"{_NETWORK}.{10 + int(name[1:])}"

    def wait(self, seconds: float, what: str, ready: Callable[[], T]) -> T:
        """Return the first true value of `ready()`.

        Raises:
            ClusterError: there is none within `seconds`; the message has the ends of the daemons' logs.
        """
        deadline = time.monotonic() + seconds
        while not (value := ready()):
            if time.monotonic() > deadline:
                logs = "\n".join(f"{path.name}: {path.read_text()[-600:]}" for path in sorted(self._log.glob("*")))
                raise ClusterError(f"not within {seconds:g} s: {what}\n{logs}")
            time.sleep(0.05)
        return value


@contextmanager
def two_hosts(folder: Path) -> Iterator[VirtualHosts]:
    """Provide the hosts n1 and n2 and a login node, without Slurm. Each has no address but its own and 127.0.0.1."""
    hosts, names = VirtualHosts(folder), ("n1", "n2")
    for name in ("etc", "run", "log"):
        (hosts.folder / name).mkdir(parents=True)
    lines = ["127.0.0.1 localhost", *(f"{hosts.address(name)} {name}" for name in names)]
    (hosts.folder / "etc" / "hosts").write_text("\n".join(lines) + "\n")
    try:
        hosts.start_bridge()
        for name in names:
            hosts.start_host(name)
            hosts.connect(name)
        yield hosts
    finally:
        for name in (*names, CONTROLLER):
            hosts.power_off(name)


def _end(outer: subprocess.Popen[bytes]) -> None:
    """Wait for the end of `unshare`, or kill it.

    It waits for PID 1 of the host, which does not end while a zombie is left in its namespace. An `nsenter` that was killed
    leaves its command to this machine's PID 1, which reaps zombies late, or never in a container.
    """
    try:
        outer.wait(timeout=_REAP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        outer.kill()
        outer.wait(timeout=_POWER_OFF_TIMEOUT_S)


def _pid_namespace(pid: int) -> str:
    """Return the name of a process' PID namespace; empty if the process has ended."""
    try:
        return str(Path(f"/proc/{pid}/ns/pid").readlink())
    except OSError:
        return ""


def _wait_for_end(namespace: str, init: int) -> list[str]:
    """Wait until no process of a PID namespace runs, apart from its PID 1; zombies do not run. Return those that still do.

    Nothing can end a killed process that waits for its disk.
    """
    deadline = time.monotonic() + _POWER_OFF_TIMEOUT_S
    while (left := _running_in(namespace, init)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


def _running_in(namespace: str, init: int) -> list[str]:
    pids = [pid for pid in psutil.pids() if pid != init and _pid_namespace(pid) == namespace]
    return [f"{pid} {status}" for pid in pids if (status := _status(pid)) not in (None, psutil.STATUS_ZOMBIE)]


def _status(pid: int) -> str | None:
    try:
        return psutil.Process(pid).status()
    except psutil.NoSuchProcess:
        return None


def _sleeping_child(pid: int) -> psutil.Process | None:
    """Return the child of `unshare` once its shell has mounted everything and become `sleep`."""
    try:
        children = psutil.Process(pid).children()
        return next((child for child in children if child.name() == "sleep"), None)
    except psutil.NoSuchProcess:
        raise ClusterError("the host's namespaces could not be created: is this root, with CAP_SYS_ADMIN?") from None
