"""The test cluster's slurm.conf and slurmdbd.conf (slurm.conf(5), slurmdbd.conf(5))."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

CONTROLLER = "ctl"
_BEHAVIOUR = """\
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# works without cgroups
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
# the nodes have more cores than the machine
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerCPU=100
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
# with a short time, the executor plugin uses sacct instead of squeue
MinJobAge=300
KillWait=3
SlurmdTimeout=10
SlurmctldTimeout=30
MessageTimeout=5
TCPTimeout=2
BatchStartTimeout=10
CompleteWait=0
InactiveLimit=0
OverTimeLimit=0
ReturnToService=2
GresTypes=gpu
"""
# Name -> settings. A job of "urgent" preempts jobs of the other partitions: they are requeued or cancelled.
_PARTITIONS = {
    "main": "Default=YES PriorityTier=1 PreemptMode=REQUEUE",
    "graceful": "Default=NO PriorityTier=1 PreemptMode=REQUEUE GraceTime=20",
    "killable": "Default=NO PriorityTier=1 PreemptMode=CANCEL",
    "killable-graceful": "Default=NO PriorityTier=1 PreemptMode=CANCEL GraceTime=20",
    "urgent": "Default=NO PriorityTier=10",
}
# Partitions of a cluster that is set up like a centre: who may use them, and which nodes they have. n1 has GPUs, n2 has none.
_CENTRE_PARTITIONS = {
    "accelerated": "Nodes=n1 MaxTime=600 AllowAccounts=proj_gpu AllowQos=gpu_long",
    "cores": "Nodes=n2 MaxTime=300 AllowAccounts=proj_cpu AllowQos=normal",
    "quick": "Nodes=n1 MaxTime=30 AllowAccounts=proj_gpu AllowQos=gpu_debug",
    "large": "Nodes=n2 MinNodes=2 MaxTime=9000 AllowAccounts=proj_cpu AllowQos=normal",
    "shared": "Nodes=n2 MaxTime=1200 OverSubscribe=YES AllowAccounts=proj_cpu AllowQos=normal",
}
_FEATURES = {"n1": "gpu,h100", "n2": "cpu"}


@dataclass(frozen=True)
class ClusterSize:
    """Number and size of the nodes; accounting: with slurmdbd.

    centre: like a computing centre, with accounting. Accounts, QOS and limits are enforced, four partitions differ in them, and
            only n1 has GPUs.
    """

    nodes: int = 2
    cpus: int = 8
    memory_mb: int = 8000
    gpus: int = 2
    accounting: bool = False
    centre: bool = False


def slurm_conf(size: ClusterSize, folder: Path, addresses: Mapping[str, str]) -> str:
    """Return slurm.conf. addresses: host -> IP address, the controller's included; folder: of all state files."""
    lines = [*_paths(folder, addresses[CONTROLLER]), _BEHAVIOUR, *_accounting(size, folder, addresses[CONTROLLER])]
    lines += [_node(size, name, address) for name, address in addresses.items() if name != CONTROLLER]
    nodes = f"n[1-{size.nodes}]"
    lines += [
        f"PartitionName={name} Nodes={nodes} MaxTime=INFINITE State=UP {settings}"
        for name, settings in _PARTITIONS.items()
    ]
    if size.centre:
        lines += [f"PartitionName={name} State=UP {settings}" for name, settings in _CENTRE_PARTITIONS.items()]
    return "\n".join(lines) + "\n"


def _node(size: ClusterSize, name: str, address: str) -> str:
    gres = f" Gres=gpu:{size.gpus}" if size.gpus and has_gpus(size, name) else ""
    features = f" Feature={_FEATURES[name]}" if size.centre else ""
    return f"NodeName={name} NodeAddr={address} CPUs={size.cpus} RealMemory={size.memory_mb}{gres}{features}"


def has_gpus(size: ClusterSize, name: str) -> bool:
    return not size.centre or name == "n1"


def _paths(folder: Path, controller: str) -> Iterator[str]:
    run, log = folder / "run", folder / "log"
    yield "ClusterName=lab"
    yield f"SlurmctldHost={CONTROLLER}({controller})"
    yield f"AuthInfo=socket={run}/munge/socket,cred_expire=10"
    yield f"StateSaveLocation={folder}/state"
    yield f"SlurmctldPidFile={run}/slurmctld.pid"
    yield f"SlurmctldLogFile={log}/slurmctld.log"
    yield f"SlurmdPidFile={run}/slurmd-%n.pid"
    yield f"SlurmdSpoolDir={folder}/spool/%n"
    yield f"SlurmdLogFile={log}/slurmd-%n.log"


def _accounting(size: ClusterSize, folder: Path, controller: str) -> Iterator[str]:
    if not size.accounting:
        yield "AccountingStorageType=accounting_storage/none"
        return
    yield "AccountingStorageType=accounting_storage/slurmdbd"
    yield f"AccountingStorageHost={controller}"
    yield f"AccountingStoragePass={folder}/run/munge/socket"
    yield "AccountingStorageTRES=gres/gpu"
    if size.centre:
        yield "AccountingStorageEnforce=associations,limits,qos"


def slurmdbd_conf(folder: Path, addresses: Mapping[str, str]) -> str:
    """Return slurmdbd.conf of the accounting daemon, which runs on the controller."""
    return f"""\
AuthType=auth/munge
AuthInfo=socket={folder}/run/munge/socket
DbdHost={CONTROLLER}
DbdAddr={addresses[CONTROLLER]}
SlurmUser=root
PidFile={folder}/run/slurmdbd.pid
LogFile={folder}/log/slurmdbd.log
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=slurm_acct
"""
