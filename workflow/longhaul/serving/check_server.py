"""Checks a server of an export: starts it, compares and measures its answers, stops it, and writes the result last."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from longhaul.artifacts.artifact_schemas import Export
from longhaul.artifacts.atomic_files import content_hash
from longhaul.artifacts.compare_hashes import read_export
from longhaul.artifacts.serve_check_result import Agreement, LoadStep, ServeCheckResult
from longhaul.jobs.kinds.serve_check_job import ServeCheckSpec
from longhaul.serving.ask_server import Answer, Connection, Prompt, connection
from longhaul.serving.compare_answers import (
    SAME_TEXT,
    Bound,
    bound_for,
    coarsest,
    compare_log_probabilities,
    compare_texts,
)
from longhaul.serving.engine_version import engine_version
from longhaul.serving.engines import ServerShape
from longhaul.serving.link_server_nodes import NodeLink, node_link
from longhaul.serving.local_server import LocalServer, local_server, run_part
from longhaul.serving.measure_load import MemoryPeak, answers_alone, distinct_prompts, measure_load
from longhaul.serving.prompts_sent_as_text import completions_of_text_prompts
from longhaul.serving.reference_values import ReferenceValues, read_reference_values


def run(job: ServeCheckSpec) -> None:
    """Check a server of the export, and write job.out on the first node. No process of the server is left, also after an error.

    Raises:
        UserError: the engine is missing or does not start, the export is damaged, the server does not hold to a bound, or a node
            cannot reach the first one.
    """
    with node_link(job.nodes) as link:
        if link is None or link.rank == 0:
            _check(job, link)
        else:
            export = read_export(Path(job.export))
            run_part(job.serving, Path(export.path), job.stage, job.dtype, _shape(job), link)


def _shape(job: ServeCheckSpec) -> ServerShape:
    return ServerShape.of_job(job.serve, job.nodes, job.tensor, job.pipeline, job.context_tokens)


def _check(job: ServeCheckSpec, link: NodeLink | None) -> None:
    """Check the server from the first node, and write job.out."""
    Path(job.out).unlink(missing_ok=True)
    version = engine_version(job.serving)
    export = read_export(Path(job.export))
    reference = read_reference_values(export)
    timeout_s = job.check.start_timeout_s
    with local_server(job.serving, Path(export.path), job.stage, job.dtype, _shape(job), timeout_s, link) as running:
        measured = asyncio.run(_measure(job, running, export, reference))
    ServeCheckResult(
        stage=job.stage,
        engine=job.serving.engine,
        engine_version=version,
        path=export.path,
        weights=content_hash(export.files),
        tensor=job.tensor,
        pipeline=job.pipeline,
        context_tokens=job.context_tokens,
        answer_tokens=job.check.answer_tokens,
        start_s=running.start_s,
        refuses_other_keys=running.key is not None,
        nodes=job.nodes,
        listens_at=running.listens_at,
        **measured,
    ).write(Path(job.out))


async def _measure(
    job: ServeCheckSpec, running: LocalServer, export: Export, reference: ReferenceValues
) -> dict[str, Any]:
    """Return the fields of the result that come from the server's answers."""
    bound = _bound(job, export, reference)
    async with connection(running.server, running.key) as asked:
        if running.server.engine.gives_log_probabilities:
            agreement = await _compare_scores(asked, reference, bound)
            prompts: Sequence[Prompt] = reference.prompts_PT
        else:
            completions = completions_of_text_prompts(export, reference.sample_ids)
            least = SAME_TEXT[coarsest(reference.compute, job.dtype)]
            agreement = await _compare_completions(asked, completions, job.check.answer_tokens, least)
            prompts = list(completions)
        with MemoryPeak(running.guardian) as memory:
            load, alone = await _measure_load(asked, job, prompts, bound)
    return {
        "agreement": agreement,
        "load": load,
        "distinct_answers": len({answer.text for answer in alone}),
        "host_memory_bytes": memory.host_bytes,
        "shared_pages_count_once": memory.shared_pages_count_once,
        "gpu_memory_bytes": memory.gpu_bytes,
    }


def _bound(job: ServeCheckSpec, export: Export, reference: ReferenceValues) -> Bound:
    difference = export.verification.get("logits", {}).get("max_abs_difference", 0.0)
    return bound_for(coarsest(reference.compute, job.dtype), float(str(difference)))


async def _compare_scores(asked: Connection, reference: ReferenceValues, bound: Bound) -> Agreement:
    found_PT = np.array([await asked.score(ids) for ids in reference.prompts_PT])
    mean, largest = compare_log_probabilities(found_PT, reference.log_probabilities_PT, bound)
    return Agreement(
        compared=found_PT.size,
        mean_difference=mean,
        largest_difference=largest,
        mean_bound=bound.mean,
        largest_bound=bound.one_token,
        same_text=None,
        least_same_text=None,
    )


async def _compare_completions(asked: Connection, completions: dict[str, str], tokens: int, least: float) -> Agreement:
    """Compare greedy answers with the completions that the export wrote. least: the smallest share of equal text"""
    answers = await answers_alone(asked, list(completions), tokens)
    return Agreement(
        compared=len(completions),
        mean_difference=None,
        largest_difference=None,
        mean_bound=None,
        largest_bound=None,
        same_text=compare_texts([answer.text for answer in answers], list(completions.values()), least),
        least_same_text=least,
    )


async def _measure_load(
    asked: Connection, job: ServeCheckSpec, prompts: Sequence[Prompt], bound: Bound
) -> tuple[list[LoadStep], list[Answer]]:
    """Return what was measured for each number of streams, and the answers to all prompts one after the other."""
    most, tokens = max(job.check.streams), job.check.answer_tokens
    asked_prompts = distinct_prompts(prompts, most)
    alone = await answers_alone(asked, asked_prompts, tokens)
    load = [
        await measure_load(asked, asked_prompts[:count], alone[:count], tokens, bound.one_token)
        for count in job.check.streams
    ]
    return load, alone
