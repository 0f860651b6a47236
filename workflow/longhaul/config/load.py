"""Reads one YAML file into frozen models; every fault is one UserError that names key, value, limit and remedy."""

from __future__ import annotations

import difflib
import json
import re
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from longhaul.config.field_types import IN_WORDS, FrozenModel
from longhaul.config.package_data import data_root
from longhaul.config.run_config import Config
from longhaul.config.site_config import Site
from longhaul.errors import UserError

SITES = data_root() / "config" / "sites"
M = TypeVar("M", bound=FrozenModel)


@dataclass(frozen=True)
class LoadedConfig:
    """A config, its site, and the folder that relative paths in it are taken from."""

    config: Config
    site: Site
    path: Path

    @property
    def folder(self) -> Path:
        return self.path.parent

    def resolve(self, key: str, written: str) -> Path:
        """The path that a key of the config holds as an absolute one: relative to the config file, not to the working folder."""
        return absolute_path(key, written, self.folder)


def absolute_path(key: str, written: str, folder: Path) -> Path:
    """A written path, relative to `folder` or to a ~; UserError for one that no file can have, or that is barred."""
    try:
        path = (folder / Path(written).expanduser()).resolve()
        path.exists()
    except (OSError, RuntimeError) as error:  # pathlib says with a RuntimeError that a ~user or a loop of links is none
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UserError(
            f"{key} {_shown(written)} is no path: {reason}", "name a path that you can read, in full"
        ) from None
    return path


def load_config(path: Path) -> LoadedConfig:
    """Reads a run's config and its site; UserError when either is missing, broken or invalid."""
    config = read_model(path, Config)
    return LoadedConfig(config, load_site(config.site, path.resolve().parent), path.resolve())


def load_site(written: str, folder: Path) -> Site:
    """A site by name from config/sites, or by path (anything with a slash or a .yaml ending) relative to `folder`."""
    if "/" in written or written.endswith((".yaml", ".yml")):
        return read_model(absolute_path("site", written, folder), Site)
    names = sorted(file.stem for file in SITES.glob("*.yaml"))
    if written not in names:
        raise UserError(
            f"site: there is no site {_shown(written)}", f"use one of {', '.join(names)}, or the path of a site file"
        )
    return read_model(SITES / f"{written}.yaml", Site)


