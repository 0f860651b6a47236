"""A real Slurm cluster on one machine: slurmctld and several slurmd, each host in its own namespaces.

A host is a process that is PID 1 of its own PID namespace. It has its own network (an address and a link that can be
unplugged), host name and mounts. Killing the process powers the host off. All hosts share the file system, as at a computing
centre. The bridge and its links are in the controller's network namespace: nothing of them is left on the machine, and two
clusters cannot reach each other.

Needs root and Debian's slurm-wlm, munge, iproute2 and util-linux; accounting also needs slurmdbd and mariadb-server.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import psutil

from tests.support.slurm_conf import CONTROLLER, ClusterSize, slurm_conf, slurmdbd_conf

T = TypeVar("T")
_NETWORK = "10.77.0"
# Slurm wants a distinct character device for each GPU; no process opens them.
_FAKE_GPUS = (
    "/dev/null",
    "/dev/zero",
    "/dev/full",
    "/dev/random",
    "/dev/urandom",
    "/dev/tty",
    "/dev/ptmx",
    "/dev/kmsg",
)
_SYSTEM_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
_PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "ip", "unshare", "nsenter")
PACKAGES = ("slurm-wlm", "munge", "iproute2", "util-linux", "procps")
ACCOUNTING_PROGRAMS = ("slurmdbd", "mariadbd")
ACCOUNTING_PACKAGES = ("slurmdbd", "slurm-wlm-mysql-plugin", "mariadb-server")


def missing_programs(accounting: bool = False) -> list[str]:
    """Return the programs that a cluster needs and this machine does not have."""
    wanted = (*_PROGRAMS, *(ACCOUNTING_PROGRAMS if accounting else ()))
    return [program for program in wanted if not shutil.which(program, path=_SYSTEM_PATH)]


class ClusterError(RuntimeError):
    """A command of the test cluster failed."""


class VirtualCluster:
    """A cluster whose state is in `folder`. Another process may open the same folder and use the cluster."""

    def __init__(self, folder: Path, size: ClusterSize | None = None) -> None:
        self.folder, self.size = folder.absolute(), size or ClusterSize()
        self._started: dict[str, subprocess.Popen[bytes]] = {}
        self._etc, self._run, self._log = (self.folder / name for name in ("etc", "run", "log"))

    # Start and end of the cluster

    def up(self, dies_with_caller: bool = False) -> None:
        """Start the cluster and wait until all nodes are idle.

        dies_with_caller: end all hosts when this process dies.

        Raises:
            ClusterError: it is up already, or a part of it does not start.
        """
        if self.is_up():
            raise ClusterError(f"a cluster is up in {self.folder}: make cluster-down")
        self._dies_with_caller = dies_with_caller
        try:
            self._write_files()
            self._start_controller()
            for name in self.node_names:
                self.boot(name)
            self._wait(30, "all nodes idle", self.all_idle)
        except BaseException:
            self.down()
            raise

    def down(self) -> None:
        """End every process of the cluster and remove its folder. Do nothing if it is down."""
        for name in [*self.node_names_on_disk(), CONTROLLER]:
            self.power_off(name)
        shutil.rmtree(self.folder, ignore_errors=True)

    def is_on(self, name: str) -> bool:
        return self._holder(name) is not None

    def is_up(self) -> bool:
        return self._holder(CONTROLLER) is not None

    @property
    def node_names(self) -> list[str]:
        return [f"n{index}" for index in range(1, self.size.nodes + 1)]

    def node_names_on_disk(self) -> list[str]:
        return sorted(path.stem for path in self._run.glob("n*.holder"))

    # Commands and faults

    def command(self, words: Sequence[str], host: str = CONTROLLER, cwd: Path | None = None) -> list[str]:
        """Return the command that runs `words` on a host. The controller is the login node."""
        holder = self._holder(host)
        if holder is None:
            raise ClusterError(f"host {host} is off")
        where = f"--wd={cwd or Path.cwd()}"
        return ["nsenter", f"--target={holder.pid}", "--net", "--uts", "--mount", "--pid", where, "--", *words]

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
        return {**kept, "PATH": _SYSTEM_PATH}

    def boot(self, name: str) -> None:
        """Start a node."""
        if self._holder(name):
            raise ClusterError(f"{name} is on")
        (self.folder / "spool" / name).mkdir(parents=True, exist_ok=True)
        self._start_host(name)
        self._connect(name)
        self._daemon(name, "slurmd", "-N", name, "-b")

    def power_off(self, name: str) -> None:
        """Kill every process of a host at once, like a power failure."""
        if holder := self._holder(name):
            os.kill(holder.pid, signal.SIGKILL)
            psutil.wait_procs([holder], timeout=5)
        if outer := self._started.pop(name, None):
            outer.wait(timeout=5)
        (self._run / f"{name}.holder").unlink(missing_ok=True)

    def restart_slurmctld(self, away_s: float = 3.0) -> None:
        """Kill slurmctld and start it again after `away_s` seconds; its state is on disk."""
        self._kill_daemon(CONTROLLER, "slurmctld")
        time.sleep(away_s)
        self._daemon(CONTROLLER, "slurmctld")

    def restart_slurmd(self, name: str, away_s: float = 2.0) -> None:
        """Kill a node's slurmd and start it again after `away_s` seconds. Jobs on the node keep running."""
        self._kill_daemon(name, "slurmd")
        time.sleep(away_s)
        self._daemon(name, "slurmd", "-N", name)

    def _kill_daemon(self, host: str, daemon: str) -> None:
        holder = self._holder(host)
        if holder is None:
            raise ClusterError(f"host {host} is off")
        daemons = [child for child in holder.children(recursive=True) if child.name() == daemon]
        for process in daemons:
            process.kill()
        psutil.wait_procs(daemons, timeout=5)

    def unplug(self, name: str) -> None:
        """Take a node's link down. Its processes keep running."""
        self._on_bridge("link", "set", f"v-{name}", "down")

    def plug(self, name: str) -> None:
        """Take a node's link up again."""
        self._on_bridge("link", "set", f"v-{name}", "up")

    # Hosts

    def _start_host(self, name: str) -> None:
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
        if getattr(self, "_dies_with_caller", False):
            words = ["setpriv", "--pdeathsig=KILL", *words]
        with (self._log / f"{name}.host.log").open("ab") as log:
            outer = self._started[name] = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, env=self.environment()
            )
        holder = self._wait(10, f"host {name}", lambda: _sleeping_child(outer.pid))
        (self._run / f"{name}.holder").write_text(f"{holder.pid} {holder.create_time()}")

    def _holder(self, name: str) -> psutil.Process | None:
        """Return the host's PID 1; None if the host is off, even if another process has that PID since."""
        try:
            pid, created = (self._run / f"{name}.holder").read_text().split()
            process = psutil.Process(int(pid))
            alive = process.create_time() == float(created) and process.status() != psutil.STATUS_ZOMBIE
        except (OSError, ValueError, psutil.NoSuchProcess):
            return None
        return process if alive else None

    def _connect(self, name: str) -> None:
        holder = self._holder(name)
        assert holder is not None
        self._on_bridge("link", "delete", f"v-{name}", check=False)
        self._on_bridge("link", "add", f"v-{name}", "type", "veth", "peer", "name", "eth0", "netns", str(holder.pid))
        self._on_bridge("link", "set", f"v-{name}", "master", "br0", "up")
        self.run("ip", "addr", "add", f"{self._address(name)}/24", "dev", "eth0", host=name)
        self.run("ip", "link", "set", "eth0", "up", host=name)

    def _on_bridge(self, *words: str, check: bool = True) -> None:
        """Run `ip` in the controller's network namespace and this machine's PID namespace, because `netns` takes its PIDs."""
        holder = self._holder(CONTROLLER)
        if holder is None:
            raise ClusterError("the cluster is down")
        command = ["nsenter", f"--target={holder.pid}", "--net", "--", "ip", *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=self.environment())
        if check and done.returncode:
            raise ClusterError(f"ip {shlex.join(words)}: {done.stderr}")

    def _address(self, name: str) -> str:
        return f"{_NETWORK}.1" if name == CONTROLLER else f"{_NETWORK}.{10 + int(name[1:])}"

    # Daemons

    def _start_controller(self) -> None:
        self._start_host(CONTROLLER)
        for words in (
            "link add br0 type bridge",
            f"addr add {self._address(CONTROLLER)}/24 dev br0",
            "link set br0 up",
        ):
            self._on_bridge(*words.split())
        munge = self._run / "munge"
        files = {
            "key-file": self.folder / "munge/key",
            "socket": munge / "socket",
            "seed-file": self.folder / "munge/seed",
        }
        files |= {"pid-file": self._run / "munged.pid", "log-file": self._log / "munged.log"}
        self._daemon(CONTROLLER, "munged", "--force", *(f"--{key}={path}" for key, path in files.items()))
        if self.size.accounting:
            self._start_accounting()
        self._daemon(CONTROLLER, "slurmctld")

    def _start_accounting(self) -> None:
        data, socket = self.folder / "db", self._run / "mysql.sock"
        install = ["mariadb-install-db", "--no-defaults", "--user=root", f"--datadir={data}"]
        self.run(*install, "--auth-root-authentication-method=socket", "--skip-test-db", timeout_s=120)
        server = [
            "mariadbd",
            "--no-defaults",
            "--user=root",
            f"--datadir={data}",
            f"--socket={socket}",
            "--skip-networking",
        ]
        server += ["--innodb-buffer-pool-size=64M", "--innodb-log-file-size=32M", "--performance-schema=OFF"]
        server += [f"--pid-file={self._run / 'mariadbd.pid'}", "--innodb-flush-log-at-trx-commit=0"]
        server += ["--innodb-lock-wait-timeout=900"]
        with (self._log / "mariadbd.log").open("ab") as log:
            subprocess.Popen(
                self.command(server),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env=self.environment(),
            )
        ping = ("mariadb-admin", "--no-defaults", f"--socket={socket}", "ping")
        self._wait(60, "mariadb", lambda: self._succeeds(*ping))
        self._daemon(CONTROLLER, "env", f"MYSQL_UNIX_PORT={socket}", "slurmdbd")
        self._wait(60, "slurmdbd", lambda: self._succeeds("sacctmgr", "-n", "show", "cluster"))
        self.run("sacctmgr", "-iQ", "add", "cluster", "lab")

    def _daemon(self, host: str, *words: str) -> None:
        """Start a program that daemonizes itself. Its output goes to a file, so that it does not keep a pipe open."""
        with (self._log / f"{host}.{Path(words[0]).name}.out").open("ab") as log:
            done = subprocess.run(
                self.command(words, host, cwd=Path("/")),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                timeout=60,
                check=False,
                env=self.environment(),
            )
        if done.returncode:
            raise ClusterError(f"{words[0]} on {host}: exit {done.returncode}\n{Path(log.name).read_text()[-2000:]}")

    def _succeeds(self, *words: str) -> bool:
        try:
            self.run(*words, timeout_s=5)
            return True
        except (ClusterError, subprocess.TimeoutExpired):
            return False

    def all_idle(self) -> bool:
        """Return whether every node is idle."""
        shown = self.run("sinfo", "-h", "-p", "main", "-t", "idle", "-o", "%D", check=False, timeout_s=10)
        return shown.strip() == str(self.size.nodes)

    def _wait(self, seconds: float, what: str, ready: Callable[[], T]) -> T:
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

    # Files

    def _write_files(self) -> None:
        for name in ("etc", "run/munge", "log", "spool", "state", "munge"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        for name in ("etc", "run", "run/munge"):
            (self.folder / name).chmod(0o755)
        (self.folder / "munge").chmod(0o700)
        Path("/etc/slurm").mkdir(exist_ok=True)  # only a mount point
        key = self.folder / "munge" / "key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        addresses = {name: self._address(name) for name in (CONTROLLER, *self.node_names)}
        hosts = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in addresses.items())]
        (self._etc / "hosts").write_text("\n".join(hosts) + "\n")
        (self._etc / "slurm.conf").write_text(slurm_conf(self.size, self.folder, addresses))
        gres = ["AutoDetect=off", *(f"Name=gpu File={device}" for device in _FAKE_GPUS[: self.size.gpus])]
        (self._etc / "gres.conf").write_text("\n".join(gres) + "\n")
        if self.size.accounting:
            (self._etc / "slurmdbd.conf").touch(mode=0o600)
            (self._etc / "slurmdbd.conf").write_text(slurmdbd_conf(self.folder, addresses))


def _sleeping_child(pid: int) -> psutil.Process | None:
    """Return the child of `unshare` once its shell has mounted everything and become `sleep`."""
    try:
        children = psutil.Process(pid).children()
        return next((child for child in children if child.name() == "sleep"), None)
    except psutil.NoSuchProcess:
        raise ClusterError("the host's namespaces could not be created: is this root, with CAP_SYS_ADMIN?") from None
