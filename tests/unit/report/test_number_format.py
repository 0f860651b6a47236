"""Values are formatted for people."""

from __future__ import annotations

from typing import Any

import pytest

from longhaul.report.number_format import (
    MISSING,
    count,
    duration,
    finite,
    nats,
    percent,
    plain,
    significant,
    size,
    words,
)

NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.parametrize("value", [None, "", "3", True, NAN, INFINITY, [1]])
def test_values_that_are_no_finite_number_are_missing(value: Any) -> None:
    assert finite(value) is None
    assert [f(value) for f in (count, size, significant, nats, percent, duration)] == [MISSING] * 6


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (9_999, "9,999"),
        (10_000, "10 k"),
        (-12_345, "-12.3 k"),
        (2.5, "2.5"),
        (999_499, "999 k"),
        (999_500, "1 M"),
        (1.234e6, "1.23 M"),
        (7e9, "7 B"),
        (3.2e12, "3.2 T"),
        (1.8e15, "1.8 P"),
        (4.56e18, "4,560 P"),
    ],
)
def test_counts(value: float, text: str) -> None:
    assert count(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1.5 * 2**20, "1.5 MiB"),
        (80 * 2**30, "80 GiB"),
        (2**40, "1 TiB"),
        (3 * 2**50, "3 PiB"),
    ],
)
def test_sizes(value: float, text: str) -> None:
    assert size(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (1234.5, "1,230"),
        (0.0012345, "0.00123"),
        (0.001, "0.001"),
        (0.00012345, "1.23e-4"),
        (1e6, "1e6"),
        (999_900, "1e6"),
        (-2.0, "-2"),
    ],
)
def test_significant_digits(value: float, text: str) -> None:
    assert significant(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.5, "50 %"), (0.1, "10 %"), (0.12345, "12.3 %"), (0.09876, "9.9 %"), (0.00123, "0.12 %"), (1, "100 %")],
)
def test_percentages(value: float, text: str) -> None:
    assert percent(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.85, "850 ms"),
        (1, "1 s"),
        (4.2, "4.2 s"),
        (59.94, "59.9 s"),
        (59.95, "1 min"),
        (60, "1 min"),
        (252, "4 min 12 s"),
        (3599.9, "1 h"),
        (7500, "2 h 5 min"),
        (86_400, "1 d"),
        (3 * 86_400 + 4 * 3600, "3 d 4 h"),
    ],
)
def test_durations(value: float, text: str) -> None:
    assert duration(value) == text


def test_losses_have_three_decimals() -> None:
    assert (nats(2.34567), nats(5)) == ("2.346", "5.000")


def test_field_names_become_words() -> None:
    assert words("gpus_per_node") == "GPUs per node" and words("zero_stage") == "ZeRO stage"
    assert words("train-base") == "train base" and words("peak_gib") == "peak GiB"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, MISSING),
        ("", MISSING),
        ({}, MISSING),
        ([], MISSING),
        (True, "yes"),
        (False, "no"),
        (12345, "12,345"),
        (0.123456, "0.1235"),
        (NAN, "nan"),
        ({"max_gpu": 2, "hosts": ["a", "b"]}, "max GPU 2, hosts a, b"),
        ("text", "text"),
    ],
)
def test_json_values_become_one_line(value: Any, text: str) -> None:
    assert plain(value) == text
