"""Lists the problems of each node of an environment check, and names the nodes without which the job may succeed: those with
problems of their own, if the others have none.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from longhaul.artifacts.node_check_row import CheckRow
from longhaul.artifacts.node_results import NodeResult, new_node_result
from longhaul.checks.node_problems import Facts, node_problems, problems_of_node
from longhaul.jobs.kinds.environment_job import EnvironmentSpec

ENVIRONMENT_CHECK = "environment check"
"""Name of the check in the results of nodes."""
_KEPT_PROBLEMS = 3


def problems_by_node(nodes: Sequence[Facts], rows: Sequence[CheckRow], job: EnvironmentSpec) -> dict[str, list[str]]:
    """Return host -> the problems of this node alone; an empty list if it has none."""
    found = {node["host"]: [problem.text for problem in problems_of_node(node, job)] for node in nodes}
    for row in rows:
        if row["result"] == "fail" and row["node"] in found:
            found[row["node"]].append(": ".join(filter(None, (row["component"], row["check"], row["value"]))))
    for host, problem in (*_other_versions(nodes), *_wrong_clocks(nodes, job.checks.max_clock_skew_s)):
        found[host].append(problem)
    return found


def nodes_to_exclude(
    nodes: Sequence[Facts], problems: Mapping[str, Sequence[str]], job: EnvironmentSpec
) -> dict[str, str]:
    """Return each node that is unfit while the others are fit -> its first problems; {} if no node is fit, or a problem is left.

    A fault of all nodes is one of the site: with other nodes the job would fail again.

    problems: result of problems_by_node
    """
    others = [node for node in nodes if not problems[node["host"]]]
    if not others or node_problems(others, job):
        return {}
    return {host: first_problems(found) for host, found in problems.items() if found}


def environment_results(problems: Mapping[str, Sequence[str]]) -> list[NodeResult]:
    """Return a result for each node, with its first problems. problems: result of problems_by_node."""
    return [new_node_result(host, ENVIRONMENT_CHECK, None, first_problems(found)) for host, found in problems.items()]


def first_problems(found: Sequence[str]) -> str:
    """Return the first problems of a node in one line, with the number of the others."""
    more = len(found) - _KEPT_PROBLEMS
    return "; ".join(found[:_KEPT_PROBLEMS]) + (f"; and {more} more problem{'s' * (more > 1)}" if more > 0 else "")


def _other_versions(nodes: Sequence[Facts]) -> Iterator[tuple[str, str]]:
    """Yield each node that has another version of something than more than half of all nodes, and a sentence about it."""
    for name in nodes[0]["versions"]:
        values = {node["host"]: node["versions"][name] for node in nodes if name in node["versions"]}
        usual, count = Counter(values.values()).most_common(1)[0]
        if 2 * count > len(nodes):
            yield from (
                (host, f"{name} is {value}, most nodes have {usual}")
                for host, value in values.items()
                if value != usual
            )


def _wrong_clocks(nodes: Sequence[Facts], maximum_s: float) -> Iterator[tuple[str, str]]:
    """Yield each node whose clock is far from the median of all clocks: the first node's own clock may be the wrong one."""
    median = statistics.median(node["clock_skew_s"] for node in nodes)
    for node in nodes:
        skew_s = node["clock_skew_s"] - median
        if abs(skew_s) > maximum_s:
            yield node["host"], f"clock is {skew_s:+.1f} s from the median of all nodes"
