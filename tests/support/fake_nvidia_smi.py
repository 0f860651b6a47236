"""A stand-in for nvidia-smi on machines without GPUs. It prints what driver 580.159.04 printed on a node with H200."""

from __future__ import annotations

from pathlib import Path

from tests.support.supervised_job import fake_program

_SCRIPT = r"""#!/bin/sh
if [ -n "{host}" ] && [ "$(hostname)" != "{host}" ]; then
  echo "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. Make sure \
that the latest NVIDIA driver is installed and running."
  exit 9
fi
case "$*" in
  "--query-gpu=name,memory.total,driver_version --format=csv,noheader")
    echo "NVIDIA H200, 143771 MiB, 580.159.04"
    echo "NVIDIA H200, 143771 MiB, 580.159.04";;
  "")
    echo "Sat Nov 28 20:54:25 2026       "
    echo "+-----------------------------------------------------------------------------------------+"
    echo "| NVIDIA-SMI 580.159.04             Driver Version: 580.159.04     CUDA Version: 13.0     |"
    echo "+-----------------------------------------+------------------------+----------------------+";;
  *)
    echo "Invalid combination of input arguments. Please run 'nvidia-smi -h' for help."
    exit 1;;
esac
"""


def fake_nvidia_smi(folder: Path, host: str = "") -> str:
    """Write the stand-in below `folder`, and return a PATH on which it comes first. Only `host` has GPUs, or every host."""
    return fake_program(folder, "nvidia-smi", _SCRIPT.replace("{host}", host))
