"""`longhaul site check` compares max_minutes and max_nodes with the limits that scontrol and sacctmgr show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from longhaul.cli import main
from longhaul.config.load_config import load_site
from longhaul.config.partition_config import Partition
from longhaul.planning.slurm_request import SlurmRequest
from longhaul.scheduling.compare_with_slurm_limits import compare_limits, compare_partition
from longhaul.scheduling.slurm_limits import SlurmLimits, fewest_nodes
from tests.support.small_configs import SITE, write_config
from tests.support.supervised_job import fake_program

NODE = {"cpus": 64, "memory_mb": 500_000, "gpus": 8}
GPU = {"PartitionName": "gpu", "MaxTime": "1-00:00:00", "MaxNodes": "UNLIMITED", "TotalNodes": "32", "QoS": "N/A"}
QOS = {
    "Name": "long",
    "MaxWall": "",
    "MaxTRES": "",
    "MaxTRESPU": "",
    "MaxTRESPA": "",
    "GrpTRES": "",
    "Flags": "",
}

PROJ = {
    "User": "me",
    "Account": "proj",
    "Partition": "",
    "DefaultQOS": "",
    "MaxWall": "06:00:00",
    "MaxTRES": "node=2",
    "GrpTRES": "",
}


def lines(
    site: dict[str, Any], gpu: dict[str, str] | None = None, *qos: dict[str, str], account: dict[str, str] | None = None
) -> dict[str, tuple[str, str]]:
    """Return subject -> what Slurm allows and the problem, of a partition with 1440 minutes and 16 nodes."""
    written = {"jobs": ["gpu"], "name": "gpu", "max_minutes": 1440, "max_nodes": 16, "node": NODE, **site}
    names = {"gpu": {**GPU, **(gpu or {})}}
    shown = SlurmLimits(names, {row["Name"]: row for row in qos}, [account] if account else [])
    found = compare_partition(Partition.model_validate(written, strict=False), shown)
    return {line.subject: (line.found, line.problem) for line in found}


def test_smaller_values_than_the_limits_fit():
    assert lines({}) == {"max_minutes": ("1440 (partition gpu)", ""), "max_nodes": ("32 (partition gpu)", "")}


def test_values_beyond_the_limits_of_a_partition_are_named():
    found = lines({"max_minutes": 1441}, {"MaxNodes": "4"})
    assert found["max_minutes"][1].startswith("set max_minutes to at most 1440; jobs beyond the limit of partition gpu")
    assert found["max_nodes"] == (
        "4 (partition gpu)",
        "set max_nodes to at most 4; jobs beyond the limit of partition gpu never start",
    )


@pytest.mark.parametrize(
    ("limits", "nodes"),
    [
        ({"MaxTRES": "node=8"}, 8),
        ({"MaxTRESPU": "gres/gpu=24"}, 3),
        ({"MaxTRES": "cpu=640,gres/gpu:a100=800"}, 10),
        ({"GrpTRES": "mem=1T,node=12"}, 12),
        ({"MaxTRESPA": "cpu=32"}, 1),
        ({"GrpTRES": "node=0"}, 0),
    ],
)
def test_limits_of_a_qos_count_nodes_gpus_and_cpus(limits: dict[str, str], nodes: int):
    found = lines({"qos": "long"}, None, {**QOS, **limits, "MaxWall": "12:00:00"})
    assert found["max_nodes"][0] == f"{nodes} (QOS long)" and found["max_minutes"][0] == "720 (QOS long)"
    assert found["max_nodes"][1] and found["max_minutes"][1]


def test_limit_of_zero_asks_for_another_qos():
    """The site file must allow one node at least."""
    found = lines({"qos": "long"}, None, {**QOS, "GrpTRES": "node=0"})
    assert found["max_nodes"][1].startswith("name another account, QOS or partition; jobs beyond the limit of QOS long")


def test_qos_of_the_partition_counts_and_may_replace_the_partitions_limit():
    part = {**QOS, "Name": "part", "MaxWall": "2-00:00:00", "Flags": "DenyOnLimit,PartitionTimeLimit"}
    found = lines({"max_minutes": 2880}, {"QoS": "part"}, part)
    assert found["max_minutes"] == ("2880 (QOS part)", "")


def test_limits_of_the_account_count():
    account = PROJ
    assert lines({"account": "proj"}, account=account)["max_nodes"][0] == "2 (account proj)"
    assert lines({"account": "other"}, account=account)["max_nodes"][0] == "32 (partition gpu)"
    assert (
        lines({"account": "proj"}, account={**account, "Partition": "cpu"})["max_minutes"][0] == "1440 (partition gpu)"
    )


def test_limit_of_a_qos_replaces_the_smaller_one_of_the_account():
    """A QOS for long jobs is made for it. Limits that the QOS does not have remain those of the account."""
    qos = {**QOS, "MaxWall": "20:00:00"}
    found = lines({"account": "proj", "qos": "long", "max_minutes": 1200}, None, qos, account=PROJ)
    assert found["max_minutes"] == ("1200 (QOS long)", "") and found["max_nodes"][0] == "2 (account proj)"
    found = lines({"account": "proj", "qos": "long"}, None, {**qos, "MaxTRES": "node=8"}, account=PROJ)
    assert found["max_nodes"][0] == "8 (QOS long)"
    found = lines({"account": "proj", "qos": "long"}, None, {**qos, "MaxTRES": "gres/gpu=64"}, account=PROJ)
    assert found["max_nodes"][0] == "2 (account proj)", "another resource"


def test_qos_of_the_partition_goes_before_that_of_the_job():
    part, job = {**QOS, "Name": "part", "MaxWall": "10:00:00"}, {**QOS, "MaxWall": "05:00:00"}
    assert lines({"qos": "long"}, {"QoS": "part"}, part, job)["max_minutes"][0] == "600 (QOS part)"
    job["Flags"] = "DenyOnLimit,OverPartQOS"
    assert lines({"qos": "long"}, {"QoS": "part"}, part, job)["max_minutes"][0] == "300 (QOS long)"


def test_association_of_the_partition_replaces_that_of_all_partitions():
    shown = SlurmLimits({"gpu": GPU}, {}, [PROJ, {**PROJ, "Partition": "gpu", "MaxWall": "08:00:00"}])
    site = {"jobs": ["gpu"], "name": "gpu", "account": "proj", "max_minutes": 1440, "max_nodes": 2, "node": NODE}
    found = list(compare_partition(Partition.model_validate(site, strict=False), shown))
    assert [line.found for line in found] == ["480 (account proj)", "2 (account proj)"]


def test_default_qos_of_the_account_counts_where_none_is_named():
    account = {**PROJ, "DefaultQOS": "long", "MaxWall": "", "MaxTRES": ""}
    qos = {**QOS, "MaxWall": "04:00:00"}, {**QOS, "Name": "debug", "MaxWall": "00:30:00"}
    assert lines({"account": "proj"}, None, *qos, account=account)["max_minutes"][0] == "240 (QOS long)"
    named = lines({"account": "proj", "qos": "debug"}, None, *qos, account=account)
    assert named["max_minutes"][0] == "30 (QOS debug)"


def needed_minutes(
    requests: list[dict[str, Any]], *sources: dict[str, str], **site: Any
) -> list[tuple[str, str, str, str]]:
    """Return the lines about resources times minutes of requests: subject, amount, limit, and the problem's first words."""
    written = {"jobs": ["gpu"], "name": "gpu", "account": "proj", "qos": "long", "max_minutes": 1440, "max_nodes": 16}
    partition = Partition.model_validate({**written, "node": NODE, **site}, strict=False)
    qos = {row["Name"]: row for row in sources if "Name" in row}
    shown = SlurmLimits({"gpu": GPU}, qos, [row for row in sources if "Name" not in row])
    base = {"tasks_per_node": 8, "cpus_per_task": 8, "gpus_per_node": 8, "partition": "gpu"}
    found = compare_partition(partition, shown, [SlurmRequest(**{**base, **request}) for request in requests])
    return [
        (line.subject, line.site_file, line.found, " ".join(line.problem.split()[:9]))
        for line in found
        if " minutes" in line.subject
    ]


