"""A real Slurm cluster on one machine: slurmctld and N slurmd, every host in namespaces of its own.

A host is a process that is PID 1 of its own PID namespace, with its own network (address, link that can be pulled), name
and mounts; killing it powers the host off. The file system is shared, as at a centre. The link and the bridge live in the
controller's network namespace, so nothing is left on the machine and two clusters never meet.

Needs root, and Debian's slurm-wlm, munge, iproute2, util-linux; with accounting slurmdbd and mariadb-server too.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from tests.support.slurm_conf import CONTROLLER, Shape, slurm_conf, slurmdbd_conf

_NETWORK = "10.77.0"
# Slurm wants a distinct character device for each GPU; nothing opens them.
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
    """Programs that a cluster needs and this machine lacks."""
    wanted = (*_PROGRAMS, *(ACCOUNTING_PROGRAMS if accounting else ()))
    return [program for program in wanted if not shutil.which(program, path=_SYSTEM_PATH)]


class ClusterError(RuntimeError):
    """The cluster could not do what was asked."""


class VirtualCluster:
    """A cluster whose state lies in `folder`; another process may open the same folder and go on with it."""

    def __init__(self, folder: Path, shape: Shape | None = None) -> None:
        self.folder, self.shape = folder.absolute(), shape or Shape()
        self._started: dict[str, subprocess.Popen[bytes]] = {}
        self._etc, self._run, self._log = (self.folder / name for name in ("etc", "run", "log"))

    # Life of the cluster

    def up(self, dies_with_caller: bool = False) -> None:
        """Starts it; all nodes are idle when this returns. ClusterError when it is up, or something does not start."""
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
        """Ends every process of it and removes its folder; does nothing when it is down."""
        for name in [*self.node_names_on_disk(), CONTROLLER]:
            self.power_off(name)
        shutil.rmtree(self.folder, ignore_errors=True)

    def is_on(self, name: str) -> bool:
        return self._holder(name) is not None

    def is_up(self) -> bool:
        return self._holder(CONTROLLER) is not None

    @property
    def node_names(self) -> list[str]:
        return [f"n{index}" for index in range(1, self.shape.nodes + 1)]

    def node_names_on_disk(self) -> list[str]:
        return sorted(path.stem for path in self._run.glob("n*.holder"))

    # What people and tests do with it

    def command(self, words: Sequence[str], host: str = CONTROLLER, cwd: Path | None = None) -> list[str]:
        """The words that run a command on a host; the controller is the login node."""
        holder = self._holder(host)
        if holder is None:
            raise ClusterError(f"host {host} is off")
        where = f"--wd={cwd or Path.cwd()}"
        return ["nsenter", f"--target={holder.pid}", "--net", "--uts", "--mount", "--pid", where, "--", *words]

    def run(
        self, *words: str, host: str = CONTROLLER, timeout_s: float = 60, check: bool = True, cwd: Path | None = None
    ) -> str:
        """Runs a command on a host and returns its standard output; ClusterError shows why it failed."""
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
        """This process' environment, with the daemons' folders on the PATH and no other cluster's settings."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "SBATCH_", "SRUN_"))}
        return {**kept, "PATH": _SYSTEM_PATH}

    def boot(self, name: str) -> None:
        """Switches a node on."""
        if self._holder(name):
            raise ClusterError(f"{name} is on")
        (self.folder / "spool" / name).mkdir(parents=True, exist_ok=True)
        self._start_host(name)
        self._connect(name)
        self._daemon(name, "slurmd", "-N", name, "-b")

    def power_off(self, name: str) -> None:
        """Ends every process of a host at once, like pulling its plug."""
        if holder := self._holder(name):
            os.kill(holder.pid, signal.SIGKILL)
            psutil.wait_procs([holder], timeout=5)
        if outer := self._started.pop(name, None):
            outer.wait(timeout=5)
        (self._run / f"{name}.holder").unlink(missing_ok=True)

    def restart_slurmctld(self, away_s: float = 3.0) -> None:
        """Kills the controller's daemon and starts it again after `away_s` seconds; its state is on disk."""
        self._kill_daemon(CONTROLLER, "slurmctld")
        time.sleep(away_s)
        self._daemon(CONTROLLER, "slurmctld")

    def restart_slurmd(self, name: str, away_s: float = 2.0) -> None:
        """Kills a node's daemon and starts it again; jobs of the node go on meanwhile."""
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
        """Takes a node's link down; its processes go on."""
        self._on_bridge("link", "set", f"v-{name}", "down")

    def plug(self, name: str) -> None:
        """Takes it up again."""
        self._on_bridge("link", "set", f"v-{name}", "up")

    # How a host is made

    def _start_host(self, name: str) -> None:
        mounts = [f"mount --bind {shlex.quote(str(self._etc / 'hosts'))} /etc/hosts"]
        # jobs lose SLURM_CONF on their way, so the default path must hold this cluster's files
        mounts.append(f"mount --bind {shlex.quote(str(self._etc))} /etc/slurm")
        # process numbers are a host's own, and so must be the shared memory that is named after them
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
        """The host's PID 1; None when it is off, even if its number was given to another process since."""
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
        """`ip` in the controller's network, but in this machine's PID namespace, whose numbers `netns` takes."""
        holder = self._holder(CONTROLLER)
        if holder is None:
            raise ClusterError("the cluster is down")
        command = ["nsenter", f"--target={holder.pid}", "--net", "--", "ip", *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=self.environment())
        if check and done.returncode:
            raise ClusterError(f"ip {shlex.join(words)}: {done.stderr}")

    def _address(self, name: str) -> str:
        return f"{_NETWORK}.1" if name == CONTROLLER else f"{_NETWORK}.{10 + int(name[1:])}"

    # Slurm's own parts

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
        if self.shape.accounting:
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
        """Starts a program that goes to the background by itself; it never holds our output."""
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
        """Whether every node is there and does nothing."""
        shown = self.run("sinfo", "-h", "-p", "main", "-t", "idle", "-o", "%D", check=False, timeout_s=10)
        return shown.strip() == str(self.shape.nodes)

    def _wait(self, seconds: float, what: str, ready):
        """The first true value of `ready()`; ClusterError with the daemons' last words when it does not come."""
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
        Path("/etc/slurm").mkdir(exist_ok=True)  # a mount point; nothing is written there
        key = self.folder / "munge" / "key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        addresses = {name: self._address(name) for name in (CONTROLLER, *self.node_names)}
        hosts = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in addresses.items())]
        (self._etc / "hosts").write_text("\n".join(hosts) + "\n")
        (self._etc / "slurm.conf").write_text(slurm_conf(self.shape, self.folder, addresses))
        gres = ["AutoDetect=off", *(f"Name=gpu File={device}" for device in _FAKE_GPUS[: self.shape.gpus])]
        (self._etc / "gres.conf").write_text("\n".join(gres) + "\n")
        if self.shape.accounting:
            (self._etc / "slurmdbd.conf").touch(mode=0o600)
            (self._etc / "slurmdbd.conf").write_text(slurmdbd_conf(self.folder, addresses))


def _sleeping_child(pid: int) -> psutil.Process | None:
    """The child of `unshare`, once its shell has made the mounts and become `sleep`."""
    try:
        children = psutil.Process(pid).children()
        return next((child for child in children if child.name() == "sleep"), None)
    except psutil.NoSuchProcess:
        raise ClusterError("the host's namespaces could not be made: is this root, with CAP_SYS_ADMIN?") from None
