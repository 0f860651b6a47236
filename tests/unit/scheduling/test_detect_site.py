"""`longhaul site detect`: the file has what Slurm shows, is valid, and says what Slurm does not know."""

from __future__ import annotations

import grp
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from longhaul.cli import main
from longhaul.config.load_config import load_site
from longhaul.errors import UserError
from longhaul.scheduling import detect_site as detection
from longhaul.scheduling.detect_site import detect_site
from longhaul.scheduling.fast_interfaces import fast_interfaces
from longhaul.scheduling.find_partitions import FoundCluster, FoundPartition, found_partitions, places
from longhaul.scheduling.site_file_text import site_text
from tests.support.check_user_errors import refused_message
from tests.support.fake_nvidia_smi import fake_nvidia_smi
from tests.support.supervised_job import fake_program

PARTITIONS = """\
PartitionName=boost AllowAccounts=ALL AllowQos=long,short Default=NO MaxNodes=64 MaxTime=1-00:00:00 State=UP OverSubscribe=NO
PartitionName=test AllowAccounts=ALL AllowQos=ALL Default=NO MaxNodes=UNLIMITED MaxTime=00:30:00 State=UP
PartitionName=cores AllowAccounts=proj_cpu Default=YES MaxNodes=UNLIMITED MaxTime=UNLIMITED State=UP OverSubscribe=EXCLUSIVE
PartitionName=old AllowAccounts=ALL AllowQos=ALL Default=NO MaxNodes=UNLIMITED MaxTime=UNLIMITED State=DOWN
PartitionName=empty AllowAccounts=ALL AllowQos=ALL Default=NO MaxNodes=UNLIMITED MaxTime=UNLIMITED State=UP
"""
NODES = """\
NodeName=g1 CPUTot=32 RealMemory=500000 Gres=gpu:a100:4(S:0-1),nvme:1 AvailableFeatures=gpu,a100 Partitions=boost,test,old
NodeName=g2 CPUTot=32 RealMemory=499000 Gres=gpu:a100:4(S:0-1) AvailableFeatures=gpu,a100 Partitions=boost,old
NodeName=c1 CPUTot=128 RealMemory=250000 Gres=(null) AvailableFeatures=(null) Partitions=cores
"""
CONFIG = """\
Configuration data as of 2026-11-28T21:00:00
ClusterName             = lab
JobRequeue              = 1
SelectTypeParameters    = CR_CORE_MEMORY
"""
SCONTROL = """#!/bin/sh
case "$*" in
  "show config") cat "{folder}/config";;
  *"show job"*) echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1;;
  *) cat "{folder}/$4";;
esac
"""
ASSOCIATIONS = "proj_gpu||long,other|other\nproj_cpu||normal|normal\n"
# One line as `scontrol --oneliner show node` of Slurm 24.05 prints it. Two of 128 CPUs and 4 GiB are kept for the system.
SPECIALIZED_NODE = (
    "NodeName=nid1 Arch=x86_64 CoresPerSocket=64  CPUAlloc=0 CPUEfctv=126 CPUTot=128 CPULoad=0.02 AvailableFeatures=gpu,hbm80g "
    "ActiveFeatures=gpu,hbm80g Gres=gpu:a100:4 NodeAddr=nid1 NodeHostName=nid1 Version=24.05.4 OS=Linux 5.14.21-cray_shasta_c "
    "#1 SMP Mon Nov 13 20:38:54 UTC 2023 (5fa5be4)  RealMemory=256000 AllocMem=0 FreeMem=239000 Sockets=1 Boards=1 "
    "CoreSpecCount=1 CPUSpecList=63,127 MemSpecLimit=4096 State=IDLE ThreadsPerCore=2 TmpDisk=0 Weight=1 Owner=N/A "
    "MCS_label=N/A Partitions=gpu,shared  BootTime=2026-11-20T10:00:00\n"
)


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Fake scontrol and sacctmgr that answer with these texts."""
    texts = {"partition": PARTITIONS, "node": NODES, "config": CONFIG, "assoc": ASSOCIATIONS}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    fake_program(tmp_path, "sacctmgr", f'#!/bin/sh\necho "$*" >> "{tmp_path}/asked"\ncat "{tmp_path}/assoc"\n')
    monkeypatch.setenv("PATH", fake_program(tmp_path, "scontrol", SCONTROL.format(folder=tmp_path)))
    monkeypatch.setattr(detection.psutil, "net_if_addrs", lambda: ["lo", "eth0", "ib1", "ib0"])
    return tmp_path


def test_file_describes_the_cluster(slurm: Path):
    text = detect_site("centre")
    assert yaml.safe_load(text) == {
        "name": "centre",
        "scheduler": "slurm",
        "partitions": [
            {
                "jobs": ["gpu"],
                "name": "boost",
                "account": "proj_gpu",
                "qos": "long",
                "max_minutes": 1440,
                "max_nodes": 2,
                "node": {"cpus": 32, "memory_mb": 499_000, "gpus": 4},
                "gpu_type": "a100",
            },
            {
                "jobs": ["debug"],
                "name": "test",
                "account": "proj_gpu",
                "max_minutes": 30,
                "max_nodes": 1,
                "node": {"cpus": 32, "memory_mb": 500_000, "gpus": 4},
                "gpu_type": "a100",
            },
            {
                "jobs": ["cpu", "login"],
                "name": "cores",
                "account": "proj_cpu",
                "max_minutes": 7 * 24 * 60,
                "max_nodes": 1,
                "exclusive": True,
                "node": {"cpus": 128, "memory_mb": 250_000},
            },
        ],
        "interconnect": {"kind": "infiniband", "socket_interface": "ib0"},
        "software": {"kind": "current"},
        "accelerator": {"cuda": "13.0"},
    }
    (slurm / "found.yaml").write_text(text)
    assert load_site("./found.yaml", slurm).partition_for("debug").name == "test"


def test_file_says_what_slurm_does_not_know(slurm: Path):
    text = detect_site("centre")
    for comment in (
        "# or proj_cpu",
        "# constraint: nodes have the features a100, gpu",
        "# the partition has no limit",
        "# gpu_memory_gib, gpu_peak_tflops: not known to Slurm",
        "# not known to Slurm: the version of your torch",
        "# Not up now: old (DOWN)\n",
    ):
        assert comment in text, comment


def test_cluster_without_accounting_and_gpus_gets_its_default_partition():
    partitions = [
        "PartitionName=main",
        "Default=YES",
        "MaxNodes=UNLIMITED",
        "MaxTime=UNLIMITED",
        "State=UP",
        "AllowAccounts=a,b",
    ]
    fields = [dict(word.split("=", 1) for word in partitions)]
    nodes = [{"NodeName": "n1", "CPUTot": "8", "RealMemory": "8000", "Partitions": "main"}]
    text = site_text("lab", FoundCluster(found_partitions(fields, nodes)))
    assert yaml.safe_load(text)["accelerator"] == "cpu" and "# account: the partition accepts a, b" in text
    assert yaml.safe_load(text)["partitions"][0]["jobs"] == ["gpu"]


def found(partitions: str, nodes: str) -> dict[str, FoundPartition]:
    """Return the partitions in these texts of scontrol, by name."""
    fields = [[dict(re.findall(r"(\w+)=(\S*)", line)) for line in text.splitlines()] for text in (partitions, nodes)]
    return {partition.name: partition for partition in found_partitions(fields[0], fields[1])}


def test_cpus_and_memory_that_slurm_keeps_for_the_system_are_left_out():
    """sbatch refuses a job that asks for them."""
    partition = found("PartitionName=gpu MaxTime=1:00:00 State=UP", SPECIALIZED_NODE)["gpu"]
    assert (partition.cpus, partition.memory_mb, partition.gpus) == (126, 256_000 - 4096, 4)


def test_cpus_of_a_slurm_that_prints_no_effective_ones():
    partition = found("PartitionName=gpu State=UP", SPECIALIZED_NODE.replace("CPUEfctv=126 ", ""))["gpu"]
    assert partition.cpus == 128 - 1 * 2


@pytest.mark.parametrize(
    ("gres", "gpus"),
    [
        ("gpu:3090:4", (4, "3090")),
        ("gpu:2080ti:8(S:0-1),nvme:1", (8, "2080ti")),
        ("gpu:1g.10gb:7", (7, "1g.10gb")),
        ("gpu:4", (4, None)),
        ("gpu:a100:6(S:0-1),gpu:a100_1g.5gb:14(S:0-1)", (6, "a100")),
        ("gpu:a100_1g.5gb:14,gpu:a100:1,gpu:v100:2", (2, "v100")),
        ("gpu:a100:2(S:0),gpu:a100:2(S:1)", (4, "a100")),
        ("gpu:nvidia_a100_1g.10gb+me:4(S:0-1)", (4, "nvidia_a100_1g.10gb+me")),
        ("shard:8,gpu_mem:80", (0, None)),
    ],
)
def test_types_of_gpus_may_begin_with_a_digit(gres: str, gpus: tuple[int, str | None]):
    node = f"NodeName=n CPUTot=8 RealMemory=9000 Gres={gres} Partitions=p"
    partition = found("PartitionName=p State=UP", node)["p"]
    assert (partition.gpus, partition.gpu_type) == gpus


def test_shape_is_that_of_the_nodes_with_the_most_gpus_together():
    """Values of different nodes would describe a node that does not exist."""
    lines = [f"CPUTot=64 RealMemory=500000 Gres=gpu:a100:4 Partitions=p NodeName=a{number}" for number in range(3)]
    lines += [
        "CPUTot=32 RealMemory=200000 Gres=gpu:v100:8 Partitions=p NodeName=v",
        "CPUTot=8 RealMemory=9000 Gres=(null) Partitions=p NodeName=c",
    ]
    partition = found("PartitionName=p State=UP MaxNodes=UNLIMITED", "\n".join(lines))["p"]
    assert (partition.gpus, partition.gpu_type, partition.cpus, partition.memory_mb) == (4, "a100", 64, 500_000)
    assert (partition.nodes, partition.max_nodes, partition.is_mixed) == (3, 3, True)
    assert "# the partition also has 8 x v100\n" in site_text("lab", FoundCluster([partition]))


def test_whole_gpus_are_preferred_to_slices():
    lines = [f"CPUTot=64 RealMemory=500000 Gres=gpu:a100_1g.5gb:28 Partitions=mig,gpu NodeName=m{n}" for n in range(3)]
    lines += ["CPUTot=64 RealMemory=500000 Gres=gpu:a100:3,gpu:a100_2g.10gb:3 Partitions=gpu NodeName=g"]
    shown = found("PartitionName=mig State=UP Default=YES\nPartitionName=gpu State=UP", "\n".join(lines))
    assert places(list(shown.values()))["gpu"].name == "gpu"
    text = site_text("lab", FoundCluster(list(shown.values())))
    assert "gpus: 3}" in text and "# the partition also has 28 x a100_1g.5gb, 3 x a100_2g.10gb\n" in text
    assert "# MIG slices" in site_text("lab", FoundCluster([shown["mig"]]))


def test_limits_of_a_partition_per_node_count():
    lines = "PartitionName=shared State=UP MaxCPUsPerNode=64 MaxMemPerNode=128000\nPartitionName=gpu State=UP "
    partitions = found(lines + "MaxCPUsPerNode=UNLIMITED MaxMemPerNode=UNLIMITED", SPECIALIZED_NODE)
    assert (partitions["shared"].cpus, partitions["shared"].memory_mb) == (64, 128_000)
    assert partitions["gpu"].cpus == 126


@pytest.mark.parametrize(
    ("partition", "cluster", "memory_mb"),
    [
        ("MaxMemPerCPU=4000", "UNLIMITED", 128_000),
        ("MaxMemPerNode=UNLIMITED", "2000", 64_000),
        ("MaxMemPerCPU=4000", "2000", 128_000),  # that of the partition replaces it
        ("MaxMemPerCPU=90000", "2000", 499_000),
    ],
)
def test_memory_is_within_the_limits_per_cpu(slurm: Path, partition: str, cluster: str, memory_mb: int):
    (slurm / "partition").write_text(PARTITIONS.replace("MaxNodes=64", partition))
    (slurm / "config").write_text(f"{CONFIG}MaxMemPerCPU = {cluster}\n")
    assert yaml.safe_load(detect_site("centre"))["partitions"][0]["node"]["memory_mb"] == memory_mb


def test_limit_of_cpus_per_socket_counts():
    """The node has one socket of two threads per core."""
    limited = found("PartitionName=gpu State=UP MaxCPUsPerSocket=48 MaxCPUsPerNode=UNLIMITED", SPECIALIZED_NODE)["gpu"]
    assert limited.cpus == 48
    two_sockets = SPECIALIZED_NODE.replace("Sockets=1", "Sockets=2")
    assert found("PartitionName=gpu State=UP MaxCPUsPerSocket=48", two_sockets)["gpu"].cpus == 96


def test_partition_for_large_jobs_alone_gets_neither_training_nor_jobs_of_one_node(slurm: Path):
    """A job on fewer than MinNodes nodes waits without end."""
    large = "PartitionName=large MinNodes=4 MaxTime=9-00:00:00 State=UP\n"
    large += "PartitionName=wide MinNodes=2 MaxTime=9-00:00:00 State=UP\n"
    (slurm / "partition").write_text(PARTITIONS.replace("boost Allow", "boost MinNodes=0 Allow") + large)
    cores = "\n".join(f"NodeName=w{n} CPUTot=8 RealMemory=900 Gres=(null) Partitions=wide" for n in range(4))
    (slurm / "node").write_text(f"{NODES}{BIG_NODES.replace('=big', '=large')}\n{cores}\n")
    text = detect_site("centre")
    assert [partition["name"] for partition in yaml.safe_load(text)["partitions"]] == ["boost", "test", "cores"]
    assert "# MinNodes" not in text
    (slurm / "partition").write_text(large)
    text = detect_site("centre")
    assert [partition["name"] for partition in yaml.safe_load(text)["partitions"]] == ["large"]
    assert "    # MinNodes: jobs on fewer than 4 nodes do not start here\n" in text


def test_memory_that_slurm_does_not_know_is_not_asked_for(slurm: Path):
    (slurm / "node").write_text(NODES.replace("RealMemory=499000", "RealMemory=1").replace("=250000", "=1"))
    text = detect_site("centre")
    gpu, _, cores = yaml.safe_load(text)["partitions"]
    assert gpu["node"]["memory_mb"] == 500_000 and "memory" not in gpu
    assert cores["memory"] == "omit" and text.count("# memory_mb: RealMemory is 1") == 1


def test_partitions_of_administrators_are_left_out_and_newer_names_of_exclusive_are_known():
    """Slurm 26 prints Exclusive=NODE beside OverSubscribe=NO."""
    lines = "PartitionName=gpu State=UP Exclusive=NODE OverSubscribe=NO\nPartitionName=shared State=UP RootOnly=YES"
    partitions = found(lines, SPECIALIZED_NODE)
    assert list(partitions) == ["gpu"] and partitions["gpu"].is_exclusive


def test_accounts_are_those_of_this_cluster_that_the_partition_accepts(slurm: Path):
    (slurm / "partition").write_text(
        "PartitionName=boost DenyAccounts=old_project AllowQos=ALL MaxTime=1:00:00 State=UP\n"
    )
    (slurm / "assoc").write_text(
        "old_project||normal|\ncores|cores|normal|\nproj|boost|normal|\nproj||normal|\nother||normal|\n"
    )
    text = detect_site("centre")
    assert '    account: "proj"  # or other\n' in text
    assert "cluster=lab" in (slurm / "asked").read_text().split()


def test_account_has_a_qos_that_the_partition_allows(slurm: Path):
    (slurm / "assoc").write_text("teach||normal|normal\nproj_gpu||long|long\nproj_cpu||normal|normal\n")
    text = detect_site("centre")
    assert '    name: "boost"\n    account: "proj_gpu"\n    qos: "long"\n' in text.replace(
        "    # constraint: nodes have the features a100, gpu\n", ""
    )


BIG_NODES = "\n".join(f"NodeName=b{n} CPUTot=8 RealMemory=900 Gres=gpu:h100:8 Partitions=big" for n in range(9))


@pytest.mark.parametrize(
    ("keys", "comment"),
    [
        ("AllowAccounts=lab", "# Not for your groups, or your accounts and their QOS: big"),
        ("AllowQos=urgent", "# Not for your groups, or your accounts and their QOS: big"),
        ("DenyQos=long,normal,other", "# Not for your groups, or your accounts and their QOS: big"),
        ("AllowGroups=no-such-group,other", "# Not for your groups, or your accounts and their QOS: big"),
        ("Hidden=YES", ""),
        ("ReqResv=YES", ""),
        ("AllocNodes=other-login", ""),
        ("PreemptMode=REQUEUE PriorityTier=0", "# Not used: big"),
    ],
)
def test_larger_partition_that_is_not_for_training_is_not_chosen(slurm: Path, keys: str, comment: str):
    (slurm / "partition").write_text(f"{PARTITIONS}PartitionName=big MaxTime=1-00:00:00 State=UP {keys}\n")
    (slurm / "node").write_text(NODES + BIG_NODES.replace("Partitions=big", "Partitions=big,test") + "\n")
    text = detect_site("centre")
    assert yaml.safe_load(text)["partitions"][0]["name"] == "boost" and comment in text


def test_partition_for_other_groups_is_not_offered_where_slurm_has_no_accounts(slurm: Path):
    """The fields are those of one line of Slurm 24.05."""
    own = grp.getgrgid(os.getegid()).gr_name
    line = (
        "PartitionName={} AllowGroups={} AllowAccounts=ALL AllowQos=ALL AllocNodes=ALL Default=NO QoS=N/A DefaultTime=NONE "
        "DisableRootJobs=NO ExclusiveUser=NO ExclusiveTopo=NO GraceTime=0 Hidden=NO MaxNodes=UNLIMITED MaxTime=1-00:00:00 "
        "MinNodes=0 LLN=NO MaxCPUsPerNode=UNLIMITED MaxCPUsPerSocket=UNLIMITED Nodes=b[0-8] PriorityJobFactor=1 PriorityTier=1 "
        "RootOnly=NO ReqResv=NO OverSubscribe=NO OverTimeLimit=NONE PreemptMode=OFF State=UP TotalCPUs=72 TotalNodes=9\n"
    )
    (slurm / "assoc").write_text("")
    (slurm / "node").write_text(NODES + BIG_NODES + BIG_NODES.replace("=big", "=boost").replace("=b", "=d", 1))
    (slurm / "partition").write_text(line.format("big", "physics,chemistry") + line.format("boost", f"physics,{own}"))
    text = detect_site("centre")
    assert [partition["name"] for partition in yaml.safe_load(text)["partitions"]] == ["boost"]
    (slurm / "partition").write_text(line.format("big", "physics,chemistry"))
    with pytest.raises(UserError, match="no partition that is up, has nodes and is for your groups"):
        detect_site("centre")


def test_qos_is_named_where_the_partition_denies_the_default_one(slurm: Path):
    (slurm / "partition").write_text("PartitionName=boost DenyQos=normal,test MaxTime=1:00:00 State=UP\n")
    (slurm / "assoc").write_text("proj||normal,test,long|normal\n")
    assert '    qos: "long"\n' in detect_site("centre")
    (slurm / "partition").write_text("PartitionName=boost DenyQos=test MaxTime=1:00:00 State=UP\n")
    assert "    qos:" not in detect_site("centre")


def test_sub_account_may_use_partitions_of_the_account_above_it(slurm: Path):
    (slurm / "partition").write_text(PARTITIONS.replace("ALL AllowQos=long,short", "physics AllowQos=ALL"))
    answer = f"""#!/bin/sh
