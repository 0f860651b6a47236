"""Types of config values: characters of names and Slurm words that are safe to pass on, ranges of numbers, durations."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, PlainValidator, StringConstraints

HuggingFaceConfig = dict[str, Any]
"""A Hugging Face config.json, or a section of it. The types of its values depend on the model; transformers declares none."""
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$"
TASK_NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$"
SINGLE_LINE_PATTERN = r"^[^\x00-\x1f\x7f]+$"
TEXT_PATTERN = r"^[^\x00-\x08\x0b-\x1f\x7f]+$"
TOOLKIT_VERSION_PATTERN = r"^[0-9]{1,2}\.[0-9]{1,2}$"
SLURM_WORD_PATTERN = r"^[A-Za-z0-9_][A-Za-z0-9_.,:@%/+=-]*$"
_CONSTRAINT_PATTERN = r"^[A-Za-z0-9_\[(][A-Za-z0-9_.,:@%/+=\[\]&|*()-]*$"
_SRUN_OPTION_PATTERN = r"^--[a-z][a-z-]*(=[A-Za-z0-9_.,:@%/+\[\]-]+)?$"
# The Slurm plugin passes options of sbatch to a shell, which would expand brackets to file names.
_SBATCH_OPTION_PATTERN = r"^--[a-z][a-z-]*(=[A-Za-z0-9_.,:@%/+-]+)?$"
_BIND_PATTERN = r"^[a-z][A-Za-z0-9_:,x*-]*$"
# Image names contain # and ://.
_COMMAND_OPTION_PATTERN = r"^--[a-z][a-z-]*(=[^\x00-\x1f\x7f]+)?$"
_VARIABLE_PATTERN = r"^[A-Z_][A-Z0-9_]*$"
_LINE_PATTERN = r"^[^\x00-\x1f\x7f]*$"
HOST_SUFFIX_PATTERN = r"^[A-Za-z0-9-]{1,16}$"
HUB_REPOSITORY_PATTERN = r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$"
_LONG_OPTION = "--name or --name=value, with letters, digits and {signs} in the value; write --core-spec=0, not -S 0"
# Error messages show these descriptions in place of the regular expressions.
PATTERN_DESCRIPTIONS = {
    NAME_PATTERN: "letters, digits, _ and -, at most 64 characters, starting with a letter or digit",
    TASK_NAME_PATTERN: "letters, digits and ._-, at most 128 characters, starting with a letter or digit",
    SINGLE_LINE_PATTERN: "one line of text that is not empty",
    TEXT_PATTERN: "text that is not empty, without control characters other than line breaks and tabs",
    TOOLKIT_VERSION_PATTERN: "a version with two numbers, for example 13.0, in quotes",
    SLURM_WORD_PATTERN: "one word of letters, digits and _.,:@%/+=-, starting with a letter, a digit or _",
    _CONSTRAINT_PATTERN: "features of nodes, without spaces and quotes, joined by & or |, for example gpu&h100",
    _SRUN_OPTION_PATTERN: _LONG_OPTION.format(signs="_.,:@%/+[]-"),
    _SBATCH_OPTION_PATTERN: _LONG_OPTION.format(signs="_.,:@%/+-"),
    _BIND_PATTERN: "a value of srun without spaces and brackets, for example none, cores or map_cpu:0,8,16,24",
    _VARIABLE_PATTERN: "capital letters, digits and _, not starting with a digit",
    _LINE_PATTERN: "one line of text, without control characters",
    HOST_SUFFIX_PATTERN: "up to 16 letters, digits and -",
    HUB_REPOSITORY_PATTERN: "a name or owner/name, as on the Hub",
    _COMMAND_OPTION_PATTERN: "--name or --name=value in one item, not a short option",
}

# A Name becomes a folder name, a Snakemake wildcard and a Slurm job name.
Name = Annotated[str, StringConstraints(pattern=NAME_PATTERN)]
# A SlurmWord becomes an argument of sbatch or srun. Snakemake's Slurm plugin passes some of them to a shell without quotes.
# The plugin quotes a constraint, so only a constraint may contain operators. No value starts with "-", like an option.
SlurmWord = Annotated[str, StringConstraints(pattern=SLURM_WORD_PATTERN, max_length=256)]
SlurmConstraint = Annotated[str, StringConstraints(pattern=_CONSTRAINT_PATTERN, max_length=256)]
SlurmOption = Annotated[str, StringConstraints(pattern=_SRUN_OPTION_PATTERN, max_length=1024)]
SbatchOption = Annotated[str, StringConstraints(pattern=_SBATCH_OPTION_PATTERN, max_length=1024)]
# A CpuBind or GpuBind becomes the value of srun --cpu-bind or --gpu-bind. No shell reads it.
BindValue = Annotated[str, StringConstraints(pattern=_BIND_PATTERN, max_length=4096)]
# An option in a list of words that no shell reads.
CommandOption = Annotated[str, StringConstraints(pattern=_COMMAND_OPTION_PATTERN, max_length=4096)]
EnvironmentVariableName = Annotated[str, StringConstraints(pattern=_VARIABLE_PATTERN)]
ToolkitVersion = Annotated[str, StringConstraints(pattern=TOOLKIT_VERSION_PATTERN)]
SingleLine = Annotated[str, StringConstraints(pattern=SINGLE_LINE_PATTERN, max_length=4096)]
# A text never becomes a path or an argument: it may hold line breaks.
Text = Annotated[str, StringConstraints(pattern=TEXT_PATTERN, max_length=4096)]
SingleLineOrEmpty = Annotated[str, StringConstraints(pattern=_LINE_PATTERN, max_length=4096)]
HubRepositoryId = Annotated[str, StringConstraints(pattern=HUB_REPOSITORY_PATTERN, max_length=128)]

# Larger than any machine or training needs. Without a limit, a typing error makes the plan's arithmetic run without end.
MAX_INTEGER = 10**15
MAX_STEPS = 10**9
MAX_HARDWARE = 100_000
MAX_MINUTES = 10 * 366 * 24 * 60
PositiveInt = Annotated[int, Field(ge=1, le=MAX_INTEGER)]
NonNegativeInt = Annotated[int, Field(ge=0, le=MAX_INTEGER)]
# Slurm's notation for a time limit, without the parts that Slurm allows to leave out: 90:00 could mean minutes or hours.
_DURATION = re.compile(r"(?:([0-9]{1,5})-)?([0-9]{1,5}):([0-5][0-9]):00")


def _minutes_of(value: object) -> object:
    """Return the minutes of a duration such as 1:30:00 or 2-00:00:00; any value that is not a string unchanged."""
    if not isinstance(value, str):
        return value
    match = _DURATION.fullmatch(value)
    if match is None:
        raise ValueError(f"{value[:40]!r} is no time; write a number of minutes, or hours:minutes:00 such as 1:30:00")
    days, hours, minutes = (int(part or 0) for part in match.groups())
    return (days * 24 + hours) * 60 + minutes


def _steps_or_share(value: Any) -> int | float:
    is_steps = type(value) is int and 0 <= value <= MAX_STEPS
    if is_steps or (isinstance(value, float) and 0 < value < 1):
        return value
    text = repr(value)[:40]
    raise ValueError(
        f"{text} is neither a number of steps from 0 to {MAX_STEPS} nor a share of the steps between 0 and 1"
    )


def _micro_batch(value: Any) -> Any:
    """Return AUTO_MICRO_BATCH for `auto`, any other value unchanged."""
    if value == "auto":
        return AUTO_MICRO_BATCH
    if isinstance(value, str) or value == AUTO_MICRO_BATCH:
        raise ValueError(f"{value!r:.40} is no number of samples from 1; write one, or auto")
    return value


_Duration = Annotated[str, Field(pattern=f"^{_DURATION.pattern}$")]
# A number of minutes, or a duration: hours:minutes:00 or days-hours:minutes:00.
Minutes = Annotated[
    int, Field(ge=1, le=MAX_MINUTES), BeforeValidator(_minutes_of, json_schema_input_type=PositiveInt | _Duration)
]
# Samples of a micro batch. The plan replaces `auto` (planning.fit_memory), so nothing behind it meets AUTO_MICRO_BATCH.
AUTO_MICRO_BATCH = 0
MicroBatchSize = Annotated[
    int,
    Field(ge=0, le=MAX_INTEGER),
    BeforeValidator(_micro_batch, json_schema_input_type=PositiveInt | Literal["auto"]),
    PlainSerializer(lambda value: value or "auto"),
]
StepCount = Annotated[int, Field(ge=0, le=MAX_STEPS)]
PositiveStepCount = Annotated[int, Field(ge=1, le=MAX_STEPS)]
# A number of steps, or a share of a stage's steps.
StepsOrShare = Annotated[
    int | float,
    PlainValidator(_steps_or_share, json_schema_input_type=StepCount | Annotated[float, Field(gt=0, lt=1)]),
]
Epochs = Annotated[float, Field(gt=0, le=1e6)]
# Below a second, a busy file system looks like a dead rank. 10^6 s are 11 days.
Timeout = Annotated[float, Field(ge=1, le=1e6)]
HardwareCount = Annotated[int, Field(ge=1, le=MAX_HARDWARE)]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
Precision = Literal["fp32", "bf16", "fp16", "fp8"]


def item_name(names: Sequence[object], index: int) -> str:
    """Return what messages call an item of a list: its name, or its index where the name is missing, invalid or given twice."""
    name = names[index]
    is_name = isinstance(name, str) and re.fullmatch(NAME_PATTERN, name) is not None and names.count(name) == 1
    return str(name) if is_name else str(index)


class FrozenModel(BaseModel):
    """Base of all config sections: immutable, without unknown keys, without silent conversion between types."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        populate_by_name=True,
        # The validator of Config holds those of all sections. Each section's own is made if a section is validated alone.
        defer_build=True,
    )


class HubSource(FrozenModel):
    """A repository on the Hugging Face Hub. `longhaul fetch` resolves the revision to a commit."""

    id: HubRepositoryId = Field(description="Repository id, for example Qwen/Qwen3-0.6B.")
    revision: SingleLine = Field(
        default="main", description="Branch, tag or commit. `longhaul fetch` records the commit that it resolves to."
    )


M = TypeVar("M", bound="FrozenModel")


def require_exactly_one(model: M, *keys: str) -> M:
    """Return the model, for use at the end of a validator.

    Raises:
        ValueError: none or several of the keys are set.
    """
    given = [key for key in keys if getattr(model, key)]
    if len(given) != 1:
        found = " and ".join(given) if given else "none"
        raise ValueError(f"needs exactly one of {', '.join(keys)}; found {found}")
    return model
