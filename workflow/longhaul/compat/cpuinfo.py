"""Answers DeepSpeed's calls of py-cpuinfo from /proc/cpuinfo. Written for py-cpuinfo 9.0.0 and DeepSpeed 0.19.8."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any


def read_cpu_once_in_this_process() -> None:
    """Let `cpuinfo.get_cpu_info` read /proc/cpuinfo in this process, and only once.

    DeepSpeed calls it twice for every op of CPUs that it loads, and in the constructors of its CPU optimizers. Each call starts
    an interpreter, which starts another one: more than a second. DeepSpeed reads only the architecture, the vendor and the
    instruction sets, and the kernel lists these. Where it does not, the original function answers.

    Upstream: py-cpuinfo issues 205 (it sleeps for a second) and 206 (nothing is cached).
    """
    package = import_module("cpuinfo")
    if not hasattr(package.get_cpu_info, "cache_clear"):
        package.get_cpu_info = _reader(package.get_cpu_info)  # pyright: ignore[reportAttributeAccessIssue]


def _reader(original: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
    @cache
    def get_cpu_info() -> dict[str, Any]:
        library = import_module("cpuinfo.cpuinfo")
        arch, bits = library._parse_arch(library.DataSource.arch_string_raw)
        listed = library._get_cpu_info_from_proc_cpuinfo()
        return {"arch": arch, "bits": bits, **listed} if arch and listed.get("flags") else original()

    return get_cpu_info
