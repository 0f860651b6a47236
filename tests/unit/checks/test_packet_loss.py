"""Counters of lost packets are read from files in the kernel's form, and compared with those from before the check."""

from __future__ import annotations

from pathlib import Path

import pytest

from longhaul.checks.packet_loss import TcpSegments, grown, grown_text, read_error_counters, read_tcp_segments
from tests.support.sysfs_tree import add_port, write_tree

SNMP = """\
Ip: Forwarding DefaultTTL InReceives
Ip: 2 64 1011
Tcp: RtoAlgorithm RtoMin RtoMax MaxConn ActiveOpens PassiveOpens InSegs OutSegs RetransSegs InErrs
Tcp: 1 200 120000 -1 7 3 12002 15044 311 0
Udp: InDatagrams NoPorts
Udp: 5 0
"""


def test_segments_of_tcp_are_read_by_name(tmp_path: Path):
    (tmp_path / "snmp").write_text(SNMP)
    assert read_tcp_segments(tmp_path / "snmp") == TcpSegments(sent=15044, resent=311)
    (tmp_path / "cut").write_text("Tcp: OutSegs\n")
    assert read_tcp_segments(tmp_path / "cut") == read_tcp_segments(tmp_path / "none") == TcpSegments(0, 0)


def test_this_machine_counts_segments():
    assert read_tcp_segments().sent > 0


@pytest.mark.parametrize(
    ("sent", "resent", "share"),
    [(3000, 1000, 0.25), (5000, 20, 20 / 5020), (60, 19, 0.0), (0, 0, 0.0), (-9, 40, 0.0)],
)
def test_share_is_that_since_the_earlier_count(sent: int, resent: int, share: float):
    earlier = TcpSegments(10_000, 500)
    assert TcpSegments(10_000 + sent, 500 + resent).share_resent_since(earlier) == pytest.approx(share)


def test_error_counters_of_ports_and_interfaces_that_grow_are_named(tmp_path: Path):
    add_port(tmp_path, "mlx5_0", symbol_error=3, link_downed=1)
    port = tmp_path / "class" / "infiniband" / "mlx5_0" / "ports" / "1"
    write_tree(port / "hw_counters", {"packet_seq_err": 0, "out_of_sequence": 50})
    write_tree(tmp_path / "class" / "net" / "eth0", {"operstate": "up", "statistics/rx_crc_errors": 0})
    before = read_error_counters(tmp_path)
    assert before == {
        "mlx5_0 port 1 symbol_error": 3,
        "mlx5_0 port 1 link_downed": 1,
        "mlx5_0 port 1 packet_seq_err": 0,
    }
    write_tree(port, {"counters/symbol_error": 5, "hw_counters/packet_seq_err": 9, "hw_counters/out_of_sequence": 99})
    write_tree(tmp_path / "class" / "net" / "eth0", {"statistics/rx_crc_errors": 1204})
    found = grown(before, read_error_counters(tmp_path))
    assert (
        grown_text(found) == "mlx5_0 port 1 symbol_error +2, mlx5_0 port 1 packet_seq_err +9, eth0 rx_crc_errors +1,204"
    )
    assert grown(found, found) == {} == read_error_counters(tmp_path / "none")
