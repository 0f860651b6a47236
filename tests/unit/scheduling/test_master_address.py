"""The address of rank 0: the first node's name, the name with a suffix, or the address of an interface."""

from __future__ import annotations

import re
import socket
from pathlib import Path
from types import TracebackType

import pytest

from longhaul.errors import UserError
from longhaul.scheduling.master_address import master_address
from tests.support.supervised_job import fake_program

CONFIG = "SlurmctldHost[0] = ctl1(10.0.0.1)\nSlurmctldHost[1] = ctl2\nSlurmctldPort = 6817\n"


def test_address_is_the_host_name_with_the_suffix_before_the_domain():
    assert master_address("jwb0001", None, None) == "jwb0001"
    assert master_address("jwb0001", "i", None) == "jwb0001i"
    assert master_address("jwb0001.juwels", "i", None) == "jwb0001i.juwels"


def test_address_of_an_interface_is_its_ipv4_address():
    assert master_address("n1", None, "lo") == "127.0.0.1"


def test_missing_interface_is_refused_until_one_that_exists_is_named():
    with pytest.raises(UserError, match="ib9 does not exist on n1") as refused:
        master_address("n1", None, "ib9")
    named = re.fullmatch(r"name one of (.*) in the site file", refused.value.hint)
    assert named and "lo" in named[1].split(", ")
    assert master_address("n1", None, "lo") == "127.0.0.1"


class Route:
    """A UDP socket of a host that reaches ctl2 alone."""

    own_address = ""

    def __init__(self, *_: object) -> None: ...

    def __enter__(self) -> Route:
        return self

    def __exit__(self, _type: type[BaseException] | None, _value: object, _trace: TracebackType | None) -> None: ...

    def connect(self, address: tuple[str, int]) -> None:
        if address[0] != "ctl2":
            raise OSError("Network is unreachable")

    def getsockname(self) -> tuple[str, int]:
        return self.own_address, 1


@pytest.fixture
def debian(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host whose name is 127.0.1.1 in its own /etc/hosts."""
    monkeypatch.setattr(socket, "gethostbyname", lambda name: {"n1": "127.0.1.1"}[name])
    monkeypatch.setattr(socket, "socket", Route)
    monkeypatch.setenv("PATH", fake_program(tmp_path, "scontrol", f"#!/bin/sh\nprintf '{CONFIG}'\n"))


@pytest.mark.parametrize(
    ("own_address", "expected"),
    [("10.1.2.3", "10.1.2.3"), ("127.0.0.1", "n1"), ("8.8.8.8", "n1")],
    ids=["the network of slurmctld", "slurmctld on this node", "a public address"],
)
@pytest.mark.usefixtures("debian")
def test_a_name_that_is_the_loopback_is_replaced(monkeypatch: pytest.MonkeyPatch, own_address: str, expected: str):
    monkeypatch.setattr(Route, "own_address", own_address)
    assert master_address("n1", None, None) == expected


@pytest.mark.usefixtures("debian")
def test_a_name_that_is_the_loopback_stays_where_slurm_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", fake_program(tmp_path, "scontrol", "#!/bin/sh\nexit 1\n"))
    assert master_address("n1", None, None) == "n1"
