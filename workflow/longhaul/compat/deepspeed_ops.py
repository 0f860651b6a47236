"""Patches of DeepSpeed about its compiled ops: one op's builder, compiler flags, no shared-memory collectives. Written for
DeepSpeed 0.19.8.
"""

from __future__ import annotations

from typing import Any


def op_builder(name: str) -> Any:
    """Return DeepSpeed's builder of an op, such as "cpu_adam". DeepSpeed documents no way to compile one op in advance."""
    from deepspeed.ops.op_builder.all_ops import ALL_OPS

    return ALL_OPS[name]


def disable_shm_comm() -> None:
    """Stop `deepspeed.init_distributed` from compiling shared-memory collectives on a CPU; gloo does their work.

    No setting turns that off. The table of compatible ops is the only thing that DeepSpeed reads before it compiles.

    Upstream: DeepSpeed issue 7625 (no way to choose another backend).
    """
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def compile_without_debug_information() -> None:
    """Remove -g from the compiler flags of all ops. Debug information costs a third of the compile time and 90 % of the file.

    No setting does that. Every process that loads ops must call this: with other flags, torch compiles them again.
    """
    from deepspeed.ops.op_builder.builder import OpBuilder

    OpBuilder.strip_empty_entries = lambda self, args: [flag for flag in args if flag not in ("", "-g")]