def read_model(path: Path, model: type[M]) -> M:
    """Reads a YAML file into `model`."""
    value = _read_yaml(path)
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected keys and values, found {_shown(value)}", "see docs/config.md")
    try:
        # YAML has no tuples: validating as JSON-like input lets strict models take lists for them.
        _check_plain(value, path)
        return model.model_validate_json(json.dumps(value))
    except ValidationError as error:
        raise UserError(_explain(path, model, error), "docs/config.md lists every key") from None


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key written twice, and reads 1e-4 as a number as YAML 1.2 does."""


def _unique_mapping(loader: _StrictLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: dict[Any, int] = {}
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        line = key_node.start_mark.line + 1
        if isinstance(key, typing.Hashable) and key in seen:
            raise yaml.MarkedYAMLError(problem=f"key {key!r} is written twice, in lines {seen[key]} and {line}")
        seen[key] = line
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


_StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _unique_mapping)
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d[\d_]*\.?\d*|\.\d+)([eE][-+]?\d+)$"), list("-+0123456789.")
)


def _read_yaml(path: Path) -> Any:
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=_StrictLoader)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist", "name an existing YAML file") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder", "name a YAML file") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}", "name a YAML file that you can read") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8: {error.reason} at byte {error.start}", "save it as UTF-8") from None
    except yaml.YAMLError as error:
        raise UserError(
            f"{path} is not valid YAML: {_one_line(error)}", "mend the line; docs/config.md has an example"
        ) from None
    except RecursionError:
        raise UserError(f"{path} is nested too deeply", f"{_MAX_DEPTH} levels are enough") from None
    except ValueError as error:  # a date or a number that is none
        raise UserError(f"{path}: {_one_line(error)}", "quote the value, or mend it") from None


def _one_line(error: Exception) -> str:
    problem, mark = getattr(error, "problem", None), getattr(error, "problem_mark", None)
    where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
    return f"{problem or error}{where}".replace("\n", " ")


_MAX_VALUES, _MAX_DEPTH = 100_000, 20


def _check_plain(value: Any, path: Path) -> None:
    """Only what JSON has too, with keys that are text, and no more of it than a person writes: aliases multiply."""
    waiting: list[tuple[Any, tuple[str, ...]]] = [(value, ())]
    seen = 0
    while waiting:
        value, place = waiting.pop()
        seen += 1
        if seen > _MAX_VALUES or len(place) > _MAX_DEPTH:
            raise UserError(
                f"{path} holds more than {_MAX_VALUES} values or {_MAX_DEPTH} levels, its aliases (&, *) followed",
                "write the config without aliases; many files are one glob",
            )
        if isinstance(value, dict):
            for key in value:
                if not isinstance(key, str):
                    raise UserError(f"{path}: {'.'.join((*place, str(key)))}: key {key!r} is no text", "quote the key")
            waiting += [(inner, (*place, key)) for key, inner in value.items()]
        elif isinstance(value, list):
            waiting += [(inner, (*place, str(number))) for number, inner in enumerate(value)]
        elif not isinstance(value, str | int | float | bool | None):
            where = ".".join(place) or "the file"
            raise UserError(
                f"{path}: {where} is {value}, which YAML reads as a {type(value).__name__}", "quote the value"
            )


# Keys of DeepSpeed that a user may bring along, and what they switch on.
_NOT_PROVED = {
    "zero_quantized_weights": "ZeRO++'s quantized weights (qwZ)",
    "zero_quantized_gradients": "ZeRO++'s quantized gradients (qgZ)",
    "zenflow": "ZenFlow",
}


def _explain(path: Path, model: type[BaseModel], error: ValidationError) -> str:
    problems = error.errors(include_url=False)
    # A list of which items are wrong is told to be too short, as pydantic counts what is right.
    told = [
        problem
        for problem in problems
        if problem["type"] != "too_short"
        or not any(other["loc"][: len(problem["loc"])] == problem["loc"] != other["loc"] for other in problems)
    ]
    return "\n".join(f"{path}: {_explain_one(model, problem)}" for problem in told)


def _explain_one(model: type[BaseModel], problem: Any) -> str:
    location, kind = problem["loc"], problem["type"]
    where = ".".join(str(part) for part in location) or "the file"
    if kind == "extra_forbidden":
        if reason := _NOT_PROVED.get(str(location[-1])):
            return f"{where}: {reason} is not proved here, so it is refused; drop the key"
        return f"{where} is not a known key{_nearest(str(location[-1]), _keys_at(model, location[:-1]))}"
    if kind == "missing":
        return f"{where} is missing"
    if kind == "string_pattern_mismatch" and (words := IN_WORDS.get(problem["ctx"]["pattern"])):
        return f"{where} is {_shown(problem['input'])}; expected: {words}"
    text = re.sub(
        r"^(Value error, |(Input|String|Tuple|Dictionary) should (be )?)|(?<= item) after validation",
        "",
        problem["msg"],
    )
    return f"{where} is {_shown(problem['input'])}; expected: {text}" if kind != "value_error" else f"{where}: {text}"


def _nearest(word: str, keys: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, keys, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f"; known keys: {', '.join(keys)}"


def _shown(value: Any, limit: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}…"


def _keys_at(model: type[BaseModel], location: Sequence[Any]) -> list[str]:
    """The keys a model has at a place of the file, following nested models, lists and dictionaries."""
    for part in location:
        if isinstance(part, int):
            continue
        field = next((f for n, f in model.model_fields.items() if part in (n, f.alias)), None)
        if field is not None:
            model = next(_models_in(field.annotation), model)
    return [field.alias or name for name, field in model.model_fields.items()]


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        if issubclass(annotation, BaseModel):
            yield annotation
        return
    for argument in typing.get_args(annotation):
        yield from _models_in(argument)