def test_a_job_beyond_the_node_minutes_of_a_qos_is_named():
    """90 node minutes: two nodes for 45 minutes, or one for 90."""
    qos = {**QOS, "MaxTRESMins": "node=90"}
    assert needed_minutes([{"nodes": 2, "minutes": 45}], qos) == [("node minutes", "90", "90 (QOS long)", "")]
    remedy = "reduce nodes or minutes of the job to at"
    jobs = [{"nodes": 1, "minutes": 90}, {"nodes": 2, "minutes": 46}]
    assert needed_minutes(jobs, qos) == [("node minutes", "92", "90 (QOS long)", remedy)]


@pytest.mark.parametrize(("exclusive", "amount"), [(False, 2 * 2 * 3 * 10), (True, 2 * 64 * 10)])
def test_cpu_minutes_are_those_that_the_job_asks_for_or_of_whole_nodes(exclusive: bool, amount: int):
    request = {"nodes": 2, "minutes": 10, "tasks_per_node": 2, "cpus_per_task": 3, "exclusive": exclusive}
    found = needed_minutes([request], {**QOS, "MaxTRESMins": "cpu=1279"})
    assert found[0][:2] == ("cpu minutes", str(amount)) and bool(found[0][3]) == exclusive


def test_budget_of_the_whole_account_is_compared_with_one_job():
    """It stands in the account's own row, and those of its users do not repeat it."""
    budget = {**PROJ, "User": "", "GrpTRESMins": "gres/gpu:h100=4800,energy=5"}
    found = needed_minutes([{"nodes": 1, "minutes": 700}], PROJ, budget)
    assert [line[:3] for line in found] == [("gres/gpu minutes", "5600", "4800 (account proj)")] and found[0][3]
    assert needed_minutes([{"nodes": 1, "minutes": 600}], PROJ, budget)[0][3] == ""


