"""Base class of job specs (job.json), and launch.json: the steps, inputs, and requeue and restart settings that a supervisor
reads.

A job never reads the user's config, so an edit that is made while the job waits in the queue cannot change it. Relative
paths are relative to the working folder (`snakemake --directory`), in which launch.sh starts every job.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar, Self

from pydantic import ValidationError

from longhaul.artifacts.atomic_files import content_hash, read_bytes, write_text
from longhaul.config.field_types import FrozenModel
from longhaul.errors import UserError


class JobSpec(FrozenModel):
    """Base of all job specs."""

    no_rerun_fields: ClassVar[frozenset[str]] = frozenset({"folder", "out"})
    """Fields that say where or how fast, not what: a change does not run a finished job again."""

    run: str

    def to_json(self) -> str:
        """Return the spec as the text of its JSON file."""
        return self.model_dump_json(indent=2, by_alias=True) + "\n"

    def write(self, path: Path) -> None:
        """Write the spec's JSON file atomically."""
        write_text(path, self.to_json())

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a spec's JSON file.

        Raises:
            UserError: the file is missing, damaged, or another release rendered it.
        """
        text = read_bytes(path)
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise UserError(f"{path} is not a complete {cls.__name__}: {error}", "delete it and run again") from None

    def rerun_key(self) -> str:
        """Return a hash of everything in the spec that the job's result depends on."""
        return content_hash(
            {key: value for key, value in self.model_dump(mode="json").items() if key not in self.no_rerun_fields}
        )

    def input_texts(self) -> Iterable[str | None]:
        """Return small files that the job reads: a permanent failure ends when one of them changes."""
        return ()

    def input_data(self) -> Iterable[str]:
        """Return data files that the job reads: as `input_texts`, but compared by size and time of change."""
        return ()

    def weights_folders_root(self) -> str | None:
        """Return the root of the weights folders in which the supervisor looks for new checkpoints."""
        return None

    def external_paths(self) -> Iterable[str | None]:
        """Return files and folders outside the run that the job reads; a container binds their folders."""
        return ()


class LaunchStep(FrozenModel):
    """One command of a job, as a list of words that no shell reads."""

    title: str
    command: tuple[str, ...]


class LaunchSpec(JobSpec):
    """Spec of the supervisor: the steps of a job, and the rules for restart and requeue."""

    name: str  # train-<stage>, tokenize-<dataset>, …
    folder: str  # absolute: holds launch.json and the job's records
    slurm: bool
    nodes: int
    requeue: bool  # the job may requeue itself
    max_restarts: int  # restarts in the same allocation without a new checkpoint in between
    master_suffix: str | None = None  # text after the first node's name in MASTER_ADDR
    master_interface: str | None = None  # network interface of the first node, whose address is MASTER_ADDR
    deadline_poll_interval_s: float  # how often Slurm is asked for the end of the allocation
    steps: tuple[LaunchStep, ...]
    inputs: tuple[str, ...]  # text files that a permanent failure depends on
    data: tuple[str, ...]  # data files that it depends on, too large to be read for that
    checkpoints: str | None  # root of a stage's weights folders, where the supervisor looks for progress
    quarantine: str  # results/quarantine.json
    attempt_logs: str  # absolute: folder of what the steps print, one file per attempt
