"""Parallel axes: spread one copy of the model over ranks, with one module for each axis.

Every axis works on the Hugging Face model itself. It replaces parameters by the rank's slice (sliced_parameters.py) and
adds communication to the few modules that need it. DeepSpeed sees smaller tensors and fewer data-parallel ranks.
"""
