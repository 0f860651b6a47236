"""The environment check on two hosts: a closed port or a wrong name ends it within seconds, with the node's name."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from longhaul.config.run_config import Checks
from tests.support.healthy_node_facts import environment_job
from tests.support.server_on_two_hosts import NODES, start_parts
from tests.support.virtual_hosts import VirtualHosts, two_hosts

END_S = 300
EPHEMERAL = "32768-60999"


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VirtualHosts]:
    with two_hosts(tmp_path_factory.mktemp("hosts")) as hosts:
        yield hosts


def check_nodes(hosts: VirtualHosts, folder: Path, port: int) -> tuple[int, str]:
    """Run the environment check on both hosts; return the exit code and the log of the first one."""
    paths = {name: str(folder / name) for name in ("scratch", "folder", "job_folder", "out")}
    (folder / "job_folder").mkdir()
    spec = folder / "job.json"
    settings = {"nodes": 2, "build": "cpu", "interconnect": "none", "socket_interface": None, "memory_mb": 1}
    environment_job(**settings, checks=Checks(min_disk_free_gb=0.001), **paths).write(spec)
    codes = [part.wait(END_S) for part in start_parts(hosts, "environment", spec, port)]
    assert codes[1] == 0, spec.with_name(f"{NODES[1]}.log").read_text()
    return codes[0], spec.with_name(f"{NODES[0]}.log").read_text()


def test_nodes_that_reach_each_other_pass(hosts: VirtualHosts, tmp_path: Path):
    code, log = check_nodes(hosts, tmp_path, 29501)
    assert code == 0, log
    checks = json.loads((tmp_path / "out").read_text())["checks"]
    rows = [(row["node"], row["value"]) for row in checks if row["check"] == "connections from other nodes"]
    assert rows == [("n1", "from n2"), ("n2", "from n1")]


def test_node_that_takes_its_name_for_the_loopback_is_named(hosts: VirtualHosts, tmp_path: Path):
    """As Debian writes /etc/hosts. gloo would listen on the loopback, and the first node would wait 15 minutes for it."""
    names = tmp_path / "hosts"
    names.write_text(f"127.0.0.1 localhost\n127.0.1.1 n2\n{hosts.address('n1')} n1\n")
    hosts.run("mount", "--bind", str(names), "/etc/hosts", host="n2")
    code, log = check_nodes(hosts, tmp_path, 29502)
    hosts.run("umount", "/etc/hosts", host="n2")
    assert code != 0 and "nodes do not reach each other" in log
    text = "n2: connections from other nodes: not from n1: 127.0.1.1: Connection refused (n2 itself resolves its name to it)"
    assert text in log and "set interconnect.socket_interface" in log
    assert json.loads((tmp_path / "out.failed.json").read_text())["problems"][0].startswith(text)
    assert not (tmp_path / "out").exists()


def test_firewall_between_nodes_is_named(hosts: VirtualHosts, tmp_path: Path):
    """Only MASTER_PORT is open, so the nodes meet, and gloo could not connect."""
    rule = (
        "rule",
        "add",
        "pref",
        "10",
        "iif",
        "eth0",
        "ipproto",
        "tcp",
        "sport",
        EPHEMERAL,
        "dport",
        EPHEMERAL,
        "blackhole",
    )
    for words in (rule, ("rule", "add", "pref", "100", "lookup", "local"), ("rule", "del", "pref", "0")):
        hosts.ip_on("n2", *words)
    code, log = check_nodes(hosts, tmp_path, 29503)
    assert code != 0
    lines = json.loads((tmp_path / "out.failed.json").read_text())["problems"]
    assert len(lines) == 1 and lines[0].startswith(
        "n1 (not from n2: 10.77.0.11 does not answer), n2 (not from n1: 10.77.0.12"
    )
    assert "let the admins open all TCP ports between compute nodes" in lines[0], log
