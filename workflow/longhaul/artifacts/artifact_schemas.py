"""Fields of the JSON artifacts that rules write: manifests of tokenizer, data and checkpoints, check reports, export, lock file.
Each file is written atomically and last.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar, NotRequired, Self

from pydantic import AfterValidator, ConfigDict, Field
from typing_extensions import TypedDict

from longhaul.artifacts.atomic_files import DELETE_HINT, read_json, write_json
from longhaul.artifacts.export_provenance import Provenance
from longhaul.artifacts.node_check_row import CheckRow
from longhaul.artifacts.typed_json import Sha256, parse_json
from longhaul.errors import BadNodesError, UserError

Count = Annotated[int, Field(ge=0, le=10**18)]
"""A number of things. It fits the 64-bit integers of NumPy."""


def failed_path(out: Path) -> Path:
    """Return the path of the report of a check that found problems. `out` itself then stays absent: it means success."""
    return out.with_name(f"{out.name}.failed.json")


@dataclass(frozen=True)
class Artifact:
    """Base of the artifacts. A file holds the class name, the schema version and exactly the fields of the dataclass."""

    schema_version: ClassVar[int] = 1
    hint: ClassVar[str] = DELETE_HINT
    """The remedy for an invalid file."""
    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    def write(self, path: Path) -> None:
        """Write the artifact atomically."""
        write_json(
            path, {"artifact": type(self).__name__, "schema_version": self.schema_version, **dataclasses.asdict(self)}
        )

    @classmethod
    def read(cls, path: Path, hint: str = "") -> Self:
        """Read an artifact.

        hint: the remedy for an invalid file that a user named: it may be any file, so the remedy must not be to delete it

        Raises:
            UserError: the file is missing or invalid, it is of another class or version, or a field has another type.
        """
        value = read_json(path, hint or cls.hint)
        fields = value if isinstance(value, dict) else {}
        found = fields.pop("artifact", None), fields.pop("schema_version", None)
        if found != (cls.__name__, cls.schema_version):
            raise UserError(
                f"{path} holds {found[0]} version {found[1]}, not {cls.__name__} version {cls.schema_version}",
                hint or f"another release wrote it: {cls.hint}",
            )
        try:
            return cls.from_fields(fields)
        except ValueError as error:
            raise UserError(f"{path} is not a complete {cls.__name__}: {error}", hint or cls.hint) from None

    @classmethod
    def from_fields(cls, fields: dict[str, object]) -> Self:
        """Return the artifact with the given fields.

        Raises:
            ValueError: a field is missing, unknown or of another type; the message names it.
        """
        return parse_json(json.dumps(fields), cls)


class Shard(TypedDict):
    """One token shard. prefix: path without ending, relative to the manifest's `path`; sha256: ending -> SHA-256 of the file."""

    prefix: str
    tokens: Count
    documents: Count
    sha256: dict[str, Sha256]


class KeptConversations(TypedDict):
    """Counts of a split's conversations in sequences of one length. Records of earlier releases have fewer keys.

    documents:              conversations of which a sequence keeps a loss token
    tokens:                 their tokens in the sequences
    cut_documents:          those of which a part is in no sequence
    dropped_documents:      conversations left out because they are longer than a sequence (truncate: drop)
    documents_without_loss: conversations left out because what a sequence keeps of them holds no loss token
    loss_tokens:            loss tokens of the split
    cut_loss_tokens:        those in no sequence
    median_tokens:          half of the conversations are not longer, before truncation
    """

    sequence_length: Count
    truncate: NotRequired[str]
    documents: Count
    tokens: Count
    cut_documents: Count
    dropped_documents: NotRequired[Count]
    documents_without_loss: NotRequired[Count]
    loss_tokens: NotRequired[Count]
    cut_loss_tokens: NotRequired[Count]
    median_tokens: NotRequired[Count]


class Split(TypedDict):
    """Shards of one split. The totals leave out the documents of `filtered_out`, a file in the manifest's `path`."""

    shards: list[Shard]
    tokens: Count
    documents: Count
    loss_tokens: Count
    filtered_out: NotRequired[str]
    filtered_out_sha256: NotRequired[Sha256]


class Source(TypedDict):
    """One source of a dataset."""

    path: str
    bytes: Count
    sha256: str
    documents: Count


