"""Fields of evaluation/<stage>/<model>/<task>.json: the scores of one model on one task, and with what they were computed."""

from __future__ import annotations

from dataclasses import dataclass, field

from typing_extensions import TypedDict

from longhaul.artifacts.artifact_schemas import Artifact


class Score(TypedDict):
    """One metric of a task. A group has scores of its tasks and of itself.

    filter:           the filter of lm-evaluation-harness that was applied to the answers, such as none or strict-match
    standard_error:   None where the harness computes none
    higher_is_better: None where the harness does not say
    """

    task: str
    metric: str
    filter: str
    value: float
    standard_error: float | None
    higher_is_better: bool | None
    documents: int


@dataclass(frozen=True)
class EvaluationResult(Artifact):
    """`results/<run>/evaluation/<stage>/<model>/<task>.json`: the scores of one model on one task or group of tasks.

    model:    trained (the stage's export) or start (the model that the stage starts from)
    path:     the evaluated Hugging Face folder
    weights:  a hash of the recorded hashes of its files; None where none are recorded
    settings: limit, few-shot examples, batch size, engine, versions of the libraries, and chat_template_hash: a hash of the chat
              template with which the prompts were written, or None without one
    data:     "<repository>@<commit>" of the Hub that the task read; empty for a task with local files
    """

    stage: str
    model: str
    task: str
    path: str
    weights: str | None
    scores: list[Score]
    settings: dict[str, object]
    data: list[str] = field(default_factory=list)
