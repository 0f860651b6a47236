"""Gives lm-evaluation-harness a model that the site's inference engine serves, in the job and for the time of the evaluation."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from longhaul.jobs.kinds.evaluate_job import EvaluateSpec
from longhaul.serving.engines import LOOPBACK, ServerShape
from longhaul.serving.link_server_nodes import NodeLink
from longhaul.serving.local_server import local_server, run_part

_NAME, _ANSWER_TIMEOUT_S = "evaluated", 3600


@contextmanager
def served_model(job: EvaluateSpec, folder: str, link: NodeLink | None) -> Iterator[Any]:
    """Start the engine, yield lm_eval's client of it, and stop the engine at the end.

    link: of the first node to the others, which call run_part_of_served_model; None: the job has one node

    Raises:
        UserError: the engine does not start, or answers others.
    """
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    assert job.serving is not None and job.context_tokens is not None
    dtype, timeout_s = job.dtype or _dtype(Path(folder)), job.serve.start_timeout_s
    # With one request at a time, lm_eval asks through a proxy of the centre, which would get the key. requests reads the name in
    # small letters first.
    os.environ.update(no_proxy=LOOPBACK, NO_PROXY=LOOPBACK)
    with local_server(job.serving, Path(folder), _NAME, dtype, _shape(job), timeout_s, link) as running:
        assert running.key is not None
        logging.getLogger("lm_eval.models.api_models").addFilter(_Without(running.key))
        create: Any = LocalCompletionsAPI  # its arguments are those of a class that a decorator hides
        yield create(
            base_url=f"{running.server.url}/v1/completions",
            model=running.server.requested_model,
            tokenizer=folder,
            tokenizer_backend="huggingface",
            header={"Authorization": f"Bearer {running.key}"},
            num_concurrent=job.batch_size,
            max_length=job.context_tokens,
            timeout=_ANSWER_TIMEOUT_S,
        )


def run_part_of_served_model(job: EvaluateSpec, folder: str, link: NodeLink) -> None:
    """Run the engine's part on another node than the first one, until the first one's evaluation ends."""
    assert job.serving is not None
    run_part(job.serving, Path(folder), _NAME, job.dtype or _dtype(Path(folder)), _shape(job), link)


def _shape(job: EvaluateSpec) -> ServerShape:
    return ServerShape.of_job(job.serve, job.nodes, job.tensor, job.pipeline, job.context_tokens)


class _Without(logging.Filter):
    """Removes a key from messages: lm_eval logs the headers of requests that failed."""

    def __init__(self, key: str) -> None:
        super().__init__()
        self._key = key

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = record.getMessage().replace(self._key, "[API key]"), None
        return True


def _dtype(folder: Path) -> Literal["fp32", "bf16"]:
    """Return the precision in which an engine computes with a pretrained model. transformers 4 writes torch_dtype."""
    config = json.loads((folder / "config.json").read_text())
    return "fp32" if config.get("dtype", config.get("torch_dtype")) == "float32" else "bf16"
