"""Reads the master weights and Adam's moments of a DeepSpeed checkpoint, one tensor at a time; nothing of its files runs."""

from longhaul.zero_checkpoint.layout import OptimizerState, open_master_weights, open_optimizer_state
from longhaul.zero_checkpoint.safetensors_files import DTYPE_NAMES, open_safetensors
from longhaul.zero_checkpoint.tensors import LazyTensor, raw_bytes

__all__ = [
    "DTYPE_NAMES",
    "LazyTensor",
    "OptimizerState",
    "open_master_weights",
    "open_optimizer_state",
    "open_safetensors",
    "raw_bytes",
]
