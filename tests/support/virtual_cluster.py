"""A real Slurm cluster on one machine: slurmctld and several slurmd, each on its own virtual host.

Needs root and Debian's slurm-wlm, munge, iproute2 and util-linux; accounting also needs slurmdbd and mariadb-server.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path

import psutil

from tests.support.slurm_conf import CONTROLLER, ClusterSize, has_gpus, slurm_conf, slurmdbd_conf
from tests.support.virtual_hosts import SYSTEM_PATH, ClusterError, VirtualHosts

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
# What sacctmgr adds to a cluster that is set up like a centre.
_CENTRE_ACCOUNTS = (
    "add qos gpu_long,gpu_debug",
    "add account proj_gpu,proj_cpu",
    "add user root account=proj_gpu qos=normal,gpu_long,gpu_debug",
    "add user root account=proj_cpu qos=normal",
)
_PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "ip", "unshare", "nsenter")
# A path of a socket has at most 108 characters (unix(7)). Slurm's longest is <folder>/spool/n1/n1_<job>.4294967291. If it does
# not fit, Slurm requeues the job again and again.
_MAX_PATH = 108 - len("/spool/n1/n1_9999.4294967291")
PACKAGES = ("slurm-wlm", "munge", "iproute2", "util-linux", "procps")
ACCOUNTING_PROGRAMS = ("slurmdbd", "mariadbd")
ACCOUNTING_PACKAGES = ("slurmdbd", "slurm-wlm-mysql-plugin", "mariadb-server")


def missing_programs(accounting: bool = False) -> list[str]:
    """Return the programs that a cluster needs and this machine does not have."""
    wanted = (*_PROGRAMS, *(ACCOUNTING_PROGRAMS if accounting else ()))
    return [program for program in wanted if not shutil.which(program, path=SYSTEM_PATH)]


class VirtualCluster(VirtualHosts):
    """A cluster whose state is in `folder`. Another process may open the same folder and use the cluster."""

    def __init__(self, folder: Path, size: ClusterSize | None = None) -> None:
        super().__init__(folder)
        self.size = size or ClusterSize()

    # Start and end of the cluster

    def up(self, dies_with_caller: bool = False) -> None:
        """Start the cluster and wait until all nodes are idle.

        dies_with_caller: end all hosts when this process dies.

        Raises:
            ClusterError: it is up already, its folder's path is too long, or a part of it does not start.
        """
        if len(str(self.folder)) > _MAX_PATH:
            raise ClusterError(
                f"{self.folder} has {len(str(self.folder))} characters; at most {_MAX_PATH}, for sockets of jobs"
            )
        if self.is_up():
            raise ClusterError(f"a cluster is up in {self.folder}: make cluster-down")
        self._dies_with_caller = dies_with_caller
        try:
            self._write_files()
            self._start_controller()
            for name in self.node_names:
                self.boot(name)
            self.wait(30, "all nodes idle", self.all_idle)
        except BaseException:
            self.down()
            raise

    def down(self) -> None:
        """End every process of the cluster and remove its folder. Do nothing if it is down."""
        for name in [*self.node_names_on_disk(), CONTROLLER]:
            self.power_off(name)
        shutil.rmtree(self.folder, ignore_errors=True)

    def boot(self, name: str) -> None:
        """Start a node."""
        if self.init_process(name):
            raise ClusterError(f"{name} is on")
        (self.folder / "spool" / name).mkdir(parents=True, exist_ok=True)
        self.start_host(name)
        self.connect(name)
        self._daemon(name, "slurmd", "-N", name, "-b")

    def is_up(self) -> bool:
        return self.init_process(CONTROLLER) is not None

    @property
    def node_names(self) -> list[str]:
        return [f"n{index}" for index in range(1, self.size.nodes + 1)]

    def all_idle(self) -> bool:
        """Return whether every node is idle."""
        shown = self.run("sinfo", "-h", "-p", "main", "-t", "idle", "-o", "%D", check=False, timeout_s=10)
        return shown.strip() == str(self.size.nodes)

    def ends_of_logs(self, characters: int = 3000) -> str:
        """Return the last `characters` of each log of a daemon."""
        logs = [path for path in sorted(self._log.iterdir()) if path.stat().st_size]
        return "\n".join(f"== {path.name}\n{path.read_text(errors='replace')[-characters:]}" for path in logs)

    # Faults

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
        init = self.init_process(host)
        if init is None:
            raise ClusterError(f"host {host} is off")
        daemons = [child for child in init.children(recursive=True) if child.name() == daemon]
        for process in daemons:
            process.kill()
        psutil.wait_procs(daemons, timeout=5)

    def write_host_names(self, known: bool = True) -> None:
        """Write the /etc/hosts of all hosts; without the names of the nodes, for which Slurm has addresses, if not known."""
        names = [CONTROLLER, *(self.node_names if known else ())]
        hosts = ["127.0.0.1 localhost", *(f"{self.address(name)} {name}" for name in names)]
        (self._etc / "hosts").write_text("\n".join(hosts) + "\n")

    # Daemons

    def _start_controller(self) -> None:
        self.start_bridge()
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
        self.wait(60, "mariadb", lambda: self._succeeds(*ping))
        self._daemon(CONTROLLER, "env", f"MYSQL_UNIX_PORT={socket}", "slurmdbd")
        self.wait(60, "slurmdbd", lambda: self._succeeds("sacctmgr", "-n", "show", "cluster"))
        self.run("sacctmgr", "-iQ", "add", "cluster", "lab")
        for words in _CENTRE_ACCOUNTS if self.size.centre else ():
            self.run("sacctmgr", "-iQ", *words.split())

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

    # Files

    def _write_files(self) -> None:
        for name in ("etc", "run/munge", "log", "spool", "state", "munge"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        for name in ("etc", "run", "run/munge"):
            (self.folder / name).chmod(0o755)
        (self.folder / "munge").chmod(0o700)
        key = self.folder / "munge" / "key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        addresses = {name: self.address(name) for name in (CONTROLLER, *self.node_names)}
        self.write_host_names()
        (self._etc / "slurm.conf").write_text(slurm_conf(self.size, self.folder, addresses))
        nodes = ",".join(name for name in self.node_names if has_gpus(self.size, name))
        gpus = (f"NodeName={nodes} Name=gpu File={device}" for device in _FAKE_GPUS[: self.size.gpus])
        gres = ["AutoDetect=off", *gpus]
        (self._etc / "gres.conf").write_text("\n".join(gres) + "\n")
        if self.size.accounting:
            (self._etc / "slurmdbd.conf").touch(mode=0o600)
            (self._etc / "slurmdbd.conf").write_text(slurmdbd_conf(self.folder, addresses))
