"""Checks the values of a pretrained model's generation_config.json, with which its export has to load."""

from __future__ import annotations

import json
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from longhaul.config.field_types import HuggingFaceConfig
from longhaul.config.reserved_keys import GENERATION_CLASSES, refuse_own_names
from longhaul.config.validation_messages import validation_message
from longhaul.errors import UserError

_WHERE = "model.pretrained: generation_config.json"
_REMEDY = (
    "correct or remove the model's generation_config.json; for a model.pretrained.hub, do it in a copy of its folder, and use "
    "that as model.pretrained.path"
)


class _GenerationKeys(BaseModel):
    """Keys whose values transformers checks or computes with when it loads a model."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)

    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None
    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    num_beams: int | None = None
    num_return_sequences: int | None = None
    max_length: int | None = None
    max_new_tokens: Annotated[int, Field(ge=1)] | None = None
    early_stopping: bool | Literal["never"] | None = None
    assistant_ensemble_weight: Annotated[float, Field(gt=0, lt=1)] | None = None
    suppress_tokens: tuple[int, ...] | None = None
    cache_implementation: (
        Literal["dynamic", "static", "offloaded", "offloaded_static", "quantized", "hybrid"] | None
    ) = None
    compile_config: None = None
    watermarking_config: None = None

    @model_validator(mode="after")
    def _check_number_of_answers(self) -> _GenerationKeys:
        if not self.do_sample and (self.num_return_sequences or 1) > (self.num_beams or 1):
            raise ValueError(
                f"num_return_sequences is {self.num_return_sequences}; without do_sample it must be at most num_beams, "
                f"{self.num_beams or 1}"
            )
        return self


def check_generation_keys(settings: HuggingFaceConfig) -> None:
    """Raise UserError if the export could not load with a value of a generation_config.json, or with a key's name."""
    try:
        _GenerationKeys.model_validate_json(json.dumps(settings))
        refuse_own_names(settings, GENERATION_CLASSES, "generation")
    except ValidationError as error:
        raise UserError(validation_message(_WHERE, settings, _GenerationKeys, error), _REMEDY) from None
    except ValueError as error:
        raise UserError(f"{_WHERE}: {error}", _REMEDY) from None