def test_minutes_of_a_qos_go_before_those_of_the_account():
    qos, account = {**QOS, "MaxTRESMins": "node=900"}, {**PROJ, "MaxTRESMins": "node=90,cpu=64"}
    found = needed_minutes([{"nodes": 1, "minutes": 60}], qos, account)
    assert [line[2] for line in found] == ["900 (QOS long)", "64 (account proj)"]


def test_site_file_alone_shows_how_long_all_nodes_may_run():
    """max_nodes and max_minutes are limits of their own; only a job can exceed their product."""
    found = needed_minutes([], {**QOS, "MaxTRESMins": "node=9600,gres/gpu=0"})
    shown = "9600 (QOS long): at most 600 minutes on 16 nodes", "0 (QOS long): at most 0 minutes on 16 nodes"
    assert [line[1:] for line in found] == [("-", text, "") for text in shown]


def test_unknown_names_are_reported_and_no_limit_is_guessed():
    found = lines({"name": "nope", "qos": "wrong"}, None, QOS)
    assert "correct name" in found["partition"][1] and "correct qos" in found["QOS"][1]
    assert found["max_minutes"] == ("no limit is shown", "")
    assert lines({"name": None})["max_nodes"] == ("no limit is shown", ""), "the centre chooses the partition by QOS"


def test_a_job_may_start_in_the_larger_of_two_partitions():
    shown = SlurmLimits({"a": {**GPU, "MaxTime": "1:00:00"}, "b": {**GPU, "TotalNodes": "64"}}, {}, [])
    partition = {"jobs": ["gpu"], "name": "a,b", "max_minutes": 1440, "max_nodes": 64, "node": NODE}
    found = list(compare_partition(Partition.model_validate(partition, strict=False), shown))
    assert [line.problem for line in found] == ["", ""]


def test_jobs_of_a_run_are_compared_instead_of_what_the_site_file_allows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """A site file that allows more than a limit is no problem of a run that stays below it."""
    fake_program(tmp_path, "sbatch", "#!/bin/sh\nexit 0\n")
    fake_program(tmp_path, "sacctmgr", "#!/bin/sh\nexit 1\n")
    partition = "#!/bin/sh\necho PartitionName=gpu MaxTime={} TotalNodes=8 QoS=N/A State=UP\n"
    config = write_config(tmp_path)
    for limit, code in (("20:00:00", 0), ("00:30:00", 1)):
        monkeypatch.setenv("PATH", fake_program(tmp_path, "scontrol", partition.format(limit)))
        with pytest.raises(SystemExit) as ended:
            main(["site", "check", str(config)])
        printed = capsys.readouterr().out
        assert ended.value.code == code and ("set minutes to at most 30" in printed) == bool(code), printed


