"""Sampling: which tokens and conversations form training sample number i: order, mixture, packing, masking."""
