"""Refuses names in a config that refer to nothing: `from`, dataset, mixture parts, tokenizer datasets, data_jobs."""

from __future__ import annotations

from longhaul.config.run_config import Config
from longhaul.config.stage_config import Stage
from longhaul.errors import UserError


def check_references(config: Config) -> None:
    """Raise UserError if a stage, mixture, tokenizer or data job refers to something unknown or unsuitable."""
    for stage in config.stages:
        _check_stage_dataset(config, stage)
        _check_best_checkpoint(config, stage)
    _check_datasets(config)
    _check_tokenizer_datasets(config)


def _check_stage_dataset(config: Config, stage: Stage) -> None:
    if stage.dataset not in config.datasets:
        raise UserError(
            f"stages.{stage.name}.dataset: there is no dataset {stage.dataset!r}",
            f"use one of {', '.join(config.datasets)}",
        )
    needed, kind = ("chat" if stage.kind == "sft" else "text"), config.datasets[stage.dataset].kind
    if kind != needed:
        raise UserError(
            f"stages.{stage.name}: kind {stage.kind} needs a dataset of kind {needed}; {stage.dataset} has kind {kind}",
            f"use a dataset of kind {needed}, or change the stage's kind",
        )


def _check_best_checkpoint(config: Config, stage: Stage) -> None:
    """Raise UserError if the best checkpoint is needed but never determined or never kept."""
    starts = {
        other.start_from.stage for other in config.stages if other.start_from and other.start_from.checkpoint == "best"
    }
    if stage.name not in starts and stage.export != "best":
        return
    if config.datasets[stage.dataset].validation_fraction == 0:
        raise UserError(
            f"stages.{stage.name}: its best checkpoint is needed, but dataset {stage.dataset} has validation_fraction 0",
            "set a validation_fraction above 0, or use the last checkpoint",
        )
    if stage.checkpoints.keep_best == 0:
        raise UserError(
            f"stages.{stage.name}.checkpoints.keep_best is 0, but the best checkpoint is needed",
            "set keep_best to 1 or more",
        )


def _check_tokenizer_datasets(config: Config) -> None:
    train = config.tokenizer.train
    for name in train.datasets if train else ():
        if name not in config.datasets:
            raise UserError(
                f"tokenizer.train.datasets: there is no dataset {name!r}", f"use one of {', '.join(config.datasets)}"
            )
        dataset = config.datasets[name]
        if dataset.kind != "text" or dataset.mixture:
            found = "a mixture" if dataset.mixture else f"of kind {dataset.kind}"
            raise UserError(
                f"tokenizer.train.datasets: {name} is {found}", "use datasets of kind text that are not mixtures"
            )


def _check_datasets(config: Config) -> None:
    if reserved := sorted({"tokenizer", "model"} & set(config.datasets)):
        raise UserError(
            f"datasets.{reserved[0]}: this name is reserved; the lock file uses it for the {reserved[0]}",
            "rename the dataset",
        )
    for name, dataset in config.datasets.items():
        for part in dataset.mixture:
            _check_mixture_part(config, name, part)
    for name in config.data_jobs:
        _check_data_jobs(config, name)


def _check_mixture_part(config: Config, mixture: str, part: str) -> None:
    where = f"datasets.{mixture}.mixture: "
    if part not in config.datasets:
        raise UserError(f"{where}there is no dataset {part!r}", f"use some of {', '.join(config.datasets)}")
    if config.datasets[part].mixture:
        raise UserError(
            f"{where}{part} is a mixture itself", "list the datasets of that mixture, with weights multiplied"
        )
    if config.datasets[part].kind != config.datasets[mixture].kind:
        raise UserError(
            f"{where}{part} has kind {config.datasets[part].kind}, {mixture} has kind {config.datasets[mixture].kind}",
            "mix datasets of one kind",
        )


def _check_data_jobs(config: Config, name: str) -> None:
    if name not in config.datasets:
        raise UserError(f"data_jobs: there is no dataset {name!r}", f"use some of {', '.join(config.datasets)}")
    if config.datasets[name].mixture:
        raise UserError(
            f"data_jobs: {name} is a mixture, which has no encode jobs", "name the datasets of the mixture instead"
        )
