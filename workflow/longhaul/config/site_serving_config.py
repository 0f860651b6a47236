"""Key `serving` of the site file: the inference engine that serves exports, the Python that starts it, and its options."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from longhaul.config.field_types import (
    CommandOption,
    EnvironmentVariableName,
    FrozenModel,
    SingleLine,
    SingleLineOrEmpty,
)
from longhaul.config.slurm_options import SET_BY_LONGHAUL, check_options

EngineName = Literal["transformers", "vllm", "sglang"]
ENGINE_PACKAGES: dict[EngineName, tuple[str, ...]] = {
    "transformers": ("transformers", "fastapi", "uvicorn", "openai"),
    "vllm": ("vllm",),
    "sglang": ("sglang",),
}
"""Packages that the Python of an engine must be able to import. `transformers serve` needs openai for its answers' types."""
# Options that say where the server listens, who may ask it, what it serves and what it logs.
_RESERVED_OPTIONS = {
    "--admin-api-key",
    "--api-key",
    "--config",
    "--context-length",
    "--data-parallel-size",
    "--disable-uvicorn-access-log",
    "--dist-init-addr",
    "--dp-size",
    "--dtype",
    "--enable-expert-parallel",
    "--ep-size",
    "--expert-parallel-size",
    "--headless",
    "--enable-cors",
    "--enable-log-requests",
    "--grpc-port",
    "--host",
    "--log-level",
    "--log-requests",
    "--master-addr",
    "--master-port",
    "--max-model-len",
    "--max-num-seqs",
    "--max-running-requests",
    "--model",
    "--model-path",
    "--nccl-init-addr",
    "--nnodes",
    "--no-disable-uvicorn-access-log",
    "--no-enable-expert-parallel",
    "--node-rank",
    "--pipeline-parallel-size",
    "--port",
    "--pp-size",
    "--served-model-name",
    "--shutdown-timeout",
    "--tensor-parallel-size",
    "--tp-size",
    "--trust-remote-code",
    "--uds",
}
_RESERVED_VARIABLES = {"VLLM_API_KEY", "VLLM_HOST_IP", "SGLANG_HOST_IP", "PYTHONPATH"}


class Serving(FrozenModel):
    """The inference engine of the site."""

    engine: EngineName = Field(
        default="transformers",
        description="transformers: `transformers serve`, which supports no API key and answers one request after the other. "
        "vllm, sglang: installed by you.",
    )
    python: Annotated[tuple[SingleLine, ...], Field(max_length=64)] = Field(
        default=(),
        description="Command that starts the Python of the engine's environment, as a list of words, for example "
        "[/opt/vllm/bin/python] or [apptainer, exec, --nv, /images/vllm.sif, python3]; []: the Python of the job environment.",
    )
    options: tuple[CommandOption, ...] = Field(
        default=(), description="Further options of the engine's server, for example --kv-cache-dtype=fp8."
    )
    environment: dict[EnvironmentVariableName, SingleLineOrEmpty] = Field(
        default={}, description="Environment variables of the engine alone."
    )

    @model_validator(mode="after")
    def _check_reserved(self) -> Serving:
        check_options("options", self.options, dict.fromkeys(_RESERVED_OPTIONS, SET_BY_LONGHAUL))
        if reserved := sorted(_RESERVED_VARIABLES & set(self.environment)):
            raise ValueError(f"environment sets {reserved[0]}, which longhaul sets for each server; remove it")
        return self