case "$*" in
  *ParentName*) printf 'proj_gpu|group\\ngroup|physics\\nphysics|root\\nroot|\\n';;
  *) cat "{slurm}/assoc";;
esac
"""
    fake_program(slurm, "sacctmgr", answer)
    assert yaml.safe_load(detect_site("centre"))["partitions"][0]["name"] == "boost"


def test_file_says_that_no_partition_accepts_the_accounts_and_that_jobs_may_be_preempted(slurm: Path):
    (slurm / "partition").write_text(
        "PartitionName=boost AllowAccounts=lab MaxTime=1-00:00:00 State=UP PreemptMode=CANCEL PriorityTier=1\n"
        "PartitionName=test AllowAccounts=lab MaxTime=00:30:00 State=UP PreemptMode=CANCEL PriorityTier=2\n"
    )
    text = detect_site("centre")
    assert "# No partition accepts your accounts (proj_cpu, proj_gpu) and their QOS." in text
    assert text.count("    # PreemptMode CANCEL: jobs of partition test take nodes from jobs here\n") == 1


@pytest.mark.parametrize(
    ("preempt_type", "low", "high", "comment"),
    [
        (
            "preempt/partition_prio",
            "GANG,SUSPEND",
            "boost,test",
            "# PreemptMode GANG,SUSPEND: jobs of partition test take nodes",
        ),
        ("preempt/partition_prio", "OFF", "boost,test", ""),
        ("preempt/partition_prio", "REQUEUE", "test", ""),  # no common nodes
        ("preempt/qos", "REQUEUE", "boost,test", ""),
        ("preempt/none", "REQUEUE", "boost,test", ""),
        ("(null)", "REQUEUE", "boost,test", ""),
    ],
)
def test_tier_of_a_partition_with_common_nodes_preempts_only_with_that_plugin(
    slurm: Path, preempt_type: str, low: str, high: str, comment: str
):
    (slurm / "config").write_text(f"{CONFIG}PreemptType             = {preempt_type}\n")
    (slurm / "partition").write_text(
        f"PartitionName=boost MaxTime=1-00:00:00 State=UP PreemptMode={low} PriorityTier=1\n"
        "PartitionName=test MaxTime=00:30:00 State=UP PreemptMode=OFF PriorityTier=5\n"
    )
    (slurm / "node").write_text(NODES.replace("boost,test,old", high).replace("boost,old", "boost"))
    text = detect_site("centre")
    assert text.count("# Preempt") == bool(comment) and comment in text


@pytest.mark.parametrize(("preempt_type", "qos"), [("preempt/qos", "short"), ("preempt/partition_prio", "spare")])
def test_qos_whose_jobs_make_room_for_others_is_not_chosen(slurm: Path, preempt_type: str, qos: str):
    """It often has the longest jobs. Preemption by QOS also works between partitions, and without a tier."""
    (slurm / "config").write_text(f"{CONFIG}PreemptType             = {preempt_type}\n")
    (slurm / "partition").write_text(
        "PartitionName=boost AllowQos=spare,short MaxTime=9-00:00:00 State=UP PreemptMode=REQUEUE\n"
    )
    (slurm / "assoc").write_text("proj||spare,short,normal|normal\n")
    (slurm / "qos").write_text("spare|7-00:00:00||||||||\nshort|1-00:00:00|||||||DenyOnLimit|idle,spare\n")
    answer = f'#!/bin/sh\ncase "$*" in *"show qos"*) cat "{slurm}/qos";; *) cat "{slurm}/assoc";; esac\n'
    fake_program(slurm, "sacctmgr", answer)
    text = detect_site("centre")
    assert yaml.safe_load(text)["partitions"][0]["qos"] == qos and "# Preempt" not in text
    (slurm / "assoc").write_text("proj||spare|spare\n")
    comment = "    # Preempt: jobs of QOS short take nodes from jobs of QOS spare\n"
    assert (comment in detect_site("centre")) == (preempt_type == "preempt/qos")


MANY_QOS = "big|1-00:00:00||||||||\nacc_debug|02:00:00||||||||\nlong|4-00:00:00|node=3|||||||\nwide|4-00:00:00|cpu=320|||||||\n"


@pytest.mark.parametrize(
    ("default", "qos", "line"),
    [
        ("big", MANY_QOS, '"big"  # or wide, long, reserved, acc_debug'),
        ("normal", MANY_QOS, '"wide"  # or long, big, reserved, acc_debug'),
        ("normal", "", '"big"  # or long, reserved, wide, acc_debug'),
    ],
)
def test_qos_is_the_default_one_or_the_one_with_the_largest_limits(slurm: Path, default: str, qos: str, line: str):
    """It was the first one by name, which is often the one for tests."""
    names = "acc_debug,big,long,reserved,wide"
    (slurm / "partition").write_text(f"PartitionName=boost AllowQos={names} MaxTime=9-00:00:00 State=UP\n")
    (slurm / "assoc").write_text(f"proj||{names},normal|{default}\n")
    (slurm / "qos").write_text(qos and f"{qos}reserved||||||||RequiresReservation|\n")
    answer = f'#!/bin/sh\ncase "$*" in *"show qos"*) cat "{slurm}/qos";; *) cat "{slurm}/assoc";; esac\n'
    fake_program(slurm, "sacctmgr", answer)
    assert f"    qos: {line}\n" in detect_site("centre")


def test_limits_of_qos_and_account_are_written_with_their_source(slurm: Path):
    """At centres whose partitions have no limit, the QOS has one."""
    answers = """#!/bin/sh
