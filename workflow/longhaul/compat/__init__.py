"""Patches and private interfaces of other libraries, one module per library.

The docstring of a module names the version that it was written for. The docstring of a function gives the reason, and the
upstream issue: without a number, no issue was known in November 2026.
"""
