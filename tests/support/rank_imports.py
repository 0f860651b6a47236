"""What the ranks of most tests need, imported once for all of them."""

from __future__ import annotations

from functools import cache
from importlib import import_module

import cpuinfo

from longhaul.cli import _lean_imports

with _lean_imports():
    import_module("longhaul.train.loop")
    for kind in ("llama", "qwen3", "qwen3_moe", "deepseek_v3"):
        import_module(f"transformers.models.{kind}.modeling_{kind}")

# DeepSpeed asks twice for every op that a process loads, and each answer takes an interpreter of its own a second.
cpuinfo.get_cpu_info = cache(cpuinfo.get_cpu_info)
