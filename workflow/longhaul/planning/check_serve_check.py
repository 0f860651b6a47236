"""Checks before anything runs whether a server check can run: the engine is there, and the server is of one node."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from longhaul.config.serving_config import ENGINE_PACKAGES, EngineName
from longhaul.config.site_config import Site
from longhaul.config.stage_config import Stage
from longhaul.errors import UserError
from longhaul.planning.constants_shared_with_trainer import LOGITS_PROMPT_TOKENS
from longhaul.planning.serving_plan import ServingPlan


def check_engine(site: Site) -> None:
    """Raise UserError if the site's engine is missing, as far as this machine can tell.

    A command other than a path, and the packages of another environment, can only be tried where jobs run.
    """
    serving = site.serving
    if serving.python and Path(serving.python[0]).is_absolute() and not Path(serving.python[0]).exists():
        raise UserError(
            f"serving.python: {serving.python[0]} does not exist",
            f"install {serving.engine} there, or correct serving.python in the site file",
        )
    if serving.python or site.software.kind != "current":
        return
    if missing := next((name for name in ENGINE_PACKAGES[serving.engine] if find_spec(name) is None), None):
        raise missing_package(serving.engine, missing, "this Python")


def missing_package(engine: EngineName, package: str, python: str) -> UserError:
    """Return the error for a package that an engine needs and its Python does not have."""
    own = f"install {engine} in an environment of its own, and set serving.python in the site file to its Python"
    return UserError(
        f"serving.engine {engine} needs the package {package}, which {python} does not have",
        "pip install -c envs/constraints.txt '.[serve]'" if engine == "transformers" else own,
    )


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
