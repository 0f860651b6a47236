"""Row of the environment check's table: check, node, component, value, expected value, result, remedy."""

from __future__ import annotations

from typing import Literal

from typing_extensions import TypedDict

Result = Literal["ok", "warn", "fail", "unknown"]
"""Result of one check. unknown: the node does not report the value; the row says why."""


class CheckRow(TypedDict):
    """One check of one component of a node, such as `GPU 3`; component: empty for the node itself."""

    check: str
    node: str
    component: str
    value: str
    expected: str
    result: Result
    remedy: str
