"""Keys of sections `datasets` and `tokenizer`: files, hub, mixture, columns, bad_rows, validation_fraction, deduplicate,
decontaminate. Each source is files, the Hugging Face Hub or this machine.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from longhaul.config.column_template import template_columns
from longhaul.config.field_types import (
    Fraction,
    FrozenModel,
    HubSource,
    Name,
    PositiveInt,
    SingleLine,
    Text,
    require_exactly_one,
)
from longhaul.config.mixture_proportions import whole_weights


class HubDataset(HubSource):
    """A dataset on the Hugging Face Hub."""

    name: Name | None = Field(default=None, description="Configuration name, for a dataset that has several.")
    split: SingleLine = Field(
        default="train", description="Split to read. Validation documents are selected from it by document hash."
    )
    max_documents: PositiveInt | None = Field(
        default=None,
        description="Stream only this many documents from the start of the split; null: download all files of the split.",
    )


class PythonStdlib(FrozenModel):
    """The source files of the Python that runs `longhaul fetch`.

    kind text reads the modules. kind chat builds questions and answers from their docstrings.
    """

    max_mb: Annotated[float, Field(gt=0, le=1000)] = Field(
        default=8.0, description="Amount of text to collect, in MB (10^6 bytes)."
    )


class TrainTokenizer(FrozenModel):
    """A byte-level BPE tokenizer that is trained on text datasets of the run."""

    vocab_size: Annotated[int, Field(ge=300, le=1_000_000)] = Field(
        description="Vocabulary size. It includes the 256 bytes and the special tokens."
    )
    datasets: tuple[Name, ...] = Field(min_length=1, description="Names of the datasets to train on.")


class Tokenizer(FrozenModel):
    """The tokenizer of the run. Set exactly one of path, hub and train."""

    path: SingleLine | None = Field(
        default=None, description="Folder that contains tokenizer.json, relative to the config file."
    )
    hub: HubSource | None = Field(default=None, description="Download the tokenizer from the Hugging Face Hub.")
    train: TrainTokenizer | None = Field(default=None, description="Train a tokenizer on the run's text.")
    chat_template: SingleLine | None = Field(
        default=None,
        description="Jinja file that replaces the tokenizer's chat template, relative to the config file.",
    )

    @model_validator(mode="after")
    def _check_one_source(self) -> Tokenizer:
        return require_exactly_one(self, "path", "hub", "train")


DEFAULT_TOOLS_COLUMN = "tools"


class Columns(FrozenModel):
    """Names of the columns to read."""

    text: SingleLine = Field(default="text", description="kind text: column with the document.")
    messages: SingleLine = Field(default="messages", description="kind chat: column with a list of {role, content}.")
    prompt: Text | None = Field(
        default=None,
        description="kind chat, instead of messages: column with the user's part, as a string or as a list of messages. "
        "Answers in this list are outside of the loss. Or a "
        'template that joins columns, such as "{instruction}\\n{input}": it leaves out an empty column and the text before '
        "it.",
    )
    completion: Text | None = Field(
        default=None, description="Column or template of the assistant's answer to prompt. Set both or neither."
    )
    tools: SingleLine | None = Field(
        default=None,
        description="kind chat: column with the functions that the assistant may call, as a list of JSON schemas or its JSON "
        "text. null: the column `tools`, where there is one.",
    )

    @model_validator(mode="after")
    def _check_pair(self) -> Columns:
        if bool(self.prompt) != bool(self.completion):
            given, absent = ("prompt", "completion") if self.prompt else ("completion", "prompt")
            raise ValueError(f"{given} is set and {absent} is not; set both prompt and completion, or neither")
        for template in (self.prompt, self.completion):
            template_columns(template or "text")  # raises ValueError for a template that cannot be read
        return self

    def of_kind(self, kind: Literal["text", "chat"]) -> dict[str, str | None]:
        """Return the settings that have an effect on datasets of a kind."""
        if kind == "text":
            return {"text": self.text}
        used = ("prompt", "completion") if self.prompt else ("messages",)
        return {key: getattr(self, key) for key in (*used, "tools")}

    def required(self, kind: Literal["text", "chat"]) -> tuple[str, ...]:
        """Return the columns that every row of a dataset must have."""
        settings = [value for value in self.of_kind(kind).values() if value]
        names = [name for value in settings for name in template_columns(value)]
        return tuple(dict.fromkeys(names))

    def optional(self, kind: Literal["text", "chat"]) -> tuple[str, ...]:
        """Return the columns that are read where a row has them."""
        default = DEFAULT_TOOLS_COLUMN
        return (default,) if kind == "chat" and not self.tools and default not in self.required(kind) else ()


class Decontaminate(FrozenModel):
    """Removal of documents that share a sequence of words with an evaluation text."""

    files: Annotated[tuple[SingleLine, ...], Field(min_length=1)] = Field(
        description="Evaluation files, in any supported format. Paths or globs, relative to the config file."
    )
    columns: Annotated[tuple[SingleLine, ...], Field(min_length=1)] = Field(
        default=("text",), description="Columns with evaluation texts. Each value counts as a separate text."
    )
    ngram_words: Annotated[int, Field(ge=4, le=100)] = Field(
        default=13,
        description="Length of the shared sequence in words. Case, punctuation and spacing are ignored. GPT-3 used 13.",
    )


class Dataset(FrozenModel):
    """One dataset. Set exactly one of files, hub, python_stdlib and mixture."""

    kind: Literal["text", "chat"] = Field(
        description="text: each row is one document. chat: each row is one conversation."
    )
    files: tuple[SingleLine, ...] = Field(
        default=(),
        description="Files, folders or globs, relative to the config file. A folder stands for all its files of one format, "
        "without README, LICENSE, hidden files and markers such as Spark's _SUCCESS. Links to folders count, too.",
    )
    hub: HubDataset | None = Field(default=None, description="Download the dataset from the Hugging Face Hub.")
    python_stdlib: PythonStdlib | None = Field(
        default=None, description="Demo data: the standard library of this machine's Python."
    )
    mixture: dict[Name, Annotated[float, Field(ge=1e-9, le=1e9)]] = Field(
        default={},
        description="Names of other datasets of the same kind, with their weights. Samples come from them in these proportions.",
    )
    format: Literal["auto", "jsonl", "json", "parquet", "csv", "text", "arrow"] = Field(
        default="auto",
        description="File format. auto: by file extension; longhaul decompresses .gz and .zst. text: each file is one document.",
    )
    columns: Columns = Field(default=Columns(), description="Names of the columns to read.")
    bad_rows: Literal["stop", "skip"] = Field(
        default="stop",
        description="Reaction to a row that longhaul cannot read. stop: the job fails. skip: the job leaves the row "
        "out, counts such rows by reason and names one example.",
    )
    max_document_mb: Annotated[float, Field(gt=0, le=80)] = Field(
        default=64.0,
        description="Size limit of a document or line, in MB. Larger ones are bad rows. The limit is at most 24 for chats, and "
        "at most 4 without gigatoken.",
    )
    chunk_mb: Annotated[float, Field(ge=1e-6, le=1e6)] = Field(
        default=16.0,
        description="Source data per chunk, in MB. Each chunk becomes separate shards. Use about 256 for terabytes of data.",
    )
    reasoning_in_loss: bool = Field(
        default=True,
        description="kind chat: compute the loss on the assistant's <think>…</think> text, and on [THINK]…[/THINK] where "
        "both are special tokens. false: it is context only.",
    )
    allow_control_tokens: bool = Field(
        default=False,
        description="kind chat: encode the text of a control token in a message, such as <|im_end|>, as that token. false: as "
        "plain text, which cannot end a turn. <think> and </think> are always tokens. [THINK] and "
        "[/THINK] are tokens in answers if the tokenizer has both as special tokens.",
    )
    validation_fraction: Fraction = Field(
        default=0.01,
        description="Fraction of the documents that is held out for validation, selected by document hash.",
    )
    deduplicate: Literal["none", "exact", "near"] = Field(
        default="none",
        description="Keep only the first of several duplicate documents. exact: equal documents. near: also similar documents "
        "(MinHash over sequences of 5 words).",
    )
    decontaminate: Decontaminate | None = Field(
        default=None,
        description="Remove whole documents that contain evaluation text, and list them in the dataset's folder.",
    )

    @model_validator(mode="after")
    def _check_one_source(self) -> Dataset:
        if self.mixture:
            whole_weights(self.mixture)
            if self.deduplicate != "none" or self.decontaminate:
                key = "decontaminate" if self.decontaminate else f"deduplicate {self.deduplicate}"
                raise ValueError(f"{key} has no effect on a mixture; set it on the datasets that are mixed")
        return require_exactly_one(self, "files", "hub", "python_stdlib", "mixture")