@pytest.fixture
def large_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Fake Slurm that accepts everything; its partition gpu is for jobs of two nodes and more."""
    answers = {
        "sbatch": "",
        "sacctmgr": "exit 1",
        "scontrol": "echo PartitionName=gpu MaxTime=1-00:00:00 MinNodes=2 MaxNodes=UNLIMITED TotalNodes=16 QoS=N/A State=UP\n"
        "echo PartitionName=cores MaxTime=1-00:00:00 MinNodes=0 MaxNodes=UNLIMITED TotalNodes=16 QoS=N/A State=UP",
    }
    paths = [fake_program(tmp_path, program, f"#!/bin/sh\n{text}\n") for program, text in answers.items()]
    monkeypatch.setenv("PATH", paths[0])
    return tmp_path


CORES = {"name": "cores", "max_minutes": 60, "node": {"cpus": 8, "memory_mb": 800}}


@pytest.mark.parametrize(
    ("jobs", "others", "nodes", "fits"),
    [
        (["gpu"], ["cpu", "debug"], "16", True),
        (["gpu", "debug"], ["cpu"], "16", True),
        (["gpu", "login"], ["cpu", "debug"], "1", False),
        (["gpu"], ["debug"], "1", False),
    ],
)
def test_partition_for_large_jobs_alone_takes_no_jobs_of_one_node(
    jobs: list[str], others: list[str], nodes: str, fits: bool, large_jobs: Path
):
    """Without a partition of their own, CPU jobs run on that for training."""
    gpus = {"gpus": 8} if "debug" in others else {}
    cores = {**CORES, "jobs": others, "node": CORES["node"] | gpus}
    partitions = [{**SITE["partitions"][0], "jobs": jobs}, cores]
    write_config(large_jobs, site={"partitions": partitions})
    found = [line for line in compare_limits(load_site("./site.yaml", large_jobs)) if line.subject == "nodes at least"]
    assert [(line.site_file, line.found, not line.problem) for line in found] == [(nodes, "2 (partition gpu)", fits)]


@pytest.mark.parametrize(("nodes", "code"), [(2, 0), (1, 1)])
def test_job_that_is_too_small_for_its_partition_is_named(
    large_jobs: Path, nodes: int, code: int, capsys: pytest.CaptureFixture[str]
):
    cores = {**CORES, "jobs": ["cpu", "debug"], "node": CORES["node"] | {"gpus": 8}, "max_nodes": 2}
    site = {"partitions": [{**SITE["partitions"][0], "jobs": ["gpu"]}, cores]}
    config = write_config(large_jobs, {"stages.0.nodes": nodes, "stages.1.nodes": nodes}, site)
    with pytest.raises(SystemExit) as ended:
        main(["site", "check", str(config)])
    printed = " ".join(capsys.readouterr().out.split())
    assert ended.value.code == code, printed
    assert ("gpu, nodes at least: jobs on fewer than 2 nodes never start there; give the stage" in printed) == bool(
        code
    )


def test_qos_may_replace_the_least_number_of_nodes(large_jobs: Path):
    qos = {**QOS, "Flags": "DenyOnLimit,PartitionMinNodes"}
    partition = Partition.model_validate({**SITE["partitions"][0], "qos": "long"}, strict=False)
    gpu = {**GPU, "MinNodes": "2"}
    assert fewest_nodes(partition, SlurmLimits({"gpu": gpu}, {"long": qos}, [])) == 1
    assert fewest_nodes(partition, SlurmLimits({"gpu": gpu}, {}, [])) == 2


@pytest.mark.parametrize(
    ("keys", "limit", "fits"),
    [
        ({}, "400000", False),
        ({}, "500000", True),
        ({"memory": "all"}, "400000", None),
        ({}, "UNLIMITED", None),
        ({"name": "gpu,large"}, "400000", None),
    ],
)
def test_memory_beyond_the_limit_of_a_partition_is_named(keys: dict[str, Any], limit: str, fits: bool | None):
    """sbatch --test-only accepts it, and the job waits for the reason MaxMemPerLimit."""
    partition = Partition.model_validate({**SITE["partitions"][0], **keys}, strict=False)
    shown = {"gpu": {**GPU, "MaxMemPerNode": limit}, "large": {**GPU, "MaxMemPerNode": "UNLIMITED"}}
    found = [line for line in compare_partition(partition, SlurmLimits(shown, {}, [])) if "memory" in line.subject]
    assert [not line.problem for line in found] == ([] if fits is None else [fits])
    assert [line.found for line in found] == [f"{limit} (partition gpu)"] * len(found)


def test_memory_of_a_job_is_compared_with_the_limit_of_the_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A job on half a node asks for half its memory."""
    fake_program(tmp_path, "sacctmgr", "#!/bin/sh\nexit 1\n")
    script = """#!/bin/sh
case "$*" in
  *config*) echo "MaxMemPerNode = 300000";;
  *) echo PartitionName=gpu MaxMemPerNode=UNLIMITED MaxTime=1-00:00:00 TotalNodes=16 QoS=N/A State=UP;;
esac
"""
    monkeypatch.setenv("PATH", fake_program(tmp_path, "scontrol", script))
    write_config(tmp_path)
    site = load_site("./site.yaml", tmp_path)
    base = {"nodes": 1, "tasks_per_node": 4, "cpus_per_task": 8, "minutes": 60, "gpus_per_node": 4, "partition": "gpu"}
    for memory_mb, problem in ((250_000, ""), (400_000, "set node.memory_mb to at most 300000")):
        lines = compare_limits(site, [SlurmRequest(**base, memory_mb=memory_mb)])
        assert [line.problem.partition(";")[0] for line in lines if "memory" in line.subject] == [problem]


