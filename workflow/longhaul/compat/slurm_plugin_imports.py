"""Imports pandas for Snakemake's Slurm plugin when it is used. Written for snakemake-executor-plugin-slurm 2.8."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

_FOR_THE_EFFICIENCY_REPORT = ("pandas", "numpy")


def import_pandas_when_used() -> None:
    """Put stand-ins of pandas and numpy in place, to be called before Snakemake is imported.

    Snakemake imports all its plugins at each start. The Slurm plugin imports pandas for a report that longhaul does not ask
    for, and this takes a quarter of Snakemake's start. Upstream: Snakemake issue 4220.
    """
    for name in _FOR_THE_EFFICIENCY_REPORT:
        if name not in sys.modules and (spec := importlib.util.find_spec(name)):
            sys.modules[name] = _StandIn(name)
            sys.modules[name].__spec__ = spec  # libraries ask for it to find out whether the module is installed


class _StandIn(ModuleType):
    """A module that is imported when an attribute of it is used; with importlib's LazyLoader, `import pandas` is such a use."""

    def __getattr__(self, attribute: str) -> object:
        for name in _FOR_THE_EFFICIENCY_REPORT:  # pandas must import numpy itself
            if isinstance(sys.modules.get(name), _StandIn):
                del sys.modules[name]
        return getattr(importlib.import_module(self.__name__), attribute)
