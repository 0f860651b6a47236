"""Writes the error messages for bad config values and unknown keys: suggestions, renamed and unsupported keys."""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from longhaul.config.field_types import PATTERN_DESCRIPTIONS, item_name

_MAX_PROBLEMS = 20
# Keys of earlier releases -> what to write now.
_REPLACED_KEYS = {"cuda_build": 'write accelerator: {cuda: "13.0"}, {rocm: "6.4"} or cpu'}
# DeepSpeed keys that users may copy from elsewhere, and the features that they enable.
_UNSUPPORTED_KEYS = {
    "zero_quantized_weights": "ZeRO++ quantized weights (qwZ)",
    "zero_quantized_gradients": "ZeRO++ quantized gradients (qgZ)",
    "zenflow": "ZenFlow",
}

# Keys of Hugging Face's Trainer, DeepSpeed and Megatron-LM -> the key of a stage that sets the same thing.
KEYS_OF_OTHER_TOOLS = {
    "learning_rate": "optimizer.lr",
    "adam_epsilon": "optimizer.eps",
    "max_grad_norm": "optimizer.gradient_clipping",
    "clip_grad": "optimizer.gradient_clipping",
    "lr_scheduler_type": "schedule.kind",
    "lr_decay_style": "schedule.kind",
    "warmup_ratio": "schedule.warmup_steps",
    "max_steps": "steps",
    "train_iters": "steps",
    "num_train_epochs": "epochs",
    "batch_size": "global_batch_size",
    "train_batch_size": "global_batch_size",
    "gradient_accumulation_steps": "global_batch_size",
    "per_device_train_batch_size": "micro_batch_size",
    "train_micro_batch_size_per_gpu": "micro_batch_size",
    "max_length": "sequence_length",
    "max_seq_length": "sequence_length",
    "seq_length": "sequence_length",
    "gradient_checkpointing": "activation_checkpointing",
    "bf16": "precision",
    "torch_compile": "compile",
    "zero_optimization": "zero",
    "tensor_model_parallel_size": "parallel.tensor",
    "pipeline_model_parallel_size": "parallel.pipeline",
    "save_steps": "checkpoints.every_steps",
    "save_total_limit": "checkpoints.keep_last",
    "eval_steps": "validation.every_steps",
}


def validation_message(path: Path | str, value: object, model: type[BaseModel], error: ValidationError) -> str:
    """Return one line per problem of `value`, which was read from the file `path` as an instance of `model`."""
    problems = error.errors(include_url=False)
    # pydantic counts only valid items, so it also reports a list with an invalid item as too short. Leave that problem out.
    shown = [
        problem
        for problem in problems
        if problem["type"] != "too_short"
        or not any(other["loc"][: len(problem["loc"])] == problem["loc"] != other["loc"] for other in problems)
    ]
    lines = [f"{path}: {_problem_text(value, model, problem)}" for problem in shown[:_MAX_PROBLEMS]]
    if len(shown) > _MAX_PROBLEMS:
        lines.append(f"{path}: {len(shown) - _MAX_PROBLEMS} more problems")
    return "\n".join(lines)


def _problem_text(value: object, model: type[BaseModel], problem: ErrorDetails) -> str:
    location, kind = problem["loc"], problem["type"]
    where = ".".join(_keys_to(value, location))
    if kind == "extra_forbidden":
        return _unknown_key_text(where, model, location)
    if kind == "missing":
        return f"{where} is missing"
    text = _expected_form(problem) or re.sub(
        r"^(Value error, |(Input|String|Tuple|Dictionary) should (be )?)|(?<= item) after validation",
        "",
        problem["msg"],
    )
    if kind == "literal_error" and (close := _closest(str(problem["input"]), re.findall("'(.*?)'", text))):
        text = f"{text}; did you mean {close}?"
    if kind != "value_error":
        return f"{where} is {shortened(problem['input'])}; expected: {text}"
    return ": ".join(filter(None, (where, text)))  # without a location, the text begins with the key


