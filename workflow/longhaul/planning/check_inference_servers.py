"""Checks of servers that a job starts for itself, in serve_check and evaluate: the engine, a context that is long enough."""

from __future__ import annotations

from longhaul.config.site_config import Site
from longhaul.config.stage_config import Stage
from longhaul.errors import UserError
from longhaul.planning.check_inference_engine import check_engine
from longhaul.planning.constants_shared_with_trainer import LOGITS_PROMPT_TOKENS
from longhaul.planning.serving_plan import ServingPlan

_CONTAINERS = ("container", "srun")


def has_served_evaluation(stage: Stage) -> bool:
    """Return whether the stage's export is evaluated through a server."""
    return stage.evaluate is not None and stage.evaluate.engine == "server"


def starts_engine(stage: Stage) -> bool:
    """Return whether a job of the stage starts the site's engine."""
    return stage.serve_check is not None or has_served_evaluation(stage)


def check_engine_of_jobs(stage: Stage, site: Site) -> None:
    """Raise UserError if a job of the stage starts the site's engine and cannot do so."""
    if starts_engine(stage):
        check_engine(site)
    if not has_served_evaluation(stage):
        return
    key = f"stages.{stage.name}.evaluate.engine"
    if site.serving.engine == "transformers":
        raise UserError(
            f"{key} is server, and serving.engine of site {site.name} is transformers, which gives no log probabilities",
            "set serving.engine in the site file to vllm or sglang, or remove the key",
        )
    if site.serving.python and site.software.kind in _CONTAINERS:
        raise UserError(
            f"{key} is server: inside of the job environment's container, {site.serving.python[0]} (serving.python of site "
            f"{site.name}) cannot be started",
            f"use an image with {site.serving.engine} and remove serving.python, or remove the key",
        )


def check_job_servers(stage: Stage, serving: ServingPlan) -> None:
    """Raise UserError if a server's context is too short for the check's prompts and answers."""
    answer = stage.serve_check.answer_tokens if stage.serve_check else 0
    if answer and LOGITS_PROMPT_TOKENS + answer > serving.context:
        raise UserError(
            f"stages.{stage.name}.serve_check.answer_tokens {answer}: with a prompt of {LOGITS_PROMPT_TOKENS} tokens this is "
            f"longer than the server's context of {serving.context} tokens",
            f"set answer_tokens to at most {serving.context - LOGITS_PROMPT_TOKENS}"
            + (", or increase serve.context" if stage.serve and stage.serve.context else ""),
        )
