"""Config section `evaluate` of a stage: the tasks of lm-evaluation-harness that its exported model is measured with."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StringConstraints, model_validator

from longhaul.config.field_types import (
    TASK_NAME_PATTERN,
    FrozenModel,
    HardwareCount,
    Minutes,
    NonNegativeInt,
    PositiveInt,
    SingleLine,
)

# A TaskName becomes a file name, a Snakemake wildcard and a Slurm comment. lm_eval has names with dots, and of 86 characters.
TaskName = Annotated[str, StringConstraints(pattern=TASK_NAME_PATTERN)]


class Evaluation(FrozenModel):
    """Evaluation of a stage's export with lm-evaluation-harness. Each task is a job of its own."""

    tasks: Annotated[tuple[TaskName, ...], Field(min_length=1)] = Field(
        description="Names of tasks or groups: those of lm-evaluation-harness, for example arc_easy, and those in `files`."
    )
    files: tuple[SingleLine, ...] = Field(
        default=(),
        description="Task files of your own: paths relative to the config file, or names of files in `config/evaluation/`. Their "
        "data files are relative to the working folder; `{run}` in them stands for the run's name.",
    )
    starting_model: bool = Field(
        default=False,
        description="Evaluate also the model that the stage starts from: a pretrained model, or the export of another stage.",
    )
    limit: PositiveInt | None = Field(default=None, description="Number of documents per task; null: all.")
    num_fewshot: Annotated[int, Field(ge=0, le=1000)] | None = Field(
        default=None, description="Number of solved examples in each prompt; null: the task's own number."
    )
    engine: Literal["transformers", "server"] = Field(
        default="transformers",
        description="transformers: the job computes with transformers. server: the job starts serving.engine of the "
        "site file, vllm or sglang, with the layout of the section `serve`, and sends it the requests. Large models "
        "need this.",
    )
    batch_size: PositiveInt = Field(
        default=8, description="Requests per forward pass; engine server: requests at the same time."
    )
    gpus: HardwareCount = Field(
        default=1,
        description="GPUs of one node, over which transformers spreads the layers of the model. engine server uses those of "
        "`serve`.",
    )
    seed: NonNegativeInt = Field(default=1234, description="Random seed for the choice of the solved examples.")
    minutes: Minutes = Field(
        default=60, description="Time limit of each task's job, in minutes or as hours:minutes:00, for example 1:30:00."
    )

    @model_validator(mode="after")
    def _check_tasks(self) -> Evaluation:
        if twice := sorted({task for task in self.tasks if self.tasks.count(task) > 1}):
            raise ValueError(f"tasks contains {twice[0]} twice")
        if self.engine == "server" and "gpus" in self.model_fields_set:
            raise ValueError("gpus has no effect with engine server: set serve.gpus_per_node of the stage instead")
        return self