def _expected_form(problem: ErrorDetails) -> str:
    """Return what form a value must have, where pydantic's own words are those of programmers; else nothing."""
    match problem["type"]:
        case "tuple_type":
            return "a list, whose items begin with `- ` or stand in [ ]"
        case "string_type" if isinstance(problem["input"], (int, float)):
            return "text; put the value in quotes"
        case "string_pattern_mismatch":
            return PATTERN_DESCRIPTIONS.get(problem.get("ctx", {})["pattern"], "")
    return ""


def _unknown_key_text(where: str, model: type[BaseModel], location: Sequence[int | str]) -> str:
    word = str(location[-1])
    if feature := _UNSUPPORTED_KEYS.get(word):
        return f"{where}: {feature} is not supported; remove the key"
    if (written := KEYS_OF_OTHER_TOOLS.get(word)) and _is_meant_for_a_stage(location, written):
        return f"{where} is not a known key; write {written} of the stage"
    return f"{where} is not a known key{_suggestion(word, _model_at(model, location[:-1]))}"


def _is_meant_for_a_stage(location: Sequence[int | str], written: str) -> bool:
    """Return whether a key of another tool is at the root, in a stage, or in the section of the key that is written instead.

    In other sections it means something else, such as the length of generated texts.

    location: `stages`, the number of the stage, the sections, the key
    """
    if len(location) == 1:
        return True
    return location[0] == "stages" and list(location[2:-1]) in ([], written.split(".")[:-1])


def _keys_to(value: Any, location: Sequence[int | str]) -> Iterator[str]:
    """Yield the keys that lead to `location`. Items of a list are called by their names, as in all other messages."""
    for part in location:
        if isinstance(part, int) and isinstance(value, list) and part < len(value):
            yield item_name([item.get("name") if isinstance(item, dict) else None for item in value], part)
            value = value[part]
        else:
            yield str(part)
            value = value.get(part) if isinstance(value, dict) else None


def _suggestion(word: str, model: type[BaseModel]) -> str:
    if word in _REPLACED_KEYS:
        return f"; {_REPLACED_KEYS[word]}"
    keys = _keys_of(model)
    if inner := next(_sections_with_key(model, word), None):  # a known word is no misspelling
        return f"; it is a key of {inner}"
    if close := _closest(word, keys, cutoff=0.6):
        return f"; did you mean {close}?"
    return f"; known keys: {', '.join(keys)}"


def _closest(word: str, words: Sequence[str], cutoff: float = 0.7) -> str | None:
    return next(iter(difflib.get_close_matches(word, words, n=1, cutoff=cutoff)), None)


def _sections_with_key(model: type[BaseModel], word: str, path: str = "") -> Iterator[str]:
    """Yield the paths of the sections below a model that have a key of this name."""
    for name, field in model.model_fields.items():
        inner = f"{path}.{field.alias or name}".lstrip(".")
        for section in _models_in(field.annotation):
            if word in _keys_of(section):
                yield inner
            yield from _sections_with_key(section, word, inner)


def shortened(value: object, limit: int = 80) -> str:
    """Return repr(value), cut after `limit` characters."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}…"


def _model_at(model: type[BaseModel], location: Sequence[int | str]) -> type[BaseModel]:
    """Return the section at `location`. The path leads through nested models, lists and dictionaries."""
    for part in location:
        if isinstance(part, int):
            continue
        field = next((f for n, f in model.model_fields.items() if part in (n, f.alias)), None)
        if field is not None:
            model = next(_models_in(field.annotation), model)
    return model


def _keys_of(model: type[BaseModel]) -> list[str]:
    return [field.alias or name for name, field in model.model_fields.items()]


def _models_in(annotation: object) -> Iterator[type[BaseModel]]:
    """Yield the models in a type annotation, which may be a union, a list or a dictionary of them."""
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        if issubclass(annotation, BaseModel):
            yield annotation
        return
    for argument in typing.get_args(annotation):
        yield from _models_in(argument)