case "$*" in
  *"show qos"*) printf 'long|12:00:00|node=1|||||||\\nnormal|||||||||\\n';;
  *MaxWall*) printf 'me|proj_gpu||long|||||\\nme|proj_cpu||normal|2-00:00:00||||\\n';;
  *) cat "{folder}/assoc";;
esac
"""
    fake_program(slurm, "sacctmgr", answers.format(folder=slurm))
    text = detect_site("centre")
    assert "    max_minutes: 720  # limit of QOS long\n    max_nodes: 1  # limit of QOS long\n" in text
    assert "    max_minutes: 2880  # limit of account proj_cpu\n" in text
    assert "    max_minutes: 30\n" in text, "the partition for tests has the smaller limit"


def test_gpus_of_amd_need_a_rocm_build():
    fields = [{"PartitionName": "g", "State": "UP", "MaxTime": "1:00:00"}]
    nodes = [{"CPUTot": "64", "RealMemory": "1000", "Partitions": "g", "Gres": "gpu:mi250:8"}]
    cluster = FoundCluster(found_partitions(fields, nodes), interfaces=["hsn0", "hsn1"])
    site = yaml.safe_load(site_text("a", cluster))
    assert site["accelerator"] == {"rocm": "6.4"} and site["interconnect"]["socket_interface"] == "hsn0,hsn1"


def test_controller_runs_where_jobs_run_longest_and_cpu_jobs_where_they_have_cores_of_their_own():
    common = {"State": "UP", "MaxNodes": "UNLIMITED"}
    fields = [
        {**common, "PartitionName": "gpu", "MaxTime": "10:00:00"},
        {**common, "PartitionName": "cores", "MaxTime": "05:00:00"},
        {**common, "PartitionName": "shared", "MaxTime": "20:00:00", "OverSubscribe": "YES:4"},
    ]
    nodes = [
        {"CPUTot": "8", "RealMemory": "800", "Partitions": "gpu", "Gres": "gpu:2"},
        {"CPUTot": "8", "RealMemory": "800", "Partitions": "cores,shared"},
    ]
    found = {place: partition.name for place, partition in places(found_partitions(fields, nodes)).items()}
    assert found == {"gpu": "gpu", "cpu": "cores", "login": "shared"}


def test_cpu_jobs_run_where_they_may_run_longest_and_not_on_the_partition_for_tests():
    lines = ["devel MaxTime=00:30:00", "shared MaxTime=1-00:00:00 OverSubscribe=YES:4", "gpu MaxTime=1-00:00:00"]
    nodes = [f"NodeName=d{n} CPUTot=8 RealMemory=800 Partitions=devel,wide" for n in range(9)]
    nodes += ["NodeName=c CPUTot=8 RealMemory=800 Partitions=devel,cores,shared"]
    nodes += ["NodeName=g CPUTot=8 RealMemory=800 Gres=gpu:4 Partitions=gpu"]

    def chosen(*names: str) -> str:
        text = "\n".join(f"PartitionName={name} State=UP" for name in (*lines, *names))
        return places(list(found(text, "\n".join(nodes)).values()))["cpu"].name

    assert chosen() == "shared" and chosen("wide MaxTime=10:00:00") == "wide"
    assert chosen("wide MaxTime=10:00:00", "cores MaxTime=2-00:00:00") == "cores"


def test_short_limit_of_a_qos_makes_no_partition_one_for_tests():
    nodes = "NodeName=a CPUTot=8 RealMemory=800 Gres=gpu:4 Partitions=main,small,test\n"
    nodes += "NodeName=b CPUTot=8 RealMemory=800 Gres=gpu:4 Partitions=main\n"
    shown = found(
        "PartitionName=main State=UP MaxTime=2-00:00:00\nPartitionName=small State=UP MaxTime=2-00:00:00\n"
        "PartitionName=test State=UP MaxTime=00:30:00",
        nodes,
    )
    limited = replace(shown["main"], max_minutes=60, limits_time="QOS short")
    chosen = places([limited, shown["small"], shown["test"]])
    assert {place: partition.name for place, partition in chosen.items()} == {"gpu": "main", "debug": "test"}


@pytest.fixture
def probed(slurm: Path) -> Path:
    """Fake sbatch that runs the probe script here, on a node with two H200; scontrol knows no job any more."""
    script = f"""#!/bin/sh
