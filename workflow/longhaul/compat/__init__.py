"""Patches and private interfaces of other libraries: one module per library, with the version and the reason of each."""
