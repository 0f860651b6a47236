"""compat/cpuinfo.py is still needed. A failing test means that py-cpuinfo or DeepSpeed has changed."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from importlib import import_module

import cpuinfo
import pytest
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.ops.op_builder.builder import OpBuilder

from longhaul.compat.cpuinfo import read_cpu_once_in_this_process

LIBRARY = import_module("cpuinfo.cpuinfo")


@pytest.fixture(autouse=True)
def original(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Restore the library's own function after each test."""
    monkeypatch.setattr(cpuinfo, "get_cpu_info", LIBRARY.get_cpu_info)
    yield


def test_each_call_still_starts_an_interpreter():
    assert "command = [sys.executable, __file__, '--json']" in inspect.getsource(LIBRARY.get_cpu_info_json)
    assert "output = get_cpu_info_json()" in inspect.getsource(LIBRARY.get_cpu_info)


def test_deepspeed_still_calls_it_for_every_op_of_cpus():
    for function in (OpBuilder.cpu_arch, OpBuilder.simd_width, DeepSpeedCPUAdam.__init__):
        source = inspect.getsource(function)
        assert "from cpuinfo import get_cpu_info" in source and "cpu_info = get_cpu_info()" in source


def test_deepspeed_gets_the_same_answers(monkeypatch: pytest.MonkeyPatch):
    expected = LIBRARY.get_cpu_info()
    monkeypatch.setattr(LIBRARY, "get_cpu_info_json", lambda: pytest.fail("started an interpreter"))
    read_cpu_once_in_this_process()
    read_cpu_once_in_this_process()
    found = cpuinfo.get_cpu_info()
    assert found is cpuinfo.get_cpu_info()
    keys = {"arch", "vendor_id_raw"} & set(expected)
    assert {key: found[key] for key in keys} == {key: expected[key] for key in keys}
    for flag in ("avx512f", "avx2", "sve"):
        assert (flag in found["flags"]) == (flag in expected["flags"])


def test_the_library_answers_where_the_kernel_lists_no_instruction_sets(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(LIBRARY, "_get_cpu_info_from_proc_cpuinfo", dict)
    monkeypatch.setattr(cpuinfo, "get_cpu_info", lambda: {"arch": "X86_64", "flags": ["avx2"]})
    read_cpu_once_in_this_process()
    assert cpuinfo.get_cpu_info() == {"arch": "X86_64", "flags": ["avx2"]}
