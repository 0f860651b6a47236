"""The parts of compat/deepspeed.py and compat/torch.py about compiled ops are still needed.

A failing test means that upstream has changed: remove or adapt the function.
"""

from __future__ import annotations

import inspect
import os
import threading
from pathlib import Path

import deepspeed
import pytest
from deepspeed.comm.torch import build_shm_op
from deepspeed.ops.op_builder.builder import OpBuilder
from torch.utils import cpp_extension
from torch.utils.file_baton import FileBaton

from longhaul.compat.deepspeed_ops import compile_without_debug_information, disable_shm_comm, op_builder
from longhaul.compat.torch import extension_build_locks


def test_deepspeed_finds_ops_by_name_only_in_an_undocumented_table():
    assert op_builder("cpu_adam").NAME == "cpu_adam"
    assert not [name for name in dir(deepspeed.ops) if "build_op" in name or "prebuild" in name]


def test_deepspeed_compiles_shared_memory_collectives_whenever_the_op_is_compatible(monkeypatch: pytest.MonkeyPatch):
    source = inspect.getsource(build_shm_op)
    assert "deepspeed.ops.__compatible_ops__.get(builder.NAME" in source and "environ" not in source
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setattr(deepspeed.ops, "__compatible_ops__", {"deepspeed_shm_comm": True})
    disable_shm_comm()
    assert deepspeed.ops.__compatible_ops__ == {"deepspeed_shm_comm": False}


def test_deepspeed_compiles_ops_with_debug_information(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(OpBuilder, "strip_empty_entries", OpBuilder.strip_empty_entries)  # restored after the test
    builder = op_builder("cpu_adam")
    assert "-g" in builder.strip_empty_entries(builder.cxx_args())
    compile_without_debug_information()
    assert "-g" not in builder.strip_empty_entries([*builder.cxx_args(), ""])
    assert "" not in builder.strip_empty_entries([""])


def test_torch_waits_without_limit_for_a_lock_whose_owner_is_dead(tmp_path: Path):
    """`wait` has no time-out, and asks nothing about the owner."""
    (tmp_path / "op").mkdir()
    lock = tmp_path / "op/lock"
    os.close(os.open(lock, os.O_CREAT | os.O_EXCL))  # as a builder that was killed leaves it
    assert extension_build_locks(tmp_path) == [lock]
    waiting = threading.Thread(target=FileBaton(str(lock), wait_seconds=0.01).wait, daemon=True)
    waiting.start()
    waiting.join(0.3)
    assert waiting.is_alive()
    lock.unlink()
    waiting.join(10)
    assert not waiting.is_alive()
    assert list(inspect.signature(FileBaton.wait).parameters) == ["self"]


def test_torch_names_the_lock_of_an_extension_build_lock():
    source = inspect.getsource(cpp_extension._jit_compile)
    assert "FileBaton(os.path.join(build_directory, 'lock'))" in source
