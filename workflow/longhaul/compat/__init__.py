"""Patches of, and reaches into, private interfaces of other libraries, one module per library."""
