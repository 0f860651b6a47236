"""Values in config and site files have the types of YAML 1.2's core schema."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from longhaul.config.load_config import load_config
from longhaul.config.strict_yaml import read_yaml
from tests.support.small_configs import write_config

# text, value in YAML 1.2 (https://yaml.org/spec/1.2.2, section 10.3.2)
VALUES: list[tuple[str, Any]] = [
    ("010", 10),
    ("+010", 10),
    ("0o10", 8),
    ("0x1F", 31),
    ("-3", -3),
    ("1:30:00", "1:30:00"),
    ("2-00:00:00", "2-00:00:00"),
    ("1_000", "1_000"),
    ("0b11", "0b11"),
    ("yes", "yes"),
    ("no", "no"),
    ("on", "on"),
    ("True", True),
    ("false", False),
    ("1e-4", 1e-4),
    ("1.5E3", 1500.0),
    (".5", 0.5),
    ("5.", 5.0),
    ("2026-01-01", "2026-01-01"),
    ("~", None),
    ("", None),
    ("'010'", "010"),
    ("=", "="),
]


@pytest.mark.parametrize(("text", "value"), VALUES, ids=[repr(text) for text, _ in VALUES])
def test_values_have_the_types_of_yaml_1_2(tmp_path: Path, text: str, value: Any):
    path = tmp_path / "a.yaml"
    path.write_text(f"key: {text}\n")
    found = read_yaml(path)["key"]
    assert (found, type(found)) == (value, type(value))


def test_minutes_are_numbers_or_durations(tmp_path: Path):
    config = write_config(tmp_path)
    durations = {"stage": "1:30:00", "check": "0:05:00", "data": "02:00:00", "partition": "2-12:00:00"}
    text = config.read_text().replace("checks:\n", f"checks:\n  minutes: {durations['check']}\n")
    text = text.replace("- name: base\n", f"- name: base\n  minutes: {durations['stage']}\n")
    config.write_text(f"{text}data_minutes: {durations['data']}\n")
    site = tmp_path / "site.yaml"
    site.write_text(site.read_text().replace("max_minutes: 1440", f"max_minutes: {durations['partition']}"))
    loaded = load_config(config)
    assert (loaded.config.stages[0].minutes, loaded.config.checks.minutes) == (90, 5)
    assert (loaded.config.data_minutes, loaded.site.partition_for("gpu").max_minutes) == (120, 60 * 60)
