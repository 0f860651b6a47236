"""The burn-in loads a device, verifies products under load, and computes rates from bytes, operations and time."""

from __future__ import annotations

import time

import pytest
import torch

from longhaul.checks import burn_in as module
from longhaul.checks.burn_in import burn_in, read_while_busy
from longhaul.checks.matrix_products import ExactProduct
from longhaul.checks.memory_bandwidth import triad_gb_per_s

CPU = torch.device("cpu")


def test_each_device_is_loaded_and_verified():
    found = burn_in([CPU, CPU], seconds=0.2, size=64, copy_bytes=1 << 20)
    assert len(found) == 2
    for device in found:
        assert device.verified >= 1 and device.wrong_rows == 0
        assert 0 < device.matrix_tflops < 100
        rates = device.device_copy_gb_per_s, device.host_to_device_gb_per_s, device.device_to_host_gb_per_s
        assert all(0 < rate < 10_000 for rate in rates)


def test_load_lasts_as_long_as_it_should():
    started = time.perf_counter()
    burn_in([CPU], seconds=0.5, size=32, copy_bytes=4096)
    assert 0.5 <= time.perf_counter() - started < 5


def test_wrong_results_are_counted(monkeypatch: pytest.MonkeyPatch):
    """Simulate two devices; the second one computes five wrong rows each time."""
    answers = iter([0, 5] * 1000)
    monkeypatch.setattr(ExactProduct, "count_wrong_rows", lambda self, product: next(answers))
    good, bad = burn_in([CPU, CPU], seconds=0, size=32, copy_bytes=4096)
    assert (good.wrong_rows, bad.wrong_rows) == (0, 5)


def test_rates_are_operations_and_bytes_by_time(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module._Timer, "seconds", lambda self: 0.001)
    (found,) = burn_in([CPU], seconds=0, size=100, copy_bytes=10**6)
    assert found.matrix_tflops == round(10 * 2 * 100**3 / 0.001 / 1e12, 3) == 0.02
    assert found.host_to_device_gb_per_s == 1.0 and found.device_copy_gb_per_s == 2.0, "a copy reads and writes"


def test_reading_happens_while_products_run():
    assert read_while_busy([CPU], 32, lambda: "read") == "read"


def test_triad_counts_three_arrays(monkeypatch: pytest.MonkeyPatch):
    ticks = iter([0.0, 0.002] * 5)
    monkeypatch.setattr("longhaul.checks.memory_bandwidth.time.perf_counter", lambda: next(ticks))
    threads = torch.get_num_threads()
    assert triad_gb_per_s(8 * 10**6) == 3 * 8 * 10**6 / 0.002 / 1e9 == 12.0
    assert torch.get_num_threads() == threads
