"""Fields of serve_check/<stage>.json: what the check of a served export compared and measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, NotRequired

from pydantic import Field
from typing_extensions import TypedDict

from longhaul.artifacts.artifact_schemas import Artifact


class LoadStep(TypedDict):
    """Measurements with a number of requests at the same time. None: too few pieces of text arrived.

    tokens:         of all answers
    first_token_s:  from a request to the first piece of its answer
    inter_token_s:  between two pieces of an answer; a piece is a token, or several that arrived together
    largest_difference: of log probabilities, from those of the same prompts alone, in nats; None: the engine returns none. Not
                    in files of older releases
    """

    streams: int
    tokens: int
    tokens_per_s: float
    first_token_median_s: float | None
    first_token_p99_s: float | None
    inter_token_median_s: float | None
    inter_token_p99_s: float | None
    largest_difference: NotRequired[float | None]


class Agreement(TypedDict):
    """Agreement of a server's answers with the trainer's values. None: the engine does not return this value.

    compared:                 log probabilities, or sample prompts
    mean_difference, largest_difference, mean_bound, largest_bound: of log probabilities, in nats
    same_text, least_same_text: share of the export's greedy completions that the server gives, too
    """

    compared: int
    mean_difference: float | None
    largest_difference: float | None
    mean_bound: float | None
    largest_bound: float | None
    same_text: float | None
    least_same_text: float | None


@dataclass(frozen=True)
class ServeCheckResult(Artifact):
    """`results/<run>/serve_check/<stage>.json`: a server of the stage's export answered as the trained model.

    path:        the served Hugging Face folder
    weights:     a hash of the recorded hashes of its files
    tensor:      GPUs over which each layer was spread
    pipeline:    groups of layers, each on GPUs of its own
    start_s:     from the start of the server to its first answer
    listens_at:  addresses at which processes of the server accept connections
    distinct_answers: answers under load that differ from all others; an exchange of equal answers would not be noticed
    host_memory_bytes, gpu_memory_bytes: largest use during the load on the first node; gpu None without a GPU
    nodes:       number of nodes of the server
    shared_pages_count_once: host_memory_bytes counts a page that processes share once; False: for each, as earlier releases did
    """

    stage: str
    engine: str
    engine_version: str
    path: str
    weights: str
    tensor: int
    pipeline: int
    context_tokens: int | None
    answer_tokens: int
    start_s: float
    refuses_other_keys: bool
    listens_at: list[str]
    agreement: Agreement
    load: Annotated[list[LoadStep], Field(min_length=1)]
    distinct_answers: int
    host_memory_bytes: int
    gpu_memory_bytes: int | None
    nodes: int = 1
    shared_pages_count_once: bool = False