class MixturePart(TypedDict):
    """One dataset of a mixture; manifest: the fields of its DataManifest."""

    weight: Annotated[int, Field(gt=0)]
    manifest: dict[str, object]


class SavedCheckpoint(TypedDict):
    """One checkpoint; path: relative to the weights folder; sha256: of its manifest.json."""

    step: Count
    path: str
    sha256: Sha256
    validation_loss: float | None


class CheckedNode(TypedDict):
    """Facts of a node that the report shows."""

    __pydantic_config__ = ConfigDict(extra="allow")  # pyright: ignore[reportGeneralTypeIssues]

    host: str
    gpus: list[object]
    cpus: int
    memory_bytes: int
    disk_free_bytes: int | None
    clock_skew_s: float
    versions: dict[str, str | None]


class GeneratedSample(TypedDict):
    """A completion by an exported model."""

    prompt: str
    split: str
    completion: str
    ended_with_eos: bool


class IndexedSource(TypedDict):
    """The fields of longhaul.data.shards.chunks.SourceFile."""

    path: str
    file_format: str
    size_bytes: Count
    sha256: Sha256
    modified_ns: int


class LockedSource(TypedDict):
    """Record of fetch about one source."""

    __pydantic_config__ = ConfigDict(extra="allow")  # pyright: ignore[reportGeneralTypeIssues]

    path: NotRequired[str]
    revision: NotRequired[str]
    files: NotRequired[list[str]]
    sha256: NotRequired[Sha256]


def _require_training_split(splits: dict[str, Split]) -> dict[str, Split]:
    if "train" not in splits:
        raise ValueError("there is no split `train`")
    return splits


@dataclass(frozen=True)
class Lock(Artifact):
    """`results/<run>.lock.json`: the revisions and files that fetch pinned.

    sources: "tokenizer", "model" or a dataset's name -> {"hub": id, "revision": commit, "path": folder,
             "files": [data files]} (hub; streamed rows with "documents" and "sha256" of their one file) or
             {"path", "files", "documents", "skipped_files", "bytes"} (python_stdlib).
    model:   the Hugging Face config.json of a pretrained model, as a dict; empty when the model is built from the config.
    """

    hint: ClassVar[str] = "restore the file, or pin the newest revisions: longhaul fetch"

    sources: dict[str, LockedSource] = field(default_factory=dict)
    model: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class TokenizerManifest(Artifact):
    """`results/<run>/tokenizer.json`: the tokenizer of a run.

    path: the tokenizer's folder, which all later jobs read
    hash: of tokenizer.json, its config and the chat template; equal hashes give equal token ids
    files: name in the folder -> SHA-256, of every file
    """

    path: str
    hash: str
    vocab_size: int
    bos_id: int | None
    eos_id: int
    pad_id: int
    has_chat_template: bool
    files: dict[str, Sha256]
    trained_on: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class SourceIndex(Artifact):
    """`results/<run>/data/<dataset>.sources.json`: what the jobs that share a dataset's chunks have in common.

    sources: in the order of the dataset's files.
    encoder: as in DataManifest.
    """

    tokenizer_hash: str
    sources: list[IndexedSource]
    encoder: dict[str, str]


@dataclass(frozen=True)
class EncodedPartition(Artifact):
    """`results/<run>/data/<dataset>.encoded-<partition>-of-<partitions>.json`: the chunks of one partition exist.

    encoder: as in DataManifest.
    chunks:  names of the partition's chunks.
    """

    partition: int
    partitions: int
    encoder: dict[str, str]
    chunks: list[str]


