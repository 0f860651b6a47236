"""Field types shared by the run and site models: names and words that are safe wherever they end up."""

from __future__ import annotations

from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$"
ONE_LINE_PATTERN = r"^[^\x00-\x1f\x7f]+$"
SLURM_WORD_PATTERN = r"^[A-Za-z0-9_][A-Za-z0-9_.,:@%/+=-]*$"
IN_WORDS = {
    NAME_PATTERN: "letters, digits, _ and -, at most 64 of them, the first a letter or digit",
    ONE_LINE_PATTERN: "one line of text, not empty",
    SLURM_WORD_PATTERN: "one word of letters, digits and _.,:@%/+=-, the first a letter, digit or _",
}

# Names become folder names, Snakemake wildcards and job names. A SlurmWord becomes an argument, of which the executor plugin
# gives some to a shell unquoted; the plugin quotes a constraint, which alone may hold operators. None begins like an option.
Name = Annotated[str, StringConstraints(pattern=NAME_PATTERN)]
SlurmWord = Annotated[str, StringConstraints(pattern=SLURM_WORD_PATTERN, max_length=256)]
Constraint = Annotated[
    str, StringConstraints(pattern=r"^[A-Za-z0-9_\[(][A-Za-z0-9_.,:@%/+=\[\]&|*()-]*$", max_length=256)
]
SlurmOption = Annotated[str, StringConstraints(pattern=r"^--[a-z][a-z-]*(=[A-Za-z0-9_.,:@%/+\[\]-]+)?$")]
EnvironmentName = Annotated[str, StringConstraints(pattern=r"^[A-Z_][A-Z0-9_]*$")]
CudaBuild = Annotated[str, StringConstraints(pattern=r"^(cpu|cu[0-9]{2,4})$")]
OneLine = Annotated[str, StringConstraints(pattern=ONE_LINE_PATTERN, max_length=4096)]
OneLineOrEmpty = Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f\x7f]*$", max_length=4096)]
HubId = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$", max_length=128)]

# Beyond any machine or training; without an end, a slip of the keyboard is found when the arithmetic takes for ever.
LARGEST = 10**15
Count = Annotated[int, Field(ge=1, le=LARGEST)]
Whole = Annotated[int, Field(ge=0, le=LARGEST)]
MachineCount = Annotated[int, Field(ge=1, le=100_000)]
Share = Annotated[float, Field(ge=0.0, lt=1.0)]
Precision = Literal["fp32", "bf16", "fp16"]


class FrozenModel(BaseModel):
    """Immutable, no unknown keys, no silent conversion between types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, populate_by_name=True)


class HubSource(FrozenModel):
    """A repository on the Hugging Face hub; `fetch` pins the revision to a commit."""

    id: HubId = Field(description="Repository, for example Qwen/Qwen3-0.6B.")
    revision: OneLine = Field(default="main", description="Branch, tag or commit; pinned to a commit by fetch.")


M = TypeVar("M", bound="FrozenModel")


def exactly_one(model: M, *keys: str) -> M:
    """The model, for a validator; ValueError unless one of these keys alone is given."""
    given = [key for key in keys if getattr(model, key)]
    if len(given) != 1:
        found = " and ".join(given) if given else "none"
        raise ValueError(f"needs exactly one of {', '.join(keys)}; found {found}")
    return model
