"""Imports what the ranks of most tests need. The fork server of ranks.py loads this module once for all ranks."""

from __future__ import annotations

from functools import cache
from importlib import import_module

import cpuinfo

from longhaul.runtime.lean_imports import lean_imports

with lean_imports():
    import_module("longhaul.train.train_stage")
    for kind in ("llama", "qwen3", "qwen3_moe", "deepseek_v3"):
        import_module(f"transformers.models.{kind}.modeling_{kind}")

# DeepSpeed calls it twice for every op that a process loads, and each call takes a second in another interpreter.
cpuinfo.get_cpu_info = cache(cpuinfo.get_cpu_info)
