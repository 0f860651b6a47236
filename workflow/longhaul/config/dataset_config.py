"""What a run reads: datasets and the tokenizer, each from files, the hub or this machine."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from longhaul.config.field_types import (
    Count,
    FrozenModel,
    HubSource,
    Name,
    OneLine,
    Share,
    exactly_one,
)
from longhaul.config.mixture_weights import whole_weights


class HubDataset(HubSource):
    """A data set on the hub."""

    name: Name | None = Field(default=None, description="Configuration of the data set, where it has several.")
    split: OneLine = Field(default="train", description="Split to read; the validation split is taken from it by hash.")
    max_documents: Count | None = Field(
        default=None, description="Stream the split's first documents, so many, in place of downloading its files."
    )


class PythonStdlib(FrozenModel):
    """The sources of the Python that runs fetch: text = its modules, chat = questions made from their docstrings."""

    max_mb: Annotated[float, Field(gt=0, le=1000)] = Field(
        default=8.0, description="Stop after this much text, in MB (10^6)."
    )


class TrainTokenizer(FrozenModel):
    """A byte-level BPE trained on the run's own text datasets."""

    vocab_size: Annotated[int, Field(ge=300, le=1_000_000)] = Field(
        description="Size with special tokens; at least 256 bytes and the special tokens."
    )
    datasets: tuple[Name, ...] = Field(min_length=1, description="Names of the datasets it is trained on.")


class Tokenizer(FrozenModel):
    """Exactly one of path, hub and train."""

    path: OneLine | None = Field(default=None, description="Folder with tokenizer.json; relative to the config file.")
    hub: HubSource | None = Field(default=None, description="Take the tokenizer from the hub.")
    train: TrainTokenizer | None = Field(default=None, description="Train one on the run's text.")
    chat_template: OneLine | None = Field(
        default=None, description="Jinja file that replaces the tokenizer's chat template; relative to the config file."
    )

    @model_validator(mode="after")
    def _one_source(self) -> Tokenizer:
        return exactly_one(self, "path", "hub", "train")


class Columns(FrozenModel):
    """Names of the columns that are read."""

    text: OneLine = Field(default="text", description="kind text: the document.")
    messages: OneLine = Field(default="messages", description="kind chat: a list of {role, content}.")
    prompt: OneLine | None = Field(
        default=None, description="kind chat, in place of messages: what the user says (a text, or messages)."
    )
    completion: OneLine | None = Field(default=None, description="With prompt: what the assistant answers.")

    @model_validator(mode="after")
    def _both(self) -> Columns:
        if bool(self.prompt) != bool(self.completion):
            raise ValueError("prompt and completion belong together")
        return self


class Decontaminate(FrozenModel):
    """Documents that share a run of words with an evaluation text are not trained on."""

    files: Annotated[tuple[OneLine, ...], Field(min_length=1)] = Field(
        description="Evaluation files, in any format that is read; paths or globs relative to the config file."
    )
    columns: Annotated[tuple[OneLine, ...], Field(min_length=1)] = Field(
        default=("text",), description="Their text columns; each value is a text of its own."
    )
    ngram_words: Annotated[int, Field(ge=4, le=100)] = Field(
        default=13, description="Length of the run in words, without case, punctuation and spacing; GPT-3 took 13."
    )


class Dataset(FrozenModel):
    """Exactly one of files, hub, python_stdlib and mixture."""

    kind: Literal["text", "chat"] = Field(description="text: one document a row; chat: one conversation a row.")
    files: tuple[OneLine, ...] = Field(default=(), description="Paths or globs; relative to the config file.")
    hub: HubDataset | None = Field(default=None, description="Take the data from the hub.")
    python_stdlib: PythonStdlib | None = Field(
        default=None, description="The demo's data: this Python's standard library."
    )
    mixture: dict[Name, Annotated[float, Field(ge=1e-9, le=1e9)]] = Field(
        default={}, description="Other datasets of the same kind and their weights: their samples in these proportions."
    )
    format: Literal["auto", "jsonl", "json", "parquet", "csv", "text", "arrow"] = Field(
        default="auto", description="auto: by file ending, .gz and .zst included. text: one document a file."
    )
    columns: Columns = Field(default=Columns(), description="Columns that are read.")
    bad_rows: Literal["stop", "skip"] = Field(
        default="stop",
        description="A row that cannot be read ends the job, or is left out, counted by reason and named once.",
    )
    max_document_mb: Annotated[float, Field(gt=0, le=80)] = Field(
        default=64.0,
        description="Longest document (or line) that is read, in MB; longer ones are bad rows. Chats: 24 at most. Without "
        "gigatoken: 4 at most.",
    )
    chunk_mb: Annotated[float, Field(ge=1e-6, le=1e6)] = Field(
        default=16.0,
        description="Source per work unit, in MB; each becomes shards of its own. For terabytes raise it to some 256.",
    )
    reasoning_in_loss: bool = Field(
        default=True, description="kind chat: train on the assistant's <think>…</think>; false: it is context alone."
    )
    validation_fraction: Share = Field(
        default=0.01, description="Share of documents held out, chosen by document hash."
    )
    deduplicate: Literal["none", "exact", "near"] = Field(
        default="none",
        description="Of equal (near: also of alike, MinHash over runs of 5 words) documents the first alone is trained on.",
    )
    decontaminate: Decontaminate | None = Field(
        default=None, description="Keep evaluation texts out of the data: whole documents are dropped and named."
    )

    @model_validator(mode="after")
    def _one_source(self) -> Dataset:
        if self.mixture:
            whole_weights(self.mixture)
            if self.deduplicate != "none" or self.decontaminate:
                raise ValueError("a mixture takes its parts as they are: set deduplicate and decontaminate there")
        return exactly_one(self, "files", "hub", "python_stdlib", "mixture")
