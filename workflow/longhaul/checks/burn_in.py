"""Keeps all GPUs of a node busy at once: rate under load, products with a known result, copies on and to the GPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from longhaul.checks.hung_steps import GPUS
from longhaul.checks.matrix_products import ExactProduct, synchronize
from longhaul.checks.measurement_types import BurnIn
from longhaul.checks.run_parts_in_child import announce

T = TypeVar("T")
_PRODUCTS, _COPIES = 10, 5
_BUSY_PRODUCTS = 200
"""Products in a GPU's queue while NVML is read: at least 0.1 s of work, as a product of 8192 takes over 1 ms at 1 PFLOP/s."""


class _Load:
    """Matrices of one device, and what it has done."""

    def __init__(self, device: torch.device, size: int, exact: ExactProduct | None = None) -> None:
        announce_on("matrices", device)
        self.device, self.size, self.exact = device, size, exact
        self.factors = exact.factors(device) if exact else ()
        self.a_NN, self.b_NN = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
        self.out_NN = torch.empty_like(self.a_NN)
        self.rates: list[float] = []
        self.verified = self.wrong_rows = 0

    def start(self, products: int) -> None:
        """Put products into the GPU's queue, without waiting for them."""
        for _ in range(products):
            torch.mm(self.a_NN, self.b_NN, out=self.out_NN)

    def verify(self) -> None:
        """Multiply the factors with the known result, and compare."""
        if self.exact:
            announce_on("product with a known result", self.device)
            self.verified += 1
            self.wrong_rows += self.exact.count_wrong_rows(torch.mm(*self.factors))


def burn_in(devices: Sequence[torch.device], seconds: float, size: int, copy_bytes: int) -> list[BurnIn]:
    """Load all devices at once for some seconds; after each second, each of them computes a product with a known result.

    size:       rows and columns of the matrices
    copy_bytes: bytes of one copy on the device, and between host and device
    """
    exact = ExactProduct(size)
    loads = [_Load(device, size, exact) for device in devices]
    end = time.perf_counter() + seconds
    while not loads[0].verified or time.perf_counter() < end:
        _load_for_a_second(loads, end)
        for load in loads:
            load.verify()
    return [_result(load, copy_bytes) for load in loads]


def read_while_busy(devices: Sequence[torch.device], size: int, read: Callable[[], T]) -> T:
    """Return what `read` returns while the devices multiply matrices. The first products only raise the clocks."""
    loads = [_Load(device, size) for device in devices]
    _start_all(loads)
    _wait_for_all(loads)
    _start_all(loads)
    found = read()
    _wait_for_all(loads)
    return found


def announce_on(text: str, *devices: torch.device) -> None:
    """Tell the process that watches which step begins on these GPUs."""
    announce(text, [device.index for device in devices if device.index is not None], GPUS)


def _start_all(loads: Sequence[_Load]) -> None:
    for load in loads:
        load.start(_BUSY_PRODUCTS)


def _wait_for_all(loads: Sequence[_Load]) -> None:
    for load in loads:
        announce_on("matrix products", load.device)
        synchronize(load.device)


def _load_for_a_second(loads: Sequence[_Load], end: float) -> None:
    until = min(end, time.perf_counter() + 1)
    while True:
        _time_products(loads)
        if time.perf_counter() >= until:
            return


def _time_products(loads: Sequence[_Load]) -> None:
    """Run some products on all devices at once, and note each device's rate by its own clock."""
    timers = [_Timer(load.device) for load in loads]
    for load, timer in zip(loads, timers, strict=True):
        timer.begin()
        load.start(_PRODUCTS)
        timer.end()
    for load, timer in zip(loads, timers, strict=True):
        announce_on("matrix products", load.device)
        load.rates.append(_PRODUCTS * 2 * load.size**3 / timer.seconds() / 1e12)


class _Timer:
    """The time between two points of a device's queue; on a CPU, which has no queue, the time of the calls."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        is_gpu = device.type == "cuda"
        self.events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if is_gpu else []
        self.times = [0.0, 0.0]

    def begin(self) -> None:
        self._mark(0)

    def end(self) -> None:
        self._mark(1)

    def seconds(self) -> float:
        if not self.events:
            return self.times[1] - self.times[0]
        self.events[1].synchronize()
        return self.events[0].elapsed_time(self.events[1]) / 1000

    def _mark(self, which: int) -> None:
        if self.events:
            self.events[which].record(torch.cuda.current_stream(self.device))
        else:
            self.times[which] = time.perf_counter()


def _result(load: _Load, copy_bytes: int) -> BurnIn:
    device = load.device
    announce_on("copies on the GPU, and between host and GPU", device)
    on_device = [torch.ones(copy_bytes, dtype=torch.uint8, device=device) for _ in range(2)]
    on_host = torch.ones(copy_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
    return BurnIn(
        verified=load.verified,
        wrong_rows=load.wrong_rows,
        matrix_tflops=round(statistics.median(load.rates), 3),
        # A copy on the device reads and writes each byte.
        device_copy_gb_per_s=2 * _copy_rate(on_device[0], on_device[1]),
        host_to_device_gb_per_s=_copy_rate(on_device[0], on_host),
        device_to_host_gb_per_s=_copy_rate(on_host, on_device[0]),
    )


def _copy_rate(to: torch.Tensor, source: torch.Tensor) -> float:
    """Return the rate of the fastest of some copies in GB/s: other traffic on the bus only makes copies slower."""
    return round(to.numel() / min(copy_seconds(to, source) for _ in range(_COPIES)) / 1e9, 3)


def copy_seconds(to: torch.Tensor, source: torch.Tensor) -> float:
    """Copy a tensor of a device to one of the same or of another device, and return the time by the device's clock."""
    timer = _Timer(to.device if to.device.type == "cuda" else source.device)
    timer.begin()
    to.copy_(source, non_blocking=True)
    timer.end()
    return timer.seconds()
