"""Every key of a run config and of a site file is read somewhere."""

from __future__ import annotations

import re
import typing
from collections import defaultdict
from collections.abc import Iterator

import pytest
from pydantic import BaseModel

from longhaul.checks.collective_benchmarks import COLLECTIVES
from longhaul.config.architectures import Decoder, Model
from longhaul.config.run_config import Config
from longhaul.config.site_config import FabricLimits, Site
from longhaul.config.stage_config import Stage
from longhaul.config.validation_messages import KEYS_OF_OTHER_TOOLS
from tests.support.pipeline_run import REPOSITORY

PACKAGE = REPOSITORY / "workflow" / "longhaul"
# Modules that define keys. A validator in them does not count as a reader of a key.
DEFINITIONS = {
    PACKAGE / "config" / f"{name}.py"
    for name in ("run_config", "stage_config", "dataset_config", "site_config", "architectures", "generate_reference")
}
READERS = "\n".join(path.read_text() for path in PACKAGE.rglob("*.py") if path not in DEFINITIONS)

# Sections that are read as a whole: transformers gets all sizes of a network, and limits are found by the measurement's name.
READ_AS_A_WHOLE = (Decoder, Model, FabricLimits)


def holders(annotation: object, key: str) -> Iterator[tuple[str, type[BaseModel]]]:
    """Yield (key, model) for each model in a type and below it; the key holds the model."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield key, annotation
        for name, field in annotation.model_fields.items():
            yield from holders(field.annotation, name)
    for argument in typing.get_args(annotation):
        yield from holders(argument, key)


def keys_of_models() -> dict[type[BaseModel], set[str]]:
    found: dict[type[BaseModel], set[str]] = defaultdict(set)
    for key, model in (*holders(Config, "config"), *holders(Site, "site")):
        found[model].add(key)
    return {model: keys for model, keys in found.items() if not issubclass(model, READ_AS_A_WHOLE)}


HOLDERS = keys_of_models()


def owners(model: type[BaseModel]) -> set[str]:
    """Return names of variables that hold a model in code: its key, and the last word of its or a base's class name."""
    bases = [base.__name__ for base in model.__mro__ if issubclass(base, BaseModel)]
    return HOLDERS[model] | {re.findall(r"[A-Z][a-z]*", name)[-1].lower() for name in bases}


def patterns(model: type[BaseModel], name: str) -> Iterator[str]:
    """Yield patterns of code that reads a key. If several models have the key, the name of the variable must fit the model."""
    if sum(name in other.model_fields for other in HOLDERS) == 1:
        yield rf"\.{name}\b|\"{name}\""
    for owner in owners(model):
        # stage.name, stages[0].name, config.datasets[x].kind
        yield rf"\b{owner.removesuffix('s')}s?(\[[^\]]*\])?\.{name}\b"


CASES = [(model, name) for model in HOLDERS for name in model.model_fields]


@pytest.mark.parametrize(("model", "name"), CASES, ids=[f"{model.__name__}.{name}" for model, name in CASES])
def test_key_is_read_somewhere(model: type[BaseModel], name: str):
    assert any(re.search(pattern, READERS) for pattern in patterns(model, name)), (
        f"no module reads {model.__name__}.{name}"
    )


@pytest.mark.parametrize("schema", [Config.model_json_schema(), Site.model_json_schema()], ids=["config", "site"])
def test_every_number_has_two_limits(schema: object):
    """A number without a limit is accepted in the plan and fails, or runs without end, in a job."""
    assert [
        text
        for text in _numbers(schema)
        if not ({"minimum", "exclusiveMinimum"} & text and {"maximum", "exclusiveMaximum"} & text)
    ] == []


def _numbers(schema: object) -> Iterator[set[str]]:
    """Yield the keys of every number in a JSON schema. rope_scaling has rules of its own."""
    if isinstance(schema, dict):
        if schema.get("type") in ("number", "integer"):
            yield set(schema)
        for key, inner in schema.items():
            if key not in ("rope_scaling", "mlp_only_layers"):
                yield from _numbers(inner)
    elif isinstance(schema, list):
        for inner in schema:
            yield from _numbers(inner)


def test_fabric_limits_are_those_of_the_measured_collectives():
    names = {f"{collective.name}_gbps" for collective in COLLECTIVES} | {"all_reduce_latency_us"}
    assert set(FabricLimits.model_fields) == names


@pytest.mark.parametrize(("foreign", "written"), KEYS_OF_OTHER_TOOLS.items(), ids=KEYS_OF_OTHER_TOOLS)
def test_key_of_another_tool_has_a_counterpart(foreign: str, written: str):
    """A name that a stage has itself never reaches the table."""
    assert foreign not in Stage.model_fields
    section: type[BaseModel] = Stage
    for key in written.split("."):
        annotation = section.model_fields[key].annotation
        section = next((model for _, model in holders(annotation, key)), section)
