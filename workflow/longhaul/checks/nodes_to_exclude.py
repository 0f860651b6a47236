"""Names the nodes without which the job may succeed: those with problems of their own, if the others have none."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence

from longhaul.artifacts.check_rows import CheckRow
from longhaul.checks.node_problems import Facts, node_problems, problems_of_node
from longhaul.jobs.kinds.environment_job import EnvironmentSpec


def nodes_to_exclude(nodes: Sequence[Facts], rows: Sequence[CheckRow], job: EnvironmentSpec) -> list[str]:
    """Return the names of nodes that are unfit while the others are fit; [] if no node is fit, or a problem is left.

    A fault of all nodes is one of the site: with other nodes the job would fail again.
    """
    unfit = {row["node"] for row in rows if row["result"] == "fail"}
    unfit |= {node["host"] for node in nodes if problems_of_node(node, job)}
    unfit |= {*_with_another_version(nodes), *_with_a_wrong_clock(nodes, job.checks.max_clock_skew_s)}
    others = [node for node in nodes if node["host"] not in unfit]
    if not others or node_problems(others, job):
        return []
    return [node["host"] for node in nodes if node["host"] in unfit]


def _with_another_version(nodes: Sequence[Facts]) -> list[str]:
    """Return the nodes that have another version of something than more than half of all nodes."""
    found = []
    for name in nodes[0]["versions"]:
        values = {node["host"]: node["versions"].get(name) for node in nodes}
        usual, count = Counter(values.values()).most_common(1)[0]
        if 2 * count > len(nodes):
            found += [host for host, value in values.items() if value != usual]
    return found


def _with_a_wrong_clock(nodes: Sequence[Facts], maximum_s: float) -> list[str]:
    """Return the nodes whose clock is far from the median of all clocks: the first node's own clock may be the wrong one."""
    median = statistics.median(node["clock_skew_s"] for node in nodes)
    return [node["host"] for node in nodes if abs(node["clock_skew_s"] - median) > maximum_s]
