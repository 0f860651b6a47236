"""Error counters of NVLinks, read twice through a library with NVML's ABI: which of them are a warning, and which fail a node."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from pydantic import TypeAdapter

from longhaul.artifacts.node_check_row import CheckRow
from longhaul.checks import node_facts as node_module
from longhaul.checks.build_check_rows import merge_equal_rows, problem_lines, warning_lines
from longhaul.checks.hardware_checks import hardware_rows
from longhaul.checks.nvidia_gpu_checks import nvidia_rows
from longhaul.checks.nvidia_gpu_facts import GpuReading, with_earlier_nvlink_errors
from tests.support.fake_nvml import build_fake_nvml, healthy_gpu, read_fake_gpus
from tests.support.healthy_node_facts import HEALTHY_CORES, environment_job, hardware
from tests.support.node_facts_of_this_machine import facts_here

READING = TypeAdapter(GpuReading)
LINKS = range(18)
NEW, SUM = "NVLink errors during the check", "NVLink errors since the driver was loaded"
HEALTHY = {f"{kind}{link}": 40 + 15 * link for link in LINKS for kind in ("replays", "crc_flits")}
"""Errors of a kind on the links of a healthy H200: 40 to 295."""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_fake_nvml(tmp_path_factory.mktemp("nvml"))


def read(library: Path, *changes: dict[str, int], at_s: float = 0.0) -> GpuReading:
    gpus = [{**healthy_gpu("H200", index), **change} for index, change in enumerate(changes)]
    return replace(READING.validate_python(read_fake_gpus(library, gpus)), at_s=at_s)


def rows_of(library: Path, before: dict[str, int], now: dict[str, int], seconds: float = 10.0) -> list[CheckRow]:
    """Return the rows about errors of a node with two GPUs, of which the first is healthy; read twice."""
    earlier, later = read(library, HEALTHY, before), read(library, HEALTHY, now, at_s=seconds)
    rows = nvidia_rows({"n1": with_earlier_nvlink_errors(earlier, later)}, 2)
    return [row for row in rows if row["check"] in (NEW, SUM)]


def test_errors_that_all_links_have_are_ok_and_share_a_row(library: Path):
    rows = rows_of(library, HEALTHY, {**HEALTHY, "crc_flits3": HEALTHY["crc_flits3"] + 999})
    assert {row["result"] for row in rows} == {"ok"} and len(rows) == 4
    assert [row["check"] for row in merge_equal_rows(rows)] == [SUM, NEW], "one row per check, not one per GPU"


def test_a_link_with_far_more_errors_than_the_others_is_a_warning(library: Path):
    """The median of the 18 links is 167.5."""
    many = {**HEALTHY, "recoveries17": 505, "crc_flits17": 1676}
    (row,) = (row for row in rows_of(library, many, many) if row["result"] != "ok")
    assert (row["check"], row["result"]) == (SUM, "warn")
    assert row["value"] == "recoveries: 505 on link 17, median 0; CRC errors of flits: 1676 on link 17, median 167.5"
    assert row["expected"] == "<= 100 on a link, or <= 10 times the median of the GPU's links"
    assert "dcgmi diag" in row["remedy"]
    allowed = {**HEALTHY, "recoveries17": 100, "crc_flits17": 1675}
    assert {row["result"] for row in rows_of(library, allowed, allowed)} == {"ok"}


@pytest.mark.parametrize(
    ("new", "result", "value"),
    [
        ({"crc_flits0": 999}, "ok", "no replay or recovery, < 100 CRC errors/s"),
        ({"crc_data0": 600, "crc_data1": 400}, "fail", "CRC errors of data: 100/s, 600 on link 0, 400 on link 1"),
        ({"replays2": 1, "recoveries5": 2}, "warn", "replays: 1 on link 2; recoveries: 2 on link 5"),
        (
            {f"replays{link}": link for link in LINKS},
            "warn",
            "replays: 17 on link 17, 16 on link 16, 15 on link 15 and fewer on 14 others",
        ),
        (
            {"crc_flits9": 5000, "replays9": 3},
            "fail",
            "CRC errors of flits: 500/s, 5000 on link 9; replays: 3 on link 9",
        ),
    ],
)
def test_new_errors_in_ten_seconds(library: Path, new: dict[str, int], result: str, value: str):
    """CRC errors count as a rate, in the sum of a GPU's links; a replay or recovery is always named."""
    now = {fact: HEALTHY.get(fact, 0) + new.get(fact, 0) for fact in {**HEALTHY, **new}}
    row = next(row for row in rows_of(library, HEALTHY, now)[::-1] if row["check"] == NEW)
    assert (row["result"], row["value"]) == (result, value)
    assert row["expected"] == "no replay or recovery, < 100 CRC errors/s"


def test_a_reset_of_the_counters_is_no_error(library: Path):
    assert {row["result"] for row in rows_of(library, HEALTHY, {})} == {"ok"}


def test_counters_that_nvml_has_not_are_unknown(library: Path):
    lacking = {"no_nvlink_errors": 1}
    rows = rows_of(library, lacking, lacking)
    assert [(row["check"], row["value"]) for row in rows if row["result"] == "unknown"] == [
        (SUM, "not available: Not Supported")
    ]
    assert problem_lines(rows) == warning_lines(rows) == []


def test_the_environment_check_compares_with_its_first_reading(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A job with one GPU per node uses no NVLink."""
    readings = iter([read(library, {}, at_s=100.0), read(library, {"crc_flits4": 2000}, at_s=110.0)])
    monkeypatch.setattr(node_module, "read_gpus", lambda *arguments: next(readings))
    job = environment_job(folder=str(tmp_path))
    found = facts_here("n1", job)["hardware"].gpus
    node = {"host": "n1", "cpus": 4, "gpus": [], "measured": None, "hardware": hardware(gpus=found)}
    node |= {"core_speed": HEALTHY_CORES, "run_folder_seen_after_s": 0.0, "own_file_seen_after_s": 0.0}
    lines = problem_lines(hardware_rows([node], job))
    assert lines[0].startswith(
        f"n1: GPU 0 (PCI 0000:1b:00.0): {NEW}: CRC errors of flits: 200/s, 2000 on link 4, expected no replay"
    )
    assert problem_lines(hardware_rows([node], environment_job(gpus_per_node=1))) == []
