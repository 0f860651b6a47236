"""Names NVLinks, RDMA ports and interfaces that have new errors after the collectives of the fabric check, which load them."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from longhaul.checks.build_check_rows import Component, warning_lines
from longhaul.checks.gpu_labels import gpu_name
from longhaul.checks.nvidia_gpu_facts import GpuReading, read_gpus, with_earlier_nvlink_errors
from longhaul.checks.nvlink_errors import new_nvlink_errors_row
from longhaul.checks.packet_loss import grown, grown_line, read_error_counters
from longhaul.runtime.process_rank import Rank

_DURING = "the collectives"


class LinkErrors:
    """Error counters, read when this is made: each rank reads those of its GPU, the first one of a node those of its network."""

    def __init__(self, rank: Rank, device: torch.device) -> None:
        self._rank = rank
        is_gpu = device.type == "cuda"
        self._uuid = str(getattr(torch.cuda.get_device_properties(device), "uuid", "")) if is_gpu else ""
        self._before = self._read()

    def gather_new(self) -> list[str]:
        """Return on rank 0 a line per finding of all nodes; [] on other ranks. All ranks must call this."""
        parts: list[Any] | None = [None] * self._rank.world_size if self._rank.is_main else None
        dist.gather_object(self.new_lines(), parts)
        return list(dict.fromkeys(line for part in parts or [] for line in part))

    def new_lines(self) -> list[str]:
        """Return a line per finding of this rank."""
        (gpus_before, network_before), (gpus, network) = self._before, self._read()
        host = self._rank.node_name
        rows = [
            new_nvlink_errors_row(Component(host, gpu_name(gpu.index, gpu.pci_address)), gpu)
            for gpu in with_earlier_nvlink_errors(gpus_before, gpus).gpus
            if gpu.nvlink_errors
        ]
        found = grown(network_before, network)
        # No source says how many CRC errors of a loaded link are too many for a training: all of this is a warning.
        lines = warning_lines([{**row, "result": "warn"} for row in rows if row["result"] in ("warn", "fail")])
        return lines + ([grown_line(host, found, _DURING)] if found else [])

    def _read(self) -> tuple[GpuReading, dict[str, int]]:
        gpus = read_gpus([self._uuid]) if self._uuid else GpuReading([])
        return gpus, read_error_counters() if self._rank.local_rank == 0 else {}
