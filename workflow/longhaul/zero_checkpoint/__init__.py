"""Reads the master weights of a DeepSpeed checkpoint, one tensor at a time, without running anything from its files."""

from longhaul.zero_checkpoint.layout import open_master_weights
from longhaul.zero_checkpoint.tensors import LazyTensor

__all__ = ["LazyTensor", "open_master_weights"]
