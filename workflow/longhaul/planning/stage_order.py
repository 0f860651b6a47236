"""Sorts the training stages: each follows the stage that it starts from; refuses cycles."""

from __future__ import annotations

from longhaul.config.run_config import Config
from longhaul.config.stage_config import Stage
from longhaul.errors import UserError


def sort_stages(config: Config) -> list[Stage]:
    """Return the stages sorted so that each follows the one it starts from. Otherwise the order of the file is kept.

    Raises:
        UserError: a name occurs twice, a stage starts from an unknown stage, or stages form a cycle.
    """
    by_name: dict[str, Stage] = {}
    for stage in config.stages:
        if stage.name in by_name:
            raise UserError(f"stages: the name {stage.name} occurs twice", "give each stage a different name")
        by_name[stage.name] = stage
    ordered: list[Stage] = []
    for stage in config.stages:
        for ancestor in reversed(_with_ancestors(stage, by_name)):
            if ancestor not in ordered:
                ordered.append(ancestor)
    return ordered


def _with_ancestors(stage: Stage, by_name: dict[str, Stage]) -> list[Stage]:
    """Return the stage, the stage it starts from, and so on."""
    chain = [stage]
    while chain[-1].start_from:
        parent = chain[-1].start_from.stage
        if parent not in by_name:
            raise UserError(
                f"stages.{chain[-1].name}.from.stage: there is no stage {parent!r}", f"use one of {', '.join(by_name)}"
            )
        if by_name[parent] in chain:
            names = " <- ".join(one.name for one in [*chain, by_name[parent]])
            raise UserError(f"stages: {names} is a cycle", "remove `from` in one of these stages")
        chain.append(by_name[parent])
    return chain
