"""Reads the master weights and Adam's moments of a DeepSpeed checkpoint, one tensor at a time; nothing of its files runs."""

from longhaul.checkpoint_io.lazy_tensors import LazyTensor, raw_bytes
from longhaul.checkpoint_io.safetensors_reader import DTYPE_NAMES, open_safetensors
from longhaul.checkpoint_io.zero_files import OptimizerState, open_master_weights, open_optimizer_state

__all__ = [
    "DTYPE_NAMES",
    "LazyTensor",
    "OptimizerState",
    "open_master_weights",
    "open_optimizer_state",
    "open_safetensors",
    "raw_bytes",
]
