"""Keys `software` and `accelerator` of the site file: modules, venv, conda or container, and torch's CUDA or ROCm build."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from longhaul.config.field_types import CommandOption, FrozenModel, SingleLine, SlurmWord, ToolkitVersion
from longhaul.config.slurm_options import RESERVED_SRUN_OPTIONS, SET_BY_LONGHAUL, check_options


class Accelerator(FrozenModel):
    """The toolkit that torch is built for; without cuda and rocm it is the CPU build."""

    cuda: ToolkitVersion | None = Field(default=None, description="CUDA version of torch, for example 13.0.")
    rocm: ToolkitVersion | None = Field(default=None, description="ROCm version of torch, for example 6.4.")

    @property
    def build(self) -> str:
        """Return the build in the words of the environment check: cuda 13.0, rocm 6.4 or cpu."""
        return build_name(self.cuda, self.rocm)

    @model_validator(mode="after")
    def _check_one(self) -> Accelerator:
        if self.cuda and self.rocm:
            raise ValueError(f"names both cuda {self.cuda} and rocm {self.rocm}; a build of torch has one of them")
        return self


def build_name(cuda: str | None, rocm: str | None) -> str:
    """Return the name of a build of torch from its CUDA and its ROCm version."""
    if cuda:
        return f"cuda {cuda}"
    return f"rocm {rocm}" if rocm else "cpu"


def _section_of(value: object) -> object:
    """Return the section that a site file's value stands for: `cpu` is the section without a toolkit."""
    if isinstance(value, str) and value != "cpu":
        raise ValueError(f'{value!r:.40} is no build of torch; write {{cuda: "13.0"}}, {{rocm: "6.4"}} or cpu')
    return {} if value == "cpu" else value


# `cpu`, or a section with cuda or rocm.
AcceleratorOrCpu = Annotated[
    Accelerator, BeforeValidator(_section_of, json_schema_input_type=Literal["cpu"] | Accelerator)
]


class Software(FrozenModel):
    """The job environment. `launch.sh` loads the modules, and each step starts in the environment."""

    kind: Literal["current", "venv", "conda", "container", "srun", "modules"] = Field(
        default="current",
        description="Type of environment. current: the environment in which Snakemake runs. container: Apptainer or Singularity. "
        "srun: a container that srun starts (pyxis, or the container engine of CSCS). modules: the Python of a module.",
    )
    path: SingleLine | None = Field(
        default=None,
        description="Absolute path. venv, conda: folder of the environment. container: image file.",
    )
    python: SingleLine | None = Field(
        default=None,
        description="kind container, srun, modules: the Python to start, for example that of a venv inside of the container; "
        "null: python3.",
    )
    runtime: Literal["apptainer", "singularity"] = Field(
        default="apptainer", description="kind container: command that starts the container."
    )
    gpu_flag: bool = Field(
        default=True,
        description="kind container: start jobs that ask for GPUs with --nv or --rocm. false: a module binds the GPUs.",
    )
    options: tuple[CommandOption, ...] = Field(
        default=(),
        description="kind container: further options of the container command. kind srun: the options that select the container, "
        "for example --container-image=/images/job.sqsh or --environment=/images/job.toml.",
    )
    binds: tuple[SingleLine, ...] = Field(
        default=(),
        description="kind container, and srun with --container-image: additional folders to bind, as `folder` or `from:to`. The "
        "checkout, run, storage, data and model folders are always bound.",
    )
    module_purge: bool = Field(default=False, description="Run `module purge` before the modules are loaded.")
    module_use: tuple[SingleLine, ...] = Field(
        default=(), description="Folders for `module use` before the modules are loaded."
    )
    modules: tuple[SlurmWord, ...] = Field(
        default=(), description="Environment modules to load first, with every kind."
    )

    @property
    def is_pyxis(self) -> bool:
        """Return whether srun mounts folders into the container with --container-mounts."""
        return self.kind == "srun" and any(option.startswith("--container-image=") for option in self.options)

    @model_validator(mode="after")
    def _check_paths(self) -> Software:
        if self.kind in ("venv", "conda", "container") and not self.path:
            raise ValueError(f"kind {self.kind} needs path")
        absolute = [("path", self.path), ("python", self.python if "/" in (self.python or "") else None)]
        absolute += [(key, path) for key in ("binds", "module_use") for path in getattr(self, key)]
        for key, path in absolute:
            # A job starts in the working folder of its run, so a relative path would differ between runs.
            if path and not path.startswith("/"):
                raise ValueError(f"{key} {path!r} is not an absolute path; write a path that starts with /")
        return self

    @model_validator(mode="after")
    def _check_kind(self) -> Software:
        if self.kind == "modules" and not self.modules:
            raise ValueError("kind modules needs modules")
        if self.kind == "srun" and not self.options:
            raise ValueError("kind srun needs options, for example --container-image=… or --environment=…")
        if self.kind == "srun":
            mounts = dict.fromkeys(("--container-mounts", "--container-workdir"), SET_BY_LONGHAUL)
            check_options("options", self.options, RESERVED_SRUN_OPTIONS | mounts)
        if self.options and self.kind not in ("container", "srun"):
            raise ValueError(f"options has no effect with kind {self.kind}; remove it, or use kind container or srun")
        if self.binds and self.kind != "container" and not self.is_pyxis:
            raise ValueError(f"binds has no effect with kind {self.kind}; the container's own file names its mounts")
        if self.python and self.kind not in ("container", "srun", "modules"):
            raise ValueError(f"python has no effect with kind {self.kind}; remove it")
        if (self.module_use or self.module_purge) and not self.modules:
            raise ValueError("module_use and module_purge need modules")
        return self
