"""The order of stages, and the references between the parts of a config."""

from __future__ import annotations

from longhaul.config.run_config import Config, Stage
from longhaul.errors import UserError


def order(config: Config) -> list[Stage]:
    """Stages so that each follows the one it starts from; in the order of the file where that is free."""
    by_name: dict[str, Stage] = {}
    for stage in config.stages:
        if stage.name in by_name:
            raise UserError(f"stages: {stage.name} is there twice", "give every stage its own name")
        by_name[stage.name] = stage
    ordered: list[Stage] = []
    for stage in config.stages:
        for one in reversed(_lineage(stage, by_name)):
            if one not in ordered:
                ordered.append(one)
    return ordered


def _lineage(stage: Stage, by_name: dict[str, Stage]) -> list[Stage]:
    line = [stage]
    while line[-1].start_from:
        parent = line[-1].start_from.stage
        if parent not in by_name:
            raise UserError(
                f"stages.{line[-1].name}.from.stage: there is no stage {parent!r}", f"use one of {', '.join(by_name)}"
            )
        if by_name[parent] in line:
            names = " <- ".join(one.name for one in [*line, by_name[parent]])
            raise UserError(f"stages: {names} is a cycle", "let one of them start from the model: drop its `from`")
        line.append(by_name[parent])
    return line


def check_references(config: Config) -> None:
    for stage in config.stages:
        if stage.dataset not in config.datasets:
            raise UserError(
                f"stages.{stage.name}.dataset: there is no dataset {stage.dataset!r}",
                f"use one of {', '.join(config.datasets)}",
            )
        wanted, kind = ("chat" if stage.kind == "sft" else "text"), config.datasets[stage.dataset].kind
        if kind != wanted:
            raise UserError(
                f"stages.{stage.name}: kind {stage.kind} needs a {wanted} dataset; {stage.dataset} is {kind}",
                f"name a {wanted} dataset, or change the stage's kind",
            )
        check_best(config, stage)
    _check_datasets(config)
    train = config.tokenizer.train
    for name in train.datasets if train else ():
        if name not in config.datasets:
            raise UserError(
                f"tokenizer.train.datasets: there is no dataset {name!r}", f"use one of {', '.join(config.datasets)}"
            )
        if config.datasets[name].kind != "text" or config.datasets[name].mixture:
            raise UserError(f"tokenizer.train.datasets: {name} is not a text dataset with files", "name text datasets")


def _check_datasets(config: Config) -> None:
    if reserved := sorted({"tokenizer", "model"} & set(config.datasets)):
        raise UserError(
            f"datasets.{reserved[0]}: fetch's lock keeps the {reserved[0]} under this name", "call it otherwise"
        )
    for name, dataset in config.datasets.items():
        for part in dataset.mixture:
            _check_part(config, name, part)
    for name in config.data_jobs:
        _check_shared_out(config, name)


def _check_part(config: Config, mixture: str, part: str) -> None:
    where = f"datasets.{mixture}.mixture: "
    if part not in config.datasets:
        raise UserError(f"{where}there is no dataset {part!r}", f"use some of {', '.join(config.datasets)}")
    if config.datasets[part].mixture:
        raise UserError(f"{where}{part} is a mixture itself", "name its parts, with their weights multiplied")
    if config.datasets[part].kind != config.datasets[mixture].kind:
        raise UserError(
            f"{where}{part} is {config.datasets[part].kind}, {mixture} is {config.datasets[mixture].kind}",
            "mix datasets of one kind",
        )


def _check_shared_out(config: Config, name: str) -> None:
    if name not in config.datasets:
        raise UserError(f"data_jobs: there is no dataset {name!r}", f"use some of {', '.join(config.datasets)}")
    if config.datasets[name].mixture:
        raise UserError(f"data_jobs: {name} is a mixture, nothing of it is encoded", "name its parts")


def check_best(config: Config, stage: Stage) -> None:
    """`best` needs a validation split and a kept best checkpoint."""
    wants_best = {s.start_from.stage for s in config.stages if s.start_from and s.start_from.checkpoint == "best"}
    if stage.name not in wants_best and stage.export != "best":
        return
    if config.datasets[stage.dataset].validation_fraction == 0:
        raise UserError(
            f"stages.{stage.name}: its best checkpoint is asked for, but {stage.dataset} has validation_fraction 0",
            "set a validation_fraction, or ask for the last checkpoint",
        )
    if stage.checkpoints.keep_best == 0:
        raise UserError(
            f"stages.{stage.name}.checkpoints.keep_best is 0, but its best checkpoint is asked for",
            "set keep_best to 1",
        )
