"""Reads the master weights and Adam's moments of a DeepSpeed checkpoint, one tensor at a time; no code of its files runs.

open_checkpoint.py is the entry. zero_checkpoint.py reads checkpoints of whole models, sliced_checkpoint.py those of sliced
models (tensor, pipeline or expert parallelism).
"""

from longhaul.checkpoint_io.lazy_tensors import LazyTensor, raw_bytes
from longhaul.checkpoint_io.open_checkpoint import OptimizerState, open_master_weights, open_optimizer_state
from longhaul.checkpoint_io.safetensors_reader import DTYPE_NAMES, open_safetensors

__all__ = [
    "DTYPE_NAMES",
    "LazyTensor",
    "OptimizerState",
    "open_master_weights",
    "open_optimizer_state",
    "open_safetensors",
    "raw_bytes",
]
