"""Checks before anything runs that a server check can run: the server is of one node, and its context is long enough."""

from __future__ import annotations

from longhaul.config.stage_config import Stage
from longhaul.errors import UserError
from longhaul.planning.constants_shared_with_trainer import LOGITS_PROMPT_TOKENS
from longhaul.planning.serving_plan import ServingPlan


def check_serve_check(stage: Stage, serving: ServingPlan) -> None:
    """Raise UserError if the server needs several nodes, or its context is too short for the check's prompts and answers."""
    if serving.layout.nodes > 1:
        raise UserError(
            f"stages.{stage.name}.serve_check: the server needs {serving.layout.nodes} nodes, and the check runs on one",
            "remove serve_check, or use export_dtype fp8 or a smaller serve.context so that the model fits on one node",
        )
    answer = stage.serve_check.answer_tokens if stage.serve_check else 0
    if LOGITS_PROMPT_TOKENS + answer > serving.context:
        raise UserError(
            f"stages.{stage.name}.serve_check.answer_tokens {answer}: with a prompt of {LOGITS_PROMPT_TOKENS} tokens this is "
            f"longer than the server's context of {serving.context} tokens",
            f"set answer_tokens to at most {serving.context - LOGITS_PROMPT_TOKENS}, or increase serve.context",
        )