@dataclass(frozen=True)
class DataManifest(Artifact):
    """`results/<run>/data/<dataset>.json`: token shards of one dataset.

    path:     folder of the shards, results/<run>/data/<dataset>
    hash:     of the source bytes, the tokenizer and the dataset's settings
    splits:   "train" / "validation" -> {"shards": [{"prefix", "tokens", "documents", "sha256": {"bin", "idx", "mask"?}}],
              "tokens", "documents", "loss_tokens"}; a prefix is relative to `path`
              "filtered_out": file in `path` with the documents that readers filter out, where there are any;
              the totals are then without them
    sources:  [{"path", "bytes", "sha256", "documents"}]
    skipped:  reason -> number of documents that are not in the shards or are filtered out
    unigram_entropy_nats: entropy in nats of the training split's tokens (data.shards.unigram_entropy), which is the loss of a
              model that only knows the tokens' frequencies
    mixture:  [{"weight": integer, "manifest": a DataManifest's fields}] of a mixture of other datasets
    unread:   "columns" / "message_keys" -> name -> number of rows or messages with a column or key that nothing reads; the name
              of a key is "role.key"
    control_texts: conversations in which a message contains the text of a control token, which is encoded as plain text
    encoder:  {"name": "gigatoken" or "tokenizers", "reason": why it is not the fast one, "" if it is}
    """

    dataset: str
    kind: str
    path: str
    hash: str
    tokenizer_hash: str
    dtype: str
    splits: Annotated[dict[str, Split], AfterValidator(_require_training_split)]
    sources: list[Source]
    skipped: dict[str, int]
    unigram_entropy_nats: float
    encoder: dict[str, str] = field(default_factory=dict)
    unread: dict[str, dict[str, int]] = field(default_factory=dict)
    control_texts: int = 0
    mixture: list[MixturePart] = field(default_factory=list)


@dataclass(frozen=True)
class ConversationCounts(Artifact):
    """`results/<run>/data/<dataset>.kept.json`: what the run's sft stages keep of a dataset's conversations.

    data_hash: `hash` of the data manifest with these conversations
    splits:    split -> counts, one for each sequence_length and truncate of the stages
    """

    data_hash: str
    splits: dict[str, list[KeptConversations]]


@dataclass(frozen=True)
class Checkpoint(Artifact):
    """`results/<run>/stages/<stage>/checkpoint.json`: the checkpoints of a finished stage.

    weights:     folder results/<run>/stages/<stage>/weights/<hash>
    spec:        the result spec of the stage (planning.result_spec)
    checkpoints: "last" and, where there is validation, "best" -> {"step", "path", "sha256", "validation_loss"};
                 path is relative to `weights`; sha256 is that of the checkpoint's manifest.json
    configs:     files in `weights` that an export copies -> SHA-256; empty in files of earlier releases
    """

    run: str
    stage: str
    weights: str
    spec: dict[str, object]
    checkpoints: dict[str, SavedCheckpoint]
    steps: int
    data_hash: str
    tokenizer_hash: str
    configs: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class CheckReport(Artifact):
    """Result of a check. `problems` is empty if it succeeded."""

    problems: list[str]

    def write_or_raise(self, out: Path, summary: str, hint: str, bad_nodes: Mapping[str, str] | None = None) -> None:
        """Write the report to `out` if there are no problems, else to failed_path(out).

        bad_nodes: node without which the job may succeed -> its own problem

        Raises:
            BadNodesError: there are problems, and `bad_nodes`; the message is as that of the UserError.
            UserError:     there are problems; the message is `summary` with the list of problems.
        """
        failed = failed_path(out)
        if self.problems:
            self.write(failed)
            out.unlink(missing_ok=True)  # of an earlier check
            message = f"{summary}:\n  - " + "\n  - ".join(self.problems)
            remedy = f"{hint}; the full report is {failed}"
            raise BadNodesError(message, remedy, bad_nodes) if bad_nodes else UserError(message, remedy)
        self.write(out)
        failed.unlink(missing_ok=True)


@dataclass(frozen=True)
class EnvironmentReport(CheckReport):
    """`results/<run>/environment.json`: hardware and software of the checked nodes."""

    nodes: list[CheckedNode]
    warnings: list[str]
    checks: list[CheckRow] = field(default_factory=list)


@dataclass(frozen=True)
class Export(Artifact):
    """`results/<run>/export/<stage>.json`: a verified Hugging Face folder.

    verification: {"tensors": {"count", "equal", "dtype"}, "logits": {"bit_equal", "max_abs_difference", "bound"},
                  "from_pretrained": {"missing", "unexpected"}}
    samples:      [{"prompt", "split", "completion", "ended_with_eos"}]; a prompt is the beginning of a document of that split
    """

    stage: str
    checkpoint: str
    step: int
    path: str
    dtype: str
    parameters: int
    bytes: int
    files: dict[str, Sha256]
    verification: dict[str, dict[str, object]]
    samples: list[GeneratedSample]
    provenance: Provenance
