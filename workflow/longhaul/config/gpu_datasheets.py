"""Dense bf16 rates of GPUs from their datasheets."""

from __future__ import annotations

import re

# Pattern of the name that nvidia-smi or rocm-smi prints -> TFLOP/s. The first match counts.
_PEAK_TFLOPS = (
    (r"H100 PCIe", 756),
    (r"H100 NVL", 835),
    (r"GH200|H100|H200", 989),
    (r"B200", 2250),
    (r"A100", 312),
    (r"L40S", 362),
    (r"MI300A", 980.6),
    (r"MI300X", 1307.4),
    (r"MI250X|MI200", 191.5),  # one of the card's two dies, which counts as a GPU
)


def peak_tflops(gpu_name: str) -> float | None:
    """Return the dense bf16 rate of a GPU in TFLOP/s; None for a GPU that is not listed."""
    found = (rate for pattern, rate in _PEAK_TFLOPS if re.search(pattern, gpu_name, re.IGNORECASE))
    return next(found, None)
