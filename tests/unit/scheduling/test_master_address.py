"""The address of rank 0: the first node's name, the name with a suffix, or the address of an interface."""

from __future__ import annotations

import pytest

from longhaul.errors import UserError
from longhaul.scheduling.master_address import master_address


def test_address_is_the_host_name_with_the_suffix_before_the_domain():
    assert master_address("jwb0001", None, None) == "jwb0001"
    assert master_address("jwb0001", "i", None) == "jwb0001i"
    assert master_address("jwb0001.juwels", "i", None) == "jwb0001i.juwels"


def test_address_of_an_interface_is_its_ipv4_address():
    assert master_address("n1", None, "lo") == "127.0.0.1"


def test_missing_interface_is_refused_with_those_that_exist():
    with pytest.raises(UserError, match="ib9 does not exist on n1") as refused:
        master_address("n1", None, "ib9")
    assert "lo" in refused.value.hint
