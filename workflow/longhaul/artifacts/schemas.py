"""The small JSON files that pass between rules, one dataclass each."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

from longhaul.artifacts.files import read_json, write_json
from longhaul.errors import UserError


def failed_path(out: Path) -> Path:
    """Where a check that found problems leaves its report: `out` itself stays absent, as it means that all is well."""
    return out.with_name(f"{out.name}.failed.json")


@dataclass(frozen=True)
class Artifact:
    """Base of the JSON artefacts: its name, a schema version, and exactly the dataclass' own fields."""

    schema_version: ClassVar[int] = 1

    def write(self, path: Path) -> None:
        """Writes the artefact atomically."""
        write_json(
            path, {"artifact": type(self).__name__, "schema_version": self.schema_version, **dataclasses.asdict(self)}
        )

    @classmethod
    def read(cls, path: Path) -> Self:
        """Reads an artefact back; UserError when it is another kind, version or shape."""
        value = read_json(path)
        found = (
            (value.pop("artifact", None), value.pop("schema_version", None))
            if isinstance(value, dict)
            else (None, None)
        )
        if found != (cls.__name__, cls.schema_version):
            raise UserError(
                f"{path} holds {found[0]} version {found[1]}, not {cls.__name__} version {cls.schema_version}",
                "it was written by another release: delete it, the next run makes it again",
            )
        try:
            return cls(**value)
        except TypeError as error:
            raise UserError(f"{path} is not a complete {cls.__name__}: {error}", "delete it and run again") from None


@dataclass(frozen=True)
class Lock(Artifact):
    """What fetch pinned: `results/<run>.lock.json`.

    sources: "tokenizer", "model" or a dataset's name -> {"hub": id, "revision": commit, "path": folder,
             "files": [data files]} (hub; streamed rows with "documents" and "sha256" of their one file) or
             {"path", "files", "documents", "skipped_files", "bytes"} (python_stdlib).
    model:   the Hugging Face config.json of a pretrained model, as a dict; empty when the model is built from the config.
    """

    sources: dict[str, dict[str, Any]] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TokenizerManifest(Artifact):
    """`results/<run>/tokenizer.json`: the tokenizer folder every later step reads.

    hash covers tokenizer.json, its config and the chat template: equal hashes give equal ids.
    """

    path: str
    hash: str
    vocab_size: int
    bos_id: int | None
    eos_id: int
    pad_id: int
    has_chat_template: bool
    trained_on: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Survey(Artifact):
    """`results/<run>/data/<dataset>.survey.json`: what the jobs that share a dataset's units agree on.

    sources: fields of longhaul.data.shards.chunks.Source, in order; encoder as in DataManifest
    """

    tokenizer_hash: str
    sources: list[dict[str, Any]]
    encoder: dict[str, str]


@dataclass(frozen=True)
class EncodedPartition(Artifact):
    """`results/<run>/data/<dataset>.encoded-<share>-of-<shares>.json`: one job's share of the units is on the disk."""

    share: int
    shares: int
    encoder: dict[str, str]
    units: list[str]


@dataclass(frozen=True)
class DataManifest(Artifact):
    """`results/<run>/data/<dataset>.json`: token shards of one dataset.

    path:     folder of the shards, results/<run>/data/<dataset>
    hash:     of the source bytes, the tokenizer and the dataset's settings
    splits:   "train" / "validation" -> {"shards": [{"prefix", "tokens", "documents", "sha256": {"bin", "idx", "mask"?}}],
              "tokens", "documents", "loss_tokens"}; a prefix is relative to `path`
              "dropped": file in `path` that names the documents that readers filter out, where there are any;
              the sums are then without them
    sources:  [{"path", "bytes", "sha256", "documents"}]
    skipped:  reason -> number of documents left out or passed over
    unigram_entropy_nats: of the training split's tokens (data.shards.unigram_entropy): the loss of a model that only counts
    mixture:  [{"weight": whole number, "manifest": a DataManifest's fields}] where the samples are those of other datasets
    encoder:  {"name": "gigatoken" or "tokenizers", "reason": why it is not the fast one, "" if it is}
    """

    dataset: str
    kind: str
    path: str
    hash: str
    tokenizer_hash: str
    dtype: str
    splits: dict[str, dict[str, Any]]
    sources: list[dict[str, Any]]
    skipped: dict[str, int]
    unigram_entropy_nats: float
    encoder: dict[str, str] = field(default_factory=dict)
    mixture: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Checkpoint(Artifact):
    """`results/<run>/stages/<stage>/checkpoint.json`: a finished stage.

    weights:     folder results/<run>/stages/<stage>/weights/<hash>
    spec:        the result spec that was trained (plan.result_spec)
    checkpoints: "last" and, where there is validation, "best" -> {"step", "path", "sha256", "validation_loss"};
                 path is relative to `weights`; sha256 is that of the checkpoint's manifest.json
    """

    run: str
    stage: str
    weights: str
    spec: dict[str, Any]
    checkpoints: dict[str, dict[str, Any]]
    steps: int
    data_hash: str
    tokenizer_hash: str


@dataclass(frozen=True)
class CheckReport(Artifact):
    """What a check found; `problems` is empty when all is well."""

    problems: list[str]

    def conclude(self, out: Path, what_is_wrong: str, hint: str) -> None:
        """Writes `out`, which means that all is well; with problems failed_path(out) instead, and raises UserError."""
        failed = failed_path(out)
        if self.problems:
            self.write(failed)
            raise UserError(f"{what_is_wrong}:\n  - " + "\n  - ".join(self.problems), f"{hint}; all is in {failed}")
        self.write(out)
        failed.unlink(missing_ok=True)


@dataclass(frozen=True)
class EnvironmentReport(CheckReport):
    """`results/<run>/environment.json`: what the check nodes hold."""

    nodes: list[dict[str, Any]]
    warnings: list[str]


@dataclass(frozen=True)
class FabricReport(CheckReport):
    """`results/<run>/fabric.json`: collective measurements.

    results: [{"collective", "bytes", "time_us", "algorithm_bandwidth_gbps", "bus_bandwidth_gbps", "world_size"}] in GB/s.
    """

    backend: str
    world_size: int
    hosts: list[str]
    results: list[dict[str, Any]]
    limits: dict[str, float]


@dataclass(frozen=True)
class Export(Artifact):
    """`results/<run>/export/<stage>.json`: a proved Hugging Face folder.

    proof: {"tensors": {"count", "equal", "dtype"}, "logits": {"bit_equal", "max_abs_difference", "bound"},
            "from_pretrained": {"missing", "unexpected"}}
    samples: [{"prompt", "split", "completion", "ended_with_eos"}]; a prompt is how a document of that split begins
    """

    stage: str
    checkpoint: str
    step: int
    path: str
    dtype: str
    parameters: int
    bytes: int
    files: dict[str, str]
    proof: dict[str, Any]
    samples: list[dict[str, Any]]
    provenance: dict[str, Any]
