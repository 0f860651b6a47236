"""Sandbox of jinja in which templates of evaluation tasks are rendered, with bounds of what takes hours in one operation.
Written for lm_eval 0.4.13, whose own environment it replaces.

In a module of its own, because the plan tries such templates where lm_eval and transformers are not installed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

from jinja2 import StrictUndefined
from jinja2.sandbox import SandboxedEnvironment

_MOST_BITS = 10_000


def bounded_power(base: Any, exponent: Any) -> Any:
    """Return base ** exponent. No time limit ends one operation of Python, and a large power takes hours."""
    if abs(exponent) * math.log2(abs(base) + 2) > _MOST_BITS:
        raise OverflowError("the power is too large")
    return base**exponent


def bounded_product(one: Any, other: Any) -> Any:
    """Return one * other. No time limit ends one operation of Python, and a product of large numbers takes hours."""
    if isinstance(one, int) and isinstance(other, int) and one.bit_length() + other.bit_length() > _MOST_BITS:
        raise OverflowError("the product is too large")
    return one * other


BOUNDED: dict[str, Callable[[Any, Any], Any]] = {"**": bounded_power, "*": bounded_product}


class TaskTemplates(SandboxedEnvironment):
    """The environment of lm_eval's templates (lm_eval/utils.py, `env`) as a sandbox; a test compares both."""

    intercepted_binops = frozenset(BOUNDED)

    def __init__(self) -> None:
        super().__init__(undefined=StrictUndefined, keep_trailing_newline=True)
        self.binop_table.update(BOUNDED)
        self.filters["regex_replace"] = _regex_replace


def _regex_replace(string: str, pattern: str, repl: str, count: int = 0) -> str:
    return re.sub(pattern, repl, string, count=count)