for word; do case "$word" in --output=*) out=${{word#--output=}};; esac; done
echo "$*" >> "{slurm}/submitted"
sh "$word" > "$out"
echo "7;lab"
"""
    fake_program(slurm, "sbatch", script)
    fake_nvidia_smi(slurm)
    fake_program(slurm, "scontrol", SCONTROL.format(folder=slurm))
    return slurm


def test_probe_adds_what_slurm_does_not_know(probed: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(probed)
    text = detect_site("centre", probe_minutes=1)
    calls = (probed / "submitted").read_text().splitlines()
    assert [re.findall(r"--(?:partition|time|gpus-per-node)=(\S+)", call) for call in calls] == [
        ["a100:4", "1", "boost"],
        ["a100:4", "1", "test"],
        ["1", "cores"],
    ]
    found = yaml.safe_load(text)
    assert found["partitions"][0]["node"] == {
        "cpus": 32,
        "memory_mb": 499_000,
        "gpus": 4,
        "gpu_memory_gib": 140.4,
        "gpu_peak_tflops": 989,
    }
    assert found["accelerator"] == {"cuda": "13.0"}
    assert "# NVIDIA H200; Slurm counts 4 GPUs, and the probe found 2 on " in text
    assert "on a GPU node" in text and not list(probed.glob("longhaul-probe-*"))


def test_probe_that_finds_no_gpus_says_so(probed: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(probed)
    fake_program(probed, "nvidia-smi", "#!/bin/sh\nexit 9\n")
    text = detect_site("centre", probe_minutes=1)
    assert "gpus: 4}  # Slurm counts 4 GPUs, and the probe found none on " in text


def test_refused_probe_leaves_what_slurm_knows(probed: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(probed)
    fake_program(probed, "sbatch", "#!/bin/sh\necho 'sbatch: error: Invalid account' >&2; exit 1\n")
    text = detect_site("centre", probe_minutes=1)
    assert "# the probe found nothing: refused: Invalid account" in text
    assert yaml.safe_load(text)["partitions"][0]["node"] == {"cpus": 32, "memory_mb": 499_000, "gpus": 4}


def test_settings_of_the_cluster_are_written(slurm: Path):
    (slurm / "config").write_text("JobRequeue = 0\nSelectTypeParameters = CR_CORE\n")
    (slurm / "node").write_text(NODES.replace("CPUTot=128", "CPUTot=128 ThreadsPerCore=2"))
    text = detect_site("centre")
    site = yaml.safe_load(text)
    assert site["requeue"] is False and {partition["memory"] for partition in site["partitions"]} == {"omit"}
    comment = "# threads_per_core: cpus counts 2 hardware threads of each core; with 1, write cpus: 64, too\n"
    assert text.count(comment) == 1


def test_interfaces_of_fast_networks_are_found():
    assert fast_interfaces(["lo", "eth0", "hsn1", "hsn0", "ib0.8001", "docker0"]) == ["hsn0", "hsn1"]
    assert fast_interfaces(["ibp129s0", "ibp65s0d1", "ib0", "ibs1.8001", "ibmveth"]) == ["ib0", "ibp129s0", "ibp65s0d1"]


def test_cluster_without_partitions_and_silent_slurm_are_refused_until_slurm_shows_some(slurm: Path):
    fake_program(slurm, "scontrol", "#!/bin/sh\necho 'Unable to contact slurm controller' >&2; exit 1\n")
    with pytest.raises(UserError, match=r"Slurm does not answer: Unable to contact.*\s+remedy: .* try again"):
        detect_site("centre")
    fake_program(slurm, "scontrol", SCONTROL.format(folder=slurm))
    (slurm / "partition").write_text(PARTITIONS.replace("State=UP", "State=DOWN"))
    with pytest.raises(UserError, match=r"shows no partition.*\s+remedy: .* try again later"):
        detect_site("centre")
    (slurm / "partition").write_text(PARTITIONS)
    assert "boost" in detect_site("centre")


@pytest.mark.parametrize("file", ["my centre.yaml", ".yaml", "ümlaut.yaml"])
def test_file_whose_name_is_no_name_of_a_site_is_refused_until_another_is_named(
    slurm: Path, file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refused_message(capsys, "site", "detect", "--out", str(tmp_path / file))
    assert f"site {Path(file).stem!r} is no name" in message and not (tmp_path / file).exists()
    with pytest.raises(SystemExit) as ended:
        main(["site", "detect", "--out", str(tmp_path / "my-centre.yaml")])
    assert ended.value.code == 0


@pytest.mark.parametrize("name", ["123", "on", "null"])
def test_name_that_yaml_reads_as_another_type_is_quoted(slurm: Path, name: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["site", "detect", "--out", str(tmp_path / f"{name}.yaml")])
    assert ended.value.code == 0 and load_site(str(tmp_path / f"{name}.yaml"), tmp_path).name == name


def test_value_that_no_site_file_may_have_is_written_and_named(
    slurm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (slurm / "partition").write_text(PARTITIONS.replace("MaxNodes=64", "MaxNodes=0"))
    message = refused_message(capsys, "site", "detect", "--out", str(tmp_path / "mine.yaml"))
    assert "max_nodes is 0" in message and "max_nodes: 0" in (tmp_path / "mine.yaml").read_text()


def test_existing_file_is_refused_until_it_is_moved_away(
    slurm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "mine.yaml"
    out.write_text("precious")
    words = ["site", "detect", "--out", str(out)]
    assert "mine.yaml exists already" in refused_message(capsys, *words) and out.read_text() == "precious"
    out.rename(tmp_path / "old.yaml")
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 0 and load_site(str(out), tmp_path).name == "mine"
