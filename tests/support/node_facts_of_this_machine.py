"""Reads the facts of this machine as the environment check does, but in the test's process, where replaced functions count."""

from __future__ import annotations

from typing import Any

from longhaul.checks.node_facts import node_facts, node_parts
from longhaul.jobs.kinds.environment_job import EnvironmentSpec


def facts_here(host: str, job: EnvironmentSpec) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for part in node_parts(job):
        results[part.name] = part.run(results)
    return node_facts(host, job, results)
