"""Declares the job that loads the run's tokenizer or trains it."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from longhaul.artifacts.paths import JobId
from longhaul.config.dataset_config import Dataset
from longhaul.jobs.job_kind import JobKind
from longhaul.jobs.job_spec import JobSpec
from longhaul.planning import Plan, model_config
from longhaul.planning.slurm_request import CpuJobNeeds, SlurmRequest, cpu_request

LOAD_TOKENIZER = CpuJobNeeds(1, 4000)
"""transformers takes 0.3 GB; large tokenizers and the test of a template take the rest."""


class TokenizerSpec(JobSpec):
    """Loads or trains the tokenizer."""

    no_rerun_fields = JobSpec.no_rerun_fields | {"train_files", "path", "model_vocab_size"}

    path: str | None  # folder with tokenizer.json; None: train one
    train_vocab_size: int | None  # vocabulary size of the one to train
    train_files: dict[str, tuple[str, ...]]  # dataset -> its files
    train_datasets: dict[str, Dataset]
    chat_template: str | None  # path of a Jinja file
    needs_chat_template: bool  # a stage trains on chats
    model_vocab_size: int | None  # a larger tokenizer is refused; None while the model is not known
    folder: str  # results/<run>/tokenizers
    out: str  # results/<run>/tokenizer.json

    def input_texts(self) -> Iterable[str | None]:
        return [self.chat_template]

    def input_data(self) -> Iterable[str]:
        return itertools.chain.from_iterable(self.train_files.values())

    def external_paths(self) -> Iterable[str | None]:
        return [self.path, self.chat_template, *self.input_data()]


def _build(plan: Plan, job: JobId) -> TokenizerSpec:
    config = plan.config
    tokenizer, train = config.tokenizer, config.tokenizer.train
    path = str(plan.loaded.resolve("tokenizer.path", tokenizer.path)) if tokenizer.path else None
    if tokenizer.hub:
        path = plan.fetched("tokenizer", "path")
    template = tokenizer.chat_template and str(plan.loaded.resolve("tokenizer.chat_template", tokenizer.chat_template))
    model = model_config(plan.loaded, plan.lock)
    names = train.datasets if train else ()
    return TokenizerSpec(
        run=plan.run,
        path=path,
        train_vocab_size=train.vocab_size if train else None,
        train_files={name: plan.source_files(name) for name in names},
        train_datasets={name: config.datasets[name] for name in names},
        chat_template=template,
        needs_chat_template=any(config.datasets[name].kind == "chat" for name in plan.used_datasets),
        model_vocab_size=model["vocab_size"] if model else None,
        folder=str(plan.paths.tokenizers),
        out=str(plan.paths.tokenizer),
    )


def _request(plan: Plan, job: JobId) -> SlurmRequest:
    needs = None if plan.config.tokenizer.train else LOAD_TOKENIZER
    return cpu_request(plan.site, plan.config.data_minutes, needs)


KIND = JobKind(
    name="tokenizer",
    order=3,
    help="load or train the tokenizer",
    spec=TokenizerSpec,
    entry_point="longhaul.data.tokenizers.build_tokenizer:run",
    jobs=lambda plan: [JobId("tokenizer")],
    build_spec=_build,
    request=_request,
)