@pytest.mark.parametrize(
    ("state", "name", "is_named"), [("DOWN", "gpu", True), ("UP", "gpu", False), ("DOWN", "gpu,b", False)]
)
def test_partition_that_is_down_is_named(state: str, name: str, is_named: bool):
    """sbatch --test-only says when a job could start there, and the job waits for the reason PartitionDown."""
    partition = Partition.model_validate({**SITE["partitions"][0], "name": name}, strict=False)
    shown = SlurmLimits({"gpu": {**GPU, "State": state}, "b": GPU}, {}, [])
    found = [line.problem for line in compare_partition(partition, shown) if line.subject == "state"]
    assert (
        found == ["jobs of partition gpu do not start before the centre opens it; name another one, or wait"] * is_named
    )


def test_partition_that_the_centre_hides_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    fake_program(tmp_path, "sacctmgr", "#!/bin/sh\nexit 1\n")
    script = """#!/bin/sh
case "$*" in *--all*) echo PartitionName=gpu Hidden=YES MaxTime=1-00:00:00 TotalNodes=16 QoS=N/A State=UP;; esac
"""
    monkeypatch.setenv("PATH", fake_program(tmp_path, "scontrol", script))
    write_config(tmp_path)
    found = compare_limits(load_site("./site.yaml", tmp_path))
    assert found and not [line for line in found if line.found == "unknown"]


def test_verb_reports_a_limit_that_sbatch_does_not_enforce(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    fake_program(tmp_path, "sbatch", "#!/bin/sh\nexit 0\n")
    fake_program(
        tmp_path, "scontrol", "#!/bin/sh\necho PartitionName=gpu MaxTime=08:00:00 TotalNodes=16 QoS=N/A State=UP\n"
    )
    monkeypatch.setenv("PATH", fake_program(tmp_path, "sacctmgr", "#!/bin/sh\nexit 1\n"))
    write_config(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["site", "check", str(tmp_path / "site.yaml")])
    assert ended.value.code == 1
    assert "gpu, max_minutes: set max_minutes to at most 480" in capsys.readouterr().out
