"""Imports torch, DeepSpeed and models once, so that a test can fork its ranks from this process and none imports them again."""

from __future__ import annotations

from importlib import import_module

from longhaul.compat.cpuinfo import read_cpu_once_in_this_process
from longhaul.runtime.lean_imports import lean_imports

with lean_imports():
    import_module("longhaul.train.train_stage")
    for kind in ("llama", "qwen3", "qwen3_moe", "deepseek_v3"):
        import_module(f"transformers.models.{kind}.modeling_{kind}")

# Trainers call it themselves; here all ranks share one answer.
read_cpu_once_in_this_process()
